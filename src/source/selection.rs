//! Which retained events are meant, by what people know of them.

use std::fmt::{self, Write};
use std::time::{Duration, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::postgres::ask::literal;

/// Which retained events: those that match every condition given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Selection {
    /// Any of these entities, as aggregate type and id; all when empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub entities: Vec<(String, String)>,
    /// Any of these aggregate types; all when empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub aggregate_types: Vec<String>,
    /// Any of these event types; all when empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub event_types: Vec<String>,
    /// Any of these uuids; all when empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub event_ids: Vec<Uuid>,
    /// Occurred then or later, in microseconds since the Unix epoch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from_us: Option<i64>,
    /// Occurred before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until_us: Option<i64>,
}

impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            entities,
            aggregate_types,
            event_types,
            event_ids,
            from_us,
            until_us,
        } = self;
        let mut parts: Vec<String> = Vec::new();
        parts.extend(
            entities
                .iter()
                .map(|(kind, id)| format!("entity {kind}/{id}")),
        );
        parts.extend(
            aggregate_types
                .iter()
                .map(|kind| format!("aggregate type {kind}")),
        );
        parts.extend(event_types.iter().map(|kind| format!("event type {kind}")));
        parts.extend(event_ids.iter().map(|uuid| format!("event {uuid}")));
        parts.extend(from_us.map(|us| format!("from {}", moment(us))));
        parts.extend(until_us.map(|us| format!("until {}", moment(us))));
        if parts.is_empty() {
            parts.push("all".to_owned());
        }
        f.write_str(&parts.join(", "))
    }
}

fn moment(us: i64) -> String {
    match u64::try_from(us) {
        // To the end of the year 9999.
        Ok(us) if us < 253_402_300_800_000_000 => {
            humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_micros(us)).to_string()
        }
        _ => format!("{us} us"),
    }
}

/// What differs between the databases.
#[derive(Clone, Copy, Debug)]
pub(super) enum Dialect {
    Postgres,
    Sqlite,
}

impl Selection {
    /// The same as SQL over the events `e`.
    pub(super) fn condition(&self, dialect: Dialect) -> String {
        let mut sql = "true".to_owned();
        let mut one_of = |what: &str, values: Vec<String>| {
            if !values.is_empty() {
                let _ = write!(sql, " and {what} in ({})", values.join(", "));
            }
        };
        let literals = |texts: &[String]| texts.iter().map(|text| literal(text)).collect();
        let pairs = self.entities.iter();
        let mut pairs: Vec<String> = pairs
            .map(|(name, id)| format!("({}, {})", literal(name), literal(id)))
            .collect();
        if let (Dialect::Sqlite, Some(first)) = (dialect, pairs.first_mut()) {
            // It takes no list of pairs.
            first.insert_str(0, "values ");
        }
        one_of("(e.aggregate_type, e.aggregate_id)", pairs);
        one_of("e.aggregate_type", literals(&self.aggregate_types));
        one_of("e.event_type", literals(&self.event_types));
        let uuids = self.event_ids.iter();
        let event_id = match dialect {
            Dialect::Postgres => "e.event_id",
            // A text, in small or capital letters.
            Dialect::Sqlite => "lower(e.event_id)",
        };
        one_of(event_id, uuids.map(|id| format!("'{id}'")).collect());
        for (sign, us) in [(">=", self.from_us), ("<", self.until_us)] {
            let Some(us) = us else {
                continue;
            };
            let time = match dialect {
                Dialect::Postgres => {
                    format!("timestamptz 'epoch' + {us} * interval '1 microsecond'")
                }
                Dialect::Sqlite => us.to_string(),
            };
            let _ = write!(sql, " and e.occurred_at {sign} {time}");
        }
        sql
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selection_is_quoted() {
        let selection = Selection {
            entities: vec![("o'r".to_owned(), "1".to_owned())],
            event_types: vec!["a".to_owned(), "b".to_owned()],
            from_us: Some(5),
            ..Selection::default()
        };
        assert_eq!(
            selection.condition(Dialect::Postgres),
            "true and (e.aggregate_type, e.aggregate_id) in (('o''r', '1')) and e.event_type in ('a', 'b') \
             and e.occurred_at >= timestamptz 'epoch' + 5 * interval '1 microsecond'"
        );
        assert_eq!(
            selection.condition(Dialect::Sqlite),
            "true and (e.aggregate_type, e.aggregate_id) in (values ('o''r', '1')) and e.event_type in ('a', 'b') \
             and e.occurred_at >= 5"
        );
        assert_eq!(Selection::default().condition(Dialect::Sqlite), "true");
    }
}
