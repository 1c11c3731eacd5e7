//! Decodes the rows of a page into events. Pure: fields in, events out.
//!
//! Pages come by the simple protocol, whose fields are text: numbers in digits, the payload's JSON as it is, `payload_bytes`
//! in hexadecimal digits, and the time as the eight bytes of its binary form in hexadecimal digits, because no setting of a
//! session changes that. A row with a field that has no meaning is an event all the same: it is rejected, and the log goes on.

use std::fmt::Write;

use anyhow::{Context, anyhow};
use bytes::{Bytes, BytesMut};
use bytestring::ByteString;
use uuid::Uuid;

use crate::event::{Event, EventId, Payload, Rejection};
use crate::source::too_large;

/// The columns of a page.
pub const FIELDS: usize = 12;

/// The fields of a row in the order of the page's columns; none for null.
pub type Fields<'a> = [Option<&'a [u8]>; FIELDS];

/// PostgreSQL counts time from 2000-01-01, Unix from 1970-01-01.
const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;
/// Texts and payloads of several events share a buffer of this size.
const BUFFER_BYTES: usize = 64 << 10;

/// A row of the log.
#[derive(Debug, PartialEq, Eq)]
#[expect(
    clippy::large_enum_variant,
    reason = "nearly every row is an event, and it is moved on at once"
)]
pub enum Row {
    /// An event, with its content or with the reason why that was left in the log.
    Event(Event),
    /// An aggregate type, aggregate id, event type or content type is so long that the server was told not to send it.
    LongNames(EventId),
}

/// Decodes the rows of one page. Public for the program that counts what an event costs.
pub struct Decoder {
    event_bytes_max: usize,
    buffer: BytesMut,
}

impl Decoder {
    /// A decoder that leaves the content of events above this many bytes in the log.
    #[must_use]
    pub fn new(event_bytes_max: usize) -> Self {
        Self {
            event_bytes_max,
            buffer: BytesMut::new(),
        }
    }

    /// Decodes one row.
    ///
    /// # Errors
    /// When the first field is not an id.
    pub fn decode(&mut self, fields: &Fields<'_>) -> Result<Row, anyhow::Error> {
        let [
            id,
            event_id,
            aggregate_type,
            aggregate_id,
            event_type,
            json,
            encoded,
            content_type,
            headers,
            occurred_at,
            bytes,
            _xid,
        ] = *fields;
        let id = EventId(number(id).context("decode the id of an event")?);
        let (Some(aggregate_type), Some(aggregate_id), Some(event_type)) =
            (aggregate_type, aggregate_id, event_type)
        else {
            return Ok(Row::LongNames(id));
        };
        let mut flaw = None;
        let payload = match self.payload(json, encoded) {
            Ok(payload) => payload,
            Err(error) => {
                flaw = Some(error.to_string());
                Payload::Tombstone
            }
        };
        let mut event = Event {
            id,
            event_id: uuid(event_id).unwrap_or_else(|| {
                flaw = Some("event_id is missing".to_owned());
                stand_in(id)
            }),
            aggregate_type: self.text(aggregate_type, "aggregate_type", &mut flaw),
            aggregate_id: self.text(aggregate_id, "aggregate_id", &mut flaw),
            event_type: self.text(event_type, "event_type", &mut flaw),
            payload,
            content_type: content_type.map(|text| self.text(text, "content_type", &mut flaw)),
            headers: headers.map(|text| self.text(text, "headers", &mut flaw)),
            occurred_at_us: time(occurred_at).unwrap_or_else(|| {
                flaw = Some("occurred_at is missing".to_owned());
                0
            }),
        };
        let bytes = bytes.and_then(|digits| usize::try_from(number(Some(digits)).ok()?).ok());
        if let Some(bytes) = bytes.filter(|bytes| *bytes > self.event_bytes_max) {
            flaw = Some(too_large(bytes, self.event_bytes_max));
        }
        if let Some(flaw) = flaw {
            event.payload = Payload::Unread(Rejection(flaw));
        }
        Ok(Row::Event(event))
    }

    fn payload(
        &mut self,
        json: Option<&[u8]>,
        encoded: Option<&[u8]>,
    ) -> Result<Payload, anyhow::Error> {
        let encoded = encoded.map(|digits| self.digits(digits)).transpose()?;
        let json = json.map(|json| self.keep(json));
        Ok(match (json, encoded) {
            (None, None) => Payload::Tombstone,
            (Some(json), None) => Payload::Json(json),
            (None, Some(encoded)) => Payload::Encoded(encoded),
            (Some(json), Some(encoded)) => Payload::Ambiguous(json, encoded),
        })
    }

    fn keep(&mut self, bytes: &[u8]) -> Bytes {
        self.room(bytes.len());
        self.buffer.extend_from_slice(bytes);
        self.buffer.split().freeze()
    }

    fn digits(&mut self, digits: &[u8]) -> Result<Bytes, anyhow::Error> {
        self.room(digits.len() / 2);
        let (pairs, rest) = digits.as_chunks::<2>();
        for pair in pairs {
            let [Some(high), Some(low)] = pair.map(digit) else {
                self.buffer.clear();
                return Err(anyhow!("payload_bytes came as something else than digits"));
            };
            self.buffer.extend_from_slice(&[high << 4 | low]);
        }
        if !rest.is_empty() {
            self.buffer.clear();
            return Err(anyhow!("payload_bytes came cut short"));
        }
        Ok(self.buffer.split().freeze())
    }

    /// The buffer of a large value is its own.
    fn room(&mut self, bytes: usize) {
        if self.buffer.capacity() < bytes {
            self.buffer = BytesMut::with_capacity(bytes.max(BUFFER_BYTES));
        }
    }

    /// A text that is not UTF-8 gets its other bytes as `\xff`, the same way each time, so that an entity stays one entity.
    fn text(&mut self, bytes: &[u8], column: &str, flaw: &mut Option<String>) -> ByteString {
        if let Ok(text) = ByteString::try_from(self.keep(bytes)) {
            return text;
        }
        *flaw = Some(format!("{column} is not UTF-8"));
        escaped(bytes).into()
    }
}

/// Stands for an `event_id` that the table has no value of.
pub(super) fn stand_in(id: EventId) -> Uuid {
    Uuid::from_u128(u128::from(id.0.unsigned_abs()))
}

/// A text with every byte that is not UTF-8 as `\xff`.
pub(super) fn escaped(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        for byte in chunk.invalid() {
            // Writing to a string can't fail.
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

/// The bytes of hexadecimal digits.
pub(super) fn from_digits(digits: &[u8]) -> Option<Vec<u8>> {
    let (pairs, rest) = digits.as_chunks::<2>();
    let bytes = pairs
        .iter()
        .map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?));
    rest.is_empty().then(|| bytes.collect())?
}

fn digit(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

/// The transaction that wrote the row.
///
/// # Errors
/// When the last field is no transaction id.
pub(super) fn xid(fields: &Fields<'_>) -> Result<u64, anyhow::Error> {
    let digits = fields[FIELDS - 1].context("outbox.events has a row without xid")?;
    Ok(std::str::from_utf8(digits)?.parse()?)
}

fn number(digits: Option<&[u8]>) -> Result<i64, anyhow::Error> {
    let digits = std::str::from_utf8(digits.context("it is null")?)?;
    Ok(digits.parse()?)
}

pub(super) fn uuid(text: Option<&[u8]>) -> Option<Uuid> {
    Uuid::try_parse_ascii(text?).ok()
}

/// Microseconds since the Unix epoch; the two infinities are the first and the last moment that there is.
pub(super) fn time(digits: Option<&[u8]>) -> Option<i64> {
    let digits: &[u8; 16] = digits?.try_into().ok()?;
    let mut bits: u64 = 0;
    for value in digits {
        bits = bits << 4 | u64::from(digit(*value)?);
    }
    Some(match bits.cast_signed() {
        i64::MIN => i64::MIN,
        us => us.saturating_add(POSTGRES_EPOCH_US),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "11111111-2222-4333-8444-555555555555";

    fn fields<'a>(of: &'a [Option<&'a str>; FIELDS]) -> Fields<'a> {
        of.map(|field| field.map(str::as_bytes))
    }

    fn some() -> [Option<&'static str>; FIELDS] {
        [
            Some("7"),
            Some(ID),
            Some("order"),
            Some("17"),
            Some("paid"),
            Some("{}"),
            None,
            None,
            None,
            Some("0000000000000001"),
            None,
            Some("3"),
        ]
    }

    fn event(row: Row) -> Event {
        let Row::Event(event) = row else {
            panic!("{row:?}")
        };
        event
    }

    fn why(row: Row) -> String {
        match event(row).payload {
            Payload::Unread(Rejection(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_row_is_an_event() {
        let mut decoder = Decoder::new(100);
        let row = event(decoder.decode(&fields(&some())).unwrap());
        assert_eq!(row.id, EventId(7));
        assert_eq!(row.event_id.to_string(), ID);
        assert_eq!(row.payload, Payload::Json("{}".into()));
        assert_eq!(row.occurred_at_us, 946_684_800_000_001);
        let mut encoded = some();
        (encoded[5], encoded[6]) = (None, Some("00ff1a"));
        let row = event(decoder.decode(&fields(&encoded)).unwrap());
        assert_eq!(row.payload, Payload::Encoded(vec![0, 255, 26].into()));
    }

    #[test]
    fn every_time_of_the_server_is_a_time() {
        let at = |digits: &str| time(Some(digits.as_bytes()));
        assert_eq!(at("7fffffffffffffff"), Some(i64::MAX), "infinity");
        assert_eq!(at("8000000000000000"), Some(i64::MIN), "-infinity");
        assert_eq!(at("fffca2fec4c82000"), Some(0), "1970-01-01");
        assert_eq!(at("x"), None);
    }

    #[test]
    fn what_makes_no_sense_is_rejected_and_named() {
        let mut decoder = Decoder::new(100);
        let mut large = some();
        large[10] = Some("101");
        let row = decoder.decode(&fields(&large)).unwrap();
        assert_eq!(
            why(row),
            "too large: the event has 101 bytes, the relay reads events of 100 bytes at most"
        );
        let mut cut = some();
        (cut[5], cut[6]) = (None, Some("00f"));
        let row = decoder.decode(&fields(&cut)).unwrap();
        assert_eq!(why(row), "payload_bytes came cut short");
        let mut latin = fields(&[None; FIELDS]);
        let whole = some();
        latin.copy_from_slice(&fields(&whole));
        latin[3] = Some(b"caf\xe9");
        let row = event(decoder.decode(&latin).unwrap());
        assert_eq!(row.aggregate_id, "caf\\xe9");
        assert_eq!(
            row.payload,
            Payload::Unread(Rejection("aggregate_id is not UTF-8".into()))
        );
        let mut nameless = some();
        nameless[3] = None;
        let row = decoder.decode(&fields(&nameless)).unwrap();
        assert_eq!(row, Row::LongNames(EventId(7)));
    }
}
