//! A page of the outbox as PostgreSQL sends it, the same in every run.
//!
//! Nothing of it is stored: the rows are written by the documented format, and a test holds them against what a server
//! sends (`tests/it/bench.rs`).

use std::fmt::Write;

use bytes::{BufMut, Bytes, BytesMut};
use fastrand::Rng;
use outbox_relay::event::{Event, EventId, Payload};
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

const SIGNATURE: &[u8] = b"PGCOPY\n\xff\r\n\0";
const FIELDS: i16 = 10;
const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;
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

/// The messages of one answer: a tuple each, and the end mark. They share a buffer, as they do when they are read.
pub fn messages(events: &[Event]) -> Vec<Bytes> {
    let mut buffer = BytesMut::new();
    buffer.put_slice(SIGNATURE);
    // Flags, and the length of an extension.
    buffer.put_u64(0);
    let mut ends = Vec::with_capacity(events.len() + 1);
    for event in events {
        put_row(&mut buffer, event);
        ends.push(buffer.len());
    }
    buffer.put_i16(-1);
    ends.push(buffer.len());
    let mut begin = 0;
    ends.into_iter()
        .map(|end| {
            buffer
                .split_to(end - std::mem::replace(&mut begin, end))
                .freeze()
        })
        .collect()
}

fn put_row(buffer: &mut BytesMut, event: &Event) {
    buffer.put_i16(FIELDS);
    put_field(buffer, Some(&event.id.0.to_be_bytes()));
    put_field(buffer, Some(event.event_id.as_bytes()));
    put_field(buffer, Some(event.aggregate_type.as_bytes()));
    put_field(buffer, Some(event.aggregate_id.as_bytes()));
    put_field(buffer, Some(event.event_type.as_bytes()));
    let (json, encoded) = match &event.payload {
        Payload::Tombstone => (None, None),
        Payload::Json(json) => (Some(&json[..]), None),
        Payload::Encoded(encoded) => (None, Some(&encoded[..])),
        Payload::Ambiguous(json, encoded) => (Some(&json[..]), Some(&encoded[..])),
    };
    put_field(buffer, json);
    put_field(buffer, encoded);
    put_field(buffer, event.content_type.as_deref().map(str::as_bytes));
    put_field(buffer, event.headers.as_deref().map(str::as_bytes));
    let occurred_at = event.occurred_at_us - POSTGRES_EPOCH_US;
    put_field(buffer, Some(&occurred_at.to_be_bytes()));
}

fn put_field(buffer: &mut BytesMut, field: Option<&[u8]>) {
    match field {
        Some(field) => {
            buffer.put_i32(i32::try_from(field.len()).expect("fields are small"));
            buffer.put_slice(field);
        }
        None => buffer.put_i32(-1),
    }
}
