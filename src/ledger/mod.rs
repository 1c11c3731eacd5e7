//! The relay's own durable books in the service's database: who owns a pipeline, how far it got, what is parked.
//!
//! Every write is fenced by the epoch of the lease: an owner that was replaced changes nothing (I8).

pub mod acts;
pub mod pipelines;
pub mod postgres;
pub mod sqlite;
pub mod view;

use std::fmt;
use std::future::Future;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::event::{Event, EventKey, HeldEntity, PipelineName, Shard, Start};
use crate::position::Position;

/// What a ledger needs to know about its pipeline.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The pipeline whose books these are.
    pub pipeline: PipelineName,
    /// Which of its shards.
    pub shard: Shard,
    /// This process, unlike any other; shown to operators as the owner.
    pub holder: String,
    /// How long a lease lasts without renewal.
    pub lease_ttl: Duration,
    /// Where the pipeline begins when it has no cursor yet.
    pub start: Start,
}

/// The answer to [`Ledger::acquire`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Acquired {
    /// The lease is ours; continue from here.
    Ours(Tenure),
    /// Somebody else owns the pipeline.
    Held {
        /// The owner.
        holder: String,
        /// Until its lease ends, by the database's clock.
        expires_in: Duration,
    },
    /// An operator has paused the pipeline: no relay takes its lease.
    Paused(Pause),
    /// The pipeline has another number of shards: this one does not exist.
    Resharded {
        /// How many it has.
        shards: u32,
    },
}

/// That an operator has paused a pipeline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    /// Since when, as in 2026-01-31T10:00:00Z.
    pub since: String,
    /// Who paused it: OS user and host.
    pub by: String,
    /// Why.
    pub reason: String,
}

impl fmt::Display for Pause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { since, by, reason } = self;
        write!(f, "since {since} by {by}: {reason}")
    }
}

/// The answer to [`Ledger::renew`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewed {
    /// The lease is extended.
    Extended,
    /// The lease is extended, and an operator has paused the pipeline: what is in flight is waited for, and then the lease is
    /// to be given back.
    Paused,
    /// As [`Fenced::Lost`].
    Lost,
}

/// What an owner starts with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenure {
    /// Everything before it is delivered or parked.
    pub position: Position,
    /// Names the log and this cursor in it: positions that were written down elsewhere mean something only under the same
    /// name. Another database, a restored or crashed one, and a cursor that was begun anew have other names.
    pub log: String,
    /// Entities that wait behind a parked event.
    pub held: Vec<HeldEntity>,
    /// Events that are set aside and hold nobody up.
    pub dead_letters: Vec<EventKey>,
}

/// Whether a fenced write took place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fenced {
    /// Written; the lease is still ours.
    Written,
    /// Not written: the lease has passed to somebody else, or the database has lost transactions since it was taken (a
    /// crash or a failover behind a pooler). What was read in this tenure must be read again from the next one's position.
    Lost,
}

/// An event to be set aside durably.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parked {
    /// The whole event, so that it outlives the log's retention.
    pub event: Event,
    /// Why it was rejected; none when it only waits behind one that was.
    pub error: Option<String>,
    /// Whether later events of its entity wait behind it; a dead letter holds nobody up.
    pub holds: bool,
}

/// A parked event whose turn it is: an operator asked for it, or for one before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Due {
    /// The whole event.
    pub event: Event,
    /// How often it was rejected.
    pub attempts: u32,
    /// Whether its entity waits for it.
    pub holds: bool,
    /// It is not to be published but forgotten.
    pub drop: bool,
}

/// What became of due events.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolved {
    /// Delivered: no longer set aside.
    pub delivered: Vec<EventKey>,
    /// Dropped on request; those that nobody wants dropped any more stay.
    pub dropped: Vec<EventKey>,
    /// Rejected once more, with the reason: they wait until somebody asks again.
    pub rejected: Vec<(EventKey, String)>,
}

/// What the books look like after [`Ledger::resolve`], each in no order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Released {
    /// Entities (aggregate type and id) of which nothing is parked any more that holds them.
    pub free: Vec<(String, String)>,
    /// Of the events to be dropped those that stay, because nobody wants that any more.
    pub kept: Vec<EventKey>,
}

/// The answer to [`Ledger::resolve`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// Written.
    Written(Released),
    /// Not written, as [`Fenced::Lost`].
    Lost,
}

/// The books could not be read or written; whether a write took place is unknown.
#[derive(Debug, thiserror::Error)]
#[error("{}", crate::reason::reason(.0))]
pub struct LedgerError(#[from] pub anyhow::Error);

/// The durable books of one pipeline.
///
/// The contract: of many holders at most one is told [`Acquired::Ours`] until its lease ends or is released; what
/// [`acknowledge`](Ledger::acknowledge) wrote is what the next tenure starts with; a write by a former owner answers
/// [`Fenced::Lost`] and changes nothing; parking the same event twice keeps the first. Of one entity parked events become
/// due from its oldest on, and none behind one that was rejected and that nobody asked for, and none that the cursor has not
/// passed; they stay due, whoever owns the pipeline, until [`resolve`](Ledger::resolve) says what became of them.
pub trait Ledger: Send {
    /// Takes the lease if nobody else has it, and reads where to continue.
    ///
    /// # Errors
    /// When the database can't be asked; the lease may have been taken.
    fn acquire(&mut self) -> impl Future<Output = Result<Acquired, LedgerError>> + Send;

    /// Extends the lease to its full length from now on, and says whether the pipeline is paused.
    ///
    /// # Errors
    /// When the database can't be asked.
    fn renew(&mut self) -> impl Future<Output = Result<Renewed, LedgerError>> + Send;

    /// Moves the cursor.
    ///
    /// # Errors
    /// When the answer is unknown.
    fn acknowledge(
        &mut self,
        position: &Position,
    ) -> impl Future<Output = Result<Fenced, LedgerError>> + Send;

    /// Sets events aside, durably when this returns.
    ///
    /// # Errors
    /// When the answer is unknown.
    fn park(
        &mut self,
        parked: &[Parked],
    ) -> impl Future<Output = Result<Fenced, LedgerError>> + Send;

    /// Parked events whose turn it is, by their ids: at most `rows`, and unless the first alone has more, at most `bytes`.
    ///
    /// # Errors
    /// When the database can't be asked.
    fn due(
        &mut self,
        rows: usize,
        bytes: usize,
    ) -> impl Future<Output = Result<Vec<Due>, LedgerError>> + Send;

    /// Writes what became of due events. What waits behind those that are not set aside any more is due.
    ///
    /// # Errors
    /// When the answer is unknown.
    fn resolve(
        &mut self,
        resolved: &Resolved,
    ) -> impl Future<Output = Result<Resolution, LedgerError>> + Send;

    /// Why an operator wants this event left out; none when no operator does.
    ///
    /// # Errors
    /// When the database can't be asked.
    fn skipped(
        &mut self,
        event: EventKey,
    ) -> impl Future<Output = Result<Option<String>, LedgerError>> + Send;

    /// Gives the lease back, so that a standby takes over at once. `settled` says that everything that was handed over is
    /// delivered and acknowledged.
    ///
    /// # Errors
    /// When the answer is unknown; the lease then ends by itself.
    fn release(&mut self, settled: bool) -> impl Future<Output = Result<(), LedgerError>> + Send;
}

/// The newest migration that this program knows, of either database.
pub(crate) const NEWEST_MIGRATION: i64 = 1;

fn too_old(newest: i64) -> String {
    format!(
        "the database has migration {newest}, and this outbox-relay knows {NEWEST_MIGRATION} at most: it is too old for these \
         tables; run the version that migrated them"
    )
}

/// An error text as both databases take it: at most 8 KiB, because it is a sentence for a person, and without U+0000, which
/// no text of PostgreSQL holds and at which `json_object` of SQLite ends.
fn storable(error: &str) -> String {
    const BYTES_MAX: usize = 8192;
    let cut = &error[..error.floor_char_boundary(BYTES_MAX)];
    let mut text = cut.replace('\0', "\u{fffd}");
    text.truncate(text.floor_char_boundary(BYTES_MAX));
    text
}

/// The ledgers that run in production.
pub enum AnyLedger {
    /// Tables `outbox.cursors`, `outbox.leases` and `outbox.parked`.
    Postgres(Box<postgres::PostgresLedger>),
    /// The same tables in the SQLite file.
    Sqlite(Box<sqlite::SqliteLedger>),
}

impl Ledger for AnyLedger {
    async fn acquire(&mut self) -> Result<Acquired, LedgerError> {
        match self {
            Self::Postgres(ledger) => ledger.acquire().await,
            Self::Sqlite(ledger) => ledger.acquire().await,
        }
    }

    async fn renew(&mut self) -> Result<Renewed, LedgerError> {
        match self {
            Self::Postgres(ledger) => ledger.renew().await,
            Self::Sqlite(ledger) => ledger.renew().await,
        }
    }

    async fn acknowledge(&mut self, position: &Position) -> Result<Fenced, LedgerError> {
        match self {
            Self::Postgres(ledger) => ledger.acknowledge(position).await,
            Self::Sqlite(ledger) => ledger.acknowledge(position).await,
        }
    }

    async fn park(&mut self, parked: &[Parked]) -> Result<Fenced, LedgerError> {
        match self {
            Self::Postgres(ledger) => ledger.park(parked).await,
            Self::Sqlite(ledger) => ledger.park(parked).await,
        }
    }

    async fn due(&mut self, rows: usize, bytes: usize) -> Result<Vec<Due>, LedgerError> {
        match self {
            Self::Postgres(ledger) => ledger.due(rows, bytes).await,
            Self::Sqlite(ledger) => ledger.due(rows, bytes).await,
        }
    }

    async fn resolve(&mut self, resolved: &Resolved) -> Result<Resolution, LedgerError> {
        match self {
            Self::Postgres(ledger) => ledger.resolve(resolved).await,
            Self::Sqlite(ledger) => ledger.resolve(resolved).await,
        }
    }

    async fn skipped(&mut self, event: EventKey) -> Result<Option<String>, LedgerError> {
        match self {
            Self::Postgres(ledger) => ledger.skipped(event).await,
            Self::Sqlite(ledger) => ledger.skipped(event).await,
        }
    }

    async fn release(&mut self, settled: bool) -> Result<(), LedgerError> {
        match self {
            Self::Postgres(ledger) => ledger.release(settled).await,
            Self::Sqlite(ledger) => ledger.release(settled).await,
        }
    }
}
