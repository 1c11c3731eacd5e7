//! Parked events as operators see them, in a SQLite file.

use anyhow::Context;
use serde::de::DeserializeOwned;
use sqlx::sqlite::SqliteConnection;
use sqlx::{AssertSqlSafe, Connection};

use super::{
    Cause, Dialect, ERROR_CHARACTERS, Extent, Marked, NOW_US, NotedAct, Paging, ParkedDetail,
    ParkedEvents, Selector, Wish, behind, merge, waiting_behind,
};

const DIALECT: Dialect = Dialect::Sqlite;

/// Names and values of the list, as `json_object` takes them.
fn fields() -> String {
    format!(
        "'pipeline', p.pipeline, 'id', p.id, 'event_id', p.event_id, 'aggregate_type', p.aggregate_type, \
         'aggregate_id', p.aggregate_id, 'event_type', p.event_type, 'error', substr(p.error, 1, {ERROR_CHARACTERS}), 'attempts', p.attempts, \
         'holds', json(iif(p.holds, 'true', 'false')), 'wanted', p.wanted, \
         'parked_seconds', ({NOW_US} - p.parked_at) / 1000000.0, 'parked_at_us', p.parked_at, 'waiting_events', {}",
        waiting_behind(DIALECT)
    )
}

/// Lists parked events, longest parked first; never their payloads.
///
/// # Errors
/// When the file can't be read or is not migrated.
pub async fn list(
    connection: &mut SqliteConnection,
    selector: &Selector,
    paging: &Paging,
) -> Result<ParkedEvents, anyhow::Error> {
    let condition = selector.condition(DIALECT, "p");
    let total = sqlx::query_scalar(AssertSqlSafe(format!(
        "select count(*) from outbox_parked p where {condition}"
    )))
    .fetch_one(&mut *connection)
    .await
    .context("count the parked events")?;
    let events = documents(
        connection,
        format!(
            "select json_object({}) from outbox_parked p where {condition} {} \
              order by p.parked_at, p.pipeline, p.id limit {}",
            fields(),
            paging.condition(DIALECT),
            paging.limit
        ),
    )
    .await
    .context("list the parked events")?;
    Ok(ParkedEvents::page(events, total, paging))
}

/// Everything about the events that are meant, with at most this much of each payload; a handful of them.
///
/// # Errors
/// When the file can't be read.
pub async fn show(
    connection: &mut SqliteConnection,
    selector: &Selector,
    payload_bytes_max: u32,
) -> Result<Vec<ParkedDetail>, anyhow::Error> {
    documents(
        connection,
        format!(
            "select json_object({}, \
                    'occurred_at', coalesce(strftime('%Y-%m-%dT%H:%M:%fZ', p.occurred_at / 1000000.0, 'unixepoch'), \
                                            p.occurred_at || ' us'), \
                    'behind', {}, 'history', json(p.history), 'content_type', p.content_type, \
                    'headers', cast(p.headers as text), 'payload', substr(p.payload, 1, {payload_bytes_max}), \
                    'payload_hex', iif(p.payload_bytes is null, null, hex(substr(p.payload_bytes, 1, {payload_bytes_max}))), \
                    'payload_bytes', coalesce(octet_length(p.payload), 0) + coalesce(length(p.payload_bytes), 0)) \
               from outbox_parked p where {} order by p.pipeline, p.id limit 10",
            fields(),
            behind(DIALECT),
            selector.condition(DIALECT, "p")
        ),
    )
    .await
    .context("read the parked event")
}

/// The reasons of rejected events, with how many share each.
///
/// # Errors
/// When the file can't be read.
pub async fn causes(
    connection: &mut SqliteConnection,
    selector: &Selector,
) -> Result<Vec<Cause>, anyhow::Error> {
    let causes = documents(
        connection,
        format!(
            "select json_object('pipeline', p.pipeline, 'error', p.error, 'events', count(*), \
                    'entities', count(distinct p.aggregate_type || '/' || p.aggregate_id), \
                    'oldest_seconds', ({NOW_US} - min(p.parked_at)) / 1000000.0, 'example_id', min(p.id)) \
               from outbox_parked p where {} and p.error is not null group by p.pipeline, p.error \
              order by count(*) desc limit 10000",
            selector.condition(DIALECT, "p")
        ),
    )
    .await
    .context("count the reasons")?;
    Ok(merge(causes))
}

/// How many events a wish concerns.
///
/// # Errors
/// When the file can't be read.
pub async fn extent(
    connection: &mut SqliteConnection,
    wish: &Wish,
) -> Result<Extent, anyhow::Error> {
    let (chosen, everything): (i64, i64) = sqlx::query_as(AssertSqlSafe(wish.counting(DIALECT)))
        .fetch_one(connection)
        .await
        .context("count what is wanted")?;
    Ok(Extent {
        chosen,
        behind: everything - chosen,
    })
}

/// Notes a wish, on the events and among the acts.
///
/// # Errors
/// When the file can't be written; nothing is noted then.
pub async fn mark(
    connection: &mut SqliteConnection,
    wish: &Wish,
) -> Result<Vec<Marked>, anyhow::Error> {
    let mut transaction = connection
        .begin_with("begin immediate")
        .await
        .context("begin")?;
    let condition = wish.condition(DIALECT);
    let counted: Vec<(String, i64)> = sqlx::query_as(AssertSqlSafe(format!(
        "select p.pipeline, count(*) from outbox_parked p where {condition} group by 1 order by 1"
    )))
    .fetch_all(&mut *transaction)
    .await
    .context("count what is wanted")?;
    sqlx::query(AssertSqlSafe(format!(
        "update outbox_parked set wanted = ?1 \
          where (pipeline, event_id) in (select p.pipeline, p.event_id from outbox_parked p where {condition})"
    )))
    .bind(wish.action.as_str())
    .execute(&mut *transaction)
    .await
    .context("note what is wanted")?;
    for (pipeline, events) in &counted {
        sqlx::query(
            "insert into outbox_acts (who, action, pipeline, selector, events, reason) values (?1, ?2, ?3, ?4, ?5, ?6)",
        )
        .bind(&wish.who)
        .bind(wish.action.as_str())
        .bind(pipeline)
        .bind(wish.selector.to_string())
        .bind(events)
        .bind(&wish.reason)
        .execute(&mut *transaction)
        .await
        .context("note the act")?;
    }
    transaction.commit().await.context("commit")?;
    Ok(counted
        .into_iter()
        .map(|(pipeline, events)| Marked { pipeline, events })
        .collect())
}

/// The newest acts first.
///
/// # Errors
/// When the file can't be read.
pub async fn acts(
    connection: &mut SqliteConnection,
    limit: u32,
    before: Option<i64>,
) -> Result<Vec<NotedAct>, anyhow::Error> {
    documents(
        connection,
        format!(
            "select json_object('id', id, 'at', strftime('%Y-%m-%dT%H:%M:%fZ', at / 1000000.0, 'unixepoch'), \
                    'database_user', database_user, 'who', who, 'action', action, 'pipeline', pipeline, \
                    'selector', selector, 'events', events, 'reason', reason) \
               from outbox_acts where id < {} order by id desc limit {limit}",
            before.unwrap_or(i64::MAX)
        ),
    )
    .await
    .context("list the acts")
}

/// The rows of a select of one JSON document each.
async fn documents<T: DeserializeOwned>(
    connection: &mut SqliteConnection,
    select: String,
) -> Result<Vec<T>, anyhow::Error> {
    let rows: Vec<String> = sqlx::query_scalar(AssertSqlSafe(select))
        .fetch_all(connection)
        .await?;
    rows.iter()
        .map(|row| serde_json::from_str(row).context("understand the answer"))
        .collect()
}
