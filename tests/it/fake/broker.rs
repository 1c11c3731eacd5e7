//! The broker and the producers that send to it: queues, what is on the wire, partitions, receipts.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use fastrand::Rng;
use outbox_relay::event::{Record, Rejection, Seq};
use outbox_relay::position::Position;
use outbox_relay::sink::{Known, LookUp, NotPrepared, Receipt, Refused, Sink, SinkError};
use tokio::time::{Instant, sleep, timeout_at};

use super::log::{FORBIDDEN, Poison};
use super::transactions::Transaction;
use super::{Due, Sabotage, Shared, World};
use crate::oracle::Fact;

/// A topic and one of its partitions.
pub type Partition = (String, u64);

pub(super) struct Carried {
    pub(super) seq: Seq,
    pub(super) id: i64,
    pub(super) partition: Partition,
    pub(super) intact: bool,
    /// Records that left together for one partition share their fate.
    batch: u64,
}

/// One opening of a sink. It outlives its process: what is on the wire may still land.
pub(super) struct Producer {
    pub(super) process: u32,
    owner: u32,
    pub(super) transaction: Transaction,
    /// It sends nothing more, and the broker that is back does not know it.
    cut_off: bool,
    prepared: BTreeSet<String>,
    queue: VecDeque<Carried>,
    /// What was taken although the queue was full.
    aside: Vec<Carried>,
    wire: BTreeMap<Partition, VecDeque<Carried>>,
    /// In one partition receipts come in order.
    receipt_at: BTreeMap<Partition, Instant>,
    pub(super) receipts: BTreeMap<(Instant, u64), Receipt>,
    /// Where an event was rejected nothing that follows is appended.
    torn: BTreeSet<Partition>,
    pub(super) dead: Option<String>,
    /// The connection is slow to tell the broker that nobody is there any more.
    pub(super) lands_from: Option<Instant>,
}

/// All topics and producers.
pub struct Broker {
    pub down_until: Option<Instant>,
    /// It answers, and its client complains all the time, as over one broker of several.
    pub grumbles: bool,
    /// What consumers can see.
    pub appended: BTreeSet<i64>,
    partitions: u64,
    pub queue_records: usize,
    pub(super) latency_ms: u64,
    /// Whether records are published in transactions, with the position behind them.
    pub transactional: bool,
    /// Topics about which it can't say anything.
    pub unready: BTreeSet<String>,
    /// Transactions that were committed.
    pub commits: u32,
    pub(super) committed: Option<Position>,
    /// The life that has initialised the transactional id last.
    pub(super) initialised: u32,
    pub(super) producers: BTreeMap<u32, Producer>,
    pub opened: u32,
    reject_next: Option<i64>,
    /// Whether the last receipts of a producer come together with the word that it is dead; by chance when none.
    pub last_words: Option<bool>,
    /// The next record finds the queue full, whatever is in it.
    pub full_once: bool,
}

impl Broker {
    pub fn random(rng: &mut Rng) -> Self {
        Self {
            down_until: None,
            grumbles: false,
            appended: BTreeSet::new(),
            partitions: rng.u64(1..4),
            queue_records: [rng.usize(1..4), rng.usize(1..30)][rng.usize(0..2)],
            latency_ms: rng.u64(1..40),
            transactional: rng.bool(),
            unready: BTreeSet::new(),
            commits: 0,
            committed: None,
            initialised: 0,
            producers: BTreeMap::new(),
            opened: 0,
            reject_next: None,
            last_words: [None, Some(false), Some(true)][rng.usize(0..3)],
            full_once: false,
        }
    }

    /// How many lives began.
    pub fn lives(&self) -> u32 {
        self.opened
    }
}

fn down() -> SinkError {
    SinkError("no answer from the broker".to_owned())
}

impl World {
    pub(super) fn is_down(&self, at: Instant) -> bool {
        self.broker.down_until.is_some_and(|until| at < until)
    }

    /// Some producers won't find it again.
    pub fn break_down(&mut self, until: Instant) {
        self.broker.down_until = Some(until);
        let often = self.faults.sink_cut_off;
        let lives: Vec<u32> = self.broker.producers.keys().copied().collect();
        for life in lives {
            if self.chance(often) {
                self.cut_off(life);
            }
        }
    }

    pub fn cut_off(&mut self, life: u32) {
        let producer = self.broker.producers.get_mut(&life).expect("it was opened");
        producer.cut_off = true;
    }

    fn is_cut_off(&self, life: u32) -> bool {
        self.broker.producers[&life].cut_off
    }

    fn open_producer(&mut self, process: u32, owner: u32) -> u32 {
        self.broker.opened += 1;
        let life = self.broker.opened;
        self.broker.producers.insert(
            life,
            Producer {
                process,
                owner,
                transaction: Transaction::default(),
                cut_off: false,
                prepared: BTreeSet::new(),
                queue: VecDeque::new(),
                aside: Vec::new(),
                wire: BTreeMap::new(),
                receipt_at: BTreeMap::new(),
                receipts: BTreeMap::new(),
                torn: BTreeSet::new(),
                dead: None,
                lands_from: None,
            },
        );
        self.note(Fact::Opened { owner, life });
        life
    }

    /// Nothing that is queued is sent any more. Of what is on the wire some lands, in order, now or much later.
    fn close_producer(&mut self, life: u32) {
        if self.is(Sabotage::KeepSending) {
            return;
        }
        let late = self.ms(3000);
        let late = if self.chance(300) {
            late
        } else {
            Duration::ZERO
        };
        let producer = self.broker.producers.get_mut(&life).expect("it was opened");
        producer.queue.clear();
        producer.aside.clear();
        // A request to commit may be on its way.
        producer.transaction.abandon();
        producer.lands_from = Some(Instant::now() + late);
        for wire in producer.wire.values_mut() {
            if self.rng.bool() {
                wire.truncate(self.rng.usize(0..=wire.len()));
            }
        }
    }

    /// The id of the event that was handed over.
    fn hand_over(&mut self, life: u32, seq: Seq, record: &Record<'_>) -> Result<i64, Refused> {
        let dies = self.faults.sink_dies;
        if self.chance(dies) {
            self.kill_producer(life);
        }
        let (carried, poison) = self.carry(seq, record);
        let reorder = self.is(Sabotage::ReorderOnFull);
        let spread = self.is(Sabotage::RejectNext);
        let broker = &mut self.broker;
        let producer = broker.producers.get_mut(&life).expect("it was opened");
        if let Some(reason) = &producer.dead {
            return Err(Refused::Broken(SinkError(reason.clone())));
        }
        if !producer.prepared.contains(&*record.topic) {
            return Err(Refused::Unprepared);
        }
        if poison == Some(Poison::Refused) || broker.reject_next.take().is_some() {
            broker.reject_next = spread.then_some(carried.id);
            return Err(Refused::Rejected(Rejection::new("too large")));
        }
        let id = carried.id;
        if broker.transactional {
            if !producer.transaction.take(carried, broker.queue_records)? {
                return Err(Refused::Full);
            }
            let owner = producer.owner;
            self.note(Fact::HandedOver { owner, life, id });
            self.note(Fact::Sent { owner, id });
            return Ok(id);
        }
        let idle = producer.queue.is_empty();
        if std::mem::take(&mut broker.full_once) {
            return Err(Refused::Full);
        }
        if producer.queue.len() < broker.queue_records {
            producer.queue.push_back(carried);
        } else if reorder {
            producer.aside.push(carried);
            self.plan(
                Instant::now() + Duration::from_millis(100),
                Due::Retry(life),
            );
        } else {
            return Err(Refused::Full);
        }
        let owner = self.broker.producers[&life].owner;
        self.note(Fact::HandedOver { owner, life, id });
        if idle {
            let at = Instant::now() + self.ms(5);
            self.plan(at, Due::Send(life));
        }
        Ok(id)
    }

    fn carry(&self, seq: Seq, record: &Record<'_>) -> (Carried, Option<Poison>) {
        let header = |name: &str| {
            let (_, value) = record.headers.iter().find(|(n, _)| n == name)?;
            Some(String::from_utf8_lossy(value.as_ref()?).into_owned())
        };
        let id: i64 = header("sequence")
            .and_then(|id| id.parse().ok())
            .unwrap_or(0);
        let key = record.key.as_deref().unwrap_or_default();
        let intact = self.log.event(id).is_some_and(|event| {
            record.topic == event.aggregate_type[..]
                && *key == *event.aggregate_id.as_bytes()
                && header("id") == Some(event.event_id.to_string())
                && record.value.as_deref() == event.payload.bytes()
        });
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        let partition = (
            record.topic.to_string(),
            hasher.finish() % self.broker.partitions,
        );
        let carried = Carried {
            seq,
            id,
            partition,
            intact,
            batch: 0,
        };
        (carried, self.log.poison(id))
    }

    /// What was published may be there and may not, and nobody will say which.
    pub fn kill_producer(&mut self, life: u32) {
        let producer = self.broker.producers.get_mut(&life).expect("it was opened");
        producer.dead = Some("the connection was lost".to_owned());
        producer.receipts.clear();
        if self.rng.bool() {
            producer.queue.clear();
        }
    }

    pub(super) fn send(&mut self, at: Instant, life: u32) {
        let producer = &self.broker.producers[&life];
        if producer.cut_off {
            return;
        }
        let process = producer.process;
        let again = match self.stalled.get(&process) {
            // When a process comes back its loop gets a turn before its client has a connection.
            Some(until) if at <= *until => Some(*until + Duration::from_millis(1)),
            _ if self.is_down(at) => self.broker.down_until,
            _ => None,
        };
        if let Some(again) = again {
            return self.plan(again, Due::Send(life));
        }
        let producer = self.broker.producers.get_mut(&life).expect("it was opened");
        let most = self.rng.usize(1..=20).min(producer.queue.len());
        let owner = producer.owner;
        let mut sent: Vec<Carried> = producer.queue.drain(..most).collect();
        self.entries += 1;
        for carried in &mut sent {
            carried.batch = self.entries;
        }
        if !producer.queue.is_empty() {
            self.plan(at + Duration::from_millis(1), Due::Send(life));
        }
        for carried in sent {
            let Carried { id, seq, .. } = carried;
            let partition = carried.partition.clone();
            self.note_at(at, Fact::Sent { owner, id });
            if self.is(Sabotage::ConfirmBeforeAppend) {
                self.answer(at, life, &partition, Receipt::Delivered(seq));
            }
            let producer = self.broker.producers.get_mut(&life).expect("it was opened");
            producer
                .wire
                .entry(partition.clone())
                .or_default()
                .push_back(carried);
            let most = self.broker.latency_ms;
            let lands = at + self.ms(most);
            self.plan(lands, Due::Land(life, partition));
        }
    }

    pub(super) fn retry(&mut self, at: Instant, life: u32) {
        let producer = self.broker.producers.get_mut(&life).expect("it was opened");
        let aside = std::mem::take(&mut producer.aside);
        producer.queue.extend(aside);
        self.plan(at, Due::Send(life));
    }

    pub(super) fn land(&mut self, at: Instant, life: u32, partition: &Partition) {
        let producer = self.broker.producers.get_mut(&life).expect("it was opened");
        let late = producer.lands_from.filter(|from| at < *from);
        let later = late.or(self.broker.down_until.filter(|until| at < *until));
        if let Some(later) = later {
            return self.plan(later, Due::Land(life, partition.clone()));
        }
        let Some(carried) = producer
            .wire
            .get_mut(partition)
            .and_then(VecDeque::pop_front)
        else {
            return;
        };
        if producer.torn.contains(partition) {
            return;
        }
        let mates = producer.wire[partition].iter();
        let mates = mates.filter(|mate| mate.batch == carried.batch);
        let ids: Vec<i64> = mates.map(|mate| mate.id).chain([carried.id]).collect();
        let rejected = |id| self.log.poison(id) == Some(Poison::Rejected);
        if ids.into_iter().any(rejected) {
            self.refuse(at, life, partition, carried);
            return;
        }
        let Carried {
            seq, id, intact, ..
        } = carried;
        self.broker.appended.insert(id);
        self.note_at(at, Fact::Appended { id, intact });
        if !self.is(Sabotage::ConfirmBeforeAppend) {
            self.answer(at, life, partition, Receipt::Delivered(seq));
        }
    }

    /// Nothing of a batch with a bad record is appended, and nothing after it; nobody says which record is the bad one.
    fn refuse(&mut self, at: Instant, life: u32, partition: &Partition, first: Carried) {
        let producer = self.broker.producers.get_mut(&life).expect("it was opened");
        producer.torn.insert(partition.clone());
        producer.dead = Some("a record before this one was rejected".to_owned());
        producer.queue.clear();
        let batch = first.batch;
        let wire = producer.wire.remove(partition).unwrap_or_default();
        let rest = wire.into_iter().filter(|mate| mate.batch == batch);
        let refused: Vec<Carried> = [first].into_iter().chain(rest).collect();
        if !self.is(Sabotage::ConfirmBeforeAppend) {
            for Carried { seq, .. } in refused {
                let receipt = Receipt::Rejected(seq, Rejection::new("invalid record"));
                self.answer(at, life, partition, receipt);
            }
        }
    }

    pub(super) fn answer(
        &mut self,
        at: Instant,
        life: u32,
        partition: &Partition,
        receipt: Receipt,
    ) {
        let late = self.faults.receipts_late;
        let most = self.broker.latency_ms * if self.chance(late) { 50 } else { 1 };
        let mut due = at + self.ms(most);
        self.entries += 1;
        let producer = self.broker.producers.get_mut(&life).expect("it was opened");
        let dead = producer.dead.is_some() && matches!(receipt, Receipt::Delivered(_));
        if dead && self.rng.bool() {
            return;
        }
        let before = producer.receipt_at.entry(partition.clone()).or_insert(due);
        due = due.max(*before);
        *before = due;
        producer.receipts.insert((due, self.entries), receipt);
    }

    /// What there is to say by now, perhaps only that a batch is under way; an error when it is the last word.
    fn take_receipts(
        &mut self,
        life: u32,
        into: &mut Vec<Receipt>,
    ) -> Option<Result<(), SinkError>> {
        let (now, most) = (Instant::now(), self.rng.usize(1..50));
        let together = self.broker.last_words.unwrap_or(self.rng.bool());
        let down = self.is_down(now);
        let producer = self.broker.producers.get_mut(&life).expect("it was opened");
        let ids = &producer.receipts;
        let due: Vec<_> = ids
            .range(..=(now, u64::MAX))
            .take(most)
            .map(|(at, _)| *at)
            .collect();
        let got = !due.is_empty();
        let taken: Vec<Receipt> = due
            .iter()
            .filter_map(|at| producer.receipts.remove(at))
            .collect();
        let over = producer.receipts.is_empty() && (together || !got);
        let dead = producer.dead.clone().filter(|_| over);
        for receipt in taken {
            into.push(receipt);
        }
        match dead {
            Some(reason) => Some(Err(SinkError(reason))),
            None => {
                let under_way = producer.transaction.is_under_way() && !down;
                (got || under_way && self.rng.u32(0..4) == 0).then_some(Ok(()))
            }
        }
    }

    fn next_receipt(&self, life: u32) -> Option<Instant> {
        let receipts = &self.broker.producers[&life].receipts;
        receipts.first_key_value().map(|((at, _), _)| *at)
    }
}

/// The sink of one life of a process.
pub struct FakeSink {
    shared: Shared,
    process: u32,
    owner: u32,
    life: Option<u32>,
    /// Which event has which number in this life.
    ids: BTreeMap<Seq, i64>,
}

impl FakeSink {
    pub fn new(shared: &Shared, process: u32, owner: u32) -> Self {
        Self {
            shared: shared.clone(),
            process,
            owner,
            life: None,
            ids: BTreeMap::new(),
        }
    }

    fn life(&self) -> u32 {
        self.life.expect("the sink is open")
    }
}

impl Sink for FakeSink {
    async fn open(&mut self) -> Result<(), SinkError> {
        self.close().await;
        let fails = self.shared.with(|world| {
            let often = world.faults.sink_open_error;
            world.chance(often)
        });
        self.shared.dawdle().await;
        if fails {
            return Err(SinkError("can't set up the client".to_owned()));
        }
        let (process, owner) = (self.process, self.owner);
        self.life = Some(
            self.shared
                .with(|world| world.open_producer(process, owner)),
        );
        Ok(())
    }

    async fn close(&mut self) {
        self.ids.clear();
        if let Some(life) = self.life.take() {
            self.shared.with(|world| world.close_producer(life));
        }
    }

    async fn resume(&mut self, _: &str) -> Result<Option<Position>, SinkError> {
        self.shared.dawdle().await;
        let life = self.life();
        let resumed = self.shared.with(|world| world.resume(life));
        self.shared.dawdle().await;
        resumed
    }

    fn commit(&mut self, position: &Position) {
        let life = self.life();
        self.shared
            .with(|world| world.close_transaction(life, position));
        self.shared.stir();
    }

    async fn check(&mut self) -> Result<(), SinkError> {
        const PATIENCE: Duration = Duration::from_secs(3);
        self.shared.dawdle().await;
        let wait = self.shared.with(|world| {
            let now = Instant::now();
            if world.is_cut_off(self.life()) {
                return Some(PATIENCE);
            }
            let up = world.broker.down_until.filter(|up| now < *up)?;
            Some((up - now).min(PATIENCE))
        });
        if let Some(wait) = wait {
            sleep(wait).await;
            return Err(down());
        }
        Ok(())
    }

    async fn is_cut_off(&mut self) -> bool {
        self.shared.dawdle().await;
        self.shared
            .with(|world| world.is_cut_off(self.life()) && !world.is_down(Instant::now()))
    }

    fn look_up(&mut self, topics: Vec<String>) -> LookUp {
        let shared = self.shared.clone();
        Box::pin(async move {
            shared.dawdle().await;
            let answers = shared.with(|world| {
                let answer = |topic: String| {
                    let often = world.faults.prepare_error;
                    let unready = world.broker.unready.contains(&topic);
                    let answer = if unready || world.is_down(Instant::now()) || world.chance(often)
                    {
                        Err(NotPrepared::Unknown(down()))
                    } else if topic == FORBIDDEN {
                        Err(NotPrepared::Rejected(Rejection::new("not allowed")))
                    } else {
                        Ok(Known::default())
                    };
                    (topic, answer)
                };
                topics.into_iter().map(answer).collect()
            });
            shared.dawdle().await;
            answers
        })
    }

    fn learn(
        &mut self,
        topic: &str,
        answer: Result<Known, NotPrepared>,
    ) -> Result<(), NotPrepared> {
        answer?;
        let life = self.life();
        self.shared.with(|world| {
            let producer = world.broker.producers.get_mut(&life);
            let producer = producer.expect("it was opened");
            producer.prepared.insert(topic.to_owned());
        });
        Ok(())
    }

    fn leaves_behind(&self) -> bool {
        self.shared.with(|world| !world.broker.transactional)
    }

    fn hand_over(&mut self, seq: Seq, record: &Record<'_>) -> Result<(), Refused> {
        let life = self.life();
        let id = self
            .shared
            .with(|world| world.hand_over(life, seq, record))?;
        self.ids.insert(seq, id);
        self.shared.stir();
        Ok(())
    }

    async fn receipts(&mut self, into: &mut Vec<Receipt>) -> Result<(), SinkError> {
        let life = self.life();
        loop {
            let first = into.len();
            if let Some(taken) = self.shared.with(|world| world.take_receipts(life, into)) {
                for receipt in &into[first..] {
                    if let Receipt::Delivered(seq) = receipt {
                        let id = self.ids[seq];
                        self.shared
                            .with(|world| world.note(Fact::Confirmed { life, id }));
                    }
                }
                return taken;
            }
            match self.shared.with(|world| world.next_receipt(life)) {
                None => self.shared.next_change().await,
                Some(at) => {
                    timeout_at(at, self.shared.next_change())
                        .await
                        .unwrap_or(());
                }
            }
        }
    }

    fn trouble(&self) -> Option<String> {
        let life = self.life;
        let down = self.shared.with(|world| {
            world.broker.grumbles
                || world.is_down(Instant::now())
                || life.is_some_and(|life| world.is_cut_off(life))
        });
        down.then(|| "the broker is down".to_owned())
    }
}

impl Drop for FakeSink {
    fn drop(&mut self) {
        if let Some(life) = self.life {
            self.shared.with(|world| world.close_producer(life));
        }
    }
}
