//! Upkeep of the log in PostgreSQL: calls functions of the migration, each in a transaction of its own, so that it works
//! through a pooler and holds no lock for longer than it needs.

use std::time::Duration;

use anyhow::{Context, anyhow};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection, Executor, Row};
use tokio::time::{Instant, sleep, timeout};

use super::{BATCHES_MAX, Counted, Gone, ROWS_AT_ONCE, Settings};
use crate::ledger::view;
use crate::reason::reason;
use crate::source::postgres::{Connector, ask};
use crate::telemetry::LogMetrics;

/// For one answer that looks at whole partitions, which may be many millions of events.
const PARTITION_MAX: Duration = Duration::from_mins(5);
/// For any other answer.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// One relay's upkeep.
pub struct Upkeep {
    connector: Connector,
    settings: Settings,
    metrics: LogMetrics,
    counted: Option<Counted>,
}

/// A partition that went whole.
#[derive(Debug, Deserialize)]
struct Retired {
    partition: String,
    first_id: i64,
    last_id: i64,
    events: u64,
    unpublished: u64,
    /// Whether the empty partition is gone as well.
    dropped: bool,
    lost_to: Vec<String>,
}

/// Rows that were looked at, and those of them that were deleted.
#[derive(Debug, Deserialize)]
struct Deleted {
    first_id: Option<i64>,
    last_id: Option<i64>,
    events: u64,
    unpublished: u64,
    looked_to: i64,
    lost_to: Vec<String>,
}

impl Upkeep {
    /// Upkeep of the log that the connector leads to.
    #[must_use]
    pub fn new(connector: impl Into<Connector>, settings: Settings) -> Self {
        Self {
            metrics: LogMetrics::new(settings.disk_budget_bytes),
            connector: connector.into(),
            settings,
            counted: None,
        }
    }

    /// Looks after the log now and then, for ever.
    pub async fn run(mut self) {
        loop {
            if let Err(error) = self.look_after().await {
                tracing::warn!(
                    error = %reason(&error),
                    again_in = %humantime::format_duration(self.settings.interval),
                    "could not look after the log: inserts and publishing go on, events may stay for longer than \
                     retention.keep; see `outbox-relay doctor`"
                );
            }
            sleep(self.settings.interval).await;
        }
    }

    /// Looks after the log once.
    ///
    /// # Errors
    /// When the database refuses a part of it; the other parts were done.
    pub async fn look_after(&mut self) -> Result<(), anyhow::Error> {
        let mut connection = self
            .connector
            .connect()
            .await
            .inspect_err(|_| self.metrics.size(None))?;
        let made = self.make(&mut connection).await;
        let sampled = self.sample(&mut connection).await;
        let retired = match self.settings.keep {
            Some(keep) => self.retire(&mut connection, keep).await,
            None => Ok(()),
        };
        let size = view::postgres::log_size(&mut connection).await;
        // Whether the session ends politely is the server's affair.
        let _ = connection.close().await;
        // What is known is said, whatever of the rest fails.
        self.metrics.size(size.as_ref().ok().map(|size| size.bytes));
        made.and(sampled).and(retired).and(size.map(drop))
    }

    async fn make(&self, connection: &mut PgConnection) -> Result<(), anyhow::Error> {
        let (ahead, events) = (
            self.settings.partitions_ahead,
            self.settings.partition_events,
        );
        let call = format!("select outbox.make_partitions({ahead}, {events}) as made");
        let made: Vec<Made> = call_function(connection, &call, ANSWER_MAX)
            .await
            .context("make partitions")?;
        let made: i32 = made.iter().map(|Made { made }| made).sum();
        if made > 0 {
            tracing::info!(made, "made partitions of outbox.events ahead");
        }
        Ok(())
    }

    async fn sample(&mut self, connection: &mut PgConnection) -> Result<(), anyhow::Error> {
        let known = self.counted.map_or("null, null".to_owned(), |c| {
            format!("{}, {}", c.seconds, c.elapsed())
        });
        let call = format!(
            "select outbox.take_sample({}, {}, {known}) as seconds",
            interval(self.settings.spacing()),
            interval(self.settings.longest()),
        );
        let sampled: Vec<Sampled> = call_function(connection, &call, ANSWER_MAX)
            .await
            .context("note how old events are")?;
        if let Some(Sampled {
            seconds: Some(seconds),
        }) = sampled.first()
        {
            self.counted = Some(Counted {
                seconds: *seconds,
                at: Instant::now(),
            });
        }
        Ok(())
    }

    async fn retire(
        &self,
        connection: &mut PgConnection,
        keep: Duration,
    ) -> Result<(), anyhow::Error> {
        let arguments = self.arguments(keep);
        let partitions = self.retire_partitions(connection, &arguments).await;
        let rows = self.retire_rows(connection, &arguments).await;
        partitions.and(rows)
    }

    async fn retire_partitions(
        &self,
        connection: &mut PgConnection,
        arguments: &str,
    ) -> Result<(), anyhow::Error> {
        let call = format!("select * from outbox.retire_partition({arguments})");
        loop {
            let retired: Vec<Retired> = call_function(connection, &call, PARTITION_MAX)
                .await
                .context("retire a partition")?;
            let Some(retired) = retired.into_iter().next() else {
                return Ok(());
            };
            let Retired {
                partition,
                first_id,
                last_id,
                events,
                unpublished,
                dropped,
                lost_to,
            } = retired;
            self.metrics.retired(events, unpublished);
            tracing::info!(%partition, first_id, last_id, events, dropped, "retired a partition");
            let gone = Gone {
                first_id,
                last_id,
                events,
                unpublished,
                lost_to,
            };
            gone.tell_loss();
        }
    }

    async fn retire_rows(
        &self,
        connection: &mut PgConnection,
        arguments: &str,
    ) -> Result<(), anyhow::Error> {
        let mut after = "null".to_owned();
        for _ in 0..BATCHES_MAX {
            let call =
                format!("select * from outbox.retire_rows({arguments}, {after}, {ROWS_AT_ONCE})");
            let deleted: Vec<Deleted> = call_function(connection, &call, ANSWER_MAX)
                .await
                .map_err(name_foreign_key)
                .context("delete old events")?;
            let Some(deleted) = deleted.into_iter().next() else {
                break;
            };
            after = deleted.looked_to.to_string();
            let Some((first_id, last_id)) = deleted.first_id.zip(deleted.last_id) else {
                continue;
            };
            let gone = Gone {
                first_id,
                last_id,
                events: deleted.events,
                unpublished: deleted.unpublished,
                lost_to: deleted.lost_to,
            };
            self.metrics.retired(gone.events, gone.unpublished);
            tracing::debug!(
                first_id,
                last_id,
                events = gone.events,
                "deleted old events"
            );
            gone.tell_loss();
        }
        Ok(())
    }

    /// Of both functions that remove events.
    fn arguments(&self, keep: Duration) -> String {
        let Settings {
            drop_unpublished_after,
            pipelines,
            ..
        } = &self.settings;
        let names: Vec<String> = pipelines
            .iter()
            .map(|name| ask::literal(name.as_str()))
            .collect();
        format!(
            "{}, array[{}]::pg_catalog.text[], {}, {}",
            interval(keep),
            names.join(", "),
            drop_unpublished_after.map_or("null".to_owned(), interval),
            self.counted
                .map_or("null".to_owned(), |counted| counted.seconds.to_string())
        )
    }
}

#[derive(Deserialize)]
struct Made {
    made: i32,
}

#[derive(Deserialize)]
struct Sampled {
    seconds: Option<f64>,
}

/// Whole milliseconds: what is less has no meaning here.
fn interval(duration: Duration) -> String {
    format!(
        "pg_catalog.make_interval(secs => {}.{:03})",
        duration.as_secs(),
        duration.subsec_millis()
    )
}

/// The rows of a select that calls a function. The functions look again after they have waited for a lock, so the
/// transaction names the isolation level that this needs, whatever the default of database or role is.
async fn call_function<T: DeserializeOwned>(
    connection: &mut PgConnection,
    select: &str,
    limit: Duration,
) -> Result<Vec<T>, anyhow::Error> {
    let statement = format!(
        "begin isolation level read committed; \
         set local search_path to pg_catalog, pg_temp; set local statement_timeout = {}; \
         select coalesce(pg_catalog.json_agg(pg_catalog.row_to_json(document)), '[]')::pg_catalog.text \
           from ({select}) document; commit",
        limit.as_millis()
    );
    let asked = connection.fetch_all(sqlx::raw_sql(AssertSqlSafe(statement)));
    let answered = timeout(limit + Duration::from_secs(2), asked)
        .await
        .map_err(|_| anyhow!("no answer within {} s", limit.as_secs() + 2))
        .and_then(|answered| answered.map_err(anyhow::Error::from));
    let rows = match answered {
        Ok(rows) => rows,
        Err(error) => {
            // What failed leaves its transaction behind; the parts that follow need another one.
            let _ = connection.execute("rollback").await;
            return Err(error);
        }
    };
    let row = rows.first().context("the answer is empty")?;
    let answer: &str = row.try_get_unchecked(0).context("decode the answer")?;
    serde_json::from_str(answer).context("understand the answer")
}

/// Tells a person what a foreign key to the log does.
fn name_foreign_key(error: anyhow::Error) -> anyhow::Error {
    let refused = error.downcast_ref::<sqlx::Error>().is_some_and(|error| {
        error
            .as_database_error()
            .and_then(sqlx::error::DatabaseError::code)
            .as_deref()
            == Some("23503")
    });
    if refused {
        error.context(
            "a foreign key to outbox.events keeps old events from being removed: drop the constraint that is named here",
        )
    } else {
        error
    }
}
