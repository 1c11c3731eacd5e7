//! A service that emits, with sqlx.
//!
//!     cargo run --example emit
//!
//! `DATABASE_URL`: `postgres://user:password@host:5432/database`, of a role that is a member of `outbox_writer`.
//! Prints the uuid of the event, by which consumers deduplicate.

#![allow(clippy::print_stdout, reason = "an example prints")]

use anyhow::{Context, Result};
use sqlx::{Connection, PgConnection, Postgres, Transaction};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let url = std::env::var("DATABASE_URL").context("read DATABASE_URL")?;
    let mut connection = PgConnection::connect(&url).await?;
    sqlx::query(
        "create table if not exists shop_order (id text primary key, status text not null)",
    )
    .execute(&mut connection)
    .await?;

    println!("{}", place(&mut connection, "1001", "49.90").await?);
    cancel(&mut connection, "1001").await?;
    delete(&mut connection, "1000").await?;
    Ok(())
}

/// The change and its event, in one transaction: either both are there, or neither.
async fn place(connection: &mut PgConnection, order: &str, total: &str) -> Result<String> {
    let mut tx = connection.begin().await?;
    // First the row: its lock puts the events of one order into the order of their commits.
    sqlx::query(
        "insert into shop_order (id, status) values ($1, 'placed') \
         on conflict (id) do update set status = excluded.status",
    )
    .bind(order)
    .execute(&mut *tx)
    .await?;

    // Headers for every event of this transaction. They end with it.
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    sqlx::query("select outbox.context($1::json)")
        .bind(serde_json::json!({ "tenant": "acme", "traceparent": trace }).to_string())
        .execute(&mut *tx)
        .await?;

    let payload = serde_json::json!({ "order_id": order, "total": total }).to_string();
    let headers = serde_json::json!({ "channel": "rust" }).to_string();
    let id = emit(&mut tx, order, "order.placed", Some(payload), Some(headers)).await?;
    tx.commit().await?;
    Ok(id)
}

/// Rolled back: neither the change nor the event has happened.
async fn cancel(connection: &mut PgConnection, order: &str) -> Result<()> {
    let mut tx = connection.begin().await?;
    sqlx::query("update shop_order set status = 'cancelled' where id = $1")
        .bind(order)
        .execute(&mut *tx)
        .await?;
    let payload = serde_json::json!({ "order_id": order }).to_string();
    emit(&mut tx, order, "order.cancelled", Some(payload), None).await?;
    tx.rollback().await?;
    Ok(())
}

/// No payload: a tombstone, which deletes the key from a compacted topic.
async fn delete(connection: &mut PgConnection, order: &str) -> Result<()> {
    let mut tx = connection.begin().await?;
    sqlx::query("delete from shop_order where id = $1")
        .bind(order)
        .execute(&mut *tx)
        .await?;
    emit(&mut tx, order, "order.deleted", None, None).await?;
    tx.commit().await?;
    Ok(())
}

/// Topic, key, type, payload, and headers of this event alone.
async fn emit(
    tx: &mut Transaction<'_, Postgres>,
    order: &str,
    event_type: &str,
    payload: Option<String>,
    headers: Option<String>,
) -> Result<String> {
    let emitted =
        sqlx::query_scalar("select outbox.emit('order', $1, $2, $3::json, $4::json)::text")
            .bind(order)
            .bind(event_type)
            .bind(payload)
            .bind(headers);
    emitted.fetch_one(&mut **tx).await.context("emit")
}
