//! A database with settings and objects that a stranger has chosen: the source reads what it reads elsewhere, and calls none of
//! these objects.

use outbox_relay::event::{Payload, Start};
use sqlx::postgres::PgConnection;

use super::database::{Database, ask, sql, with_database};
use super::schedules::{Relay, emit_many};

/// What the statements of the source are made of; the look-alikes take arguments that fit as well or better.
const FUNCTIONS: [&str; 14] = [
    "pg_visible_in_snapshot(xid8, pg_snapshot)",
    "pg_visible_in_snapshot(xid8, text)",
    "pg_sequence_last_value(regclass)",
    "pg_sequence_last_value(text)",
    "pg_relation_filenode(text)",
    "pg_column_size(json)",
    "pg_column_size(text)",
    "octet_length(text)",
    "octet_length(bytea)",
    "encode(bytea, text)",
    "timestamptz_send(timestamptz)",
    "convert_to(text, name)",
    "coalesce(bigint, bigint)",
    "unnest(xid8[])",
];

const OPERATORS: [&str; 6] = ["=", "<=", ">", ">=", "+", "||"];

/// Everything that is called in `public` fails, and says so.
async fn plant(connection: &mut PgConnection) {
    let mut statement = String::from(
        "create function public.trap() returns bigint language plpgsql as \
         $$ begin raise exception 'a stranger''s object was called'; end $$;",
    );
    for function in FUNCTIONS {
        // A keyword is no name.
        if function.starts_with("coalesce") {
            continue;
        }
        let returns = match function {
            "pg_visible_in_snapshot(xid8, pg_snapshot)" | "pg_visible_in_snapshot(xid8, text)" => {
                "boolean"
            }
            "timestamptz_send(timestamptz)" | "convert_to(text, name)" => "bytea",
            "encode(bytea, text)" => "text",
            "unnest(xid8[])" => "setof xid8",
            _ => "bigint",
        };
        statement.push_str(&format!(
            "create function public.{function} returns {returns} language plpgsql as \
             $$ begin raise exception 'a stranger''s object was called'; end $$;"
        ));
    }
    for (n, left) in ["bigint", "xid8", "text", "integer"].iter().enumerate() {
        for (m, right) in ["bigint", "integer", "xid8", "text"].iter().enumerate() {
            statement.push_str(&format!(
                "create function public.trap_{n}_{m}({left}, {right}) returns boolean language plpgsql as \
                 $$ begin raise exception 'a stranger''s operator was called'; end $$;"
            ));
            for operator in OPERATORS {
                statement.push_str(&format!(
                    "create operator public.{operator} (leftarg = {left}, rightarg = {right}, function = public.trap_{n}_{m});"
                ));
            }
        }
    }
    for domain in [
        "text",
        "int8",
        "bigint",
        "uuid",
        "json",
        "bytea",
        "xid8",
        "timestamptz",
        "regclass",
    ] {
        statement.push_str(&format!(
            "create domain public.\"{domain}\" as pg_catalog.varchar check (value is null);"
        ));
    }
    sql(connection, &statement).await;
}

async fn settings(connection: &mut PgConnection, database: &Database) {
    for (name, value) in [
        ("search_path", "public, pg_catalog"),
        ("standard_conforming_strings", "off"),
        ("bytea_output", "escape"),
        ("default_transaction_isolation", "serializable"),
        ("datestyle", "German"),
        ("intervalstyle", "sql_standard"),
        ("timezone", "'Asia/Kathmandu'"),
        ("extra_float_digits", "'-5'"),
    ] {
        let statement = format!("alter database {} set {name} = {value}", database.name);
        sql(connection, &statement).await;
    }
}

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
        plant(&mut writer).await;
        settings(&mut writer, database).await;
        // A statement that resolves a name through the path calls the look-alike.
        let mut fresh = database.connect().await;
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
