//! The loop in situations that are too narrow to wait for: the fakes of the simulation, each time with one turn of events.

mod ends;
mod rests;
mod steered;
mod stops;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::anyhow;
use outbox_relay::event::Shard;
use outbox_relay::ledger::Ledger;
use outbox_relay::relay::status::{State, Status};
use outbox_relay::relay::turn::Turn;
use outbox_relay::relay::{Relay, Settings};
use outbox_relay::sink::{Sink, SinkError};
use outbox_relay::source::{PageLimits, Source, SourceError};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use self::ends::{
    AtReceipts, Doubted, Meddled, SlowLedger, SlowSource, WALL_US, stop_the_process,
    suspend_the_machine,
};
use crate::fake::books::FakeLedger;
use crate::fake::broker::FakeSink;
use crate::fake::log::{FakeSource, Poison};
use crate::fake::{Shared, World};
use crate::oracle::{Bounds, Fact, Rejected, judge};
use crate::sim::{Rules, become_calm, pipeline};

const LEASE: Duration = Duration::from_secs(2);
const OWNER: u32 = 1;

/// Tells a story in fair weather on a paused clock.
fn story(tell: impl AsyncFnOnce(Shared)) {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap()
        .block_on(async {
            let shared = Shared::new(1, None);
            shared.with(|world| {
                become_calm(world);
                world.log.names_types = false;
                world.broker.transactional = false;
                world.books.lease_ttl = LEASE;
                world.poll_interval = Duration::from_millis(10);
            });
            tell(shared).await;
        });
}

fn settings() -> Settings {
    Settings {
        page: PageLimits {
            rows: 10,
            bytes: 100_000,
        },
        in_flight_rows: 10,
        in_flight_bytes: 100_000,
        lease_ttl: LEASE,
        drain_timeout: Duration::from_secs(5),
        acknowledge_interval: Duration::from_millis(10),
        redrive_rate: 10,
    }
}

fn relay<S: Source, K: Sink, L: Ledger>(source: S, sink: K, ledger: L) -> Relay<S, K, L> {
    Relay {
        pipeline: pipeline(false, &Rules::default()),
        settings: settings(),
        source,
        sink,
        ledger,
        shard: Shard::whole(),
        turn: Turn::always(),
        status: watch::channel(Status::starting()).0,
        changes: tokio::sync::watch::channel(None).1,
        now_us: || 0,
    }
}

fn source(shared: &Shared) -> FakeSource {
    FakeSource::new(shared, OWNER)
}

fn sink(shared: &Shared) -> FakeSink {
    FakeSink::new(shared, 0, OWNER)
}

fn ledger(shared: &Shared) -> FakeLedger {
    FakeLedger::new(shared, OWNER)
}

/// One transaction with one event for each of these.
fn commit(shared: &Shared, events: &[(&str, &str, Option<Poison>)]) {
    let xid = shared.with(|world| {
        let xid = world.log.begin();
        for (aggregate_type, aggregate_id, poison) in events {
            world
                .log
                .emit(xid, aggregate_type, aggregate_id, 10, *poison);
        }
        xid
    });
    shared.commit(xid);
}

/// Runs for a while, then asks it to stop and waits until it has.
async fn run_for<S: Source, K: Sink, L: Ledger>(time: Duration, relay: Relay<S, K, L>) {
    let stop = CancellationToken::new();
    let stopper = async {
        sleep(time).await;
        stop.cancel();
    };
    let both = async { tokio::join!(relay.run(stop.clone()), stopper) };
    let ended = timeout(time + Duration::from_secs(30), both).await;
    assert!(ended.is_ok(), "it did not stop");
}

/// Everything that was promised was kept, and nothing is left to do.
fn is_well(shared: &Shared) {
    shared.with(|world| {
        let quiet = world.is_quiet();
        world.note(Fact::Quiet);
        let Settings {
            page,
            in_flight_rows,
            in_flight_bytes,
            ..
        } = settings();
        let bounds = Bounds {
            in_flight_rows,
            in_flight_bytes,
            page_rows: page.rows,
            exactly_once: false,
            parked_max: 1000,
            parked_max_per_entity: 1000,
            rejected: Rejected::Waits,
        };
        let violations = judge(&world.history, &bounds);
        let facts = &world.history.facts;
        assert!(
            quiet && violations.is_empty(),
            "{facts:#?}\n{violations:#?}"
        );
    });
}

fn broken_off() -> Result<(), SourceError> {
    Err(SourceError::Transient(anyhow!("the connection was lost")))
}

/// The broker can't be reached for a moment, shorter than any pause of the loop.
fn goes_down(shared: &Shared) {
    let until = Instant::now() + Duration::from_millis(80);
    shared.with(|world| world.broker.down_until = Some(until));
}

#[test]
fn what_is_queued_stays_when_the_lease_is_given_back() {
    story(async |shared| {
        commit(&shared, &[("order", "1", None)]);
        let meddled = Meddled::new(&shared, |read| match read {
            1 => {
                goes_down(&shared);
                commit(&shared, &[("order", "1", None)]);
                Ok(())
            }
            2 => broken_off(),
            _ => Ok(()),
        });
        run_for(LEASE * 10, relay(meddled, sink(&shared), ledger(&shared))).await;
        is_well(&shared);
    });
}

/// Goes down for so long while the first page is read.
fn goes_down_for(shared: &Shared, time: Duration) {
    shared.with(|world| world.broker.down_until = Some(Instant::now() + time));
}

/// Each question makes its client try to connect, over and over.
#[test]
fn a_sink_that_is_away_is_not_asked_all_the_time() {
    const AWAY: Duration = Duration::from_mins(5);
    story(async |shared| {
        commit(&shared, &[("order", "1", None)]);
        let meddled = Meddled::new(&shared, |read| {
            if read == 1 {
                goes_down_for(&shared, AWAY);
                commit(&shared, &[("order", "1", None)]);
            }
            Ok(())
        });
        let asked = Arc::new(AtomicUsize::new(0));
        let doubted = Doubted {
            sink: sink(&shared),
            asked: asked.clone(),
        };
        run_for(AWAY + LEASE * 10, relay(meddled, doubted, ledger(&shared))).await;
        is_well(&shared);
        let asked = asked.load(Ordering::Relaxed);
        // Each answer takes 6 s, and after it there are 10.
        assert!((10..20).contains(&asked), "{asked} times");
    });
}

/// As a queue that counts what it has just told about: nothing else would wake the loop.
#[test]
fn a_queue_that_is_full_with_nothing_in_flight_is_tried_again_at_once() {
    story(async |shared| {
        commit(&shared, &[("order", "1", None)]);
        let emitted_at = OnceLock::new();
        let meddled = Meddled::new(&shared, |read| {
            // Long after the first, between two ticks.
            if read == 10 {
                shared.with(|world| world.broker.full_once = true);
                commit(&shared, &[("order", "1", None)]);
                emitted_at.get_or_init(Instant::now);
            }
            Ok(())
        });
        let relay = relay(meddled, sink(&shared), ledger(&shared));
        let delivered = async {
            while shared.with(|world| world.broker.appended.len()) < 2 {
                sleep(Duration::from_millis(1)).await;
            }
            emitted_at.get().expect("it was emitted").elapsed()
        };
        let ((), took) = tokio::join!(run_for(LEASE * 2, relay), delivered);
        assert!(took < Duration::from_millis(100), "{took:?}");
        is_well(&shared);
    });
}

/// Nobody else would give it back, and the next relay would wait until it has run out.
#[test]
fn a_lease_that_comes_with_a_request_to_stop_is_given_back() {
    story(async |shared| {
        let late = SlowLedger {
            ledger: ledger(&shared),
            granted: vec![Duration::from_millis(500)],
            renewed: Vec::new(),
        };
        let relay = relay(source(&shared), sink(&shared), late);
        run_for(Duration::from_millis(100), relay).await;
        let released = |world: &mut World| {
            let facts = &world.history.facts;
            facts
                .iter()
                .any(|(_, fact)| matches!(fact, Fact::Released { .. }))
        };
        assert!(shared.with(released));
    });
}

/// The client of the sink has lost its brokers for good, with something under way or without.
#[test]
fn a_sink_that_is_cut_off_is_opened_again() {
    for waits in [false, true] {
        story(async |shared| {
            commit(&shared, &[("order", "1", None)]);
            let later = async {
                sleep(Duration::from_secs(5)).await;
                shared.with(|world| {
                    let life = world.broker.lives();
                    world.cut_off(life);
                });
                if waits {
                    sleep(Duration::from_secs(20)).await;
                }
                commit(&shared, &[("order", "1", None)]);
            };
            let relay = relay(source(&shared), sink(&shared), ledger(&shared));
            tokio::join!(run_for(Duration::from_secs(60), relay), later);
            is_well(&shared);
            assert_eq!(shared.with(|world| world.broker.lives()), 2);
        });
    }
}

#[test]
fn a_sink_that_answers_is_well_although_its_client_complains() {
    story(async |shared| {
        shared.with(|world| world.broker.grumbles = true);
        let relay = relay(source(&shared), sink(&shared), ledger(&shared));
        let mut status = relay.status.subscribe();
        let is_running = |status: &Status| status.state == State::Running;
        let running = async { status.wait_for(is_running).await.is_ok() };
        let (_, running) = tokio::join!(run_for(Duration::from_secs(10), relay), running);
        assert!(running);
    });
}

#[test]
fn a_lease_whose_answer_comes_late_is_over_when_the_database_says_so() {
    story(async |shared| {
        commit(&shared, &[("order", "1", None)]);
        let late = SlowLedger {
            ledger: ledger(&shared),
            granted: vec![LEASE * 3 / 2],
            renewed: Vec::new(),
        };
        run_for(LEASE * 10, relay(source(&shared), sink(&shared), late)).await;
        is_well(&shared);
    });
}

#[test]
fn a_rejection_counts_although_the_sink_is_lost_with_it() {
    story(async |shared| {
        shared.with(|world| world.broker.last_words = Some(true));
        commit(
            &shared,
            &[("order", "1", Some(Poison::Rejected)), ("order", "1", None)],
        );
        let relay = relay(source(&shared), sink(&shared), ledger(&shared));
        run_for(LEASE * 10, relay).await;
        is_well(&shared);
    });
}

/// What has arrived is not published a second time.
#[test]
fn a_delivery_counts_although_the_sink_is_lost_with_it() {
    story(async |shared| {
        commit(&shared, &[("order", "1", None)]);
        let lost = AtReceipts::new(sink(&shared), |nth| match nth {
            1 => Err(SinkError("the producer is dead".to_owned())),
            _ => Ok(()),
        });
        let relay = relay(source(&shared), lost, ledger(&shared));
        run_for(LEASE * 10, relay).await;
        is_well(&shared);
        shared.with(|world| {
            let facts = world.history.facts.iter();
            let handed_over = facts.filter(|(_, fact)| matches!(fact, Fact::HandedOver { .. }));
            assert_eq!((world.broker.lives(), handed_over.count()), (2, 1));
        });
    });
}

#[test]
fn what_is_set_aside_keeps_its_reason_when_the_life_ends_in_the_same_turn() {
    story(async |shared| {
        commit(&shared, &[("order", "1", None)]);
        // The topic of the last event is the first to be asked for while the broker is away.
        let meddled = Meddled::new(&shared, |read| {
            if read == 1 {
                goes_down(&shared);
                let refused = Some(Poison::Refused);
                commit(&shared, &[("order", "1", refused), ("customer", "1", None)]);
            }
            Ok(())
        });
        run_for(LEASE * 10, relay(meddled, sink(&shared), ledger(&shared))).await;
        is_well(&shared);
    });
}

#[test]
fn trouble_with_the_source_does_not_cut_the_drain_short() {
    story(async |shared| {
        commit(&shared, &[("order", "1", None)]);
        let stop = CancellationToken::new();
        let meddled = Meddled::new(&shared, |read| {
            if read == 1 {
                goes_down(&shared);
                commit(&shared, &[("order", "1", None)]);
                return Ok(());
            }
            stop.cancel();
            broken_off()
        });
        let relay = relay(meddled, sink(&shared), ledger(&shared));
        relay.run(stop.clone()).await;
        is_well(&shared);
    });
}

#[test]
fn a_renewal_whose_answer_comes_late_counts_from_the_question() {
    story(async |shared| {
        let never = LEASE * 100;
        let slow = SlowLedger {
            ledger: ledger(&shared),
            granted: Vec::new(),
            renewed: vec![(never, never), (Duration::ZERO, LEASE / 2)],
        };
        let writer = async {
            for _ in 0..200 {
                commit(&shared, &[("order", "1", None)]);
                sleep(LEASE / 50).await;
            }
        };
        let relay = relay(source(&shared), sink(&shared), slow);
        tokio::join!(run_for(LEASE * 10, relay), writer);
        is_well(&shared);
    });
}

/// When the second of two owns it: soon after the first has given it back, or has let its lease run out.
#[test]
fn a_standby_takes_over_within_its_next_look() {
    const KILLED_AFTER: Duration = Duration::from_millis(10_300);
    for (is_killed, allowed) in [
        (false, Duration::from_secs(1)),
        (true, LEASE + Duration::from_secs(1)),
    ] {
        story(async |shared| {
            let [first, second] = [OWNER, OWNER + 1].map(|owner| {
                relay(
                    FakeSource::new(&shared, owner),
                    FakeSink::new(&shared, 0, owner),
                    FakeLedger::new(&shared, owner),
                )
            });
            let mut status = second.status.subscribe();
            let first = async {
                if is_killed {
                    let lives = timeout(KILLED_AFTER, first.run(CancellationToken::new()));
                    assert!(lives.await.is_err(), "it runs until it is killed");
                } else {
                    run_for(KILLED_AFTER, first).await;
                }
                Instant::now()
            };
            let second = async {
                // Not before the first one has it.
                sleep(LEASE).await;
                run_for(KILLED_AFTER + LEASE * 10, second).await;
            };
            let owns = async {
                let is_running = |status: &Status| status.state == State::Running;
                status.wait_for(is_running).await.unwrap();
                Instant::now()
            };
            let (gone_at, (), owned_at) = tokio::join!(first, second, owns);
            let took = owned_at.checked_duration_since(gone_at).unwrap();
            assert!(took <= allowed, "{took:?}");
        });
    }
}

#[test]
fn a_process_that_was_stopped_past_its_lease_hands_nothing_over() {
    story(async |shared| {
        commit(&shared, &[("order", "1", None), ("order", "1", None)]);
        let stopped = AtReceipts::new(sink(&shared), |nth| {
            if nth == 1 {
                stop_the_process(LEASE * 2);
            }
            Ok(())
        });
        let mut relay = relay(source(&shared), stopped, ledger(&shared));
        // The second event waits for the receipt of the first.
        relay.settings.in_flight_rows = 1;
        run_for(LEASE * 10, relay).await;
        is_well(&shared);
    });
}

#[test]
fn a_machine_that_was_suspended_past_its_lease_hands_nothing_over() {
    story(async |shared| {
        commit(&shared, &[("order", "1", None), ("order", "1", None)]);
        let suspended = AtReceipts::new(sink(&shared), |nth| {
            if nth == 1 {
                suspend_the_machine(LEASE * 2);
            }
            Ok(())
        });
        let mut relay = relay(source(&shared), suspended, ledger(&shared));
        relay.now_us = || WALL_US.load(Ordering::Relaxed);
        // The second event waits for the receipt of the first.
        relay.settings.in_flight_rows = 1;
        run_for(LEASE * 10, relay).await;
        is_well(&shared);
        // It asked for the lease once more before it handed the second over.
        shared.with(|world| {
            let facts = world.history.facts.iter().map(|(_, fact)| fact);
            let story: Vec<&str> = facts
                .filter_map(|fact| match fact {
                    Fact::HandedOver { .. } => Some("handed over"),
                    Fact::Confirmed { .. } => Some("confirmed"),
                    Fact::Released { .. } => Some("released"),
                    _ => None,
                })
                .take(4)
                .collect();
            assert_eq!(
                story,
                ["handed over", "confirmed", "released", "handed over"]
            );
        });
    });
}

/// A backlog of ten pages, and how many transactions it took by when.
async fn drained_exactly_once(shared: &Shared, slow: Duration, looks: &[Duration]) -> Vec<u32> {
    shared.with(|world| {
        world.broker.transactional = true;
        world.broker.queue_records = 1000;
    });
    commit(shared, &[("order", "1", None); 100]);
    let source = SlowSource {
        source: source(shared),
        pages: 0,
        slow,
    };
    let mut relay = relay(source, sink(shared), ledger(shared));
    relay.settings.in_flight_rows = 1000;
    let look = async {
        let mut commits = Vec::new();
        for time in looks {
            sleep(*time).await;
            commits.push(shared.with(|world| world.broker.commits));
        }
        commits
    };
    let ((), commits) = tokio::join!(run_for(LEASE * 30, relay), look);
    shared.with(|world| {
        assert!(world.is_quiet());
        assert_eq!(world.broker.appended.len(), 100);
    });
    commits
}

#[test]
fn a_transaction_goes_on_while_there_is_more() {
    story(async |shared| {
        let commits =
            drained_exactly_once(&shared, Duration::ZERO, &[Duration::from_secs(5)]).await;
        assert!((1..5).contains(&commits[0]), "{commits:?} for ten pages");
    });
}

#[test]
fn a_transaction_does_not_wait_for_a_slow_page() {
    story(async |shared| {
        let second = Duration::from_secs(1);
        let commits = drained_exactly_once(&shared, second * 5, &[second, second * 5]).await;
        assert_eq!(commits, [1, 2], "a transaction for each page");
    });
}

/// A topic that can't be made holds up its own events, and later ones of their entities: no session ends for it.
#[test]
fn a_topic_that_is_not_ready_holds_up_only_its_own_events() {
    story(async |shared| {
        let unready = |shared: &Shared, unready: &[&str]| {
            let unready = unready.iter().map(ToString::to_string).collect();
            shared.with(|world| world.broker.unready = unready);
        };
        unready(&shared, &["invoice"]);
        for _ in 0..3 {
            commit(&shared, &[("invoice", "1", None), ("order", "1", None)]);
        }
        let appended = |shared: &Shared| shared.with(|world| world.broker.appended.len());
        let later = async {
            sleep(Duration::from_secs(8)).await;
            assert_eq!(appended(&shared), 3, "the orders");
            unready(&shared, &[]);
            sleep(Duration::from_secs(8)).await;
            assert_eq!(appended(&shared), 6);
        };
        let relay = relay(source(&shared), sink(&shared), ledger(&shared));
        tokio::join!(run_for(Duration::from_secs(20), relay), later);
        assert_eq!(shared.with(|world| world.broker.opened), 1, "sessions");
        is_well(&shared);
    });
}
