//! One world in memory: a database with its log and books, a broker, and the processes that use them.
//!
//! The fakes are honest: what they do to the relay, real servers do. All chance comes from one seed, and all waiting
//! goes by the clock of the runtime, so that a run on a paused clock can be repeated exactly.

pub mod books;
pub mod broker;
pub mod log;
mod transactions;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fastrand::Rng;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout_at};

use self::books::{Books, LateWrite};
use self::broker::{Broker, Partition};
use self::log::Log;
use crate::oracle::{Fact, History};

/// A lie that a fake tells, which the oracle has to find out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// The source shows rows of transactions that are still open.
    ShowUncommitted,
    /// The sink takes a record although its queue is full, and queues it a little later.
    ReorderOnFull,
    /// The sink confirms a record when it leaves.
    ConfirmBeforeAppend,
    /// The ledger writes a newer position than it is told.
    PositionAhead,
    /// The ledger lets former owners write.
    NoFence,
    /// The source reads ids above the highest that it has seen.
    SkipLateRows,
    /// The ledger says that events are parked and forgets them.
    ParkForgets,
    /// The loop gets wider bounds than the oracle knows of.
    Greedy,
    /// The sink refuses the record that follows a rejected one.
    RejectNext,
    /// The source looks at the log only when it is told to.
    HintsOnly,
    /// The ledger gives the lease to whoever asks.
    GrantTwice,
    /// The sink goes on sending what was queued before it was opened again.
    KeepSending,
    /// The broker has the position of a transaction before its records.
    PositionFirst,
    /// The sink says that no position was committed.
    ForgetPosition,
    /// The broker commits for whoever asks.
    NoFencing,
    /// The ledger says that an entity is free although events of it are still parked.
    FreeEarly,
    /// The ledger removes parked events when it says that they are due.
    RemoveWhenDue,
    /// The ledger gives the newest due events first.
    NewestDueFirst,
    /// The loop may set more events aside than the oracle knows of.
    Hoard,
}

/// How often things go wrong, per mille of the occasions.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    pub source_error: u32,
    pub ledger_error: u32,
    pub ledger_reply_lost: u32,
    pub ledger_late: u32,
    pub ledger_hangs: u32,
    pub sink_open_error: u32,
    pub sink_dies: u32,
    pub sink_cut_off: u32,
    pub receipts_late: u32,
    pub prepare_error: u32,
    pub hint_lost: u32,
    pub slow: u32,
}

impl Faults {
    /// Each kind absent, rare or frequent.
    fn random(rng: &mut Rng) -> Self {
        let mut up_to = |most: u32| match rng.u32(0..4) {
            0 | 1 => 0,
            2 => rng.u32(0..=most / 10),
            _ => rng.u32(0..=most),
        };
        Self {
            source_error: up_to(200),
            ledger_error: up_to(100),
            ledger_reply_lost: up_to(100),
            ledger_late: up_to(100),
            ledger_hangs: up_to(50),
            sink_open_error: up_to(300),
            sink_dies: up_to(20),
            sink_cut_off: up_to(1000),
            receipts_late: up_to(200),
            prepare_error: up_to(300),
            hint_lost: up_to(4000).min(1000),
            slow: up_to(1000),
        }
    }
}

/// Something that happens later without anybody's doing.
enum Due {
    /// A producer sends what it has queued.
    Send(u32),
    /// A producer queues what it took although its queue was full.
    Retry(u32),
    /// The next record of a producer reaches a partition.
    Land(u32, Partition),
    /// The broker hears that a transaction is to be committed.
    Commit(u32),
    /// A write whose caller has given up takes place.
    Write(LateWrite),
}

/// Everything outside the relay.
pub struct World {
    pub rng: Rng,
    pub faults: Faults,
    pub sabotage: Option<Sabotage>,
    pub history: History,
    pub log: Log,
    pub broker: Broker,
    pub books: Books,
    /// The longest time without looking at an idle log.
    pub poll_interval: Duration,
    /// Processes that do not run at the moment, and until when.
    pub stalled: BTreeMap<u32, Instant>,
    /// Chaos is over: no process dies any more.
    pub calm: bool,
    /// Lives of processes so far.
    pub owners: u32,
    /// The policy is to drop what is rejected.
    pub drops: bool,
    began: Instant,
    agenda: BTreeMap<(Instant, u64), Due>,
    entries: u64,
}

impl World {
    pub fn is(&self, sabotage: Sabotage) -> bool {
        self.sabotage == Some(sabotage)
    }

    pub fn chance(&mut self, per_mille: u32) -> bool {
        self.rng.u32(0..1000) < per_mille
    }

    pub fn ms(&mut self, most: u64) -> Duration {
        Duration::from_millis(self.rng.u64(0..=most))
    }

    pub fn note(&mut self, fact: Fact) {
        self.note_at(Instant::now(), fact);
    }

    fn note_at(&mut self, at: Instant, fact: Fact) {
        let at_ms = self.ms_of(at);
        self.history.facts.push((at_ms, fact));
    }

    fn ms_of(&self, at: Instant) -> u64 {
        u64::try_from((at - self.began).as_millis()).unwrap()
    }

    fn plan(&mut self, at: Instant, due: Due) {
        self.entries += 1;
        self.agenda.insert((at, self.entries), due);
    }

    /// Lets happen what should have happened by now.
    fn catch_up(&mut self) {
        let now = Instant::now();
        while let Some(entry) = self.agenda.first_entry() {
            let at = entry.key().0;
            if at > now {
                break;
            }
            match entry.remove() {
                Due::Send(producer) => self.send(at, producer),
                Due::Retry(producer) => self.retry(at, producer),
                Due::Land(producer, partition) => self.land(at, producer, &partition),
                Due::Commit(producer) => self.commit_transaction(at, producer),
                Due::Write(late) => self.write_late(at, &late),
            }
        }
    }

    /// Whether nothing is left to be done.
    pub fn is_quiet(&self) -> bool {
        let (broker, books, log) = (&self.broker, &self.books, &self.log);
        let done = |id: i64| {
            log.is_past(&books.position, id)
                && (broker.appended.contains(&id)
                    || books.parked.contains_key(&id)
                    || books.dropped.contains(&id)
                    || (self.drops && log.poison(id).is_some()))
        };
        self.agenda.is_empty() && !books.is_anything_wanted() && log.wanted().rev().all(done)
    }
}

/// The world as everybody in it holds it.
#[derive(Clone)]
pub struct Shared(Arc<Inner>);

struct Inner {
    world: Mutex<World>,
    /// Something changed that somebody may wait for.
    stirred: Notify,
    /// The database's NOTIFY.
    hint: Notify,
}

impl Shared {
    pub fn new(seed: u64, sabotage: Option<Sabotage>) -> Self {
        let mut rng = Rng::with_seed(seed);
        let mut faults = Faults::random(&mut rng);
        let mut broker = Broker::random(&mut rng);
        // The weather in which a rare lie matters.
        match sabotage {
            Some(Sabotage::NoFence) => faults.ledger_late = 200,
            Some(Sabotage::ReorderOnFull) => broker.queue_records = 2,
            _ => {}
        }
        use Sabotage::{ForgetPosition, NoFencing, PositionFirst};
        match sabotage {
            None => {}
            Some(PositionFirst | ForgetPosition | NoFencing) => broker.transactional = true,
            // Lies about what has no part in a transaction.
            Some(_) => broker.transactional = false,
        }
        let now = Instant::now();
        let world = World {
            faults,
            sabotage,
            history: History::default(),
            log: Log::new(rng.bool()),
            broker,
            books: Books::new(now, Duration::from_millis(rng.u64(60..1500))),
            poll_interval: Duration::from_millis(rng.u64(5..300)),
            stalled: BTreeMap::new(),
            calm: false,
            owners: 0,
            drops: false,
            began: now,
            agenda: BTreeMap::new(),
            entries: 0,
            rng,
        };
        Self(Arc::new(Inner {
            world: Mutex::new(world),
            stirred: Notify::new(),
            hint: Notify::new(),
        }))
    }

    /// Looks at the world as it is now, or changes it.
    pub fn with<T>(&self, f: impl FnOnce(&mut World) -> T) -> T {
        // A test that panics drops sinks, which come here too.
        let mut world = self.0.world.lock().unwrap_or_else(PoisonError::into_inner);
        world.catch_up();
        f(&mut world)
    }

    /// Takes a while, or not: every answer of a server comes through here, so that a crash can fall before it.
    pub async fn dawdle(&self) {
        let took = self.with(|world| {
            let slow = world.faults.slow;
            match world.rng.u32(0..10) {
                0..4 => None,
                4..7 => Some(Duration::ZERO),
                7..9 => Some(world.ms(3)),
                _ if world.chance(slow) => Some(world.ms(300)),
                _ => Some(world.ms(20)),
            }
        });
        match took {
            None => {}
            Some(Duration::ZERO) => tokio::task::yield_now().await,
            Some(took) => sleep(took).await,
        }
    }

    /// Tells whoever waits for a change to look again.
    pub fn stir(&self) {
        self.0.stirred.notify_waiters();
    }

    /// Waits for the next thing that happens by itself or by somebody's doing.
    async fn next_change(&self) {
        let stirred = self.0.stirred.notified();
        match self.with(|world| world.agenda.first_key_value().map(|((at, _), _)| *at)) {
            None => stirred.await,
            Some(at) => {
                timeout_at(at, stirred).await.unwrap_or(());
            }
        }
    }
}
