//! Exactly-once delivery: the relay dies at every step of a transaction, and a consumer of what is committed sees each event
//! once and in order.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::kafka::{Kafka, Received};
use super::load::{Load, Seen};
use super::process::Setup;
use super::proxy::{Proxy, Weather};
use super::services::Own;
use super::{Line, PATIENCE, eventually, number, run, settled};
use crate::harness::postgres::TestDatabase;

const ENTITIES: usize = 20;

async fn line(test: &str) -> Option<Line> {
    let mut line = Line::create(test).await?;
    line.kafka.create(&["order"]).await;
    exactly_once(&mut line);
    line.setup.set("RELAY__LEASE_TTL", "1s");
    // Small batches, so that there are some.
    line.setup.set("RELAY__IN_FLIGHT_EVENTS", "100");
    // The cursor is of little help.
    line.setup.set("RELAY__ACKNOWLEDGE_INTERVAL", "3s");
    Some(line)
}

pub(super) fn exactly_once(line: &mut Line) {
    let id = line.kafka.prefix.clone();
    line.setup.set("SINK__KAFKA__DELIVERY", "exactly-once");
    line.setup.set("SINK__KAFKA__TRANSACTIONAL_ID", &id);
}

/// Emits events with the numbers `from` to `from + count - 1`.
async fn emit(line: &Line, from: usize, count: usize) {
    let (to, entities) = (from + count - 1, ENTITIES);
    run(
        &line.database.pool,
        format!(
            "select outbox.emit('order', (n % {entities})::text, 'counted', n::text::json)
               from generate_series({from}, {to}) n"
        ),
    )
    .await;
}

async fn read(line: &Line, at_least: usize) -> Vec<Received> {
    line.kafka
        .reader(&[line.kafka.topic("order")])
        .read_on(at_least)
        .await
}

/// How many records repeat what an earlier one said; nothing may be missing or out of order.
fn duplicates(records: &[Received], total: usize) -> usize {
    let mut newest: HashMap<String, usize> = HashMap::new();
    let (mut seen, mut duplicates) = (vec![false; total], 0);
    for record in records {
        let n: usize = record.text().parse().unwrap();
        if std::mem::replace(&mut seen[n], true) {
            duplicates += 1;
            continue;
        }
        if let Some(before) = newest.insert(record.key_text().to_owned(), n) {
            assert!(n == before + ENTITIES, "{n} after {before}");
        }
    }
    let missing = seen.iter().filter(|seen| !**seen).count();
    assert_eq!(missing, 0, "missing of {total}");
    duplicates
}

async fn dies_twice_at(test: &str, point: &str, times: [usize; 2]) {
    if !cfg!(debug_assertions) {
        return crate::kafka::cluster::skip(test, "a release build does not die on request");
    }
    let Some(mut line) = line(test).await else {
        return;
    };
    emit(&line, 0, 1000).await;
    for nth in times {
        line.setup.set("CRASH_AT", &format!("{point}:{nth}"));
        let mut relay = line.setup.start();
        let status = relay.exit().await;
        assert_eq!(status.code(), None, "{point}: {}", relay.log());
    }
    line.setup.unset("CRASH_AT");
    let relay = line.setup.start();
    emit(&line, 1000, 200).await;
    settled(&line.database.pool).await;
    relay.stop().await;
    let records = read(&line, 1200).await;
    assert_eq!(duplicates(&records, 1200), 0, "{point}");
    assert_eq!(records.len(), 1200);
}

macro_rules! points {
    ($($name:ident: $first:literal, $second:literal;)*) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            dies_twice_at(concat!("end_to_end::exactly_once::", stringify!($name)), stringify!($name), [$first, $second]).await;
        })*
    };
}

// At the first of these occasions, and later on.
points! {
    before_begin: 1, 3;
    after_begin: 1, 3;
    after_produce: 50, 250;
    before_commit: 1, 3;
    after_commit: 1, 3;
}

/// What Kafka has of the position is further than where the operator sends the pipeline.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_seek_counts_more_than_what_kafka_remembers() {
    let Some(line) = line("a_seek_counts_more_than_what_kafka_remembers").await else {
        return;
    };
    emit(&line, 0, 40).await;
    let relay = line.setup.start();
    settled(&line.database.pool).await;
    assert_eq!(read(&line, 40).await.len(), 40);
    let pipelines = |args: &[&str]| {
        let mut command = line.setup.command("pipelines");
        let out = command.args(args).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{args:?}: {said}");
    };
    pipelines(&["pause", "main", "--reason", "a test", "--wait"]);
    pipelines(&["seek", "main", "earliest", "--reason", "a test"]);
    pipelines(&["resume", "main"]);
    let records = read(&line, 80).await;
    assert_eq!(duplicates(&records, 40), 40);
    // And from there on each once, across a restart.
    relay.stop().await;
    let relay = line.setup.start();
    emit(&line, 40, 20).await;
    let records = read(&line, 100).await;
    relay.stop().await;
    assert_eq!(duplicates(&records, 60), 40);
    assert_eq!(records.len(), 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kills_under_load_repeat_nothing() {
    const KILLS: usize = 10;
    let Some((mut line, load)) = Line::with_load("kills_under_load_repeat_nothing").await else {
        return;
    };
    exactly_once(&mut line);
    line.setup.set("RELAY__LEASE_TTL", "1s");
    line.setup.set("RELAY__ACKNOWLEDGE_INTERVAL", "3s");
    let writing = load.start(4);
    for _ in 0..KILLS {
        let relay = line.setup.start();
        eventually("the lease", PATIENCE, async || relay.owns().then_some(())).await;
        let read = relay
            .metric("outbox_captured_events_total")
            .unwrap_or_default();
        eventually("events under way", PATIENCE, async || {
            let captured = relay.metric("outbox_captured_events_total")?;
            (captured > read + fastrand::f64() * 100.0).then_some(())
        })
        .await;
        relay.kill().await;
    }
    let relay = line.ready().await;
    writing.stop().await;
    let seen = everything(&load, &line.kafka).await;
    relay.stop().await;
    eprintln!(
        "{} records, {} duplicates in {KILLS} kills",
        seen.records, seen.duplicates
    );
    assert_eq!(seen.duplicates, 0);
}

/// Longer than a transaction may take, so that the broker gives some of them up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_freezes_or_dies_makes_nothing_come_twice() {
    let Some(database) = TestDatabase::create().await else {
        return;
    };
    let Some(mut own) = Own::kafka("a_broker_that_freezes_or_dies_makes_nothing_come_twice") else {
        return;
    };
    let kafka = Kafka::new(own.variable("KAFKA_BROKERS").to_owned());
    let load = Load::prepare(&database.options, &kafka).await;
    let mut setup = Setup::new(&database.url);
    setup.kafka(&kafka);
    setup.set("SINK__KAFKA__DELIVERY", "exactly-once");
    setup.set("SINK__KAFKA__TRANSACTIONAL_ID", "shop");
    setup.config("[sink.kafka.properties]\n\"transaction.timeout.ms\" = \"3000\"");
    let relay = setup.start();
    relay.ready().await;
    let writing = load.start(2);
    writing.commits(100).await;
    own.signal("STOP");
    writing.commits(50).await;
    sleep(Duration::from_secs(5)).await;
    own.signal("CONT");
    relay.ready_again().await;
    writing.commits(100).await;
    own.signal("KILL");
    writing.commits(50).await;
    let reason = relay
        .not_ready(&["kafka", "broker", "127.0.0.1", "connect", "timed out"])
        .await;
    eprintln!("{reason}");
    own.start();
    relay.ready_again().await;
    writing.commits(50).await;
    writing.stop().await;
    let seen = everything(&load, &kafka).await;
    eprintln!("{} records, {} duplicates", seen.records, seen.duplicates);
    assert_eq!(seen.duplicates, 0);
    assert_eq!(
        number(&database.pool, "select count(*) from outbox.parked").await,
        0
    );
    relay.stop().await;
}

/// Its records arrive all the time, and none of them is confirmed for longer than a pipeline may be silent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_over_a_slow_link_is_no_stall() {
    const EVENTS: u64 = 140;
    let Some(database) = TestDatabase::create().await else {
        return;
    };
    let Some(own) = Own::kafka("a_transaction_over_a_slow_link_is_no_stall") else {
        return;
    };
    let listen = own.variable("KAFKA_PROXY_LISTEN");
    let link = Proxy::start(listen, own.variable("KAFKA_PROXY_UPSTREAM")).await;
    let kafka = Kafka::new(own.variable("KAFKA_BROKERS").to_owned());
    kafka.create(&["order"]).await;
    let mut setup = Setup::new(&database.url);
    setup.kafka(&kafka);
    setup.set("SINK__KAFKA__BROKERS", listen);
    setup.set("SINK__KAFKA__COMPRESSION", "none");
    // All events in one page, and so in one transaction, and all of them handed over at once.
    setup.set("RELAY__PAGE_BYTES", "16MiB");
    setup.set("SINK__KAFKA__QUEUE_BYTES", "16MiB");
    let mut line = Line {
        database,
        kafka,
        setup,
    };
    exactly_once(&mut line);
    let relay = line.ready().await;
    // For each 32 KiB: 14 MB take eight seconds.
    link.weather(Weather::Slow(Duration::from_millis(19)));
    let emit = format!(
        "select outbox.emit('order', n::text, 'large', to_json(repeat('x', 100000)))
           from generate_series(1, {EVENTS}) n"
    );
    run(&line.database.pool, emit).await;
    eventually("all of it under way", PATIENCE, async || {
        (relay.pipeline("main")?["in_flight_events"] == EVENTS).then_some(())
    })
    .await;
    let all_under_way = Instant::now();
    settled(&line.database.pool).await;
    let took = all_under_way.elapsed();
    assert!(took > Duration::from_secs(4), "it was fast: {took:?}");
    assert!(!relay.log().contains("stalled"), "{}", relay.log());
    link.weather(Weather::Clear);
    relay.stop().await;
    assert_eq!(read(&line, 140).await.len(), 140);
}

/// All that was committed, and what follows it, as a consumer sees it.
async fn everything(load: &Load, kafka: &Kafka) -> Seen {
    let committed = load.committed().await;
    let mut reader = kafka.reader(&load.topics());
    let mut seen = Seen::default();
    eventually("everything that was committed", PATIENCE, async || {
        for record in reader.read_on(0).await {
            seen.add(&record);
        }
        (seen.missing(&committed) == 0).then_some(())
    })
    .await;
    for record in reader.read_on(0).await {
        seen.add(&record);
    }
    seen.judge(&committed);
    seen
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn delivery_can_be_switched_and_switched_back() {
    let Some(mut line) = line("delivery_can_be_switched_and_switched_back").await else {
        return;
    };
    // Who loses the lease publishes again what the cursor does not cover yet, unless exactly once.
    line.setup.set("RELAY__LEASE_TTL", "10s");
    for (round, delivery) in ["at-least-once", "exactly-once"]
        .into_iter()
        .cycle()
        .take(5)
        .enumerate()
    {
        line.setup.set("SINK__KAFKA__DELIVERY", delivery);
        let relay = line.setup.start();
        emit(&line, round * 300, 300).await;
        settled(&line.database.pool).await;
        relay.stop().await;
    }
    let records = read(&line, 1500).await;
    assert_eq!(duplicates(&records, 1500), 0);
    line.setup.set("RELAY__LEASE_TTL", "1s");
    // Without a clean stop, events come again where that is what was asked for, and are never lost.
    for (round, delivery) in ["exactly-once", "at-least-once"]
        .into_iter()
        .cycle()
        .take(6)
        .enumerate()
    {
        line.setup.set("SINK__KAFKA__DELIVERY", delivery);
        let relay = line.setup.start();
        eventually("the lease", PATIENCE, async || relay.owns().then_some(())).await;
        emit(&line, 1500 + round * 300, 300).await;
        // Not until the position is written down, which would say what the topic has to.
        eventually("300 deliveries", PATIENCE, async || {
            let delivered = relay.pipeline("main")?["delivered_events"].as_i64()?;
            // What was delivered just before a lease is lost is not counted.
            (delivered >= 300 || relay.log().contains("lost the lease")).then_some(())
        })
        .await;
        relay.kill().await;
    }
    line.setup.set("SINK__KAFKA__DELIVERY", "exactly-once");
    let relay = line.setup.start();
    emit(&line, 3300, 300).await;
    settled(&line.database.pool).await;
    relay.stop().await;
    let records = read(&line, 3600).await;
    eprintln!(
        "{} duplicates of {} records",
        duplicates(&records, 3600),
        records.len()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pipeline_that_begins_anew_is_not_held_to_what_was_committed() {
    let Some(line) = line("a_pipeline_that_begins_anew_is_not_held_to_what_was_committed").await
    else {
        return;
    };
    emit(&line, 0, 100).await;
    let relay = line.setup.start();
    settled(&line.database.pool).await;
    relay.stop().await;
    run(
        &line.database.pool,
        "delete from outbox.cursors; delete from outbox.leases",
    )
    .await;
    let relay = line.setup.start();
    settled(&line.database.pool).await;
    relay.stop().await;
    assert_eq!(duplicates(&read(&line, 200).await, 100), 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_refused_transaction_only_the_bad_event_is_parked() {
    let Some(line) = line("of_a_refused_transaction_only_the_bad_event_is_parked").await else {
        return;
    };
    // The relay lets clocks differ by a day, the broker does not.
    line.kafka
        .alter("order", "message.timestamp.before.max.ms", "3600000")
        .await;
    emit(&line, 0, 150).await;
    let bad =
        "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload, occurred_at)
               values ('order', 'bad', 'bad', '1', clock_timestamp() - interval '2 hours')";
    run(&line.database.pool, bad).await;
    emit(&line, 150, 850).await;
    let relay = line.setup.start();
    settled(&line.database.pool).await;
    relay.stop().await;
    let parked =
        "select count(*) from outbox.parked where aggregate_id = 'bad' and error is not null";
    assert_eq!(number(&line.database.pool, parked).await, 1);
    let records = read(&line, 1000).await;
    assert_eq!(duplicates(&records, 1000), 0);
    assert_eq!(records.len(), 1000);
}

/// What is published again on request has no part in the transactions of the pipeline that goes on meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_does_not_shut_the_pipeline_out() {
    let Some(line) = line("a_replay_does_not_shut_the_pipeline_out").await else {
        return;
    };
    emit(&line, 0, 100).await;
    let relay = line.setup.start();
    settled(&line.database.pool).await;
    let mut replay = line.setup.command("replay");
    replay.args(["start", "--entity", "order/7"]);
    let replayed = replay.output().unwrap();
    assert_eq!(replayed.status.code(), Some(0), "{replayed:?}");
    emit(&line, 100, 100).await;
    settled(&line.database.pool).await;
    relay.stop().await;
    assert_eq!(duplicates(&read(&line, 205).await, 200), 5);
}
