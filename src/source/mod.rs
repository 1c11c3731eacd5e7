//! The database end that captures: committed events, in log order, page by page. (*source* → order → route → encode → sink)
//!
//! A source only reads. It never moves progress (that is the [`crate::ledger`]) and knows no sink and no rule.

pub mod postgres;
mod selection;
pub mod sqlite;

use std::future::Future;

pub use self::selection::Selection;
use crate::event::{Event, EventId};
use crate::position::Position;

/// One statement about retained events looks at this many ids, so that it ends soon however rare the events are that are
/// asked for.
const IDS_AT_ONCE: i64 = 50_000;
/// One page of them holds about this many bytes; a single larger event is taken alone.
const PAGE_BYTES: usize = 4 << 20;
/// The content of an event with more bytes is not read: the event is rejected.
pub const EVENT_BYTES_MAX: usize = 8 << 20;

/// Why an event of this size is rejected.
fn too_large(bytes: usize, max: usize) -> String {
    format!("too large: the event has {bytes} bytes, the relay reads events of {max} bytes at most")
}

/// How much one page may hold.
#[derive(Clone, Copy, Debug)]
pub struct PageLimits {
    /// Events, at least 1.
    pub rows: usize,
    /// Bytes in memory. The first event of a page is taken whatever its size.
    pub bytes: usize,
}

/// Events that follow each other in the log.
#[derive(Clone, Debug)]
pub struct Page {
    /// In log order; all of one window.
    pub events: Vec<Event>,
    /// Where one stands when all of them are done with.
    pub end: Position,
    /// False when the log had nothing more at the time of reading.
    pub more: bool,
}

impl Page {
    /// The newest id that the log had handed out when the window was opened.
    #[must_use]
    pub fn newest(&self) -> EventId {
        self.end.window.ceiling
    }
}

/// What went wrong with the database; a person or time has to mend it, then one starts again from the last position.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Connection, timeout, shutdown of the server: comes back by itself.
    #[error("{}", crate::reason::reason(.0))]
    Transient(anyhow::Error),
    /// The table or the rights are not what they should be; tried again all the same, more slowly.
    #[error("{}", crate::reason::reason(.0))]
    Misconfigured(anyhow::Error),
}

/// Captures committed events in log order.
///
/// The contract, held by one suite for every source and for the fakes:
/// after [`seek`](Source::seek) to a position, the pages yield every event that is not before it, once each, and for one
/// entity in commit order; the same position yields the same events again; a transaction in progress holds nobody up.
pub trait Source: Send {
    /// Continues from `position`.
    fn seek(&mut self, position: Position);

    /// Reads the next page; an empty one means that there is nothing new.
    ///
    /// `acknowledged` is a position whose durable write has completed, which lets the next windows start higher.
    ///
    /// # Cancel safety
    /// Safe: an unfinished page is read again.
    ///
    /// # Errors
    /// [`SourceError`], after which the source reconnects at the next call.
    fn capture(
        &mut self,
        limits: PageLimits,
        acknowledged: &Position,
    ) -> impl Future<Output = Result<Page, SourceError>> + Send;

    /// Waits until it is worth looking again. A hint: may return early, and returns late at worst by the poll interval.
    ///
    /// # Cancel safety
    /// Safe: a lost hint costs latency only (I7).
    fn wake(&mut self) -> impl Future<Output = ()> + Send;

    /// Nobody captures or waits for a while: lets go of what others would have to keep for that.
    fn rest(&mut self) {}
}

/// The sources that run in production.
pub enum AnySource {
    /// PostgreSQL 14 to 18.
    Postgres(Box<postgres::PostgresSource>),
    /// A SQLite file.
    Sqlite(Box<sqlite::SqliteSource>),
}

impl Source for AnySource {
    fn seek(&mut self, position: Position) {
        match self {
            Self::Postgres(source) => source.seek(position),
            Self::Sqlite(source) => source.seek(position),
        }
    }

    async fn capture(
        &mut self,
        limits: PageLimits,
        acknowledged: &Position,
    ) -> Result<Page, SourceError> {
        match self {
            Self::Postgres(source) => source.capture(limits, acknowledged).await,
            Self::Sqlite(source) => source.capture(limits, acknowledged).await,
        }
    }

    async fn wake(&mut self) {
        match self {
            Self::Postgres(source) => source.wake().await,
            Self::Sqlite(source) => source.wake().await,
        }
    }

    fn rest(&mut self) {
        match self {
            Self::Postgres(source) => source.rest(),
            Self::Sqlite(source) => source.rest(),
        }
    }
}

/// Retained events, by what is asked for and not by a cursor.
pub(crate) enum AnyHistory {
    /// Of a PostgreSQL database.
    Postgres(postgres::History),
    /// Of a SQLite file.
    Sqlite(sqlite::History),
}

impl AnyHistory {
    /// The selected events after one id and up to another, as many as are found at once, in the order of their ids; and
    /// the id up to which that is all of them.
    ///
    /// # Errors
    /// When the database can't be asked; the next call connects anew.
    pub(crate) async fn page(
        &mut self,
        selection: &Selection,
        between: (EventId, EventId),
        rows: usize,
    ) -> Result<(Vec<Event>, EventId), anyhow::Error> {
        match self {
            Self::Postgres(history) => history.page(selection, between, rows).await,
            Self::Sqlite(history) => history.page(selection, between, rows).await,
        }
    }
}
