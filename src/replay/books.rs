//! The table `outbox.replays`: what was asked for, by whom, and how far it has come.

use std::time::Duration;

use anyhow::{Context, Error, bail, ensure};
use serde::{Deserialize, Serialize};
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Executor, Row};

use crate::event::EventId;
use crate::source::postgres::{NEWEST_ID, Selection, ask};

/// Without news of a replay for this long somebody else may resume it.
const EXPIRY: Duration = Duration::from_secs(30);

/// A replay and how far it has come.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// Its number.
    pub id: i64,
    /// By whose rules.
    pub pipeline: String,
    /// Which events.
    pub selection: Selection,
    /// Where to, instead of where the pipeline's template says.
    pub topic: Option<String>,
    /// Events per second.
    pub rate: u32,
    /// Before the first id that it looks at.
    pub from: EventId,
    /// The last id that it looks at.
    pub until: EventId,
    /// How far it has come.
    pub last_id: EventId,
    /// Events published.
    pub published: u64,
    /// Events that were selected and are not for this pipeline or can't be published.
    pub skipped: u64,
}

impl Job {
    /// The share that is done, from 0 to 1, by ids.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    pub fn share(&self) -> f64 {
        let all = (self.until.0 - self.from.0).max(1);
        (self.last_id.0 - self.from.0) as f64 / all as f64
    }
}

/// A replay as it is listed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Listed {
    /// Its number.
    pub id: i64,
    /// By whose rules.
    pub pipeline: String,
    /// Which events.
    pub selection: Selection,
    /// Where to, instead of where the pipeline's template says.
    pub topic: Option<String>,
    /// Events per second.
    pub rate: i32,
    /// `open`, `done` or `cancelled`.
    pub state: String,
    /// Who is at it, while somebody is.
    pub holder: Option<String>,
    /// Before the first id that it looks at.
    pub from_id: i64,
    /// The last id that it looks at.
    pub until_id: i64,
    /// How far it has come.
    pub last_id: i64,
    /// Events published.
    pub published: i64,
    /// Events that were left out.
    pub skipped: i64,
    /// Who asked for it: the role of the database.
    pub created_by: String,
    /// How long ago.
    pub age_seconds: f64,
}

const COLUMNS: &str = "id, pipeline, selection, topic, rate, state, \
     case when expires_at > clock_timestamp() then holder end as holder, \
     from_id, until_id, last_id, published, skipped, created_by, \
     extract(epoch from clock_timestamp() - created_at)::float8 as age_seconds";

/// The table, as one process works with it.
pub(crate) struct Books {
    connection: PgConnection,
    holder: String,
}

impl Books {
    pub(crate) fn new(connection: PgConnection, holder: String) -> Self {
        Self { connection, holder }
    }

    /// The ids that a replay for this pipeline looks at: what is retained, up to where the pipeline has published. What is
    /// newer is on its way anyway.
    pub(crate) async fn range(&mut self, pipeline: &str) -> Result<(EventId, EventId), Error> {
        #[derive(Deserialize)]
        struct Range {
            from: i64,
            until: i64,
        }
        let Range { from, until } = ask::one(
            &mut self.connection,
            &format!(
                "select coalesce((select min(id) - 1 from outbox.events), 0) as from, \
                        least({NEWEST_ID}, coalesce( \
                            (select min(last_id) from outbox.cursors where pipeline = {}), 0)) as until",
                ask::literal(pipeline)
            ),
        )
        .await
        .context("ask what is retained")?;
        Ok((EventId(from.min(until)), EventId(until)))
    }

    /// Notes a new replay, held by this process; sets its number.
    pub(crate) async fn create(&mut self, job: &mut Job) -> Result<(), Error> {
        let selection = serde_json::to_string(&job.selection).context("write the selection")?;
        let statement = format!(
            "insert into outbox.replays (pipeline, selection, topic, rate, from_id, until_id, last_id, holder, expires_at) \
             values ({}, {}, {}, {}, {}, {}, {}, {}, {}) returning id",
            ask::literal(&job.pipeline),
            ask::literal(&selection),
            job.topic.as_deref().map_or("null".to_owned(), ask::literal),
            job.rate,
            job.from,
            job.until,
            job.last_id,
            ask::literal(&self.holder),
            expiry()
        );
        let row = self
            .connection
            .fetch_one(sqlx::raw_sql(AssertSqlSafe(statement)))
            .await
            .context("note the replay")?;
        job.id = row.try_get_unchecked(0)?;
        Ok(())
    }

    /// Takes over a replay that nobody is at.
    pub(crate) async fn resume(&mut self, id: i64, rate: Option<u32>) -> Result<Job, Error> {
        let rate = rate.map_or(String::new(), |rate| format!("rate = {rate}, "));
        let taken = self
            .execute(format!(
                "update outbox.replays set {rate}holder = {}, expires_at = {} \
                  where id = {id} and state = 'open' \
                    and (expires_at <= clock_timestamp() or holder = {0})",
                ask::literal(&self.holder),
                expiry()
            ))
            .await
            .context("take the replay over")?;
        let known: Vec<Listed> = ask::all(
            &mut self.connection,
            &format!("select {COLUMNS} from outbox.replays where id = {id}"),
        )
        .await
        .context("read the replay")?;
        let Some(found) = known.into_iter().next() else {
            bail!("there is no replay {id}: see `outbox-relay replay list`");
        };
        if taken == 0 {
            ensure!(found.state == "open", "replay {id} is {}", found.state);
            bail!(
                "replay {id} is being run by {}",
                found.holder.unwrap_or_default()
            );
        }
        Ok(Job {
            id,
            pipeline: found.pipeline,
            selection: found.selection,
            topic: found.topic,
            rate: u32::try_from(found.rate)?,
            from: EventId(found.from_id),
            until: EventId(found.until_id),
            last_id: EventId(found.last_id),
            published: u64::try_from(found.published)?,
            skipped: u64::try_from(found.skipped)?,
        })
    }

    /// Writes down how far it has come; false when it was cancelled or taken over meanwhile.
    pub(crate) async fn progress(&mut self, job: &Job) -> Result<bool, Error> {
        self.write(job, &format!("expires_at = {}", expiry())).await
    }

    /// The end; false when it was cancelled or taken over meanwhile.
    pub(crate) async fn finish(&mut self, job: &Job) -> Result<bool, Error> {
        self.write(job, "expires_at = '-infinity', state = 'done'")
            .await
    }

    /// Lets go of it, so that it can be resumed at once.
    pub(crate) async fn release(&mut self, job: &Job) -> Result<bool, Error> {
        self.write(job, "expires_at = '-infinity'").await
    }

    async fn write(&mut self, job: &Job, more: &str) -> Result<bool, Error> {
        let written = self
            .execute(format!(
                "update outbox.replays set last_id = {}, published = {}, skipped = {}, updated_at = clock_timestamp(), \
                        {more} \
                  where id = {} and state = 'open' and holder = {}",
                job.last_id,
                job.published,
                job.skipped,
                job.id,
                ask::literal(&self.holder)
            ))
            .await
            .context("write down how far the replay has come")?;
        Ok(written == 1)
    }

    async fn execute(&mut self, statement: String) -> Result<u64, Error> {
        let done = self
            .connection
            .execute(sqlx::raw_sql(AssertSqlSafe(statement)))
            .await?;
        Ok(done.rows_affected())
    }
}

/// Lists the replays, newest first.
///
/// # Errors
/// When the database refuses, in particular when it is not migrated.
pub(crate) async fn list(connection: &mut PgConnection) -> Result<Vec<Listed>, Error> {
    ask::all(
        connection,
        &format!("select {COLUMNS} from outbox.replays order by id desc limit 100"),
    )
    .await
    .context("list the replays")
}

/// Ends a replay for good; whoever is at it stops within a page. False when it had ended already.
///
/// # Errors
/// When the database refuses.
pub(crate) async fn cancel(connection: &mut PgConnection, id: i64) -> Result<bool, Error> {
    let statement = format!(
        "update outbox.replays set state = 'cancelled', updated_at = clock_timestamp() \
          where id = {id} and state = 'open'"
    );
    let done = connection
        .execute(sqlx::raw_sql(AssertSqlSafe(statement)))
        .await
        .context("cancel the replay")?;
    Ok(done.rows_affected() == 1)
}

fn expiry() -> String {
    format!(
        "clock_timestamp() + interval '{} seconds'",
        EXPIRY.as_secs()
    )
}
