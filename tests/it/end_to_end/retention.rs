//! The daemon gives the space of published events back, and says how full the disk is.

use std::path::Path;

use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection};

use super::process::Setup;
use super::verify::{counts, sqlite, verify};
use super::{Line, PATIENCE, eventually, number, run};

/// Kept for a second, looked at every second, in partitions of 50 events.
fn short_lived(setup: &mut Setup) {
    setup.set("RETENTION__KEEP", "1s");
    setup.set("RETENTION__INTERVAL", "1s");
    setup.set("RETENTION__PARTITION_EVENTS", "50");
    setup.set("RETENTION__PARTITIONS_AHEAD", "4");
}

#[tokio::test]
async fn published_events_go_with_whole_partitions_and_out_of_the_newest() {
    let test =
        "end_to_end::retention::published_events_go_with_whole_partitions_and_out_of_the_newest";
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
    eventually(
        "three partitions of 50, and 25 events",
        PATIENCE,
        async || (relay.metric("outbox_retired_events_total") == Some(175.0)).then_some(()),
    )
    .await;
    assert_eq!(number(&pool, "select count(*) from outbox.events").await, 0);
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

/// What a command prints, and its exit code.
async fn said(setup: &Setup, words: &[&str]) -> (i32, String) {
    let mut command = setup.command(words[0]);
    command.args(&words[1..]);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap());
    let output = output.await.unwrap();
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.code().unwrap(), out)
}

/// The partitions are those that `migrate` makes, of 5,000,000 ids, and no clock of the writers is right.
#[tokio::test]
async fn a_young_outbox_is_emptied_by_age() {
    let test = "end_to_end::retention::a_young_outbox_is_emptied_by_age";
    let Some(mut line) = Line::create(test).await else {
        return;
    };
    let pool = line.database.pool.clone();
    short_lived(&mut line.setup);
    let relay = line.ready().await;
    run(
        &pool,
        "insert into outbox.events (aggregate_type, aggregate_id, event_type, occurred_at)
         select 'order', n::text, 'imported',
                case n % 3 when 0 then '2100-01-01' when 1 then '1970-01-02' else now() end::timestamptz
           from generate_series(1, 7000) n",
    )
    .await;
    eventually("every event is gone", PATIENCE, async || {
        (number(&pool, "select count(*) from outbox.events").await == 0).then_some(())
    })
    .await;
    assert_eq!(relay.metric("outbox_retired_events_total"), Some(7000.0));
    assert_eq!(
        relay.metric("outbox_retired_unpublished_events_total"),
        Some(0.0)
    );
    relay.stop().await;
    // The auditor does not take what left for what was never committed.
    run(
        &pool,
        "select outbox.emit('order', '1', 'placed', '{}') from generate_series(1, 3)",
    )
    .await;
    line.setup.set("RETENTION__KEEP", "1h");
    let relay = line.ready().await;
    super::settled(&pool).await;
    relay.stop().await;
    let (code, report) = verify(&line.setup, &[]).await;
    assert_eq!((code, counts(&report)), (0, [0; 5]), "{report}");
}

/// Holds what was lost against what every command says about it. `setup` leads to brokers that are not there.
async fn a_loss_is_told(setup: &mut Setup, brokers: &str, empty: impl AsyncFn() -> bool) {
    setup.set("RETENTION__DROP_UNPUBLISHED_AFTER", "2s");
    let relay = setup.start();
    eventually("the events are lost", PATIENCE, async || {
        empty().await.then_some(())
    })
    .await;
    relay.says("had NOT published").await;
    assert!(
        relay.log().contains("pipelines=\"main\""),
        "{}",
        relay.log()
    );
    relay.kill().await;
    setup.set("SINK__KAFKA__BROKERS", brokers);
    let (code, report) = verify(setup, &[]).await;
    let lost = &report["pipelines"][0]["lost"];
    assert_eq!((code, &lost["count"]), (3, &20.into()), "{report}");
    let (_, report) = verify(setup, &["--from-id", "21"]).await;
    assert_eq!(report["pipelines"][0]["lost"]["count"], 0, "{report}");
    for (words, part) in [
        (&["verify"][..], "lost          20 "),
        (&["verify"], "20 events, ids 1 to 20, removed at 20"),
        (&["status"], "20 events were LOST"),
        (&["acts"], "ids 1 to 20"),
        (
            &["doctor"],
            "pipeline main has lost 20 events within the last 7 days",
        ),
    ] {
        let (_, out) = said(setup, words).await;
        assert!(out.contains(part), "{words:?}: {part}: {out}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_lost_is_told_by_everybody() {
    let test = "end_to_end::retention::what_was_lost_is_told_by_everybody";
    let Some(mut line) = Line::create(test).await else {
        return;
    };
    line.kafka.create(&["order"]).await;
    let pool = line.database.pool.clone();
    short_lived(&mut line.setup);
    line.setup.set("SINK__KAFKA__BROKERS", "127.0.0.1:1");
    run(
        &pool,
        "select outbox.emit('order', '1', 'placed', '{}') from generate_series(1, 20)",
    )
    .await;
    let brokers = line.kafka.brokers.clone();
    a_loss_is_told(&mut line.setup, &brokers, async || {
        number(&pool, "select count(*) from outbox.events").await == 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_lost_in_sqlite_is_told_by_everybody() {
    let test = "end_to_end::retention::what_was_lost_in_sqlite_is_told_by_everybody";
    let Some((file, kafka, mut setup)) = sqlite(test).await else {
        return;
    };
    short_lived(&mut setup);
    setup.set("SINK__KAFKA__BROKERS", "127.0.0.1:1");
    let mut connection = file.connect().await;
    sqlx::raw_sql(
        "with recursive n (n) as (select 1 union all select n + 1 from n where n < 20)
         insert into outbox_events (aggregate_type, aggregate_id, event_type) select 'order', n, 'placed' from n",
    )
    .execute(&mut connection)
    .await
    .unwrap();
    a_loss_is_told(&mut setup, &kafka.brokers, async || {
        let mut connection = file.connect().await;
        let left: i64 = sqlx::query_scalar("select count(*) from outbox_events")
            .fetch_one(&mut connection)
            .await
            .unwrap();
        left == 0
    })
    .await;
}
