//! The view of the books in a SQLite file.

use anyhow::Context;
use sqlx::sqlite::{SqliteConnection, SqliteRow};
use sqlx::{Row, Sqlite, query::Query, sqlite::SqliteArguments};

use super::{Books, Growth, LogSize, Owner, PipelineBooks, Retained, Waiting, backlog};
use crate::event::EventId;
use crate::ledger::Pause;
use crate::source::sqlite::newest_id;

/// Everything about every pipeline. The oldest event is the first after the cursor, found by its id.
const PIPELINES: &str = "
with now (us) as (select cast(round((julianday('now') - 2440587.5) * 86400000) as integer) * 1000),
     names (pipeline, shard) as (
        select pipeline, shard from outbox_cursors union select pipeline, shard from outbox_leases
         union select pipeline, 0 from outbox_pauses)
select n.pipeline, n.shard, c.last_id,
       case when l.expires_at > now.us then l.holder end,
       (l.expires_at - now.us) / 1000000.0,
       (now.us - c.updated_at) / 1000000.0,
       (select (now.us - e.occurred_at) / 1000000.0 from outbox_events e
         where e.id > coalesce(c.last_id, 9223372036854775807) order by e.id limit 1),
       (select count(*) from outbox_parked p where p.pipeline = n.pipeline),
       (select count(*) from (
            select 1 from outbox_parked p where p.pipeline = n.pipeline group by p.aggregate_type, p.aggregate_id)),
       strftime('%Y-%m-%dT%H:%M:%SZ', z.since / 1000000.0, 'unixepoch'), z.who, z.reason,
       (select count(*) from outbox_parked p where p.pipeline = n.pipeline and not p.holds)
  from names n
 cross join now
  left join outbox_cursors c on c.pipeline = n.pipeline and c.shard = n.shard
  left join outbox_leases l on l.pipeline = n.pipeline and l.shard = n.shard
  left join outbox_pauses z on z.pipeline = n.pipeline
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

/// Two rows found by rowid, and about a hundred samples. An empty file has a page for each table and index.
const LOG_SIZE: &str = "
with now (us) as (select cast(round((julianday('now') - 2440587.5) * 86400000) as integer) * 1000),
     first as (select id, occurred_at from outbox_events order by id limit 1),
     last as (select id from outbox_events order by id desc limit 1),
     age as (select max(now.us - s.at) filter (where s.newest >= first.id) as at_least,
                    min(now.us - s.at) filter (where s.newest < first.id) as at_most
               from first, now left join outbox_samples s on true),
     base as (select s.at, s.newest from outbox_samples s, now where s.at <= now.us - 3600000000
               order by abs(now.us - 86400000000 - s.at) limit 1)
select page_count * page_size,
       (select max(0, min(max(now.us - first.occurred_at, coalesce(age.at_least, now.us - first.occurred_at)),
                          coalesce(age.at_most, 9e18))) / 1000000.0
          from first, now, age),
       (select (now.us - base.at) / 1000000.0 from base, now),
       (select (select max(seq) from sqlite_sequence where name = 'outbox_events') - base.newest from base),
       (select max(0, page_count - freelist_count - (select count(*) from sqlite_schema where rootpage > 0)) * page_size * 1.0
                   / (last.id - first.id + 1)
          from first, last)
  from pragma_page_count(), pragma_page_size(), pragma_freelist_count()";

/// A few rows found by their keys, and the samples.
const RETAINED: &str = "
with now (us) as (select cast(round((julianday('now') - 2440587.5) * 86400000) as integer) * 1000)
select json_object(
    'first', (select json_object(
                'id', e.id,
                'at_least_seconds', (select max(now.us - s.at) / 1000000.0 from outbox_samples s where s.newest >= e.id),
                'counted_seconds', (select max(s.counted) - min(s.counted) filter (where s.newest >= e.id)
                                      from outbox_samples s),
                'held_by', (select json_group_array(c.pipeline) from outbox_cursors c where coalesce(c.last_id, 0) < e.id),
                'parked', json(iif(exists (select 1 from outbox_parked p where p.has_content = 0 and p.event_id = e.event_id),
                                   'true', 'false')),
                'replays', (select json_group_array(r.id) from outbox_replays r
                             where r.state = 'open' and e.id > r.last_id and e.id <= r.until_id))
              from (select id, event_id from outbox_events order by id limit 1) e),
    'sampled_seconds_ago', (select (now.us - max(s.at)) / 1000000.0 from outbox_samples s),
    'foreign_keys', json('[]'),
    'lost', (select json_group_array(json_object('pipeline', l.pipeline, 'events', l.events, 'seconds_ago', l.seconds_ago))
               from (select a.pipeline, sum(a.events) as events, (now.us - max(a.at)) / 1000000.0 as seconds_ago
                       from outbox_acts a
                      where a.who = 'retention' and a.action = 'lost' and a.at > now.us - 604800000000
                      group by a.pipeline) l))
  from now";

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
        relays: Vec::new(),
        log: log_size(connection).await?,
        retained: retained(connection).await?,
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
    let observed_seconds: Option<f64> = row.try_get_unchecked(2)?;
    let ids: Option<i64> = row.try_get_unchecked(3)?;
    let bytes_per_event: Option<f64> = row.try_get_unchecked(4)?;
    let growth = observed_seconds.zip(ids.zip(bytes_per_event)).map(
        |(observed_seconds, (ids, bytes_per_event))| Growth {
            observed_seconds,
            ids,
            bytes_per_event,
        },
    );
    Ok(LogSize {
        bytes: bytes.unsigned_abs(),
        oldest_seconds: row.try_get_unchecked(1)?,
        growth: growth.filter(|growth| growth.ids >= 0),
    })
}

async fn retained(connection: &mut SqliteConnection) -> Result<Retained, anyhow::Error> {
    let document: String = sqlx::query_scalar(RETAINED)
        .fetch_one(connection)
        .await
        .context("ask what is retained")?;
    serde_json::from_str(&document).context("understand what is retained")
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
        dead_letters: row.try_get_unchecked(12)?,
        paused: paused(row)?,
        moved: None,
    })
}

fn paused(row: &SqliteRow) -> Result<Option<Pause>, sqlx::Error> {
    let Some(since) = row.try_get_unchecked(9)? else {
        return Ok(None);
    };
    Ok(Some(Pause {
        since,
        by: row.try_get_unchecked(10)?,
        reason: row.try_get_unchecked(11)?,
    }))
}

async fn rows(
    query: Query<'_, Sqlite, SqliteArguments>,
    connection: &mut SqliteConnection,
) -> Result<Vec<SqliteRow>, sqlx::Error> {
    query.fetch_all(connection).await
}
