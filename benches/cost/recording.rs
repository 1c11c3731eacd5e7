//! A page of the outbox as PostgreSQL sends it, the same in every run.
//!
//! Nothing of it is stored: the rows are written as the page's columns are sent, and a test holds them against what a server
//! sends (`tests/it/cost.rs`).

use std::fmt::Write;

use fastrand::Rng;
use outbox_relay::event::{Event, EventId, Payload};
use outbox_relay::source::postgres::row::{FIELDS, Fields};
use uuid::{Builder, Uuid};

/// Of all events, and the name of their topic.
pub const AGGREGATE_TYPE: &str = "event0";
/// Entities that the events are of.
pub const KEYS: u32 = 10_000;
/// Every event has one of so many types, so that a filter for one of them drops 90 %.
pub const EVENT_TYPES: i64 = 10;
/// What a filter lets through.
pub const EVENT_TYPE: &str = "type0";
/// The payload of each event.
pub const PAYLOAD_BYTES: usize = 233;
/// Headers such as services give their events.
pub const HEADERS: &str = r#"{"tenant":"acme","user":"7f3a90d2","traceparent":"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}"#;

const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;
/// Of the transaction that wrote all of them.
const XID: &str = "1000000";
const EMITTED_US: i64 = 1_760_000_000_000_000;

/// Events 1 to `count`, in the shape of the figures: no headers of their own, and no content type.
pub fn events(count: usize) -> Vec<Event> {
    let mut rng = Rng::with_seed(1);
    (1..).take(count).map(|n| event(n, &mut rng)).collect()
}

fn event(n: i64, rng: &mut Rng) -> Event {
    Event {
        id: EventId(n),
        event_id: uuid(rng),
        aggregate_type: AGGREGATE_TYPE.into(),
        aggregate_id: rng.u32(0..KEYS).to_string().into(),
        event_type: format!("type{}", n % EVENT_TYPES).into(),
        payload: Payload::Json(payload(n, rng).into()),
        content_type: None,
        headers: None,
        occurred_at_us: EMITTED_US + n,
    }
}

fn uuid(rng: &mut Rng) -> Uuid {
    Builder::from_random_bytes(rng.u128(..).to_be_bytes()).into_uuid()
}

/// Half of it is text that repeats and half are digits that do not.
fn payload(n: i64, rng: &mut Rng) -> String {
    let mut json = format!(r#"{{"n":{n},"state":"placed","note":""#);
    while json.len() < PAYLOAD_BYTES {
        json.push_str("the customer asks to ring twice ");
        // Writing to a string can't fail.
        let _ = write!(json, "{:032x}", rng.u128(..));
    }
    json.truncate(PAYLOAD_BYTES - 2);
    json + r#""}"#
}

/// A row as its fields are sent; none for null.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedRow(pub [Option<Vec<u8>>; FIELDS]);

impl RecordedRow {
    /// As they are decoded.
    pub fn fields(&self) -> Fields<'_> {
        self.0.each_ref().map(Option::as_deref)
    }
}

/// The rows of one answer.
pub fn rows(events: &[Event]) -> Vec<RecordedRow> {
    events.iter().map(row).collect()
}

fn row(event: &Event) -> RecordedRow {
    let (json, encoded) = match &event.payload {
        Payload::Tombstone | Payload::Unread(_) => (None, None),
        Payload::Json(json) => (Some(&json[..]), None),
        Payload::Encoded(encoded) => (None, Some(&encoded[..])),
        Payload::Ambiguous(json, encoded) => (Some(&json[..]), Some(&encoded[..])),
    };
    let text = |text: &str| Some(text.as_bytes().to_vec());
    let occurred_at = (event.occurred_at_us - POSTGRES_EPOCH_US).cast_unsigned();
    RecordedRow([
        text(&event.id.0.to_string()),
        text(&event.event_id.to_string()),
        text(&event.aggregate_type),
        text(&event.aggregate_id),
        text(&event.event_type),
        json.map(<[u8]>::to_vec),
        encoded.map(|bytes| digits(bytes).into_bytes()),
        event.content_type.as_deref().and_then(text),
        event.headers.as_deref().and_then(text),
        text(&format!("{occurred_at:016x}")),
        None,
        text(XID),
    ])
}

fn digits(bytes: &[u8]) -> String {
    let mut digits = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // Writing to a string can't fail.
        let _ = write!(digits, "{byte:02x}");
    }
    digits
}
