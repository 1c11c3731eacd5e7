//! A pipeline that an operator pauses, or leads past one event.

use outbox_relay::ledger::Pause;
use outbox_relay::relay::Policy;

use super::*;

fn has_released(shared: &Shared) -> usize {
    shared.with(|world| {
        let facts = world.history.facts.iter();
        facts
            .filter(|(_, fact)| matches!(fact, Fact::Released { .. }))
            .count()
    })
}

fn appended(shared: &Shared) -> usize {
    shared.with(|world| {
        let facts = world.history.facts.iter();
        facts
            .filter(|(_, fact)| matches!(fact, Fact::Appended { .. }))
            .count()
    })
}

#[test]
fn a_paused_relay_drains_gives_its_lease_back_and_goes_on_when_it_is_resumed() {
    story(async |shared| {
        commit(&shared, &[("order", "1", None)]);
        let relay = relay(source(&shared), sink(&shared), ledger(&shared));
        let status = relay.status.subscribe();
        let operator = async {
            sleep(LEASE * 3).await;
            assert_eq!(appended(&shared), 1);
            let pause = Pause {
                since: "2026-01-31T10:00:00Z".to_owned(),
                by: "ann@shop".to_owned(),
                reason: "a story".to_owned(),
            };
            shared.with(|world| world.books.paused = Some(pause.clone()));
            // In flight or not handed over yet when the relay learns of it.
            commit(&shared, &[("order", "1", None); 40]);
            sleep(LEASE * 3).await;
            assert_eq!(status.borrow().state, State::Paused { pause });
            assert!(status.borrow().state.is_ready());
            assert_eq!(has_released(&shared), 1);
            let published = appended(&shared);
            commit(&shared, &[("order", "2", None)]);
            sleep(LEASE * 3).await;
            assert_eq!(appended(&shared), published, "nothing leaves meanwhile");
            shared.with(|world| world.books.paused = None);
            sleep(Duration::from_secs(2)).await;
            assert_eq!(status.borrow().state, State::Running);
            assert_eq!(appended(&shared), 42, "each of them once");
        };
        tokio::join!(run_for(LEASE * 12, relay), operator);
        is_well(&shared);
    });
}

#[test]
fn a_halted_relay_goes_past_the_event_that_an_operator_skips_and_past_no_other() {
    story(async |shared| {
        commit(
            &shared,
            &[
                ("order", "1", None),
                ("order", "1", Some(Poison::Malformed)),
                ("order", "1", None),
                ("order", "2", Some(Poison::Rejected)),
                ("order", "2", None),
            ],
        );
        let mut relay = relay(source(&shared), sink(&shared), ledger(&shared));
        relay.pipeline.on_rejected = Policy::Halt;
        let status = relay.status.subscribe();
        let halted_at = |id: i64| {
            let state = &status.borrow().state;
            matches!(state, State::Halted { reason } if reason.starts_with(&format!("event {id}: ")))
        };
        let operator = async {
            sleep(LEASE * 3).await;
            assert!(halted_at(2), "{:?}", status.borrow().state);
            assert_eq!(appended(&shared), 1);
            shared.with(|world| world.books.skips.insert(2, "skipped by ann".to_owned()));
            sleep(Duration::from_secs(3)).await;
            assert!(halted_at(4), "{:?}", status.borrow().state);
            // What was in flight is not published again.
            assert_eq!(appended(&shared), 2);
            shared.with(|world| world.books.skips.insert(4, "skipped by ann".to_owned()));
            sleep(Duration::from_secs(3)).await;
            assert_eq!(status.borrow().state, State::Running);
            assert_eq!(appended(&shared), 3);
            shared.with(|world| {
                let set_aside: Vec<i64> = world.books.parked.keys().copied().collect();
                assert_eq!(set_aside, [2, 4]);
            });
        };
        tokio::join!(run_for(LEASE * 8, relay), operator);
    });
}
