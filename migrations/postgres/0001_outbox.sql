-- The outbox: an insert-only log of events, and the relay's own books beside it.
-- Runs on PostgreSQL 14 to 18. The relay never updates or deletes an event to make progress: it moves a cursor.

create schema if not exists outbox;

-- Roles are global to the server, so another database of it may have made them already, or be making them right now.
-- They are looked for first: whoever migrates needs no right to create roles when an administrator made them before.
do $$
declare
    wanted text;
begin
    foreach wanted in array array['outbox_writer', 'outbox_relay'] loop
        if not exists (select from pg_roles where rolname = wanted) then
            begin
                execute format('create role %I nologin', wanted);
            exception when duplicate_object or unique_violation then null;
            end;
        end if;
    end loop;
end
$$;

grant usage on schema outbox to outbox_writer, outbox_relay;

-- Refuses headers that can never leave, in the transaction of the writer, who can still do something about them. An event
-- without headers does not call it, and headers without brackets and escapes, which nearly all are, need one expression. What a
-- writer calls has no search path of its own, which would take 1 us each time: it names all that it uses in full.
create function outbox.headers_can_leave(headers pg_catalog.json)
returns pg_catalog.bool
language plpgsql immutable strict parallel safe
as $$
begin
    return pg_catalog.strpos(headers::pg_catalog.text, '{') operator(pg_catalog.=) 1
           and pg_catalog.strpos(pg_catalog.substr(headers::pg_catalog.text, 2), '{') operator(pg_catalog.=) 0
           and pg_catalog.strpos(headers::pg_catalog.text, '[') operator(pg_catalog.=) 0
           and pg_catalog.strpos(headers::pg_catalog.text, pg_catalog.chr(92)) operator(pg_catalog.=) 0
           -- As in outbox.name_bad_header.
           and not headers::pg_catalog.jsonb operator(pg_catalog.?|)
               '{"",id,type,sequence,content-type,replay,ce_specversion,ce_id,ce_source,ce_type,ce_time,ce_sequence,ce_subject,ce_datacontenttype,ce_data,ce_data_base64}'::pg_catalog.text[]
        or outbox.name_bad_header(headers);
end
$$;

-- Looks at each header; true when all of them can leave, an error that names the first one that can't.
create function outbox.name_bad_header(headers json)
returns boolean
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
    header record;
    kind text := json_typeof(headers);
    zero constant text := '(zero byte)';
    -- The relay's own headers, and the attributes and members of CloudEvents. A header without a name can't leave either.
    reserved constant text[] := array['', 'id', 'type', 'sequence', 'content-type', 'replay', 'ce_specversion', 'ce_id',
        'ce_source', 'ce_type', 'ce_time', 'ce_sequence', 'ce_subject', 'ce_datacontenttype', 'ce_data', 'ce_data_base64'];
begin
    if kind <> 'object' then
        raise exception 'headers must be a JSON object of texts, got %', kind
            using errcode = 'invalid_parameter_value',
                  hint = 'For example: ''{"tenant": "acme"}''.';
    end if;
    -- A value may have a zero byte, which json_each refuses: such an escape is replaced by words before.
    for header in
        select key, value
          from json_each(replace(replace(headers::text, chr(92) || chr(92), 'x'), chr(92) || 'u0000', zero)::json)
    loop
        kind := json_typeof(header.value);
        if kind in ('object', 'array') then
            raise exception 'the header "%" is an %', header.key, kind
                using errcode = 'invalid_parameter_value',
                      hint = 'A header is a text, a number, a boolean or null: pass the JSON as a text.';
        elsif header.key = any (reserved) then
            raise exception 'the header "%" can''t be emitted: %', header.key,
                case header.key when '' then 'it has no name' else 'the name belongs to the relay' end
                using errcode = 'invalid_parameter_value',
                      hint = 'Emit it under another name.';
        elsif strpos(header.key, zero) > 0 then
            raise exception 'the header "%" can''t be emitted: its name has a zero byte', header.key
                using errcode = 'invalid_parameter_value',
                      hint = 'Emit it under another name.';
        end if;
    end loop;
    return true;
end
$$;

-- cache 1: ids must be handed out in the order in which they are asked for, whichever session asks.
create sequence outbox.events_id_seq as bigint cache 1;

create table outbox.events (
    -- Stands before id: defaults are evaluated in column order, and a row's transaction id has to be assigned before
    -- its id, or the reader's lower bound (the floor of a window) could pass a row that it has not seen.
    xid            xid8        not null default pg_current_xact_id(),
    id             bigint      not null default nextval('outbox.events_id_seq'),
    event_id       uuid        not null default gen_random_uuid(),
    aggregate_type text        not null,
    aggregate_id   text        not null,
    event_type     text        not null,
    -- json and not jsonb: the text is published exactly as it was written, and is cheaper to write and to read.
    payload        json,
    payload_bytes  bytea,
    content_type   text,
    headers        json        default
        -- What outbox.context has set for this transaction. What another transaction has left in the session, by a set without
        -- local behind a pooler, is not of this one.
        case when current_setting('outbox.context_of', true) = pg_current_xact_id()::text
             then current_setting('outbox.context', true)::json end,
    occurred_at    timestamptz not null default clock_timestamp(),
    constraint events_pkey primary key (id),
    constraint events_aggregate_type_not_empty check (aggregate_type <> ''),
    constraint events_one_payload check (payload is null or payload_bytes is null),
    constraint events_headers_can_leave check (outbox.headers_can_leave(headers))
) partition by range (id);

alter sequence outbox.events_id_seq owned by outbox.events.id;

-- Serves the rows of transactions that commit late: found by transaction, not by a scan of the much that was published since.
create index events_xid_id on outbox.events (xid, id);

-- An insert never fails because nobody made partitions: what fits nowhere else lands here.
create table outbox.events_default partition of outbox.events default;

-- What one relay at a time does: it locks the row of the task meanwhile. No role but the owner of the functions below may
-- lock rows of this table, so no other session can keep a task from being done.
create table outbox.upkeep (
    task  text   primary key,
    -- Of 'retention': rows up to this id may have been deleted one by one.
    up_to bigint not null default 0
);

insert into outbox.upkeep (task) values ('partitions'), ('samples'), ('retention');

-- Whether this transaction does the task; false while another one is at it.
create function outbox.begin_upkeep(task text)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    -- What the functions look at after they have waited for a lock has to be what is committed by then.
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'the upkeep of the outbox has to be called under read committed, not %',
            current_setting('transaction_isolation')
            using errcode = 'active_sql_transaction',
                  hint = 'Begin the transaction with: begin isolation level read committed';
    end if;
    -- A copy of the schema alone has no rows.
    insert into outbox.upkeep (task) values (begin_upkeep.task) on conflict do nothing;
    perform from outbox.upkeep u where u.task = begin_upkeep.task for update skip locked;
    return found;
end
$$;

-- The partitions with bounds, the default one left out. The expressions have no backslash, whose meaning depends on a setting.
create function outbox.partition_bounds()
returns table (name regclass, lower bigint, upper bigint)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select b.name, coalesce(b.lower, -9223372036854775808), coalesce(b.upper, 9223372036854775807)
      from (select c.oid::regclass as name,
                   pg_get_expr(c.relpartbound, c.oid) as bound,
                   (regexp_match(pg_get_expr(c.relpartbound, c.oid), 'FROM [(]''?(-?[0-9]+)''?[)]'))[1]::bigint as lower,
                   (regexp_match(pg_get_expr(c.relpartbound, c.oid), 'TO [(]''?(-?[0-9]+)''?[)]'))[1]::bigint as upper
              from pg_inherits i
              join pg_class c on c.oid = i.inhrelid
             where i.inhparent = 'outbox.events'::regclass) b
     where b.bound <> 'DEFAULT'
     order by 2
$$;

-- The first id from this one on that only the default partition takes.
create function outbox.first_without_partition(id bigint)
returns bigint
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    bounds record;
    free bigint := id;
begin
    for bounds in select b.lower, b.upper from outbox.partition_bounds() b order by b.lower loop
        if bounds.lower <= free and free < bounds.upper then
            free := bounds.upper;
        end if;
    end loop;
    return free;
end
$$;

-- Makes partitions until `ahead` of them lie wholly beyond the newest id, without a gap from it on; returns how many it
-- made: none when there are enough, or when another session is at it. Writers go on meanwhile, however long their
-- transactions: a partition is made as a table of its own and then attached, which locks out only the users of the
-- default partition. When those keep it from its locks it fails soon (SQLSTATE 55P03), and is to be called again later.
create function outbox.make_partitions(ahead integer default 8, rows_per_partition bigint default 5000000)
returns integer
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
-- A lock request that waits makes every later insert into the default partition queue behind it.
set lock_timeout = '500ms'
as $$
declare
    made integer := 0;
    newest bigint;
    used boolean;
    -- Where the next partition begins, and where the last one has to end: at another partition, or a row of the default one.
    start bigint;
    stop bigint;
    upper bigint;
    beyond bigint;
    name text;
    -- For what is being inserted while partitions are made: each session has drawn one id at most before it waits.
    room constant bigint := least(rows_per_partition, greatest(1000, 10 * current_setting('max_connections')::bigint));
begin
    if coalesce(ahead, 0) not between 1 and 1000 or coalesce(rows_per_partition, 0) < 1 then
        raise exception 'outbox.make_partitions expects 1 to 1000 partitions of at least 1 row, got % of %',
            coalesce(ahead::text, 'null'), coalesce(rows_per_partition::text, 'null')
            using errcode = 'invalid_parameter_value';
    end if;
    -- One at a time: two relays that start together must not race for the same range.
    if not outbox.begin_upkeep('partitions') then
        return 0;
    end if;
    -- What the newest id would need is there, or all that would be made behind the room.
    select s.last_value into newest from outbox.events_id_seq s;
    start := outbox.first_without_partition(newest);
    if start > newest + ahead * rows_per_partition
       or (start <= newest + rows_per_partition / 10
           and outbox.first_without_partition(start + room) > start + room + (ahead - 1) * rows_per_partition) then
        return 0;
    end if;

    -- The locks of attaching, taken before the newest id is read: what is drawn while this waits for them is known then.
    lock table only outbox.events in share update exclusive mode;
    lock table outbox.events_default in access exclusive mode;
    select s.last_value, s.is_called into newest, used from outbox.events_id_seq s;
    start := outbox.first_without_partition(newest);
    beyond := newest + ahead * rows_per_partition;
    if used and start <= newest + rows_per_partition / 10 then
        -- The partitions ran out, or are about to, or lie elsewhere, and the default one takes over. What has an id there
        -- stays there, and so does what is being inserted meanwhile: it would belong to neither partition and fail.
        beyond := start + room + (ahead - 1) * rows_per_partition;
        start := outbox.first_without_partition(start + room);
    end if;
    select least(min(b.lower), (select min(e.id) from only outbox.events_default e where e.id >= start))
      into stop
      from outbox.partition_bounds() b
     where b.lower > start;
    stop := coalesce(stop, 9223372036854775807);
    upper := start;
    while upper <= beyond and upper < stop loop
        upper := least(upper + rows_per_partition, stop);
    end loop;
    if upper = start then
        return 0;
    end if;

    -- Attaching scans the default partition for rows of the new range. With this proof at hand it is scanned once, not
    -- once per partition.
    execute format('alter table outbox.events_default add constraint events_default_scanned check (id < %s or id >= %s)',
                   start, upper);
    stop := upper;
    while start < stop loop
        upper := least(start + rows_per_partition, stop);
        name := 'events_' || start;
        while to_regclass(format('outbox.%I', name)) is not null loop
            name := name || '_';
        end loop;
        -- An identity column that was added to the log is the log's; a partition gets its values from there.
        execute format('create table outbox.%I (like outbox.events including all excluding indexes excluding identity)', name);
        execute format('alter table outbox.events attach partition outbox.%I for values from (%s) to (%s)', name, start, upper);
        start := upper;
        made := made + 1;
    end loop;
    alter table outbox.events_default drop constraint events_default_scanned;
    return made;
end
$$;

-- `outbox-relay migrate` says how large they are to be.
select outbox.make_partitions(
    coalesce(nullif(current_setting('outbox.partitions_ahead', true), '')::integer, 8),
    coalesce(nullif(current_setting('outbox.partition_events', true), '')::bigint, 5000000));

-- Headers for every event of the current transaction: tenant, user, traceparent. A later call replaces an earlier one, and
-- null takes it back.
create function outbox.context(headers json)
returns void
language plpgsql
as $$
begin
    if headers is null then
        perform pg_catalog.set_config('outbox.context_of', '', true);
    elsif outbox.headers_can_leave(headers) then
        perform pg_catalog.set_config('outbox.context_of', pg_catalog.pg_current_xact_id()::pg_catalog.text, true),
                pg_catalog.set_config('outbox.context', headers::pg_catalog.text, true);
    end if;
end
$$;

-- Headers of the transaction with those of one event laid over them.
create function outbox.merged_headers(headers json)
returns json
language plpgsql
stable
as $$
declare
    -- The default of outbox.events.headers.
    context pg_catalog.json := case
        when pg_catalog.current_setting('outbox.context_of', true)
             operator(pg_catalog.=) pg_catalog.pg_current_xact_id()::pg_catalog.text
        then pg_catalog.current_setting('outbox.context', true)::pg_catalog.json end;
begin
    if headers is null then
        return context;
    end if;
    if context is null or pg_catalog.json_typeof(headers) operator(pg_catalog.<>) 'object' then
        return headers;
    end if;
    return (context::pg_catalog.jsonb operator(pg_catalog.||) headers::pg_catalog.jsonb)::pg_catalog.json;
end
$$;

-- The way in. Call it after the entity's own row was changed or locked, in the same transaction: the order of the events
-- of one entity is the order of those locks. The id may be a text, a number or a uuid. A null payload is a tombstone. Returns
-- the event's uuid, which consumers see as the header "id".
create function outbox.emit(
    aggregate_type text,
    aggregate_id anycompatiblenonarray,
    event_type text,
    payload text default null,
    headers json default null
)
returns uuid
language plpgsql
as $$
declare
    event_id pg_catalog.uuid := pg_catalog.gen_random_uuid();
begin
    insert into outbox.events (event_id, aggregate_type, aggregate_id, event_type, payload, headers)
    values (event_id, aggregate_type, aggregate_id::pg_catalog.text, event_type, payload::pg_catalog.json,
            outbox.merged_headers(headers));
    return event_id;
end
$$;

-- The same for a json, which is published exactly as it was written.
create function outbox.emit(
    aggregate_type text,
    aggregate_id anycompatiblenonarray,
    event_type text,
    payload json,
    headers json default null
)
returns uuid
language plpgsql
as $$
declare
    event_id pg_catalog.uuid := pg_catalog.gen_random_uuid();
begin
    insert into outbox.events (event_id, aggregate_type, aggregate_id, event_type, payload, headers)
    values (event_id, aggregate_type, aggregate_id::pg_catalog.text, event_type, payload,
            outbox.merged_headers(headers));
    return event_id;
end
$$;

-- The same for a jsonb, which is published as the text that the server makes of it.
create function outbox.emit(
    aggregate_type text,
    aggregate_id anycompatiblenonarray,
    event_type text,
    payload jsonb,
    headers jsonb default null
)
returns uuid
language plpgsql
as $$
declare
    event_id pg_catalog.uuid := pg_catalog.gen_random_uuid();
begin
    insert into outbox.events (event_id, aggregate_type, aggregate_id, event_type, payload, headers)
    values (event_id, aggregate_type, aggregate_id::pg_catalog.text, event_type, payload::pg_catalog.json,
            outbox.merged_headers(headers::pg_catalog.json));
    return event_id;
end
$$;

-- The same for payloads that are encoded already (Avro, Protobuf).
create function outbox.emit_bytes(
    aggregate_type text,
    aggregate_id anycompatiblenonarray,
    event_type text,
    payload bytea,
    content_type text,
    headers json default null
)
returns uuid
language plpgsql
as $$
declare
    event_id pg_catalog.uuid := pg_catalog.gen_random_uuid();
begin
    insert into outbox.events
        (event_id, aggregate_type, aggregate_id, event_type, payload_bytes, content_type, headers)
    values
        (event_id, aggregate_type, aggregate_id::pg_catalog.text, event_type, payload, content_type,
         outbox.merged_headers(headers));
    return event_id;
end
$$;

-- Wakes relays that listen. The lock is held to the end of the transaction, so that of many open transactions one
-- notifies: committing a notification takes a lock of the whole server, and with one in every transaction commits come
-- one after the other. A hint that is not sent costs latency only.
-- PostgreSQL refuses PREPARE TRANSACTION after a notification: whoever commits in two phases turns it off before, for the
-- transaction (set local outbox.notify = off) or for good (alter role ... set outbox.notify = off).
create function outbox.notify_relay()
returns trigger
language plpgsql
as $$
begin
    if pg_catalog.current_setting('outbox.notify', true) operator(pg_catalog.=) 'off' then
        return null;
    end if;
    if pg_catalog.pg_try_advisory_xact_lock(1868721016, 1) then
        perform pg_catalog.pg_notify('outbox_events', '');
    end if;
    return null;
end
$$;

create trigger events_notify
    after insert on outbox.events
    for each statement execute function outbox.notify_relay();

-- The relay's books. One narrow row per pipeline and shard, with room on its page so that updates stay on it (HOT).

create table outbox.cursors (
    pipeline          text    not null,
    shard             integer not null default 0,
    epoch             bigint  not null default 0,
    prev              pg_snapshot,
    cur               pg_snapshot,
    floor             bigint,
    ceiling           bigint,
    next_floor        bigint,
    last_id           bigint,
    system_identifier bigint,
    timeline          integer,
    -- Another one when the row was deleted and made anew: what was written down elsewhere about the old one is void.
    begun             uuid    not null default gen_random_uuid(),
    updated_at        timestamptz not null default clock_timestamp(),
    primary key (pipeline, shard)
) with (fillfactor = 10, autovacuum_vacuum_threshold = 200, autovacuum_vacuum_scale_factor = 0);

-- Which life of the server this is. Unlogged, so a crash empties it, and a standby that is promoted begins without it:
-- either may have lost the newest transactions and use their ids again. A row that is still there says that every
-- transaction id that was seen since it was made means what it meant.
create unlogged table outbox.incarnation (
    one boolean primary key default true check (one),
    id  uuid    not null default gen_random_uuid()
);

create table outbox.leases (
    pipeline   text        not null,
    shard      integer     not null default 0,
    holder     text        not null,
    epoch      bigint      not null,
    expires_at timestamptz not null,
    -- The last owner gave it back with nothing in flight: its cursor is exact.
    settled    boolean     not null default false,
    primary key (pipeline, shard)
) with (fillfactor = 10, autovacuum_vacuum_threshold = 200, autovacuum_vacuum_scale_factor = 0);

-- How many shards the entities of a pipeline are spread over. Whoever takes a lease holds the row for a moment, so that
-- nobody begins with one number while another comes into force.
create table outbox.pipelines (
    pipeline   text    primary key,
    shards     integer not null check (shards between 1 and 64),
    generation bigint  not null default 1
);

-- Which shard an entity belongs to. The hash is the one by which the server partitions tables, so it stays what it is.
create function outbox.shard_of(aggregate_type text, aggregate_id text, shards integer)
returns integer
language sql immutable parallel safe
-- Its names are resolved here, once, and not where it is called.
return ((hashtextextended(aggregate_id collate "C", hashtextextended(aggregate_type collate "C", 0))
         & 9223372036854775807) % shards)::integer;

-- Where the shards stood when their number changed. The cursors of the new ones begin where none of the old ones had
-- been yet, and leave out what the old shard of an event had passed.
create table outbox.former_cursors (
    pipeline   text        not null,
    -- That they were the cursors of.
    generation bigint      not null,
    shards     integer     not null,
    shard      integer     not null,
    prev       pg_snapshot not null,
    cur        pg_snapshot not null,
    last_id    bigint      not null,
    primary key (pipeline, generation, shard)
);

-- The relays that are there, and how many shards each is told to make. Unlogged: a crash or a failover empties it, and
-- whoever is there says so again.
create unlogged table outbox.members (
    pipeline   text        not null,
    holder     text        not null,
    shards     integer     not null,
    joined_at  timestamptz not null default clock_timestamp(),
    expires_at timestamptz not null,
    primary key (pipeline, holder)
) with (fillfactor = 10, autovacuum_vacuum_threshold = 200, autovacuum_vacuum_scale_factor = 0);

-- Events that were rejected, and those of the same entity that wait behind them, with all that is needed to publish
-- them later, so that they outlive the log's retention. Operators only write `wanted`; the owner of the pipeline does it.
create table outbox.parked (
    pipeline       text        not null,
    id             bigint      not null,
    event_id       uuid        not null,
    aggregate_type text        not null,
    aggregate_id   text        not null,
    event_type     text        not null,
    -- As text: whatever depth the log took is never parsed again.
    payload        text,
    payload_bytes  bytea,
    content_type   text,
    headers        text,
    occurred_at    timestamptz not null,
    -- Of aggregate type and id: an index entry has room for 2,700 bytes, a name has none.
    entity         bigint      not null generated always as
        (pg_catalog.hashtextextended(aggregate_type, pg_catalog.hashtextextended(aggregate_id, 0))) stored,
    -- The order within the entity: the id, raised where ids came again after the sequence was reset.
    place          bigint      not null default 0,
    -- False where the relay could not read the event, or the database not store it: it can be dropped, not redriven.
    has_content    boolean     not null default true,
    -- As in the log: tells whether a cursor has passed the event.
    xid            xid8,
    -- Whether later events of the entity wait behind it; a dead letter holds nobody up.
    holds          boolean     not null default true,
    -- Null for an event that only waits behind a rejected one.
    error          text,
    -- How often it was rejected, and each time when and why: [{"at": …, "error": …}].
    attempts       integer     not null default 0,
    history        jsonb       not null default '[]',
    -- What an operator asked for, until it is done.
    wanted         text,
    parked_at      timestamptz not null default clock_timestamp(),
    -- After a reset of the sequence an id comes again, for another event.
    primary key (pipeline, event_id),
    constraint parked_wanted check (wanted in ('redrive', 'drop'))
);

-- Finds the oldest waiting event of an entity.
create index parked_entity on outbox.parked (pipeline, entity, place);
-- Finds what operators name by its id.
create index parked_id on outbox.parked (pipeline, id);
-- Finds what was asked for: an owner looks every few seconds, and there is nearly never anything.
create index parked_wanted on outbox.parked (pipeline, id) where wanted is not null;
-- Finds events whose content is in the log only: retention leaves them there.
create index parked_without_content on outbox.parked (id) where not has_content;

-- What operators asked for: who, when, of which events, why. The relay's role may add to it and change nothing.
create table outbox.acts (
    id            bigint      generated always as identity primary key,
    at            timestamptz not null default clock_timestamp(),
    -- As the database knows them, and as they name themselves: OS user and host, or the address of an HTTP client.
    database_user text        not null default session_user,
    who           text        not null,
    action        text        not null,
    pipeline      text,
    selector      text        not null,
    events        bigint      not null,
    reason        text
);

-- Parked events that were given up because an operator asked for it. An audit tells them from lost ones.
create table outbox.dropped (
    pipeline   text        not null,
    id         bigint      not null,
    event_id   uuid        not null,
    dropped_at timestamptz not null default clock_timestamp(),
    -- After a failover that lost the newest transactions an id may come again, for another event.
    primary key (pipeline, id, event_id)
);

-- Pipelines that an operator has paused: the owner publishes what is under way and gives the lease back, and no relay takes it.
create table outbox.pauses (
    pipeline      text        primary key,
    since         timestamptz not null default clock_timestamp(),
    database_user text        not null default session_user,
    who           text        not null,
    reason        text        not null
);

-- Events that an operator wants left out. A relay that halts at one of them sets it aside as a dead letter and goes on.
create table outbox.skips (
    pipeline text        not null,
    event_id uuid        not null,
    id       bigint      not null,
    who      text        not null,
    reason   text        not null,
    at       timestamptz not null default clock_timestamp(),
    primary key (pipeline, event_id)
);

-- Replays that were asked for, and how far they have come.
create table outbox.replays (
    id         bigint      generated always as identity primary key,
    pipeline   text        not null,
    selection  json        not null,
    topic      text,
    rate       integer     not null check (rate > 0),
    state      text        not null default 'open' check (state in ('open', 'done', 'cancelled')),
    from_id    bigint      not null,
    until_id   bigint      not null,
    last_id    bigint      not null,
    published  bigint      not null default 0,
    skipped    bigint      not null default 0,
    holder     text        not null,
    expires_at timestamptz not null,
    created_by text        not null default session_user,
    created_at timestamptz not null default clock_timestamp(),
    updated_at timestamptz not null default clock_timestamp()
);

-- When ids began anew, and how far the sequence was set up for it. A reader that finds another newest row here looks at the
-- whole log once.
create table outbox.resets (
    id      bigint      generated always as identity primary key,
    at      timestamptz not null default clock_timestamp(),
    -- Where the sequence stood, and where it continues.
    stood   bigint      not null,
    set_to  bigint      not null
);

-- Sets the sequence of the ids above every id that was ever handed out, as far as rows and books tell, so that none comes
-- a second time: after truncate … restart identity, setval, or a copy of the rows without their sequence. Returns the newest
-- id then. Changes nothing where the sequence is ahead of all of them.
create function outbox.repair_sequence()
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    stood bigint;
    highest bigint;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'outbox.repair_sequence has to be called under read committed, not %',
            current_setting('transaction_isolation')
            using errcode = 'active_sql_transaction',
                  hint = 'begin isolation level read committed; select outbox.repair_sequence(); commit';
    end if;
    -- One at a time; only relays and this function use this table.
    lock table outbox.resets in share row exclusive mode;
    select greatest(
        (select max(e.id) from outbox.events e),
        (select max(greatest(c.ceiling, c.next_floor, c.last_id)) from outbox.cursors c),
        (select max(f.last_id) from outbox.former_cursors f),
        (select max(p.id) from outbox.parked p),
        (select max(d.id) from outbox.dropped d),
        (select max(r.until_id) from outbox.replays r),
        (select max(r.set_to) from outbox.resets r),
        0) into highest;
    select case when s.is_called then s.last_value else 0 end into stood from outbox.events_id_seq s;
    if stood < highest then
        -- Writers go on meanwhile: the thousand keeps what they draw between the look and the setting below it.
        perform setval('outbox.events_id_seq', highest + 1000);
        insert into outbox.resets (stood, set_to) values (stood, highest + 1000);
        return highest + 1000;
    end if;
    return stood;
end
$$;

-- The log as it was at a few moments: what an event's age is told by, because writers set occurred_at and may set it to
-- anything. Only outbox.take_sample writes here. About a hundred rows.
create table outbox.samples (
    id                bigint           generated always as identity primary key,
    -- For people.
    at                timestamptz      not null default clock_timestamp(),
    -- The seconds that relays have counted until then with clocks that no operator sets; only differences mean something.
    counted           double precision not null,
    -- A row whose transaction this snapshot sees was committed by then; of any other that is not known.
    seen              pg_snapshot      not null,
    -- No such row had a higher id.
    newest            bigint           not null,
    -- Transaction ids mean something on the server that assigned them.
    system_identifier bigint           not null
);

-- Tells how many seconds the relays have counted so far, and notes a sample when the last one is older than `spacing`.
--
-- counted, elapsed   what the last call of this relay returned, and the seconds since then by a clock that cannot be set;
--                    null in the first call of a process: then the time since the last sample counts as the database's
--                    clock has it, up to `spacing`, so that a clock that was set forth meanwhile does little
-- longest            samples that are older than this are not needed
create function outbox.take_sample(
    spacing interval,
    longest interval default '1 day',
    counted double precision default null,
    elapsed double precision default null
)
returns double precision
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '500ms'
as $$
declare
    here constant bigint := (select c.system_identifier from pg_control_system() c);
    every constant double precision := extract(epoch from spacing);
    horizon constant double precision := extract(epoch from greatest(longest, interval '1 day'));
    now double precision;
    last record;
    seen pg_snapshot;
    newest bigint;
begin
    if every is null or every <= 0 or horizon is null or not outbox.begin_upkeep('samples') then
        return counted;
    end if;
    select s.counted, extract(epoch from clock_timestamp() - s.at) as ago into last
      from outbox.samples s
     where s.system_identifier = here
     order by s.id desc
     limit 1;
    now := case
        when last.counted is null then 0
        when take_sample.counted is null or elapsed is null then last.counted + greatest(least(last.ago, every), 0)
        else greatest(last.counted, take_sample.counted + greatest(elapsed, 0)) end;
    if last.counted is not null and now < last.counted + every then
        return now;
    end if;
    -- In this order: no row that the snapshot sees has an id above the one that is read after it.
    seen := pg_current_snapshot();
    select case when s.is_called then s.last_value else 0 end into newest from outbox.events_id_seq s;
    insert into outbox.samples (counted, seen, newest, system_identifier) values (now, seen, newest, here);

    -- Beyond ten times the spacing, and beyond the time that events are kept, 40 for the longest time are enough.
    delete from outbox.samples d
     where d.system_identifier <> here
        or d.id = (
            select s.id
              from (select o.id, o.counted,
                           lag(o.counted) over (order by o.id) as before, lead(o.counted) over (order by o.id) as after
                      from outbox.samples o
                     where o.system_identifier = here) s
             where s.after < now - 1.2 * horizon
                or (s.after < now - 50 * every and s.after - s.before < horizon / 40)
             order by s.id
             limit 1);
    return now;
end
$$;

-- The newest sample that is at least this old. A fortieth is added, because that is what a clock that was set while no
-- relay ran may have added to the count.
create function outbox.aged(age interval, slack double precision, now double precision)
returns outbox.samples
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select s
      from outbox.samples s
     where s.system_identifier = (select c.system_identifier from pg_control_system() c)
       and s.counted <= greatest(now, (select max(o.counted) from outbox.samples o where o.system_identifier = s.system_identifier))
           - extract(epoch from age) * (1.025 + slack)
     order by s.counted desc, s.id desc
     limit 1
$$;

-- Whether a cursor belongs to another server or timeline: then it says nothing about these rows.
create function outbox.at_home()
returns boolean
language sql
set search_path = pg_catalog, pg_temp
as $$
    select not exists (
        select from outbox.cursors c cross join pg_control_system() s
         where c.system_identifier <> s.system_identifier
            or c.timeline <> ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int)
$$;

-- A condition on a cursor c and an event e: the cursor has not passed the event. What the start of a window had seen is
-- published, and of the window the ids up to the cursor's.
create function outbox.is_behind()
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select '(c.prev is null
             or (e.xid >= pg_snapshot_xmin(c.prev)
                 and not pg_visible_in_snapshot(e.xid, c.prev)
                 and not (pg_visible_in_snapshot(e.xid, c.cur) and e.id <= c.last_id)))'
$$;

-- A condition on an event e: it may be removed. It is seen by the snapshot `aged`, so it was committed before that was
-- taken; a transaction that commits later is not seen by it, whatever its ids. Every pipeline has published it, or `overdue` sees it,
-- too. And nothing else needs it: neither a parked event whose content is only here, nor a replay that has still to read it.
create function outbox.may_go(aged pg_snapshot, overdue pg_snapshot, behind boolean)
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select format('pg_visible_in_snapshot(e.xid, %L)
        and (%s %s)
        and not exists (select from outbox.parked p
                         where not p.has_content and p.id = e.id and p.event_id = e.event_id)
        and not exists (select from outbox.replays r
                         where r.state = ''open'' and e.id > r.last_id and e.id <= r.until_id)',
        aged,
        case when behind then 'false'
             else format('not exists (select from outbox.cursors c where %s)', outbox.is_behind()) end,
        case when overdue is null then ''
             else format('or pg_visible_in_snapshot(e.xid, %L)', overdue) end)
$$;

-- Gives the space of the oldest partition back that can go whole: every event in it is old enough, published by every
-- pipeline, and not needed any more. Returns what it did, or no row when there is nothing to do. One partition per call:
-- each is a transaction of its own.
--
-- keep                    since the event was committed, at least
-- pipelines               these have to have published it, also when they have no cursor yet; all cursors count besides
-- drop_unpublished_after  older than this it goes even though a pipeline has not published it; null: never. What is lost
--                         so is noted in outbox.acts
-- counted                 what outbox.take_sample returned
--
-- The partition is emptied first, which waits for nobody but who uses that very partition, and is then dropped, which
-- needs the whole log for a moment; where a long transaction keeps it from that, it stays, empty, until a later call.
create function outbox.retire_partition(
    keep interval,
    pipelines text[] default '{}',
    drop_unpublished_after interval default null,
    counted double precision default null
)
returns table (partition text, first_id bigint, last_id bigint, events bigint, unpublished bigint, dropped boolean, lost_to text[])
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
-- A lock request that waits makes every later insert queue behind it.
set lock_timeout = '200ms'
as $$
declare
    candidate record;
    newest bigint;
    aged outbox.samples;
    overdue outbox.samples;
    may_go text;
    late boolean;
    droppable boolean := true;
    failed integer := 0;
    behind boolean;
    lost json;
begin
    if keep is null or not outbox.begin_upkeep('retention') or not outbox.at_home() then
        return;
    end if;
    -- A table that a foreign key refers to can't be truncated; outbox.retire_rows deletes what the key lets go.
    if exists (select from pg_constraint k where k.contype = 'f' and k.confrelid = 'outbox.events'::regclass) then
        return;
    end if;
    aged := outbox.aged(keep, 0, counted);
    overdue := outbox.aged(drop_unpublished_after, 0, counted);
    behind := exists (select from unnest(pipelines) p (name)
                       where not exists (select from outbox.cursors c where c.pipeline = p.name));
    may_go := outbox.may_go(aged.seen, overdue.seen, behind);
    select case when s.is_called then s.last_value else 0 end into newest from outbox.events_id_seq s;

    for candidate in
        select b.name, b.lower, b.upper from outbox.partition_bounds() b where b.upper <= newest + 1 order by b.lower
    loop
        -- Where a pipeline stands, all that comes after has to stay, too.
        exit when failed >= 8;
        partition := candidate.name::text;
        execute format('select min(id), max(id) from %s', candidate.name) into first_id, last_id;
        if first_id is not null then
            -- Ids of the partition were handed out after the sample.
            exit when aged.seen is null or last_id > aged.newest;
            -- The newest first: most often one of them has to stay, if any.
            execute format('select exists (select from (select * from %s order by id desc limit 1000) e where (%s) is not true)',
                           candidate.name, may_go) into late;
            if not late then
                execute format('select exists (select from %s e where (%s) is not true)', candidate.name, may_go) into late;
            end if;
            if late then
                failed := failed + 1;
                continue;
            end if;
            lost := null;
            unpublished := 0;
            execute format('select count(*), min(id) from %s', candidate.name) into events, first_id;
            if overdue.seen is not null then
                execute format(
                    'with unpublished as (
                        select e.id, p.pipeline from %s e
                         cross join lateral (
                            select c.pipeline from outbox.cursors c where %s
                            union select n from unnest($1) n where not exists (select from outbox.cursors c where c.pipeline = n)) p)
                     select (select count(distinct id) from unpublished),
                            (select json_agg(l) from (
                                select pipeline, min(id) as first, max(id) as last, count(*) as events
                                  from unpublished group by pipeline) l)',
                    candidate.name, outbox.is_behind()) into unpublished, lost using pipelines;
            end if;
            begin
                execute format('lock table only %s in access exclusive mode', candidate.name);
            exception when lock_not_available then
                return;
            end;
            -- A transaction may have committed between the look and the lock; now none can any more.
            execute format('select exists (select from %s where xid >= pg_snapshot_xmin($1) and not pg_visible_in_snapshot(xid, $1))',
                           candidate.name) into late using aged.seen;
            if late then
                failed := failed + 1;
                continue;
            end if;
            execute format('truncate only %s', candidate.name);
            insert into outbox.acts (who, action, pipeline, selector, events, reason)
            select 'retention', 'lost', l ->> 'pipeline', format('ids %s to %s', l ->> 'first', l ->> 'last'),
                   (l ->> 'events')::bigint, 'not published within retention.drop_unpublished_after'
              from json_array_elements(lost) l;
            lost_to := array(select l ->> 'pipeline' from json_array_elements(lost) l);
        else
            events := 0;
            unpublished := 0;
            lost_to := '{}';
            first_id := candidate.lower;
            last_id := candidate.upper - 1;
        end if;

        dropped := false;
        if droppable then
            begin
                lock table only outbox.events in access exclusive mode;
                execute format('lock table only %s in access exclusive mode', candidate.name);
                execute format('select exists (select from %s)', candidate.name) into late;
                if not late then
                    execute format('drop table %s', candidate.name);
                    dropped := true;
                end if;
            exception when lock_not_available then
                droppable := false;
            end;
        end if;
        if dropped or events > 0 then
            return next;
            return;
        end if;
    end loop;
end
$$;

-- Deletes events that may go and that no partition takes along in time: those of a partition that is still in use, of the
-- default one, and of one where an event has to stay. Looks at `rows_max` rows after the id `after`, in the order of their
-- ids, through the primary key; returns what it did and how far it looked, or no row at the end of what is old enough. A
-- short transaction that locks nothing but what it deletes.
--
-- The arguments are those of outbox.retire_partition.
create function outbox.retire_rows(
    keep interval,
    pipelines text[] default '{}',
    drop_unpublished_after interval default null,
    counted double precision default null,
    after bigint default null,
    rows_max integer default 5000
)
returns table (first_id bigint, last_id bigint, events bigint, unpublished bigint, looked_to bigint, lost_to text[])
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '200ms'
-- Along the primary key, whatever the statistics say of a table of which all rows come and go: without any, all that is old
-- would be read and sorted for each batch. What that costs by the planner's count would have the statement compiled, which
-- takes longer than to run it.
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
set jit = off
as $$
declare
    aged outbox.samples;
    overdue outbox.samples;
    behind boolean;
begin
    if keep is null or not outbox.begin_upkeep('retention') or not outbox.at_home() then
        return;
    end if;
    -- A twentieth later than whole partitions, so that a log that fills one in less than that is never deleted row by row.
    aged := outbox.aged(keep, 0.05, counted);
    if aged.seen is null then
        return;
    end if;
    overdue := outbox.aged(drop_unpublished_after, 0.05, counted);
    behind := exists (select from unnest(pipelines) p (name)
                       where not exists (select from outbox.cursors c where c.pipeline = p.name));
    execute format(
        'select max(id) from (select id from outbox.events where id > %s and id <= %s order by id limit %s) e',
        coalesce(after, -9223372036854775808), aged.newest, rows_max) into looked_to;
    if looked_to is null then
        return;
    end if;
    execute format(
        'with gone as (
            delete from outbox.events e
             where e.id > %1$s and e.id <= %2$s and %3$s
            returning e.id, %4$s as lost),
         noted as (
            insert into outbox.acts (who, action, pipeline, selector, events, reason)
            select ''retention'', ''lost'', l.pipeline, format(''ids %%s to %%s'', min(g.id), max(g.id)), count(*),
                   ''not published within retention.drop_unpublished_after''
              from gone g cross join unnest(g.lost) l (pipeline)
             group by l.pipeline)
         select min(g.id), max(g.id), count(*), count(*) filter (where cardinality(g.lost) > 0),
                array(select distinct l.pipeline from gone g cross join unnest(g.lost) l (pipeline) order by 1)
           from gone g',
        coalesce(after, -9223372036854775808), looked_to, outbox.may_go(aged.seen, overdue.seen, behind),
        case when overdue.seen is null then '''{}''::text[]'
             else format('array(
                select c.pipeline from outbox.cursors c where %s
                union select n from unnest($1) n where not exists (select from outbox.cursors c where c.pipeline = n))',
                outbox.is_behind()) end)
        into first_id, last_id, events, unpublished, lost_to using pipelines;
    if events > 0 then
        update outbox.upkeep set up_to = greatest(up_to, retire_rows.last_id) where task = 'retention';
    end if;
    return next;
end
$$;

-- Whether the log comes from another cluster, by a dump or a logical copy. Its rows then carry transaction ids that mean
-- something else here, or are still to come, and a window told by them would skip rows.
create function outbox.is_restored()
returns boolean
language sql
security definer
set search_path = pg_catalog, pg_temp
as $$
    select exists (select from outbox.cursors c cross join pg_control_system() s
                    where c.system_identifier <> s.system_identifier)
        or exists (select from outbox.events where xid >= pg_snapshot_xmax(pg_current_snapshot()))
$$;

-- Makes a restored log belong to this cluster: what every pipeline is known to have published stays published, and the
-- rest is as if it had been written by this call, in the order of its ids; so some of it may be published again, and
-- nothing is skipped. Returns how many events that is. Writers go on meanwhile. Changes nothing in a log that is at home.
create function outbox.adopt()
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    seen pg_snapshot;
    known bigint;
    newest bigint;
    first bigint;
    again bigint;
begin
    -- One at a time: whoever waited for another relay finds nothing to do.
    lock table outbox.cursors in share row exclusive mode;
    if not outbox.is_restored() then
        return 0;
    end if;
    -- Taken before this transaction has an id, so that it does not see what is written here.
    if pg_current_xact_id_if_assigned() is not null then
        raise exception 'outbox.adopt has to be called in a transaction of its own'
            using errcode = 'active_sql_transaction';
    end if;
    seen := pg_current_snapshot();
    -- No event above a window's ceiling belongs to it. What writers have emitted here since the restore is above all of
    -- them where the copy brought the sequence along, because a dump has its value from after the rows. Where it did not, the
    -- sequence began anew here, and what it has handed out since lies up to its value.
    select coalesce(min(ceiling), 0) into known from outbox.cursors where prev is not null;
    select case when s.is_called then s.last_value else 0 end into newest from outbox.events_id_seq s;
    update outbox.events e
       set xid = pg_current_xact_id()
     where e.id > known
        or (newest < known and e.id <= newest)
        or exists (
            select from outbox.cursors c
             where c.prev is not null
               and not pg_visible_in_snapshot(e.xid, c.prev)
               and not (pg_visible_in_snapshot(e.xid, c.cur) and e.id <= c.last_id));
    get diagnostics again = row_count;
    -- 3 is the first transaction of any cluster: every snapshot sees it.
    update outbox.events
       set xid = '3'
     where id <= known and xid >= pg_snapshot_xmin(seen) and xid <> pg_current_xact_id();
    -- What is parked lies where its event lies.
    update outbox.parked p set xid = (select e.xid from outbox.events e where e.id = p.id and e.event_id = p.event_id);
    select least(known, min(id) - 1) into first from outbox.events where xid = pg_current_xact_id();
    update outbox.cursors
       set prev = seen, cur = seen, floor = first, ceiling = first, next_floor = first, last_id = first,
           system_identifier = s.system_identifier,
           timeline = ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int,
           updated_at = clock_timestamp()
      from pg_control_system() s
     where prev is not null;
    -- Their snapshots mean nothing here, and what they had passed lies before every cursor now.
    delete from outbox.former_cursors;
    delete from outbox.samples;
    -- Ends the lease of a relay that still works with what it read elsewhere.
    delete from outbox.incarnation;
    perform outbox.repair_sequence();
    return again;
end
$$;

-- Writers may only emit: no column that orders the log, and no reading of what was emitted. The sequence's usage lets its default work.
grant insert (event_id, aggregate_type, aggregate_id, event_type, payload, payload_bytes, content_type, headers, occurred_at)
    on outbox.events to outbox_writer;
-- What the server has filled in, for insert ... returning as ORMs send it.
grant select (id, event_id, occurred_at) on outbox.events to outbox_writer;
grant usage on sequence outbox.events_id_seq to outbox_writer;

grant select on outbox.events to outbox_relay;
grant select on sequence outbox.events_id_seq to outbox_relay;
grant select, insert, update, delete on outbox.cursors, outbox.leases, outbox.parked, outbox.members to outbox_relay;
grant select, insert, update, delete on outbox.pipelines to outbox_relay;
grant select, insert, delete on outbox.former_cursors, outbox.pauses, outbox.skips to outbox_relay;
grant select, insert on outbox.incarnation, outbox.dropped to outbox_relay;
grant select, insert, update on outbox.replays to outbox_relay;
grant select on outbox.resets, outbox.samples, outbox.upkeep to outbox_relay;
-- Not the columns that say when, and as whom the database knows them.
grant select, insert (who, action, pipeline, selector, events, reason) on outbox.acts to outbox_relay;

revoke all on all functions in schema outbox from public;
grant execute on function
    outbox.emit(text, anycompatiblenonarray, text, text, json), outbox.emit(text, anycompatiblenonarray, text, json, json),
    outbox.emit(text, anycompatiblenonarray, text, jsonb, jsonb),
    outbox.emit_bytes(text, anycompatiblenonarray, text, bytea, text, json),
    outbox.context(json), outbox.merged_headers(json), outbox.headers_can_leave(json),
    outbox.name_bad_header(json)
    to outbox_writer;
grant execute on function
    outbox.make_partitions(integer, bigint),
    outbox.take_sample(interval, interval, double precision, double precision),
    outbox.retire_partition(interval, text[], interval, double precision),
    outbox.retire_rows(interval, text[], interval, double precision, bigint, integer),
    outbox.is_restored(), outbox.adopt(), outbox.repair_sequence(), outbox.shard_of(text, text, integer)
    to outbox_relay;
