//! Reads the log and the books: plain statements of the auditor's own, for both databases.

mod postgres;
mod sqlite;

use sqlx::postgres::PgConnection;
use sqlx::sqlite::SqliteConnection;
use uuid::Uuid;

use super::expect::Emitted;
use super::judge::Retained;
pub(super) use super::report::LostEvents;
use crate::config::Source;
use crate::event::PipelineName;

/// An outbox, opened for reading.
pub(super) enum Log {
    Postgres(PgConnection),
    Sqlite(SqliteConnection),
}

/// What a pipeline has written down, read in one snapshot.
#[derive(Clone, Debug, Default)]
pub(super) struct Books {
    /// None before its first cursor, and where that means nothing in this database.
    pub(super) settled: Option<Settled>,
    /// Ids of the events that are set aside, ascending.
    pub(super) parked: Vec<(i64, Uuid)>,
    /// Whether the cursor was written in another cluster or timeline.
    pub(super) moved: bool,
    /// Ids and uuids of those that operators gave up, ascending.
    pub(super) dropped: Vec<(i64, Uuid)>,
    /// Events that retention removed before the pipeline had published them.
    pub(super) lost: Vec<LostEvents>,
}

/// Which events a pipeline is done with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Settled {
    /// By the cursor of each shard.
    Windows(Vec<Cursor>),
    /// Those with ids up to this one.
    UpTo(i64),
}

/// Of the entities of one shard: the events that are visible in `prev`, and of those that are visible in `cur` the ids up
/// to `last_id`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cursor {
    prev: String,
    cur: String,
    last_id: i64,
}

impl Log {
    pub(super) async fn open(source: &Source) -> Result<Self, anyhow::Error> {
        Ok(match source {
            Source::Postgres(settings) => {
                Self::Postgres(postgres::open(&settings.connector.current()?).await?)
            }
            Source::Sqlite { path, .. } => Self::Sqlite(sqlite::open(path).await?),
        })
    }

    pub(super) async fn books(&mut self, pipeline: &PipelineName) -> Result<Books, anyhow::Error> {
        match self {
            Self::Postgres(connection) => postgres::books(connection, pipeline).await,
            Self::Sqlite(connection) => sqlite::books(connection, pipeline).await,
        }
    }

    /// One event of each aggregate type and event type that is retained; with `ids` of each entity too.
    pub(super) async fn kinds(&mut self, ids: bool) -> Result<Vec<Emitted>, anyhow::Error> {
        match self {
            Self::Postgres(connection) => postgres::kinds(connection, ids).await,
            Self::Sqlite(connection) => sqlite::kinds(connection, ids).await,
        }
    }

    /// The first event that occurred at or after this time, in microseconds since the Unix epoch. Looks at every event.
    pub(super) async fn first_since(&mut self, us: i64) -> Result<Option<i64>, anyhow::Error> {
        match self {
            Self::Postgres(connection) => postgres::first_since(connection, us).await,
            Self::Sqlite(connection) => sqlite::first_since(connection, us).await,
        }
    }

    /// The earliest time of the events from this id on, in microseconds since the Unix epoch.
    pub(super) async fn earliest_from(&mut self, id: i64) -> Result<Option<i64>, anyhow::Error> {
        match self {
            Self::Postgres(connection) => postgres::earliest_from(connection, id).await,
            Self::Sqlite(connection) => sqlite::earliest_from(connection, id).await,
        }
    }

    /// Hands over every event from this id on, in the order of the ids and as of one moment, and says what is retained.
    pub(super) async fn read(
        &mut self,
        from_id: i64,
        settled: Option<&Settled>,
        each: impl FnMut(&Emitted),
    ) -> Result<Retained, anyhow::Error> {
        match self {
            Self::Postgres(connection) => postgres::read(connection, from_id, settled, each).await,
            Self::Sqlite(connection) => sqlite::read(connection, from_id, settled, each).await,
        }
    }

    /// The uuid of an event, if it is still there.
    pub(super) async fn event_id(&mut self, id: i64) -> Result<Option<String>, anyhow::Error> {
        match self {
            Self::Postgres(connection) => postgres::event_id(connection, id).await,
            Self::Sqlite(connection) => sqlite::event_id(connection, id).await,
        }
    }
}

/// What lies before and between the partitions that hold events, whose bounds ascend: dropped, or about to be, unless it
/// is in the default partition.
fn gaps(bounds: &[(i64, i64)]) -> Vec<(i64, i64)> {
    let ends = [i64::MIN]
        .into_iter()
        .chain(bounds.iter().map(|bound| bound.1));
    ends.zip(bounds)
        .map(|(end, bound)| (end, bound.0))
        .filter(|(from, to)| from < to)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_dropped_between_partitions_is_known() {
        assert_eq!(gaps(&[]), []);
        let before = (i64::MIN, 1);
        assert_eq!(gaps(&[(1, 5), (5, 9)]), [before]);
        assert_eq!(gaps(&[(1, 5), (9, 12), (12, 20)]), [before, (5, 9)]);
    }
}
