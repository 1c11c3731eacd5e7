//! Parked events in PostgreSQL: set aside, due, resolved.

use std::collections::BTreeSet;

use anyhow::Context;
use bytes::Bytes;
use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{AssertSqlSafe, Connection, Executor, PgTransaction};

use super::{Fence, get, is_ours, literal, of_shard};
use crate::event::{Event, EventId, HeldEntity, Payload};
use crate::ledger::{Due, Fenced, Parked, Released, Resolution, Resolved, Settings};

/// The time as history has it.
const NOW: &str =
    "to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"')";

pub(super) async fn held(
    connection: &mut PgConnection,
    settings: &Settings,
) -> Result<Vec<HeldEntity>, anyhow::Error> {
    let rows = connection
        .fetch_all(sqlx::raw_sql(AssertSqlSafe(format!(
            "select aggregate_type, aggregate_id, min(id), max(id), count(*) from outbox.parked \
              where pipeline = {} and holds and {} group by 1, 2",
            literal(settings.pipeline.as_str()),
            is_ours(settings)
        ))))
        .await
        .context("read the parked entities")?;
    rows.iter()
        .map(|row| {
            Ok(HeldEntity {
                aggregate_type: get(row, 0)?,
                aggregate_id: get(row, 1)?,
                first: EventId(get(row, 2)?),
                last: EventId(get(row, 3)?),
                events: usize::try_from(get::<i64>(row, 4)?).unwrap_or_default(),
            })
        })
        .collect()
}

pub(super) async fn dead_letters(
    connection: &mut PgConnection,
    settings: &Settings,
) -> Result<Vec<EventId>, anyhow::Error> {
    let rows = connection
        .fetch_all(sqlx::raw_sql(AssertSqlSafe(format!(
            "select id from outbox.parked where pipeline = {} and not holds and {}",
            literal(settings.pipeline.as_str()),
            is_ours(settings)
        ))))
        .await
        .context("read the dead letters")?;
    rows.iter().map(|row| Ok(EventId(get(row, 0)?))).collect()
}

/// Begins a transaction that keeps the lease to its end; none when it is not ours any more.
///
/// Payloads and reasons need bound parameters. Prepared and used inside one transaction, which a pooler keeps on one server.
async fn fenced<'c>(
    connection: &'c mut PgConnection,
    settings: &Settings,
    fence: &Fence,
) -> Result<Option<PgTransaction<'c>>, anyhow::Error> {
    let mut transaction = connection.begin().await.context("begin")?;
    let ours = transaction
        .execute(sqlx::raw_sql(AssertSqlSafe(format!(
            "select 1 from outbox.cursors where {} for update",
            fence.holds(settings)
        ))))
        .await
        .context("check the lease")?;
    Ok((ours.rows_affected() > 0).then_some(transaction))
}

pub(super) async fn park(
    connection: &mut PgConnection,
    settings: &Settings,
    fence: &Fence,
    parked: &[Parked],
) -> Result<Fenced, anyhow::Error> {
    let Some(mut transaction) = fenced(connection, settings, fence).await? else {
        return Ok(Fenced::Lost);
    };
    for parked in parked {
        park_one(&mut transaction, settings, parked)
            .await
            .with_context(|| format!("park event {}", parked.event.id))?;
    }
    transaction
        .commit()
        .await
        .context("commit what was parked")?;
    Ok(Fenced::Written)
}

async fn park_one(
    connection: &mut PgConnection,
    settings: &Settings,
    Parked {
        event,
        error,
        holds,
    }: &Parked,
) -> Result<(), sqlx::Error> {
    let (json, bytes) = match &event.payload {
        Payload::Json(json) => (Some(String::from_utf8_lossy(json)), None),
        Payload::Encoded(bytes) => (None, Some(&bytes[..])),
        Payload::Ambiguous(json, bytes) => (Some(String::from_utf8_lossy(json)), Some(&bytes[..])),
        Payload::Tombstone | Payload::Unread(_) => (None, None),
    };
    sqlx::query(AssertSqlSafe(format!(
        "insert into outbox.parked (pipeline, id, event_id, aggregate_type, aggregate_id, event_type, payload, \
                payload_bytes, content_type, headers, occurred_at, xid, holds, error, attempts, history) \
         values ($1, $2, $3::text::uuid, $4, $5, $6, $7::text::json, $8, $9, $10::text::json, \
                timestamptz 'epoch' + $11 * interval '1 microsecond', \
                (select xid from outbox.events where id = $2), $12, $13, \
                case when $13 is null then 0 else 1 end, \
                case when $13 is null then '[]'::jsonb \
                     else jsonb_build_array(jsonb_build_object('at', {NOW}, 'error', $13::text)) end) \
         on conflict (pipeline, id) do nothing"
    )))
    .persistent(false)
    .bind(settings.pipeline.as_str())
    .bind(event.id.0)
    .bind(event.event_id.to_string())
    .bind(&event.aggregate_type[..])
    .bind(&event.aggregate_id[..])
    .bind(&event.event_type[..])
    .bind(json.as_deref())
    .bind(bytes)
    .bind(event.content_type.as_deref())
    .bind(event.headers.as_deref())
    .bind(event.occurred_at_us)
    .bind(holds)
    .bind(error.as_deref())
    .execute(connection)
    .await?;
    Ok(())
}

/// What is wanted is found through its own small index: without a wish this costs next to nothing. Of an entity with a
/// wish everything is due up to the first event that was rejected and that nobody asked for, or that has to be dropped
/// first, or that the cursor has not passed: as long as that comes out of the log again, so may what precedes it.
pub(super) async fn due(
    connection: &mut PgConnection,
    settings: &Settings,
    rows: usize,
    bytes: usize,
) -> Result<Vec<Due>, anyhow::Error> {
    let pipeline = literal(settings.pipeline.as_str());
    let is_ours = is_ours(settings);
    let of_entity = "pipeline = e.pipeline and aggregate_type = e.aggregate_type and aggregate_id = e.aggregate_id";
    // As the reader of the log sees it; of what the log has no more every cursor is past.
    let past = "(xid is null \
                 or pg_visible_in_snapshot(xid, (select prev from cursor)) \
                 or (pg_visible_in_snapshot(xid, (select cur from cursor)) and id <= (select last_id from cursor)))";
    let found = connection
        .fetch_all(sqlx::raw_sql(AssertSqlSafe(format!(
            "with cursor as (select prev, cur, last_id from outbox.cursors where {}), \
             entity as ( \
                select e.*, (select min(id) from outbox.parked \
                              where {of_entity} and holds \
                                and (wanted = 'drop' or (error is not null and wanted is null) or not {past})) \
                       as blocked_at \
                  from (select distinct pipeline, aggregate_type, aggregate_id from outbox.parked \
                         where pipeline = {pipeline} and wanted is not null and holds and {is_ours}) e), \
             turn as ( \
                select p.id from entity e cross join lateral ( \
                    select id from outbox.parked \
                     where {of_entity} and holds and (e.blocked_at is null or id < e.blocked_at) \
                     order by id limit {rows}) p \
                 union \
                select id from outbox.parked \
                 where pipeline = {pipeline} and wanted is not null and (wanted = 'drop' or not holds) and {past} \
                   and {is_ours} \
                 order by id limit {rows}), \
             sized as ( \
                select p.*, s.bytes, sum(s.bytes) over (order by p.id) as total \
                  from turn \
                  join outbox.parked p on p.pipeline = {pipeline} and p.id = turn.id \
                 cross join lateral ( \
                    select coalesce(octet_length(p.payload::text), 0) + coalesce(octet_length(p.payload_bytes), 0) \
                           + coalesce(octet_length(p.headers::text), 0)) s (bytes)) \
             select id, event_id::text, aggregate_type, aggregate_id, event_type, payload::text, payload_bytes, \
                    content_type, headers::text, (extract(epoch from occurred_at) * 1000000)::bigint, attempts, holds, \
                    wanted is not distinct from 'drop' \
               from sized where total <= {bytes} or total = bytes order by id",
            of_shard(settings)
        ))))
        .await
        .context("look for due events")?;
    found.iter().map(due_event).collect()
}

fn due_event(row: &PgRow) -> Result<Due, anyhow::Error> {
    let text = |column| get::<String>(row, column);
    let attempts: i32 = get(row, 10)?;
    let json: Option<String> = get(row, 5)?;
    let encoded: Option<Vec<u8>> = get(row, 6)?;
    let content_type: Option<String> = get(row, 7)?;
    let headers: Option<String> = get(row, 8)?;
    Ok(Due {
        event: Event {
            id: EventId(get(row, 0)?),
            event_id: text(1)?.parse().context("decode event_id")?,
            aggregate_type: text(2)?.into(),
            aggregate_id: text(3)?.into(),
            event_type: text(4)?.into(),
            payload: match (json.map(Bytes::from), encoded.map(Bytes::from)) {
                (None, None) => Payload::Tombstone,
                (Some(json), None) => Payload::Json(json),
                (None, Some(encoded)) => Payload::Encoded(encoded),
                (Some(json), Some(encoded)) => Payload::Ambiguous(json, encoded),
            },
            content_type: content_type.map(Into::into),
            headers: headers.map(Into::into),
            occurred_at_us: get(row, 9)?,
        },
        attempts: u32::try_from(attempts).unwrap_or_default(),
        holds: get(row, 11)?,
        drop: get(row, 12)?,
    })
}

pub(super) async fn resolve(
    connection: &mut PgConnection,
    settings: &Settings,
    fence: &Fence,
    resolved: &Resolved,
) -> Result<Resolution, anyhow::Error> {
    let Some(mut transaction) = fenced(connection, settings, fence).await? else {
        return Ok(Resolution::Lost);
    };
    for (id, error) in &resolved.rejected {
        // The last twenty times are enough to see a pattern.
        sqlx::query(AssertSqlSafe(format!(
            "update outbox.parked set wanted = null, error = $3, attempts = attempts + 1, \
                    history = case when jsonb_array_length(history) >= 20 then history - 0 else history end \
                              || jsonb_build_object('at', {NOW}, 'error', $3::text) \
              where pipeline = $1 and id = $2"
        )))
        .persistent(false)
        .bind(settings.pipeline.as_str())
        .bind(id.0)
        .bind(error)
        .execute(&mut *transaction)
        .await
        .with_context(|| format!("note that event {id} was rejected again"))?;
    }
    let released = remove(&mut transaction, settings, resolved).await?;
    transaction.commit().await.context("commit")?;
    Ok(Resolution::Written(released))
}

/// Removes rows, notes which were given up, and makes the next of their entities due.
async fn remove(
    connection: &mut PgConnection,
    settings: &Settings,
    Resolved {
        delivered, dropped, ..
    }: &Resolved,
) -> Result<Released, anyhow::Error> {
    let ids = |ids: &[EventId]| ids.iter().map(|id| id.0).collect::<Vec<i64>>();
    let removed: Vec<(i64, String, String, bool)> = sqlx::query_as(
        "with removed as ( \
            delete from outbox.parked \
             where pipeline = $1 and (id = any($2) or (id = any($3) and wanted = 'drop')) \
            returning id, event_id, aggregate_type, aggregate_id, holds), \
         noted as ( \
            insert into outbox.dropped (pipeline, id, event_id) \
            select $1, id, event_id from removed where id <> all($2) on conflict do nothing) \
         select id, aggregate_type, aggregate_id, holds from removed",
    )
    .persistent(false)
    .bind(settings.pipeline.as_str())
    .bind(ids(delivered))
    .bind(ids(dropped))
    .fetch_all(&mut *connection)
    .await
    .context("remove what is not parked any more")?;
    let gone: BTreeSet<i64> = removed.iter().map(|(id, ..)| *id).collect();
    let mut released = Released {
        free: Vec::new(),
        kept: dropped
            .iter()
            .filter(|id| !gone.contains(&id.0))
            .copied()
            .collect(),
    };
    let entities: BTreeSet<(String, String)> = removed
        .into_iter()
        .filter_map(|(_, kind, entity, holds)| holds.then_some((kind, entity)))
        .collect();
    if entities.is_empty() {
        return Ok(released);
    }
    let (types, ids): (Vec<String>, Vec<String>) = entities.into_iter().unzip();
    sqlx::query(
        "update outbox.parked p set wanted = 'redrive' \
           from unnest($2::text[], $3::text[]) e (aggregate_type, aggregate_id) \
          where p.pipeline = $1 and p.error is null and p.wanted is null \
            and p.id = (select min(id) from outbox.parked \
                         where pipeline = $1 and aggregate_type = e.aggregate_type \
                           and aggregate_id = e.aggregate_id and holds)",
    )
    .persistent(false)
    .bind(settings.pipeline.as_str())
    .bind(&types)
    .bind(&ids)
    .execute(&mut *connection)
    .await
    .context("release what waits")?;
    released.free = sqlx::query_as(
        "select e.aggregate_type, e.aggregate_id from unnest($2::text[], $3::text[]) e (aggregate_type, aggregate_id) \
          where not exists (select from outbox.parked \
                             where pipeline = $1 and aggregate_type = e.aggregate_type \
                               and aggregate_id = e.aggregate_id and holds)",
    )
    .persistent(false)
    .bind(settings.pipeline.as_str())
    .bind(&types)
    .bind(&ids)
    .fetch_all(connection)
    .await
    .context("look for entities that are free")?;
    Ok(released)
}
