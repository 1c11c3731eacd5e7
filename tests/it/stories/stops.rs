//! What a request to stop still covers.

use super::*;

/// Runs, lets `before` happen, asks it to stop in the same moment, and waits for its end.
async fn stopped_after(
    shared: &Shared,
    relay: Relay<FakeSource, FakeSink, FakeLedger>,
    before: impl FnOnce(),
    meanwhile: impl AsyncFnOnce(&CancellationToken),
) {
    let stop = CancellationToken::new();
    let stopper = async {
        // It has caught up, and the next look is far away.
        sleep(Duration::from_secs(2)).await;
        before();
        stop.cancel();
        meanwhile(&stop).await;
    };
    let both = async { tokio::join!(relay.run(stop.clone()), stopper) };
    let ended = timeout(Duration::from_mins(1), both).await;
    assert!(
        ended.is_ok(),
        "it did not stop: {:#?}",
        shared.with(|world| world.history.facts.len())
    );
}

#[test]
fn a_request_to_stop_covers_what_was_committed_when_it_came() {
    story(async |shared| {
        shared.with(|world| world.poll_interval = Duration::from_hours(1));
        commit(&shared, &[("order", "1", None)]);
        let relay = relay(source(&shared), sink(&shared), ledger(&shared));
        // Some twenty pages.
        let before = || commit(&shared, &[("order", "1", None); 200]);
        stopped_after(&shared, relay, before, async |_| {}).await;
        is_well(&shared);
    });
}

#[test]
fn a_refusal_does_not_cut_the_drain_short() {
    story(async |shared| {
        let relay = relay(source(&shared), sink(&shared), ledger(&shared));
        let before = || {
            let mut events = [("order", "1", None); 50];
            events[20] = ("order", "2", Some(Poison::Rejected));
            commit(&shared, &events);
        };
        stopped_after(&shared, relay, before, async |_| {}).await;
        is_well(&shared);
    });
}

/// A relay that waited for everything would never end under load.
#[test]
fn a_request_to_stop_ends_although_writers_go_on() {
    story(async |shared| {
        let mut relay = relay(source(&shared), sink(&shared), ledger(&shared));
        relay.settings.drain_timeout = Duration::from_hours(1);
        let status = relay.status.subscribe();
        let before = || commit(&shared, &[("order", "1", None); 20]);
        let meanwhile = async |_: &CancellationToken| {
            while status.borrow().state != State::Stopped {
                commit(&shared, &[("order", "1", None); 3]);
                sleep(Duration::from_millis(1)).await;
            }
        };
        stopped_after(&shared, relay, before, meanwhile).await;
    });
}

/// Who leaves a shard to another relay leaves it at once.
#[test]
fn a_relay_whose_turn_is_over_leaves_the_rest_to_the_next_one() {
    story(async |shared| {
        shared.with(|world| world.poll_interval = Duration::from_hours(1));
        let mut relay = relay(source(&shared), sink(&shared), ledger(&shared));
        let (turn, turns) = watch::channel(Turn::Ours);
        relay.turn = turns;
        let mut status = relay.status.subscribe();
        let stop = CancellationToken::new();
        let leaves = async {
            sleep(Duration::from_secs(2)).await;
            commit(&shared, &[("order", "1", None); 200]);
            let holder = "another".to_owned();
            turn.send_replace(Turn::Theirs { holder });
            let stands_by = |status: &Status| matches!(status.state, State::Standby { .. });
            assert!(status.wait_for(stands_by).await.is_ok());
            let last_id = status.borrow().last_id;
            stop.cancel();
            last_id
        };
        let ((), last_id) = tokio::join!(relay.run(stop.clone()), leaves);
        assert_eq!(last_id, 0);
    });
}
