//! One page: its rows are taken off the wire until the page is full, or a row is in the way.

use std::borrow::Cow;
use std::time::Duration;

use anyhow::{Context, anyhow};
use futures_util::{FutureExt, StreamExt};
use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{AssertSqlSafe, Executor, Row as _, ValueRef};
use tokio::time::timeout;

use super::row::{self, Decoder, FIELDS, Fields, Row};
use crate::event::{Event, EventId, Payload, Rejection};
use crate::position::Window;
use crate::source::EVENT_BYTES_MAX;

/// The server may be silent for this long within a statement before the connection is given up as half-open.
pub(super) const SILENCE_MAX: Duration = Duration::from_secs(30);

/// What was read of a page.
pub(super) struct Read {
    pub(super) events: Vec<Event>,
    pub(super) bytes: usize,
    /// Whether the answer was read to its end.
    pub(super) complete: bool,
    /// The event behind the last one, where its names are too long to be sent.
    pub(super) long_names: Option<EventId>,
    /// Whether an event lies where none can be.
    pub(super) contradicted: bool,
}

/// Whether a row lies where the window says that none can be: at or below its floor, and neither of a transaction that was
/// in progress, nor above where those have their ids.
pub(super) fn contradicts(
    window: &Window,
    late_from: EventId,
    id: EventId,
    fields: &Fields<'_>,
) -> Result<bool, anyhow::Error> {
    if id > window.floor {
        return Ok(false);
    }
    Ok(row::xid(fields)? >= window.prev.xmax || id <= late_from)
}

pub(super) fn silent() -> anyhow::Error {
    anyhow!("the database sent nothing for {} s", SILENCE_MAX.as_secs())
}

pub(super) async fn fetch(
    connection: &mut PgConnection,
    statement: &str,
    bytes_max: usize,
    contradicts: impl Fn(EventId, &Fields<'_>) -> Result<bool, anyhow::Error>,
) -> Result<Read, anyhow::Error> {
    let mut read = Read {
        events: Vec::new(),
        bytes: 0,
        complete: false,
        long_names: None,
        contradicted: false,
    };
    let mut answer = connection.fetch(sqlx::raw_sql(AssertSqlSafe(statement.to_owned())));
    let mut decoder = Decoder::new(EVENT_BYTES_MAX);
    loop {
        // Most rows are there already: the clock is asked only for those that are not.
        let next = match answer.next().now_or_never() {
            Some(next) => next,
            None => timeout(SILENCE_MAX, answer.next())
                .await
                .map_err(|_| silent())?,
        };
        let Some(row) = next else { break };
        let row = row.context("read the outbox")?;
        let fields = fields(&row)?;
        let event = match decoder.decode(&fields)? {
            Row::Event(event) => event,
            Row::LongNames(id) => {
                read.long_names = Some(id);
                return Ok(read);
            }
        };
        let bytes = read.bytes + event.size_bytes();
        // One too many is left for the next page; it is read again then.
        if bytes > bytes_max && !read.events.is_empty() {
            return Ok(read);
        }
        read.bytes = bytes;
        read.contradicted |= contradicts(event.id, &fields)?;
        read.events.push(event);
        if bytes >= bytes_max {
            return Ok(read);
        }
    }
    read.complete = true;
    Ok(read)
}

fn fields(row: &PgRow) -> Result<Fields<'_>, anyhow::Error> {
    let mut fields: Fields<'_> = [None; FIELDS];
    for (index, field) in fields.iter_mut().enumerate() {
        *field = field_of(row, index)?;
    }
    Ok(fields)
}

fn field_of(row: &PgRow, index: usize) -> Result<Option<&[u8]>, anyhow::Error> {
    let value = row.try_get_raw(index)?;
    if value.is_null() {
        return Ok(None);
    }
    value
        .as_bytes()
        .map(Some)
        .map_err(|error| anyhow!("field {index}: {error}"))
}

/// An event of which only the names could be read.
pub(super) fn skeleton(row: &PgRow, why: &anyhow::Error) -> Event {
    let field = |index| field_of(row, index).ok().flatten();
    let id = field(0).and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
    let id = EventId(id.unwrap_or_default());
    let name = |index| match field(index) {
        Some([b'~', digest @ ..]) => format!("sha256:{}", String::from_utf8_lossy(digest)),
        Some(digits) => row::escaped(&row::from_digits(digits).unwrap_or_default()),
        None => String::new(),
    };
    Event {
        id,
        event_id: row::uuid(field(1)).unwrap_or_else(|| row::stand_in(id)),
        aggregate_type: name(2).into(),
        aggregate_id: name(3).into(),
        event_type: name(4).into(),
        payload: Payload::Unread(Rejection(crate::reason::reason(why))),
        content_type: None,
        headers: None,
        occurred_at_us: row::time(field(5)).unwrap_or_default(),
    }
}

/// Whether a server's refusal may be about one of the rows: a value that has no meaning (22), is too large for the server
/// to put into an answer (53200, 54), or that it finds broken (XX).
pub(super) fn is_of_a_row(error: &anyhow::Error) -> bool {
    let code = code(error);
    matches!(code.as_deref(), Some("53200"))
        || matches!(
            code.as_deref().and_then(|code| code.get(..2)),
            Some("22" | "54" | "XX")
        )
}

pub(super) fn code(error: &anyhow::Error) -> Option<String> {
    error
        .chain()
        .find_map(|cause| match cause.downcast_ref::<sqlx::Error>() {
            Some(sqlx::Error::Database(error)) => error.code().map(Cow::into_owned),
            _ => None,
        })
}
