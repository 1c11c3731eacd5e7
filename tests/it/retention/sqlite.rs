//! The same in a SQLite file.

use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{AssertSqlSafe, Connection};
use tempfile::TempDir;

use outbox_relay::retention::Settings;
use outbox_relay::retention::sqlite::Upkeep;

const KEEP: Duration = Duration::from_secs(3600);

/// A migrated file with its folder, a connection to it, and how to open it.
async fn file() -> (TempDir, SqliteConnection, SqliteConnectOptions) {
    let folder = tempfile::tempdir().unwrap();
    let options = SqliteConnectOptions::new()
        .filename(folder.path().join("shop.db"))
        .create_if_missing(true);
    outbox_relay::migrate::sqlite(options.clone())
        .await
        .unwrap();
    let connection = SqliteConnection::connect_with(&options).await.unwrap();
    (folder, connection, options)
}

fn settings(drop_unpublished_after: Option<Duration>) -> Settings {
    Settings {
        keep: Some(KEEP),
        drop_unpublished_after,
        disk_budget_bytes: None,
        interval: Duration::from_secs(1),
        partition_events: 10,
        partitions_ahead: 3,
        pipelines: vec!["main".parse().unwrap()],
    }
}

fn now_us() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    i64::try_from(now.unwrap().as_micros()).unwrap()
}

async fn run(connection: &mut SqliteConnection, sql: &str) {
    let sql = AssertSqlSafe(sql.to_owned());
    sqlx::raw_sql(sql).execute(connection).await.unwrap();
}

async fn value(connection: &mut SqliteConnection, sql: &str) -> String {
    let sql = AssertSqlSafe(format!("select cast(({sql}) as text)"));
    let value: Option<String> = sqlx::query_scalar(sql).fetch_one(connection).await.unwrap();
    value.unwrap_or_default()
}

/// So many events; every second with a time of the far past, the others of the far future.
async fn emit(connection: &mut SqliteConnection, events: u32) {
    run(
        connection,
        &format!(
            "with recursive n (n) as (select 1 union all select n + 1 from n where n < {events})
             insert into outbox_events (aggregate_type, aggregate_id, event_type, occurred_at)
             select 'order', n, 'placed', iif(n % 2, -9223372036854775807, 9223372036854775807) from n"
        ),
    )
    .await;
}

/// Time passes for the samples, which a relay that runs would have counted.
async fn pass(connection: &mut SqliteConnection, seconds: u32) {
    let pass = format!("update outbox_samples set counted = counted - {seconds}");
    run(connection, &pass).await;
}

async fn retained(connection: &mut SqliteConnection) -> String {
    let ids = "select group_concat(id, ' ') from (select id from outbox_events order by id)";
    value(connection, ids).await
}

#[tokio::test]
async fn events_leave_by_an_age_that_writers_cannot_set() {
    let (_folder, mut connection, options) = file().await;
    let mut one = Upkeep::new(options.clone(), settings(None), now_us);
    let mut two = Upkeep::new(options, settings(None), now_us);
    emit(&mut connection, 4).await;
    one.look_after().await.unwrap();
    run(
        &mut connection,
        "insert into outbox_cursors (pipeline, last_id) values ('main', 4)",
    )
    .await;
    two.look_after().await.unwrap();
    assert_eq!(
        retained(&mut connection).await,
        "1 2 3 4",
        "however old they say they are"
    );
    pass(&mut connection, 3650).await;
    emit(&mut connection, 2).await;
    run(&mut connection, "update outbox_cursors set last_id = 6").await;
    one.look_after().await.unwrap();
    assert_eq!(
        retained(&mut connection).await,
        "1 2 3 4 5 6",
        "a fortieth is added"
    );
    pass(&mut connection, 50).await;
    two.look_after().await.unwrap();
    assert_eq!(retained(&mut connection).await, "5 6");
    pass(&mut connection, 3700).await;
    one.look_after().await.unwrap();
    assert_eq!(retained(&mut connection).await, "");
}

#[tokio::test]
async fn what_is_needed_stays() {
    let (_folder, mut connection, options) = file().await;
    let mut upkeep = Upkeep::new(options, settings(None), now_us);
    emit(&mut connection, 9).await;
    upkeep.look_after().await.unwrap();
    pass(&mut connection, 4000).await;
    upkeep.look_after().await.unwrap();
    assert_eq!(
        retained(&mut connection).await,
        "1 2 3 4 5 6 7 8 9",
        "main has not begun"
    );
    run(
        &mut connection,
        "insert into outbox_cursors (pipeline, last_id) values ('main', 9), ('slow', 7);
         insert into outbox_parked (pipeline, id, event_id, aggregate_type, aggregate_id, event_type, occurred_at, has_content)
         select 'main', id, event_id, aggregate_type, aggregate_id, event_type, 0, id = 3 from outbox_events where id in (2, 3);
         insert into outbox_replays (pipeline, selection, rate, from_id, until_id, last_id, holder, expires_at, created_by)
         values ('main', '{}', 1, 1, 5, 4, 'me', 0, 'me')",
    )
    .await;
    upkeep.look_after().await.unwrap();
    assert_eq!(retained(&mut connection).await, "2 5 8 9");
}

#[tokio::test]
async fn what_is_lost_is_written_down() {
    let (_folder, mut connection, options) = file().await;
    let mut upkeep = Upkeep::new(options, settings(Some(2 * KEEP)), now_us);
    emit(&mut connection, 9).await;
    upkeep.look_after().await.unwrap();
    run(
        &mut connection,
        "insert into outbox_cursors (pipeline, last_id) values ('main', 9), ('slow', 7)",
    )
    .await;
    pass(&mut connection, 4000).await;
    upkeep.look_after().await.unwrap();
    assert_eq!(retained(&mut connection).await, "8 9");
    assert_eq!(
        value(&mut connection, "select count(*) from outbox_acts").await,
        "0"
    );
    pass(&mut connection, 4000).await;
    upkeep.look_after().await.unwrap();
    assert_eq!(retained(&mut connection).await, "");
    let act = "select who || ' ' || action || ' ' || pipeline || ' ' || selector || ' ' || events from outbox_acts";
    assert_eq!(
        value(&mut connection, act).await,
        "retention lost slow ids 8 to 9 2"
    );
}

#[tokio::test]
async fn ids_that_began_anew_are_young() {
    let (_folder, mut connection, options) = file().await;
    let mut upkeep = Upkeep::new(options, settings(None), now_us);
    emit(&mut connection, 9).await;
    upkeep.look_after().await.unwrap();
    run(
        &mut connection,
        "insert into outbox_cursors (pipeline, last_id) values ('main', 3);
         delete from outbox_events; delete from sqlite_sequence where name = 'outbox_events'",
    )
    .await;
    pass(&mut connection, 4000).await;
    emit(&mut connection, 2).await;
    run(&mut connection, "update outbox_cursors set last_id = 99").await;
    upkeep.look_after().await.unwrap();
    assert_eq!(retained(&mut connection).await, "10 11");
}
