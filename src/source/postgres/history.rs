//! Reads retained events again, by what is asked for and not by a cursor: for replays.

use sqlx::postgres::PgConnection;

use super::{Connector, fetch, statement};
use crate::event::{Event, EventId};
use crate::source::selection::{Dialect, Selection};
use crate::source::{IDS_AT_ONCE, PAGE_BYTES};

/// Reads what is retained.
pub(crate) struct History {
    connector: Connector,
    connection: Option<PgConnection>,
}

impl History {
    pub(crate) fn new(connector: Connector) -> Self {
        Self {
            connector,
            connection: None,
        }
    }

    /// As [`AnyHistory::page`](crate::source::AnyHistory::page).
    pub(crate) async fn page(
        &mut self,
        selection: &Selection,
        (after, until): (EventId, EventId),
        rows: usize,
    ) -> Result<(Vec<Event>, EventId), anyhow::Error> {
        let until = EventId(until.0.min(after.0.saturating_add(IDS_AT_ONCE)));
        let condition = selection.condition(Dialect::Postgres);
        let statement = statement::retained((after, until), &condition, rows);
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.connector.connect().await?,
        };
        let read = fetch(&mut connection, &statement, PAGE_BYTES, |_, _| Ok(false)).await?;
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
