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

-- Makes partitions until `ahead` of them lie wholly beyond the newest id; returns how many it made: none when there are
-- enough, or when another session is at it. Writers go on meanwhile, however long their transactions: a partition is
-- made as a table of its own and then attached, which locks out nobody but the users of the default partition. When
-- those keep it from its locks it fails soon (SQLSTATE 55P03), and is to be called again later.
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
    upper bigint;
    beyond bigint;
begin
    if coalesce(ahead, 0) not between 1 and 1000 or coalesce(rows_per_partition, 0) < 1 then
        raise exception 'outbox.make_partitions expects 1 to 1000 partitions of at least 1 row, got % of %',
            coalesce(ahead::text, 'null'), coalesce(rows_per_partition::text, 'null')
            using errcode = 'invalid_parameter_value';
    end if;
    -- One at a time: two relays that start together must not race for the same range.
    if not pg_try_advisory_xact_lock(1868721016, 2) then
        return 0;
    end if;

    select max((regexp_match(pg_get_expr(c.relpartbound, c.oid), 'TO \(''?(\d+)''?\)'))[1]::bigint)
      into upper
      from pg_inherits i
      join pg_class c on c.oid = i.inhrelid
     where i.inhparent = 'outbox.events'::regclass;
    if upper > (select last_value from outbox.events_id_seq) + ahead * rows_per_partition then
        return 0;
    end if;

    -- The locks of attaching, taken before the newest id is read: what is drawn while this waits for them is known then.
    lock table only outbox.events in share update exclusive mode;
    lock table outbox.events_default in access exclusive mode;
    select last_value, is_called into newest, used from outbox.events_id_seq;
    beyond := newest + ahead * rows_per_partition;
    if upper is null and not used then
        upper := 1;
    elsif coalesce(upper, 1) <= newest + rows_per_partition / 10 then
        -- The partitions ran out, or are about to, and the default one takes over. What has an id there stays there;
        -- leave room for what is being inserted meanwhile, or that would belong to neither partition and fail.
        upper := greatest(upper, newest) + rows_per_partition;
        beyond := upper + (ahead - 1) * rows_per_partition;
    end if;

    -- Attaching scans the default partition for rows of the new range. With this proof at hand it is scanned once, not
    -- once per partition.
    execute format('alter table outbox.events_default add constraint events_default_scanned check (id < %s)', upper);
    while upper <= beyond loop
        execute format('create table outbox.%I (like outbox.events including all excluding indexes)',
                       'events_' || upper);
        execute format('alter table outbox.events attach partition outbox.%I for values from (%s) to (%s)',
                       'events_' || upper, upper, upper + rows_per_partition);
        upper := upper + rows_per_partition;
        made := made + 1;
    end loop;
    alter table outbox.events_default drop constraint events_default_scanned;
    return made;
end
$$;

select outbox.make_partitions();

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

-- Gives the space of the oldest partition back, when every event in it is old enough and published by every pipeline;
-- returns what it did, or no row when there is nothing to do. One partition per call: each is a transaction of its own.
--
-- keep                    since the youngest event of the partition, at least
-- pipelines               these have to have published it, also when they have no cursor yet; all cursors count besides
-- drop_unpublished_after  older than this it goes even though somebody has not published it; null: never
--
-- The partition is emptied first, which waits for nobody but who uses that very partition, and is then dropped, which
-- needs the whole log for a moment; where a long transaction keeps it from that, it stays, empty, until a later call.
create function outbox.retire_partition(
    keep interval,
    pipelines text[] default '{}',
    drop_unpublished_after interval default null
)
returns table (partition text, first_id bigint, last_id bigint, events bigint, unpublished bigint, dropped boolean)
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
-- A lock request that waits makes every later insert queue behind it.
set lock_timeout = '200ms'
as $$
declare
    candidate record;
    newest bigint;
    youngest timestamptz;
    looked pg_snapshot;
    overdue boolean;
    late boolean;
    droppable boolean := true;
    behind boolean := exists (select from unnest(pipelines) p (name)
                               where not exists (select from outbox.cursors c where c.pipeline = p.name));
    -- What the start of a window had seen is published, and of the window the ids up to the cursor's.
    of_somebody constant text :=
        'from outbox.cursors c join %s e
             on c.prev is null
             or (e.xid >= pg_snapshot_xmin(c.prev)
                 and not pg_visible_in_snapshot(e.xid, c.prev)
                 and not (pg_visible_in_snapshot(e.xid, c.cur) and e.id <= c.last_id))';
begin
    if keep is null or not pg_try_advisory_xact_lock(1868721016, 3) then
        return;
    end if;
    -- A cursor that belongs to another server or timeline says nothing about these rows.
    if exists (
        select from outbox.cursors c cross join pg_control_system() s
         where c.system_identifier <> s.system_identifier
            or c.timeline <> ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int
    ) then
        return;
    end if;
    select case when s.is_called then s.last_value else 0 end into newest from outbox.events_id_seq s;

    for candidate in
        select c.oid::regclass as name, b.lower, b.upper
          from pg_inherits i
          join pg_class c on c.oid = i.inhrelid
         cross join lateral (
            select (regexp_match(pg_get_expr(c.relpartbound, c.oid), 'FROM \(''?(\d+)''?\)'))[1]::bigint as lower,
                   (regexp_match(pg_get_expr(c.relpartbound, c.oid), 'TO \(''?(\d+)''?\)'))[1]::bigint as upper) b
         where i.inhparent = 'outbox.events'::regclass and b.upper <= newest + 1
         order by b.lower
    loop
        looked := pg_current_snapshot();
        partition := candidate.name::text;
        -- Writers may set the time of an event: a few late ones are not to decide.
        execute format(
            'select max(occurred_at), min(id), max(id) from (select id, occurred_at from %s order by id desc limit 1000) e',
            candidate.name) into youngest, first_id, last_id;
        if youngest is not null then
            exit when youngest > clock_timestamp() - keep;
            overdue := coalesce(youngest <= clock_timestamp() - drop_unpublished_after, false);
            exit when behind and not overdue;
            if not overdue then
                execute format('select exists (select ' || of_somebody || ')', candidate.name) into late;
                exit when late;
            end if;
            execute format('select count(*), min(id) from %s', candidate.name) into events, first_id;
            if behind then
                unpublished := events;
            else
                execute format('select count(distinct e.id) ' || of_somebody, candidate.name) into unpublished;
            end if;
            begin
                execute format('lock table only %s in access exclusive mode', candidate.name);
            exception when lock_not_available then
                return;
            end;
            -- A transaction may have committed between the look and the lock; now none can any more.
            execute format(
                'select exists (select from %s where xid >= pg_snapshot_xmin($1) and not pg_visible_in_snapshot(xid, $1))',
                candidate.name) into late using looked;
            exit when late;
            execute format('truncate only %s', candidate.name);
        else
            events := 0;
            unpublished := 0;
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
grant select on outbox.resets to outbox_relay;
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
    outbox.make_partitions(integer, bigint), outbox.retire_partition(interval, text[], interval),
    outbox.is_restored(), outbox.adopt(), outbox.repair_sequence(), outbox.shard_of(text, text, integer)
    to outbox_relay;
