//! What operators see of parked events, and what they ask for.
//!
//! They only say what they want; the owner of the pipeline does it, for only the owner knows what is on its way. Every wish
//! is noted in the same transaction: when, who, of which events, why.

mod paging;
pub mod postgres;
pub mod sqlite;

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use uuid::Uuid;

pub use self::paging::{Paging, Place};
use crate::event::{EventId, PipelineName};
use crate::reason::kind;

/// Which parked events are meant: those that match everything given. Without an id rejected events are spoken of, and what
/// waits behind them comes along.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    /// Of this pipeline.
    pub pipeline: Option<PipelineName>,
    /// The event with this id, rejected or waiting.
    pub id: Option<EventId>,
    /// The event with this uuid, which is its identity where an id came again.
    pub event_id: Option<Uuid>,
    /// Without an id too, events that only wait are meant.
    pub waiting: bool,
    /// Of this entity.
    pub entity: Option<EntityName>,
    /// With this text in the error, in small or capital letters.
    pub error: Option<String>,
    /// Parked at least this long ago.
    pub older_than: Option<Duration>,
}

/// `TYPE/ID`; the type has no slash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntityName {
    /// The kind of entity.
    pub aggregate_type: String,
    /// The entity.
    pub aggregate_id: String,
}

impl FromStr for EntityName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('/') {
            Some((aggregate_type, aggregate_id)) if !aggregate_type.is_empty() => Ok(Self {
                aggregate_type: aggregate_type.to_owned(),
                aggregate_id: aggregate_id.to_owned(),
            }),
            _ => Err(format!(
                "{text:?} is not an entity: TYPE/ID, as in order/17"
            )),
        }
    }
}

impl Selector {
    /// Whether nothing but the pipeline narrows it.
    #[must_use]
    pub fn is_everything(&self) -> bool {
        let Self {
            pipeline: _,
            id,
            event_id,
            waiting: _,
            entity,
            error,
            older_than,
        } = self;
        id.is_none()
            && event_id.is_none()
            && entity.is_none()
            && error.is_none()
            && older_than.is_none()
    }

    /// A condition on the parked event `alias`.
    fn condition(&self, dialect: Dialect, alias: &str) -> String {
        let mut all = vec![match (self.id, self.event_id) {
            (Some(id), _) => format!("{alias}.id = {id}"),
            (None, Some(uuid)) => dialect.is_uuid(&format!("{alias}.event_id"), uuid),
            (None, None) if self.waiting => "true".to_owned(),
            (None, None) => format!(
                "({alias}.error is not null or not exists (select 1 from {} h \
                   where {} and h.holds and h.{place} < {alias}.{place}))",
                dialect.parked(),
                same_entity(dialect, "h", alias),
                place = dialect.place()
            ),
        }];
        if let Some(pipeline) = &self.pipeline {
            all.push(format!("{alias}.pipeline = {}", literal(pipeline.as_str())));
        }
        if let Some(EntityName {
            aggregate_type,
            aggregate_id,
        }) = &self.entity
        {
            all.push(format!(
                "{alias}.aggregate_type = {} and {alias}.aggregate_id = {}",
                literal(aggregate_type),
                literal(aggregate_id)
            ));
        }
        if let Some(error) = &self.error {
            all.push(dialect.contains(&format!("{alias}.error"), error));
        }
        if let Some(age) = self.older_than {
            all.push(dialect.older(&format!("{alias}.parked_at"), age));
        }
        all.join(" and ")
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            pipeline: _,
            id,
            event_id,
            waiting: _,
            entity,
            error,
            older_than,
        } = self;
        let mut parts = Vec::new();
        parts.extend(id.map(|id| format!("id {id}")));
        parts.extend(event_id.map(|uuid| format!("event {uuid}")));
        parts.extend(entity.as_ref().map(|entity| {
            format!(
                "entity {:?}",
                format!("{}/{}", entity.aggregate_type, entity.aggregate_id)
            )
        }));
        parts.extend(error.as_ref().map(|error| format!("error {error:?}")));
        parts.extend(
            older_than.map(|age| format!("older than {}", humantime::format_duration(age))),
        );
        if parts.is_empty() {
            parts.push("all".to_owned());
        }
        f.write_str(&parts.join(", "))
    }
}

/// What an operator wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Publish them after all, and what waits behind them.
    Redrive,
    /// Give them up, and publish what waits behind them.
    Drop,
}

impl Action {
    /// As the tables have it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Redrive => "redrive",
            Self::Drop => "drop",
        }
    }
}

/// A wish, and who has it.
#[derive(Clone, Debug)]
pub struct Wish {
    /// What is wanted.
    pub action: Action,
    /// Of which events.
    pub selector: Selector,
    /// What waits behind them is meant too.
    pub with_waiting: bool,
    /// Who, as far as they can be told: OS user and host, or the address of a client.
    pub who: String,
    /// Why.
    pub reason: Option<String>,
}

/// How many events of a pipeline a wish concerns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marked {
    /// The pipeline.
    pub pipeline: String,
    /// Its events.
    pub events: i64,
}

/// A rejected event, or the oldest of an entity that waits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ParkedEvent {
    /// Whose books.
    pub pipeline: String,
    /// Its place in the log.
    pub id: i64,
    /// What consumers would know it by.
    pub event_id: String,
    /// The kind of entity.
    pub aggregate_type: String,
    /// The entity.
    pub aggregate_id: String,
    /// What happened.
    pub event_type: String,
    /// Why it was rejected, the first 1,000 characters; none if it only waits.
    pub error: Option<String>,
    /// How often it was rejected.
    pub attempts: i64,
    /// Whether its entity waits for it; a dead letter holds nobody up.
    pub holds: bool,
    /// What an operator asked for and is not done yet.
    pub wanted: Option<Action>,
    /// How long it has been parked.
    pub parked_seconds: f64,
    /// Since when, in microseconds since the Unix epoch: orders the list.
    #[serde(skip_serializing)]
    pub parked_at_us: i64,
    /// Events of the entity that wait behind it.
    pub waiting_events: i64,
}

/// Rejected events that share a reason, but for the numbers in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cause {
    /// Whose tables.
    pub pipeline: String,
    /// Why they were rejected, with `N` for each number where there are several.
    pub error: String,
    /// How many.
    pub events: i64,
    /// Of so many entities.
    pub entities: i64,
    /// How long the first of them has been parked.
    pub oldest_seconds: f64,
    /// One of them.
    pub example_id: i64,
}

/// Puts together what differs in numbers alone; the most frequent first.
fn merge(causes: Vec<Cause>) -> Vec<Cause> {
    let mut merged: Vec<(String, Cause)> = Vec::new();
    for cause in causes {
        let kind = kind(&cause.error);
        let same = |(other, into): &&mut (String, Cause)| {
            *other == kind && into.pipeline == cause.pipeline
        };
        match merged.iter_mut().find(same) {
            Some((kind, into)) => {
                into.events += cause.events;
                into.entities += cause.entities;
                into.oldest_seconds = into.oldest_seconds.max(cause.oldest_seconds);
                into.example_id = into.example_id.min(cause.example_id);
                into.error.clone_from(kind);
            }
            None => merged.push((kind, cause)),
        }
    }
    let mut causes: Vec<Cause> = merged.into_iter().map(|(_, cause)| cause).collect();
    causes.sort_by_key(|cause| std::cmp::Reverse(cause.events));
    causes
}

/// How many events a wish concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Those that were chosen.
    pub chosen: i64,
    /// Those that wait behind them.
    pub behind: i64,
}

/// Parked events, and how many there are in all.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ParkedEvents {
    /// Those that were asked for, longest parked first.
    pub events: Vec<ParkedEvent>,
    /// All that match, on every page.
    pub total: i64,
    /// What the next page begins after; none on the last one.
    pub next: Option<String>,
}

impl ParkedEvents {
    fn page(events: Vec<ParkedEvent>, total: i64, paging: &Paging) -> Self {
        let next = paging.next(&events).map(|place| place.to_string());
        Self {
            events,
            total,
            next,
        }
    }
}

/// Everything about one parked event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ParkedDetail {
    /// What the list has.
    #[serde(flatten)]
    pub event: ParkedEvent,
    /// When it was emitted.
    pub occurred_at: String,
    /// Of its entity the event that has to go first, while that is another.
    pub behind: Option<i64>,
    /// When and why it was rejected, oldest first.
    pub history: Vec<Rejected>,
    /// The media type of the payload, where the writer named one.
    pub content_type: Option<String>,
    /// As they were written.
    pub headers: Option<String>,
    /// The beginning of the JSON payload.
    pub payload: Option<String>,
    /// The beginning of the encoded payload, in hexadecimal.
    pub payload_hex: Option<String>,
    /// Of the whole payload.
    pub payload_bytes: i64,
}

/// One time that an event was rejected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rejected {
    /// When.
    pub at: String,
    /// Why.
    pub error: String,
}

/// A wish as it was noted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotedAct {
    /// Counts up.
    pub id: i64,
    /// When.
    pub at: String,
    /// Who, as the database knows them; empty where it knows nobody.
    pub database_user: String,
    /// Who, as they named themselves.
    pub who: String,
    /// `redrive`, `drop` …
    pub action: String,
    /// Whose events.
    pub pipeline: Option<String>,
    /// Which events.
    pub selector: String,
    /// How many.
    pub events: i64,
    /// Why.
    pub reason: Option<String>,
}

/// Characters of an error in a list; `show` has all of it.
const ERROR_CHARACTERS: u32 = 1_000;

/// What differs between the databases.
#[derive(Clone, Copy)]
enum Dialect {
    Postgres,
    Sqlite,
}

impl Dialect {
    fn parked(self) -> &'static str {
        match self {
            Self::Postgres => "outbox.parked",
            Self::Sqlite => "outbox_parked",
        }
    }

    /// The column that orders the events of an entity.
    fn place(self) -> &'static str {
        match self {
            Self::Postgres => "place",
            Self::Sqlite => "id",
        }
    }

    fn contains(self, text: &str, part: &str) -> String {
        let function = match self {
            Self::Postgres => "strpos",
            Self::Sqlite => "instr",
        };
        format!("{function}(lower({text}), lower({})) > 0", literal(part))
    }

    fn is_uuid(self, column: &str, uuid: Uuid) -> String {
        match self {
            Self::Postgres => format!("{column} = '{uuid}'"),
            // A text, in small or capital letters.
            Self::Sqlite => format!("lower({column}) = '{uuid}'"),
        }
    }

    fn older(self, time: &str, age: Duration) -> String {
        match self {
            Self::Postgres => format!(
                "{time} <= clock_timestamp() - interval '{} milliseconds'",
                age.as_millis()
            ),
            Self::Sqlite => format!("{time} <= {NOW_US} - {}", age.as_micros()),
        }
    }
}

/// The time in SQLite, in microseconds.
const NOW_US: &str = "cast(round((julianday('now') - 2440587.5) * 86400000) as integer) * 1000";

fn same_entity(dialect: Dialect, one: &str, other: &str) -> String {
    // The index in PostgreSQL is on a hash of both names.
    let hash = match dialect {
        Dialect::Postgres => format!("{one}.entity = {other}.entity and "),
        Dialect::Sqlite => String::new(),
    };
    format!(
        "{hash}{one}.pipeline = {other}.pipeline and {one}.aggregate_type = {other}.aggregate_type \
         and {one}.aggregate_id = {other}.aggregate_id"
    )
}

/// How many events wait behind the parked event `p`.
fn waiting_behind(dialect: Dialect) -> String {
    format!(
        "case when p.holds then (select count(*) from {} w where {} and w.holds and w.{place} > p.{place}) else 0 end",
        dialect.parked(),
        same_entity(dialect, "w", "p"),
        place = dialect.place()
    )
}

/// The oldest of the entity, where that is not the parked event `p` itself.
fn behind(dialect: Dialect) -> String {
    format!(
        "(select h.id from {} h where {} and h.holds and p.holds and h.{place} < p.{place} order by h.{place} limit 1)",
        dialect.parked(),
        same_entity(dialect, "h", "p"),
        place = dialect.place()
    )
}

impl Wish {
    /// SQL that counts the chosen events, and all that it concerns if what waits behind them is meant too.
    fn counting(&self, dialect: Dialect) -> String {
        let all = Self {
            with_waiting: true,
            ..self.clone()
        };
        let parked = dialect.parked();
        format!(
            "select (select count(*) from {parked} p where {}) as chosen, (select count(*) from {parked} p where {}) as everything",
            self.selector.condition(dialect, "p"),
            all.condition(dialect)
        )
    }

    /// A condition on the parked event `p`.
    fn condition(&self, dialect: Dialect) -> String {
        let chosen = self.selector.condition(dialect, "p");
        if !self.with_waiting {
            return chosen;
        }
        format!(
            "(({chosen}) or exists (select 1 from {} r where {} and r.holds and p.holds and r.{place} <= p.{place} and {}))",
            dialect.parked(),
            same_entity(dialect, "r", "p"),
            self.selector.condition(dialect, "r"),
            place = dialect.place()
        )
    }
}

/// Quotes a text for SQL; the source has the same, and an end knows no other.
fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entity_is_split_at_the_first_slash() {
        let entity: EntityName = "order/a/b".parse().unwrap();
        assert_eq!(
            (&entity.aggregate_type[..], &entity.aggregate_id[..]),
            ("order", "a/b")
        );
        for wrong in ["order", "/17", ""] {
            assert!(wrong.parse::<EntityName>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_selector_says_what_it_selects() {
        assert_eq!(Selector::default().to_string(), "all");
        let some = Selector {
            entity: Some("order/17".parse().unwrap()),
            error: Some("too \"large\"".to_owned()),
            older_than: Some(Duration::from_hours(1)),
            ..Selector::default()
        };
        assert_eq!(
            some.to_string(),
            r#"entity "order/17", error "too \"large\"", older than 1h"#
        );
    }
}
