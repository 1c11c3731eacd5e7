//! Two relays on one outbox.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::clock::Clock;
use super::process::Process;
use super::{Line, PATIENCE, complete, eventually, number};

async fn takes_over(relay: &Process) -> Duration {
    let since = Instant::now();
    eventually("the takeover", PATIENCE, async || {
        relay.owns().then_some(())
    })
    .await;
    since.elapsed()
}

async fn stands_by(relay: &Process) {
    eventually("standby", PATIENCE, async || {
        (relay.state() == "standby").then_some(())
    })
    .await;
    assert!(!relay.owns());
    assert!(matches!(relay.get("/readyz"), Some((200, _))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_one_publishes_and_the_other_takes_over() {
    let Some((mut line, load)) =
        Line::with_load("of_two_one_publishes_and_the_other_takes_over").await
    else {
        return;
    };
    // Nobody loses it while the machine stands still for a second.
    line.setup.set("RELAY__LEASE_TTL", "4s");
    let writing = load.start(2);
    let first = line.setup.start();
    takes_over(&first).await;
    let second = line.ready().await;
    stands_by(&second).await;
    writing.commits(100).await;
    assert!(first.owns() && !second.owns());

    first.stop().await;
    let took = takes_over(&second).await;
    eprintln!("takeover after a clean stop: {took:?}");

    let third = line.ready().await;
    stands_by(&third).await;
    writing.commits(50).await;
    second.kill().await;
    let took = takes_over(&third).await;
    eprintln!("takeover after a kill: {took:?}");

    let fourth = line.ready().await;
    stands_by(&fourth).await;
    writing.commits(50).await;
    third.signal("STOP");
    let took = takes_over(&fourth).await;
    eprintln!("takeover from a frozen owner: {took:?}");
    writing.commits(50).await;
    third.signal("CONT");
    stands_by(&third).await;
    let delivered = third.pipeline("main").unwrap()["delivered_events"].clone();
    writing.commits(100).await;
    writing.stop().await;
    // What the one that was frozen sends now would be out of order or twice: the oracle sees the first, this the second.
    let seen = complete(&load, &line.kafka).await;
    eprintln!("{} duplicates of {} records", seen.duplicates, seen.records);
    sleep(Duration::from_millis(600)).await;
    assert_eq!(
        third.pipeline("main").unwrap()["delivered_events"],
        delivered
    );
    assert!(fourth.owns() && !third.owns());
    third.stop().await;
    fourth.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_whose_clock_is_set_takes_the_lease_again_and_goes_on() {
    const TEST: &str = "an_owner_whose_clock_is_set_takes_the_lease_again_and_goes_on";
    let Some((mut line, load)) = Line::with_load(TEST).await else {
        return;
    };
    let clock = Clock::new();
    line.setup.clock(&clock);
    // Long: what is over is over by the wall clock, not because time went by.
    line.setup.set("RELAY__LEASE_TTL", "60s");
    let relay = line.ready().await;
    let writing = load.start(2);
    let times_taken = async || number(&line.database.pool, "select epoch from outbox.leases").await;
    for seconds in [3_600, -7_200, 61] {
        writing.commits(50).await;
        let before = times_taken().await;
        let since = Instant::now();
        clock.step(seconds);
        eventually("a lease that is taken anew", PATIENCE, async || {
            (times_taken().await > before).then_some(())
        })
        .await;
        eprintln!(
            "{seconds} s: the lease was taken again after {:?}",
            since.elapsed()
        );
    }
    writing.commits(50).await;
    writing.stop().await;
    complete(&load, &line.kafka).await;
    assert!(relay.owns());
    relay.stop().await;
}
