-- A service that emits into a SQLite outbox, in plain SQL.
--
--   sqlite3 shop.db < examples/sqlite/emit.sql
--
-- The file is the one of source.sqlite.path, after `outbox-relay migrate`. Prints the uuid of the event, by which consumers
-- deduplicate.

create table if not exists shop_order (id text primary key, status text not null);

-- The change and its event, in one transaction: either both are there, or neither. The id of the event is left to the table.
begin immediate;
insert into shop_order (id, status) values ('1001', 'placed')
    on conflict (id) do update set status = excluded.status;
insert into outbox_events (aggregate_type, aggregate_id, event_type, payload, headers)
values ('order', '1001', 'placed', '{"id": "1001", "status": "placed"}', '{"tenant": "acme"}')
returning event_id;
commit;
