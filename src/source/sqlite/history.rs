//! Reads retained events again, by what is asked for and not by a cursor: for replays.

use futures_util::TryStreamExt;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{AssertSqlSafe, ConnectOptions};

use super::{ROWS_AHEAD, columns, connect, event};
use crate::event::{Event, EventId};
use crate::source::selection::{Dialect, Selection};
use crate::source::{IDS_AT_ONCE, PAGE_BYTES};

/// Reads what is retained in a file.
pub(crate) struct History {
    options: SqliteConnectOptions,
    connection: Option<SqliteConnection>,
}

impl History {
    pub(crate) fn new(options: SqliteConnectOptions) -> Self {
        Self {
            options: options
                .create_if_missing(false)
                .pragma("query_only", "on")
                .row_buffer_size(ROWS_AHEAD)
                .disable_statement_logging(),
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
        let statement = format!(
            "select {columns} from outbox_events e where e.id > {after} and e.id <= {until} and {} order by e.id limit {rows}",
            selection.condition(Dialect::Sqlite),
            columns = columns(),
        );
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => connect(&self.options).await?,
        };
        let (mut events, mut bytes) = (Vec::new(), 0);
        let mut found = sqlx::query(AssertSqlSafe(statement)).fetch(&mut connection);
        let mut full = false;
        while !full && let Some(row) = found.try_next().await? {
            let event = event(&row)?;
            bytes += event.size_bytes();
            events.push(event);
            full = bytes >= PAGE_BYTES || events.len() >= rows;
        }
        drop(found);
        self.connection = Some(connection);
        let read_to = match events.last() {
            Some(last) if full => last.id,
            _ => until,
        };
        Ok((events, read_to))
    }
}
