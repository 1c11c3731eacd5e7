//! The broker freezes, dies and comes back.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::admin::AdminClient;
use rdkafka::client::DefaultClientContext;
use tokio::time::{Instant, sleep};

use super::kafka::Kafka;
use super::load::Load;
use super::process::{Process, Setup};
use super::services::Own;
use super::{PATIENCE, complete, eventually, number, run};
use crate::harness::postgres::TestDatabase;

pub(super) async fn in_flight(relay: &Process) {
    eventually("events in flight", PATIENCE, async || {
        let events = relay.pipeline("main")?["in_flight_events"].as_u64()?;
        (events > 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_freezes_or_dies_loses_nothing() {
    let Some(database) = TestDatabase::create().await else {
        return;
    };
    let Some(mut own) = Own::kafka("a_broker_that_freezes_or_dies_loses_nothing") else {
        return;
    };
    let kafka = Kafka::new(own.variable("KAFKA_BROKERS").to_owned());
    let load = Load::prepare(&database.options, &kafka).await;
    let mut setup = Setup::new(&database.url);
    setup.kafka(&kafka);
    setup.set("RELAY__DRAIN_TIMEOUT", "1s");
    let relay = setup.start();
    relay.ready().await;
    load.write(50).await;
    complete(&load, &kafka).await;

    // What was handed over and never confirmed must not count as published when the relay ends.
    own.signal("STOP");
    load.write(100).await;
    in_flight(&relay).await;
    let asked = Instant::now();
    relay.stop().await;
    eprintln!(
        "SIGTERM to exit with a frozen broker: {:?}",
        asked.elapsed()
    );
    load.write(50).await;
    setup.set("RELAY__DRAIN_TIMEOUT", "1h");
    let mut relay = setup.start();
    own.signal("CONT");
    let seen = complete(&load, &kafka).await;
    eprintln!(
        "frozen: {} duplicates of {} records",
        seen.duplicates, seen.records
    );
    relay.ready_again().await;

    // Whoever does not want to wait for the confirmations asks again.
    own.signal("STOP");
    load.write(50).await;
    in_flight(&relay).await;
    relay.signal("TERM");
    relay.says("stopping").await;
    assert!(relay.is_alive());
    relay.signal("TERM");
    assert_eq!(relay.exit().await.code(), Some(1), "{}", relay.log());
    assert!(relay.log().contains("asked a second time to stop"));
    own.signal("CONT");
    setup.set("RELAY__DRAIN_TIMEOUT", "1s");
    relay = setup.start();
    relay.ready().await;
    complete(&load, &kafka).await;

    let writing = load.start(2);
    writing.commits(50).await;
    own.signal("KILL");
    writing.commits(50).await;
    let reason = relay
        .not_ready(&["kafka", "broker", "127.0.0.1", "connect"])
        .await;
    eprintln!("{reason}");
    writing.stop().await;
    relay.rests().await;
    assert!(relay.is_alive());
    own.start();
    let back = Instant::now();
    relay.ready_again().await;
    eprintln!("ready {:?} after the broker", back.elapsed());
    let seen = complete(&load, &kafka).await;
    eprintln!(
        "killed: {} duplicates of {} records",
        seen.duplicates, seen.records
    );
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_with_a_full_disk_loses_nothing() {
    let test = "a_broker_with_a_full_disk_loses_nothing";
    let Some(database) = TestDatabase::create().await else {
        return;
    };
    let Some(mut own) = Own::kafka_on_a_disk(test, "64m") else {
        return;
    };
    let kafka = Kafka::new(own.variable("KAFKA_BROKERS").to_owned());
    kafka.create(&["order"]).await;
    let mut setup = Setup::new(&database.url);
    setup.kafka(&kafka);
    let relay = setup.start();
    relay.ready().await;
    // 100 MB that no compression makes smaller.
    let pool = &database.pool;
    run(
        pool,
        "select outbox.emit('order', (n % 10)::text, 'placed', to_json(string_agg(md5(random()::text), '')))
           from generate_series(1, 1000) n, generate_series(1, 3200) group by n order by n",
    )
    .await;
    let reason = relay
        .not_ready(&["kafka", "broker", "connect", "disk"])
        .await;
    eprintln!("{reason}");
    let parked = "select count(*) from outbox.parked";
    assert_eq!(number(pool, parked).await, 0, "an outage rejects nothing");

    own.resize_disk("1g");
    own.stop();
    own.start();
    relay.ready().await;
    let mut reader = kafka.reader(&[kafka.topic("order")]);
    let mut newest: HashMap<String, i64> = HashMap::new();
    let mut ids = HashSet::new();
    eventually("all events", 4 * PATIENCE, async || {
        for record in reader.read_to_end().await {
            let sequence: i64 = str::from_utf8(record.header("sequence")?)
                .ok()?
                .parse()
                .ok()?;
            if ids.insert(sequence) {
                let before = newest.insert(record.key_text().to_owned(), sequence);
                assert!(before < Some(sequence), "{before:?} before {sequence}");
            }
        }
        (ids.len() == 1000).then_some(())
    })
    .await;
    assert_eq!(number(pool, parked).await, 0);
    relay.stop().await;
}

/// How many partitions a broker leads, and whether all have two replicas in sync.
fn leads(admin: &AdminClient<DefaultClientContext>, topic: &str, broker: i32) -> (usize, bool) {
    let Ok(metadata) = admin.inner().fetch_metadata(Some(topic), PATIENCE) else {
        return (0, false);
    };
    let partitions = metadata.topics()[0].partitions();
    let led = partitions
        .iter()
        .filter(|partition| partition.leader() == broker);
    let in_sync = partitions
        .iter()
        .all(|partition| partition.isr().len() == 2);
    (led.count(), in_sync)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaders_that_move_lose_nothing() {
    let Some(database) = TestDatabase::create().await else {
        return;
    };
    let Some(own) = Own::kafka("leaders_that_move_lose_nothing") else {
        return;
    };
    let mut second = Own::member_of(&own);
    let kafka = Kafka::new(own.variable("KAFKA_BROKERS").to_owned());
    let mut setup = Setup::new(&database.url);
    setup.kafka(&kafka);
    let both = format!("{},{}", kafka.brokers, second.variable("KAFKA_BROKERS"));
    setup.set("SINK__KAFKA__BROKERS", &both);
    setup.set("SINK__KAFKA__TOPICS__REPLICATION_FACTOR", "2");
    // The reader knows of three.
    setup.set("SINK__KAFKA__TOPICS__PARTITIONS", "3");
    let topic = kafka.topic("all");
    setup.set("PIPELINE__TOPIC", &topic);
    let relay = setup.start();
    relay.ready().await;
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &kafka.brokers);
    let admin: AdminClient<DefaultClientContext> = config.create().unwrap();
    eventually(
        "two replicas in sync, and leaders at both",
        PATIENCE,
        async || {
            let (led, in_sync) = leads(&admin, &topic, 2);
            (in_sync && led > 0).then_some(())
        },
    )
    .await;
    let pool = &database.pool;
    let emit = async || {
        let statement = "select outbox.emit('order', (n % 50)::text, 'changed', '{}') from generate_series(1, 200) n";
        run(pool, statement).await;
    };
    for _ in 0..10 {
        emit().await;
    }
    second.signal("KILL");
    for _ in 0..20 {
        emit().await;
        sleep(Duration::from_millis(50)).await;
    }
    eventually("every leader at the first", PATIENCE, async || {
        (leads(&admin, &topic, 1).0 == 3).then_some(())
    })
    .await;
    emit().await;
    second.start();
    for _ in 0..10 {
        emit().await;
    }
    let mut reader = kafka.reader(std::slice::from_ref(&topic));
    let mut newest: HashMap<String, i64> = HashMap::new();
    let mut seen = HashSet::new();
    eventually("all events", PATIENCE, async || {
        for record in reader.read_to_end().await {
            let sequence = str::from_utf8(record.header("sequence")?).ok()?;
            let sequence: i64 = sequence.parse().ok()?;
            if seen.insert(sequence) {
                let before = newest.insert(record.key_text().to_owned(), sequence);
                assert!(before < Some(sequence), "{before:?} before {sequence}");
            }
        }
        (seen.len() == 41 * 200).then_some(())
    })
    .await;
    relay.stop().await;
}
