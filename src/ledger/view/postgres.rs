//! The view of the books in PostgreSQL.
//!
//! Needs no more rights than the relay has. What other sessions do is shown only to members of `pg_read_all_stats`.

use anyhow::Context;
use serde::Deserialize;
use sqlx::postgres::PgConnection;

use super::{Books, LogSize, Moved, Owner, PipelineBooks, Server, Waiting, backlog};
use crate::position::Snapshot;
use crate::reason::reason;
use crate::source::postgres::{NEWEST_ID, ask};

/// Cursors and leases, one row per pipeline and shard. A few rows in all: no index matters.
const PIPELINES: &str = "
select coalesce(c.pipeline, l.pipeline) as pipeline,
       coalesce(c.shard, l.shard) as shard,
       coalesce(p.shards, 1) as shards,
       c.prev::text, c.cur::text, c.floor, c.ceiling, c.last_id,
       extract(epoch from clock_timestamp() - c.updated_at)::float8 as cursor_age_seconds,
       case when l.expires_at > clock_timestamp() then l.holder end as holder,
       -- An infinite time can't be subtracted from before PostgreSQL 17.
       case when isfinite(l.expires_at) then extract(epoch from l.expires_at - clock_timestamp())::float8 end
           as lease_ends_in_seconds,
       case when c.system_identifier <> i.system_identifier then 'cluster'
            when c.timeline <> i.timeline then 'timeline' end as moved
  from outbox.cursors c
  full join outbox.leases l on l.pipeline = c.pipeline and l.shard = c.shard
  left join outbox.pipelines p on p.pipeline = coalesce(c.pipeline, l.pipeline)
 cross join (
    select system_identifier,
           case when not pg_is_in_recovery()
                then ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int end as timeline
      from pg_control_system()) i
 order by 1, 2";

/// What others have open. `pg_stat_activity` hides times from those who may not see them.
const SERVER: &str = "
select current_setting('server_version') as version,
       pg_is_in_recovery() as in_recovery,
       pg_has_role(current_user, 'pg_read_all_stats', 'usage') as sees_all_transactions,
       (select row_to_json(t) from (
            select extract(epoch from clock_timestamp() - xact_start)::float8 as seconds, pid,
                   usename::text as \"user\", datname::text as database, application_name as application, state
              from pg_stat_activity
             where xact_start is not null and backend_type = 'client backend' and pid <> pg_backend_pid()
             order by xact_start
             limit 1) t) as oldest_transaction,
       p.prepared_transactions,
       p.oldest_prepared_seconds
  from (select count(*) as prepared_transactions,
               extract(epoch from clock_timestamp() - min(prepared))::float8 as oldest_prepared_seconds
          from pg_prepared_xacts) p";

/// Three rows found by primary key; the sizes come from the file system.
const LOG_SIZE: &str = "
select size.bytes,
       extract(epoch from clock_timestamp() - first.occurred_at)::float8 as oldest_seconds,
       size.bytes::float8 / (last.id - first.id + 1) * (last.id - recent.id)
           / greatest(extract(epoch from clock_timestamp() - recent.occurred_at)::float8, 0.001) as bytes_per_second
  from (select coalesce(sum(pg_total_relation_size(relid)), 0)::bigint as bytes
          from pg_partition_tree('outbox.events')) size
  left join lateral (select id, occurred_at from outbox.events order by id limit 1) first on true
  left join lateral (select id, occurred_at from outbox.events order by id desc limit 1) last on true
  left join lateral (
        select id, occurred_at from outbox.events where id >= last.id - 100000 order by id limit 1) recent on true";

#[derive(Deserialize)]
struct PipelineRow {
    pipeline: String,
    shard: i32,
    shards: i32,
    prev: Option<String>,
    cur: Option<String>,
    floor: Option<i64>,
    ceiling: Option<i64>,
    last_id: Option<i64>,
    cursor_age_seconds: Option<f64>,
    holder: Option<String>,
    lease_ends_in_seconds: Option<f64>,
    moved: Option<Moved>,
}

#[derive(Deserialize)]
struct Newest {
    newest_id: i64,
}

#[derive(Deserialize)]
struct Age {
    seconds: Option<f64>,
}

#[derive(Deserialize)]
struct ParkedCount {
    events: i64,
    entities: i64,
}

/// Reads the books.
///
/// # Errors
/// When the database refuses, in particular when it is not migrated.
pub async fn read(connection: &mut PgConnection) -> Result<Books, anyhow::Error> {
    let (rows, newest_id) = rows(connection).await?;
    let mut pipelines = Vec::with_capacity(rows.len());
    for row in rows {
        pipelines.push(pipeline(connection, row, newest_id).await?);
    }
    let log = log_size(connection).await?;
    let server: Server = ask::one(connection, SERVER)
        .await
        .context("ask about the server")?;
    Ok(Books {
        newest_id,
        pipelines,
        log,
        server: Some(server),
    })
}

/// What waits of each shard.
///
/// # Errors
/// When the database refuses, in particular when it is not migrated.
pub async fn waiting(connection: &mut PgConnection) -> Result<Vec<Waiting>, anyhow::Error> {
    let (rows, newest_id) = rows(connection).await?;
    let mut waiting = Vec::with_capacity(rows.len());
    for row in rows {
        let (oldest_unpublished_seconds, oldest_unpublished_unknown) =
            age_of_oldest(connection, &row).await?;
        waiting.push(Waiting {
            newest_id,
            backlog_ids: row.last_id.map(|last_id| backlog(newest_id, last_id)),
            oldest_unpublished_seconds,
            oldest_unpublished_unknown,
            pipeline: row.pipeline,
            shard: row.shard,
            shards: row.shards,
            holder: row.holder,
        });
    }
    Ok(waiting)
}

async fn rows(connection: &mut PgConnection) -> Result<(Vec<PipelineRow>, i64), anyhow::Error> {
    let rows = ask::all(connection, PIPELINES)
        .await
        .context("read cursors and leases")?;
    let Newest { newest_id } = ask::one(connection, &format!("select {NEWEST_ID} as newest_id"))
        .await
        .context("read the newest id")?;
    Ok((rows, newest_id))
}

/// The age of the oldest event that waits, if there is one, or why that is not known.
async fn age_of_oldest(
    connection: &mut PgConnection,
    row: &PipelineRow,
) -> Result<(Option<f64>, Option<String>), anyhow::Error> {
    if row.moved.is_some() {
        let why = "the cursor belongs to another server or timeline";
        return Ok((None, Some(why.to_owned())));
    }
    let Some(statement) = oldest_unpublished(row)? else {
        return Ok((None, None));
    };
    Ok(match ask::one::<Age>(connection, &statement).await {
        Ok(Age { seconds }) => (seconds, None),
        Err(error) => (None, Some(reason(&error))),
    })
}

/// What the log takes.
///
/// # Errors
/// When the database refuses, in particular when it is not migrated.
pub async fn log_size(connection: &mut PgConnection) -> Result<LogSize, anyhow::Error> {
    ask::one(connection, LOG_SIZE)
        .await
        .context("ask for the size of the log")
}

impl PipelineRow {
    /// Empty, or `and …`: which rows with an entity are the shard's.
    fn is_ours(&self) -> String {
        let Self { shard, shards, .. } = self;
        match shards {
            ..=1 => String::new(),
            _ => format!("and outbox.shard_of(aggregate_type, aggregate_id, {shards}) = {shard}"),
        }
    }
}

async fn pipeline(
    connection: &mut PgConnection,
    row: PipelineRow,
    newest_id: i64,
) -> Result<PipelineBooks, anyhow::Error> {
    let is_ours = row.is_ours();
    let (oldest_unpublished_seconds, oldest_unpublished_unknown) =
        age_of_oldest(connection, &row).await?;
    let PipelineRow {
        pipeline,
        shard,
        shards,
        last_id,
        cursor_age_seconds,
        holder,
        lease_ends_in_seconds,
        moved,
        ..
    } = row;
    let parked: ParkedCount = ask::one(connection, &parked_count(&pipeline, &is_ours))
        .await
        .context("count parked events")?;
    Ok(PipelineBooks {
        shard,
        shards,
        last_id,
        backlog_ids: last_id.map(|last_id| backlog(newest_id, last_id)),
        owner: holder.map(|holder| Owner {
            holder,
            lease_ends_in_seconds: lease_ends_in_seconds.unwrap_or_default(),
        }),
        cursor_age_seconds,
        oldest_unpublished_seconds,
        oldest_unpublished_unknown,
        parked_events: parked.events,
        parked_entities: parked.entities,
        moved,
        pipeline,
    })
}

/// Served by the index on (pipeline, `aggregate_type`, `aggregate_id`, id).
fn parked_count(pipeline: &str, is_ours: &str) -> String {
    format!(
        "select coalesce(sum(events), 0)::bigint as events, count(*) as entities \
           from (select count(*) as events from outbox.parked where pipeline = {} {is_ours} \
                  group by aggregate_type, aggregate_id) entity",
        ask::literal(pipeline)
    )
}

/// The age of the oldest event that the cursor has not passed; none without a cursor.
///
/// Each part is one row found through an index, whatever is retained: what is left of the window by its ids; the rows of
/// transactions that were open by (xid, id); and of everything newer the first by (xid, id), which is about the oldest.
fn oldest_unpublished(row: &PipelineRow) -> Result<Option<String>, anyhow::Error> {
    let (Some(prev), Some(cur), Some(floor), Some(ceiling), Some(last_id)) =
        (&row.prev, &row.cur, row.floor, row.ceiling, row.last_id)
    else {
        return Ok(None);
    };
    let (prev, cur): (Snapshot, Snapshot) = (prev.parse()?, cur.parse()?);
    let mut parts = Vec::new();
    let is_ours = row.is_ours();
    if last_id < ceiling {
        parts.push(format!(
            "(select occurred_at from outbox.events where id > {} and id <= {ceiling} \
                 and pg_visible_in_snapshot(xid, '{cur}') and not pg_visible_in_snapshot(xid, '{prev}') {is_ours} \
               order by id limit 1)",
            last_id.max(floor)
        ));
        parts.extend(of_open_transactions(
            &prev,
            &format!(
                "and id > {last_id} and id <= {floor} and pg_visible_in_snapshot(xid, '{cur}') {is_ours}"
            ),
        ));
    }
    parts.extend(of_open_transactions(&cur, &is_ours));
    parts.push(format!(
        "(select occurred_at from outbox.events where xid >= '{}'::xid8 {is_ours} order by xid, id limit 1)",
        cur.xmax
    ));
    Ok(Some(format!(
        "select extract(epoch from clock_timestamp() - min(occurred_at))::float8 as seconds from ({}) part",
        parts.join(" union all ")
    )))
}

/// Asked for as the reader asks for late rows, so that the index on `(xid, id)` serves it whatever the statistics say.
fn of_open_transactions(snapshot: &Snapshot, condition: &str) -> Option<String> {
    let xids: Vec<String> = snapshot.in_progress.iter().map(u64::to_string).collect();
    (!xids.is_empty()).then(|| {
        format!(
            "(select e.occurred_at from unnest('{{{}}}'::xid8[]) as late (xid) cross join lateral (\
                select occurred_at from outbox.events where xid >= late.xid and xid <= late.xid {condition} \
                 order by xid, id limit 1) e)",
            xids.join(",")
        )
    })
}
