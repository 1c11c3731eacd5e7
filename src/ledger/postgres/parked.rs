//! Parked events in PostgreSQL: set aside, due, resolved.

use std::collections::{BTreeSet, HashSet};

use anyhow::Context;
use bytes::Bytes;
use bytestring::ByteString;
use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{AssertSqlSafe, Connection, Executor, PgTransaction};

use super::{BEGIN, Fence, get, in_path, is_ours, literal, of_shard};
use crate::event::{Event, EventId, EventKey, HeldEntity, Payload};
use crate::ledger::{Due, Fenced, Parked, Released, Resolution, Resolved, Settings, storable};

/// The time as history has it.
const NOW: &str =
    "to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"')";

/// Whether a row with `xid` and `id` is behind the cursor `cursor`, as the reader of the log sees it; of what the log has no
/// more every cursor is past.
const PAST: &str = "(xid is null \
     or pg_visible_in_snapshot(xid, (select prev from cursor)) \
     or (pg_visible_in_snapshot(xid, (select cur from cursor)) and id <= (select last_id from cursor)))";

fn cursor(settings: &Settings) -> String {
    format!(
        "cursor as (select prev, cur, last_id from outbox.cursors where {})",
        of_shard(settings)
    )
}

pub(super) async fn held(
    connection: &mut PgConnection,
    settings: &Settings,
) -> Result<Vec<HeldEntity>, anyhow::Error> {
    let rows = connection
        .fetch_all(sqlx::raw_sql(AssertSqlSafe(in_path(&format!(
            "with {} select aggregate_type, aggregate_id, min(id), max(id), count(*), coalesce(bool_or({PAST}), false) \
               from outbox.parked where pipeline = {} and holds and {} group by 1, 2",
            cursor(settings),
            literal(settings.pipeline.as_str()),
            is_ours(settings)
        )))))
        .await
        .context("read the parked entities")?;
    let entity = |row: &PgRow| {
        Ok(HeldEntity {
            aggregate_type: get(row, 0)?,
            aggregate_id: get(row, 1)?,
            first: EventId(get(row, 2)?),
            last: EventId(get(row, 3)?),
            events: usize::try_from(get::<i64>(row, 4)?).unwrap_or_default(),
            is_passed: get(row, 5)?,
        })
    };
    rows.iter().map(entity).collect()
}

pub(super) async fn dead_letters(
    connection: &mut PgConnection,
    settings: &Settings,
) -> Result<Vec<EventKey>, anyhow::Error> {
    let rows = connection
        .fetch_all(sqlx::raw_sql(AssertSqlSafe(in_path(&format!(
            "select id, event_id::text from outbox.parked where pipeline = {} and not holds and {}",
            literal(settings.pipeline.as_str()),
            is_ours(settings)
        )))))
        .await
        .context("read the dead letters")?;
    let key = |row: &PgRow| {
        Ok(EventKey {
            id: EventId(get(row, 0)?),
            event_id: get::<String>(row, 1)?.parse().context("decode event_id")?,
        })
    };
    rows.iter().map(key).collect()
}

/// Begins a transaction that keeps the lease to its end; none when it is not ours any more.
///
/// Payloads and reasons need bound parameters. Prepared and used inside one transaction, which a pooler keeps on one server.
async fn fenced<'c>(
    connection: &'c mut PgConnection,
    settings: &Settings,
    fence: &Fence,
) -> Result<Option<PgTransaction<'c>>, anyhow::Error> {
    let mut transaction = connection.begin_with(BEGIN).await.context("begin")?;
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
    // All of them at once; where the server refuses one, each by itself, so that the others are stored.
    let mut savepoint = transaction.begin().await.context("set a savepoint")?;
    let mut refused = false;
    for parked in parked {
        match park_one(&mut savepoint, settings, parked).await {
            Ok(()) => {}
            Err(error) if is_about_the_row(&error) => {
                refused = true;
                break;
            }
            Err(error) => {
                return Err(error).with_context(|| format!("park event {}", parked.event.id));
            }
        }
    }
    if refused {
        savepoint.rollback().await.context("go back")?;
        for parked in parked {
            park_alone(&mut transaction, settings, parked)
                .await
                .with_context(|| format!("park event {}", parked.event.id))?;
        }
    } else {
        savepoint.commit().await.context("keep what was parked")?;
    }
    transaction
        .commit()
        .await
        .context("commit what was parked")?;
    Ok(Fenced::Written)
}

/// Data exceptions, limits of the program, and too little memory for the row.
fn is_about_the_row(error: &sqlx::Error) -> bool {
    error
        .as_database_error()
        .and_then(sqlx::error::DatabaseError::code)
        .is_some_and(|code| code.starts_with("22") || code.starts_with("54") || code == "53200")
}

/// Stores one event, or what can be stored of it: at the least that it was there, and why there is no more.
async fn park_alone(
    transaction: &mut PgTransaction<'_>,
    settings: &Settings,
    parked: &Parked,
) -> Result<(), anyhow::Error> {
    let mut savepoint = transaction.begin().await.context("set a savepoint")?;
    let error = match park_one(&mut savepoint, settings, parked).await {
        Ok(()) => return savepoint.commit().await.context("keep what was parked"),
        Err(error) if is_about_the_row(&error) => error,
        Err(error) => return Err(error.into()),
    };
    savepoint.rollback().await.context("go back")?;
    tracing::error!(
        pipeline = %settings.pipeline,
        event = parked.event.id.0,
        reason = %error,
        "parked an event without its content: the database can't store it"
    );
    let before = parked
        .error
        .as_deref()
        .unwrap_or("waits behind a parked event");
    let Event {
        id,
        event_id,
        aggregate_type,
        aggregate_id,
        event_type,
        ..
    } = &parked.event;
    let reason = storable(&format!(
        "{before}; the database can't store the event: {error}. It is in the log until its partition is removed; \
         `parked drop` lets its entity go on"
    ));
    sqlx::query(AssertSqlSafe(format!(
        "with {} insert into outbox.parked (pipeline, id, event_id, aggregate_type, aggregate_id, event_type, occurred_at, xid, \
                place, holds, error, attempts, has_content, history) \
         values ($1, $2, $3::text::uuid, $4, $5, $6, '-infinity', \
                (select xid from outbox.events where id = $2 and event_id = $3::text::uuid), {PLACE}{PAST}), $7, $8::text, 1, false, \
                jsonb_build_array(jsonb_build_object('at', {NOW}, 'error', $8::text))) \
         on conflict (pipeline, event_id) do nothing",
        cursor(settings)
    )))
    .persistent(false)
    .bind(settings.pipeline.as_str())
    .bind(id.0)
    .bind(event_id.to_string())
    .bind(aggregate_type.replace('\0', "\u{fffd}"))
    .bind(aggregate_id.replace('\0', "\u{fffd}"))
    .bind(storable(event_type))
    .bind(parked.holds)
    .bind(reason)
    .execute(&mut **transaction)
    .await?;
    Ok(())
}

/// The place of an event in its entity: behind all that the cursor has passed, also where its id came again.
const PLACE: &str = "(select least($2::bigint::numeric + coalesce(case when max(place) >= $2::bigint + max(place::numeric - id) \
            then max(place) else max(place::numeric - id) end, 0), 9223372036854775807)::bigint \
      from outbox.parked \
     where pipeline = $1 and entity = hashtextextended($4::text, hashtextextended($5::text, 0)) \
       and aggregate_type = $4 and aggregate_id = $5 and holds and event_id <> $3::text::uuid and ";

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
    // The time is copied from the log: microseconds since 1970 don't reach as far as PostgreSQL's years do. An interval is
    // multiplied as a float, which is exact for days of 24 hours and for less than one.
    sqlx::query(AssertSqlSafe(format!(
        "with {}, log as (select xid, occurred_at from outbox.events where id = $2 and event_id = $3::text::uuid limit 1) \
         insert into outbox.parked (pipeline, id, event_id, aggregate_type, aggregate_id, event_type, payload, \
                payload_bytes, content_type, headers, occurred_at, xid, place, holds, error, attempts, has_content, history) \
         values ($1, $2, $3::text::uuid, $4, $5, $6, $7, $8, $9, $10, \
                coalesce((select occurred_at from log), case \
                    when $11::bigint = 9223372036854775807 then timestamptz 'infinity' \
                    when $11::bigint < -210866803200000000 then timestamptz '-infinity' \
                    else timestamptz 'epoch' + $11::bigint / 86400000000 * interval '24:00' \
                         + $11::bigint % 86400000000 * interval '1 microsecond' end), \
                (select xid from log), {PLACE}{PAST}), $12, $13, \
                case when $13 is null then 0 else 1 end, $14, \
                case when $13 is null then '[]'::jsonb \
                     else jsonb_build_array(jsonb_build_object('at', {NOW}, 'error', $13::text)) end) \
         on conflict (pipeline, event_id) do nothing",
        cursor(settings)
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
    .bind(error.as_deref().map(storable))
    .bind(!matches!(event.payload, Payload::Unread(_)))
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
    fence: &Fence,
    (rows, bytes): (usize, usize),
) -> Result<Vec<Due>, anyhow::Error> {
    let pipeline = literal(settings.pipeline.as_str());
    let is_ours = is_ours(settings);
    let of_entity = "pipeline = e.pipeline and entity = e.entity and aggregate_type = e.aggregate_type \
                     and aggregate_id = e.aggregate_id";
    let found = connection
        .fetch_all(sqlx::raw_sql(AssertSqlSafe(in_path(&format!(
            "with {}, \
             entity as ( \
                select e.*, (select min(place) from outbox.parked \
                              where {of_entity} and holds \
                                and (wanted = 'drop' or (error is not null and wanted is null) or not {PAST})) \
                       as blocked_at \
                  from (select distinct pipeline, entity, aggregate_type, aggregate_id from outbox.parked \
                         where pipeline = {pipeline} and wanted is not null and holds and {is_ours}) e), \
             turn as ( \
                select p.place, p.event_id from entity e cross join lateral ( \
                    select place, event_id from outbox.parked \
                     where {of_entity} and holds and (e.blocked_at is null or place < e.blocked_at) \
                     order by place limit {rows}) p \
                 union \
                select place, event_id from outbox.parked \
                 where pipeline = {pipeline} and wanted is not null and (wanted = 'drop' or not holds) and {PAST} \
                   and {is_ours} \
                 order by 1, 2 limit {rows}), \
             sized as ( \
                select p.*, s.bytes, sum(s.bytes) over (order by p.place, p.event_id) as total \
                  from turn \
                  join outbox.parked p on p.pipeline = {pipeline} and p.event_id = turn.event_id \
                 cross join lateral ( \
                    select coalesce(octet_length(p.payload), 0) + coalesce(octet_length(p.payload_bytes), 0) \
                           + coalesce(octet_length(p.headers), 0)) s (bytes)) \
             select id, event_id::text, aggregate_type, aggregate_id, event_type, payload, \
                    chr(92) || 'x' || encode(payload_bytes, 'hex'), \
                    content_type, headers, \
                    case occurred_at when 'infinity' then 9223372036854775807 \
                                     when '-infinity' then -9223372036854775808 \
                         else greatest(least(trunc(extract(epoch from occurred_at) * 1000000), 9223372036854775807), \
                                       -9223372036854775808)::bigint end, \
                    attempts, holds, wanted is not distinct from 'drop', has_content \
               from sized where total <= {bytes} or total = bytes order by place, event_id",
            cursor(settings)
        )))))
        .await
        .context("look for due events")?;
    publishable(connection, settings, fence, &found).await
}

/// What can be read and has its content; of the rest the wish is taken back, and what follows in its entity stays.
async fn publishable(
    connection: &mut PgConnection,
    settings: &Settings,
    fence: &Fence,
    found: &[PgRow],
) -> Result<Vec<Due>, anyhow::Error> {
    let (mut due, mut bad) = (Vec::new(), Vec::new());
    let mut stopped: HashSet<(ByteString, ByteString)> = HashSet::new();
    for row in found {
        let content: bool = get(row, 13)?;
        match due_event(row) {
            Ok(this) if this.holds && stopped.contains(&entity_of(&this.event)) => {}
            Ok(this) if content || this.drop => due.push(this),
            Ok(this) => {
                stopped.insert(entity_of(&this.event));
                let why = "its content is in the log only, so it can be dropped and not published"
                    .to_owned();
                bad.push((this.event.key(), why));
            }
            Err(error) => {
                let reason = crate::reason::reason(&error);
                let key = EventKey {
                    id: EventId(get(row, 0)?),
                    event_id: get::<String>(row, 1)?.parse().context("decode event_id")?,
                };
                tracing::error!(pipeline = %settings.pipeline, event = key.id.0, reason,
                    "a parked event can't be read: it stays parked");
                bad.push((key, format!("the parked event can't be read: {reason}")));
                // Of which entity it is, is not known either: what follows is looked for again.
                break;
            }
        }
    }
    if !bad.is_empty() {
        let rejected = Resolved {
            rejected: bad,
            ..Resolved::default()
        };
        resolve(connection, settings, fence, &rejected).await?;
    }
    Ok(due)
}

fn entity_of(event: &Event) -> (ByteString, ByteString) {
    (event.aggregate_type.clone(), event.aggregate_id.clone())
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
    for (event, error) in &resolved.rejected {
        // The last twenty times are enough to see a pattern.
        sqlx::query(AssertSqlSafe(format!(
            "update outbox.parked set wanted = null, error = $3, attempts = attempts + 1, \
                    history = case when jsonb_array_length(history) >= 20 then history - 0 else history end \
                              || jsonb_build_object('at', {NOW}, 'error', $3::text) \
              where pipeline = $1 and event_id = $2::text::uuid"
        )))
        .persistent(false)
        .bind(settings.pipeline.as_str())
        .bind(event.event_id.to_string())
        .bind(storable(error))
        .execute(&mut *transaction)
        .await
        .with_context(|| format!("note that event {} was rejected again", event.id))?;
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
    let uuids = |events: &[EventKey]| {
        let uuids = events.iter().map(|event| event.event_id.to_string());
        uuids.collect::<Vec<String>>()
    };
    let removed: Vec<(String, String, String, bool)> = sqlx::query_as(
        "with removed as ( \
            delete from outbox.parked \
             where pipeline = $1 and (event_id = any($2::text[]::uuid[]) \
                                  or (event_id = any($3::text[]::uuid[]) and wanted = 'drop')) \
            returning id, event_id, aggregate_type, aggregate_id, holds), \
         noted as ( \
            insert into outbox.dropped (pipeline, id, event_id) \
            select $1, id, event_id from removed where event_id <> all($2::text[]::uuid[]) on conflict do nothing) \
         select event_id::text, aggregate_type, aggregate_id, holds from removed",
    )
    .persistent(false)
    .bind(settings.pipeline.as_str())
    .bind(uuids(delivered))
    .bind(uuids(dropped))
    .fetch_all(&mut *connection)
    .await
    .context("remove what is not parked any more")?;
    let gone: BTreeSet<String> = removed.iter().map(|(id, ..)| id.clone()).collect();
    let mut released = Released {
        free: Vec::new(),
        kept: (dropped.iter().copied())
            .filter(|event| !gone.contains(&event.event_id.to_string()))
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
            and p.event_id = (select event_id from outbox.parked \
                               where pipeline = $1 and entity = hashtextextended(e.aggregate_type, hashtextextended(e.aggregate_id, 0)) \
                                 and aggregate_type = e.aggregate_type and aggregate_id = e.aggregate_id and holds \
                               order by place limit 1)",
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
                             where pipeline = $1 and entity = hashtextextended(e.aggregate_type, hashtextextended(e.aggregate_id, 0)) \
                               and aggregate_type = e.aggregate_type and aggregate_id = e.aggregate_id and holds)",
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
