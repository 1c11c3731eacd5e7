//! Ends of the fakes that somebody meddles with.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::task::{Context, Waker};
use std::time::Duration;

use outbox_relay::event::{EventKey, Record, Seq};
use outbox_relay::ledger::{
    Acquired, Due, Fenced, Ledger, LedgerError, Parked, Renewed, Resolution, Resolved,
};
use outbox_relay::position::Position;
use outbox_relay::sink::{Known, LookUp, NotPrepared, Receipt, Refused, Sink, SinkError};
use outbox_relay::source::{Page, PageLimits, Source, SourceError};
use tokio::time::{advance, sleep};

use super::source;
use crate::fake::Shared;
use crate::fake::books::FakeLedger;
use crate::fake::broker::FakeSink;
use crate::fake::log::FakeSource;

/// Answers late, or asks the database late, as often as there is something in the lists.
pub(super) struct SlowLedger {
    pub(super) ledger: FakeLedger,
    /// Between the grant and the answer.
    pub(super) granted: Vec<Duration>,
    /// Before a renewal, and between it and its answer; the next one is the last.
    pub(super) renewed: Vec<(Duration, Duration)>,
}

impl Ledger for SlowLedger {
    async fn acquire(&mut self) -> Result<Acquired, LedgerError> {
        let acquired = self.ledger.acquire().await;
        sleep(self.granted.pop().unwrap_or_default()).await;
        acquired
    }

    async fn renew(&mut self) -> Result<Renewed, LedgerError> {
        let (before, after) = self.renewed.pop().unwrap_or_default();
        sleep(before).await;
        let renewed = self.ledger.renew().await;
        sleep(after).await;
        renewed
    }

    async fn acknowledge(&mut self, position: &Position) -> Result<Fenced, LedgerError> {
        self.ledger.acknowledge(position).await
    }

    async fn park(&mut self, parked: &[Parked]) -> Result<Fenced, LedgerError> {
        self.ledger.park(parked).await
    }

    async fn due(&mut self, rows: usize, bytes: usize) -> Result<Vec<Due>, LedgerError> {
        self.ledger.due(rows, bytes).await
    }

    async fn resolve(&mut self, resolved: &Resolved) -> Result<Resolution, LedgerError> {
        self.ledger.resolve(resolved).await
    }

    async fn skipped(&mut self, event: EventKey) -> Result<Option<String>, LedgerError> {
        self.ledger.skipped(event).await
    }

    async fn release(&mut self, settled: bool) -> Result<(), LedgerError> {
        self.ledger.release(settled).await
    }
}

/// Asks somebody else before every read once the first event is delivered, so that its topic is known.
pub(super) struct Meddled<F> {
    shared: Shared,
    source: FakeSource,
    reads: usize,
    /// How often it was told that nobody reads for a while.
    pub(super) rests: Arc<AtomicUsize>,
    meddle: F,
}

impl<F> Meddled<F> {
    pub(super) fn new(shared: &Shared, meddle: F) -> Self {
        Self {
            shared: shared.clone(),
            source: source(shared),
            reads: 0,
            rests: Arc::default(),
            meddle,
        }
    }
}

/// Counts how often it is asked whether it is cut off; it takes a while to answer.
pub(super) struct Doubted {
    pub(super) sink: FakeSink,
    pub(super) asked: Arc<AtomicUsize>,
}

impl Sink for Doubted {
    async fn open(&mut self) -> Result<(), SinkError> {
        self.sink.open().await
    }

    async fn close(&mut self) {
        self.sink.close().await;
    }

    async fn check(&mut self) -> Result<(), SinkError> {
        self.sink.check().await
    }

    async fn is_cut_off(&mut self) -> bool {
        self.asked.fetch_add(1, Ordering::Relaxed);
        sleep(Duration::from_secs(6)).await;
        self.sink.is_cut_off().await
    }

    fn look_up(&mut self, topics: Vec<String>) -> LookUp {
        self.sink.look_up(topics)
    }

    fn learn(
        &mut self,
        topic: &str,
        answer: Result<Known, NotPrepared>,
    ) -> Result<(), NotPrepared> {
        self.sink.learn(topic, answer)
    }

    fn hand_over(&mut self, seq: Seq, record: &Record<'_>) -> Result<(), Refused> {
        self.sink.hand_over(seq, record)
    }

    async fn receipts(&mut self, into: &mut Vec<Receipt>) -> Result<(), SinkError> {
        self.sink.receipts(into).await
    }

    fn trouble(&self) -> Option<String> {
        self.sink.trouble()
    }
}

/// Asks somebody else whenever receipts have come in, who may have lost the sink with them.
pub(super) struct AtReceipts<F> {
    sink: FakeSink,
    times: usize,
    meddle: F,
}

impl<F> AtReceipts<F> {
    pub(super) fn new(sink: FakeSink, meddle: F) -> Self {
        Self {
            sink,
            times: 0,
            meddle,
        }
    }
}

/// The process is stopped by the system: the clock moves on at the first poll, and nobody else is polled meanwhile.
pub(super) fn stop_the_process(time: Duration) {
    let mut advance = pin!(advance(time));
    let polled = advance
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()));
    assert!(polled.is_pending());
}

/// The wall clock of a machine that is suspended.
pub(super) static WALL_US: AtomicI64 = AtomicI64::new(0);

/// The whole machine: its monotonic clock stands still, and its wall clock is ahead afterwards.
pub(super) fn suspend_the_machine(time: Duration) {
    let us = i64::try_from(time.as_micros()).unwrap();
    WALL_US.fetch_add(us, Ordering::Relaxed);
}

impl<F: FnMut(usize) -> Result<(), SinkError> + Send> Sink for AtReceipts<F> {
    async fn open(&mut self) -> Result<(), SinkError> {
        self.sink.open().await
    }

    async fn close(&mut self) {
        self.sink.close().await;
    }

    async fn check(&mut self) -> Result<(), SinkError> {
        self.sink.check().await
    }

    fn look_up(&mut self, topics: Vec<String>) -> LookUp {
        self.sink.look_up(topics)
    }

    fn learn(
        &mut self,
        topic: &str,
        answer: Result<Known, NotPrepared>,
    ) -> Result<(), NotPrepared> {
        self.sink.learn(topic, answer)
    }

    fn hand_over(&mut self, seq: Seq, record: &Record<'_>) -> Result<(), Refused> {
        self.sink.hand_over(seq, record)
    }

    async fn receipts(&mut self, into: &mut Vec<Receipt>) -> Result<(), SinkError> {
        self.sink.receipts(into).await?;
        self.times += 1;
        (self.meddle)(self.times)
    }

    fn trouble(&self) -> Option<String> {
        self.sink.trouble()
    }
}

impl<F: FnMut(usize) -> Result<(), SourceError> + Send> Source for Meddled<F> {
    fn seek(&mut self, position: Position) {
        self.source.seek(position);
    }

    async fn capture(&mut self, limits: PageLimits, at: &Position) -> Result<Page, SourceError> {
        if self.shared.with(|world| world.books.position.last_id.0 > 0) {
            self.reads += 1;
            (self.meddle)(self.reads)?;
        }
        self.source.capture(limits, at).await
    }

    async fn wake(&mut self) {
        self.source.wake().await;
    }

    fn rest(&mut self) {
        self.rests.fetch_add(1, Ordering::Relaxed);
    }
}

/// Takes its time over every page but the first.
pub(super) struct SlowSource {
    pub(super) source: FakeSource,
    pub(super) pages: usize,
    pub(super) slow: Duration,
}

impl Source for SlowSource {
    fn seek(&mut self, position: Position) {
        self.source.seek(position);
    }

    async fn capture(&mut self, limits: PageLimits, at: &Position) -> Result<Page, SourceError> {
        if self.pages > 0 {
            sleep(self.slow).await;
        }
        let page = self.source.capture(limits, at).await?;
        self.pages += usize::from(!page.events.is_empty());
        Ok(page)
    }

    async fn wake(&mut self) {
        self.source.wake().await;
    }
}
