"""A service that emits, with psycopg 3.

    pip install "psycopg[binary]"
    python emit.py

DATABASE_URL: postgres://user:password@host:5432/database, of a role that is a member of outbox_writer.
Prints the uuid of the event, by which consumers deduplicate.
"""

import os

import psycopg
from psycopg.types.json import Json

EMIT = "select outbox.emit(%s, %s, %s, %s, %s)"
EMIT_BYTES = "select outbox.emit_bytes(%s, %s, %s, %s, %s)"


def place(connection, order_id, total):
    """The change and its event, in one transaction: either both are there, or neither."""
    with connection.transaction():
        # First the row: its lock puts the events of one order into the order of their commits.
        connection.execute(
            "insert into shop_order (id, status) values (%s, 'placed')"
            " on conflict (id) do update set status = excluded.status",
            [order_id],
        )
        # Headers for every event of this transaction. They end with it.
        trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        connection.execute("select outbox.context(%s)", [Json({"tenant": "acme", "traceparent": trace})])

        # Topic, key, type, payload, and headers of this event alone.
        payload = {"order_id": order_id, "total": total}
        event = ["order", order_id, "order.placed", Json(payload), Json({"channel": "python"})]
        (event_id,) = connection.execute(EMIT, event).fetchone()

        # Bytes that are encoded already (Avro, Protobuf) are published as they are, with their media type.
        invoice = b"\x0a\x041001\x10\xfe\x26"
        event = ["invoice", order_id, "invoice.issued", invoice, "application/x-protobuf"]
        connection.execute(EMIT_BYTES, event)
    return event_id


def cancel(connection, order_id):
    """Rolled back: neither the change nor the event has happened."""
    with connection.transaction():
        connection.execute("update shop_order set status = 'cancelled' where id = %s", [order_id])
        connection.execute(EMIT, ["order", order_id, "order.cancelled", Json({"order_id": order_id}), None])
        raise psycopg.Rollback()


def delete(connection, order_id):
    """No payload: a tombstone, which deletes the key from a compacted topic."""
    with connection.transaction():
        connection.execute("delete from shop_order where id = %s", [order_id])
        connection.execute(EMIT, ["order", order_id, "order.deleted", None, None])


# autocommit: transactions begin and end where `with connection.transaction()` says, and nowhere else.
with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
    connection.execute("create table if not exists shop_order (id text primary key, status text not null)")
    print(place(connection, "1001", "49.90"))
    cancel(connection, "1001")
    delete(connection, "1000")
