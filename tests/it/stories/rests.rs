//! A source that nobody waits at for a while rests.

use super::*;

/// What a database keeps for a listener would grow all the time.
#[test]
fn a_source_rests_while_its_pages_find_no_room() {
    story(async |shared| {
        commit(&shared, &[("order", "1", None)]);
        let meddled = Meddled::new(&shared, |read| {
            if read == 1 {
                goes_down_for(&shared, Duration::from_mins(1));
                // Those in flight, being handed over and waiting are three pages.
                commit(&shared, &[("order", "1", None); 50]);
            }
            Ok(())
        });
        let rests = meddled.rests.clone();
        let relay = relay(meddled, sink(&shared), ledger(&shared));
        rests_within(Duration::from_secs(30), relay, &rests).await;
    });
}

/// Nor is a listener read while there is always another page.
#[test]
fn a_source_rests_in_a_long_backlog() {
    story(async |shared| {
        commit(&shared, &[("order", "1", None); 200]);
        let meddled = Meddled::new(&shared, |_| {
            stop_the_process(LEASE / 8);
            Ok(())
        });
        let rests = meddled.rests.clone();
        let relay = relay(meddled, sink(&shared), ledger(&shared));
        rests_within(Duration::from_secs(30), relay, &rests).await;
        is_well(&shared);
    });
}

/// The end of a life, which is a rest as well, does not count.
async fn rests_within<S: Source>(
    time: Duration,
    relay: Relay<S, FakeSink, FakeLedger>,
    rests: &AtomicUsize,
) {
    let before_the_end = async {
        sleep(time - Duration::from_secs(1)).await;
        rests.load(Ordering::Relaxed)
    };
    let ((), rested) = tokio::join!(run_for(time, relay), before_the_end);
    assert!(rested > 0);
}

/// Also when the books close in the middle of a life.
#[test]
fn a_source_rests_when_the_lease_is_lost() {
    story(async |shared| {
        commit(&shared, &[("order", "1", None)]);
        let meddled = Meddled::new(&shared, |_| Ok(()));
        let rests = meddled.rests.clone();
        let slow = SlowLedger {
            ledger: ledger(&shared),
            granted: Vec::new(),
            renewed: vec![(LEASE * 2, Duration::ZERO)],
        };
        let rested = async {
            sleep(LEASE * 2).await;
            rests.load(Ordering::Relaxed)
        };
        let relay = relay(meddled, sink(&shared), slow);
        let ((), rested) = tokio::join!(run_for(LEASE * 10, relay), rested);
        assert!(rested > 0);
        is_well(&shared);
    });
}
