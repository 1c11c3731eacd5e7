//! What operators ask of a whole pipeline, in a SQLite file.

use anyhow::Context;
use sqlx::sqlite::SqliteConnection;
use sqlx::{AssertSqlSafe, Connection};

use super::{starting_position, stored_position};
use crate::event::{EventId, EventKey, PipelineName, Shard, Start};
use crate::ledger::pipelines::{
    Act, EventName, Refused, Remains, Seek, Skip, beyond, never_ran, not_retained, owned,
    parked_already, passed,
};
use crate::ledger::{Pause, Settings};
use crate::position::Position;
use crate::source::sqlite::newest_id;

/// An event that is looked for: uuid, entity; whether it is passed, parked, to be skipped.
type Found = (String, String, String, bool, bool, bool);

/// How far the cursor `c` has come.
const AT: &str = "max(coalesce(c.last_id, 0), coalesce(c.floor, 0))";

/// Why an operator wants this event left out.
pub(super) async fn skipped(
    connection: &mut SqliteConnection,
    settings: &Settings,
    event: EventKey,
) -> Result<Option<String>, anyhow::Error> {
    sqlx::query_scalar(
        "select 'skipped by ' || who || ': ' || reason from outbox_skips where pipeline = ?1 and event_id = ?2",
    )
    .bind(settings.pipeline.as_str())
    .bind(event.event_id.to_string())
    .fetch_optional(connection)
    .await
    .context("ask whether the event is to be skipped")
}

pub(super) async fn pause_of(
    connection: &mut SqliteConnection,
    pipeline: &str,
) -> Result<Option<Pause>, anyhow::Error> {
    let row: Option<(String, String, String)> = sqlx::query_as(
        "select strftime('%Y-%m-%dT%H:%M:%SZ', since / 1000000.0, 'unixepoch'), who, reason from outbox_pauses \
          where pipeline = ?1",
    )
    .bind(pipeline)
    .fetch_optional(connection)
    .await
    .context("read the pause")?;
    Ok(row.map(|(since, by, reason)| Pause { since, by, reason }))
}

/// As in PostgreSQL.
///
/// # Errors
/// When the file can't be written.
pub async fn pause(
    connection: &mut SqliteConnection,
    pipeline: &PipelineName,
    act: &Act,
) -> Result<Option<Pause>, anyhow::Error> {
    let mut transaction = begin(connection).await?;
    let pause = pause_of(&mut transaction, pipeline.as_str()).await?;
    if pause.is_none() {
        sqlx::query("insert into outbox_pauses (pipeline, who, reason) values (?1, ?2, ?3)")
            .bind(pipeline.as_str())
            .bind(&act.who)
            .bind(&act.reason)
            .execute(&mut *transaction)
            .await
            .context("write the pause")?;
        note(&mut transaction, pipeline, act, ("pause", "all", 0)).await?;
    }
    transaction.commit().await.context("commit")?;
    Ok(pause)
}

/// As in PostgreSQL.
///
/// # Errors
/// When the file can't be written.
pub async fn resume(
    connection: &mut SqliteConnection,
    pipeline: &PipelineName,
    act: &Act,
) -> Result<Option<Pause>, anyhow::Error> {
    let mut transaction = begin(connection).await?;
    let pause = pause_of(&mut transaction, pipeline.as_str()).await?;
    if let Some(pause) = &pause {
        delete(&mut transaction, "outbox_pauses", pipeline).await?;
        let was = format!("paused {pause}");
        note(&mut transaction, pipeline, act, ("resume", &was, 0)).await?;
    }
    transaction.commit().await.context("commit")?;
    Ok(pause)
}

/// As in PostgreSQL; there is one shard.
///
/// # Errors
/// [`Refused`] while a relay owns it; or when the file can't be read or written.
pub async fn seek(
    connection: &mut SqliteConnection,
    pipeline: &PipelineName,
    to: Start,
    aggregate_types: &[String],
    act: Option<&Act>,
) -> Result<Seek, anyhow::Error> {
    let mut transaction = begin(connection).await?;
    refuse_owned(&mut transaction, pipeline).await?;
    let at: Option<(Option<i64>, i64)> = sqlx::query_as(AssertSqlSafe(format!(
        "select c.last_id, {AT} from outbox_cursors c where c.pipeline = ?1 and c.shard = 0"
    )))
    .bind(pipeline.as_str())
    .fetch_optional(&mut *transaction)
    .await
    .context("read the cursor")?;
    let Some((from, at)) = at else {
        return Err(never_ran(pipeline.as_str()).into());
    };
    let EventId(newest_id) = newest_id(&mut transaction).await?;
    if let Start::Event(id) = to
        && id.0 > newest_id
    {
        return Err(beyond(id, newest_id).into());
    }
    let position = starting_position(&mut transaction, to).await?;
    let EventId(last_id) = position.last_id;
    let events = between(&mut transaction, (at, last_id), aggregate_types).await?;
    let oldest_id: Option<i64> = sqlx::query_scalar("select min(id) from outbox_events")
        .fetch_one(&mut *transaction)
        .await
        .context("look for the oldest event")?;
    let (again, left_out) = if last_id < at {
        (events, 0)
    } else {
        (0, events)
    };
    let seek = Seek {
        pipeline: pipeline.to_string(),
        from: vec![from],
        to: last_id,
        oldest_id,
        newest_id,
        again: Some(again),
        left_out: Some(left_out),
    };
    let Some(act) = act else {
        transaction
            .rollback()
            .await
            .context("end the transaction")?;
        return Ok(seek);
    };
    move_to(&mut transaction, pipeline, last_id).await?;
    let what = format!("position {} to {last_id}", from.unwrap_or(0));
    note(&mut transaction, pipeline, act, ("seek", &what, events)).await?;
    transaction.commit().await.context("commit")?;
    Ok(seek)
}

/// How many events of these types lie between two ids.
async fn between(
    transaction: &mut SqliteConnection,
    (one, other): (i64, i64),
    aggregate_types: &[String],
) -> Result<i64, anyhow::Error> {
    let types = serde_json::to_string(aggregate_types).context("write the types")?;
    sqlx::query_scalar(
        "select count(*) from outbox_events
          where id > ?1 and id <= ?2 and (?3 = '[]' or aggregate_type in (select value from json_each(?3)))",
    )
    .bind(one.min(other))
    .bind(one.max(other))
    .bind(types)
    .fetch_one(transaction)
    .await
    .context("count the events")
}

async fn move_to(
    transaction: &mut SqliteConnection,
    pipeline: &PipelineName,
    last_id: i64,
) -> Result<(), anyhow::Error> {
    sqlx::query(
        "update outbox_cursors
            set prev = '1:1:', cur = '1:1:', floor = 0, ceiling = ?2, next_floor = ?2, last_id = ?2, epoch = epoch + 1,
                begun = lower(hex(randomblob(16))),
                updated_at = cast(round(unixepoch('subsec') * 1000000) as integer)
          where pipeline = ?1",
    )
    .bind(pipeline.as_str())
    .bind(last_id)
    .execute(&mut *transaction)
    .await
    .context("move the cursor")?;
    // A write of an owner that lost its lease is refused from here on.
    sqlx::query("update outbox_leases set epoch = epoch + 1 where pipeline = ?1")
        .bind(pipeline.as_str())
        .execute(&mut *transaction)
        .await
        .context("end the lease")?;
    Ok(())
}

/// As in PostgreSQL.
///
/// # Errors
/// [`Refused`] where there is no such event or the pipeline is past it; or when the file can't be read or written.
pub async fn skip(
    connection: &mut SqliteConnection,
    pipeline: &PipelineName,
    event: EventName,
    act: Option<&Act>,
) -> Result<Skip, anyhow::Error> {
    let mut transaction = begin(connection).await?;
    let id = id_of(&mut transaction, event).await?;
    let found: Option<Found> = sqlx::query_as(AssertSqlSafe(format!(
        "select lower(e.event_id), e.aggregate_type, e.aggregate_id,
                exists (select 1 from outbox_cursors c where c.pipeline = ?1 and e.id <= {AT}),
                exists (select 1 from outbox_parked k where k.pipeline = ?1 and lower(k.event_id) = lower(e.event_id)),
                exists (select 1 from outbox_skips s where s.pipeline = ?1 and s.event_id = lower(e.event_id))
           from outbox_events e where e.id = ?2"
    )))
    .bind(pipeline.as_str())
    .bind(id.0)
    .fetch_optional(&mut *transaction)
    .await
    .context("look for the event")?;
    let Some((event_id, aggregate_type, aggregate_id, is_passed, is_parked, known)) = found else {
        return Err(not_retained(event).into());
    };
    if is_parked {
        return Err(parked_already(id.0).into());
    }
    if is_passed {
        return Err(passed(pipeline.as_str(), id.0).into());
    }
    if let Some(act) = act.filter(|_| !known) {
        sqlx::query(
            "insert into outbox_skips (pipeline, event_id, id, who, reason) values (?1, ?2, ?3, ?4, ?5)",
        )
        .bind(pipeline.as_str())
        .bind(&event_id)
        .bind(id.0)
        .bind(&act.who)
        .bind(&act.reason)
        .execute(&mut *transaction)
        .await
        .context("write the skip")?;
        let which = format!("id {id}, {event_id}");
        note(&mut transaction, pipeline, act, ("skip", &which, 1)).await?;
    }
    transaction.commit().await.context("commit")?;
    Ok(Skip {
        pipeline: pipeline.to_string(),
        id: id.0,
        event_id,
        aggregate_type,
        aggregate_id,
        known,
    })
}

/// As in PostgreSQL.
///
/// # Errors
/// [`Refused`] while a relay owns it and where nothing is known of it; or when the file can't be read or written.
pub async fn remove(
    connection: &mut SqliteConnection,
    pipeline: &PipelineName,
    act: Option<&Act>,
) -> Result<Remains, anyhow::Error> {
    let mut transaction = begin(connection).await?;
    refuse_owned(&mut transaction, pipeline).await?;
    let (cursors, parked, waiting): (i64, i64, i64) = sqlx::query_as(AssertSqlSafe(format!(
        "select (select count(*) from outbox_cursors where pipeline = ?1),
                (select count(*) from outbox_parked where pipeline = ?1),
                (select count(*) from outbox_events where id > (select {AT} from outbox_cursors c where c.pipeline = ?1))"
    )))
    .bind(pipeline.as_str())
    .fetch_one(&mut *transaction)
    .await
    .context("look what is there of the pipeline")?;
    if cursors + parked == 0 {
        return Err(Refused(format!("nothing is known of a pipeline {pipeline}")).into());
    }
    if let Some(act) = act {
        for table in [
            "outbox_parked",
            "outbox_skips",
            "outbox_cursors",
            "outbox_leases",
            "outbox_pauses",
        ] {
            delete(&mut transaction, table, pipeline).await?;
        }
        let what = format!("{cursors} cursors, {parked} parked events");
        note(
            &mut transaction,
            pipeline,
            act,
            ("remove", &what, waiting + parked),
        )
        .await?;
    }
    transaction.commit().await.context("commit")?;
    Ok(Remains {
        pipeline: pipeline.to_string(),
        cursors,
        waiting: Some(waiting),
        parked,
    })
}

/// Where a pipeline stands; none where it has not begun.
///
/// # Errors
/// When the file can't be read.
pub async fn positions(
    connection: &mut SqliteConnection,
    pipeline: &PipelineName,
) -> Result<Vec<(Shard, Option<Position>)>, anyhow::Error> {
    let there: bool =
        sqlx::query_scalar("select count(*) > 0 from outbox_cursors where pipeline = ?1")
            .bind(pipeline.as_str())
            .fetch_one(&mut *connection)
            .await
            .context("look for the cursor")?;
    if !there {
        return Ok(Vec::new());
    }
    let position = stored_position(connection, pipeline.as_str()).await?;
    Ok(vec![(Shard::whole(), position)])
}

/// How many events are retained, at most `most`.
///
/// # Errors
/// When the file can't be read.
pub async fn retained(connection: &mut SqliteConnection, most: i64) -> Result<i64, anyhow::Error> {
    sqlx::query_scalar("select count(*) from (select 1 from outbox_events limit ?1)")
        .bind(most)
        .fetch_one(connection)
        .await
        .context("count the retained events")
}

/// Where one begins to look who writes nothing.
///
/// # Errors
/// When the file can't be read.
pub async fn look_from(
    connection: &mut SqliteConnection,
    from: Start,
) -> Result<Position, anyhow::Error> {
    let from = match from {
        Start::Event(id) if id > newest_id(connection).await? => Start::Latest,
        from => from,
    };
    starting_position(connection, from).await
}

/// As in PostgreSQL.
///
/// # Errors
/// [`Refused`] where there is none; or when the file can't be read.
pub async fn id_of(
    connection: &mut SqliteConnection,
    event: EventName,
) -> Result<EventId, anyhow::Error> {
    let uuid = match event {
        EventName::Id(id) => return Ok(id),
        EventName::Uuid(uuid) => uuid,
    };
    let id: Option<i64> =
        sqlx::query_scalar("select min(id) from outbox_events where lower(event_id) = ?1")
            .bind(uuid.to_string())
            .fetch_one(connection)
            .await
            .context("look for the event")?;
    Ok(EventId(id.ok_or_else(|| not_retained(event))?))
}

async fn begin(
    connection: &mut SqliteConnection,
) -> Result<sqlx::SqliteTransaction<'_>, anyhow::Error> {
    connection
        .begin_with("begin immediate")
        .await
        .context("begin")
}

async fn refuse_owned(
    transaction: &mut SqliteConnection,
    pipeline: &PipelineName,
) -> Result<(), anyhow::Error> {
    let owner: Option<(String, f64)> = sqlx::query_as(
        "select holder, (expires_at - unixepoch('subsec') * 1000000) / 1000000.0 from outbox_leases
          where pipeline = ?1 and expires_at > unixepoch('subsec') * 1000000",
    )
    .bind(pipeline.as_str())
    .fetch_optional(transaction)
    .await
    .context("look for the owner")?;
    match owner {
        None => Ok(()),
        Some((holder, seconds)) => Err(owned(pipeline.as_str(), &holder, seconds).into()),
    }
}

async fn delete(
    transaction: &mut SqliteConnection,
    table: &str,
    pipeline: &PipelineName,
) -> Result<(), anyhow::Error> {
    sqlx::query(AssertSqlSafe(format!(
        "delete from {table} where pipeline = ?1"
    )))
    .bind(pipeline.as_str())
    .execute(transaction)
    .await
    .with_context(|| format!("delete what {table} has of the pipeline"))?;
    Ok(())
}

async fn note(
    transaction: &mut SqliteConnection,
    pipeline: &PipelineName,
    act: &Act,
    (action, selector, events): (&str, &str, i64),
) -> Result<(), anyhow::Error> {
    sqlx::query(
        "insert into outbox_acts (who, action, pipeline, selector, events, reason) values (?1, ?2, ?3, ?4, ?5, ?6)",
    )
    .bind(&act.who)
    .bind(action)
    .bind(pipeline.as_str())
    .bind(selector)
    .bind(events)
    .bind(&act.reason)
    .execute(transaction)
    .await
    .context("note the act")?;
    Ok(())
}
