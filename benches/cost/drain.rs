//! The real loop over a recorded page, which a source replays again and again.
//!
//! What servers do is left out, for it is no cost of the relay's: the rows of the database are in memory, and so is the
//! cursor. A drain is over when the cursor has passed the last event.

use std::future::pending;
use std::sync::Arc;

use anyhow::{Error, ensure};
use outbox_relay::event::{EventId, EventKey, Record, Seq, Shard};
use outbox_relay::ledger::{
    Acquired, Due, Fenced, Ledger, LedgerError, Parked, Released, Renewed, Resolution, Resolved,
    Tenure,
};
use outbox_relay::position::{Position, Window};
use outbox_relay::relay::status::Status;
use outbox_relay::relay::turn::Turn;
use outbox_relay::relay::{Pipeline, Relay, Settings};
use outbox_relay::sink::{Known, LookUp, NotPrepared, Receipt, Refused, Sink, SinkError};
use outbox_relay::source::{Page, PageLimits, Source, SourceError};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::recording::RecordedRow;
use crate::rules::decode;

/// Drains the events of a recorded page so many times over, as one log.
///
/// # Errors
/// When the loop stops before the end.
pub async fn drain(
    page: Vec<RecordedRow>,
    (pipeline, settings): (Pipeline, Settings),
    sink: impl Sink,
    rounds: usize,
) -> Result<(), Error> {
    let source = Replay::new(page, rounds)?;
    let end = source.window.ceiling;
    let (durable, seen) = watch::channel(Position::beginning());
    let drained = CancellationToken::new();
    let relay = Relay {
        pipeline,
        shard: Shard::whole(),
        turn: Turn::always(),
        settings,
        source,
        sink,
        ledger: Cursor {
            durable,
            end,
            drained: drained.clone(),
        },
        status: watch::channel(Status::starting()).0,
        changes: watch::channel(None).1,
        now_us: || 1_800_000_000_000_000,
    };
    relay.run(drained).await;
    let at = seen.borrow().last_id;
    ensure!(at == end, "the cursor is at {at}, the log ends at {end}");
    Ok(())
}

/// A log of one window: the events of the page, once per round, with ids that go on.
struct Replay {
    page: Vec<RecordedRow>,
    events: i64,
    window: Arc<Window>,
    at: EventId,
}

impl Replay {
    fn new(page: Vec<RecordedRow>, rounds: usize) -> Result<Self, Error> {
        let events = i64::try_from(page.len())?;
        let window = Window {
            ceiling: EventId(events * i64::try_from(rounds)?),
            ..Window::beginning()
        };
        Ok(Self {
            page,
            events,
            window: Arc::new(window),
            at: EventId(0),
        })
    }
}

impl Source for Replay {
    fn seek(&mut self, position: Position) {
        self.at = position.last_id;
    }

    async fn capture(&mut self, _: PageLimits, _: &Position) -> Result<Page, SourceError> {
        let mut events = Vec::new();
        if self.at < self.window.ceiling {
            events = decode(&self.page).map_err(SourceError::Misconfigured)?;
            for event in &mut events {
                event.id.0 += self.at.0;
            }
            self.at.0 += self.events;
        }
        Ok(Page {
            events,
            end: Position {
                window: self.window.clone(),
                last_id: self.at,
            },
            more: self.at < self.window.ceiling,
        })
    }

    async fn wake(&mut self) {
        pending::<()>().await;
    }
}

/// Confirms what it is given, at once.
#[derive(Default)]
pub struct Prompt {
    topics: Vec<String>,
    receipts: Vec<Receipt>,
}

impl Sink for Prompt {
    async fn open(&mut self) -> Result<(), SinkError> {
        *self = Self::default();
        Ok(())
    }

    async fn close(&mut self) {
        *self = Self::default();
    }

    async fn check(&mut self) -> Result<(), SinkError> {
        Ok(())
    }

    fn look_up(&mut self, topics: Vec<String>) -> LookUp {
        let known = |topic| (topic, Ok(Known::default()));
        Box::pin(std::future::ready(topics.into_iter().map(known).collect()))
    }

    fn learn(&mut self, topic: &str, _: Result<Known, NotPrepared>) -> Result<(), NotPrepared> {
        self.topics.push(topic.to_owned());
        Ok(())
    }

    fn hand_over(&mut self, seq: Seq, record: &Record<'_>) -> Result<(), Refused> {
        if !self.topics.iter().any(|topic| *topic == record.topic) {
            return Err(Refused::Unprepared);
        }
        self.receipts.push(Receipt::Delivered(seq));
        Ok(())
    }

    async fn receipts(&mut self, into: &mut Vec<Receipt>) -> Result<(), SinkError> {
        if self.receipts.is_empty() {
            pending::<()>().await;
        }
        into.append(&mut self.receipts);
        Ok(())
    }

    fn trouble(&self) -> Option<String> {
        None
    }
}

/// Books of one holder, in which nothing is ever parked.
struct Cursor {
    durable: watch::Sender<Position>,
    end: EventId,
    /// Told when the cursor is there.
    drained: CancellationToken,
}

impl Ledger for Cursor {
    async fn acquire(&mut self) -> Result<Acquired, LedgerError> {
        Ok(Acquired::Ours(Tenure {
            position: self.durable.borrow().clone(),
            log: "recorded".to_owned(),
            held: Vec::new(),
            dead_letters: Vec::new(),
        }))
    }

    async fn renew(&mut self) -> Result<Renewed, LedgerError> {
        Ok(Renewed::Extended)
    }

    async fn acknowledge(&mut self, position: &Position) -> Result<Fenced, LedgerError> {
        self.durable.send_replace(position.clone());
        if position.last_id == self.end {
            self.drained.cancel();
        }
        Ok(Fenced::Written)
    }

    async fn park(&mut self, parked: &[Parked]) -> Result<Fenced, LedgerError> {
        // The loop would try again for ever.
        panic!("{} recorded events can't be published", parked.len())
    }

    async fn due(&mut self, _: usize, _: usize) -> Result<Vec<Due>, LedgerError> {
        Ok(Vec::new())
    }

    async fn resolve(&mut self, _: &Resolved) -> Result<Resolution, LedgerError> {
        Ok(Resolution::Written(Released::default()))
    }

    async fn skipped(&mut self, _: EventKey) -> Result<Option<String>, LedgerError> {
        Ok(None)
    }

    async fn release(&mut self, _: bool) -> Result<(), LedgerError> {
        Ok(())
    }
}
