//! Migrations: repeated, many at once, by hand, and what is pending.

use std::str::FromStr;

use expect_test::expect_file;
use outbox_relay::event::{Shard, Start};
use outbox_relay::ledger::postgres::PostgresLedger;
use outbox_relay::ledger::sqlite::SqliteLedger;
use outbox_relay::ledger::{self, Ledger};
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

/// After a change of the migration: `UPDATE_EXPECT=1 tests/run -- migrate::the_objects`.
#[tokio::test]
async fn the_objects_that_are_expected_are_those_of_a_migrated_database() {
    let Some(database) = TestDatabase::create().await else {
        return;
    };
    let objects = migrate::objects::describe(database.options.clone()).await;
    // The partitions that were made have no rights of their own.
    expect_file!["../../src/migrate/objects.txt"].assert_eq(&objects.unwrap());
}

/// What `pg_dump --schema-only --no-privileges` leaves of the schema: no rows, no rights.
const COPIED: &str = "
delete from outbox.migrations;
do $$
declare command text;
begin
    for command in
        select format('revoke all on %s %s from outbox_relay, outbox_writer', kind, name) from (
            select 'table' as kind, c.oid::regclass::text as name from pg_class c
             where c.relnamespace = 'outbox'::regnamespace and c.relkind in ('r', 'p')
            union all select 'sequence', c.oid::regclass::text from pg_class c
             where c.relnamespace = 'outbox'::regnamespace and c.relkind = 'S'
            union all select 'function', p.oid::regprocedure::text from pg_proc p
             where p.pronamespace = 'outbox'::regnamespace
            union all select 'schema', 'outbox') o
        union all
        select format('grant execute on function %s to public', p.oid::regprocedure) from pg_proc p
         where p.pronamespace = 'outbox'::regnamespace
    loop execute command; end loop;
end $$";

#[tokio::test]
async fn a_copy_of_the_schema_is_recognised_and_given_its_rights() {
    let Some(database) = TestDatabase::create().await else {
        return;
    };
    let before = migrate::objects::describe(database.options.clone())
        .await
        .unwrap();
    let mut connection = database.connect().await;
    for rows in [COPIED, &format!("{COPIED}; drop table outbox.migrations")] {
        execute(&mut connection, rows.to_owned()).await;
        let report = migrate::postgres(database.options.clone()).await.unwrap();
        assert_eq!(report.applied.len(), 1, "written down");
        let after = migrate::objects::describe(database.options.clone())
            .await
            .unwrap();
        assert_eq!(after, before);
        let again = migrate::postgres(database.options.clone()).await.unwrap();
        assert_eq!(again.applied, []);
    }
}

#[tokio::test]
async fn a_copy_that_was_changed_is_not_taken_for_ours() {
    let Some(database) = TestDatabase::create().await else {
        return;
    };
    let mut connection = database.connect().await;
    let changed = "delete from outbox.migrations; \
                   alter table outbox.events alter column event_id set default null; \
                   drop table outbox.resets";
    execute(&mut connection, changed.to_owned()).await;
    let refused = migrate::postgres(database.options.clone())
        .await
        .unwrap_err();
    let refused = format!("{refused:#}");
    for part in [
        "column outbox.events.event_id is \"uuid not null\" instead of \"uuid not null default gen_random_uuid()\"",
        "column outbox.resets.at is missing",
        "and no list of migrations",
    ] {
        assert!(refused.contains(part), "{part}: {refused}");
    }
}

#[tokio::test]
async fn the_schema_of_a_stranger_is_refused() {
    let Some(database) = TestDatabase::create_empty().await else {
        return;
    };
    let mut connection = database.connect().await;
    execute(
        &mut connection,
        "create schema outbox; alter schema outbox owner to needs_password".to_owned(),
    )
    .await;
    let refused = migrate::postgres(database.options.clone())
        .await
        .unwrap_err();
    let refused = format!("{refused:#}");
    for part in ["needs_password", "alter schema outbox owner to postgres"] {
        assert!(refused.contains(part), "{part}: {refused}");
    }
    execute(
        &mut connection,
        "alter schema outbox owner to postgres".to_owned(),
    )
    .await;
    migrate::postgres(database.options.clone()).await.unwrap();
}

/// Whatever advisory lock somebody holds, nobody waits for it.
#[tokio::test]
async fn no_lock_of_a_stranger_holds_up_a_migration() {
    let Some(database) = TestDatabase::create_empty().await else {
        return;
    };
    let mut stranger = database.connect().await;
    let locks = "select pg_advisory_lock(1868721016, n) from generate_series(1, 9) n";
    execute(&mut stranger, locks.to_owned()).await;
    let migrated = migrate::postgres(database.options.clone());
    let migrated = tokio::time::timeout(std::time::Duration::from_secs(60), migrated).await;
    migrated.expect("does not wait").unwrap();
}

fn settings() -> ledger::Settings {
    ledger::Settings {
        pipeline: "main".parse().unwrap(),
        shard: Shard::whole(),
        holder: "an older one".to_owned(),
        lease_ttl: std::time::Duration::from_secs(60),
        start: Start::Earliest,
    }
}

/// Whoever finds tables of a newer version takes no lease, and says why.
async fn takes_no_lease(mut ledger: impl Ledger) {
    let refused = ledger.acquire().await.unwrap_err().to_string();
    assert!(
        refused.contains("migration 2") && refused.contains("too old"),
        "{refused}"
    );
}

#[tokio::test]
async fn an_older_relay_leaves_newer_tables_alone() {
    let file = TestFile::create_empty();
    let options = file.options.clone().create_if_missing(true);
    migrate::sqlite(options.clone()).await.unwrap();
    let newer = "insert into {} (version, description, checksum) values (2, 'newer', '')";
    let mut connection = file.connect().await;
    let statement = newer.replace("{}", "outbox_migrations");
    connection
        .execute(sqlx::raw_sql(AssertSqlSafe(statement)))
        .await
        .unwrap();
    takes_no_lease(SqliteLedger::new(options, settings())).await;

    let Some(database) = TestDatabase::create().await else {
        return;
    };
    let mut connection = database.connect().await;
    execute(&mut connection, newer.replace("{}", "outbox.migrations")).await;
    let options = database.options.clone().options([("role", "outbox_relay")]);
    takes_no_lease(PostgresLedger::new(options, settings())).await;
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
