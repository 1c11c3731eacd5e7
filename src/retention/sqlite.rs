//! Upkeep of the log in a SQLite file: samples as in PostgreSQL, and small transactions that delete.
//!
//! One transaction writes at a time, so the order of the ids is the order of the commits, and a sample is an id: what was
//! committed when it was noted has ids up to that one, and a trigger gives later events higher ones.

use anyhow::Context;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{Connection, Sqlite, Transaction};
use tokio::time::{Instant, sleep};

use super::{BATCHES_MAX, Counted, Gone, ROWS_AT_ONCE, Settings};
use crate::ledger::view;
use crate::reason::reason;
use crate::source::sqlite::newest_id;
use crate::telemetry::LogMetrics;

/// One relay's upkeep.
pub struct Upkeep {
    options: SqliteConnectOptions,
    settings: Settings,
    metrics: LogMetrics,
    now_us: fn() -> i64,
    counted: Option<Counted>,
}

/// How far a pipeline has published.
type Passed = (String, i64);

impl Upkeep {
    /// Upkeep of the log in the file. `now_us` is the wall clock, in microseconds since the Unix epoch.
    #[must_use]
    pub fn new(options: SqliteConnectOptions, settings: Settings, now_us: fn() -> i64) -> Self {
        Self {
            metrics: LogMetrics::new(settings.disk_budget_bytes),
            options,
            settings,
            now_us,
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
    /// When the file can't be read or written.
    pub async fn look_after(&mut self) -> Result<(), anyhow::Error> {
        let opened = async {
            let mut connection = SqliteConnection::connect_with(&self.options)
                .await
                .context("open the SQLite outbox")?;
            let size = view::sqlite::log_size(&mut connection).await?;
            Ok::<_, anyhow::Error>((connection, size.bytes))
        };
        let opened = opened.await;
        self.metrics
            .size(opened.as_ref().ok().map(|(_, size)| *size));
        let (mut connection, _) = opened?;
        self.sample(&mut connection).await?;
        if let (Some(keep), Some(counted)) = (self.settings.keep, self.counted) {
            let aged = aged(&mut connection, counted.seconds, keep.as_secs_f64()).await?;
            let overdue = match self.settings.drop_unpublished_after {
                Some(after) => {
                    aged_or_nothing(&mut connection, counted.seconds, after.as_secs_f64()).await?
                }
                None => i64::MIN,
            };
            if let Some(aged) = aged {
                self.delete(&mut connection, aged, overdue.min(aged))
                    .await?;
            }
        }
        let _ = connection.close().await;
        Ok(())
    }

    /// As `outbox.take_sample` of PostgreSQL.
    async fn sample(&mut self, connection: &mut SqliteConnection) -> Result<(), anyhow::Error> {
        let spacing = self.settings.spacing().as_secs_f64();
        let mut transaction = begin(connection).await?;
        let last: Option<(f64, i64)> =
            sqlx::query_as("select counted, at from outbox_samples order by id desc limit 1")
                .fetch_optional(&mut *transaction)
                .await
                .context("read the last sample")?;
        #[expect(clippy::cast_precision_loss, reason = "of microseconds since a sample")]
        let seconds = match (last, self.counted) {
            (None, _) => 0.0,
            (Some((last, _)), Some(known)) => last.max(known.seconds + known.elapsed()),
            (Some((last, at)), None) => {
                let ago = (self.now_us)().saturating_sub(at) as f64 / 1_000_000.0;
                last + ago.clamp(0.0, spacing)
            }
        };
        if last.is_none_or(|(last, _)| seconds >= last + spacing) {
            let newest = newest_id(&mut transaction).await?;
            sqlx::query("insert into outbox_samples (at, counted, newest) values (?1, ?2, ?3)")
                .bind((self.now_us)())
                .bind(seconds)
                .bind(newest.0)
                .execute(&mut *transaction)
                .await
                .context("note how old events are")?;
            self.thin(&mut transaction, seconds, spacing).await?;
        }
        transaction.commit().await.context("commit")?;
        self.counted = Some(Counted {
            seconds,
            at: Instant::now(),
        });
        Ok(())
    }

    /// Removes one sample that is not needed: samples stay about a hundred.
    async fn thin(
        &self,
        transaction: &mut Transaction<'_, Sqlite>,
        now: f64,
        spacing: f64,
    ) -> Result<(), anyhow::Error> {
        let horizon = self.settings.longest().as_secs_f64().max(86_400.0);
        sqlx::query(
            "delete from outbox_samples where id = ( \
                select id from ( \
                    select id, lag(counted) over (order by id) as before, lead(counted) over (order by id) as after \
                      from outbox_samples) \
                 where after < ?1 - 1.2 * ?3 or (after < ?1 - 50 * ?2 and after - before < ?3 / 40) \
                 order by id limit 1)",
        )
        .bind(now)
        .bind(spacing)
        .bind(horizon)
        .execute(&mut **transaction)
        .await
        .context("remove a sample")?;
        Ok(())
    }

    async fn delete(
        &self,
        connection: &mut SqliteConnection,
        aged: i64,
        overdue: i64,
    ) -> Result<(), anyhow::Error> {
        let mut after = i64::MIN;
        for _ in 0..BATCHES_MAX {
            let mut transaction = begin(connection).await?;
            let Some(looked_to) = end_of_batch(&mut transaction, after, aged).await? else {
                return Ok(());
            };
            let passed = self.passed(&mut transaction).await?;
            let gone = delete_some(&mut transaction, (after, looked_to), &passed, overdue).await?;
            transaction.commit().await.context("commit")?;
            after = looked_to;
            self.metrics.retired(gone.events, gone.unpublished);
            if gone.events > 0 {
                let Gone {
                    first_id,
                    last_id,
                    events,
                    ..
                } = gone;
                tracing::debug!(first_id, last_id, events, "deleted old events");
            }
            gone.tell_loss();
        }
        Ok(())
    }

    /// The id up to which each pipeline has published; 0 when it has not begun.
    async fn passed(
        &self,
        transaction: &mut Transaction<'_, Sqlite>,
    ) -> Result<Vec<Passed>, anyhow::Error> {
        let mut passed: Vec<Passed> = sqlx::query_as(
            "select pipeline, min(coalesce(last_id, 0)) from outbox_cursors group by pipeline",
        )
        .fetch_all(&mut **transaction)
        .await
        .context("read the cursors")?;
        for name in &self.settings.pipelines {
            if passed.iter().all(|(known, _)| known != name.as_str()) {
                passed.push((name.to_string(), 0));
            }
        }
        Ok(passed)
    }
}

/// With the write lock from the start: what is read in it stays so until its end.
async fn begin(
    connection: &mut SqliteConnection,
) -> Result<Transaction<'_, Sqlite>, anyhow::Error> {
    connection
        .begin_with("begin immediate")
        .await
        .context("begin to write")
}

/// The newest id that was committed this many seconds ago, with the margin that [`super`] tells of.
async fn aged(
    connection: &mut SqliteConnection,
    now: f64,
    age: f64,
) -> Result<Option<i64>, anyhow::Error> {
    sqlx::query_scalar(
        "select newest from outbox_samples where counted <= ?1 - ?2 * 1.025 order by id desc limit 1",
    )
    .bind(now)
    .bind(age)
    .fetch_optional(connection)
    .await
    .context("read the samples")
}

async fn aged_or_nothing(
    connection: &mut SqliteConnection,
    now: f64,
    age: f64,
) -> Result<i64, anyhow::Error> {
    Ok(aged(connection, now, age).await?.unwrap_or(i64::MIN))
}

async fn end_of_batch(
    transaction: &mut Transaction<'_, Sqlite>,
    after: i64,
    aged: i64,
) -> Result<Option<i64>, anyhow::Error> {
    sqlx::query_scalar(
        "select max(id) from (select id from outbox_events where id > ?1 and id <= ?2 order by id limit ?3)",
    )
    .bind(after)
    .bind(aged)
    .bind(ROWS_AT_ONCE / 5)
    .fetch_one(&mut **transaction)
    .await
    .context("look for old events")
}

/// Deletes what may go between two ids, and notes what is lost.
async fn delete_some(
    transaction: &mut Transaction<'_, Sqlite>,
    (after, looked_to): (i64, i64),
    passed: &[Passed],
    overdue: i64,
) -> Result<Gone, anyhow::Error> {
    let published = passed.iter().map(|(_, last_id)| *last_id).min();
    let mut ids: Vec<i64> = sqlx::query_scalar(
        "delete from outbox_events \
          where id > ?1 and id <= ?2 and (id <= ?3 or id <= ?4) \
            and not exists (select 1 from outbox_parked p \
                             where p.has_content = 0 and p.event_id = outbox_events.event_id) \
            and not exists (select 1 from outbox_replays r \
                             where r.state = 'open' and outbox_events.id > r.last_id and outbox_events.id <= r.until_id) \
         returning id",
    )
    .bind(after)
    .bind(looked_to)
    .bind(published.unwrap_or(0))
    .bind(overdue)
    .fetch_all(&mut **transaction)
    .await
    .context("delete old events")?;
    ids.sort_unstable();
    let (Some(first_id), Some(last_id)) = (ids.first().copied(), ids.last().copied()) else {
        return Ok(Gone::default());
    };
    let mut gone = Gone {
        first_id,
        last_id,
        events: ids.len() as u64,
        unpublished: 0,
        lost_to: Vec::new(),
    };
    for (pipeline, last_id) in passed {
        let lost = &ids[ids.partition_point(|id| id <= last_id)..];
        if let (Some(first), Some(last)) = (lost.first(), lost.last()) {
            gone.unpublished = gone.unpublished.max(lost.len() as u64);
            gone.lost_to.push(pipeline.clone());
            note_loss(transaction, pipeline, (*first, *last), lost.len()).await?;
        }
    }
    Ok(gone)
}

async fn note_loss(
    transaction: &mut Transaction<'_, Sqlite>,
    pipeline: &str,
    (first, last): (i64, i64),
    events: usize,
) -> Result<(), anyhow::Error> {
    sqlx::query(
        "insert into outbox_acts (who, action, pipeline, selector, events, reason) \
         values ('retention', 'lost', ?1, ?2, ?3, 'not published within retention.drop_unpublished_after')",
    )
    .bind(pipeline)
    .bind(format!("ids {first} to {last}"))
    .bind(i64::try_from(events).unwrap_or(i64::MAX))
    .execute(&mut **transaction)
    .await
    .context("note what is lost")?;
    Ok(())
}
