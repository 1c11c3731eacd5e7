//! The view of the books in a SQLite file.

use anyhow::Context;
use sqlx::sqlite::{SqliteConnection, SqliteRow};
use sqlx::{Row, Sqlite, query::Query, sqlite::SqliteArguments};

use super::{Books, LogSize, Owner, PipelineBooks, Waiting, backlog};
use crate::event::EventId;
use crate::source::sqlite::newest_id;

/// Everything about every pipeline. The oldest event is the first after the cursor, found by its id.
const PIPELINES: &str = "
with now (us) as (select cast(round((julianday('now') - 2440587.5) * 86400000) as integer) * 1000),
     names (pipeline, shard) as (
        select pipeline, shard from outbox_cursors union select pipeline, shard from outbox_leases)
select n.pipeline, n.shard, c.last_id,
       case when l.expires_at > now.us then l.holder end,
       (l.expires_at - now.us) / 1000000.0,
       (now.us - c.updated_at) / 1000000.0,
       (select (now.us - e.occurred_at) / 1000000.0 from outbox_events e
         where e.id > coalesce(c.last_id, 9223372036854775807) order by e.id limit 1),
       (select count(*) from outbox_parked p where p.pipeline = n.pipeline),
       (select count(*) from (
            select 1 from outbox_parked p where p.pipeline = n.pipeline group by p.aggregate_type, p.aggregate_id))
  from names n
 cross join now
  left join outbox_cursors c on c.pipeline = n.pipeline and c.shard = n.shard
  left join outbox_leases l on l.pipeline = n.pipeline and l.shard = n.shard
 order by n.pipeline, n.shard";

/// The part of it that is asked for every few seconds: nothing is counted.
const WAITING: &str = "
with now (us) as (select cast(round((julianday('now') - 2440587.5) * 86400000) as integer) * 1000)
select c.pipeline, c.shard, c.last_id,
       case when l.expires_at > now.us then l.holder end,
       (select (now.us - e.occurred_at) / 1000000.0 from outbox_events e
         where e.id > c.last_id order by e.id limit 1)
  from outbox_cursors c
 cross join now
  left join outbox_leases l on l.pipeline = c.pipeline and l.shard = c.shard
 order by c.pipeline, c.shard";

/// Three rows found by rowid.
const LOG_SIZE: &str = "
with now (us) as (select cast(round((julianday('now') - 2440587.5) * 86400000) as integer) * 1000),
     first as (select id, occurred_at from outbox_events order by id limit 1),
     last as (select id from outbox_events order by id desc limit 1),
     recent as (select id, occurred_at from outbox_events
                 where id >= (select id from last) - 100000 order by id limit 1)
select page_count * page_size,
       (select (now.us - occurred_at) / 1000000.0 from first, now),
       (select page_count * page_size * 1.0 / (last.id - first.id + 1) * (last.id - recent.id)
                   / max((now.us - recent.occurred_at) / 1000000.0, 0.001)
          from first, last, recent, now)
  from pragma_page_count(), pragma_page_size()";

/// Reads the books.
///
/// # Errors
/// When the file can't be read or is not migrated.
pub async fn read(connection: &mut SqliteConnection) -> Result<Books, anyhow::Error> {
    let EventId(newest_id) = newest_id(connection).await?;
    let pipelines = rows(sqlx::query(PIPELINES), connection)
        .await
        .context("read cursors and leases")?
        .iter()
        .map(|row| pipeline(row, newest_id))
        .collect::<Result<_, _>>()?;
    Ok(Books {
        newest_id,
        pipelines,
        log: log_size(connection).await?,
        server: None,
    })
}

/// What waits of each pipeline.
///
/// # Errors
/// When the file can't be read or is not migrated.
pub async fn waiting(connection: &mut SqliteConnection) -> Result<Vec<Waiting>, anyhow::Error> {
    let EventId(newest_id) = newest_id(connection).await?;
    let rows = rows(sqlx::query(WAITING), connection)
        .await
        .context("read cursors and leases")?;
    let waiting = |row: &SqliteRow| {
        let last_id: i64 = row.try_get_unchecked(2)?;
        Ok::<_, sqlx::Error>(Waiting {
            pipeline: row.try_get_unchecked(0)?,
            shard: row.try_get_unchecked(1)?,
            shards: 1,
            newest_id,
            backlog_ids: Some(backlog(newest_id, last_id)),
            oldest_unpublished_seconds: row.try_get_unchecked(4)?,
            oldest_unpublished_unknown: None,
            holder: row.try_get_unchecked(3)?,
        })
    };
    Ok(rows.iter().map(waiting).collect::<Result<_, _>>()?)
}

/// What the file takes.
///
/// # Errors
/// When the file can't be read or is not migrated.
pub async fn log_size(connection: &mut SqliteConnection) -> Result<LogSize, anyhow::Error> {
    let row = sqlx::query(LOG_SIZE)
        .fetch_one(connection)
        .await
        .context("ask for the size of the log")?;
    let bytes: i64 = row.try_get_unchecked(0)?;
    Ok(LogSize {
        bytes: bytes.unsigned_abs(),
        oldest_seconds: row.try_get_unchecked(1)?,
        bytes_per_second: row.try_get_unchecked(2)?,
    })
}

fn pipeline(row: &SqliteRow, newest_id: i64) -> Result<PipelineBooks, sqlx::Error> {
    let last_id: Option<i64> = row.try_get_unchecked(2)?;
    let holder: Option<String> = row.try_get_unchecked(3)?;
    let lease_ends_in_seconds: Option<f64> = row.try_get_unchecked(4)?;
    Ok(PipelineBooks {
        pipeline: row.try_get_unchecked(0)?,
        shard: row.try_get_unchecked(1)?,
        shards: 1,
        last_id,
        backlog_ids: last_id.map(|last_id| backlog(newest_id, last_id)),
        owner: holder.map(|holder| Owner {
            holder,
            lease_ends_in_seconds: lease_ends_in_seconds.unwrap_or_default(),
        }),
        cursor_age_seconds: last_id
            .and(row.try_get_unchecked::<Option<f64>, _>(5)?)
            .map(|age| age.max(0.0)),
        oldest_unpublished_seconds: row.try_get_unchecked(6)?,
        oldest_unpublished_unknown: None,
        parked_events: row.try_get_unchecked(7)?,
        parked_entities: row.try_get_unchecked(8)?,
        moved: None,
    })
}

async fn rows(
    query: Query<'_, Sqlite, SqliteArguments>,
    connection: &mut SqliteConnection,
) -> Result<Vec<SqliteRow>, sqlx::Error> {
    query.fetch_all(connection).await
}
