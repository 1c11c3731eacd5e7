//! Parked events in a SQLite file: set aside, due, resolved.

use std::collections::BTreeSet;

use anyhow::{Context, ensure};
use bytes::Bytes;
use sqlx::sqlite::{SqliteConnection, SqliteRow};
use sqlx::{Connection, Row, SqliteTransaction};

use crate::event::{Event, EventId, EventKey, HeldEntity, Payload};
use crate::ledger::{Due, Fenced, Parked, Released, Resolution, Resolved, Settings, storable};

pub(super) async fn held(
    connection: &mut SqliteConnection,
    settings: &Settings,
) -> Result<Vec<HeldEntity>, anyhow::Error> {
    let rows = sqlx::query(
        "select aggregate_type, aggregate_id, min(id), max(id), count(*),
                min(id) <= coalesce((select last_id from outbox_cursors where pipeline = ?1 and shard = 0), 0)
           from outbox_parked where pipeline = ?1 and holds group by 1, 2",
    )
    .bind(settings.pipeline.as_str())
    .fetch_all(connection)
    .await
    .context("read the parked entities")?;
    let entity = |row: &SqliteRow| -> Result<HeldEntity, sqlx::Error> {
        let events: i64 = row.try_get_unchecked(4)?;
        Ok(HeldEntity {
            aggregate_type: row.try_get_unchecked(0)?,
            aggregate_id: row.try_get_unchecked(1)?,
            first: EventId(row.try_get_unchecked(2)?),
            last: EventId(row.try_get_unchecked(3)?),
            events: usize::try_from(events).unwrap_or_default(),
            is_passed: row.try_get_unchecked(5)?,
        })
    };
    Ok(readable(settings, &rows, 2, entity))
}

pub(super) async fn dead_letters(
    connection: &mut SqliteConnection,
    settings: &Settings,
) -> Result<Vec<EventKey>, anyhow::Error> {
    let rows =
        sqlx::query("select id, event_id from outbox_parked where pipeline = ?1 and not holds")
            .bind(settings.pipeline.as_str())
            .fetch_all(connection)
            .await
            .context("read the dead letters")?;
    let key = |row: &SqliteRow| -> Result<EventKey, anyhow::Error> {
        let event_id: String = row.try_get_unchecked(1)?;
        Ok(EventKey {
            id: EventId(row.try_get_unchecked(0)?),
            event_id: event_id.parse()?,
        })
    };
    Ok(readable(settings, &rows, 0, key))
}

/// What can be read of the rows. A column of a file takes values of any type: a row that was spoilt by hand is one bad row.
fn readable<T, E: Into<anyhow::Error>>(
    settings: &Settings,
    rows: &[SqliteRow],
    id_column: usize,
    read: impl Fn(&SqliteRow) -> Result<T, E>,
) -> Vec<T> {
    let tell = |row: &SqliteRow, error: E| {
        let id: i64 = row.try_get_unchecked(id_column).unwrap_or_default();
        tracing::error!(pipeline = %settings.pipeline, event = id, reason = %crate::reason::reason(&error.into()),
            "a parked event can't be read: it stays parked");
    };
    let rows = rows.iter();
    rows.filter_map(|row| read(row).map_err(|error| tell(row, error)).ok())
        .collect()
}

/// Begins a transaction that keeps the lease to its end; none when it is not ours any more.
async fn fenced<'c>(
    connection: &'c mut SqliteConnection,
    settings: &Settings,
    epoch: i64,
) -> Result<Option<SqliteTransaction<'c>>, anyhow::Error> {
    let mut transaction = connection
        .begin_with("begin immediate")
        .await
        .context("begin")?;
    let ours: Option<i64> = sqlx::query_scalar(
        "select 1 from outbox_cursors where pipeline = ?1 and shard = 0 and epoch = ?2",
    )
    .bind(settings.pipeline.as_str())
    .bind(epoch)
    .fetch_optional(&mut *transaction)
    .await
    .context("check the lease")?;
    if ours.is_some() {
        return Ok(Some(transaction));
    }
    transaction.rollback().await.context("end")?;
    Ok(None)
}

pub(super) async fn park(
    connection: &mut SqliteConnection,
    settings: &Settings,
    epoch: i64,
    parked: &[Parked],
) -> Result<Fenced, anyhow::Error> {
    let Some(mut transaction) = fenced(connection, settings, epoch).await? else {
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
    connection: &mut SqliteConnection,
    settings: &Settings,
    Parked {
        event,
        error,
        holds,
    }: &Parked,
) -> Result<(), sqlx::Error> {
    let (json, encoded) = match &event.payload {
        Payload::Json(json) => (Some(&json[..]), None),
        Payload::Encoded(encoded) => (None, Some(&encoded[..])),
        Payload::Ambiguous(json, encoded) => (Some(&json[..]), Some(&encoded[..])),
        Payload::Tombstone | Payload::Unread(_) => (None, None),
    };
    // The cast makes a text of the bytes without a look at them: they stay what the writer wrote.
    sqlx::query(
        "insert into outbox_parked (pipeline, id, event_id, aggregate_type, aggregate_id, event_type, payload,
                payload_bytes, content_type, headers, occurred_at, holds, error, attempts, has_content, history)
         values (?1, ?2, ?3, ?4, ?5, ?6, cast(?7 as text), ?8, ?9, ?10, ?11, ?12, ?13, ?13 is not null, ?14,
                case when ?13 is null then '[]'
                     else json_array(json_object('at', strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), 'error', ?13)) end)
         on conflict (pipeline, event_id) do nothing",
    )
    .bind(settings.pipeline.as_str())
    .bind(event.id.0)
    .bind(event.event_id.to_string())
    .bind(&event.aggregate_type[..])
    .bind(&event.aggregate_id[..])
    .bind(&event.event_type[..])
    .bind(json)
    .bind(encoded)
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

/// Of an entity with a wish everything is due up to the first event that was rejected and that nobody asked for, or that
/// has to be dropped first, or that the cursor has not passed: as long as that comes out of the log again, so may what
/// precedes it.
const DUE: &str = "
with cursor as (select coalesce(last_id, 0) as last_id from outbox_cursors where pipeline = ?1 and shard = 0),
entity as (
    select m.aggregate_type, m.aggregate_id,
           (select min(b.id) from outbox_parked b
             where b.pipeline = ?1 and b.aggregate_type = m.aggregate_type and b.aggregate_id = m.aggregate_id
               and b.holds and (b.wanted = 'drop' or (b.error is not null and b.wanted is null)
                            or b.id > (select last_id from cursor))) as blocked_at
      from (select distinct aggregate_type, aggregate_id from outbox_parked
             where pipeline = ?1 and wanted is not null and holds) m),
turn as (
    select p.id, p.event_id from entity e
      join outbox_parked p on p.pipeline = ?1 and p.aggregate_type = e.aggregate_type and p.aggregate_id = e.aggregate_id
       and p.holds and (e.blocked_at is null or p.id < e.blocked_at)
     union
    select id, event_id from outbox_parked
     where pipeline = ?1 and wanted is not null and (wanted = 'drop' or not holds) and id <= (select last_id from cursor)
     order by 1, 2 limit ?2),
sized as (
    select p.*, coalesce(octet_length(p.payload), 0) + coalesce(length(p.payload_bytes), 0)
                + coalesce(octet_length(p.headers), 0) as bytes
      from turn
      join outbox_parked p on p.pipeline = ?1 and p.event_id = turn.event_id),
summed as (select *, sum(bytes) over (order by id, event_id) as total from sized)
select id, event_id, aggregate_type, aggregate_id, event_type, cast(payload as blob), payload_bytes, content_type, headers,
       occurred_at, attempts, holds, wanted is 'drop', has_content
  from summed where total <= ?3 or total = bytes order by id, event_id";

pub(super) async fn due(
    connection: &mut SqliteConnection,
    settings: &Settings,
    rows: usize,
    bytes: usize,
) -> Result<Vec<Due>, anyhow::Error> {
    let rows = sqlx::query(DUE)
        .bind(settings.pipeline.as_str())
        .bind(i64::try_from(rows).unwrap_or(i64::MAX))
        .bind(i64::try_from(bytes).unwrap_or(i64::MAX))
        .fetch_all(&mut *connection)
        .await
        .context("look for due events")?;
    let mut due = Vec::with_capacity(rows.len());
    for row in &rows {
        // What follows in its entity must not overtake it.
        match due_event(row) {
            Ok(this) => due.push(this),
            Err(error) => {
                let id: i64 = row.try_get_unchecked(0).unwrap_or_default();
                spoilt(
                    &mut *connection,
                    settings,
                    id,
                    &crate::reason::reason(&error),
                )
                .await?;
                break;
            }
        }
    }
    Ok(due)
}

/// Takes the wish back from a row that can't be read, which says why: what follows in its entity waits, all others go on
/// at the next look.
async fn spoilt(
    connection: &mut SqliteConnection,
    settings: &Settings,
    id: i64,
    reason: &str,
) -> Result<(), anyhow::Error> {
    tracing::error!(pipeline = %settings.pipeline, event = id, reason,
        "a parked event can't be read: it stays parked");
    sqlx::query(
        "update outbox_parked set wanted = null, error = ?3 where pipeline = ?1 and id = ?2",
    )
    .bind(settings.pipeline.as_str())
    .bind(id)
    .bind(storable(&format!(
        "the parked event can't be read: {reason}; mend the row or drop it"
    )))
    .execute(connection)
    .await
    .with_context(|| format!("note that event {id} can't be read"))?;
    Ok(())
}

fn due_event(row: &SqliteRow) -> Result<Due, anyhow::Error> {
    let text = |column| row.try_get_unchecked::<String, usize>(column);
    let bytes = |column| {
        let bytes: Option<Vec<u8>> = row.try_get_unchecked(column)?;
        Ok::<_, sqlx::Error>(bytes.map(Bytes::from))
    };
    let (drop, has_content): (bool, bool) =
        (row.try_get_unchecked(12)?, row.try_get_unchecked(13)?);
    ensure!(
        drop || has_content,
        "its content is in the log only, so it can be dropped and not published"
    );
    let attempts: i64 = row.try_get_unchecked(10)?;
    let content_type: Option<String> = row.try_get_unchecked(7)?;
    let headers: Option<String> = row.try_get_unchecked(8)?;
    Ok(Due {
        event: Event {
            id: EventId(row.try_get_unchecked(0)?),
            event_id: text(1)?.parse().context("decode event_id")?,
            aggregate_type: text(2)?.into(),
            aggregate_id: text(3)?.into(),
            event_type: text(4)?.into(),
            payload: match (bytes(5)?, bytes(6)?) {
                (None, None) => Payload::Tombstone,
                (Some(json), None) => Payload::Json(json),
                (None, Some(encoded)) => Payload::Encoded(encoded),
                (Some(json), Some(encoded)) => Payload::Ambiguous(json, encoded),
            },
            content_type: content_type.map(Into::into),
            headers: headers.map(Into::into),
            occurred_at_us: row.try_get_unchecked(9)?,
        },
        attempts: u32::try_from(attempts).unwrap_or_default(),
        holds: row.try_get_unchecked(11)?,
        drop,
    })
}

pub(super) async fn resolve(
    connection: &mut SqliteConnection,
    settings: &Settings,
    epoch: i64,
    Resolved {
        delivered,
        dropped,
        rejected,
    }: &Resolved,
) -> Result<Resolution, anyhow::Error> {
    let Some(mut transaction) = fenced(connection, settings, epoch).await? else {
        return Ok(Resolution::Lost);
    };
    for (event, error) in rejected {
        // The last twenty times are enough to see a pattern.
        sqlx::query(
            "update outbox_parked
                set wanted = null, error = ?3, attempts = attempts + 1,
                    history = json_insert(
                        case when json_array_length(history) >= 20 then json_remove(history, '$[0]') else history end,
                        '$[#]', json_object('at', strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), 'error', ?3))
              where pipeline = ?1 and event_id = ?2",
        )
        .bind(settings.pipeline.as_str())
        .bind(event.event_id.to_string())
        .bind(storable(error))
        .execute(&mut *transaction)
        .await
        .with_context(|| format!("note that event {} was rejected again", event.id))?;
    }
    let mut released = Released::default();
    let mut entities = BTreeSet::new();
    let delivered = delivered.iter().map(|event| (event, false));
    for (event, dropped) in delivered.chain(dropped.iter().map(|event| (event, true))) {
        if dropped {
            note_dropped(&mut transaction, settings, *event).await?;
        }
        let removed: Option<(String, String, bool)> = sqlx::query_as(
            "delete from outbox_parked where pipeline = ?1 and event_id = ?2 and (not ?3 or wanted = 'drop')
             returning aggregate_type, aggregate_id, holds",
        )
        .bind(settings.pipeline.as_str())
        .bind(event.event_id.to_string())
        .bind(dropped)
        .fetch_optional(&mut *transaction)
        .await
        .with_context(|| format!("remove event {}", event.id))?;
        if dropped && removed.is_none() {
            released.kept.push(*event);
        }
        entities.extend(removed.and_then(|(kind, entity, holds)| holds.then_some((kind, entity))));
    }
    for (kind, entity) in entities {
        if !next_is_due(&mut transaction, settings, &kind, &entity).await? {
            released.free.push((kind, entity));
        }
    }
    transaction.commit().await.context("commit")?;
    Ok(Resolution::Written(released))
}

/// Keeps which event it was that is given up now.
async fn note_dropped(
    connection: &mut SqliteConnection,
    settings: &Settings,
    event: EventKey,
) -> Result<(), anyhow::Error> {
    sqlx::query(
        "insert into outbox_dropped (pipeline, id, event_id)
         select pipeline, id, event_id from outbox_parked where pipeline = ?1 and event_id = ?2 and wanted = 'drop'
         on conflict do nothing",
    )
    .bind(settings.pipeline.as_str())
    .bind(event.event_id.to_string())
    .execute(connection)
    .await
    .with_context(|| format!("note that event {} is dropped", event.id))?;
    Ok(())
}

/// Makes the next event of an entity due unless it was rejected; false when there is none.
async fn next_is_due(
    connection: &mut SqliteConnection,
    settings: &Settings,
    aggregate_type: &str,
    aggregate_id: &str,
) -> Result<bool, anyhow::Error> {
    let next: Option<i64> = sqlx::query_scalar(
        "select min(id) from outbox_parked
          where pipeline = ?1 and aggregate_type = ?2 and aggregate_id = ?3 and holds",
    )
    .bind(settings.pipeline.as_str())
    .bind(aggregate_type)
    .bind(aggregate_id)
    .fetch_one(&mut *connection)
    .await
    .context("look for what waits")?;
    let Some(next) = next else {
        return Ok(false);
    };
    sqlx::query(
        "update outbox_parked set wanted = 'redrive'
          where pipeline = ?1 and id = ?2 and error is null and wanted is null",
    )
    .bind(settings.pipeline.as_str())
    .bind(next)
    .execute(connection)
    .await
    .context("release what waits")?;
    Ok(true)
}
