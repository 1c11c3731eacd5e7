//! A database with settings and objects that a stranger has chosen: the source reads what it reads elsewhere, and calls none of
//! these objects.

use outbox_relay::event::{Payload, Start};
use sqlx::Connection;
use sqlx::postgres::PgConnection;

use crate::harness::hostile;

use super::database::{ask, sql, with_database};
use super::schedules::{Relay, emit_many};

#[tokio::test]
async fn the_source_calls_no_object_of_a_stranger_and_depends_on_no_setting() {
    let test = "the_source_calls_no_object_of_a_stranger_and_depends_on_no_setting";
    with_database(test, async |database| {
        let mut writer = database.connect().await;
        sql(&mut writer, &emit_many(1, 100)).await;
        let bytes = "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload_bytes, headers, occurred_at) \
                     values ('thing', E'a\\\\b', 'changed', '\\x00ff5c', '{\"a\": \"b\\\\c\"}', '2026-01-31 12:00:00+00')";
        sql(&mut writer, bytes).await;
        let mut late = database.connect().await;
        sql(&mut late, &format!("begin; {}", emit_many(500, 500))).await;
        if !hostile::wanted() {
            hostile::plant(&mut writer).await;
            hostile::set(&mut writer).await;
        }
        // A statement that resolves a name through the path calls the look-alike.
        let mut fresh = PgConnection::connect_with(&database.options).await.unwrap();
        let trapped = ask(&mut fresh, "select 'a'::pg_catalog.text").await;
        assert_eq!(trapped, "a");
        let called = sqlx::raw_sql("select octet_length('a'::pg_catalog.text)")
            .execute(&mut fresh)
            .await;
        assert!(called.is_err(), "the look-alike is found first");
        let mut relay = Relay::start(database, Start::Earliest).await;
        let first = relay.page(100).await;
        assert_eq!(first.events.len(), 100);
        relay.acknowledge(first.end).await;
        let second = relay.page(100).await;
        let [event] = &second.events[..] else {
            panic!("{second:?}")
        };
        assert_eq!(event.payload, Payload::Encoded(vec![0, 255, 92].into()));
        assert_eq!(&event.aggregate_id[..], "a\\b");
        assert_eq!(event.headers.as_deref(), Some("{\"a\": \"b\\\\c\"}"));
        assert_eq!(event.occurred_at_us, 1_769_860_800_000_000);
        relay.acknowledge(second.end.clone()).await;
        assert!(relay.page(100).await.events.is_empty());
        sql(&mut late, "commit").await;
        assert_eq!(relay.page(100).await.events.len(), 1, "a late one");
    })
    .await;
}
