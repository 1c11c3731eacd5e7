//! Captures from PostgreSQL by snapshot windows. (*source* → order → route → encode → sink)
//!
//! Keeps no transaction, snapshot or cursor open between statements, uses no session feature in poll mode (so it works
//! through a transaction-mode pooler), and never writes.

pub(crate) mod ask;
mod copy;
mod hint;
mod statement;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use futures_util::StreamExt;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{ConnectOptions, Connection};
use tokio::time::timeout;

use self::copy::Row;
pub use self::hint::CaptureMode;
use self::hint::Hints;
use super::{Page, PageLimits, Source, SourceError};
use crate::event::{Event, EventId};
use crate::position::{Position, Snapshot, Window};

/// A page starts this small and doubles while its bytes allow, so that the first page of huge events is not thousands.
const FIRST_PAGE_ROWS: usize = 500;

/// The server may be silent for this long within a statement before the connection is given up as half-open.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// How the source reaches the database.
#[derive(Clone)]
pub struct Settings {
    /// For reading; may go through a transaction-mode pooler.
    pub options: PgConnectOptions,
    /// For LISTEN, which needs a connection of its own that no pooler shares.
    pub direct_options: PgConnectOptions,
    /// How it learns of new events.
    pub mode: CaptureMode,
    /// The longest time without looking at an idle log in poll mode.
    pub poll_interval: Duration,
}

impl fmt::Debug for Settings {
    // The options hold the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("mode", &self.mode)
            .field("poll_interval", &self.poll_interval)
            .finish_non_exhaustive()
    }
}

/// Reads the outbox of one database for one pipeline.
pub struct PostgresSource {
    options: PgConnectOptions,
    connection: Option<PgConnection>,
    hints: Hints,
    at: Position,
    /// The highest ceiling that had been read before a cursor write of ours that has completed: with that write's
    /// transaction ended, a snapshot taken now has an xmax above it, and whoever is at or above that xmax took their
    /// ids after the ceiling was read.
    safe_floor: EventId,
    page_rows: usize,
}

impl PostgresSource {
    /// A source that connects when it is first used.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let Settings {
            options,
            direct_options,
            mode,
            poll_interval,
        } = settings;
        Self {
            options: options.disable_statement_logging(),
            connection: None,
            hints: Hints::new(
                mode,
                direct_options.disable_statement_logging(),
                poll_interval,
            ),
            at: Position::beginning(),
            safe_floor: EventId(0),
            page_rows: FIRST_PAGE_ROWS,
        }
    }

    async fn read(&mut self, limits: PageLimits) -> Result<Page, anyhow::Error> {
        let rows_max = self.page_rows.min(limits.rows).max(1);
        let opens = self.at.at_end_of_window();
        let statement = if opens {
            statement::open_window(&self.at.window, rows_max)
        } else {
            statement::next_page(&self.at, rows_max)
        };
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => connect(&self.options).await?,
        };
        let read = fetch(&mut connection, &statement, limits.bytes).await?;
        if read.complete {
            self.connection = Some(connection);
        } else {
            // The rest of the answer is on its way and not wanted; reading it would cost its whole size.
            drop(connection);
        }
        let window = if opens {
            let (cur, ceiling) = read
                .head
                .context("open a window: the server sent no snapshot")?;
            Arc::new(Window {
                prev: self.at.window.cur.clone(),
                cur,
                floor: self.at.window.next_floor,
                ceiling: ceiling.max(self.at.window.next_floor),
                next_floor: self.safe_floor.max(self.at.window.next_floor),
            })
        } else {
            self.at.window.clone()
        };
        // Everything after relies on the order: better no page than a wrong one.
        ensure!(
            read.events.is_sorted_by(|a, b| a.id < b.id),
            "the page is out of order: {} events from id {} on",
            read.events.len(),
            read.events[0].id
        );
        let full = !read.complete || read.events.len() >= rows_max;
        self.adapt_page_rows(read.events.len(), read.bytes, limits, full);
        let last_id = match read.events.last() {
            Some(event) if full => event.id,
            _ => window.ceiling,
        };
        let end = Position { window, last_id };
        self.at = end.clone();
        Ok(Page {
            events: read.events,
            end,
            more: full,
        })
    }

    /// Grows while pages stay well under the byte limit, shrinks to what would have fitted when they don't.
    fn adapt_page_rows(&mut self, rows: usize, bytes: usize, limits: PageLimits, full: bool) {
        if full && rows > 0 {
            let fitting = (limits.bytes / 2) / (bytes / rows).max(1);
            self.page_rows = fitting.clamp(1, self.page_rows * 2).min(limits.rows);
        }
    }
}

impl Source for PostgresSource {
    fn seek(&mut self, position: Position) {
        self.at = position;
        self.page_rows = FIRST_PAGE_ROWS;
    }

    async fn capture(
        &mut self,
        limits: PageLimits,
        acknowledged: &Position,
    ) -> Result<Page, SourceError> {
        // Whatever is missed while reading, a hint that came before is answered by this read.
        self.hints.looked();
        self.safe_floor = self.safe_floor.max(acknowledged.window.ceiling);
        let page = self.read(limits).await.map_err(classify)?;
        self.hints.found(page.events.len());
        Ok(page)
    }

    async fn wake(&mut self) {
        self.hints.wait().await;
    }
}

struct Read {
    events: Vec<Event>,
    head: Option<(Snapshot, EventId)>,
    bytes: usize,
    /// Whether the answer was read to its end.
    complete: bool,
}

async fn fetch(
    connection: &mut PgConnection,
    statement: &str,
    bytes_max: usize,
) -> Result<Read, anyhow::Error> {
    let mut read = Read {
        events: Vec::new(),
        head: None,
        bytes: 0,
        complete: false,
    };
    let silent = || anyhow!("the database sent nothing for {} s", SILENCE_MAX.as_secs());
    let mut answer = timeout(SILENCE_MAX, connection.copy_out_raw(statement))
        .await
        .map_err(|_| silent())?
        .context("read the outbox")?;
    let mut decoder = copy::Decoder::new();
    while let Some(chunk) = timeout(SILENCE_MAX, answer.next())
        .await
        .map_err(|_| silent())?
    {
        match decoder.decode(chunk.context("read the outbox")?)? {
            Some(Row::Event(event)) => {
                read.bytes += event.size_bytes();
                read.events.push(event);
                if read.bytes >= bytes_max {
                    return Ok(read);
                }
            }
            Some(Row::Head { cur, ceiling }) => {
                if read.head.replace((cur, ceiling)).is_some() {
                    return Err(anyhow!("outbox.events has a row without event_id"));
                }
            }
            None => {}
        }
    }
    read.complete = true;
    Ok(read)
}

/// Opens a connection, with a limit on how long that may take.
///
/// # Errors
/// When the server can't be reached or refuses; the message names host and database, never the password.
pub(crate) async fn connect(options: &PgConnectOptions) -> Result<PgConnection, anyhow::Error> {
    let describe = || {
        format!(
            "connect to PostgreSQL at {}:{}, database {:?}, as {:?}",
            options.get_host(),
            options.get_port(),
            options.get_database().unwrap_or_default(),
            options.get_username(),
        )
    };
    timeout(Duration::from_secs(10), PgConnection::connect_with(options))
        .await
        .map_err(|_| anyhow!("no answer within 10 s"))
        .and_then(|connected| connected.map_err(anyhow::Error::from))
        .with_context(describe)
}

/// A server's refusal of the statement (missing table, missing right, wrong type) is for a person; the rest for time.
pub(crate) fn classify(error: anyhow::Error) -> SourceError {
    let code = error
        .chain()
        .find_map(|cause| match cause.downcast_ref::<sqlx::Error>() {
            Some(sqlx::Error::Database(error)) => error.code().map(|code| code.into_owned()),
            _ => None,
        });
    match code.as_deref().and_then(|code| code.get(..2)) {
        // Syntax or access (42), invalid authorization (28), no such database or schema (3D, 3F), wrong values (22).
        Some("42" | "28" | "3D" | "3F" | "22") => SourceError::Misconfigured(error),
        _ => SourceError::Transient(error),
    }
}
