// A service that emits, with node-postgres.
//
//   npm install pg
//   node emit.js
//
// DATABASE_URL: postgres://user:password@host:5432/database, of a role that is a member of outbox_writer.
// Prints the uuid of the event, by which consumers deduplicate.

const { Client } = require('pg');

const EMIT = 'select outbox.emit($1, $2, $3, $4, $5) as id';

// All statements of `work` go through one client: a pool would spread them over several transactions.
async function transaction(client, work) {
  await client.query('begin');
  try {
    const result = await work();
    await client.query('commit');
    return result;
  } catch (error) {
    await client.query('rollback');
    throw error;
  }
}

// The change and its event, in one transaction: either both are there, or neither.
const place = (client, orderId, total) => transaction(client, async () => {
  // First the row: its lock puts the events of one order into the order of their commits.
  await client.query(
    `insert into shop_order (id, status) values ($1, 'placed')
     on conflict (id) do update set status = excluded.status`, [orderId]);

  // Headers for every event of this transaction. They end with it.
  await client.query('select outbox.context($1)', [
    { tenant: 'acme', traceparent: '00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01' }]);

  // Topic, key, type, payload, and headers of this event alone.
  const { rows } = await client.query(EMIT, [
    'order', orderId, 'order.placed', { order_id: orderId, total }, { channel: 'node' }]);
  return rows[0].id;
});

// Rolled back: neither the change nor the event has happened.
const cancel = (client, orderId) => transaction(client, async () => {
  await client.query(`update shop_order set status = 'cancelled' where id = $1`, [orderId]);
  await client.query(EMIT, ['order', orderId, 'order.cancelled', { order_id: orderId }, null]);
  throw new Error('the order is on its way already');
});

// No payload: a tombstone, which deletes the key from a compacted topic.
const remove = (client, orderId) => transaction(client, async () => {
  await client.query('delete from shop_order where id = $1', [orderId]);
  await client.query(EMIT, ['order', orderId, 'order.deleted', null, null]);
});

async function main() {
  const client = new Client({ connectionString: process.env.DATABASE_URL });
  await client.connect();
  try {
    await client.query('create table if not exists shop_order (id text primary key, status text not null)');
    console.log(await place(client, '1001', '49.90'));
    await cancel(client, '1001').catch((error) => console.error(`rolled back: ${error.message}`));
    await remove(client, '1000');
  } finally {
    await client.end();
  }
}

main().catch((error) => {
  console.error(error.message);
  process.exitCode = 1;
});
