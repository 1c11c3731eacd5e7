//! What operators ask of a whole pipeline, in PostgreSQL. Texts that people type are bound, never part of a statement.

use std::time::Duration;

use anyhow::Context;
use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{AssertSqlSafe, Connection, Executor};

use super::{
    BEGIN, NEWEST_ID, execute, fetch_one, get, literal, newest_id, restored, set_position,
    starting_position,
};
use crate::event::{EventId, EventKey, PipelineName, Start};
use crate::ledger::pipelines::{
    Act, EventName, Refused, Remains, Seek, Skip, beyond, never_ran, not_retained, owned,
    parked_already, passed,
};
use crate::ledger::{Pause, Settings};
use crate::position::{Position, Snapshot};

/// For counting what a person is told; the work itself needs milliseconds.
const COUNT_MAX: Duration = Duration::from_secs(10);

/// Since when the pipeline of the row `p` is paused.
pub(super) const SINCE: &str =
    "to_char(p.since at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"')";

/// Whether the cursor `c` is past the event `e`.
const PASSED: &str = "(c.prev is not null and (pg_visible_in_snapshot(e.xid, c.prev) \
     or (pg_visible_in_snapshot(e.xid, c.cur) and e.id <= c.last_id)))";

/// Events and the cursor of their shard, of the pipeline in $1.
const EVENTS_AND_CURSORS: &str = "outbox.events e \
     join outbox.pipelines p on p.pipeline = $1::text \
     join outbox.cursors c on c.pipeline = p.pipeline \
      and c.shard = case when p.shards > 1 then outbox.shard_of(e.aggregate_type, e.aggregate_id, p.shards) else 0 end";

/// Why an operator wants this event left out.
pub(super) async fn skipped(
    connection: &mut PgConnection,
    settings: &Settings,
    event: EventKey,
) -> Result<Option<String>, anyhow::Error> {
    let row = fetch_one(
        connection,
        format!(
            "select (select 'skipped by ' || s.who || ': ' || s.reason from outbox.skips s \
                      where s.pipeline = {} and s.event_id = '{}')",
            literal(settings.pipeline.as_str()),
            event.event_id
        ),
    )
    .await
    .context("ask whether the event is to be skipped")?;
    get(&row, 0)
}

/// Pauses a pipeline; the pause that there is already, if there is one, stays as it is.
///
/// # Errors
/// When the database refuses.
pub async fn pause(
    connection: &mut PgConnection,
    pipeline: &PipelineName,
    act: &Act,
) -> Result<Option<Pause>, anyhow::Error> {
    let mut transaction = connection.begin_with(BEGIN).await.context("begin")?;
    let written = sqlx::query(
        "insert into outbox.pauses (pipeline, who, reason) values ($1, $2, $3) on conflict (pipeline) do nothing",
    )
    .persistent(false)
    .bind(pipeline.as_str())
    .bind(&act.who)
    .bind(&act.reason)
    .execute(&mut *transaction)
    .await
    .context("write the pause")?;
    if written.rows_affected() == 0 {
        return pause_of(&mut transaction, pipeline).await;
    }
    note(&mut transaction, pipeline, act, ("pause", "all", 0)).await?;
    transaction.commit().await.context("commit")?;
    Ok(None)
}

/// Ends a pause; none where the pipeline is not paused.
///
/// # Errors
/// When the database refuses.
pub async fn resume(
    connection: &mut PgConnection,
    pipeline: &PipelineName,
    act: &Act,
) -> Result<Option<Pause>, anyhow::Error> {
    let mut transaction = connection.begin_with(BEGIN).await.context("begin")?;
    let pause = pause_of(&mut transaction, pipeline).await?;
    if let Some(pause) = &pause {
        delete(&mut transaction, "outbox.pauses", pipeline).await?;
        let was = format!("paused {pause}");
        note(&mut transaction, pipeline, act, ("resume", &was, 0)).await?;
        transaction.commit().await.context("commit")?;
    }
    Ok(pause)
}

async fn pause_of(
    connection: &mut PgConnection,
    pipeline: &PipelineName,
) -> Result<Option<Pause>, anyhow::Error> {
    let row = connection
        .fetch_optional(sqlx::raw_sql(AssertSqlSafe(format!(
            "select {SINCE}, p.who, p.reason from outbox.pauses p where p.pipeline = {}",
            literal(pipeline.as_str())
        ))))
        .await
        .context("read the pause")?;
    row.map(|row| {
        Ok(Pause {
            since: get(&row, 0)?,
            by: get(&row, 1)?,
            reason: get(&row, 2)?,
        })
    })
    .transpose()
}

/// Moves the cursors of all shards of a pipeline to one position, which is that of a pipeline that begins there; without an
/// act it only says what that would mean. With `aggregate_types` only events of these are counted.
///
/// # Errors
/// [`Refused`] while a relay owns it and where the log has to be mended first; or when the database refuses.
pub async fn seek(
    connection: &mut PgConnection,
    pipeline: &PipelineName,
    to: Start,
    aggregate_types: &[String],
    act: Option<&Act>,
) -> Result<Seek, anyhow::Error> {
    if restored::is_restored(connection).await? {
        let what = "the log was restored from another cluster: let a relay adopt it first, with `outbox-relay run`";
        return Err(Refused(what.to_owned()).into());
    }
    // As where a pipeline begins: the floor of the window after the new position is an id that was read before a transaction
    // that writes has ended, and the snapshot is taken after that (see Window::floor).
    let newest_before = newest_id(connection).await?;
    if act.is_some() {
        execute(connection, "select pg_current_xact_id()".to_owned())
            .await
            .context("take a transaction id")?;
    }
    let mut transaction = connection.begin_with(BEGIN).await.context("begin")?;
    let from = free_cursors(&mut transaction, pipeline).await?;
    let (oldest_id, newest_id) = ends(&mut transaction).await?;
    if let Start::Event(id) = to
        && id.0 > newest_id
    {
        return Err(beyond(id, newest_id).into());
    }
    let position = starting_position(&mut transaction, to, newest_before).await?;
    let counted = count(&mut transaction, pipeline, aggregate_types, &position).await?;
    let seek = Seek {
        pipeline: pipeline.to_string(),
        from,
        to: position.last_id.0,
        oldest_id,
        newest_id,
        again: counted.map(|(again, _)| again),
        left_out: counted.map(|(_, left_out)| left_out),
    };
    let Some(act) = act else {
        transaction
            .rollback()
            .await
            .context("end the transaction")?;
        return Ok(seek);
    };
    let (identity, timeline) = restored::identity(&mut transaction).await?;
    let name = literal(pipeline.as_str());
    // Another epoch: a write of an owner that lost its lease is refused from here on. Another name: what the sink remembers of
    // the old cursor is void. What earlier shards had passed says nothing about the new position.
    execute(
        &mut transaction,
        format!(
            "update outbox.leases set epoch = epoch + 1 where pipeline = {name}; \
             delete from outbox.former_cursors where pipeline = {name}; \
             update outbox.cursors set {}, begun = gen_random_uuid(), epoch = epoch + 1, system_identifier = {identity}, \
                    timeline = {timeline}, updated_at = clock_timestamp() \
              where pipeline = {name}",
            set_position(&position)
        ),
    )
    .await
    .context("move the cursors")?;
    let what = format!(
        "position {:?} to {}",
        seek.from.iter().flatten().collect::<Vec<_>>(),
        seek.to
    );
    let events = seek.again.unwrap_or(0) + seek.left_out.unwrap_or(0);
    note(&mut transaction, pipeline, act, ("seek", &what, events)).await?;
    transaction.commit().await.context("commit")?;
    Ok(seek)
}

/// The positions of the shards, none of which is owned: to the end of the transaction no relay takes one.
async fn free_cursors(
    transaction: &mut PgConnection,
    pipeline: &PipelineName,
) -> Result<Vec<Option<i64>>, anyhow::Error> {
    lock(transaction, pipeline).await?;
    let rows = transaction
        .fetch_all(sqlx::raw_sql(AssertSqlSafe(format!(
            "select last_id from outbox.cursors where pipeline = {} order by shard for update",
            literal(pipeline.as_str())
        ))))
        .await
        .context("read the cursors")?;
    if rows.is_empty() {
        return Err(never_ran(pipeline.as_str()).into());
    }
    rows.iter().map(|row| get(row, 0)).collect()
}

/// Keeps relays from taking a lease of the pipeline; refuses where one has one.
async fn lock(
    transaction: &mut PgConnection,
    pipeline: &PipelineName,
) -> Result<(), anyhow::Error> {
    let name = literal(pipeline.as_str());
    transaction
        .fetch_optional(sqlx::raw_sql(AssertSqlSafe(format!(
            "select 1 from outbox.pipelines where pipeline = {name} for update"
        ))))
        .await
        .context("lock the pipeline")?;
    let owner = transaction
        .fetch_optional(sqlx::raw_sql(AssertSqlSafe(format!(
            "select holder, extract(epoch from expires_at - clock_timestamp())::float8 from outbox.leases \
              where pipeline = {name} and expires_at > clock_timestamp() order by shard limit 1"
        ))))
        .await
        .context("look for the owner")?;
    match owner {
        None => Ok(()),
        Some(row) => {
            let (holder, seconds): (String, f64) = (get(&row, 0)?, get(&row, 1)?);
            Err(owned(pipeline.as_str(), &holder, seconds).into())
        }
    }
}

/// The oldest retained and the newest id; refuses where the sequence is behind the rows.
async fn ends(transaction: &mut PgConnection) -> Result<(Option<i64>, i64), anyhow::Error> {
    let row = fetch_one(
        transaction,
        format!(
            "select (select e.id from outbox.events e order by e.id limit 1), \
                    (select e.id from outbox.events e order by e.id desc limit 1), {NEWEST_ID}"
        ),
    )
    .await
    .context("look where the log begins and ends")?;
    let (oldest, newest_row): (Option<i64>, Option<i64>) = (get(&row, 0)?, get(&row, 1)?);
    let newest: i64 = get(&row, 2)?;
    if let Some(row) = newest_row.filter(|row| *row > newest) {
        return Err(Refused(format!(
            "the sequence of outbox.events stands at {newest}, below event {row}: run `select outbox.repair_sequence()` first"
        ))
        .into());
    }
    Ok((oldest, newest))
}

/// Events that are published again and events that are left out; none where that takes too long.
async fn count(
    transaction: &mut PgConnection,
    pipeline: &PipelineName,
    aggregate_types: &[String],
    to: &Position,
) -> Result<Option<(i64, i64)>, anyhow::Error> {
    let cur: &Snapshot = &to.window.cur;
    let select = format!(
        "select count(*) filter (where passed and not afterwards), count(*) filter (where afterwards and not passed) \
           from (select {PASSED} as passed, (e.id <= {last_id} and pg_visible_in_snapshot(e.xid, '{cur}')) as afterwards \
                   from {EVENTS_AND_CURSORS} \
                  where (cardinality($2::text[]) = 0 or e.aggregate_type = any ($2)) \
                    and (e.id > {last_id} \
                         or e.id > (select min(least(coalesce(c.last_id, 0), coalesce(c.floor, 0))) from outbox.cursors c \
                                     where c.pipeline = $1) \
                         or e.xid >= (select min(pg_snapshot_xmin(c.prev)) from outbox.cursors c where c.pipeline = $1))) e",
        last_id = to.last_id
    );
    let row = counted(transaction, &select, pipeline, aggregate_types).await?;
    row.map(|row| Ok((get(&row, 0)?, get(&row, 1)?)))
        .transpose()
}

/// The answer to a question that may take too long, for which there is none then. $1 is the pipeline, $2 a list of types.
async fn counted(
    transaction: &mut PgConnection,
    select: &str,
    pipeline: &PipelineName,
    aggregate_types: &[String],
) -> Result<Option<PgRow>, anyhow::Error> {
    let mut savepoint = transaction.begin().await.context("set a savepoint")?;
    execute(
        &mut savepoint,
        format!("set local statement_timeout = {}", COUNT_MAX.as_millis()),
    )
    .await
    .context("set a limit")?;
    let row = sqlx::query(AssertSqlSafe(select.to_owned()))
        .persistent(false)
        .bind(pipeline.as_str())
        .bind(aggregate_types)
        .fetch_one(&mut *savepoint)
        .await;
    // Whatever came of it: with the savepoint the limit goes.
    savepoint.rollback().await.context("go back")?;
    match row {
        Ok(row) => Ok(Some(row)),
        // Cancelled by the limit.
        Err(error)
            if error
                .as_database_error()
                .and_then(sqlx::error::DatabaseError::code)
                .as_deref()
                == Some("57014") =>
        {
            Ok(None)
        }
        Err(error) => Err(error).context("count the events"),
    }
}

/// Notes that an event is to be left out, should the pipeline halt at it. Without an act it only finds the event.
///
/// # Errors
/// [`Refused`] where there is no such event or the pipeline is past it; or when the database refuses.
pub async fn skip(
    connection: &mut PgConnection,
    pipeline: &PipelineName,
    event: EventName,
    act: Option<&Act>,
) -> Result<Skip, anyhow::Error> {
    let mut transaction = connection.begin_with(BEGIN).await.context("begin")?;
    let (id, uuid) = match event {
        EventName::Id(id) => (Some(id.0), None),
        EventName::Uuid(uuid) => (None, Some(uuid.to_string())),
    };
    let row = sqlx::query(AssertSqlSafe(format!(
        "select e.id, e.event_id::text, e.aggregate_type, e.aggregate_id, {PASSED}, \
                exists (select from outbox.parked k where k.pipeline = $1 and k.event_id = e.event_id), \
                exists (select from outbox.skips s where s.pipeline = $1 and s.event_id = e.event_id) \
           from {EVENTS_AND_CURSORS} where {}",
        match event {
            EventName::Id(_) => "e.id = $2",
            EventName::Uuid(_) => "e.event_id = $3::text::uuid and $2::bigint is null",
        }
    )))
    .persistent(false)
    .bind(pipeline.as_str())
    .bind(id)
    .bind(uuid)
    .fetch_optional(&mut *transaction)
    .await
    .context("look for the event")?
    .ok_or_else(|| not_retained(event))?;
    let skip = Skip {
        pipeline: pipeline.to_string(),
        id: get(&row, 0)?,
        event_id: get(&row, 1)?,
        aggregate_type: get(&row, 2)?,
        aggregate_id: get(&row, 3)?,
        known: get(&row, 6)?,
    };
    if get(&row, 5)? {
        return Err(parked_already(skip.id).into());
    }
    if get(&row, 4)? {
        return Err(passed(pipeline.as_str(), skip.id).into());
    }
    if let Some(act) = act.filter(|_| !skip.known) {
        sqlx::query(
            "insert into outbox.skips (pipeline, event_id, id, who, reason) values ($1, $2::text::uuid, $3, $4, $5)",
        )
        .persistent(false)
        .bind(pipeline.as_str())
        .bind(&skip.event_id)
        .bind(skip.id)
        .bind(&act.who)
        .bind(&act.reason)
        .execute(&mut *transaction)
        .await
        .context("write the skip")?;
        let which = format!("id {}, {}", skip.id, skip.event_id);
        note(&mut transaction, pipeline, act, ("skip", &which, 1)).await?;
    }
    transaction.commit().await.context("commit")?;
    Ok(skip)
}

/// Forgets a pipeline: its cursors, leases and parked events; what was dropped and replayed stays on record. Without an act it
/// only says what that would be.
///
/// # Errors
/// [`Refused`] while a relay owns it or stands by for it, and where nothing is known of it; or when the database refuses.
pub async fn remove(
    connection: &mut PgConnection,
    pipeline: &PipelineName,
    act: Option<&Act>,
) -> Result<Remains, anyhow::Error> {
    let mut transaction = connection.begin_with(BEGIN).await.context("begin")?;
    let name = literal(pipeline.as_str());
    lock(&mut transaction, pipeline).await?;
    let row = fetch_one(
        &mut transaction,
        format!(
            "select (select count(*) from outbox.cursors where pipeline = {name}), \
                    (select count(*) from outbox.parked where pipeline = {name}), \
                    (select min(holder) from outbox.members \
                      where pipeline = {name} and expires_at > clock_timestamp()), \
                    exists (select from outbox.pipelines where pipeline = {name})"
        ),
    )
    .await
    .context("look what is there of the pipeline")?;
    let (cursors, parked): (i64, i64) = (get(&row, 0)?, get(&row, 1)?);
    if let Some(member) = get::<Option<String>>(&row, 2)? {
        return Err(Refused(format!(
            "relay {member} has pipeline {pipeline} in its configuration: take it out there and restart that relay first"
        ))
        .into());
    }
    if cursors + parked == 0 && !get::<bool>(&row, 3)? {
        return Err(Refused(format!("nothing is known of a pipeline {pipeline}")).into());
    }
    let select = format!(
        "select count(*) from {EVENTS_AND_CURSORS} where not {PASSED} and cardinality($2::text[]) = 0"
    );
    let waiting = counted(&mut transaction, &select, pipeline, &[]).await?;
    let remains = Remains {
        pipeline: pipeline.to_string(),
        cursors,
        waiting: waiting.map(|row| get(&row, 0)).transpose()?,
        parked,
    };
    if let Some(act) = act {
        for table in [
            "outbox.parked",
            "outbox.skips",
            "outbox.former_cursors",
            "outbox.cursors",
            "outbox.leases",
            "outbox.members",
            "outbox.pauses",
            "outbox.pipelines",
        ] {
            delete(&mut transaction, table, pipeline).await?;
        }
        let what = format!("{cursors} cursors, {parked} parked events");
        let events = remains.waiting.unwrap_or(0) + parked;
        note(&mut transaction, pipeline, act, ("remove", &what, events)).await?;
        transaction.commit().await.context("commit")?;
    }
    Ok(remains)
}

async fn delete(
    transaction: &mut PgConnection,
    table: &str,
    pipeline: &PipelineName,
) -> Result<(), anyhow::Error> {
    let name = literal(pipeline.as_str());
    execute(
        transaction,
        format!("delete from {table} where pipeline = {name}"),
    )
    .await
    .with_context(|| format!("delete what {table} has of the pipeline"))?;
    Ok(())
}

/// Writes down what was done: the act, of what, and how many events it concerns.
async fn note(
    transaction: &mut PgConnection,
    pipeline: &PipelineName,
    act: &Act,
    (action, selector, events): (&str, &str, i64),
) -> Result<(), anyhow::Error> {
    sqlx::query(
        "insert into outbox.acts (who, action, pipeline, selector, events, reason) values ($1, $2, $3, $4, $5, $6)",
    )
    .persistent(false)
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

/// The event with this id; for a position by its uuid.
///
/// # Errors
/// [`Refused`] where there is none; or when the database refuses.
pub async fn id_of(
    connection: &mut PgConnection,
    event: EventName,
) -> Result<EventId, anyhow::Error> {
    let uuid = match event {
        EventName::Id(id) => return Ok(id),
        EventName::Uuid(uuid) => uuid,
    };
    let row = fetch_one(
        connection,
        format!("select (select min(e.id) from outbox.events e where e.event_id = '{uuid}')"),
    )
    .await
    .context("look for the event")?;
    let id: Option<i64> = get(&row, 0)?;
    Ok(EventId(id.ok_or_else(|| not_retained(event))?))
}
