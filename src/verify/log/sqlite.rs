//! The log and the books in a SQLite file. One transaction writes at a time, so ids up to a limit are as of one moment.

use std::path::Path;

use anyhow::Context;
use futures_util::TryStreamExt;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteRow};
use sqlx::{ConnectOptions, Connection, Row};
use uuid::Uuid;

use super::{Books, Emitted, LostEvents, Retained, Settled};
use crate::event::PipelineName;

pub(super) async fn open(path: &Path) -> Result<SqliteConnection, anyhow::Error> {
    // Looking must not create an empty file where somebody mistyped a name.
    let options = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(false)
        .disable_statement_logging();
    SqliteConnection::connect_with(&options)
        .await
        .with_context(|| format!("open the SQLite file {}", path.display()))
}

pub(super) async fn books(
    connection: &mut SqliteConnection,
    pipeline: &PipelineName,
) -> Result<Books, anyhow::Error> {
    let mut transaction = connection.begin().await.context("begin to read")?;
    let settled: Option<Option<i64>> =
        sqlx::query_scalar("select last_id from outbox_cursors where pipeline = ? and shard = 0")
            .bind(pipeline.as_str())
            .fetch_optional(&mut *transaction)
            .await
            .context("read the cursor")?;
    let parked: Vec<(i64, String)> = sqlx::query_as(
        "select id, event_id from outbox_parked where pipeline = ? order by id, event_id",
    )
    .bind(pipeline.as_str())
    .fetch_all(&mut *transaction)
    .await
    .context("read the parked events")?;
    let dropped: Vec<(i64, String)> = sqlx::query_as(
        "select id, event_id from outbox_dropped where pipeline = ? order by id, event_id",
    )
    .bind(pipeline.as_str())
    .fetch_all(&mut *transaction)
    .await
    .context("read the dropped events")?;
    let lost: Vec<(String, i64, String)> = sqlx::query_as(
        "select selector, events, strftime('%Y-%m-%dT%H:%M:%SZ', at / 1000000, 'unixepoch') from outbox_acts \
          where who = 'retention' and action = 'lost' and pipeline = ? order by id",
    )
    .bind(pipeline.as_str())
    .fetch_all(&mut *transaction)
    .await
    .context("read what retention has removed unpublished")?;
    transaction.commit().await?;
    let events = |events: Vec<(i64, String)>| {
        let events = events.into_iter();
        events
            .map(|(id, event_id)| (id, event_id.parse().unwrap_or_default()))
            .collect()
    };
    Ok(Books {
        settled: settled.flatten().map(Settled::UpTo),
        parked: events(parked),
        moved: false,
        dropped: events(dropped),
        lost: lost.into_iter().map(LostEvents::from).collect(),
    })
}

pub(super) async fn kinds(
    connection: &mut SqliteConnection,
    ids: bool,
) -> Result<Vec<Emitted>, anyhow::Error> {
    let statement = if ids {
        "select distinct aggregate_type, aggregate_id, event_type from outbox_events"
    } else {
        "select distinct aggregate_type, '', event_type from outbox_events"
    };
    let rows = sqlx::query(statement).fetch_all(connection).await;
    rows.context("read the kinds of events")?
        .iter()
        .map(|row| {
            Ok(Emitted {
                id: 0,
                event_id: Uuid::nil(),
                aggregate_type: text(row, 0)?.unwrap_or_default(),
                aggregate_id: text(row, 1)?.unwrap_or_default(),
                event_type: text(row, 2)?.unwrap_or_default(),
                payload: None,
                payload_bytes: None,
                headers: None,
                settled: false,
            })
        })
        .collect()
}

pub(super) async fn first_since(
    connection: &mut SqliteConnection,
    us: i64,
) -> Result<Option<i64>, anyhow::Error> {
    sqlx::query_scalar("select min(id) from outbox_events where occurred_at >= ?")
        .bind(us)
        .fetch_one(connection)
        .await
        .context("find where to begin")
}

pub(super) async fn earliest_from(
    connection: &mut SqliteConnection,
    id: i64,
) -> Result<Option<i64>, anyhow::Error> {
    sqlx::query_scalar("select min(occurred_at) from outbox_events where id >= ?")
        .bind(id)
        .fetch_one(connection)
        .await
        .context("find when to begin")
}

pub(super) async fn event_id(
    connection: &mut SqliteConnection,
    id: i64,
) -> Result<Option<String>, anyhow::Error> {
    sqlx::query_scalar("select event_id from outbox_events where id = ?")
        .bind(id)
        .fetch_optional(connection)
        .await
        .context("look up an event")
}

pub(super) async fn read(
    connection: &mut SqliteConnection,
    from_id: i64,
    settled: Option<&Settled>,
    mut each: impl FnMut(&Emitted),
) -> Result<Retained, anyhow::Error> {
    let settled = match settled {
        Some(Settled::UpTo(last_id)) => *last_id,
        Some(Settled::Windows(_)) | None => i64::MIN,
    };
    let newest: i64 = sqlx::query_scalar(
        "select coalesce((select seq from sqlite_sequence where name = 'outbox_events'), 0)",
    )
    .fetch_one(&mut *connection)
    .await
    .context("read the newest id")?;
    let mut rows = sqlx::query(
        "select id, event_id, aggregate_type, aggregate_id, event_type, payload, payload_bytes, headers
           from outbox_events where id between ? and ? order by id",
    )
    .bind(from_id)
    .bind(newest)
    .fetch(connection);
    while let Some(row) = rows.try_next().await.context("read the log")? {
        each(&event(&row, settled).context("decode an event")?);
    }
    // A transaction that is taken back gives its ids back: what is not there up to the newest was deleted since.
    Ok(Retained {
        first: Some(newest + 1),
        gone: Vec::new(),
    })
}

fn event(row: &SqliteRow, settled: i64) -> Result<Emitted, sqlx::Error> {
    let id = row.try_get_unchecked(0)?;
    let event_id: &[u8] = row.try_get_unchecked(1)?;
    Ok(Emitted {
        id,
        event_id: Uuid::try_parse_ascii(event_id).unwrap_or_default(),
        aggregate_type: text(row, 2)?.unwrap_or_default(),
        aggregate_id: text(row, 3)?.unwrap_or_default(),
        event_type: text(row, 4)?.unwrap_or_default(),
        payload: text(row, 5)?,
        payload_bytes: row.try_get_unchecked(6)?,
        headers: text(row, 7)?,
        settled: id <= settled,
    })
}

/// SQLite checks no encoding.
fn text(row: &SqliteRow, column: usize) -> Result<Option<String>, sqlx::Error> {
    let bytes: Option<&[u8]> = row.try_get_unchecked(column)?;
    Ok(bytes.map(|bytes| String::from_utf8_lossy(bytes).into_owned()))
}
