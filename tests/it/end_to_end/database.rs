//! PostgreSQL cuts connections, goes away, comes back; hints are lost; the table is in trouble.

use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use tokio::time::{Instant, sleep};

use super::kafka::Kafka;
use super::load::Load;
use super::process::Setup;
use super::proxy::{Proxy, Weather};
use super::services::Own;
use super::{Line, PATIENCE, complete, eventually, run};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_are_cut_are_made_again() {
    let Some((mut line, load)) = Line::with_load("connections_that_are_cut_are_made_again").await
    else {
        return;
    };
    line.setup.set("RELAY__LEASE_TTL", "2s");
    let relay = line.ready().await;
    let writing = load.start(2);
    for _ in 0..5 {
        writing.commits(40).await;
        run(
            &line.database.pool,
            "select pg_terminate_backend(pid) from pg_stat_activity
              where datname = current_database() and pid <> pg_backend_pid()",
        )
        .await;
    }
    writing.commits(40).await;
    writing.stop().await;
    let seen = complete(&load, &line.kafka).await;
    eprintln!("{} duplicates of {} records", seen.duplicates, seen.records);
    relay.ready().await;
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_goes_away_and_comes_back_loses_nothing() {
    const TEST: &str = "a_server_that_goes_away_and_comes_back_loses_nothing";
    let Some(brokers) = crate::fresh::needed(TEST, "KAFKA_BROKERS") else {
        return;
    };
    let Some(mut own) = Own::postgres(TEST) else {
        return;
    };
    let url = own.variable("DATABASE_URL").to_owned();
    let options: PgConnectOptions = url.parse().unwrap();
    outbox_relay::migrate::postgres(options.clone())
        .await
        .unwrap();
    let kafka = Kafka::new(brokers);
    let load = Load::prepare(&options, &kafka).await;
    let mut setup = Setup::new(&url);
    setup.kafka(&kafka);
    setup.set("RELAY__LEASE_TTL", "2s");
    let mut relay = setup.start();
    relay.ready().await;
    let writing = load.start(2);
    writing.commits(50).await;
    own.stop();
    let reason = relay
        .not_ready(&["connect", "terminat", "shut", "closed", "refused"])
        .await;
    eprintln!("{reason}");
    relay.rests().await;
    assert!(relay.is_alive());
    own.start();
    let back = Instant::now();
    relay.ready().await;
    eprintln!("ready {:?} after the server", back.elapsed());
    writing.commits(50).await;
    writing.stop().await;
    complete(&load, &kafka).await;
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_notifications_cost_latency_only() {
    let Some((line, load)) = Line::with_load("lost_notifications_cost_latency_only").await else {
        return;
    };
    let relay = line.ready().await;
    load.write(10).await;
    run(
        &line.database.pool,
        "alter table outbox.events disable trigger events_notify",
    )
    .await;
    load.write(10).await;
    let written = Instant::now();
    complete(&load, &line.kafka).await;
    eprintln!("without a notification: {:?}", written.elapsed());
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn polling_goes_through_a_pooler() {
    const TEST: &str = "polling_goes_through_a_pooler";
    let Some(pooler) = crate::fresh::needed(TEST, "PGBOUNCER_URL") else {
        return;
    };
    let Some((mut line, load)) = Line::with_load(TEST).await else {
        return;
    };
    let (server, _) = pooler.rsplit_once('/').unwrap();
    let name = line.database.options.get_database().unwrap();
    line.setup
        .set("SOURCE__POSTGRES__URL", &format!("{server}/{name}"));
    line.setup.set("SOURCE__POSTGRES__CAPTURE", "poll");
    line.setup.set("RELAY__LEASE_TTL", "4s");
    let writing = load.start(2);
    for _ in 0..2 {
        let relay = line.ready().await;
        writing.commits(100).await;
        // Longer than the lease, which has to be renewed through the pooler.
        sleep(Duration::from_millis(4500)).await;
        assert!(relay.owns(), "{}", relay.log());
        relay.stop().await;
    }
    writing.stop().await;
    let relay = line.ready().await;
    let seen = complete(&load, &line.kafka).await;
    assert_eq!(seen.duplicates, 0);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trouble_with_the_table_is_named_and_outlived() {
    let Some((mut line, load)) =
        Line::with_load("trouble_with_the_table_is_named_and_outlived").await
    else {
        return;
    };
    line.setup.set("RELAY__LEASE_TTL", "2s");
    line.kafka.create(&["nobody"]).await;
    let pool = &line.database.pool;
    let mut relay = line.ready().await;
    load.write(20).await;
    complete(&load, &line.kafka).await;
    let troubles = [
        (
            "alter table outbox.events rename to elsewhere",
            "alter table outbox.elsewhere rename to events",
            ["events", "does not exist"],
        ),
        (
            "alter table outbox.events rename column payload_bytes to bytes",
            "alter table outbox.events rename column bytes to payload_bytes",
            ["payload_bytes", "does not exist"],
        ),
        (
            "alter table outbox.events drop constraint events_headers_can_leave, alter column headers drop default, alter column headers type integer using null",
            "alter table outbox.events alter column headers type json using null,
               alter column headers set default nullif(current_setting('outbox.context', true), '')::json",
            ["cannot cast", "json"],
        ),
        (
            "alter table outbox.cursors rename to elsewhere",
            "alter table outbox.elsewhere rename to cursors",
            ["cursors", "does not exist"],
        ),
    ];
    for (trouble, repair, words) in troubles {
        run(pool, trouble).await;
        // The cursor is only touched when something moves.
        let _ = sqlx::query("select outbox.emit('nobody', '1', 'changed')")
            .execute(pool)
            .await;
        let reason = relay.not_ready(&words).await;
        eprintln!("{trouble:.60}: {reason}");
        relay.says(words[0]).await;
        relay.rests().await;
        let lines = relay.log().lines().count();
        sleep(Duration::from_secs(1)).await;
        let lines = relay.log().lines().count() - lines;
        assert!(lines < 20, "{lines} lines in a second");
        assert!(relay.is_alive());
        run(pool, repair).await;
        let repaired = Instant::now();
        relay.ready().await;
        eprintln!("ready {:?} after the repair", repaired.elapsed());
        load.write(10).await;
        complete(&load, &line.kafka).await;
    }
    run(pool, "truncate outbox.events").await;
    load.write(20).await;
    complete(&load, &line.kafka).await;

    run(pool, "drop table outbox.events cascade").await;
    let reason = relay.not_ready(&["does not exist"]).await;
    eprintln!("{reason}");
    assert!(relay.is_alive());
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_relay_waits_for_its_tables() {
    let Some(brokers) = crate::fresh::needed("a_new_relay_waits_for_its_tables", "KAFKA_BROKERS")
    else {
        return;
    };
    let Some(database) = crate::harness::postgres::TestDatabase::create_empty().await else {
        return;
    };
    let kafka = Kafka::new(brokers);
    kafka.create(&["order"]).await;
    let mut setup = Setup::new(&database.url);
    setup.kafka(&kafka);
    let relay = setup.start();
    let reason = relay.not_ready(&["does not exist"]).await;
    eprintln!("{reason}");
    outbox_relay::migrate::postgres(database.options.clone())
        .await
        .unwrap();
    let pool = PgPoolOptions::new().connect_lazy_with(database.options.clone());
    run(&pool, "select outbox.emit('order', '1', 'placed', '1')").await;
    eventually("the event", PATIENCE, async || {
        (kafka.read(&["order"]).await.len() == 1).then_some(())
    })
    .await;
    relay.stop().await;
}

/// Whether a session listens in the database of the line.
async fn listens(line: &Line) {
    let sessions = "select count(*) from pg_stat_activity
                     where datname = current_database() and query ilike 'listen %'";
    eventually("a session that listens", PATIENCE, async || {
        let listening: i64 = sqlx::query_scalar(sessions)
            .fetch_one(&line.database.pool)
            .await
            .unwrap();
        (listening > 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_for_notifications_that_dies_silently_is_noticed() {
    let Some(mut line) =
        Line::create("a_connection_for_notifications_that_dies_silently_is_noticed").await
    else {
        return;
    };
    let options = &line.database.options;
    let server = format!("{}:{}", options.get_host(), options.get_port());
    let proxy = Proxy::start("127.0.0.1:0", &server).await;
    let url = line.database.url.replace(&server, &proxy.address);
    line.setup.set("SOURCE__POSTGRES__DIRECT_URL", &url);
    let relay = line.ready().await;
    listens(&line).await;
    proxy.weather(Weather::Silent);
    relay.says("does not answer within 5 s").await;
    proxy.weather(Weather::Clear);
    relay.says("listening for notifications again").await;
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn notifications_that_do_not_come_are_told_once() {
    let Some(line) = Line::create("notifications_that_do_not_come_are_told_once").await else {
        return;
    };
    line.kafka.create(&["order"]).await;
    let relay = line.ready().await;
    listens(&line).await;
    let emit = async || {
        let emit = "select outbox.emit('order', '1', 'placed', '{}')";
        run(&line.database.pool, emit).await;
    };
    let pool = &line.database.pool;
    run(
        pool,
        "alter table outbox.events disable trigger events_notify",
    )
    .await;
    let told = "events come and no notification of them";
    eventually("a warning", PATIENCE, async || {
        emit().await;
        sleep(Duration::from_millis(500)).await;
        relay.log().contains(told).then_some(())
    })
    .await;
    emit().await;
    run(
        pool,
        "alter table outbox.events enable trigger events_notify",
    )
    .await;
    emit().await;
    relay.says("notifications come again").await;
    assert_eq!(relay.log().matches(told).count(), 1, "{}", relay.log());
    relay.stop().await;
}
