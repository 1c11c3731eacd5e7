//! The relay is stopped and killed under load.

use tokio::time::Instant;

use super::{Line, PATIENCE, complete, eventually, number};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clean_stops_under_load_leave_an_exact_position() {
    let Some((mut line, load)) =
        Line::with_load("clean_stops_under_load_leave_an_exact_position").await
    else {
        return;
    };
    // What is handed over is waited for, and no longer: its end does not wait for this one.
    line.setup.set("RELAY__DRAIN_TIMEOUT", "1h");
    let writing = load.start(4);
    for _ in 0..4 {
        let relay = line.ready().await;
        writing.commits(100).await;
        let asked = Instant::now();
        relay.stop().await;
        eprintln!("SIGTERM to exit: {:?}", asked.elapsed());
        let held = "select count(*) from outbox.leases where expires_at > clock_timestamp()";
        assert_eq!(number(&line.database.pool, held).await, 0);
    }
    let relay = line.ready().await;
    writing.commits(50).await;
    writing.stop().await;
    let seen = complete(&load, &line.kafka).await;
    assert_eq!(seen.duplicates, 0);
    relay.stop().await;
    // All that was handed out is behind the cursor: nothing is left to read, and nothing is read twice.
    let behind = "select count(*) from outbox.cursors c, outbox.events_id_seq s \
                   where c.last_id = c.ceiling and c.ceiling = s.last_value";
    let newest = "select count(*) from outbox.cursors \
                   where last_id >= (select max(id) from outbox.events)";
    assert_eq!(number(&line.database.pool, newest).await, 1);
    eprintln!(
        "at the last value: {}",
        number(&line.database.pool, behind).await
    );
    let relay = line.ready().await;
    relay.stop().await;
    let seen = complete(&load, &line.kafka).await;
    assert_eq!(seen.duplicates, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kills_under_load_lose_nothing_and_keep_the_order() {
    const KILLS: u64 = 10;
    /// `relay.in_flight_events` and `sink.kafka.queue_records`.
    const WINDOW: u64 = 200;
    let Some((mut line, load)) =
        Line::with_load("kills_under_load_lose_nothing_and_keep_the_order").await
    else {
        return;
    };
    line.setup.set("RELAY__IN_FLIGHT_EVENTS", "100");
    line.setup.set("SINK__KAFKA__QUEUE_RECORDS", "100");
    line.setup.set("RELAY__LEASE_TTL", "1s");
    let writing = load.start(4);
    for _ in 0..KILLS {
        let relay = line.setup.start();
        // Whoever was killed still holds the lease for a while.
        eventually("the lease", PATIENCE, async || relay.owns().then_some(())).await;
        let before = relay
            .metric("outbox_captured_events_total")
            .unwrap_or_default();
        eventually("events under way", PATIENCE, async || {
            let captured = relay.metric("outbox_captured_events_total")?;
            (captured > before + fastrand::f64() * 100.0).then_some(())
        })
        .await;
        relay.kill().await;
    }
    let relay = line.ready().await;
    writing.stop().await;
    let seen = complete(&load, &line.kafka).await;
    eprintln!(
        "{} duplicates of {} records in {KILLS} kills",
        seen.duplicates, seen.records
    );
    assert!(seen.duplicates <= KILLS * WINDOW, "{}", seen.duplicates);
    relay.stop().await;
}
