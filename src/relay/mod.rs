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

mod batch;
mod books;
mod lease;
mod lives;
mod lookups;
mod publish;
mod redrive;
mod reject;
mod rejections;
pub mod status;
mod stop;
mod tick;
mod topics;
pub mod turn;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use self::books::{Closed, Desk, Pace};
use self::lease::{LeaseEnd, Loss};
use self::lives::Lives;
use self::rejections::Rejections;
use self::status::{State, Status};
use self::stop::Stop;
use self::turn::Turn;
use crate::encode::Encoding;
use crate::event::{PipelineName, Shard};
use crate::ledger::{Acquired, Ledger, LedgerError, Tenure};
use crate::order::{Suspects, Waiting};
use crate::route::{Filter, Route};
use crate::sink::Sink;
use crate::source::{PageLimits, Source};
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
    /// How long a stop reads on and waits for confirmations.
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

/// So many ids behind what is settled the cursor is written sooner, also where more may be in flight.
const BEHIND_MAX: usize = 20_000;

/// How long a stop waits for a lease that was asked for just before.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// A lease that is held by somebody else is looked at this often, so that a clean stop is followed at once.
const STANDBY_LOOK: Duration = Duration::from_millis(500);

/// One shard of a pipeline, with its ends.
pub struct Relay<S, K, L> {
    /// Its rules.
    pub pipeline: Pipeline,
    /// Which part of its entities; the ends know it too.
    pub shard: Shard,
    /// Whether it may own that.
    pub turn: watch::Receiver<Turn>,
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
    LeaseLost(Loss),
    Trouble(String),
}

/// What a tenure leaves behind.
#[derive(Default)]
struct Left {
    /// Whether the books were open to its end.
    books_open: bool,
    /// Whether it is known how far everything was published when it began.
    resumed: bool,
}

impl<S: Source, K: Sink, L: Ledger> Relay<S, K, L> {
    /// Runs until `stop`: stands by, publishes while it has the lease, begins again after trouble, for ever.
    pub async fn run(mut self, stop: CancellationToken) {
        let metrics = PipelineMetrics::new(self.pipeline.name.as_str(), self.shard);
        let mut backoff = backoff();
        while let Some((tenure, lease_end)) = self.stand_by(&metrics, &stop, &mut backoff).await {
            metrics.owner(true);
            let began = Instant::now();
            let mut turn = self.turn.clone();
            let until = stop.child_token();
            let over = tokio::select! {
                biased;
                over = self.tenure(tenure, lease_end, &metrics, &until) => over,
                () = turn::ends(&mut turn, &until) => unreachable!("it only cancels"),
            };
            metrics.owner(false);
            match over {
                Over::Stopped if stop.is_cancelled() => break,
                Over::Stopped => {
                    tracing::info!(pipeline = %self.pipeline.name, shard = self.shard.index, "gave the lease back");
                }
                Over::LeaseLost(loss) => {
                    let shard = self.shard.index;
                    tracing::warn!(pipeline = %self.pipeline.name, shard, "lost the lease: {loss}");
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
        metrics: &PipelineMetrics,
        stop: &CancellationToken,
        backoff: &mut ExponentialBackoff,
    ) -> Option<(Tenure, LeaseEnd)> {
        loop {
            if !self.wait_for_turn(stop).await {
                return None;
            }
            let lease_end = LeaseEnd::asked_now(self.settings.lease_ttl, (self.now_us)());
            let acquired = self.acquire(stop).await?;
            if let Ok(acquired) = &acquired {
                metrics.paused(matches!(acquired, Acquired::Paused(_)));
            }
            match acquired {
                Ok(Acquired::Ours(tenure)) => return Some((tenure, lease_end)),
                Ok(Acquired::Held { holder, expires_in }) => {
                    self.set_state(State::Standby { holder });
                    let look = expires_in.clamp(Duration::from_millis(10), STANDBY_LOOK);
                    if !self.linger(look, stop).await {
                        return None;
                    }
                }
                Ok(Acquired::Paused(pause)) => {
                    self.set_state(State::Paused { pause });
                    if !self.linger(STANDBY_LOOK, stop).await {
                        return None;
                    }
                }
                Ok(Acquired::Resharded { shards }) => {
                    // This relay will be told to stop, or the number will become what it is here.
                    let shards = match shards {
                        1 => "1 shard".to_owned(),
                        shards => format!("{shards} shards"),
                    };
                    let holder = format!("the relays with {shards}, until they have stopped");
                    self.set_state(State::Standby { holder });
                    if !self.linger(STANDBY_LOOK, stop).await {
                        return None;
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

    /// Asks for the lease. A request to stop waits a little for the answer: what was taken is to be given back. None when it
    /// does not come.
    async fn acquire(&mut self, stop: &CancellationToken) -> Option<Result<Acquired, LedgerError>> {
        let mut acquiring = std::pin::pin!(self.ledger.acquire());
        tokio::select! {
            biased;
            () = stop.cancelled() => timeout(LAST_WORDS, acquiring).await.ok(),
            acquired = &mut acquiring => Some(acquired),
        }
    }

    /// Waits until this relay may ask for the lease; false when asked to stop.
    async fn wait_for_turn(&mut self, stop: &CancellationToken) -> bool {
        loop {
            let turn = self.turn.borrow_and_update().clone();
            let Turn::Theirs { holder } = turn else {
                return !stop.is_cancelled();
            };
            self.set_state(State::Standby { holder });
            tokio::select! {
                biased;
                () = stop.cancelled() => return false,
                changed = self.turn.changed() => if changed.is_err() {
                    // Nobody says any more whose turn it is.
                    stop.cancelled().await;
                },
            }
        }
    }

    /// False when asked to stop. Borrowed for itself alone, as all that wait here: a source need not be shared by threads.
    async fn linger(&mut self, time: Duration, stop: &CancellationToken) -> bool {
        tokio::select! {
            biased;
            () = stop.cancelled() => false,
            () = sleep(time) => true,
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
        let (
            over,
            Left {
                books_open,
                resumed,
            },
        ) = self.publish(tenure, lease_end, metrics, stop).await;
        let drained = matches!(over, Over::Stopped) && self.status.borrow().in_flight_events == 0;
        // What is queued must not leave any more: from here on somebody else may publish.
        self.sink.close().await;
        // Also when the lease was lost in the middle of a life.
        self.source.rest();
        if !books_open {
            return over;
        }
        if let Err(error) = self.ledger.release(drained && resumed).await {
            tracing::warn!(pipeline = %self.pipeline.name, %error, "could not release the lease, it will expire");
        }
        over
    }

    fn pace(&self) -> Pace {
        Pace {
            lease_ttl: self.settings.lease_ttl,
            acknowledge_interval: self.settings.acknowledge_interval,
            behind_max: self.settings.in_flight_rows.min(BEHIND_MAX),
            page_rows: self.settings.page.rows,
            due_bytes: self.settings.page.bytes,
            redrive_rate: self.settings.redrive_rate,
            changes: self.changes.clone(),
        }
    }

    /// As long as the lease lasts: books on one side, life after life on the other. Says how it ended.
    async fn publish(
        &mut self,
        tenure: Tenure,
        lease_end: LeaseEnd,
        metrics: &PipelineMetrics,
        stop: &CancellationToken,
    ) -> (Over, Left) {
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
        let paused = CancellationToken::new();
        let mut desk = Desk {
            settled: settled_seen,
            durable,
            orders: orders_taken,
            lease_end,
            paused: paused.clone(),
            now_us: self.now_us,
        };
        let pace = self.pace();
        let stop = Stop::new(
            stop.clone(),
            paused,
            self.turn.clone(),
            self.settings.drain_timeout,
        );
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
            skipped: HashMap::new(),
            rejections: Rejections::default(),
            full: None,
            suspects: Suspects::default(),
            durable: durable_seen,
            orders,
            lease_end: lease_seen,
            topics_ready: false,
            resumed: false,
        };
        let mut books = std::pin::pin!(books::keep(&mut self.ledger, &mut desk, &pace));
        let over = tokio::select! {
            biased;
            closed = &mut books => return (over_by(closed), Left::default()),
            over = lives.run(&settled, &stop) => over,
        };
        let left = Left {
            books_open: true,
            resumed: lives.resumed,
        };
        // Lets the books write the last position and close.
        drop((settled, lives));
        match books.await {
            Closed::Done => (over, left),
            closed => (over_by(closed), left),
        }
    }

    /// Says what is wrong and waits a little; false when asked to stop meanwhile.
    async fn pause(
        &mut self,
        reason: String,
        backoff: &mut ExponentialBackoff,
        stop: &CancellationToken,
    ) -> bool {
        self.set_state(State::Stalled { reason });
        self.linger(backoff.next().unwrap_or(BACKOFF_MAX), stop)
            .await
    }

    fn set_state(&self, state: State) {
        let now_us = (self.now_us)();
        self.status
            .send_modify(|status| status.set_state(&self.pipeline.name, state, now_us));
    }
}

fn over_by(closed: Closed) -> Over {
    match closed {
        Closed::Done => Over::Stopped,
        Closed::LeaseLost(loss) => Over::LeaseLost(loss),
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
