//! The view of the books in PostgreSQL.
//!
//! Needs no more rights than the relay has. What other sessions do is shown only to members of `pg_read_all_stats`.

use anyhow::Context;
use serde::Deserialize;
use sqlx::postgres::PgConnection;

use super::{Books, LogSize, Moved, Owner, PipelineBooks, Server, Waiting, backlog};
use crate::ledger::Pause;
use crate::position::Snapshot;
use crate::reason::reason;
use crate::source::postgres::{NEWEST_ID, ask};

/// Cursors and leases, one row per pipeline and shard. A few rows in all: no index matters.
const PIPELINES: &str = "
select n.pipeline,
       n.shard,
       coalesce(p.shards, 1) as shards,
       c.prev::text, c.cur::text, c.floor, c.ceiling, c.last_id,
       extract(epoch from clock_timestamp() - c.updated_at)::float8 as cursor_age_seconds,
       case when l.expires_at > clock_timestamp() then l.holder end as holder,
       -- An infinite time can't be subtracted from before PostgreSQL 17.
       case when isfinite(l.expires_at) then extract(epoch from l.expires_at - clock_timestamp())::float8 end
           as lease_ends_in_seconds,
       (select row_to_json(pause) from (
            select to_char(z.since at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"') as since, z.who as by, z.reason
              from outbox.pauses z where z.pipeline = n.pipeline) pause) as paused,
       case when c.system_identifier <> i.system_identifier then 'cluster'
            when c.timeline <> i.timeline then 'timeline' end as moved
  from (select pipeline, shard from outbox.cursors
         union select pipeline, shard from outbox.leases
         union select pipeline, 0 from outbox.pauses) n
  left join outbox.cursors c on c.pipeline = n.pipeline and c.shard = n.shard
  left join outbox.leases l on l.pipeline = n.pipeline and l.shard = n.shard
  left join outbox.pipelines p on p.pipeline = n.pipeline
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

/// Two rows found by primary key, and about a hundred samples; the sizes come from the file system. An empty partition has
/// a page for each index. What came in is told by the sample that is nearest to a day old, and at least an hour.
const LOG_SIZE: &str = "
with samples as (
    select s.* from outbox.samples s
     where s.system_identifier = (select c.system_identifier from pg_control_system() c))
select size.bytes,
       greatest(0, least(
            greatest(case when isfinite(first.occurred_at)
                          then extract(epoch from clock_timestamp() - first.occurred_at)::float8 end, age.at_least),
            age.at_most)) + case when first.id is null then null else 0 end as oldest_seconds,
       case when newest.id >= base.newest and last.id >= first.id then json_build_object(
            'observed_seconds', extract(epoch from clock_timestamp() - base.at)::float8,
            'ids', newest.id - base.newest,
            'bytes_per_event', size.used::float8 / (last.id - first.id + 1)) end as growth
  from (select coalesce(sum(pg_total_relation_size(t.relid)), 0)::bigint as bytes,
               coalesce(sum(greatest(0, pg_total_relation_size(t.relid) - current_setting('block_size')::bigint * (
                    select count(*) from pg_index i where i.indrelid in (c.oid, c.reltoastrelid)))), 0)::bigint as used
          from pg_partition_tree('outbox.events') t
          join pg_class c on c.oid = t.relid and c.relkind = 'r') size
 cross join (select case when s.is_called then s.last_value else 0 end as id from outbox.events_id_seq s) newest
  left join lateral (select id, xid, occurred_at from outbox.events order by id limit 1) first on true
  left join lateral (select id from outbox.events order by id desc limit 1) last on true
  left join lateral (
        select extract(epoch from clock_timestamp() - min(s.at)
                    filter (where pg_visible_in_snapshot(first.xid, s.seen)))::float8 as at_least,
               extract(epoch from clock_timestamp() - max(s.at)
                    filter (where not pg_visible_in_snapshot(first.xid, s.seen)))::float8 as at_most
          from samples s) age on true
  left join lateral (
        select s.at, s.newest from samples s where s.at <= clock_timestamp() - interval '1 hour'
         order by abs(extract(epoch from clock_timestamp() - interval '1 day' - s.at)) limit 1) base on true";

/// A few rows found by their keys, and the samples.
const RETAINED: &str = "
with samples as (
    select s.* from outbox.samples s
     where s.system_identifier = (select c.system_identifier from pg_control_system() c))
select (select json_build_object(
                'id', e.id,
                'at_least_seconds', extract(epoch from clock_timestamp() - (
                    select min(s.at) from samples s where pg_visible_in_snapshot(e.xid, s.seen)))::float8,
                'counted_seconds', (select max(s.counted) - min(s.counted)
                        filter (where pg_visible_in_snapshot(e.xid, s.seen)) from samples s),
                -- As outbox.is_behind has it.
                'held_by', (select coalesce(json_agg(distinct c.pipeline), '[]') from outbox.cursors c
                             where c.prev is null
                                or (e.xid >= pg_snapshot_xmin(c.prev)
                                    and not pg_visible_in_snapshot(e.xid, c.prev)
                                    and not (pg_visible_in_snapshot(e.xid, c.cur) and e.id <= c.last_id))),
                'parked', exists (select from outbox.parked p
                                   where not p.has_content and p.id = e.id and p.event_id = e.event_id),
                'replays', (select coalesce(json_agg(r.id), '[]') from outbox.replays r
                             where r.state = 'open' and e.id > r.last_id and e.id <= r.until_id))
          from (select id, xid, event_id from outbox.events order by id limit 1) e) as first,
       extract(epoch from clock_timestamp() - (select max(s.at) from samples s))::float8 as sampled_seconds_ago,
       (select coalesce(json_agg(k.conname || ' of ' || k.conrelid::regclass order by 1), '[]')
          from pg_constraint k
         where k.contype = 'f' and k.conparentid = 0
           and k.confrelid in (select t.relid from pg_partition_tree('outbox.events') t)) as foreign_keys,
       (select coalesce(json_agg(l), '[]') from (
            select a.pipeline, sum(a.events)::bigint as events,
                   extract(epoch from clock_timestamp() - max(a.at))::float8 as seconds_ago
              from outbox.acts a
             where a.who = 'retention' and a.action = 'lost' and a.at > clock_timestamp() - interval '7 days'
             group by a.pipeline
             order by a.pipeline) l) as lost";

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
    paused: Option<Pause>,
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
    dead_letters: i64,
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
    let relays = ask::all(
        connection,
        "select holder, json_agg(pipeline order by pipeline) as pipelines from outbox.members \
          where expires_at > clock_timestamp() group by holder order by min(joined_at), holder",
    )
    .await
    .context("look which relays are there")?;
    let log = log_size(connection).await?;
    let retained = ask::one(connection, RETAINED)
        .await
        .context("ask what is retained")?;
    let server: Server = ask::one(connection, SERVER)
        .await
        .context("ask about the server")?;
    Ok(Books {
        newest_id,
        pipelines,
        relays,
        log,
        retained,
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
        paused,
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
        dead_letters: parked.dead_letters,
        paused,
        moved,
        pipeline,
    })
}

/// Served by the index on (pipeline, `aggregate_type`, `aggregate_id`, id).
fn parked_count(pipeline: &str, is_ours: &str) -> String {
    format!(
        "select coalesce(sum(events), 0)::bigint as events, count(*) as entities, \
                coalesce(sum(dead), 0)::bigint as dead_letters \
           from (select count(*) as events, count(*) filter (where not holds) as dead from outbox.parked where pipeline = {} {is_ours} \
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
        "select extract(epoch from clock_timestamp() - min(occurred_at) \
                    filter (where isfinite(occurred_at)))::float8 as seconds from ({}) part",
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
