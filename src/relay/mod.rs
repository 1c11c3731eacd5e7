//! The loop: where the stages of one pipeline meet.
//!
//! ```text
//! stand by ─ lease ─> tenure ┬ books: lease, cursor, parked events      (one ledger connection)
//!                            └ life  ┬ read: pages ahead of the hand-over  (one reading connection)
//!                                    └ publish: order → route → encode → sink, receipts, position
//! ```
//!
//! A *tenure* lasts as long as the lease; a *life* as long as source and sink keep their place. All of it is one future
//! and its parts talk through bounded channels: dropping it at any point is a crash, and a crash loses nothing, because
//! the next life reads from the last position.

mod books;
mod lease;
mod publish;
mod redrive;
mod reject;
pub mod status;
mod topics;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use self::books::{Closed, Desk, Pace};
use self::lease::LeaseEnd;
use self::publish::{Ended, Publisher};
use self::redrive::Try;
use self::reject::Full;
use self::status::{State, Status};
use crate::encode::Encoding;
use crate::event::{EventId, PipelineName, Rejection};
use crate::ledger::{Acquired, Ledger, Tenure};
use crate::order::{Suspects, Waiting};
use crate::position::Position;
use crate::route::{Filter, Route};
use crate::sink::{NotPrepared, Sink, SinkError};
use crate::source::{Page, PageLimits, Source, SourceError};
use crate::telemetry::PipelineMetrics;

/// What happens to an event that can't be published.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// It is set aside with its error; its entity waits, everybody else flows.
    #[default]
    Park,
    /// It is set aside with its error, and its entity goes on without it.
    DeadLetter,
    /// It is counted and logged, and gone.
    Drop,
    /// The pipeline stops.
    Halt,
}

/// The rules of one pipeline.
#[derive(Clone, Debug)]
pub struct Pipeline {
    /// Its name.
    pub name: PipelineName,
    /// Which events it takes.
    pub filter: Filter,
    /// Topic and key.
    pub route: Route,
    /// What records look like.
    pub encoding: Encoding,
    /// What happens to events that can't be published.
    pub on_rejected: Policy,
    /// Where copies of dead letters go.
    pub dead_letter_topic: Option<String>,
    /// Events that may be set aside in all.
    pub parked_max: usize,
    /// Events of one entity that may be set aside.
    pub parked_max_per_entity: usize,
}

impl Pipeline {
    /// The topics that can be told without an event: one for all, or one for each aggregate type of the filter.
    #[must_use]
    pub fn known_topics(&self) -> Vec<String> {
        let topic = &self.route.topic;
        if topic.is_fixed() {
            return topic.render_for_type("").into_iter().collect();
        }
        self.filter
            .aggregate_types
            .iter()
            .filter_map(|name| topic.render_for_type(name))
            .collect()
    }
}

/// The bounds of one pipeline.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How much a page holds; up to three pages are in memory at once (read, waiting, being handed over).
    pub page: PageLimits,
    /// Events handed over and not confirmed, at most.
    pub in_flight_rows: usize,
    /// Their bytes, at most; a single larger event is taken alone.
    pub in_flight_bytes: usize,
    /// How long the lease lasts without renewal.
    pub lease_ttl: Duration,
    /// How long a stop waits for confirmations.
    pub drain_timeout: Duration,
    /// The cursor is written at most this often.
    pub acknowledge_interval: Duration,
    /// Parked events that are published again in a second, at most.
    pub redrive_rate: usize,
}

/// What can be changed while a relay runs, without losing its place.
#[derive(Clone, Debug)]
pub struct Changes {
    /// Instead of the pipeline's, from the next page on.
    pub filter: Filter,
    /// Instead of [`Settings::redrive_rate`].
    pub redrive_rate: usize,
}

/// A lease that is held by somebody else is looked at this often, so that a clean stop is followed at once.
const STANDBY_LOOK: Duration = Duration::from_millis(500);

/// One pipeline with its ends.
pub struct Relay<S, K, L> {
    /// Its rules.
    pub pipeline: Pipeline,
    /// Its bounds.
    pub settings: Settings,
    /// Where events come from.
    pub source: S,
    /// Where they go.
    pub sink: K,
    /// Its books.
    pub ledger: L,
    /// What it says about itself.
    pub status: watch::Sender<Status>,
    /// What was changed while it runs; none until then.
    pub changes: watch::Receiver<Option<Arc<Changes>>>,
    /// The wall clock, in microseconds since the Unix epoch.
    pub now_us: fn() -> i64,
}

/// How a tenure ended.
enum Over {
    Stopped,
    LeaseLost,
    Trouble(String),
}

impl<S: Source, K: Sink, L: Ledger> Relay<S, K, L> {
    /// Runs until `stop`: stands by, publishes while it has the lease, begins again after trouble, for ever.
    pub async fn run(mut self, stop: CancellationToken) {
        let metrics = PipelineMetrics::new(self.pipeline.name.as_str());
        let mut backoff = backoff();
        while let Some((tenure, lease_end)) = self.stand_by(&stop, &mut backoff).await {
            metrics.owner(true);
            let began = Instant::now();
            let over = self.tenure(tenure, lease_end, &metrics, &stop).await;
            metrics.owner(false);
            match over {
                Over::Stopped => break,
                Over::LeaseLost => {
                    tracing::warn!(pipeline = %self.pipeline.name, "lost the lease");
                }
                Over::Trouble(reason) => {
                    metrics.restarted();
                    if began.elapsed() > self.settings.lease_ttl {
                        backoff = self::backoff();
                    }
                    if !self.pause(reason, &mut backoff, &stop).await {
                        break;
                    }
                }
            }
        }
        self.set_state(State::Stopped);
    }

    /// Waits for the lease, and says when it ends; none when asked to stop.
    async fn stand_by(
        &mut self,
        stop: &CancellationToken,
        backoff: &mut ExponentialBackoff,
    ) -> Option<(Tenure, LeaseEnd)> {
        loop {
            let lease_end = LeaseEnd::asked_now(self.settings.lease_ttl, (self.now_us)());
            let acquired = tokio::select! {
                biased;
                () = stop.cancelled() => return None,
                acquired = self.ledger.acquire() => acquired,
            };
            match acquired {
                Ok(Acquired::Ours(tenure)) => return Some((tenure, lease_end)),
                Ok(Acquired::Held { holder, expires_in }) => {
                    self.set_state(State::Standby { holder });
                    tokio::select! {
                        biased;
                        () = stop.cancelled() => return None,
                        () = sleep(expires_in.clamp(Duration::from_millis(10), STANDBY_LOOK)) => {}
                    }
                }
                Err(error) => {
                    if !self.pause(error.to_string(), backoff, stop).await {
                        return None;
                    }
                }
            }
        }
    }

    /// From taking the lease to giving it back.
    async fn tenure(
        &mut self,
        tenure: Tenure,
        lease_end: LeaseEnd,
        metrics: &PipelineMetrics,
        stop: &CancellationToken,
    ) -> Over {
        let (over, books_open) = self.publish(tenure, lease_end, metrics, stop).await;
        let drained = matches!(over, Over::Stopped) && self.status.borrow().in_flight_events == 0;
        if !drained {
            // What is queued must not leave any more: from here on somebody else may publish.
            self.reopen_sink().await;
        }
        if !books_open {
            return over;
        }
        if let Err(error) = self.ledger.release().await {
            tracing::warn!(pipeline = %self.pipeline.name, %error, "could not release the lease, it will expire");
        }
        over
    }

    /// As long as the lease lasts: books on one side, life after life on the other. Says how it ended, and whether the
    /// books were still open then.
    async fn publish(
        &mut self,
        tenure: Tenure,
        lease_end: LeaseEnd,
        metrics: &PipelineMetrics,
        stop: &CancellationToken,
    ) -> (Over, bool) {
        let Tenure {
            position,
            log,
            held,
            dead_letters,
        } = tenure;
        let (settled, settled_seen) = watch::channel(position.clone());
        let (durable, durable_seen) = watch::channel(position);
        let (orders, orders_taken) = mpsc::channel(1);
        let (lease_end, lease_seen) = watch::channel(lease_end);
        let mut desk = Desk {
            settled: settled_seen,
            durable,
            orders: orders_taken,
            lease_end,
            now_us: self.now_us,
        };
        let pace = Pace {
            lease_ttl: self.settings.lease_ttl,
            acknowledge_interval: self.settings.acknowledge_interval,
            behind_max: self.settings.in_flight_rows,
            page_rows: self.settings.page.rows,
            due_bytes: self.settings.page.bytes,
            redrive_rate: self.settings.redrive_rate,
            changes: self.changes.clone(),
        };
        let mut lives = Lives {
            pipeline: &self.pipeline,
            settings: &self.settings,
            source: &mut self.source,
            sink: &mut self.sink,
            status: &self.status,
            changes: &self.changes,
            metrics,
            now_us: self.now_us,
            log,
            waiting: Waiting::new(held),
            dead_letters: dead_letters.into_iter().collect(),
            condemned: HashMap::new(),
            full: None,
            suspects: Suspects::default(),
            durable: durable_seen,
            orders,
            lease_end: lease_seen,
            topics_ready: false,
        };
        let mut books = std::pin::pin!(books::keep(&mut self.ledger, &mut desk, &pace));
        let over = tokio::select! {
            biased;
            closed = &mut books => return (over_by(closed), false),
            over = lives.run(&settled, stop) => over,
        };
        // Lets the books write the last position and close.
        drop((settled, lives));
        match books.await {
            Closed::Done => (over, true),
            closed => (over_by(closed), true),
        }
    }

    /// Says what is wrong and waits a little; false when asked to stop meanwhile.
    async fn pause(
        &self,
        reason: String,
        backoff: &mut ExponentialBackoff,
        stop: &CancellationToken,
    ) -> bool {
        self.set_state(State::Stalled { reason });
        tokio::select! {
            biased;
            () = stop.cancelled() => false,
            () = sleep(backoff.next().unwrap_or(BACKOFF_MAX)) => true,
        }
    }

    async fn reopen_sink(&mut self) {
        if let Err(error) = self.sink.open().await {
            tracing::warn!(pipeline = %self.pipeline.name, %error, "could not reset the sink");
        }
    }

    fn set_state(&self, state: State) {
        self.status
            .send_modify(|status| status.set_state(&self.pipeline.name, state));
    }
}

fn over_by(closed: Closed) -> Over {
    match closed {
        Closed::Done => Over::Stopped,
        Closed::LeaseLost => Over::LeaseLost,
        Closed::Trouble(error) => Over::Trouble(error.to_string()),
    }
}

const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// 0.1 s doubling to 5 s, for ever, with jitter: replicas must not come back in step.
fn backoff() -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(BACKOFF_MAX)
        .without_max_times()
        .with_jitter()
        .build()
}

/// The lives of one tenure, one after the other.
struct Lives<'a, S, K> {
    pipeline: &'a Pipeline,
    settings: &'a Settings,
    source: &'a mut S,
    sink: &'a mut K,
    status: &'a watch::Sender<Status>,
    changes: &'a watch::Receiver<Option<Arc<Changes>>>,
    metrics: &'a PipelineMetrics,
    now_us: fn() -> i64,
    /// The name of the log that the positions belong to.
    log: String,
    waiting: Waiting,
    dead_letters: BTreeSet<EventId>,
    condemned: HashMap<(EventId, Try), Rejection>,
    full: Option<Full>,
    suspects: Suspects,
    durable: watch::Receiver<Position>,
    orders: mpsc::Sender<books::Order>,
    lease_end: watch::Receiver<LeaseEnd>,
    /// Whether the topics that are known beforehand were there once.
    topics_ready: bool,
}

impl<S: Source, K: Sink> Lives<'_, S, K> {
    async fn run(&mut self, settled: &watch::Sender<Position>, stop: &CancellationToken) -> Over {
        let mut backoff = backoff();
        loop {
            let began = Instant::now();
            let reason = match self.live(settled, stop).await {
                Ended::Stopped => return Over::Stopped,
                Ended::LeaseLost => return Over::LeaseLost,
                Ended::Condemned(id, this, rejection) => {
                    tracing::warn!(pipeline = %self.pipeline.name, event = id.0, reason = %rejection,
                        "the broker refused an event after its hand-over, reading again to set it aside");
                    self.suspects.acquit(id);
                    self.condemned.insert((id, this), rejection);
                    continue;
                }
                Ended::Suspected(rejection) => {
                    tracing::warn!(pipeline = %self.pipeline.name, events = self.suspects.len(), reason = %rejection,
                        "the broker refused a batch, reading again to find the event that it can't take");
                    continue;
                }
                Ended::Halted(id, rejection) => {
                    self.halt(format!("event {id}: {rejection}"), stop).await;
                    return Over::Stopped;
                }
                Ended::Full(full) => {
                    self.full = Some(full);
                    continue;
                }
                Ended::Room => {
                    self.full = None;
                    continue;
                }
                Ended::Sink(error) => error.to_string(),
                Ended::Source(error) => return Over::Trouble(error.to_string()),
            };
            self.metrics.restarted();
            if began.elapsed() > BACKOFF_MAX {
                backoff = self::backoff();
            }
            self.set_state(State::Stalled { reason });
            tokio::select! {
                biased;
                () = stop.cancelled() => return Over::Stopped,
                () = sleep(backoff.next().unwrap_or(BACKOFF_MAX)) => {}
            }
        }
    }

    /// One life: reads from the last settled position and publishes, until something ends it.
    async fn live(&mut self, settled: &watch::Sender<Position>, stop: &CancellationToken) -> Ended {
        if let Err(error) = self.sink.open().await {
            return Ended::Sink(error);
        }
        if let Some(Full { reason, .. }) = &self.full {
            let reason = reason.clone();
            self.set_state(State::Halted { reason });
        }
        tokio::select! {
            biased;
            () = stop.cancelled() => return Ended::Stopped,
            ready = self.make_ready(settled) => if let Err(ended) = ready {
                return ended;
            },
        }
        self.source.seek(settled.borrow().clone());
        let (pages, pages_read) = mpsc::channel(1);
        let (answers, answered) = watch::channel(false);
        let mut publisher = Publisher {
            pipeline: self.pipeline,
            settings: self.settings,
            sink: self.sink,
            metrics: self.metrics,
            status: self.status,
            changes: self.changes,
            settled,
            orders: &self.orders,
            lease_end: &self.lease_end,
            waiting: &mut self.waiting,
            dead_letters: &mut self.dead_letters,
            condemned: &mut self.condemned,
            full: self.full.as_ref(),
            suspects: &mut self.suspects,
            answered,
            now_us: self.now_us,
        };
        let reader = Reader {
            limits: self.settings.page,
            durable: &self.durable,
            pages,
            answers,
            metrics: self.metrics,
        };
        let reads = self.full.is_none();
        tokio::select! {
            biased;
            ended = publisher.run(pages_read, stop) => ended,
            error = reader.run(self.source, stop), if reads => Ended::Source(error),
        }
    }

    /// Before anything is published: does the sink answer, are the topics there that are known beforehand, and how far is
    /// everything published already?
    async fn make_ready(&mut self, settled: &watch::Sender<Position>) -> Result<(), Ended> {
        self.sink.check().await.map_err(Ended::Sink)?;
        self.prepare_topics().await.map_err(Ended::Sink)?;
        // Without a lease somebody else may have taken over at the sink, who must not be put out of it again.
        if self.lease_end.borrow().is_over((self.now_us)()) {
            return Err(Ended::LeaseLost);
        }
        let committed = self.sink.resume(&self.log).await.map_err(Ended::Sink)?;
        // Both are true: what is filtered or parked moves only the cursor, and what was committed with the records may be
        // ahead of it.
        settled.send_if_modified(|settled| match committed {
            Some(committed) if committed.compare(settled).is_gt() => {
                *settled = committed;
                true
            }
            _ => false,
        });
        Ok(())
    }

    async fn prepare_topics(&mut self) -> Result<(), SinkError> {
        if self.topics_ready {
            // A topic that went missing since is the affair of its own events (I6).
            return Ok(());
        }
        for topic in self.pipeline.known_topics() {
            match self.sink.prepare(&topic).await {
                Ok(()) => {}
                Err(NotPrepared::Unknown(error)) => return Err(error),
                Err(NotPrepared::Rejected(Rejection(reason))) => return Err(SinkError(reason)),
            }
        }
        self.topics_ready = true;
        Ok(())
    }

    /// Keeps the lease, so that no replica runs into the same event, until a person stops the process.
    async fn halt(&self, reason: String, stop: &CancellationToken) {
        self.set_state(State::Halted { reason });
        stop.cancelled().await;
    }

    fn set_state(&self, state: State) {
        self.status
            .send_modify(|status| status.set_state(&self.pipeline.name, state));
    }
}

/// Reads pages while earlier ones are handed over.
struct Reader<'a> {
    limits: PageLimits,
    durable: &'a watch::Receiver<Position>,
    pages: mpsc::Sender<Page>,
    /// Says that the source answers.
    answers: watch::Sender<bool>,
    metrics: &'a PipelineMetrics,
}

impl Reader<'_> {
    /// Returns only with an error. After `stop` it reads nothing more, and lets what is under way be drained.
    async fn run<S: Source>(&self, source: &mut S, stop: &CancellationToken) -> SourceError {
        while !stop.is_cancelled() {
            let acknowledged = self.durable.borrow().clone();
            let began = Instant::now();
            let page = match source.capture(self.limits, &acknowledged).await {
                Ok(page) => page,
                // Nothing more is wanted of the source: its trouble must not cut the drain short.
                Err(_) if stop.is_cancelled() => break,
                Err(error) => return error,
            };
            self.answers
                .send_if_modified(|answered| !std::mem::replace(answered, true));
            self.metrics.captured(page.events.len(), began.elapsed());
            let more = page.more;
            if !page.events.is_empty() && self.pages.send(page).await.is_err() {
                break;
            }
            if !more {
                source.wake().await;
            }
        }
        std::future::pending().await
    }
}
