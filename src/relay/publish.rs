//! One life of a pipeline: pages come in, records go out in order, receipts come back, the position moves.
//!
//! The stages meet here and nowhere else: order → route → encode → sink, for each event, in the order of the log.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::future::ready;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use super::batch::Batch;
use super::books::Order;
use super::lease::LeaseEnd;
use super::lookups::{Lookups, until};
use super::redrive::{Redrive, Try};
use super::reject::{Full, Halt};
use super::rejections::Rejections;
use super::status::Status;
use super::stop::{Drain, Stop};
use super::topics::Topics;
use super::{Changes, Pipeline, Settings};
use crate::encode::{Texts, encode};
use crate::event::{Event, EventKey, Rejection, Seq};
use crate::ledger::Parked;
use crate::order::{InFlight, Settled, Suspects, Waiting};
use crate::position::Position;
use crate::route::Filter;
use crate::sink::{Receipt, Refused, Sink, SinkError};
use crate::source::{Page, SourceError};
use crate::telemetry::{LatencyTally, PipelineMetrics};

/// Events handed over before receipts are looked at again.
const HAND_OVER_AT_ONCE: usize = 512;

/// How soon a sink that was full with nothing in flight is tried again.
const FULL_AGAIN: Duration = Duration::from_millis(5);

/// How a life ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// On request; everything that counts is settled, or the time for that was up.
    Stopped,
    /// The source could not be read.
    Source(SourceError),
    /// The sink lost its place: begin again from the last position.
    Sink(SinkError),
    /// The broker refused records after their hand-over, and a batch shares its fate: begin again, and find out which one
    /// it can't take.
    Suspected(Rejection),
    /// The broker refused an event that was alone: begin again, and set it aside this time.
    Condemned(EventKey, Try, Rejection),
    /// An event was rejected and the policy is to halt.
    Halted(Halt),
    /// Nothing more may be set aside.
    Full(Full),
    /// There is room again.
    Room,
    /// The lease has run out.
    LeaseExpired,
}

/// What a life works with, and what it leaves behind for the next one.
pub(super) struct Publisher<'a, K> {
    pub(super) pipeline: &'a Pipeline,
    pub(super) settings: &'a Settings,
    pub(super) sink: &'a mut K,
    pub(super) metrics: &'a PipelineMetrics,
    pub(super) status: &'a watch::Sender<Status>,
    pub(super) changes: &'a watch::Receiver<Option<Arc<Changes>>>,
    pub(super) settled: &'a watch::Sender<Position>,
    pub(super) orders: &'a mpsc::Sender<Order>,
    pub(super) lease_end: &'a watch::Receiver<LeaseEnd>,
    pub(super) waiting: &'a mut Waiting,
    /// Events that are set aside and hold nobody up.
    pub(super) dead_letters: &'a mut BTreeSet<EventKey>,
    /// Events that the broker refused in an earlier life, with its reason.
    pub(super) condemned: &'a mut HashMap<(EventKey, Try), Rejection>,
    /// Events that an operator wants left out, with the reason.
    pub(super) skipped: &'a HashMap<EventKey, String>,
    pub(super) rejections: &'a mut Rejections,
    /// What keeps this life from taking pages: it only makes room.
    pub(super) full: Option<&'a Full>,
    /// Events that were refused together in an earlier life, of which no innocent one must be set aside (I6).
    pub(super) suspects: &'a mut Suspects,
    /// Whether the source has answered in this life.
    pub(super) answered: watch::Receiver<bool>,
    /// The wall clock, in microseconds since the Unix epoch.
    pub(super) now_us: fn() -> i64,
}

/// The state of one life; dropping it loses nothing that is not read again.
pub(super) struct Life {
    pub(super) in_flight: InFlight,
    /// As of the beginning of the page.
    changes: Option<Arc<Changes>>,
    /// The place that the event at hand has in flight already, where it has waited for its topic.
    pub(super) placed: Option<Seq>,
    /// Topics that are looked up, and the events that wait for them.
    pub(super) lookups: Lookups,
    /// Why the sink has to be opened again, once nothing is in flight.
    pub(super) reopen: Option<SinkError>,
    /// The rest of the page, or of the batch of parked events, that is being handed over.
    pub(super) pending: VecDeque<Event>,
    pub(super) parking: Vec<Parked>,
    pub(super) parking_seqs: Vec<Seq>,
    /// Copies of dead letters that are in flight.
    pub(super) copies: HashSet<Seq>,
    pub(super) redrive: Redrive,
    pub(super) topics: Topics,
    /// Where the last page ends.
    end: Position,
    pub(super) latencies: LatencyTally,
    pub(super) filtered: u64,
    pub(super) heard_at: Instant,
    /// When the sink was last asked why it is silent.
    pub(super) asked_at: Instant,
    pub(super) batch: Batch,
    /// Whether the source had more when it read the last page.
    pub(super) more: bool,
    pub(super) drain: Drain,
    /// The suspect that is in flight, alone.
    on_trial: Option<EventKey>,
}

/// Why the hand-over paused.
pub(super) enum Pause {
    /// Nothing at hand.
    Starved,
    /// No room in flight, or nothing may be handed over before the verdict on what is.
    Blocked,
    /// The sink's queue is full.
    Full,
    /// Enough for one turn; there is more.
    Turn,
    /// The next event's topic has to be known first.
    Topic(String),
    /// The part of the sink that the next event goes to takes nothing, for this reason.
    Later(String),
}

impl<K: Sink> Publisher<'_, K> {
    /// Runs until the life ends.
    pub(super) async fn run(&mut self, pages: mpsc::Receiver<Page>, stop: &Stop) -> Ended {
        let mut life = Life::new(self.settings, self.settled.borrow().clone());
        let ended = self.take_turns(&mut life, pages, stop).await;
        self.report(&mut life, None);
        ended
    }

    async fn take_turns(
        &mut self,
        life: &mut Life,
        mut pages: mpsc::Receiver<Page>,
        stop: &Stop,
    ) -> Ended {
        let mut receipts = Vec::new();
        let mut ticks = interval(Duration::from_secs(1));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let pause = match self.hand_over(life).await {
                Ok(pause) => pause,
                Err(ended) => return ended,
            };
            self.commit(life, &pause);
            if life.is_drained() {
                return Ended::Stopped;
            }
            let drain_until = life.drain.until;
            let takes_pages = life.pending.is_empty() && life.drain.takes_pages();
            self.ask_for_due(life);
            let paused_at = Instant::now();
            let mut lost = None;
            let mut ticked = false;
            // In this order: receipts make room; a request to stop waits for nobody; a page is taken only when the last
            // one is handed over, and parked events, of which there are few, before it.
            tokio::select! {
                biased;
                received = self.sink.receipts(&mut receipts), if life.awaited() > 0 => {
                    life.heard_at = Instant::now();
                    lost = received.err();
                }
                () = stop.asked(), if drain_until.is_none() => life.begin_drain(stop, self.full.is_some()),
                () = until(drain_until) => return Ended::Stopped,
                () = until(life.batch.until()) => {}
                () = ready(()), if matches!(pause, Pause::Turn) => {}
                // A queue may count what it has just told about, and has no more to tell.
                () = sleep(FULL_AGAIN), if matches!(pause, Pause::Full | Pause::Later(_)) && life.awaited() == 0 => {}
                found = life.lookups.answers(), if !life.drain.leaves() => { self.learn(life, found); }
                due = life.redrive.due(), if life.pending.is_empty() && drain_until.is_none() => {
                    // Or raised one of its limits.
                    self.sink.doubt();
                    life.begin_batch(due);
                }
                page = pages.recv(), if takes_pages => match page {
                    Some(page) => self.begin(life, page),
                    None => life.end_pages(),
                },
                // Its sender lives as long as this life.
                Ok(()) = self.answered.changed() => ticked = true,
                _ = ticks.tick() => ticked = true,
            }
            self.count_pause(&pause, paused_at.elapsed());
            // The receipts that came before the sink lost its place count, above all one that says why it did.
            let ended = self.settle(life, &mut receipts);
            if let Some(ended) = ended.or(lost.map(Ended::Sink)) {
                return ended;
            }
            if ticked {
                let ended = tokio::select! {
                    biased;
                    // A request to stop does not wait for the sink's answer.
                    () = stop.asked(), if drain_until.is_none() => None,
                    ended = self.tick(life, drain_until.is_none()) => ended,
                };
                let Some(ended) = ended else { continue };
                // What came while it was asked counts, and more than the answer.
                let awaited = life.awaited() > 0;
                let more = self.sink.receipts(&mut receipts).now_or_never();
                if let Some(ended) = self.settle(life, &mut receipts) {
                    return ended;
                }
                match more {
                    Some(Ok(())) if awaited => life.heard_at = Instant::now(),
                    Some(Err(error)) => return Ended::Sink(error),
                    _ => return ended,
                }
            }
        }
    }

    fn count_pause(&self, pause: &Pause, time: Duration) {
        match pause {
            Pause::Starved => self.metrics.starved(time),
            Pause::Blocked | Pause::Full | Pause::Later(_) => self.metrics.blocked(time),
            Pause::Turn | Pause::Topic(_) => {}
        }
    }

    fn commit(&mut self, life: &mut Life, pause: &Pause) {
        if life.batch.ends(pause, life.more, Instant::now())
            && let Some(position) = life.in_flight.taken_up()
        {
            self.sink.commit(&position);
        }
    }

    fn begin(&self, life: &mut Life, page: Page) {
        let newest = page.newest().0;
        self.status.send_if_modified(|status| {
            status.newest_id = newest;
            false
        });
        if life.awaited() == 0 {
            life.heard_at = Instant::now();
        }
        life.changes.clone_from(&self.changes.borrow());
        life.more = page.more;
        life.end = page.end.clone();
        life.in_flight.begin_page(page.events.len(), page.end);
        life.pending = page.events.into();
    }

    /// Hands over what is at hand as far as there is room, and parks what has to be parked.
    async fn hand_over(&mut self, life: &mut Life) -> Result<Pause, Ended> {
        // A process that was stopped for longer than its lease wakes up here and must publish nothing new (I8).
        if self.lease_end.borrow().is_over((self.now_us)()) {
            return Err(Ended::LeaseExpired);
        }
        let paused = self.hand_over_some(life);
        // Before anything can end the life: the next one must not find an entity waiting for an event that nobody stored.
        self.park(life).await;
        self.advance(life);
        self.finish_batch(life).await;
        let pause = paused?;
        if life.awaited() == 0
            && let Some(error) = life.reopen.take()
        {
            return Err(Ended::Sink(error));
        }
        if !life.drain.leaves() {
            self.look_up(life);
        }
        Ok(pause)
    }

    fn hand_over_some(&mut self, life: &mut Life) -> Result<Pause, Ended> {
        if life.reopen.is_some() {
            return Ok(Pause::Blocked);
        }
        if let Some(pause) = self.hand_over_held(life)? {
            return Ok(pause);
        }
        for _ in 0..HAND_OVER_AT_ONCE {
            let Some(event) = life.pending.pop_front() else {
                return Ok(Pause::Starved);
            };
            let bytes = event.size_bytes();
            if !life.in_flight.has_room_for(bytes) {
                life.pending.push_front(event);
                return Ok(Pause::Blocked);
            }
            if let Some(pause) = self.pause_for_trial(life, &event) {
                life.pending.push_front(event);
                return Ok(pause);
            }
            let paused = if life.redrive.is_handing_over() {
                self.redrive(life, &event, bytes)?
            } else {
                self.take_up(life, &event, bytes)?
            };
            if let Some(pause) = paused {
                if let Pause::Topic(topic) = &pause {
                    self.want(life, topic);
                }
                life.pending.push_front(event);
                return Ok(pause);
            }
            if life.in_flight.rows() > 0 && self.suspects.is_tried_alone(event.key()) {
                life.on_trial = Some(event.key());
            }
        }
        Ok(Pause::Turn)
    }

    /// Takes up the next event of the log; says why the hand-over has to pause with the event still at hand.
    pub(super) fn take_up(
        &mut self,
        life: &mut Life,
        event: &Event,
        bytes: usize,
    ) -> Result<Option<Pause>, Ended> {
        if life.lookups.holds(event) {
            if !self.may_hold(life) {
                return Ok(Some(Pause::Blocked));
            }
            life.hold(event, bytes, None);
            return Ok(None);
        }
        match self.judge(life, event) {
            Verdict::Offered(Offered::HandedOver(topic)) => {
                life.place(event, bytes, topic);
            }
            Verdict::Offered(Offered::Paused(Pause::Topic(topic)))
                if life.placed.is_none() && self.may_hold(life) =>
            {
                life.lookups.want(&topic);
                life.hold(event, bytes, Some(topic));
            }
            Verdict::Offered(Offered::Paused(Pause::Later(reason)))
                if life.placed.is_none() && self.may_hold(life) =>
            {
                life.lookups.late(&self.pipeline.name, reason);
                life.hold(event, bytes, None);
            }
            Verdict::Offered(Offered::Rejected(rejection)) => {
                return self.reject(life, event, bytes, rejection);
            }
            Verdict::Offered(Offered::Paused(pause)) => return Ok(Some(pause)),
            Verdict::Offered(Offered::Broken(error)) => return Err(Ended::Sink(error)),
            Verdict::LeftOut => {
                self.suspects.acquit(event.key());
                let seq = life.place(event, 0, Topics::NONE);
                life.in_flight.settle(seq);
                life.filtered += 1;
            }
            Verdict::Wait => return self.set_aside(life, event, bytes, None),
            Verdict::Skip(reason) => self.skip(life, event, bytes, reason),
        }
        Ok(None)
    }

    /// While somebody is suspected the flight is narrow, and whatever comes after one that is tried alone waits for the
    /// verdict.
    fn pause_for_trial(&mut self, life: &mut Life, event: &Event) -> Option<Pause> {
        if self.suspects.is_empty() {
            return None;
        }
        self.advance(life);
        let most = match life.on_trial {
            Some(_) => 0,
            None => self.suspects.in_flight_before(event.key()),
        };
        if life.in_flight.rows() <= most {
            return None;
        }
        // What is being parked leaves without a receipt.
        Some(if life.parking.is_empty() {
            Pause::Blocked
        } else {
            Pause::Turn
        })
    }

    /// Takes one event through filter, order, route and encoding to the sink.
    fn judge(&mut self, life: &mut Life, event: &Event) -> Verdict {
        match life.filter(self.pipeline).admits(event) {
            Ok(true) => {}
            Ok(false) => return Verdict::LeftOut,
            Err(rejection) => return Verdict::Offered(Offered::Rejected(rejection)),
        }
        if !self.skipped.is_empty()
            && let Some(reason) = self.skipped.get(&event.key())
        {
            return Verdict::Skip(reason.clone());
        }
        if let Some(rejection) = self.condemned.get(&(event.key(), Try::First)) {
            return Verdict::Offered(Offered::Rejected(rejection.clone()));
        }
        if self.waiting.holds(event) {
            return Verdict::Wait;
        }
        Verdict::Offered(self.offer(life, event))
    }

    /// Through route and encoding to the sink.
    pub(super) fn offer(&mut self, life: &mut Life, event: &Event) -> Offered {
        let Pipeline {
            route, encoding, ..
        } = self.pipeline;
        let texts = Texts::of(event);
        let record = match encode(event, &texts, route, encoding) {
            Ok(record) => record,
            Err(rejection) => return Offered::Rejected(rejection),
        };
        match self.sink.hand_over(life.seq_at_hand(), &record) {
            Ok(()) => {
                life.batch.begin();
                Offered::HandedOver(life.topics.index_of(&record.topic, self.metrics))
            }
            Err(Refused::Full) => Offered::Paused(Pause::Full),
            Err(Refused::Later(reason)) => Offered::Paused(Pause::Later(reason)),
            Err(Refused::Unprepared) => match life.topics.refusal(&record.topic) {
                Some(rejection) => Offered::Rejected(rejection),
                None => Offered::Paused(Pause::Topic(record.topic.into_owned())),
            },
            Err(Refused::Rejected(rejection)) => Offered::Rejected(rejection),
            Err(Refused::Broken(error)) => Offered::Broken(error),
        }
    }

    /// Gives the books an order and waits for their answer.
    pub(super) async fn tell_books<T>(&self, order: impl FnOnce(oneshot::Sender<T>) -> Order) -> T {
        let (done, answer) = oneshot::channel();
        let ordered = self.orders.send(order(done)).await.is_ok();
        match answer.await {
            Ok(answer) if ordered => answer,
            // The books are closed, which ends this tenure from outside.
            _ => std::future::pending().await,
        }
    }

    fn settle(&mut self, life: &mut Life, receipts: &mut Vec<Receipt>) -> Option<Ended> {
        if receipts.is_empty() {
            return None;
        }
        let now_us = (self.now_us)();
        let mut refused = Vec::new();
        let mut ended = None;
        for receipt in receipts.drain(..) {
            match receipt {
                Receipt::Delivered(seq) => {
                    if !self.suspects.is_empty() {
                        self.acquit(life, seq);
                    }
                    if let Settled::Now {
                        tag,
                        occurred_at_us,
                    } = life.in_flight.settle(seq)
                    {
                        life.topics.delivered(tag);
                        life.latencies.add(now_us.saturating_sub(occurred_at_us));
                    }
                }
                Receipt::Rejected(seq, rejection) => {
                    let id = life
                        .in_flight
                        .event_of(seq)
                        .expect("a record in flight has an event");
                    refused.push(id);
                    let alone = life.on_trial == Some(id);
                    let this = life.try_of(seq);
                    ended = ended.or(Some(if alone {
                        Ended::Condemned(id, this, rejection)
                    } else {
                        Ended::Suspected(rejection)
                    }));
                }
            }
        }
        self.suspects.accuse(&refused);
        self.advance(life);
        ended
    }

    fn acquit(&mut self, life: &mut Life, seq: Seq) {
        let Some(id) = life.in_flight.event_of(seq) else {
            return;
        };
        self.suspects.acquit(id);
        life.on_trial = life.on_trial.filter(|on_trial| *on_trial != id);
    }

    pub(super) fn advance(&mut self, life: &mut Life) {
        if let Some(advance) = life.in_flight.advance() {
            self.settled.send_replace(advance.position);
            if life.in_flight.is_empty() {
                self.waiting.pass();
            }
        }
    }
}

/// What became of one event of the log.
enum Verdict {
    /// Not for this pipeline.
    LeftOut,
    /// Has to wait behind a parked event of its entity.
    Wait,
    /// An operator wants it left out, for this reason.
    Skip(String),
    Offered(Offered),
}

/// What became of an event that is to be published.
pub(super) enum Offered {
    /// On its way, to the topic with this index.
    HandedOver(u32),
    Rejected(Rejection),
    /// Not now.
    Paused(Pause),
    Broken(SinkError),
}

impl Life {
    fn new(settings: &Settings, end: Position) -> Self {
        let now = Instant::now();
        Self {
            in_flight: InFlight::new(settings.in_flight_rows, settings.in_flight_bytes),
            changes: None,
            placed: None,
            lookups: Lookups::default(),
            reopen: None,
            pending: VecDeque::new(),
            parking: Vec::new(),
            parking_seqs: Vec::new(),
            copies: HashSet::new(),
            redrive: Redrive::default(),
            end,
            topics: Topics::default(),
            latencies: LatencyTally::default(),
            filtered: 0,
            heard_at: now,
            asked_at: now,
            batch: Batch::new(),
            more: false,
            drain: Drain::default(),
            on_trial: None,
        }
    }

    /// The next `events` events are not the log's: the position stays where the last page ends.
    pub(super) fn begin_interlude(&mut self, events: usize) {
        if self.awaited() == 0 {
            self.heard_at = Instant::now();
        }
        self.in_flight.begin_page(events, self.end.clone());
    }

    /// As of the beginning of the page.
    pub(super) fn filter<'a>(&'a self, pipeline: &'a Pipeline) -> &'a Filter {
        match &self.changes {
            Some(changes) => &changes.filter,
            None => &pipeline.filter,
        }
    }

    /// Nothing is at hand, and nothing in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.pending.is_empty() && self.in_flight.rows() == 0
    }
}
