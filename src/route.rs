//! Decides whether an event concerns a pipeline, and its topic and key. (source → order → *route* → encode → sink)
//!
//! Pure: no I/O, clock, logging or state.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::str::FromStr;

use leon::Item;
use serde::Deserialize;

use crate::event::{Event, Rejection};

/// Which events a pipeline takes: those that match every condition given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Filter {
    /// Any of these aggregate types; all when empty.
    pub aggregate_types: Vec<String>,
    /// Any of these event types; all when empty.
    pub event_types: Vec<String>,
    /// Headers that must be present with exactly this value.
    pub headers: BTreeMap<String, String>,
}

impl Filter {
    /// Whether some event could match both.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        let common = |a: &[String], b: &[String]| {
            a.is_empty() || b.is_empty() || a.iter().any(|name| b.contains(name))
        };
        let differs = |(name, value): (&String, &String)| {
            other
                .headers
                .get(name)
                .is_some_and(|theirs| theirs != value)
        };
        common(&self.aggregate_types, &other.aggregate_types)
            && common(&self.event_types, &other.event_types)
            && !self.headers.iter().any(differs)
    }

    /// Whether the event concerns the pipeline.
    ///
    /// # Errors
    /// When headers matter and those of the event can't be read.
    pub fn admits(&self, event: &Event) -> Result<bool, Rejection> {
        let one_of =
            |names: &[String], name: &str| names.is_empty() || names.iter().any(|n| n == name);
        if !one_of(&self.aggregate_types, &event.aggregate_type)
            || !one_of(&self.event_types, &event.event_type)
        {
            return Ok(false);
        }
        if self.headers.is_empty() {
            return Ok(true);
        }
        let headers = crate::encode::parse_headers(event.headers.as_deref())?;
        Ok(self.headers.iter().all(|(name, value)| {
            headers
                .iter()
                .any(|(n, v)| n == name && v.as_deref() == Some(value))
        }))
    }
}

/// What a template may insert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    AggregateType,
    AggregateId,
    EventType,
}

impl Field {
    const NAMES: &[(&str, Field)] = &[
        ("aggregate_type", Field::AggregateType),
        ("aggregate_id", Field::AggregateId),
        ("event_type", Field::EventType),
    ];

    fn of(self, event: &Event) -> &str {
        match self {
            Self::AggregateType => &event.aggregate_type,
            Self::AggregateId => &event.aggregate_id,
            Self::EventType => &event.event_type,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Field(Field),
}

/// A text with `{aggregate_type}`, `{aggregate_id}` and `{event_type}` in it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Template {
    parts: Vec<Part>,
}

impl Template {
    /// The text for one event, without a copy when the template is a single field.
    #[must_use]
    pub fn render<'a>(&'a self, event: &'a Event) -> Cow<'a, str> {
        match &self.parts[..] {
            [Part::Field(field)] => Cow::Borrowed(field.of(event)),
            [Part::Text(text)] => Cow::Borrowed(text),
            parts => Cow::Owned(
                parts
                    .iter()
                    .map(|part| match part {
                        Part::Text(text) => text,
                        Part::Field(field) => field.of(event),
                    })
                    .collect(),
            ),
        }
    }

    /// The text if it is the same for all events of an aggregate type; none if it needs more of the event.
    #[must_use]
    pub fn render_for_type(&self, aggregate_type: &str) -> Option<String> {
        self.parts
            .iter()
            .map(|part| match part {
                Part::Text(text) => Some(text.as_str()),
                Part::Field(Field::AggregateType) => Some(aggregate_type),
                Part::Field(Field::AggregateId | Field::EventType) => None,
            })
            .collect()
    }

    /// Why no event could have a legal topic of this template; none where the events decide.
    #[must_use]
    pub fn illegal_as_topic(&self) -> Option<String> {
        let literal: String = self
            .parts
            .iter()
            .map(|part| match part {
                Part::Text(text) => text.as_str(),
                Part::Field(_) => "",
            })
            .collect();
        // Dots alone are legal beside what is inserted.
        let inserted = if self.is_fixed() { "" } else { "x" };
        illegal_topic(&format!("{literal}{inserted}"))
    }

    /// Whether aggregate types can be told from each other by the text.
    #[must_use]
    pub fn names_the_type(&self) -> bool {
        self.parts.contains(&Part::Field(Field::AggregateType))
    }

    /// Whether the text is the same for all events.
    #[must_use]
    pub fn is_fixed(&self) -> bool {
        self.parts.iter().all(|part| matches!(part, Part::Text(_)))
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for part in &self.parts {
            match part {
                // As it has to be written to be read again.
                Part::Text(text) => text.chars().try_for_each(|c| match c {
                    '{' | '}' | '\\' => write!(f, "\\{c}"),
                    c => f.write_char(c),
                })?,
                Part::Field(field) => {
                    let (name, _) = Field::NAMES
                        .iter()
                        .find(|(_, named)| named == field)
                        .expect("every field has a name");
                    write!(f, "{{{name}}}")?;
                }
            }
        }
        Ok(())
    }
}

impl FromStr for Template {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() {
            return Err("a template must not be empty".to_owned());
        }
        let template = leon::Template::parse(text)
            .map_err(|error| format!("{text:?} is not a template: {error}"))?;
        let part = |item: &Item<'_>| {
            match item {
            Item::Text(text) => Ok(Part::Text((*text).to_owned())),
            Item::Key(key) => Field::NAMES
                .iter()
                .find(|(name, _)| name == key)
                .map(|(_, field)| Part::Field(*field))
                .ok_or_else(|| {
                    format!("{{{key}}} is not known; a template may use {{aggregate_type}}, {{aggregate_id}} and {{event_type}}")
                }),
        }
        };
        Ok(Self {
            parts: template.items.iter().map(part).collect::<Result<_, _>>()?,
        })
    }
}

impl TryFrom<String> for Template {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

/// Topic and key of a pipeline's records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// By default `{aggregate_type}`.
    pub topic: Template,
    /// By default `{aggregate_id}`.
    pub key: Template,
}

impl Route {
    /// The topic of one event.
    ///
    /// # Errors
    /// When the result is not a legal topic name.
    pub fn topic<'a>(&'a self, event: &'a Event) -> Result<Cow<'a, str>, Rejection> {
        let topic = self.topic.render(event);
        match illegal_topic(&topic) {
            None => Ok(topic),
            Some(reason) => Err(Rejection::new(reason)),
        }
    }
}

/// Why Kafka would refuse this name for a topic; none if it would not.
///
/// Source: `org.apache.kafka.common.internals.Topic`: 1 to 249 of `a-zA-Z0-9._-`, neither `.` nor `..`.
#[must_use]
pub fn illegal_topic(topic: &str) -> Option<String> {
    let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    if topic.is_empty() {
        Some("the topic name is empty".to_owned())
    } else if topic.len() > 249 {
        Some(format!(
            "the topic name has {} bytes, Kafka allows 249",
            topic.len()
        ))
    } else if topic == "." || topic == ".." {
        Some(format!("{topic:?} is not a topic name"))
    } else if topic.bytes().all(legal) {
        None
    } else {
        topic.chars().find(|c| !c.is_ascii() || !legal(*c as u8)).map(|c| {
            format!("the topic name has the character {c:?}, Kafka allows a-z, A-Z, 0-9, '.', '_' and '-'")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{EventId, Payload};

    fn event() -> Event {
        Event {
            id: EventId(1),
            event_id: uuid::Uuid::nil(),
            aggregate_type: "order".into(),
            aggregate_id: "17".into(),
            event_type: "placed".into(),
            payload: Payload::Tombstone,
            content_type: None,
            headers: Some(r#"{"tenant": "acme", "gone": null}"#.into()),
            occurred_at_us: 0,
        }
    }

    #[test]
    fn a_template_inserts_fields() {
        for (template, expected) in [
            ("{aggregate_type}", "order"),
            ("shop.{aggregate_type}.{event_type}", "shop.order.placed"),
            ("{aggregate_id}-{aggregate_type}", "17-order"),
            ("all", "all"),
        ] {
            assert_eq!(
                template.parse::<Template>().unwrap().render(&event()),
                expected
            );
            assert_eq!(template.parse::<Template>().unwrap().to_string(), template);
        }
    }

    #[test]
    fn what_no_event_could_make_legal_is_known_beforehand() {
        let illegal = |text: &str| text.parse::<Template>().unwrap().illegal_as_topic();
        for template in [
            "shop.{aggregate_type}",
            "all",
            ".{event_type}",
            "{aggregate_id}",
        ] {
            assert_eq!(illegal(template), None, "{template}");
        }
        for template in ["shop orders/{aggregate_type}", "ä", "..", &"x".repeat(250)] {
            assert!(illegal(template).is_some(), "{template}");
        }
    }

    #[test]
    fn filters_overlap_where_an_event_could_match_both() {
        let filter = |types: &[&str], headers: &[(&str, &str)]| Filter {
            aggregate_types: types.iter().map(|name| (*name).to_owned()).collect(),
            event_types: Vec::new(),
            headers: headers
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
        };
        let all = Filter::default();
        assert!(all.overlaps(&filter(&["order"], &[])));
        assert!(filter(&["order", "cart"], &[]).overlaps(&filter(&["cart"], &[])));
        assert!(!filter(&["order"], &[]).overlaps(&filter(&["cart"], &[])));
        assert!(!filter(&[], &[("tenant", "a")]).overlaps(&filter(&[], &[("tenant", "b")])));
        assert!(filter(&[], &[("tenant", "a")]).overlaps(&filter(&[], &[("region", "b")])));
    }

    #[test]
    fn a_wrong_template_is_refused() {
        for template in ["", "{", "{nothing}", "{aggregate_type"] {
            assert!(template.parse::<Template>().is_err(), "{template}");
        }
    }

    #[test]
    fn a_template_knows_what_it_depends_on() {
        let template = |text: &str| text.parse::<Template>().unwrap();
        assert_eq!(
            template("a.{aggregate_type}").render_for_type("b"),
            Some("a.b".to_owned())
        );
        assert_eq!(template("{event_type}").render_for_type("b"), None);
        assert!(template("all").is_fixed() && !template("{event_type}").is_fixed());
    }

    #[test]
    fn a_filter_takes_what_matches_every_condition() {
        let filter = |types: &[&str], events: &[&str], headers: &[(&str, &str)]| Filter {
            aggregate_types: types.iter().map(|&s| s.into()).collect(),
            event_types: events.iter().map(|&s| s.into()).collect(),
            headers: headers.iter().map(|&(n, v)| (n.into(), v.into())).collect(),
        };
        let admitted = [
            filter(&[], &[], &[]),
            filter(&["customer", "order"], &["placed"], &[("tenant", "acme")]),
        ];
        let refused = [
            filter(&["customer"], &[], &[]),
            filter(&[], &["paid"], &[]),
            filter(&[], &[], &[("tenant", "other")]),
            filter(&[], &[], &[("gone", "")]),
            filter(&[], &[], &[("missing", "x")]),
        ];
        assert!(admitted.iter().all(|f| f.admits(&event()) == Ok(true)));
        assert!(refused.iter().all(|f| f.admits(&event()) == Ok(false)));
    }

    #[test]
    fn topic_names_are_checked_as_kafka_does() {
        let long = "x".repeat(249);
        for name in ["order", "a.b_c-D9", "...", &long] {
            assert_eq!(illegal_topic(name), None, "{name}");
        }
        for name in ["", ".", "..", "a b", "ä", "a/b", "a\u{0}", &"x".repeat(250)] {
            assert!(illegal_topic(name).is_some(), "{name:?}");
        }
    }
}
