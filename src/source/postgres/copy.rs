//! Decodes PostgreSQL's binary copy format into events. Pure: bytes in, rows out.
//!
//! Format: PostgreSQL documentation, "COPY", section "Binary Format": an 11-byte signature, flags and extension length
//! once, then per tuple a 16-bit field count and per field a 32-bit length (-1 for null) and the bytes. The server puts
//! each tuple into a message of its own; the first also carries the signature.

use anyhow::{Context, anyhow, ensure};
use bytes::{Buf, Bytes};
use bytestring::ByteString;
use uuid::Uuid;

use crate::event::{Event, EventId, Payload};

const SIGNATURE: &[u8] = b"PGCOPY\n\xff\r\n\0";
const FIELDS: i16 = 10;
/// PostgreSQL counts time from 2000-01-01, Unix from 1970-01-01.
const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;

/// Decodes the messages of one answer. Public for the bench that counts what an event costs.
#[derive(Default)]
pub struct Decoder {
    started: bool,
}

impl Decoder {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Decodes one message; none for the end mark.
    ///
    /// # Errors
    /// When it is not what the format or the table asks for.
    pub fn decode(&mut self, mut message: Bytes) -> Result<Option<Event>, anyhow::Error> {
        if !self.started {
            ensure!(
                message.starts_with(SIGNATURE),
                "the copy stream has no signature"
            );
            message.advance(SIGNATURE.len());
            message.try_get_u32().context("read the copy flags")?;
            let extension = message.try_get_u32().context("read the copy extension")?;
            ensure!(extension == 0, "unknown copy extension");
            self.started = true;
        }
        if !message.has_remaining() {
            return Ok(None);
        }
        match message.try_get_i16().context("read a tuple")? {
            -1 => Ok(None),
            FIELDS => row(&mut message).map(Some),
            other => Err(anyhow!("a tuple of {other} fields, expected {FIELDS}")),
        }
    }
}

fn row(message: &mut Bytes) -> Result<Event, anyhow::Error> {
    let id = number(message).context("decode id")?;
    let id = id.context("id is null")?;
    let event_id = uuid(message).context("decode event_id")?;
    let event_id = event_id.context("outbox.events has a row without event_id")?;
    Ok(Event {
        id: EventId(id),
        event_id,
        aggregate_type: text(message)?.unwrap_or_default(),
        aggregate_id: text(message)?.unwrap_or_default(),
        event_type: text(message)?.unwrap_or_default(),
        payload: match (field(message)?, field(message)?) {
            (None, None) => Payload::Tombstone,
            (Some(json), None) => Payload::Json(json),
            (None, Some(encoded)) => Payload::Encoded(encoded),
            (Some(json), Some(encoded)) => Payload::Ambiguous(json, encoded),
        },
        content_type: text(message)?,
        headers: text(message)?,
        occurred_at_us: number(message)
            .context("decode occurred_at")?
            .map_or(0, |us| us.saturating_add(POSTGRES_EPOCH_US)),
    })
}

/// How long the next field is, which is there in full; none for null.
fn length(message: &mut Bytes) -> Result<Option<usize>, anyhow::Error> {
    let length = message.try_get_i32().context("read a field's length")?;
    let Ok(length) = usize::try_from(length) else {
        return Ok(None);
    };
    ensure!(length <= message.remaining(), "a field is cut short");
    Ok(Some(length))
}

/// Shares the message's memory.
fn field(message: &mut Bytes) -> Result<Option<Bytes>, anyhow::Error> {
    Ok(length(message)?.map(|length| message.split_to(length)))
}

fn number(message: &mut Bytes) -> Result<Option<i64>, anyhow::Error> {
    Ok(sized(message)?.map(i64::from_be_bytes))
}

fn uuid(message: &mut Bytes) -> Result<Option<Uuid>, anyhow::Error> {
    Ok(sized(message)?.map(Uuid::from_bytes))
}

/// A column that somebody gave another type shows itself by its length.
fn sized<const N: usize>(message: &mut Bytes) -> Result<Option<[u8; N]>, anyhow::Error> {
    let Some(length) = length(message)? else {
        return Ok(None);
    };
    ensure!(length == N, "it has {length} bytes, expected {N}");
    let mut bytes = [0; N];
    message.copy_to_slice(&mut bytes);
    Ok(Some(bytes))
}

fn text(message: &mut Bytes) -> Result<Option<ByteString>, anyhow::Error> {
    field(message)?
        .map(|bytes| ByteString::try_from(bytes).context("a text of the outbox is not UTF-8"))
        .transpose()
}
