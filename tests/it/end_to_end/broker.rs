//! The broker freezes, dies and comes back.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::kafka::Kafka;
use super::load::Load;
use super::process::{Process, Setup};
use super::services::Own;
use super::{PATIENCE, complete, eventually};
use crate::harness::postgres::TestDatabase;

async fn in_flight(relay: &Process) {
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
    assert!(asked.elapsed() < Duration::from_secs(4));
    load.write(50).await;
    setup.set("RELAY__DRAIN_TIMEOUT", "1h");
    let mut relay = setup.start();
    own.signal("CONT");
    let seen = complete(&load, &kafka).await;
    eprintln!(
        "frozen: {} duplicates of {} records",
        seen.duplicates, seen.records
    );
    relay.ready().await;

    // Whoever does not want to wait for the confirmations asks again.
    own.signal("STOP");
    load.write(50).await;
    in_flight(&relay).await;
    relay.signal("TERM");
    eventually("the drain", PATIENCE, async || {
        relay.log().contains("stopping").then_some(())
    })
    .await;
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
    let (cpu, since) = (relay.cpu(), Instant::now());
    sleep(Duration::from_secs(3)).await;
    let spent = relay.cpu() - cpu;
    eprintln!("{spent:?} of CPU in {:?} without a broker", since.elapsed());
    assert!(spent < Duration::from_millis(500), "{spent:?}");
    assert!(relay.is_alive());
    own.start();
    let back = Instant::now();
    relay.ready().await;
    eprintln!("ready {:?} after the broker", back.elapsed());
    assert!(back.elapsed() < Duration::from_secs(10));
    let seen = complete(&load, &kafka).await;
    eprintln!(
        "killed: {} duplicates of {} records",
        seen.duplicates, seen.records
    );
    relay.stop().await;
}
