//! Life after life within one tenure: reads from the last settled position and publishes, until something ends it.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::books::Order;
use super::lease::{LeaseEnd, Loss};
use super::publish::{Ended, Publisher};
use super::redrive::Try;
use super::reject::{Full, Halt};
use super::rejections::Rejections;
use super::status::{State, Status};
use super::stop::{Coverage, Read, Stop};
use super::{BACKOFF_MAX, Changes, Over, Pipeline, Settings, backoff};
use crate::event::{EventKey, Rejection};
use crate::order::{Suspects, Waiting};
use crate::position::Position;
use crate::sink::{NotPrepared, Sink, SinkError};
use crate::source::{Page, PageLimits, Source, SourceError};
use crate::telemetry::PipelineMetrics;

/// A cursor moves at least this often when there are new ids, also if none of them is its own.
const PASS_INTERVAL: Duration = Duration::from_secs(1);

/// A source that nobody has waited at for so long rests, be it that its pages find no room, or that there is always another one.
const RESTLESS: Duration = Duration::from_secs(3);

/// A pipeline that is halted looks this often whether an operator wants the event skipped.
const SKIP_LOOK: Duration = Duration::from_secs(1);

/// The lives of one tenure, one after the other.
pub(super) struct Lives<'a, S, K> {
    pub(super) pipeline: &'a Pipeline,
    pub(super) settings: &'a Settings,
    pub(super) source: &'a mut S,
    pub(super) sink: &'a mut K,
    pub(super) status: &'a watch::Sender<Status>,
    pub(super) changes: &'a watch::Receiver<Option<Arc<Changes>>>,
    pub(super) metrics: &'a PipelineMetrics,
    pub(super) now_us: fn() -> i64,
    /// The name of the log that the positions belong to.
    pub(super) log: String,
    pub(super) waiting: Waiting,
    pub(super) dead_letters: BTreeSet<EventKey>,
    pub(super) condemned: HashMap<(EventKey, Try), Rejection>,
    /// Events that an operator wants left out, with the reason.
    pub(super) skipped: HashMap<EventKey, String>,
    pub(super) rejections: Rejections,
    pub(super) full: Option<Full>,
    pub(super) suspects: Suspects,
    pub(super) durable: watch::Receiver<Position>,
    pub(super) orders: mpsc::Sender<Order>,
    pub(super) lease_end: watch::Receiver<LeaseEnd>,
    /// Whether the topics that are known beforehand were there once.
    pub(super) topics_ready: bool,
    /// Whether the sink has said how far everything was published.
    pub(super) resumed: bool,
}

impl<S: Source, K: Sink> Lives<'_, S, K> {
    pub(super) async fn run(&mut self, settled: &watch::Sender<Position>, stop: &Stop) -> Over {
        let mut backoff = backoff();
        loop {
            let began = Instant::now();
            let reason = match self.live(settled, stop).await {
                Ended::Stopped => return Over::Stopped,
                Ended::LeaseExpired => return Over::LeaseLost(Loss::Expired),
                Ended::Condemned(id, this, rejection) => {
                    tracing::warn!(pipeline = %self.pipeline.name, event = id.id.0, reason = %rejection,
                        "the broker refused an event after its hand-over: reading again up to it");
                    self.suspects.acquit(id);
                    self.condemned.insert((id, this), rejection);
                    continue;
                }
                Ended::Suspected(rejection) => {
                    tracing::warn!(pipeline = %self.pipeline.name, events = self.suspects.len(), reason = %rejection,
                        "the broker refused a batch, reading again to find the event that it can't take");
                    continue;
                }
                Ended::Halted(halt) => {
                    if self.halt(&halt, stop).await {
                        continue;
                    }
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
                backoff = super::backoff();
            }
            if stop.is_asked() {
                if stop.is_over() || !self.moves() {
                    return Over::Stopped;
                }
                tracing::warn!(pipeline = %self.pipeline.name, %reason,
                    "the sink lost its place while the relay stops: it is opened once more");
                let again = Instant::now() + backoff.next().unwrap_or(BACKOFF_MAX);
                sleep_until(again.min(stop.until())).await;
                continue;
            }
            self.set_state(State::Stalled { reason });
            tokio::select! {
                biased;
                () = stop.asked() => return Over::Stopped,
                () = sleep(backoff.next().unwrap_or(BACKOFF_MAX)) => {}
            }
        }
    }

    /// One life: reads from the last settled position and publishes, until something ends it.
    async fn live(&mut self, settled: &watch::Sender<Position>, stop: &Stop) -> Ended {
        if stop.is_over() {
            return Ended::Stopped;
        }
        if let Err(error) = self.sink.open().await {
            return Ended::Sink(error);
        }
        if let Some(Full { reason, .. }) = &self.full {
            let reason = reason.clone();
            self.set_state(State::Halted { reason });
        }
        let moves = self.moves();
        tokio::select! {
            biased;
            () = stop.over(moves) => return Ended::Stopped,
            ready = self.make_ready(settled) => if let Err(ended) = ready {
                return ended;
            },
        }
        self.source.seek(settled.borrow().clone());
        self.waiting.read_again();
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
            skipped: &self.skipped,
            rejections: &mut self.rejections,
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
        let coverage = Coverage::new(settled.borrow().window.clone());
        let ended = tokio::select! {
            biased;
            ended = publisher.run(pages_read, stop) => ended,
            error = reader.run(self.source, coverage, stop), if reads => Ended::Source(error),
        };
        // It may be long until the next life, or somebody else's.
        self.source.rest();
        ended
    }

    /// Before anything is published: does the sink answer, are the topics there that are known beforehand, and how far is
    /// everything published already?
    async fn make_ready(&mut self, settled: &watch::Sender<Position>) -> Result<(), Ended> {
        self.sink.check().await.map_err(Ended::Sink)?;
        self.prepare_topics().await.map_err(Ended::Sink)?;
        // Without a lease somebody else may have taken over at the sink, who must not be put out of it again.
        if self.lease_end.borrow().is_over((self.now_us)()) {
            return Err(Ended::LeaseExpired);
        }
        let committed = self.sink.resume(&self.log).await.map_err(Ended::Sink)?;
        self.resumed = true;
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
        let topics = self.pipeline.known_topics();
        let mut unknown = None;
        let mut known = topics.is_empty();
        for (topic, answer) in self.sink.look_up(topics).await {
            match self.sink.learn(&topic, answer) {
                Ok(()) => known = true,
                Err(NotPrepared::Reopen(error)) => return Err(error),
                Err(NotPrepared::Unknown(error)) => unknown = unknown.or(Some(error)),
                Err(NotPrepared::Rejected(Rejection(reason))) => return Err(SinkError(reason)),
            }
        }
        // One that is not ready is the affair of its own events, while there are others.
        if let Some(error) = unknown.filter(|_| !known) {
            return Err(error);
        }
        self.topics_ready = true;
        Ok(())
    }

    /// Keeps the lease, so that no replica runs into the same event, until an operator pauses the pipeline, stops the process
    /// or asks for the event to be skipped; true for the last.
    async fn halt(&mut self, halt: &Halt, stop: &Stop) -> bool {
        loop {
            let (done, answer) = oneshot::channel();
            // Books that are closed end this tenure from outside.
            let _ = self.orders.send(Order::Skipped(halt.event, done)).await;
            let skipped = tokio::select! {
                biased;
                () = stop.asked() => return false,
                skipped = answer => skipped.ok().flatten(),
            };
            if let Some(reason) = skipped {
                let reason = format!("{}; {reason}", halt.rejection);
                self.skipped.insert(halt.event, reason);
                return true;
            }
            let reason = halt.reason(&self.pipeline.name);
            self.set_state(State::Halted { reason });
            tokio::select! {
                biased;
                () = stop.asked() => return false,
                () = sleep(SKIP_LOOK) => {}
            }
        }
    }

    /// Whether nothing was in the way when that was last looked at.
    fn moves(&self) -> bool {
        !matches!(self.status.borrow().state, State::Stalled { .. })
    }

    fn set_state(&self, state: State) {
        let now_us = (self.now_us)();
        self.status
            .send_modify(|status| status.set_state(&self.pipeline.name, state, now_us));
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
    /// Returns only with an error. After a request to stop it reads what was committed when that came, if that is wanted, and
    /// then lets go of its end of the channel.
    async fn run<S: Source>(self, source: &mut S, coverage: Coverage, stop: &Stop) -> SourceError {
        if let Err(error) = self.read(source, coverage, stop).await {
            return error;
        }
        drop(self);
        std::future::pending().await
    }

    /// Reads until nothing more is wanted.
    async fn read<S: Source>(
        &self,
        source: &mut S,
        mut coverage: Coverage,
        stop: &Stop,
    ) -> Result<(), SourceError> {
        let (mut passed, mut passed_at) = (self.durable.borrow().window.ceiling, Instant::now());
        // Whoever was told that there is more is also told when there is not.
        let mut promised = false;
        let mut woke_at = Instant::now();
        while !stop.is_over() {
            let after_request = stop.is_asked();
            let acknowledged = self.durable.borrow().clone();
            let began = Instant::now();
            let page = match source.capture(self.limits, &acknowledged).await {
                Ok(page) => page,
                // The trouble of the source must not cut the drain short.
                Err(_) if stop.is_asked() => break,
                Err(error) => return Err(error),
            };
            self.answers
                .send_if_modified(|answered| !std::mem::replace(answered, true));
            self.metrics.captured(page.events.len(), began.elapsed());
            let more = page.more;
            let read = coverage.note(&page, after_request);
            if read == Read::Beyond {
                break;
            }
            // Ids that held nothing for this pipeline: of another shard, or rolled back.
            let goes_on = page.newest() > passed && passed_at.elapsed() >= PASS_INTERVAL;
            if !page.events.is_empty() || goes_on || (promised && !more) {
                (passed, passed_at) = (page.newest(), Instant::now());
                promised = more;
                let Some(room) = self.room(source).await else {
                    break;
                };
                room.send(page);
            }
            if read == Read::Last {
                break;
            }
            if !more {
                tokio::select! {
                    biased;
                    () = stop.asked() => {}
                    () = source.wake() => {}
                }
                woke_at = Instant::now();
            } else if woke_at.elapsed() >= RESTLESS {
                source.rest();
                woke_at = Instant::now();
            }
        }
        Ok(())
    }

    /// Waits until the next page is wanted; none when the life is over.
    async fn room<S: Source>(&self, source: &mut S) -> Option<mpsc::Permit<'_, Page>> {
        match timeout(RESTLESS, self.pages.reserve()).await {
            Ok(room) => room.ok(),
            Err(_) => {
                source.rest();
                self.pages.reserve().await.ok()
            }
        }
    }
}
