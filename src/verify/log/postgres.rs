//! The log and the books in PostgreSQL. Works through a pooler: each question is one transaction.

use anyhow::Context;
use futures_util::TryStreamExt;
use sqlx::postgres::{PgConnectOptions, PgConnection, PgRow};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Row};
use uuid::Uuid;

use super::{Books, Cursor, Emitted, LostEvents, Retained, Settled, gaps};
use crate::event::PipelineName;

pub(super) async fn open(options: &PgConnectOptions) -> Result<PgConnection, anyhow::Error> {
    let options = options.clone().disable_statement_logging();
    PgConnection::connect_with(&options).await.with_context(|| {
        format!(
            "connect to PostgreSQL at {}:{}, database {:?}",
            options.get_host(),
            options.get_port(),
            options.get_database().unwrap_or_default()
        )
    })
}

/// Cursor, parked and dropped ids in one statement and so in one snapshot: what was settled is published, parked or
/// dropped.
pub(super) async fn books(
    connection: &mut PgConnection,
    pipeline: &PipelineName,
) -> Result<Books, anyhow::Error> {
    const BOOKS: &str = "
select coalesce(array_agg(c.prev::text order by s.shard), '{}'), coalesce(array_agg(c.cur::text order by s.shard), '{}'),
       coalesce(array_agg(c.last_id order by s.shard), '{}'),
       bool_or(c.system_identifier <> i.system_identifier or c.timeline <> i.timeline) as moved,
       (select coalesce(array_agg(id order by id, event_id), '{}') from outbox.parked where pipeline = $1) as parked,
       (select coalesce(array_agg(id order by id, event_id), '{}') from outbox.dropped where pipeline = $1) as dropped,
       (select coalesce(array_agg(event_id::text order by id, event_id), '{}') from outbox.dropped where pipeline = $1)
           as dropped_event_ids,
       (select coalesce(array_agg(event_id::text order by id, event_id), '{}') from outbox.parked where pipeline = $1)
           as parked_event_ids
  from (select system_identifier,
               case when not pg_is_in_recovery()
                    then ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int end as timeline
          from pg_control_system()) i
 cross join generate_series(0, coalesce((select shards from outbox.pipelines where pipeline = $1), 1) - 1) s (shard)
  left join outbox.cursors c on c.pipeline = $1 and c.shard = s.shard";
    let mut transaction = unlimited(connection).await?;
    let row = sqlx::query(BOOKS)
        .persistent(false)
        .bind(pipeline.as_str())
        .fetch_one(&mut *transaction)
        .await
        .context("read the cursor and the parked events")?;
    let lost: Vec<(String, i64, String)> = sqlx::query_as(
        "select selector, events, to_char(at at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"') from outbox.acts \
          where who = 'retention' and action = 'lost' and pipeline = $1 order by id",
    )
    .persistent(false)
    .bind(pipeline.as_str())
    .fetch_all(&mut *transaction)
    .await
    .context("read what retention has removed unpublished")?;
    transaction.commit().await?;
    let moved = row.try_get::<Option<bool>, _>(3)?.unwrap_or_default();
    let snapshots = |column| row.try_get::<Vec<Option<String>>, _>(column);
    let last_ids: Vec<Option<i64>> = row.try_get(2)?;
    let windows = snapshots(0)?.into_iter().zip(snapshots(1)?).zip(last_ids);
    let cursors: Option<Vec<Cursor>> = windows
        .map(|((prev, cur), last_id)| {
            Some(Cursor {
                prev: prev?,
                cur: cur?,
                last_id: last_id?,
            })
        })
        .collect();
    let settled = cursors.filter(|_| !moved).map(Settled::Windows);
    let events = |ids, event_ids| {
        let ids: Vec<i64> = row.try_get(ids)?;
        let event_ids: Vec<String> = row.try_get(event_ids)?;
        let event_ids = event_ids.iter().map(|id| id.parse().unwrap_or_default());
        Ok::<_, sqlx::Error>(ids.into_iter().zip(event_ids).collect())
    };
    Ok(Books {
        settled,
        parked: events(4, 7)?,
        moved,
        dropped: events(5, 6)?,
        lost: lost.into_iter().map(LostEvents::from).collect(),
    })
}

pub(super) async fn kinds(
    connection: &mut PgConnection,
    ids: bool,
) -> Result<Vec<Emitted>, anyhow::Error> {
    let id = if ids { "aggregate_id" } else { "''" };
    let statement = format!("select distinct aggregate_type, {id}, event_type from outbox.events");
    let rows = rows(connection, statement).await?;
    rows.iter()
        .map(|row| {
            Ok(Emitted {
                id: 0,
                event_id: Uuid::nil(),
                aggregate_type: row.try_get(0)?,
                aggregate_id: row.try_get(1)?,
                event_type: row.try_get(2)?,
                payload: None,
                payload_bytes: None,
                headers: None,
                settled: false,
            })
        })
        .collect()
}

pub(super) async fn first_since(
    connection: &mut PgConnection,
    us: i64,
) -> Result<Option<i64>, anyhow::Error> {
    let statement = format!(
        "select min(id) from outbox.events where occurred_at >= timestamptz 'epoch' + {us} * interval '1 microsecond'"
    );
    Ok(rows(connection, statement).await?[0].try_get(0)?)
}

pub(super) async fn earliest_from(
    connection: &mut PgConnection,
    id: i64,
) -> Result<Option<i64>, anyhow::Error> {
    let statement = format!(
        "select (extract(epoch from min(occurred_at) filter (where isfinite(occurred_at))) * 1000000)::bigint \
           from outbox.events where id >= {id}"
    );
    Ok(rows(connection, statement).await?[0].try_get(0)?)
}

pub(super) async fn event_id(
    connection: &mut PgConnection,
    id: i64,
) -> Result<Option<String>, anyhow::Error> {
    let statement = format!("select event_id::text from outbox.events where id = {id}");
    let rows = rows(connection, statement).await?;
    Ok(rows.first().map(|row| row.try_get(0)).transpose()?)
}

async fn rows(
    connection: &mut PgConnection,
    statement: String,
) -> Result<Vec<PgRow>, anyhow::Error> {
    let mut transaction = unlimited(connection).await?;
    let query = sqlx::query(AssertSqlSafe(statement)).persistent(false);
    let rows = query.fetch_all(&mut *transaction).await;
    let rows = rows.context("ask about the log")?;
    transaction.commit().await?;
    Ok(rows)
}

/// Long reads are what an audit is. Names belong to `pg_catalog`, whatever a schema of the path has, and texts are read and written
/// in one way, whatever the database is set to; all of it ends with the transaction.
const BEGIN: &str = "begin isolation level repeatable read read only; \
    select pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true), \
           pg_catalog.set_config('standard_conforming_strings', 'on', true), \
           pg_catalog.set_config('timezone', 'UTC', true), \
           pg_catalog.set_config('statement_timeout', '0', true)";

async fn unlimited(connection: &mut PgConnection) -> Result<Transaction<'_>, anyhow::Error> {
    let transaction = connection.begin_with(BEGIN).await;
    transaction.context("begin to read the log")
}

type Transaction<'c> = sqlx::Transaction<'c, sqlx::Postgres>;

/// One pass in the order of the primary key; memory is that of one row.
pub(super) async fn read(
    connection: &mut PgConnection,
    from_id: i64,
    settled: Option<&Settled>,
    mut each: impl FnMut(&Emitted),
) -> Result<Retained, anyhow::Error> {
    const LOG: &str = "
select id, event_id, aggregate_type, aggregate_id, event_type, payload::text, payload_bytes, headers::text,
       coalesce(pg_visible_in_snapshot(xid, ($2::text[]::pg_snapshot[])[nth])
                or pg_visible_in_snapshot(xid, ($3::text[]::pg_snapshot[])[nth]) and id <= ($4::bigint[])[nth], false)
  from outbox.events
 cross join lateral (select case cardinality($4::bigint[]) when 0 then null when 1 then 1
                                 else 1 + outbox.shard_of(aggregate_type, aggregate_id, cardinality($4::bigint[])) end) s (nth)
 where id >= $1
 order by id";
    let cursors = match settled {
        Some(Settled::Windows(cursors)) => &cursors[..],
        Some(Settled::UpTo(_)) | None => &[],
    };
    let prev: Vec<&str> = cursors.iter().map(|cursor| &cursor.prev[..]).collect();
    let cur: Vec<&str> = cursors.iter().map(|cursor| &cursor.cur[..]).collect();
    let last_id: Vec<i64> = cursors.iter().map(|cursor| cursor.last_id).collect();
    let mut transaction = unlimited(connection).await?;
    let retained = retained(&mut transaction).await?;
    let mut rows = sqlx::query(LOG)
        .persistent(false)
        .bind(from_id)
        .bind(prev)
        .bind(cur)
        .bind(last_id)
        .fetch(&mut *transaction);
    while let Some(row) = rows.try_next().await.context("read the log")? {
        each(&event(&row).context("decode an event")?);
    }
    drop(rows);
    transaction.commit().await?;
    Ok(retained)
}

fn event(row: &PgRow) -> Result<Emitted, sqlx::Error> {
    Ok(Emitted {
        id: row.try_get(0)?,
        // Decoded by hand: the driver's own support for uuids is not built in.
        event_id: Uuid::from_slice(row.try_get_unchecked(1)?).unwrap_or_default(),
        aggregate_type: row.try_get(2)?,
        aggregate_id: row.try_get(3)?,
        event_type: row.try_get(4)?,
        payload: row.try_get(5)?,
        payload_bytes: row.try_get(6)?,
        headers: row.try_get(7)?,
        settled: row.try_get(8)?,
    })
}

async fn retained(connection: &mut PgConnection) -> Result<Retained, anyhow::Error> {
    const FIRST: &str = "select id from outbox.events order by id limit 1";
    // Bounds as the server writes them; the default partition has none. Retention empties a partition before it drops it.
    const BOUNDS: &str = "
select bound[1]::bigint, bound[2]::bigint
  from pg_inherits i
  join pg_class c on c.oid = i.inhrelid
 cross join regexp_match(pg_get_expr(c.relpartbound, c.oid), 
                          'FROM [(]''?(-?[0-9]+)''?[)] TO [(]''?(-?[0-9]+)''?[)]') bound
 where i.inhparent = 'outbox.events'::regclass and bound is not null
   and exists (select from outbox.events e where e.id >= bound[1]::bigint and e.id < bound[2]::bigint)
 order by 1";
    // Up to there old events are deleted one by one, around those that have to stay.
    const DELETED: &str =
        "select coalesce(max(up_to), 0) from outbox.upkeep where task = 'retention'";
    let first = sqlx::query_scalar(FIRST).persistent(false);
    let first = first.fetch_optional(&mut *connection).await;
    let bounds = sqlx::query_as(BOUNDS).persistent(false);
    let bounds: Result<Vec<(i64, i64)>, _> = bounds.fetch_all(&mut *connection).await;
    let gone = gaps(&bounds.context("read the partitions of the log")?);
    let deleted = sqlx::query_scalar(DELETED).persistent(false);
    let deleted: i64 = deleted
        .fetch_one(&mut *connection)
        .await
        .context("read how far events were deleted")?;
    let first: Option<i64> = first.context("read the oldest event")?;
    Ok(Retained {
        first: first.map(|first| first.max(deleted + 1)),
        gone,
    })
}
