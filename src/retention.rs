//! Keeps room in the log: partitions made ahead of the newest id, and what every pipeline has published given back.
//!
//! Nothing waits for this: an insert that fits no partition goes to the default one, and an event that is kept too long
//! costs space only. So trouble is logged and tried again.

use std::time::Duration;

use anyhow::Context;
use serde::Deserialize;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{AssertSqlSafe, Connection, Executor, Row};
use tokio::time::sleep;

use crate::event::PipelineName;
use crate::ledger::view;
use crate::source::postgres::{ask, connect};
use crate::telemetry::LogMetrics;

/// Rows of a SQLite outbox that are deleted in one transaction: no writer waits longer than for these.
const ROWS_AT_ONCE: i64 = 1_000;

/// How long events are kept.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Published events stay at least this long; none: for ever.
    pub keep: Option<Duration>,
    /// Events that a pipeline has not published go when they are older than this; none: never.
    pub drop_unpublished_after: Option<Duration>,
    /// What the log may take, in bytes; for the forecast only.
    pub disk_budget_bytes: Option<u64>,
    /// Between two looks.
    pub interval: Duration,
    /// Events per partition.
    pub partition_events: u64,
    /// Partitions that lie wholly beyond the newest id.
    pub partitions_ahead: u32,
    /// These have to have published an event before it goes, also while they have no cursor yet.
    pub pipelines: Vec<PipelineName>,
}

/// A partition whose space was given back.
#[derive(Debug, PartialEq, Eq, Deserialize)]
struct Retired {
    partition: String,
    first_id: i64,
    last_id: i64,
    events: u64,
    /// Of these, by one pipeline or more.
    unpublished: u64,
    /// Whether the empty partition is gone as well.
    dropped: bool,
}

/// Looks after the log in PostgreSQL now and then, for ever.
pub async fn keep_postgres(options: PgConnectOptions, settings: Settings) {
    let metrics = LogMetrics::new(settings.disk_budget_bytes);
    loop {
        if let Err(error) = look_after(&options, &settings, &metrics).await {
            tracing::warn!(error = %format!("{error:#}"), "could not look after the partitions, inserts go on");
        }
        sleep(settings.interval).await;
    }
}

async fn look_after(
    options: &PgConnectOptions,
    settings: &Settings,
    metrics: &LogMetrics,
) -> Result<(), anyhow::Error> {
    let connection = connect(options).await;
    if connection.is_err() {
        metrics.size(None);
    }
    let mut connection = connection?;
    let made = make(&mut connection, settings).await;
    let retired = retire(&mut connection, settings, metrics).await;
    let size = view::postgres::log_size(&mut connection).await;
    // Whether the session ends politely is the server's affair.
    let _ = connection.close().await;
    metrics.size(size.as_ref().ok().map(|size| size.bytes));
    made.and(retired)?;
    size.map(drop)
}

async fn make(connection: &mut PgConnection, settings: &Settings) -> Result<(), anyhow::Error> {
    let statement = format!(
        "select outbox.make_partitions({}, {})",
        settings.partitions_ahead, settings.partition_events
    );
    let row = connection
        .fetch_one(sqlx::raw_sql(AssertSqlSafe(statement)))
        .await
        .context("make partitions")?;
    let made: i32 = row
        .try_get_unchecked(0)
        .context("decode how many partitions were made")?;
    if made > 0 {
        tracing::info!(made, "made partitions of outbox.events ahead");
    }
    Ok(())
}

async fn retire(
    connection: &mut PgConnection,
    settings: &Settings,
    metrics: &LogMetrics,
) -> Result<(), anyhow::Error> {
    let Some(statement) = statement(settings) else {
        return Ok(());
    };
    loop {
        let retired: Vec<Retired> = ask::all_within(connection, &statement, Duration::from_mins(5))
            .await
            .context("retire a partition")?;
        let Some(retired) = retired.first() else {
            return Ok(());
        };
        metrics.retired(retired.events, retired.unpublished);
        tell(retired);
    }
}

/// The call that retires one partition; none when everything is kept.
fn statement(settings: &Settings) -> Option<String> {
    let names: Vec<String> = settings
        .pipelines
        .iter()
        .map(|name| ask::literal(name.as_str()))
        .collect();
    Some(format!(
        "select * from outbox.retire_partition({}, array[{}]::text[], {})",
        interval(settings.keep?),
        names.join(", "),
        settings
            .drop_unpublished_after
            .map_or("null".to_owned(), interval)
    ))
}

fn interval(duration: Duration) -> String {
    format!("interval '{} seconds'", duration.as_secs())
}

fn tell(retired: &Retired) {
    let Retired {
        partition,
        first_id,
        last_id,
        events,
        unpublished,
        dropped,
    } = retired;
    if *unpublished > 0 {
        tracing::error!(
            %partition,
            first_id,
            last_id,
            events,
            unpublished,
            "dropped events that were NOT published by every pipeline (retention.drop_unpublished_after)"
        );
    } else {
        tracing::info!(%partition, first_id, last_id, events, dropped, "retired a partition of published events");
    }
}

/// Looks after a SQLite outbox now and then, for ever.
pub async fn keep_sqlite(options: SqliteConnectOptions, settings: Settings, now_us: fn() -> i64) {
    let metrics = LogMetrics::new(settings.disk_budget_bytes);
    loop {
        if let Err(error) = delete_published(&options, &settings, &metrics, now_us).await {
            tracing::warn!(error = %format!("{error:#}"), "could not delete published events, nobody waits for that");
        }
        sleep(settings.interval).await;
    }
}

async fn delete_published(
    options: &SqliteConnectOptions,
    settings: &Settings,
    metrics: &LogMetrics,
    now_us: fn() -> i64,
) -> Result<(), anyhow::Error> {
    let size = async {
        let mut connection = SqliteConnection::connect_with(options)
            .await
            .context("open the SQLite outbox")?;
        let size = view::sqlite::log_size(&mut connection).await?;
        Ok::<_, anyhow::Error>((connection, size))
    };
    let size = size.await;
    metrics.size(size.as_ref().ok().map(|(_, size)| size.bytes));
    let (mut connection, _) = size?;
    let Some(keep) = settings.keep else {
        return Ok(());
    };
    let before_us = now_us().saturating_sub(micros(keep));
    let overdue_us = settings
        .drop_unpublished_after
        .map_or(i64::MIN, |after| now_us().saturating_sub(micros(after)));
    let published = published_in_sqlite(&mut connection, &settings.pipelines).await?;
    loop {
        let deleted = delete_some(&mut connection, published, before_us, overdue_us).await?;
        let unpublished = deleted.iter().filter(|id| **id > published).count() as u64;
        let events = deleted.len() as u64;
        metrics.retired(events, unpublished);
        if unpublished > 0 {
            tracing::error!(
                events,
                unpublished,
                "deleted events that were NOT published by every pipeline (retention.drop_unpublished_after)"
            );
        } else if events > 0 {
            tracing::debug!(events, "deleted published events");
        }
        if deleted.len() < usize::try_from(ROWS_AT_ONCE).unwrap_or(usize::MAX) {
            return Ok(());
        }
    }
}

/// The id up to which every pipeline has published; 0 when one has not begun.
async fn published_in_sqlite(
    connection: &mut SqliteConnection,
    pipelines: &[PipelineName],
) -> Result<i64, anyhow::Error> {
    let names: Vec<&str> = pipelines.iter().map(PipelineName::as_str).collect();
    let names = serde_json::to_string(&names).context("write the names of the pipelines")?;
    sqlx::query_scalar(
        "select coalesce(min(coalesce(c.last_id, 0)), 0) \
           from (select pipeline, shard from outbox_cursors union all \
                 select value, 0 from json_each(?1) \
                  where value not in (select pipeline from outbox_cursors)) p \
           left join outbox_cursors c on c.pipeline = p.pipeline and c.shard = p.shard",
    )
    .bind(names)
    .fetch_one(connection)
    .await
    .context("read the cursors")
}

/// From the oldest on; returns the ids.
async fn delete_some(
    connection: &mut SqliteConnection,
    published: i64,
    before_us: i64,
    overdue_us: i64,
) -> Result<Vec<i64>, anyhow::Error> {
    sqlx::query_scalar(
        "delete from outbox_events where id in ( \
            select id from (select id, occurred_at from outbox_events order by id limit ?4) \
             where occurred_at < ?2 and (id <= ?1 or occurred_at < ?3)) \
         returning id",
    )
    .bind(published)
    .bind(before_us)
    .bind(overdue_us)
    .bind(ROWS_AT_ONCE)
    .fetch_all(connection)
    .await
    .context("delete published events")
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}
