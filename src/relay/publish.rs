//! One life of a pipeline: pages come in, records go out in order, receipts come back, the position moves.
//!
//! The stages meet here and nowhere else: order → route → encode → sink, for each event, in the order of the log.

use std::collections::{HashMap, VecDeque};
use std::future::ready;
use std::sync::Arc;
use std::time::Duration;

use metrics::Counter;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::CancellationToken;

use super::books::ParkOrder;
use super::status::{State, Status};
use super::{Pipeline, Policy, Settings};
use crate::encode::encode;
use crate::event::{Event, EventId, Rejection, Seq};
use crate::ledger::Parked;
use crate::order::{InFlight, Settled, Suspects, Waiting};
use crate::position::Position;
use crate::route::Filter;
use crate::sink::{NotPrepared, Receipt, Refused, Sink, SinkError};
use crate::source::{Page, SourceError};
use crate::telemetry::{LatencyTally, Levels, PipelineMetrics};

/// Events handed over before receipts are looked at again.
const HAND_OVER_AT_ONCE: usize = 512;
/// Without a receipt for this long, and with records in flight, the pipeline counts as stalled.
const STALL: Duration = Duration::from_secs(3);

/// How a life ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// On request; everything handed over is settled, or the time for that was up.
    Stopped,
    /// The source could not be read.
    Source(SourceError),
    /// The sink lost its place: begin again from the last position.
    Sink(SinkError),
    /// The broker refused records after their hand-over, and a batch shares its fate: begin again, and find out which one
    /// it can't take.
    Suspected(Rejection),
    /// The broker refused an event that was alone: begin again, and set it aside this time.
    Condemned(EventId, Rejection),
    /// An event was rejected and the policy is to halt.
    Halted(EventId, Rejection),
    /// The lease has run out.
    LeaseLost,
}

/// What a life works with, and what it leaves behind for the next one.
pub(super) struct Publisher<'a, K> {
    pub(super) pipeline: &'a Pipeline,
    pub(super) settings: &'a Settings,
    pub(super) sink: &'a mut K,
    pub(super) metrics: &'a PipelineMetrics,
    pub(super) status: &'a watch::Sender<Status>,
    pub(super) new_filter: &'a watch::Receiver<Option<Arc<Filter>>>,
    pub(super) settled: &'a watch::Sender<Position>,
    pub(super) orders: &'a mpsc::Sender<ParkOrder>,
    pub(super) lease_until: &'a watch::Receiver<Instant>,
    pub(super) waiting: &'a mut Waiting,
    /// Events that the broker refused in an earlier life, with its reason.
    pub(super) condemned: &'a HashMap<EventId, Rejection>,
    /// Events that were refused together in an earlier life, of which no innocent one must be set aside (I6).
    pub(super) suspects: &'a mut Suspects,
    /// Whether the source has answered in this life.
    pub(super) answered: watch::Receiver<bool>,
    /// The wall clock, in microseconds since the Unix epoch.
    pub(super) now_us: fn() -> i64,
}

/// The state of one life; dropping it loses nothing that is not read again.
struct Life {
    in_flight: InFlight,
    /// That of the pipeline, where no other was given since.
    filter: Option<Arc<Filter>>,
    /// The rest of the page that is being handed over.
    pending: VecDeque<Event>,
    parking: Vec<Parked>,
    parking_seqs: Vec<Seq>,
    topics: Topics,
    latencies: LatencyTally,
    filtered: u64,
    heard_at: Instant,
    /// Whether something was handed over since the last batch ended.
    uncommitted: bool,
    /// The suspect that is in flight, alone.
    on_trial: Option<EventId>,
}

/// Why the hand-over paused.
enum Pause {
    /// Nothing at hand.
    Starved,
    /// No room in flight, or the sink's queue is full.
    Blocked,
    /// Enough for one turn; there is more.
    Turn,
    /// The next event's topic has to be prepared first.
    Prepare(String),
}

impl<K: Sink> Publisher<'_, K> {
    /// Runs until the life ends.
    pub(super) async fn run(
        &mut self,
        pages: mpsc::Receiver<Page>,
        stop: &CancellationToken,
    ) -> Ended {
        let mut life = Life::new(self.settings);
        let ended = self.take_turns(&mut life, pages, stop).await;
        self.report(&mut life, None);
        ended
    }

    async fn take_turns(
        &mut self,
        life: &mut Life,
        mut pages: mpsc::Receiver<Page>,
        stop: &CancellationToken,
    ) -> Ended {
        let mut receipts = Vec::new();
        let mut ticks = interval(Duration::from_secs(1));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut drain_until = None;
        loop {
            let pause = match self.hand_over(life, stop).await {
                Ok(pause) => pause,
                Err(ended) => return ended,
            };
            self.commit(life, &pause);
            if drain_until.is_some() && life.in_flight.rows() == 0 {
                return Ended::Stopped;
            }
            let paused_at = Instant::now();
            let mut lost = None;
            // In this order: receipts make room; a request to stop waits for nobody; a page is taken only when the last
            // one is handed over.
            tokio::select! {
                biased;
                received = self.sink.receipts(&mut receipts), if life.in_flight.rows() > 0 => {
                    lost = received.err();
                }
                () = stop.cancelled(), if drain_until.is_none() => {
                    drain_until = Some(Instant::now() + self.settings.drain_timeout);
                    life.pending.clear();
                }
                () = until(drain_until) => return Ended::Stopped,
                () = ready(()), if matches!(pause, Pause::Turn) => {}
                Some(page) = pages.recv(), if life.pending.is_empty() && drain_until.is_none() => {
                    self.begin(life, page);
                }
                // Its sender lives as long as this life.
                Ok(()) = self.answered.changed() => self.tick(life).await,
                _ = ticks.tick() => self.tick(life).await,
            }
            match pause {
                Pause::Starved => self.metrics.starved(paused_at.elapsed()),
                Pause::Blocked => self.metrics.blocked(paused_at.elapsed()),
                Pause::Turn | Pause::Prepare(_) => {}
            }
            // The receipts that came before the sink lost its place count, above all one that says why it did.
            let ended = self.settle(life, &mut receipts);
            if let Some(ended) = ended.or(lost.map(Ended::Sink)) {
                return ended;
            }
        }
    }

    /// What is handed over becomes a batch when nothing more is at hand, or has room.
    fn commit(&mut self, life: &mut Life, pause: &Pause) {
        let over = matches!(pause, Pause::Starved | Pause::Blocked);
        if over
            && std::mem::take(&mut life.uncommitted)
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
        if life.in_flight.rows() == 0 {
            life.heard_at = Instant::now();
        }
        life.filter.clone_from(&self.new_filter.borrow());
        life.in_flight.begin_page(page.events.len(), page.end);
        life.pending = page.events.into();
    }

    /// Hands over what is at hand as far as there is room, and parks what has to be parked.
    async fn hand_over(
        &mut self,
        life: &mut Life,
        stop: &CancellationToken,
    ) -> Result<Pause, Ended> {
        // A process that was stopped for longer than its lease wakes up here and must publish nothing new (I8).
        if Instant::now() >= *self.lease_until.borrow() {
            return Err(Ended::LeaseLost);
        }
        let paused = self.hand_over_some(life);
        // Before anything can end the life: the next one must not find an entity waiting for an event that nobody stored.
        self.park(life).await;
        self.advance(life);
        let mut pause = paused?;
        if let Pause::Prepare(topic) = &pause {
            tokio::select! {
                biased;
                () = stop.cancelled() => life.pending.clear(),
                prepared = self.sink.prepare(topic) => match prepared {
                    Ok(()) => {}
                    Err(NotPrepared::Rejected(rejection)) => life.topics.refuse(topic, rejection),
                    Err(NotPrepared::Unknown(error)) => return Err(Ended::Sink(error)),
                },
            }
            pause = Pause::Turn;
        }
        Ok(pause)
    }

    fn hand_over_some(&mut self, life: &mut Life) -> Result<Pause, Ended> {
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
            match self.judge(life, &event) {
                Verdict::HandedOver(topic) => {
                    if self.suspects.is_tried_alone(event.id) {
                        life.on_trial = Some(event.id);
                    }
                    life.in_flight
                        .push(event.id, bytes, event.occurred_at_us, topic);
                }
                Verdict::LeftOut => {
                    self.suspects.acquit(event.id);
                    let seq = life
                        .in_flight
                        .push(event.id, 0, event.occurred_at_us, Topics::NONE);
                    life.in_flight.settle(seq);
                    life.filtered += 1;
                }
                Verdict::Wait => self.set_aside(life, event, bytes, None),
                Verdict::Rejected(rejection) => match self.pipeline.on_rejected {
                    Policy::Park => self.set_aside(life, event, bytes, Some(rejection)),
                    Policy::Halt => return Err(Ended::Halted(event.id, rejection)),
                },
                Verdict::Paused(pause) => {
                    life.pending.push_front(event);
                    return Ok(pause);
                }
                Verdict::Broken(error) => return Err(Ended::Sink(error)),
            }
        }
        Ok(Pause::Turn)
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
            None => self.suspects.in_flight_before(event.id),
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
        let Pipeline {
            filter,
            route,
            encoding,
            ..
        } = self.pipeline;
        match life.filter.as_deref().unwrap_or(filter).admits(event) {
            Ok(true) => {}
            Ok(false) => return Verdict::LeftOut,
            Err(rejection) => return Verdict::Rejected(rejection),
        }
        if let Some(rejection) = self.condemned.get(&event.id) {
            return Verdict::Rejected(rejection.clone());
        }
        if self.waiting.holds(event) {
            return Verdict::Wait;
        }
        let record = match encode(event, route, encoding) {
            Ok(record) => record,
            Err(rejection) => return Verdict::Rejected(rejection),
        };
        match self.sink.hand_over(life.in_flight.next_seq(), &record) {
            Ok(()) => {
                life.uncommitted = true;
                Verdict::HandedOver(life.topics.index_of(&record.topic, self.metrics))
            }
            Err(Refused::Full) => Verdict::Paused(Pause::Blocked),
            Err(Refused::Unprepared) => match life.topics.refusal(&record.topic) {
                Some(rejection) => Verdict::Rejected(rejection),
                None => Verdict::Paused(Pause::Prepare(record.topic.into_owned())),
            },
            Err(Refused::Rejected(rejection)) => Verdict::Rejected(rejection),
            Err(Refused::Broken(error)) => Verdict::Broken(error),
        }
    }

    fn set_aside(
        &mut self,
        life: &mut Life,
        event: Event,
        bytes: usize,
        rejection: Option<Rejection>,
    ) {
        if let Some(rejection) = &rejection {
            tracing::error!(
                pipeline = %self.pipeline.name,
                event = event.id.0,
                reason = %rejection,
                "parked an event; later events of its entity wait"
            );
        }
        self.waiting.park(&event);
        self.suspects.acquit(event.id);
        let seq = life
            .in_flight
            .push(event.id, bytes, event.occurred_at_us, Topics::NONE);
        life.parking_seqs.push(seq);
        life.parking.push(Parked {
            event,
            error: rejection.map(|Rejection(reason)| reason),
        });
    }

    /// Waits until what was set aside is durable; only then is it settled.
    async fn park(&mut self, life: &mut Life) {
        if life.parking.is_empty() {
            return;
        }
        let parked = std::mem::take(&mut life.parking);
        self.metrics.parked(parked.len());
        let (done, parked_durably) = oneshot::channel();
        let ordered = self.orders.send(ParkOrder { parked, done }).await.is_ok();
        if !ordered || parked_durably.await.is_err() {
            // The books are closed, which ends this tenure from outside.
            return std::future::pending().await;
        }
        for seq in life.parking_seqs.drain(..) {
            life.in_flight.settle(seq);
        }
    }

    fn settle(&mut self, life: &mut Life, receipts: &mut Vec<Receipt>) -> Option<Ended> {
        if receipts.is_empty() {
            return None;
        }
        let now_us = (self.now_us)();
        life.heard_at = Instant::now();
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
                        life.latencies.add(now_us - occurred_at_us);
                    }
                }
                Receipt::Rejected(seq, rejection) => {
                    let id = life
                        .in_flight
                        .id_of(seq)
                        .expect("a record in flight has an event");
                    refused.push(id);
                    let alone = life.on_trial == Some(id);
                    ended = ended.or(Some(match self.pipeline.on_rejected {
                        _ if !alone => Ended::Suspected(rejection),
                        Policy::Park => Ended::Condemned(id, rejection),
                        Policy::Halt => Ended::Halted(id, rejection),
                    }));
                }
            }
        }
        self.suspects.accuse(&refused);
        self.advance(life);
        ended
    }

    fn acquit(&mut self, life: &mut Life, seq: Seq) {
        let Some(id) = life.in_flight.id_of(seq) else {
            return;
        };
        self.suspects.acquit(id);
        life.on_trial = life.on_trial.filter(|on_trial| *on_trial != id);
    }

    fn advance(&mut self, life: &mut Life) {
        if let Some(advance) = life.in_flight.advance() {
            self.settled.send_replace(advance.position);
        }
    }

    /// Once a second: is anything in the way?
    async fn tick(&mut self, life: &mut Life) {
        let silent = life.heard_at.elapsed();
        // A source that has not answered yet may be what is in the way.
        let mut state = self.answered.borrow().then_some(State::Running);
        if life.in_flight.rows() > 0 && silent >= STALL {
            let unknown = || format!("the sink has confirmed nothing for {} s", silent.as_secs());
            state = Some(State::Stalled {
                reason: self.sink.trouble().unwrap_or_else(unknown),
            });
        } else if life.in_flight.rows() == 0 && self.sink.trouble().is_some() {
            // Nothing is under way that would show whether the trouble is over.
            if let Err(error) = self.sink.check().await {
                state = Some(State::Stalled {
                    reason: error.to_string(),
                });
            }
        }
        self.report(life, state);
    }

    /// Metrics and status; without a state the last one stands.
    fn report(&mut self, life: &mut Life, state: Option<State>) {
        let delivered = life.topics.flush();
        self.metrics.filtered(std::mem::take(&mut life.filtered));
        self.metrics.latencies(&mut life.latencies);
        let last_id = self.settled.borrow().last_id.0;
        self.status.send_modify(|status| {
            if let Some(state) = state {
                status.set_state(&self.pipeline.name, state);
            }
            status.last_id = last_id;
            status.in_flight_events = life.in_flight.rows();
            status.in_flight_bytes = life.in_flight.bytes();
            status.oldest_unpublished_us = life.in_flight.oldest_us();
            status.delivered_events += delivered;
            status.waiting_entities = self.waiting.len();
        });
        let status = self.status.borrow();
        let age_us = status
            .oldest_unpublished_us
            .map_or(0, |oldest| (self.now_us)() - oldest);
        self.metrics.levels(Levels {
            in_flight_events: status.in_flight_events,
            in_flight_bytes: status.in_flight_bytes,
            backlog_ids: (status.newest_id - last_id).max(0),
            oldest_unpublished: Duration::from_micros(u64::try_from(age_us).unwrap_or(0)),
            waiting_entities: status.waiting_entities,
        });
    }
}

/// What became of one event.
enum Verdict {
    /// On its way, to the topic with this index.
    HandedOver(u32),
    /// Not for this pipeline.
    LeftOut,
    /// Has to wait behind a parked event of its entity.
    Wait,
    Rejected(Rejection),
    /// Not now.
    Paused(Pause),
    Broken(SinkError),
}

impl Life {
    fn new(settings: &Settings) -> Self {
        Self {
            in_flight: InFlight::new(settings.in_flight_rows, settings.in_flight_bytes),
            filter: None,
            pending: VecDeque::new(),
            parking: Vec::new(),
            parking_seqs: Vec::new(),
            topics: Topics::default(),
            latencies: LatencyTally::default(),
            filtered: 0,
            heard_at: Instant::now(),
            uncommitted: false,
            on_trial: None,
        }
    }
}

/// Topics by small numbers, with what was delivered to each since the last report.
#[derive(Default)]
struct Topics {
    known: Vec<TopicTally>,
    refused: HashMap<String, (Instant, Rejection)>,
}

struct TopicTally {
    name: String,
    delivered: u64,
    counter: Counter,
}

impl Topics {
    /// The tag of an event that goes nowhere.
    const NONE: u32 = u32::MAX;
    /// For this long a topic that can't be used is not asked about again.
    const REFUSAL: Duration = Duration::from_secs(10);

    fn index_of(&mut self, name: &str, metrics: &PipelineMetrics) -> u32 {
        let index = self
            .known
            .iter()
            .position(|topic| topic.name == name)
            .unwrap_or_else(|| {
                let counter = metrics.delivered(name);
                self.known.push(TopicTally {
                    name: name.to_owned(),
                    delivered: 0,
                    counter,
                });
                self.known.len() - 1
            });
        u32::try_from(index).unwrap_or(Self::NONE)
    }

    fn delivered(&mut self, tag: u32) {
        if let Some(topic) = self.known.get_mut(tag as usize) {
            topic.delivered += 1;
        }
    }

    /// Passes the tallies on and returns their sum.
    fn flush(&mut self) -> u64 {
        self.known
            .iter_mut()
            .map(|topic| {
                let delivered = std::mem::take(&mut topic.delivered);
                topic.counter.increment(delivered);
                delivered
            })
            .sum()
    }

    fn refuse(&mut self, name: &str, rejection: Rejection) {
        self.refused
            .insert(name.to_owned(), (Instant::now(), rejection));
    }

    fn refusal(&self, name: &str) -> Option<Rejection> {
        let (at, rejection) = self.refused.get(name)?;
        (at.elapsed() < Self::REFUSAL).then(|| rejection.clone())
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
