//! The daemon gives the space of published events back, and says how full the disk is.

use std::path::Path;

use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection};

use super::process::Setup;
use super::{Line, PATIENCE, eventually, number, run};

/// Kept for a second, looked at every second, in partitions of 50 events.
fn short_lived(setup: &mut Setup) {
    setup.set("RETENTION__KEEP", "1s");
    setup.set("RETENTION__INTERVAL", "1s");
    setup.set("RETENTION__PARTITION_EVENTS", "50");
    setup.set("RETENTION__PARTITIONS_AHEAD", "4");
}

#[tokio::test]
async fn published_partitions_go_and_the_rest_stays() {
    let test = "end_to_end::retention::published_partitions_go_and_the_rest_stays";
    let Some(mut line) = Line::create(test).await else {
        return;
    };
    let pool = line.database.pool.clone();
    run(
        &pool,
        "do $$ declare name text; begin
           for name in select inhrelid::regclass::text from pg_inherits
                        where inhparent = 'outbox.events'::regclass and inhrelid <> 'outbox.events_default'::regclass
           loop execute 'drop table ' || name; end loop;
         end $$",
    )
    .await;
    short_lived(&mut line.setup);
    let relay = line.ready().await;
    eventually("partitions", PATIENCE, async || {
        let partitions = number(
            &pool,
            "select count(*) from pg_inherits where inhparent = 'outbox.events'::regclass",
        );
        (partitions.await == 6).then_some(())
    })
    .await;
    run(
        &pool,
        "select outbox.emit('order', '1', 'placed', '{}') from generate_series(1, 175)",
    )
    .await;
    eventually("three partitions of 50 retired", PATIENCE, async || {
        (relay.metric("outbox_retired_events_total") == Some(150.0)).then_some(())
    })
    .await;
    assert_eq!(
        number(&pool, "select count(*) from outbox.events").await,
        25
    );
    assert_eq!(
        relay.metric("outbox_retired_unpublished_events_total"),
        Some(0.0)
    );
    let bytes = relay.metric("outbox_log_bytes").unwrap();
    assert!(bytes > 8192.0, "{bytes}");
    relay.stop().await;
}

#[tokio::test]
async fn a_sqlite_outbox_is_emptied_behind_its_cursors() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("shop.db");
    let mut setup = Setup::new("postgres://unused@127.0.0.1:1/none");
    setup.set("SOURCE__KIND", "sqlite");
    setup.set("SOURCE__SQLITE__PATH", file.to_str().unwrap());
    setup.set("SINK__KIND", "stdout");
    short_lived(&mut setup);
    migrate(&setup, &file).await;
    let relay = setup.start();
    relay.ready().await;
    let options = SqliteConnectOptions::new().filename(&file);
    let mut connection = options.connect().await.unwrap();
    // The cursor comes last: events get ids above all that cursors have passed.
    for statement in [
        "begin immediate",
        "with recursive n (n) as (select 1 union all select n + 1 from n where n < 2500)
         insert into outbox_events (aggregate_type, aggregate_id, event_type) select 'order', n, 'placed' from n",
        "insert into outbox_cursors (pipeline, last_id) values ('slow', 100)",
        "commit",
    ] {
        sqlx::query(statement)
            .execute(&mut connection)
            .await
            .unwrap();
    }
    let mut left = async |rows: i64| {
        eventually("published events are deleted", PATIENCE, async || {
            let count: i64 = sqlx::query_scalar("select count(*) from outbox_events")
                .fetch_one(&mut connection)
                .await
                .unwrap();
            (count == rows).then_some(())
        })
        .await;
    };
    left(2400).await;
    let mut other = options.connect().await.unwrap();
    sqlx::query("delete from outbox_cursors where pipeline = 'slow'")
        .execute(&mut other)
        .await
        .unwrap();
    left(0).await;
    assert_eq!(relay.metric("outbox_retired_events_total"), Some(2500.0));
    other.close().await.unwrap();
    relay.stop().await;
}

async fn migrate(setup: &Setup, file: &Path) {
    let status = setup.command("migrate").status().unwrap();
    assert!(status.success());
    assert!(file.exists());
}
