//! One pipeline in several shards, over several relays: spread, moved, and given another number, under load.

use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use super::exactly_once::exactly_once;
use super::load::Seen;
use super::process::{Process, Setup};
use super::redrive::parked_are;
use super::verify::{counts, settled};
use super::{Line, PATIENCE, complete, eventually, run};

/// Waits until each relay owns so many shards, and all of them together each shard once.
async fn share(relays: &[&Process], counts: &[usize]) -> Duration {
    let since = Instant::now();
    let all: Vec<u32> = (0..).take(counts.iter().sum()).collect();
    eventually(
        &format!("shards spread as {counts:?}"),
        PATIENCE,
        async || {
            let owned: Vec<Vec<u32>> = relays.iter().map(|relay| relay.owned()).collect();
            let spread: Vec<usize> = owned.iter().map(Vec::len).collect();
            let mut together = owned.concat();
            together.sort_unstable();
            (spread == counts && together == all).then_some(())
        },
    )
    .await;
    since.elapsed()
}

/// What changes its owner in good order. A lease that was lost may repeat something, and on a machine that has too much to
/// do one of two seconds is lost now and then.
fn nothing_is_repeated(seen: &Seen, setup: &Setup) {
    let logs = setup.logs();
    let excused = logs.contains("lost the lease");
    assert!(
        seen.duplicates == 0 || excused,
        "{} duplicates\n{logs}",
        seen.duplicates
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shards_are_spread_over_the_relays_that_are_there() {
    let test = "shards_are_spread_over_the_relays_that_are_there";
    let Some((mut line, load)) = Line::with_load(test).await else {
        return;
    };
    line.setup.set("RELAY__LEASE_TTL", "2s");
    line.setup.set("PIPELINE__SHARDS", "4");
    let writing = load.start(3);
    let first = line.ready().await;
    share(&[&first], &[4]).await;
    writing.commits(50).await;
    let second = line.ready().await;
    let took = share(&[&first, &second], &[2, 2]).await;
    eprintln!("a second relay had its share after {took:?}");
    writing.commits(50).await;
    let third = line.ready().await;
    share(&[&first, &second, &third], &[2, 1, 1]).await;
    writing.commits(50).await;
    second.stop().await;
    let took = share(&[&first, &third], &[2, 2]).await;
    eprintln!("what a relay left was taken after {took:?}");
    writing.commits(50).await;
    // So far nobody was in the middle of anything.
    writing.stop().await;
    let seen = complete(&load, &line.kafka).await;
    nothing_is_repeated(&seen, &line.setup);

    let writing = load.start(3);
    writing.commits(50).await;
    first.kill().await;
    let took = share(&[&third], &[4]).await;
    eprintln!("what a killed relay had was taken after {took:?}");
    writing.commits(50).await;
    writing.stop().await;
    complete(&load, &line.kafka).await;
    let report = settled(&line.setup).await;
    assert_eq!(counts(&report)[..1], [0], "{report}");

    let output = line.setup.command("status").arg("--json").output().unwrap();
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = status["books"]["pipelines"].as_array().unwrap();
    let shards: Vec<&Value> = rows.iter().map(|row| &row["shard"]).collect();
    assert_eq!(shards, [0, 1, 2, 3]);
    assert!(
        rows.iter()
            .all(|row| row["owner"]["holder"].is_string() && row["shards"] == 4)
    );
    let text = String::from_utf8(line.setup.command("status").output().unwrap().stdout).unwrap();
    assert!(text.contains("main/0") && text.contains("main/3"), "{text}");
    third.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_sees_nobody_is_not_ready_and_says_why() {
    let test = "a_relay_that_sees_nobody_is_not_ready_and_says_why";
    let Some(mut line) = Line::create(test).await else {
        return;
    };
    line.setup.set("PIPELINE__SHARDS", "2");
    line.setup.set("RELAY__LEASE_TTL", "1s");
    let pool = line.database.pool.clone();
    let rename = |from: &str, to: &str| format!("alter table outbox.{from} rename to {to}");
    run(&pool, rename("members", "gone")).await;
    run(&pool, rename("leases", "lost")).await;
    let relay = line.setup.start();
    relay.not_ready(&["outbox.leases\\\" does not exist"]).await;
    relay.says("can't see which other relays are there").await;
    // The leases alone are enough.
    run(&pool, rename("lost", "leases")).await;
    share(&[&relay], &[2]).await;
    run(&pool, rename("gone", "members")).await;
    let other = line.ready().await;
    share(&[&relay, &other], &[1, 1]).await;
    relay.stop().await;
    other.stop().await;
}

/// Replaces the relays one by one by such with another number of shards, as a rolling update does.
async fn roll(line: &mut Line, old: Vec<Process>, shards: u32) -> Vec<Process> {
    line.setup.set("PIPELINE__SHARDS", &shards.to_string());
    let mut new = Vec::new();
    for relay in old {
        new.push(line.ready().await);
        relay.stop().await;
    }
    new
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_update_changes_the_number_of_shards() {
    let test = "a_rolling_update_changes_the_number_of_shards";
    let Some((mut line, load)) = Line::with_load(test).await else {
        return;
    };
    let writing = load.start(3);
    let mut relays = vec![line.ready().await, line.ready().await];
    for (shards, counts) in [(4, [2, 2]), (3, [2, 1]), (1, [1, 0])] {
        relays = roll(&mut line, relays, shards).await;
        eventually("the new number", PATIENCE, async || {
            let mut owned: Vec<usize> = relays.iter().map(|relay| relay.owned().len()).collect();
            owned.sort_unstable_by(|a, b| b.cmp(a));
            (owned == counts).then_some(())
        })
        .await;
        writing.commits(60).await;
    }
    writing.stop().await;
    let seen = complete(&load, &line.kafka).await;
    nothing_is_repeated(&seen, &line.setup);
    let report = settled(&line.setup).await;
    assert_eq!(counts(&report)[..1], [0], "{report}");
    for relay in relays {
        relay.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exactly_once_stays_exact_when_relays_die_while_the_number_changes() {
    let test = "exactly_once_stays_exact_when_relays_die_while_the_number_changes";
    let Some((mut line, load)) = Line::with_load(test).await else {
        return;
    };
    exactly_once(&mut line);
    line.setup.set("RELAY__LEASE_TTL", "1s");
    line.setup.set("RELAY__ACKNOWLEDGE_INTERVAL", "3s");
    line.setup.set("PIPELINE__SHARDS", "2");
    let writing = load.start(3);
    let (first, second) = (line.ready().await, line.ready().await);
    share(&[&first, &second], &[1, 1]).await;
    writing.commits(60).await;
    line.setup.set("PIPELINE__SHARDS", "3");
    let third = line.ready().await;
    writing.commits(20).await;
    // Now everybody who is left wants three; the cursors of both are behind what they have committed to the broker.
    first.kill().await;
    second.kill().await;
    let took = share(&[&third], &[3]).await;
    eprintln!("three shards after {took:?}");
    writing.commits(60).await;
    writing.stop().await;
    let committed = load.committed().await;
    let (mut reader, mut seen) = (line.kafka.reader(&load.topics()), Seen::default());
    while seen.missing(&committed) > 0 {
        for record in reader.read_on(1).await {
            seen.add(&record);
        }
    }
    for record in reader.read_on(0).await {
        seen.add(&record);
    }
    seen.judge(&committed);
    assert_eq!(seen.duplicates, 0, "each event once");
    third.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_that_was_frozen_over_the_change_publishes_nothing() {
    let test = "an_owner_that_was_frozen_over_the_change_publishes_nothing";
    let Some((mut line, load)) = Line::with_load(test).await else {
        return;
    };
    line.setup.set("RELAY__LEASE_TTL", "1s");
    line.setup.set("PIPELINE__SHARDS", "2");
    let writing = load.start(3);
    let first = line.ready().await;
    share(&[&first], &[2]).await;
    writing.commits(50).await;
    first.signal("STOP");
    line.setup.set("PIPELINE__SHARDS", "3");
    let second = line.ready().await;
    share(&[&second], &[3]).await;
    writing.commits(50).await;
    // It counts once a second.
    eventually("events of the second relay", PATIENCE, async || {
        (delivered(&second) > 0).then_some(())
    })
    .await;
    first.signal("CONT");
    // It is there again and wants two: the three stay, and it gets its share of them.
    share(&[&second, &first], &[2, 1]).await;
    second
        .says("other relays are told another number of shards")
        .await;
    writing.commits(50).await;
    writing.stop().await;
    // What it sent of its old shards on waking up would be out of order or doubled.
    complete(&load, &line.kafka).await;
    first.says("the pipeline has this many shards now").await;
    first.stop().await;
    second.stop().await;
}

fn delivered(relay: &Process) -> u64 {
    let (_, status) = relay.get("/status").unwrap();
    let status: Value = serde_json::from_str(&status).unwrap();
    let views = status["pipelines"].as_array().unwrap().iter();
    views
        .map(|view| view["delivered_events"].as_u64().unwrap())
        .sum()
}

/// An entity that waits is held by whichever shard it belongs to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_parked_waits_and_is_redriven_across_a_change() {
    let test = "what_is_parked_waits_and_is_redriven_across_a_change";
    let Some(mut line) = Line::create(test).await else {
        return;
    };
    line.kafka.create(&["order"]).await;
    line.setup.set("RELAY__LEASE_TTL", "1s");
    let pool = line.database.pool.clone();
    let topics = [line.kafka.topic("order")];
    let relay = line.ready().await;
    run(
        &pool,
        "alter table outbox.events drop constraint events_headers_can_leave;
         insert into outbox.events (aggregate_type, aggregate_id, event_type, payload, headers)
         select 'order', n::text, 'bad', '1', '[1]' from generate_series(1, 6) n",
    )
    .await;
    parked_are(&pool, 6).await;
    let relays = roll(&mut line, vec![relay], 3).await;
    share(&relays.iter().collect::<Vec<_>>(), &[3]).await;
    run(
        &pool,
        "select outbox.emit('order', n::text, 'good', m::text::json)
           from generate_series(2, 3) m, generate_series(1, 12) n",
    )
    .await;
    // Those with a bad event wait behind it, the others flow.
    parked_are(&pool, 18).await;
    let flowing = line.kafka.reader(&topics).read_on(12).await;
    assert!(
        flowing
            .iter()
            .all(|record| record.key_text().parse::<u8>().unwrap() > 6)
    );
    run(
        &pool,
        "update outbox.parked set headers = '{}' where headers::text = '[1]'",
    )
    .await;
    let redrive = ["redrive", "--all"];
    let output = line.setup.command("parked").args(redrive).output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    parked_are(&pool, 0).await;
    // One bad and two good ones of six, two good ones of the others.
    let all = line.kafka.reader(&topics).read_on(30).await;
    for entity in 1..=12 {
        let of_entity = all
            .iter()
            .filter(|record| record.key_text() == entity.to_string());
        let payloads: Vec<&str> = of_entity.map(super::kafka::Received::text).collect();
        let expected: &[&str] = if entity > 6 {
            &["2", "3"]
        } else {
            &["1", "2", "3"]
        };
        assert_eq!(payloads, expected, "entity {entity}");
    }
    for relay in relays {
        relay.stop().await;
    }
}
