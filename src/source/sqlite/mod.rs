//! Captures from a SQLite file. (*source* → order → route → encode → sink)
//!
//! One transaction writes at a time, so the order of the ids is the order of the commits: a window is a range of ids and
//! needs no snapshot. Never writes, and holds no transaction open between statements, because that would keep the
//! write-ahead log from being used again.

mod history;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use bytes::Bytes;
use bytestring::ByteString;
use futures_util::TryStreamExt;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteRow};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Row};
use tokio::time::{Instant, sleep_until};
use uuid::Uuid;

pub(crate) use self::history::History;
use super::{EVENT_BYTES_MAX, Page, PageLimits, Source, SourceError, too_large};
use crate::event::{Event, EventId, Payload, Rejection};
use crate::position::{Position, Snapshot, Window};

/// After events came, more are expected: look again this soon, then less and less often.
const INTERVAL_MIN: Duration = Duration::from_millis(1);

/// Rows that may wait between SQLite's thread and the decoding: few, because a row may be many megabytes.
const ROWS_AHEAD: usize = 16;

/// Reads the outbox of one file for one pipeline.
pub struct SqliteSource {
    options: SqliteConnectOptions,
    connection: Option<SqliteConnection>,
    at: Position,
    poll_interval: Duration,
    interval: Duration,
    looked_at: Instant,
    /// Whether it was told that ids began anew.
    told: bool,
}

impl SqliteSource {
    /// A source that opens the file when it is first used; `poll_interval` is the longest time without looking at it.
    ///
    /// The file has to be there and to be migrated: a source creates nothing.
    #[must_use]
    pub fn new(options: SqliteConnectOptions, poll_interval: Duration) -> Self {
        Self {
            options: options
                .create_if_missing(false)
                .pragma("query_only", "on")
                .row_buffer_size(ROWS_AHEAD)
                .disable_statement_logging(),
            connection: None,
            at: Position::beginning(),
            poll_interval,
            interval: INTERVAL_MIN,
            looked_at: Instant::now(),
            told: false,
        }
    }

    /// Says once that ids began anew. A trigger gives new events ids above what the cursors have passed.
    fn note_reset(&mut self, newest: EventId) {
        let passed = self.at.window.next_floor;
        let began_anew = newest < passed;
        if began_anew && !self.told {
            tracing::error!(
                newest = newest.0,
                passed = passed.0,
                "the ids of outbox_events began anew (the rows were deleted, and sqlite_sequence was reset): new events get \
                 ids above {passed}"
            );
        }
        self.told = began_anew;
    }

    async fn read(&mut self, limits: PageLimits) -> Result<Page, anyhow::Error> {
        // Put back only after success: what a failure leaves behind is closed.
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => connect(&self.options).await?,
        };
        let opens = self.at.at_end_of_window();
        let (window, after) = if opens {
            let newest = newest_id(&mut connection).await?;
            self.note_reset(newest);
            let window = window_after(&self.at.window, newest);
            let floor = window.floor;
            (Arc::new(window), floor)
        } else {
            let after = self.at.last_id.max(self.at.window.floor);
            (self.at.window.clone(), after)
        };
        if after == window.ceiling {
            self.connection = Some(connection);
            // The position stays as it is: nothing new is nothing to write down.
            return Ok(Page {
                events: Vec::new(),
                end: self.at.clone(),
                more: false,
            });
        }
        let events = fetch(&mut connection, after, window.ceiling, limits).await?;
        self.connection = Some(connection);
        ensure!(
            events.is_sorted_by(|a, b| a.id < b.id),
            "the page after id {after} is out of order"
        );
        let last_id = events.last().map_or(window.ceiling, |event| event.id);
        let end = Position { window, last_id };
        // A window that was opened by an earlier page says nothing about what was written since.
        let more = !(opens && end.at_end_of_window());
        self.at = end.clone();
        Ok(Page { events, end, more })
    }
}

impl Source for SqliteSource {
    fn seek(&mut self, position: Position) {
        self.at = position;
    }

    async fn capture(
        &mut self,
        limits: PageLimits,
        _acknowledged: &Position,
    ) -> Result<Page, SourceError> {
        self.looked_at = Instant::now();
        let page = self.read(limits).await.map_err(classify)?;
        if !page.events.is_empty() {
            self.interval = INTERVAL_MIN;
        }
        Ok(page)
    }

    async fn wake(&mut self) {
        sleep_until(self.looked_at + self.interval.min(self.poll_interval)).await;
        self.interval = (self.interval * 2).min(self.poll_interval);
    }
}

/// Ids below the floor are never looked at again; where ids began anew, no event gets one there.
fn window_after(before: &Window, newest: EventId) -> Window {
    let ceiling = newest.max(before.next_floor);
    Window {
        prev: Snapshot::nothing(),
        cur: Snapshot::nothing(),
        floor: before.next_floor,
        ceiling,
        next_floor: ceiling,
    }
}

/// The newest id that was ever committed, 0 before the first.
///
/// From the sequence, because retention may have deleted the row, and from the table, because the sequence falls behind where
/// a person has set it back.
pub(crate) async fn newest_id(connection: &mut SqliteConnection) -> Result<EventId, anyhow::Error> {
    sqlx::query_scalar(
        "select max(coalesce((select seq from sqlite_sequence where name = 'outbox_events'), 0),
                    coalesce((select max(id) from outbox_events), 0))",
    )
    .fetch_one(connection)
    .await
    .map(EventId)
    .context("read the newest id of outbox_events")
}

/// The page is cut before it is read, so that no more than its bytes come into memory: the sizes of its rows are known
/// without reading the long ones. Two bounded scans of the primary key.
fn page() -> String {
    format!(
        "select {columns} from outbox_events e
 where id > ?1
   and id <= (
    select coalesce(max(id) filter (where bytes <= ?4), min(id))
      from (
        select id, sum(bytes) over (order by id rows unbounded preceding) as bytes
          from (
            select id,
                   ?5 + octet_length(aggregate_type) + octet_length(aggregate_id) + octet_length(event_type)
                      + coalesce(octet_length(payload), 0) + coalesce(octet_length(payload_bytes), 0)
                      + coalesce(octet_length(content_type), 0) + coalesce(octet_length(headers), 0) as bytes
              from outbox_events
             where id > ?1 and id <= ?2
             order by id
             limit ?3)))
 order by id",
        columns = columns()
    )
}

/// What becomes an event `e`. Of one that is too large only the size is read, and of its names what is within that bound.
fn columns() -> String {
    // Of a text, `substr` ends at U+0000.
    let name = |column: &str| {
        format!(
            "iif(octet_length(e.{column}) > {EVENT_BYTES_MAX}, substr(e.{column}, 1, 1000), e.{column})"
        )
    };
    let content = |column: &str| {
        format!("iif(octet_length(e.{column}) > {EVENT_BYTES_MAX}, null, e.{column})")
    };
    format!(
        "e.id, e.event_id, {}, {}, {}, {}, {}, {}, {}, e.occurred_at,
        octet_length(e.aggregate_type) + octet_length(e.aggregate_id) + octet_length(e.event_type)
        + coalesce(octet_length(e.payload), 0) + coalesce(octet_length(e.payload_bytes), 0)
        + coalesce(octet_length(e.content_type), 0) + coalesce(octet_length(e.headers), 0)",
        name("aggregate_type"),
        name("aggregate_id"),
        name("event_type"),
        content("payload"),
        content("payload_bytes"),
        name("content_type"),
        content("headers"),
    )
}

async fn fetch(
    connection: &mut SqliteConnection,
    after: EventId,
    ceiling: EventId,
    limits: PageLimits,
) -> Result<Vec<Event>, anyhow::Error> {
    let number = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
    sqlx::query(AssertSqlSafe(page()))
        .bind(after.0)
        .bind(ceiling.0)
        .bind(number(limits.rows.max(1)))
        .bind(number(limits.bytes))
        .bind(number(size_of::<Event>()))
        .fetch(connection)
        .map_err(anyhow::Error::from)
        .and_then(|row| std::future::ready(event(&row)))
        .try_collect()
        .await
        .context("read the outbox")
}

fn event(row: &SqliteRow) -> Result<Event, anyhow::Error> {
    let id: i64 = row.try_get_unchecked(0)?;
    let text = |column| Ok::<_, anyhow::Error>(bytes(row, column)?.map(text));
    let event_id = Uuid::try_parse_ascii(bytes(row, 1)?.unwrap_or_default())
        .with_context(|| format!("decode event_id of event {id}"))?;
    let size: i64 = row.try_get_unchecked(10)?;
    let size = usize::try_from(size).unwrap_or_default();
    let payload = bytes(row, 5)?.map(Bytes::copy_from_slice);
    let payload_bytes = bytes(row, 6)?.map(Bytes::copy_from_slice);
    Ok(Event {
        id: EventId(id),
        event_id,
        aggregate_type: text(2)?.unwrap_or_default(),
        aggregate_id: text(3)?.unwrap_or_default(),
        event_type: text(4)?.unwrap_or_default(),
        payload: match (payload, payload_bytes) {
            _ if size > EVENT_BYTES_MAX => {
                Payload::Unread(Rejection(too_large(size, EVENT_BYTES_MAX)))
            }
            (None, None) => Payload::Tombstone,
            (Some(json), None) => Payload::Json(json),
            (None, Some(encoded)) => Payload::Encoded(encoded),
            (Some(json), Some(encoded)) => Payload::Ambiguous(json, encoded),
        },
        content_type: text(7)?,
        headers: text(8)?,
        occurred_at_us: row.try_get_unchecked(9)?,
    })
}

fn bytes(row: &SqliteRow, column: usize) -> Result<Option<&[u8]>, anyhow::Error> {
    Ok(row.try_get_unchecked(column)?)
}

/// SQLite checks no encoding. One text that is not UTF-8 must not stop the log: what can't be read is replaced, the same
/// way each time, so that an entity stays one entity. Payloads are not touched.
fn text(bytes: &[u8]) -> ByteString {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.into(),
        Err(_) => String::from_utf8_lossy(bytes).into_owned().into(),
    }
}

/// Opens the file.
///
/// # Errors
/// When it is not there or can't be read; the message names it.
pub(crate) async fn connect(
    options: &SqliteConnectOptions,
) -> Result<SqliteConnection, anyhow::Error> {
    SqliteConnection::connect_with(options)
        .await
        .with_context(|| {
            format!(
                "open the SQLite file {}",
                options.get_filename().to_string_lossy()
            )
        })
}

/// A lock, a full disk or an I/O error goes away by itself; what the file or the table is, is for a person.
///
/// Codes: SQLite documentation, "Result and Error Codes"; the low byte is the primary one.
fn classify(error: anyhow::Error) -> SourceError {
    let cause = error
        .chain()
        .find_map(|cause| cause.downcast_ref::<sqlx::Error>());
    let transient = match cause {
        Some(sqlx::Error::Database(error)) => {
            let code = error.code().and_then(|code| code.parse::<u32>().ok());
            // Aborted, busy, locked, out of memory, interrupted, I/O, full, locking protocol, schema changed.
            matches!(
                code.map(|code| code & 0xff),
                Some(4..=7 | 9 | 10 | 13 | 15 | 17)
            )
        }
        Some(sqlx::Error::ColumnDecode { .. }) | None => false,
        Some(_) => true,
    };
    if transient {
        SourceError::Transient(error)
    } else {
        SourceError::Misconfigured(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_window_begins_where_the_last_one_ended() {
        let first = window_after(&Window::beginning(), EventId(7));
        assert_eq!((first.floor, first.ceiling), (EventId(0), EventId(7)));
        let second = window_after(&first, EventId(9));
        assert_eq!((second.floor, second.ceiling), (EventId(7), EventId(9)));
    }

    #[test]
    fn ids_that_began_anew_are_waited_for_above_the_floor() {
        let before = window_after(&Window::beginning(), EventId(7));
        let window = window_after(&before, EventId(2));
        assert_eq!((window.floor, window.ceiling), (EventId(7), EventId(7)));
    }

    #[test]
    fn a_text_that_is_not_utf8_is_replaced_and_not_refused() {
        assert_eq!(text("zażółć".as_bytes()), "zażółć");
        assert_eq!(text(b"a\xffb"), "a\u{fffd}b");
    }

    #[tokio::test]
    async fn a_missing_file_is_for_a_person_and_is_not_created() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("missing.db");
        let options = SqliteConnectOptions::new()
            .filename(&file)
            .create_if_missing(true);
        let mut source = SqliteSource::new(options, Duration::from_secs(1));
        let limits = PageLimits { rows: 1, bytes: 1 };
        let error = source.capture(limits, &Position::beginning()).await;
        assert!(matches!(error, Err(SourceError::Misconfigured(_))));
        assert!(!file.exists());
    }
}
