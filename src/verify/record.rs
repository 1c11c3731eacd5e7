//! Recognises a record: which event it says it is, in each of the formats. Pure.

use std::borrow::Cow;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::expect::Fingerprint;
use crate::config::RecordFormat;

/// A record as the auditor keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    /// None when it says nothing that could be an event.
    pub(super) identity: Option<Identity>,
    pub(super) key: Fingerprint,
    pub(super) value: Fingerprint,
}

/// Which event a record says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) event_id: Uuid,
    /// Its place in the log.
    pub(super) sequence: i64,
}

/// Reads one record. `header` finds the value of a header by its name.
pub(super) fn read<'a>(
    format: RecordFormat,
    header: impl Fn(&str) -> Option<&'a [u8]>,
    key: Option<&[u8]>,
    value: Option<&[u8]>,
) -> Seen {
    let named = |id: &str, sequence: &str| identity(header(id)?, header(sequence)?);
    let (identity, value) = match (format, value) {
        (RecordFormat::Plain, value) => (named("id", "sequence"), Fingerprint::of(value)),
        // A tombstone can't be wrapped.
        (RecordFormat::CloudeventsBinary, value)
        | (RecordFormat::CloudeventsJson, value @ None) => {
            (named("ce_id", "ce_sequence"), Fingerprint::of(value))
        }
        (RecordFormat::CloudeventsJson, Some(value)) => wrapped(value),
    };
    Seen {
        identity,
        key: Fingerprint::of(key),
        value,
    }
}

fn identity(event_id: &[u8], sequence: &[u8]) -> Option<Identity> {
    Some(Identity {
        event_id: Uuid::try_parse_ascii(event_id).ok()?,
        sequence: std::str::from_utf8(sequence).ok()?.parse().ok()?,
    })
}

/// Source: CloudEvents 1.0, "JSON Event Format".
#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow)]
    id: Cow<'a, str>,
    #[serde(borrow)]
    sequence: Cow<'a, str>,
    #[serde(borrow, default, deserialize_with = "present")]
    data: Option<&'a RawValue>,
    #[serde(borrow)]
    data_base64: Option<Cow<'a, str>>,
}

/// `null` is a payload too.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

fn wrapped(value: &[u8]) -> (Option<Identity>, Fingerprint) {
    let Ok(envelope) = serde_json::from_slice::<Envelope<'_>>(value) else {
        return (None, Fingerprint::of(Some(value)));
    };
    let decoded = envelope
        .data_base64
        .and_then(|text| BASE64_STANDARD.decode(&*text).ok());
    let data = envelope.data.map(|data| data.get().as_bytes());
    (
        identity(envelope.id.as_bytes(), envelope.sequence.as_bytes()),
        Fingerprint::of(data.or(decoded.as_deref())),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0191f3a0-1111-4222-8333-444455556666";

    type Case<'a> = (
        RecordFormat,
        &'a [(&'a str, &'a str)],
        Option<String>,
        Option<&'a [u8]>,
    );

    fn headers<'a>(pairs: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<&'a [u8]> {
        |name| {
            let (_, value) = pairs.iter().find(|(n, _)| *n == name)?;
            Some(value.as_bytes())
        }
    }

    fn found() -> Identity {
        Identity {
            event_id: Uuid::parse_str(ID).unwrap(),
            sequence: 7,
        }
    }

    #[test]
    fn every_format_says_which_event_it_is() {
        let json = |data: &str| format!("{{\"id\":\"{ID}\",\"sequence\":\"7\",{data}}}");
        let plain = [("id", ID), ("sequence", "7")];
        let binary = [("ce_id", ID), ("ce_sequence", "7")];
        let cases: [Case<'_>; 7] = [
            (
                RecordFormat::Plain,
                &plain,
                Some("x".to_owned()),
                Some(b"x"),
            ),
            (RecordFormat::Plain, &plain, None, None),
            (
                RecordFormat::CloudeventsBinary,
                &binary,
                Some("x".to_owned()),
                Some(b"x"),
            ),
            (RecordFormat::CloudeventsJson, &binary, None, None),
            (
                RecordFormat::CloudeventsJson,
                &[],
                Some(json("\"data\": {\"n\":  1}")),
                Some(b"{\"n\":  1}"),
            ),
            (
                RecordFormat::CloudeventsJson,
                &[],
                Some(json("\"data\":null")),
                Some(b"null"),
            ),
            (
                RecordFormat::CloudeventsJson,
                &[],
                Some(json("\"data_base64\":\"AP8=\"")),
                Some(b"\0\xff"),
            ),
        ];
        for (format, pairs, value, body) in cases {
            let seen = read(
                format,
                headers(pairs),
                Some(b"k"),
                value.as_deref().map(str::as_bytes),
            );
            let expected = Seen {
                identity: Some(found()),
                key: Fingerprint::of(Some(b"k")),
                value: Fingerprint::of(body),
            };
            assert_eq!(seen, expected, "{format:?} {value:?}");
        }
    }

    #[test]
    fn what_is_no_event_is_not_taken_for_one() {
        let half: [&[(&str, &str)]; 4] = [
            &[],
            &[("id", ID)],
            &[("id", "17"), ("sequence", "7")],
            &[("id", ID), ("sequence", "seven")],
        ];
        for pairs in half {
            let seen = read(RecordFormat::Plain, headers(pairs), None, Some(b"x"));
            assert_eq!(seen.identity, None, "{pairs:?}");
        }
        let seen = read(
            RecordFormat::CloudeventsJson,
            headers(&[]),
            None,
            Some(b"{}"),
        );
        assert_eq!(seen.identity, None);
    }
}
