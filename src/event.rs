//! The words that every stage shares: an event of the log, the record made of it, and the names of things.
//!
//! Never does I/O and knows no stage; everything else may use this module.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use bytestring::ByteString;
use uuid::Uuid;

/// The place of an event in the log: a positive number from a sequence, unique, not gapless.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EventId(pub i64);

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Names one event for good. After the sequence was reset an id comes again, for another event: the uuid is the identity,
/// the id is its place in the log and what operators type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EventKey {
    /// Its place in the log.
    pub id: EventId,
    /// Its identity.
    pub event_id: Uuid,
}

/// The number of an event within one life of the loop, counted from 0 without gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Seq(pub u64);

/// One committed row of the outbox.
///
/// The texts and payloads are slices of the buffer that came from the database: cloning is cheap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Its place in the log.
    pub id: EventId,
    /// What consumers deduplicate by.
    pub event_id: Uuid,
    /// The kind of entity, by default the topic.
    pub aggregate_type: ByteString,
    /// The entity, by default the key.
    pub aggregate_id: ByteString,
    /// What happened to it.
    pub event_type: ByteString,
    /// The body.
    pub payload: Payload,
    /// The media type of the payload, where the writer named one.
    pub content_type: Option<ByteString>,
    /// A JSON object of strings, as it was written; checked when the event is encoded.
    pub headers: Option<ByteString>,
    /// When the writer emitted it, in microseconds since the Unix epoch.
    pub occurred_at_us: i64,
}

impl Event {
    /// Which event this is.
    #[must_use]
    pub fn key(&self) -> EventKey {
        EventKey {
            id: self.id,
            event_id: self.event_id,
        }
    }

    /// Bytes that this event holds in memory, about.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        let text = |text: &Option<ByteString>| text.as_ref().map_or(0, |text| text.len());
        size_of::<Self>()
            + self.aggregate_type.len()
            + self.aggregate_id.len()
            + self.event_type.len()
            + self.payload.bytes().map_or(0, <[u8]>::len)
            + text(&self.content_type)
            + text(&self.headers)
    }
}

/// The body of an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// No body: on a compacted topic this deletes the key.
    Tombstone,
    /// JSON text, exactly as the writer wrote it.
    Json(Bytes),
    /// Bytes that the writer encoded (Avro, Protobuf).
    Encoded(Bytes),
    /// Both columns are set. The table's constraint forbids it; a table without the constraint can hold it.
    Ambiguous(Bytes, Bytes),
    /// The content was left in the log, for this reason: the event is rejected.
    Unread(Rejection),
}

impl Payload {
    /// The bytes of the body, none for a tombstone.
    #[must_use]
    pub fn bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Json(bytes) | Self::Encoded(bytes) => Some(bytes),
            Self::Tombstone | Self::Ambiguous(..) | Self::Unread(_) => None,
        }
    }
}

/// The name and the value of one header of a record.
pub type RecordHeader<'a> = (Cow<'a, str>, Option<Cow<'a, [u8]>>);

/// What is handed over to a sink: an event after routing and encoding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// Where it goes.
    pub topic: Cow<'a, str>,
    /// What the broker partitions by.
    pub key: Option<Cow<'a, [u8]>>,
    /// The body; none is a tombstone.
    pub value: Option<Cow<'a, [u8]>>,
    /// Names and values in order. A value that is absent is not the same as an empty one.
    pub headers: Vec<RecordHeader<'a>>,
    /// Milliseconds since the Unix epoch.
    pub timestamp_ms: i64,
}

impl Record<'_> {
    /// What the record takes in a batch before compression, rounded up: Kafka's limits are checked against this.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        /// Length, attributes, timestamp and offset deltas, and the batch's own head, at their longest.
        const OVERHEAD: usize = 61 + 5 + 1 + 10 + 5 + 5 + 5 + 5;
        let headers: usize = self
            .headers
            .iter()
            .map(|(name, value)| 10 + name.len() + value.as_ref().map_or(0, |v| v.len()))
            .sum();
        OVERHEAD
            + headers
            + self.key.as_ref().map_or(0, |key| key.len())
            + self.value.as_ref().map_or(0, |value| value.len())
    }
}

/// The name of a pipeline: 1 to 63 of `a-z`, `0-9`, `_` and `-`, starting with a letter.
///
/// So narrow that it can stand in SQL, metric labels and file names as it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PipelineName(String);

impl PipelineName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PipelineName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for PipelineName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let starts = text.starts_with(|c: char| c.is_ascii_lowercase());
        let inside = text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_' || b == b'-');
        if starts && inside && text.len() <= 63 {
            Ok(Self(text.to_owned()))
        } else {
            Err(format!(
                "{text:?} is not a pipeline name: 1 to 63 of a-z, 0-9, _ and -, starting with a letter"
            ))
        }
    }
}

/// One of the parts that the entities of a pipeline are spread over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shard {
    /// Which one, from 0 on.
    pub index: u32,
    /// How many there are.
    pub count: u32,
}

impl Shard {
    /// More would be more connections and producers than parallel work.
    pub const COUNT_MAX: u32 = 64;

    /// The only one.
    #[must_use]
    pub const fn whole() -> Self {
        Self { index: 0, count: 1 }
    }
}

/// Why an event can't be published, in words for the operator; never holds payloads or keys.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Rejection(pub String);

impl Rejection {
    /// A rejection with this reason.
    pub fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }
}

/// An entity that waits behind a parked event.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HeldEntity {
    /// The kind of entity.
    pub aggregate_type: String,
    /// The entity.
    pub aggregate_id: String,
    /// Its first parked event.
    pub first: EventId,
    /// Its last parked event.
    pub last: EventId,
    /// How many of its events are parked.
    pub events: usize,
    /// Whether the cursor has passed one of them: then every event of the entity that comes out of the log is a later one,
    /// whatever its id.
    pub is_passed: bool,
}

/// Where a new pipeline begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// At the oldest event that is retained.
    Earliest,
    /// With what commits from now on.
    Latest,
    /// At the first event that occurred at or after this time, in microseconds since the Unix epoch.
    Time(i64),
    /// At the event with this id. For a pipeline that an operator moves; no setting says it.
    Event(EventId),
}
