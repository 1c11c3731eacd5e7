//! What the log asks of the topics: the auditor's own reading of filters, templates and formats. Pure.
//!
//! Written a second time on purpose: an auditor that used the relay's own rules would make the relay's own mistakes.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};

use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use uuid::Uuid;

use crate::config::{PipelineConfig, RecordFormat};

/// One committed event, as the auditor reads it from the log.
#[derive(Clone, Debug)]
pub(super) struct Emitted {
    pub(super) id: i64,
    pub(super) event_id: Uuid,
    pub(super) aggregate_type: String,
    pub(super) aggregate_id: String,
    pub(super) event_type: String,
    pub(super) payload: Option<String>,
    pub(super) payload_bytes: Option<Vec<u8>>,
    /// A JSON object of strings, or what somebody wrote instead.
    pub(super) headers: Option<String>,
    /// Whether the pipeline's books say that it is done with.
    pub(super) settled: bool,
}

impl Emitted {
    /// Stands for the entity, the same within one process.
    pub(super) fn entity(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (&self.aggregate_type, &self.aggregate_id).hash(&mut hasher);
        hasher.finish()
    }
}

/// Stands for a key, a value or an id, so that a long log fits into memory: of 4 billion alterations one is not seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Fingerprint(u32);

impl Fingerprint {
    pub(super) fn of(bytes: Option<&[u8]>) -> Self {
        let mut hasher = DefaultHasher::new();
        bytes.hash(&mut hasher);
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a part of a hash is a hash"
        )]
        Self(hasher.finish() as u32)
    }
}

/// What one pipeline does with the log.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    aggregate_types: Vec<String>,
    event_types: Vec<String>,
    headers: BTreeMap<String, String>,
    topic: Template,
    key: Template,
    pub(super) format: RecordFormat,
}

impl Rules {
    pub(super) fn new(config: &PipelineConfig) -> Self {
        let pipeline = &config.pipeline;
        Self {
            aggregate_types: pipeline.filter.aggregate_types.clone(),
            event_types: pipeline.filter.event_types.clone(),
            headers: pipeline.filter.headers.clone(),
            topic: Template::new(&pipeline.route.topic.to_string()),
            key: Template::new(&pipeline.route.key.to_string()),
            format: pipeline.encoding.format,
        }
    }

    /// Whether the pipeline takes the event. Where its headers can't be read it does, in order to set it aside.
    pub(super) fn take(&self, event: &Emitted) -> bool {
        let named =
            |names: &[String], name: &str| names.is_empty() || names.iter().any(|n| n == name);
        named(&self.aggregate_types, &event.aggregate_type)
            && named(&self.event_types, &event.event_type)
            && (self.headers.is_empty() || self.headers_match(event.headers.as_deref()))
    }

    fn headers_match(&self, headers: Option<&str>) -> bool {
        let Ok(Pairs(pairs)) = serde_json::from_str(headers.unwrap_or("{}")) else {
            return true;
        };
        self.headers.iter().all(|(name, value)| {
            pairs
                .iter()
                .any(|(n, v)| n == name && v.as_ref() == Some(value))
        })
    }

    pub(super) fn topic(&self, event: &Emitted) -> String {
        self.topic.fill(event)
    }

    pub(super) fn key(&self, event: &Emitted) -> String {
        self.key.fill(event)
    }

    /// Of the value, as [`read`](super::record::read) takes it from a record.
    pub(super) fn value(&self, event: &Emitted) -> Fingerprint {
        let json = event.payload.as_deref().map(|json| match self.format {
            RecordFormat::Plain | RecordFormat::CloudeventsBinary => json,
            RecordFormat::CloudeventsJson => json.trim_matches([' ', '\t', '\n', '\r']),
        });
        Fingerprint::of(json.map(str::as_bytes).or(event.payload_bytes.as_deref()))
    }

    /// Whether the pipeline takes an event of these types, whatever its headers.
    pub(super) fn may_take(&self, event: &Emitted) -> bool {
        let any = Self {
            headers: BTreeMap::new(),
            ..self.clone()
        };
        any.take(event)
    }

    /// Topics that do not depend on what is emitted.
    pub(super) fn known_topics(&self) -> Vec<String> {
        let of_types = |piece: &Piece| matches!(piece, Piece::Text(_) | Piece::AggregateType);
        if !self.topic.0.iter().all(of_types) {
            return Vec::new();
        }
        let fixed = self
            .topic
            .0
            .iter()
            .all(|piece| matches!(piece, Piece::Text(_)));
        let types: &[String] = if fixed {
            &[String::new()]
        } else {
            &self.aggregate_types
        };
        types
            .iter()
            .map(|name| self.topic.fill_types(name))
            .collect()
    }

    /// Whether events of one aggregate type and event type go to several topics.
    pub(super) fn topic_needs_the_id(&self) -> bool {
        self.topic.0.contains(&Piece::AggregateId)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    AggregateType,
    AggregateId,
    EventType,
}

#[derive(Clone, Debug)]
struct Template(Vec<Piece>);

impl Template {
    fn new(text: &str) -> Self {
        const NAMES: [(&str, Piece); 3] = [
            ("{aggregate_type}", Piece::AggregateType),
            ("{aggregate_id}", Piece::AggregateId),
            ("{event_type}", Piece::EventType),
        ];
        let (mut pieces, mut plain, mut rest) = (Vec::new(), String::new(), text);
        while let Some(c) = rest.chars().next() {
            if let Some((name, piece)) = NAMES.iter().find(|(name, _)| rest.starts_with(name)) {
                pieces.push(Piece::Text(std::mem::take(&mut plain)));
                pieces.push(piece.clone());
                rest = &rest[name.len()..];
                continue;
            }
            rest = &rest[c.len_utf8()..];
            // A backslash makes an ordinary character of what follows.
            let next = rest.chars().next().filter(|_| c == '\\');
            plain.push(next.unwrap_or(c));
            rest = &rest[next.map_or(0, char::len_utf8)..];
        }
        pieces.push(Piece::Text(plain));
        pieces.retain(|piece| !matches!(piece, Piece::Text(text) if text.is_empty()));
        Self(pieces)
    }

    /// For templates that need no more of an event than its aggregate type.
    fn fill_types(&self, aggregate_type: &str) -> String {
        self.0
            .iter()
            .map(|piece| match piece {
                Piece::Text(text) => text,
                _ => aggregate_type,
            })
            .collect()
    }

    fn fill(&self, event: &Emitted) -> String {
        self.0
            .iter()
            .map(|piece| match piece {
                Piece::Text(text) => &text[..],
                Piece::AggregateType => &event.aggregate_type,
                Piece::AggregateId => &event.aggregate_id,
                Piece::EventType => &event.event_type,
            })
            .collect()
    }
}

/// The partition that a Java producer picks for a key.
///
/// Source: `org.apache.kafka.common.utils.Utils.murmur2` and `BuiltInPartitioner.partitionForKey`.
pub(super) fn partition_of(key: &[u8], partitions: usize) -> usize {
    (murmur2(key) & 0x7fff_ffff) as usize % partitions.max(1)
}

fn murmur2(key: &[u8]) -> u32 {
    const M: u32 = 0x5bd1_e995;
    #[expect(clippy::cast_possible_truncation, reason = "a key is not that long")]
    let mut hash = 0x9747_b28c ^ key.len() as u32;
    let mut words = key.chunks_exact(4);
    for word in &mut words {
        let mut k = u32::from_le_bytes([word[0], word[1], word[2], word[3]]).wrapping_mul(M);
        k = (k ^ (k >> 24)).wrapping_mul(M);
        hash = hash.wrapping_mul(M) ^ k;
    }
    let rest = words.remainder();
    if !rest.is_empty() {
        for (n, byte) in rest.iter().enumerate() {
            hash ^= u32::from(*byte) << (8 * n);
        }
        hash = hash.wrapping_mul(M);
    }
    hash = (hash ^ (hash >> 13)).wrapping_mul(M);
    hash ^ (hash >> 15)
}

/// The pairs of a JSON object in their order, a name perhaps more than once; what is no string is none.
struct Pairs(Vec<(String, Option<String>)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;

        impl<'de> Visitor<'de> for Object {
            type Value = Pairs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                #[derive(Deserialize)]
                #[serde(untagged)]
                enum Value {
                    Text(String),
                    Other(IgnoredAny),
                }
                let mut pairs = Vec::new();
                while let Some((name, value)) = map.next_entry()? {
                    let value = match value {
                        Value::Text(text) => Some(text),
                        Value::Other(IgnoredAny) => None,
                    };
                    pairs.push((name, value));
                }
                Ok(Pairs(pairs))
            }
        }

        deserializer.deserialize_map(Object)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn event() -> Emitted {
        Emitted {
            id: 1,
            event_id: Uuid::nil(),
            aggregate_type: "order".to_owned(),
            aggregate_id: "17".to_owned(),
            event_type: "placed".to_owned(),
            payload: Some(" {\"n\": 1} ".to_owned()),
            payload_bytes: None,
            headers: Some(r#"{"tenant": "acme", "tenant": "other", "gone": null}"#.to_owned()),
            settled: true,
        }
    }

    pub(in crate::verify) fn rules(lines: &str) -> Rules {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("relay.toml");
        std::fs::write(&file, format!("[pipelines.x]\n{lines}")).unwrap();
        let url = ("RELAY_SOURCE__POSTGRES__URL", "postgres://127.0.0.1/x");
        let env = [(url.0.to_owned(), url.1.to_owned())];
        let config = crate::config::Config::load(Some(&file), env).unwrap();
        Rules::new(&config.pipelines[0])
    }

    #[test]
    fn templates_are_filled() {
        let rules = rules("topic = \"a.{aggregate_type}.{event_type}\"\nkey = \"{aggregate_id}\"");
        assert_eq!(rules.topic(&event()), "a.order.placed");
        assert_eq!(rules.key(&event()), "17");
        assert!(!rules.topic_needs_the_id());
        assert_eq!(Template::new("all").fill(&event()), "all");
        let escaped = Template::new(r"\{aggregate_id\}\\{aggregate_id}é");
        assert_eq!(escaped.fill(&event()), r"{aggregate_id}\17é");
    }

    #[test]
    fn filters_take_what_matches_every_condition() {
        for (lines, taken) in [
            ("", true),
            ("filter.aggregate_types = [\"order\"]", true),
            ("filter.aggregate_types = [\"cart\"]", false),
            ("filter.event_types = [\"paid\"]", false),
            ("filter.headers.tenant = \"other\"", true),
            ("filter.headers.tenant = \"third\"", false),
            ("filter.headers.gone = \"\"", false),
        ] {
            assert_eq!(rules(lines).take(&event()), taken, "{lines}");
        }
        let unreadable = Emitted {
            headers: Some("[]".to_owned()),
            ..event()
        };
        assert!(rules("filter.headers.tenant = \"acme\"").take(&unreadable));
    }

    #[test]
    fn the_value_is_the_payload_and_its_white_space_only_where_the_format_keeps_it() {
        let plain = Fingerprint::of(Some(b" {\"n\": 1} "));
        assert_eq!(rules("").value(&event()), plain);
        let json = rules("format = \"cloudevents_json\"").value(&event());
        assert_eq!(json, Fingerprint::of(Some(b"{\"n\": 1}")));
        assert_ne!(Fingerprint::of(None), Fingerprint::of(Some(b"")));
    }

    /// Values of Kafka's own `UtilsTest.testMurmur2`.
    #[test]
    fn partitions_are_those_of_java() {
        for (key, hash) in [
            ("21", -973_932_308),
            ("foobar", -790_332_482),
            ("a-little-bit-long-string", -985_981_536),
            ("a-little-bit-longer-string", -1_486_304_829),
            ("abc", 479_470_107),
        ] {
            assert_eq!(murmur2(key.as_bytes()).cast_signed(), hash, "{key}");
        }
        assert_eq!(partition_of(b"abc", 8), 479_470_107 % 8);
    }
}
