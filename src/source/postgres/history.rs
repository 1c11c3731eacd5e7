//! Reads retained events again, by what is asked for and not by a cursor: for replays.

use std::fmt::Write;

use serde::{Deserialize, Serialize};
use sqlx::ConnectOptions;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use uuid::Uuid;

use super::ask::literal;
use super::statement::COLUMNS;
use super::{connect, fetch};
use crate::event::{Event, EventId};

/// One statement looks at this many ids, so that it ends soon however rare the events are that are asked for.
const IDS_AT_ONCE: i64 = 50_000;
/// One page holds about this many bytes; a single larger event is taken alone.
const PAGE_BYTES: usize = 4 << 20;

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

impl Selection {
    /// The same as SQL over `outbox.events e`.
    fn condition(&self) -> String {
        let mut sql = "true".to_owned();
        let mut one_of = |what: &str, values: Vec<String>| {
            if !values.is_empty() {
                let _ = write!(sql, " and {what} in ({})", values.join(", "));
            }
        };
        let literals = |texts: &[String]| texts.iter().map(|text| literal(text)).collect();
        let pairs = self.entities.iter();
        one_of(
            "(e.aggregate_type, e.aggregate_id)",
            pairs
                .map(|(name, id)| format!("({}, {})", literal(name), literal(id)))
                .collect(),
        );
        one_of("e.aggregate_type", literals(&self.aggregate_types));
        one_of("e.event_type", literals(&self.event_types));
        let uuids = self.event_ids.iter();
        one_of("e.event_id", uuids.map(|id| format!("'{id}'")).collect());
        for (sign, us) in [(">=", self.from_us), ("<", self.until_us)] {
            if let Some(us) = us {
                let _ = write!(
                    sql,
                    " and e.occurred_at {sign} timestamptz 'epoch' + {us} * interval '1 microsecond'"
                );
            }
        }
        sql
    }
}

/// Reads what is retained.
pub(crate) struct History {
    options: PgConnectOptions,
    connection: Option<PgConnection>,
}

impl History {
    pub(crate) fn new(options: PgConnectOptions) -> Self {
        Self {
            options: options.disable_statement_logging(),
            connection: None,
        }
    }

    /// The selected events after one id and up to another, as many as are found at once, in the order of their ids; and
    /// the id up to which that is all of them.
    ///
    /// # Errors
    /// When the database can't be asked; the next call connects anew.
    pub(crate) async fn page(
        &mut self,
        selection: &Selection,
        (after, until): (EventId, EventId),
        rows: usize,
    ) -> Result<(Vec<Event>, EventId), anyhow::Error> {
        let until = EventId(until.0.min(after.0.saturating_add(IDS_AT_ONCE)));
        let statement = format!(
            "copy (select {COLUMNS} from outbox.events e where e.id > {after} and e.id <= {until} and {} \
                    order by e.id limit {rows}) to stdout (format binary)",
            selection.condition()
        );
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => connect(&self.options).await?,
        };
        let read = fetch(&mut connection, &statement, PAGE_BYTES).await?;
        let all = read.complete && read.events.len() < rows;
        if read.complete {
            self.connection = Some(connection);
        }
        let read_to = match read.events.last() {
            Some(last) if !all => last.id,
            _ => until,
        };
        Ok((read.events, read_to))
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
            selection.condition(),
            "true and (e.aggregate_type, e.aggregate_id) in (('o''r', '1')) and e.event_type in ('a', 'b') \
             and e.occurred_at >= timestamptz 'epoch' + 5 * interval '1 microsecond'"
        );
        assert_eq!(Selection::default().condition(), "true");
    }
}
