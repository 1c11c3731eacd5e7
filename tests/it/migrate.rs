//! Migrations: repeated, many at once, by hand, and what is pending.

use std::str::FromStr;

use outbox_relay::migrate::{self, Kind};
use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, Connection, Executor};

use crate::harness::postgres::{TestDatabase, execute};
use crate::harness::sqlite::TestFile;

#[tokio::test]
async fn postgres_is_migrated_once() {
    let Some(database) = TestDatabase::create_empty().await else {
        return;
    };
    let options = || PgConnectOptions::from_str(&database.url).unwrap();
    let pending = migrate::pending_postgres(options()).await.unwrap();
    assert!(!pending.is_empty());
    let first = migrate::postgres(options()).await.unwrap();
    assert_eq!((&first.applied, first.present.len()), (&pending, 0));
    let second = migrate::postgres(options()).await.unwrap();
    assert_eq!((second.applied.len(), &second.present), (0, &pending));
    assert_eq!(migrate::pending_postgres(options()).await.unwrap(), []);
}

#[tokio::test]
async fn many_migrate_postgres_at_once() {
    let Some(database) = TestDatabase::create_empty().await else {
        return;
    };
    let all = (0..6).map(|_| tokio::spawn(migrate::postgres(database.options.clone())));
    let mut applied = 0;
    for one in all.collect::<Vec<_>>() {
        applied += one.await.unwrap().unwrap().applied.len();
    }
    assert_eq!(applied, 1);
}

#[tokio::test]
async fn what_is_printed_for_postgres_is_a_migration() {
    let Some(database) = TestDatabase::create_empty().await else {
        return;
    };
    let mut connection = database.connect().await;
    execute(&mut connection, migrate::print(Kind::Postgres)).await;
    let options = || database.options.clone();
    assert_eq!(migrate::pending_postgres(options()).await.unwrap(), []);
    assert_eq!(migrate::postgres(options()).await.unwrap().applied, []);
}

#[tokio::test]
async fn a_failed_migration_of_postgres_leaves_nothing_behind() {
    let Some(database) = TestDatabase::create_empty().await else {
        return;
    };
    let mut connection = database.connect().await;
    execute(
        &mut connection,
        "create schema outbox; create view outbox.parked as select 1".to_owned(),
    )
    .await;
    let failed = migrate::postgres(database.options.clone()).await;
    assert!(format!("{:#}", failed.unwrap_err()).contains("parked"));
    let tables: i64 = sqlx::query_scalar(
        "select count(*) from pg_class where relnamespace = 'outbox'::regnamespace",
    )
    .fetch_one(&mut connection)
    .await
    .unwrap();
    assert_eq!(tables, 1, "only the view");
}

#[tokio::test]
async fn the_relay_may_ask_what_is_pending() {
    let Some(database) = TestDatabase::create().await else {
        return;
    };
    let options = database.options.clone().options([("role", "outbox_relay")]);
    assert_eq!(migrate::pending_postgres(options).await.unwrap(), []);
}

#[tokio::test]
async fn sqlite_is_migrated_once() {
    let file = TestFile::create_empty();
    assert!(migrate::sqlite(file.options.clone()).await.is_err());
    let options = || file.options.clone().create_if_missing(true);
    let first = migrate::sqlite(options()).await.unwrap();
    assert_eq!((first.applied.len(), first.present.len()), (1, 0));
    let second = migrate::sqlite(options()).await.unwrap();
    assert_eq!((second.applied.len(), second.present.len()), (0, 1));
    assert_eq!(migrate::pending_sqlite(options()).await.unwrap(), []);
}

#[tokio::test]
async fn many_migrate_sqlite_at_once() {
    let file = TestFile::create_empty();
    let options = file.options.clone().create_if_missing(true);
    let all = (0..6).map(|_| tokio::spawn(migrate::sqlite(options.clone())));
    let mut applied = 0;
    for one in all.collect::<Vec<_>>() {
        applied += one.await.unwrap().unwrap().applied.len();
    }
    assert_eq!(applied, 1);
    let mut connection = file.connect().await;
    let journal: String = sqlx::query_scalar("pragma journal_mode")
        .fetch_one(&mut connection)
        .await
        .unwrap();
    assert_eq!(journal, "wal");
}

#[tokio::test]
async fn what_is_printed_for_sqlite_is_a_migration() {
    let file = TestFile::create_empty();
    let options = || file.options.clone().create_if_missing(true);
    let mut connection = sqlx::SqliteConnection::connect_with(&options())
        .await
        .unwrap();
    connection
        .execute(sqlx::raw_sql(AssertSqlSafe(migrate::print(Kind::Sqlite))))
        .await
        .unwrap();
    assert_eq!(migrate::pending_sqlite(options()).await.unwrap(), []);
    assert_eq!(migrate::sqlite(options()).await.unwrap().applied, []);
}

#[tokio::test]
async fn sqlite_refuses_what_postgres_would_refuse() {
    let file = TestFile::create().await;
    let mut connection = file.connect().await;
    let insert = |columns: &str, values: &str| {
        let columns = format!("aggregate_type, aggregate_id, event_type{columns}");
        let values = format!("'Order', '1', 'Placed'{values}");
        sqlx::raw_sql(AssertSqlSafe(format!(
            "insert into outbox_events ({columns}) values ({values})"
        )))
    };
    connection.execute(insert("", "")).await.unwrap();
    for (columns, values) in [
        (", id", ", 1"),
        (", id", ", 0"),
        (", id", ", -1"),
        (", event_id", ", 'not a uuid'"),
        (", payload", ", '{'"),
        (", payload", ", x'7b7d'"),
        (", payload_bytes", ", 'text'"),
        (", payload, payload_bytes", ", '{}', x'00'"),
        (", headers", ", 'tenant=acme'"),
        (", occurred_at", ", '2020-01-01'"),
    ] {
        let refused = connection.execute(insert(columns, values)).await;
        assert!(refused.is_err(), "{columns} {values}");
    }
    // Deleting the newest row does not bring its id back.
    connection
        .execute("delete from outbox_events")
        .await
        .unwrap();
    assert!(connection.execute(insert(", id", ", 1")).await.is_err());
    connection.execute(insert("", "")).await.unwrap();
    let id: i64 = sqlx::query_scalar("select id from outbox_events")
        .fetch_one(&mut connection)
        .await
        .unwrap();
    assert_eq!(id, 2);
}
