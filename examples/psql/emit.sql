-- A service that emits, in plain SQL.
--
--   psql -X "$DATABASE_URL" -f emit.sql
--
-- DATABASE_URL: postgres://user:password@host:5432/database, of a role that is a member of outbox_writer.
-- Prints the uuid of the event, by which consumers deduplicate.

\set ON_ERROR_STOP on
\set QUIET on
\pset format unaligned
\pset tuples_only on

create table if not exists shop_order (id text primary key, status text not null);

-- The change and its event, in one transaction: either both are there, or neither.
begin;

-- First the row: its lock puts the events of one order into the order of their commits.
insert into shop_order (id, status) values ('1001', 'placed')
    on conflict (id) do update set status = excluded.status;

-- Headers for every event of this transaction. They end with it.
select outbox.context('{"tenant": "acme", "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}')
\g /dev/null

-- Topic, key, type, payload, and headers of this event alone.
select outbox.emit('order', '1001', 'order.placed', '{"order_id": "1001", "total": "49.90"}', '{"channel": "psql"}');

commit;

-- Rolled back: neither the change nor the event has happened.
begin;
update shop_order set status = 'cancelled' where id = '1001';
select outbox.emit('order', '1001', 'order.cancelled', '{"order_id": "1001"}') \g /dev/null
rollback;

-- No payload: a tombstone, which deletes the key from a compacted topic.
begin;
delete from shop_order where id = '1000';
select outbox.emit('order', '1000', 'order.deleted') \g /dev/null
commit;
