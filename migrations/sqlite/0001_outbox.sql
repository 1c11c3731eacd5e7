-- The outbox in a SQLite file: an insert-only log of events, and the relay's own books beside it.
-- Uses nothing newer than SQLite 3.38, because services write to it with libraries of their own. All times are in
-- microseconds since the Unix epoch. The relay never updates or deletes an event to make progress: it moves a cursor.

create table outbox_events (
    -- One transaction writes at a time, so the order of the ids is the order of the commits. autoincrement: an id that
    -- was committed is never handed out again, not even when its row was deleted since.
    id             integer primary key autoincrement,
    event_id       text    not null default (lower(
                       hex(randomblob(4)) || '-' || hex(randomblob(2)) || '-4' || substr(hex(randomblob(2)), 2) || '-' ||
                       substr('89ab', 1 + (random() & 3), 1) || substr(hex(randomblob(2)), 2) || '-' || hex(randomblob(6)))),
    aggregate_type text    not null,
    aggregate_id   text    not null,
    event_type     text    not null,
    payload        text,
    payload_bytes  blob,
    content_type   text,
    headers        text,
    occurred_at    integer not null default (cast(round((julianday('now') - 2440587.5) * 86400000) as integer) * 1000),
    -- Columns of SQLite take values of any type; these are the ones that PostgreSQL would take.
    constraint events_event_id_is_a_uuid check (
        event_id like '________-____-____-____-____________'
        and replace(event_id, '-', '') not glob '*[^0-9a-fA-F]*'
        and length(replace(event_id, '-', '')) = 32),
    constraint events_aggregate_type_not_empty check (aggregate_type <> ''),
    constraint events_payload_is_json check (payload is null or (typeof(payload) = 'text' and json_valid(payload))),
    constraint events_payload_bytes_is_a_blob check (payload_bytes is null or typeof(payload_bytes) = 'blob'),
    constraint events_headers_is_json check (headers is null or (typeof(headers) = 'text' and json_valid(headers))),
    constraint events_occurred_at_is_a_number check (typeof(occurred_at) = 'integer'),
    constraint events_one_payload check (payload is null or payload_bytes is null)
);

-- A reader that has passed an id never looks below it again. sqlite_sequence still holds the newest id from before the
-- statement that inserts.
create trigger outbox_events_ids_ascend
after insert on outbox_events
when new.id < 1 or new.id <= (select seq from sqlite_sequence where name = 'outbox_events')
begin
    select raise(abort, 'outbox_events: leave the id to the table, an event below the newest id would never be published');
end;

-- Headers that can never leave are refused in the transaction of the writer, who can still do something about them.
create trigger outbox_events_headers_can_leave
before insert on outbox_events
when json_valid(new.headers)
begin
    select raise(abort, 'outbox_events: headers must be a JSON object of texts')
     where json_type(new.headers) <> 'object';
    select raise(abort, 'outbox_events: a header is an object or an array, pass the JSON as a text')
     where exists (select 1 from json_each(new.headers) where type in ('object', 'array'));
    select raise(abort, 'outbox_events: a header has no name, or a name that belongs to the relay (id, type, sequence, content-type, replay, or an attribute of CloudEvents with ce_)')
     where exists (select 1 from json_each(new.headers)
                    where key in ('', 'id', 'type', 'sequence', 'content-type', 'replay', 'ce_specversion', 'ce_id',
                                  'ce_source', 'ce_type', 'ce_time', 'ce_sequence', 'ce_subject', 'ce_datacontenttype',
                                  'ce_data', 'ce_data_base64'));
end;

-- The relay's books.

create table outbox_cursors (
    pipeline   text    not null,
    shard      integer not null default 0,
    epoch      integer not null default 0,
    prev       text,
    cur        text,
    floor      integer,
    ceiling    integer,
    next_floor integer,
    last_id    integer,
    -- Another one when the row was deleted and made anew: what was written down elsewhere about the old one is void.
    begun      text    not null default (lower(hex(randomblob(16)))),
    updated_at integer not null default 0,
    primary key (pipeline, shard)
);

-- The newest id at a few moments: what an event's age is told by, because writers set occurred_at and may set it to anything.
-- Only the relay writes here; about a hundred rows.
create table outbox_samples (
    id      integer primary key autoincrement,
    -- For people.
    at      integer not null,
    -- The seconds that relays have counted until then with clocks that no operator sets; only differences mean something.
    counted real    not null,
    -- Every event that was committed by then has an id up to this one, and no later event has.
    newest  integer not null
);

-- Ids that began anew (rows deleted, and sqlite_sequence with them) lie below what the cursors have passed, where no relay
-- looks, and would be taken for old: such an event gets an id above all that was seen.
create trigger outbox_events_ids_go_on
after insert on outbox_events
when new.id <= max(
    coalesce((select max(max(coalesce(ceiling, 0), coalesce(last_id, 0))) from outbox_cursors), 0),
    coalesce((select newest from outbox_samples order by id desc limit 1), 0))
begin
    update outbox_events
       set id = 1 + max((select max(id) from outbox_events),
                        coalesce((select max(max(coalesce(ceiling, 0), coalesce(last_id, 0))) from outbox_cursors), 0),
                        coalesce((select newest from outbox_samples order by id desc limit 1), 0))
     where id = new.id;
end;

create table outbox_leases (
    pipeline   text    not null,
    shard      integer not null default 0,
    holder     text    not null,
    epoch      integer not null,
    expires_at integer not null,
    primary key (pipeline, shard)
);

-- Events that were rejected, and those of the same entity that wait behind them, with all that is needed to publish
-- them later, so that they outlive the log's retention. Operators only write `wanted`; the owner of the pipeline does it.
create table outbox_parked (
    pipeline       text    not null,
    id             integer not null,
    event_id       text    not null,
    aggregate_type text    not null,
    aggregate_id   text    not null,
    event_type     text    not null,
    payload        text,
    payload_bytes  blob,
    content_type   text,
    headers        text,
    occurred_at    integer not null,
    -- Whether later events of the entity wait behind it; a dead letter holds nobody up.
    holds          integer not null default 1,
    -- Null for an event that only waits behind a rejected one.
    error          text,
    -- How often it was rejected, and each time when and why: [{"at": …, "error": …}].
    attempts       integer not null default 0,
    -- 0 where the relay could not read the event: it can be dropped, not redriven.
    has_content    integer not null default 1,
    history        text    not null default '[]',
    -- What an operator asked for, until it is done.
    wanted         text,
    parked_at      integer not null default (cast(round((julianday('now') - 2440587.5) * 86400000) as integer) * 1000),
    -- After a reset of the ids one comes again, for another event.
    primary key (pipeline, event_id),
    constraint parked_wanted check (wanted in ('redrive', 'drop'))
);

-- Finds what operators name by its id.
create index outbox_parked_id on outbox_parked (pipeline, id);
-- Finds the oldest waiting event of an entity.
create index outbox_parked_entity on outbox_parked (pipeline, aggregate_type, aggregate_id, id);
-- Finds what was asked for: an owner looks every few seconds, and there is nearly never anything.
create index outbox_parked_wanted on outbox_parked (pipeline, id) where wanted is not null;
-- Finds events whose content is in the log only: retention leaves them there.
create index outbox_parked_without_content on outbox_parked (event_id) where has_content = 0;

-- What operators asked for: who, when, of which events, why.
create table outbox_acts (
    id            integer primary key autoincrement,
    at            integer not null default (cast(round((julianday('now') - 2440587.5) * 86400000) as integer) * 1000),
    -- There are no users in a file.
    database_user text    not null default '',
    -- OS user and host, or the address of an HTTP client.
    who           text    not null,
    action        text    not null,
    pipeline      text,
    selector      text    not null,
    events        integer not null,
    reason        text
);

-- Parked events that were given up because an operator asked for it. An audit tells them from lost ones.
create table outbox_dropped (
    pipeline   text    not null,
    id         integer not null,
    event_id   text    not null,
    dropped_at integer not null default (cast(round((julianday('now') - 2440587.5) * 86400000) as integer) * 1000),
    primary key (pipeline, id, event_id)
);

-- Pipelines that an operator has paused: the owner publishes what is under way and gives the lease back, and no relay takes it.
create table outbox_pauses (
    pipeline text    primary key,
    since    integer not null default (cast(round((julianday('now') - 2440587.5) * 86400000) as integer) * 1000),
    who      text    not null,
    reason   text    not null
);

-- Events that an operator wants left out. A relay that halts at one of them sets it aside as a dead letter and goes on.
create table outbox_skips (
    pipeline text    not null,
    event_id text    not null,
    id       integer not null,
    who      text    not null,
    reason   text    not null,
    at       integer not null default (cast(round((julianday('now') - 2440587.5) * 86400000) as integer) * 1000),
    primary key (pipeline, event_id)
);

-- Replays that were asked for, and how far they have come.
create table outbox_replays (
    id         integer primary key autoincrement,
    pipeline   text    not null,
    selection  text    not null,
    topic      text,
    rate       integer not null check (rate > 0),
    state      text    not null default 'open' check (state in ('open', 'done', 'cancelled')),
    from_id    integer not null,
    until_id   integer not null,
    last_id    integer not null,
    published  integer not null default 0,
    skipped    integer not null default 0,
    holder     text    not null,
    expires_at integer not null,
    -- OS user and host: there are no users in a file.
    created_by text    not null,
    created_at integer not null default (cast(round((julianday('now') - 2440587.5) * 86400000) as integer) * 1000),
    updated_at integer not null default (cast(round((julianday('now') - 2440587.5) * 86400000) as integer) * 1000)
);
