//! Makes a record of an event, in one of a closed set of formats. (source → order → route → *encode* → sink)
//!
//! Pure: no I/O, clock, logging or state. The payload is never parsed or rewritten: numbers beyond 2^53, duplicate keys
//! and white space leave as they came.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::io::Write;
use std::marker::PhantomData;
use std::time::{Duration, UNIX_EPOCH};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use uuid::fmt::Hyphenated;

use crate::event::{Event, Payload, Record, RecordHeader, Rejection};
use crate::route::Route;

/// What a record looks like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// The payload as value; `id`, `type`, `sequence` and the event's own headers as headers.
    #[default]
    Plain,
    /// CloudEvents 1.0, Kafka protocol binding, binary content mode: attributes in headers that start with `ce_`.
    CloudeventsBinary,
    /// The same in structured content mode: attributes and payload in one JSON object.
    CloudeventsJson,
}

/// How a pipeline encodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoding {
    /// The format.
    pub format: Format,
    /// The `source` attribute of CloudEvents, a URI reference.
    pub cloudevents_source: String,
}

/// Names that belong to the relay: its own headers, and with `ce_` the attributes of CloudEvents that it sets and the members
/// that CloudEvents in JSON have besides. An event with a header of such a name is rejected; other names that start with `ce_`
/// are extensions. The migrations refuse the same names in the transaction of the writer.
pub const RESERVED_HEADERS: [&str; 15] = [
    "id",
    "type",
    "sequence",
    "content-type",
    "replay",
    "ce_specversion",
    "ce_id",
    "ce_source",
    "ce_type",
    "ce_time",
    "ce_sequence",
    "ce_subject",
    "ce_datacontenttype",
    "ce_data",
    "ce_data_base64",
];

type Headers<'a> = Vec<RecordHeader<'a>>;

/// Texts about an event that do not stand in it: records point to them, so that nothing is allocated for each.
pub struct Texts {
    id: [u8; Hyphenated::LENGTH],
    sequence: [u8; SEQUENCE_BYTES_MAX],
    sequence_bytes: usize,
}

/// Of a 64-bit number with its sign.
const SEQUENCE_BYTES_MAX: usize = 20;

impl Texts {
    /// The texts about one event.
    #[must_use]
    pub fn of(event: &Event) -> Self {
        let mut id = [0; Hyphenated::LENGTH];
        event.event_id.hyphenated().encode_lower(&mut id);
        let mut sequence = [0; SEQUENCE_BYTES_MAX];
        let mut rest = &mut sequence[..];
        write!(rest, "{}", event.id.0).expect("there is room for any number");
        let sequence_bytes = SEQUENCE_BYTES_MAX - rest.len();
        Self {
            id,
            sequence,
            sequence_bytes,
        }
    }

    fn id(&self) -> &[u8] {
        &self.id
    }

    fn sequence(&self) -> &[u8] {
        &self.sequence[..self.sequence_bytes]
    }
}

/// Makes the record of one event.
///
/// # Errors
/// When the event can't be published as it is: no legal topic, unreadable headers, two payloads.
pub fn encode<'a>(
    event: &'a Event,
    texts: &'a Texts,
    route: &'a Route,
    encoding: &'a Encoding,
) -> Result<Record<'a>, Rejection> {
    match &event.payload {
        Payload::Ambiguous(..) => {
            return Err(Rejection::new("payload and payload_bytes are both set"));
        }
        Payload::Unread(rejection) => return Err(rejection.clone()),
        Payload::Tombstone | Payload::Json(_) | Payload::Encoded(_) => {}
    }
    // CloudEvents 1.0: "type" must be a non-empty string.
    if event.event_type.is_empty() && encoding.format != Format::Plain {
        return Err(Rejection::new(
            "CloudEvents have a type, and event_type is empty",
        ));
    }
    let topic = route.topic(event)?;
    let key = match route.key.render(event) {
        Cow::Borrowed(key) => Cow::Borrowed(key.as_bytes()),
        Cow::Owned(key) => Cow::Owned(key.into_bytes()),
    };
    let own = parse_headers(event.headers.as_deref())?;
    if let Some((name, _)) = own
        .iter()
        .find(|(name, _)| RESERVED_HEADERS.contains(&name.as_ref()))
    {
        return Err(Rejection::new(format!(
            "the event has a header {name:?}, a name that belongs to the relay: emit it under another name"
        )));
    }
    let (mut headers, value) = match encoding.format {
        Format::Plain => (
            plain_headers(event, texts, own.len()),
            event.payload.bytes().map(Cow::Borrowed),
        ),
        Format::CloudeventsBinary => (
            cloudevents_headers(event, texts, encoding),
            event.payload.bytes().map(Cow::Borrowed),
        ),
        Format::CloudeventsJson => match cloudevents_json(event, texts, encoding, &own)? {
            Some(json) => (
                vec![text_header("content-type", CLOUDEVENTS_JSON)],
                Some(Cow::Owned(json)),
            ),
            // Nothing can be wrapped and still be a tombstone: the attributes go to the headers.
            None => (cloudevents_headers(event, texts, encoding), None),
        },
    };
    for (name, value) in own {
        headers.push((name, value.map(into_bytes)));
    }
    Ok(Record {
        topic,
        key: Some(key),
        value,
        headers,
        // Kafka knows no time before 1970.
        timestamp_ms: (event.occurred_at_us / 1000).max(0),
    })
}

/// Of an error in a header; the whole one is in the database.
const ERROR_BYTES_MAX: usize = 4096;

/// Makes the copy of an event that can't be published, for the topic of the dead letters: value, key and headers as its
/// record has them, as far as one can be made of it, and what is known about the failure in headers `dead-letter-…`.
#[must_use]
pub fn dead_letter<'a>(
    event: &'a Event,
    texts: &'a Texts,
    (route, encoding): (&'a Route, &'a Encoding),
    (topic, rejection): (&'a str, &'a Rejection),
) -> Record<'a> {
    let mut record =
        encode(event, texts, route, encoding).unwrap_or_else(|_| unencoded(event, texts));
    let Rejection(error) = rejection;
    let error = &error[..error.floor_char_boundary(ERROR_BYTES_MAX)];
    record.headers.extend([
        text_header("dead-letter-error", error),
        // It is redriven from the database, and not copied again.
        text_header("dead-letter-attempts", "1"),
        (
            "dead-letter-topic".into(),
            Some(into_bytes(route.topic.render(event))),
        ),
        text_header("dead-letter-aggregate-type", &event.aggregate_type),
        text_header("dead-letter-aggregate-id", &event.aggregate_id),
    ]);
    record.topic = Cow::Borrowed(topic);
    record
}

/// For what can't be encoded: the payload, and the headers as they were written in one.
fn unencoded<'a>(event: &'a Event, texts: &'a Texts) -> Record<'a> {
    let mut headers = plain_headers(event, texts, 6);
    if let Some(own) = &event.headers {
        headers.push(text_header("dead-letter-headers", own));
    }
    let value = match &event.payload {
        Payload::Ambiguous(json, _) => Some(&json[..]),
        payload => payload.bytes(),
    };
    Record {
        topic: Cow::Borrowed(""),
        key: Some(Cow::Borrowed(event.aggregate_id.as_bytes())),
        value: value.map(Cow::Borrowed),
        headers,
        timestamp_ms: (event.occurred_at_us / 1000).max(0),
    }
}

const CLOUDEVENTS_JSON: &str = "application/cloudevents+json; charset=UTF-8";

fn plain_headers<'a>(event: &'a Event, texts: &'a Texts, own: usize) -> Headers<'a> {
    let mut headers = Vec::with_capacity(4 + own);
    headers.push(("id".into(), Some(texts.id().into())));
    headers.push(text_header("type", &event.event_type));
    headers.push(("sequence".into(), Some(texts.sequence().into())));
    if let Some(content_type) = &event.content_type {
        headers.push(text_header("content-type", content_type));
    }
    headers
}

fn cloudevents_headers<'a>(
    event: &'a Event,
    texts: &'a Texts,
    encoding: &'a Encoding,
) -> Headers<'a> {
    let mut headers = vec![
        text_header("ce_specversion", "1.0"),
        ("ce_id".into(), Some(texts.id().into())),
        text_header("ce_source", &encoding.cloudevents_source),
        text_header("ce_type", &event.event_type),
        (
            "ce_time".into(),
            Some(Cow::Owned(rfc3339(event).into_bytes())),
        ),
        ("ce_sequence".into(), Some(texts.sequence().into())),
    ];
    if !event.aggregate_id.is_empty() {
        headers.push(text_header("ce_subject", &event.aggregate_id));
    }
    if let Some(content_type) = content_type(event) {
        headers.push(text_header("content-type", content_type));
    }
    headers
}

/// Source: CloudEvents 1.0, "JSON Event Format"; `sequence` is the extension of that name.
#[derive(Serialize)]
struct CloudEvent<'a> {
    specversion: &'static str,
    id: Cow<'a, str>,
    source: &'a str,
    r#type: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    subject: &'a str,
    time: String,
    sequence: Cow<'a, str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    datacontenttype: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_base64: Option<String>,
    #[serde(flatten)]
    extensions: BTreeMap<&'a str, &'a str>,
}

fn cloudevents_json(
    event: &Event,
    texts: &Texts,
    encoding: &Encoding,
    own: &[OwnHeader<'_>],
) -> Result<Option<Vec<u8>>, Rejection> {
    let (data, data_base64) = match &event.payload {
        Payload::Tombstone | Payload::Ambiguous(..) | Payload::Unread(_) => return Ok(None),
        Payload::Json(json) => {
            let raw = serde_json::from_slice(json)
                .map_err(|error| Rejection::new(format!("the payload is not JSON: {error}")))?;
            (Some(raw), None)
        }
        Payload::Encoded(bytes) => (None, Some(BASE64_STANDARD.encode(bytes))),
    };
    let envelope = CloudEvent {
        specversion: "1.0",
        id: String::from_utf8_lossy(texts.id()),
        source: &encoding.cloudevents_source,
        r#type: &event.event_type,
        subject: &event.aggregate_id,
        time: rfc3339(event),
        sequence: String::from_utf8_lossy(texts.sequence()),
        datacontenttype: content_type(event),
        data,
        data_base64,
        extensions: own.iter().filter_map(extension).collect(),
    };
    serde_json::to_vec(&envelope)
        .map(Some)
        .map_err(|error| Rejection::new(format!("the event can't be written as JSON: {error}")))
}

/// A header that is an extension attribute, if it can be one in JSON: names are lower-case letters and digits.
fn extension<'a>((name, value): &'a OwnHeader<'_>) -> Option<(&'a str, &'a str)> {
    let name = name.strip_prefix("ce_")?;
    let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let is_name = !name.is_empty() && name.chars().all(legal);
    Some((name, value.as_deref()?)).filter(|_| is_name)
}

fn content_type(event: &Event) -> Option<&str> {
    match (&event.content_type, &event.payload) {
        (Some(content_type), _) => Some(content_type),
        (None, Payload::Json(_)) => Some("application/json"),
        (None, Payload::Encoded(_)) => Some("application/octet-stream"),
        (None, Payload::Tombstone | Payload::Ambiguous(..) | Payload::Unread(_)) => None,
    }
}

fn rfc3339(event: &Event) -> String {
    /// The last microsecond of the year 9999, the last that RFC 3339 can write.
    const MAX_US: u64 = 253_402_300_799_999_999;
    let us = u64::try_from(event.occurred_at_us).unwrap_or(0).min(MAX_US);
    humantime::format_rfc3339_micros(UNIX_EPOCH + Duration::from_micros(us)).to_string()
}

fn text_header<'a>(name: &'static str, value: &'a str) -> RecordHeader<'a> {
    (Cow::Borrowed(name), Some(Cow::Borrowed(value.as_bytes())))
}

fn into_bytes(text: Cow<'_, str>) -> Cow<'_, [u8]> {
    match text {
        Cow::Borrowed(text) => Cow::Borrowed(text.as_bytes()),
        Cow::Owned(text) => Cow::Owned(text.into_bytes()),
    }
}

/// One header of an event: its name, and its value unless that is null.
pub type OwnHeader<'a> = (Cow<'a, str>, Option<Cow<'a, str>>);

/// Reads the headers of an event: a JSON object, in its order, or nothing. A number or a boolean leaves as its JSON text, and null
/// as a header without a value.
///
/// # Errors
/// When it is anything else: not an object, a value that is an object or an array, or a name that is empty or has a zero byte
/// (Kafka's clients can't carry it). The reason names the header.
pub fn parse_headers(json: Option<&str>) -> Result<Vec<OwnHeader<'_>>, Rejection> {
    let Some(json) = json else {
        return Ok(Vec::new());
    };
    // Nearly all headers are texts, which this reads in one pass.
    let headers = match serde_json::from_str::<Object<'_, Option<Text<'_>>>>(json) {
        Ok(Object(headers)) => headers
            .into_iter()
            .map(|(name, value)| (name, value.map(|Text(value)| value)))
            .collect(),
        Err(_) => parse_scalars(json)?,
    };
    match headers
        .iter()
        .find(|(name, _)| name.is_empty() || name.contains('\0'))
    {
        Some((name, _)) => Err(Rejection::new(format!(
            "{name:?} can't be the name of a header"
        ))),
        None => Ok(headers),
    }
}

/// The same for objects that have values other than texts.
fn parse_scalars(json: &str) -> Result<Vec<OwnHeader<'_>>, Rejection> {
    let Object(headers) = serde_json::from_str::<Object<'_, &RawValue>>(json).map_err(|error| {
        Rejection::new(format!(
            "the headers are not a JSON object of texts: {error}"
        ))
    })?;
    headers
        .into_iter()
        .map(|(name, raw)| match raw.get().as_bytes().first() {
            Some(b'{' | b'[') => Err(Rejection::new(format!(
                "the header {name:?} is an object or an array: emit it as a text"
            ))),
            Some(b'"' | b'n') => serde_json::from_str::<Option<Text<'_>>>(raw.get())
                .map(|value| (name, value.map(|Text(value)| value)))
                .map_err(|error| Rejection::new(format!("the headers can't be read: {error}"))),
            _ => Ok((name, Some(Cow::Borrowed(raw.get())))),
        })
        .collect()
}

/// The members of a JSON object in their order; of members with the same name each one.
struct Object<'a, V>(Vec<(Cow<'a, str>, V)>);

impl<'de: 'a, 'a, V: Deserialize<'de>> Deserialize<'de> for Object<'a, V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members<V>(PhantomData<V>);

        impl<'de, V: Deserialize<'de>> Visitor<'de> for Members<V> {
            type Value = Object<'de, V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::with_capacity(map.size_hint().unwrap_or(4));
                while let Some((Text(name), value)) = map.next_entry::<Text<'de>, V>()? {
                    members.push((name, value));
                }
                Ok(Object(members))
            }
        }

        deserializer.deserialize_map(Members(PhantomData))
    }
}

/// A string, borrowed where it has no escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

#[cfg(test)]
#[path = "encode_tests.rs"]
mod tests;
