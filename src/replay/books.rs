//! The table of replays: what was asked for, by whom, and how far it has come.
//!
//! `outbox.replays` in PostgreSQL and `outbox_replays` in a SQLite file, with the same columns; times in the latter are in
//! microseconds.

use std::time::Duration;

use anyhow::{Context, Error, bail, ensure};
use serde::{Deserialize, Serialize};
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Executor, Row};

use crate::database::Database;
use crate::event::EventId;
use crate::source::Selection;
use crate::source::postgres::{NEWEST_ID, ask};

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
    /// Who asked for it: the role of the database, or with a file the user and host.
    pub created_by: String,
    /// How long ago.
    pub age_seconds: f64,
}

/// As PostgreSQL lists them.
const LIST_POSTGRES: &str = "
select id, pipeline, selection, topic, rate, state,
       case when expires_at > clock_timestamp() then holder end as holder,
       from_id, until_id, last_id, published, skipped, created_by,
       extract(epoch from clock_timestamp() - created_at)::float8 as age_seconds
  from outbox.replays";

/// As documents, which is how SQLite lists them.
const LIST_SQLITE: &str = "
select json_object('id', id, 'pipeline', pipeline, 'selection', json(selection), 'topic', topic, 'rate', rate,
                   'state', state, 'holder', iif(expires_at > unixepoch('subsec') * 1000000, holder, null),
                   'from_id', from_id, 'until_id', until_id, 'last_id', last_id, 'published', published,
                   'skipped', skipped, 'created_by', created_by,
                   'age_seconds', unixepoch('subsec') - created_at / 1000000.0)
  from outbox_replays";

/// The table, as one process works with it.
pub(crate) struct Books {
    database: Database,
    /// This process, unlike any other.
    holder: String,
    /// The user, for a database that knows none.
    who: String,
}

impl Books {
    pub(crate) fn new(database: Database, holder: String, who: String) -> Self {
        Self {
            database,
            holder,
            who,
        }
    }

    /// The ids that a replay for this pipeline looks at: what is retained, up to where the pipeline has published. What is
    /// newer is on its way anyway.
    pub(crate) async fn range(&mut self, pipeline: &str) -> Result<(EventId, EventId), Error> {
        #[derive(Deserialize)]
        struct Range {
            from: i64,
            until: i64,
        }
        let pipeline = ask::literal(pipeline);
        let range = match &mut self.database {
            Database::Postgres(connection) => {
                let select = format!(
                    "select coalesce((select min(id) - 1 from outbox.events), 0) as from, \
                            least({NEWEST_ID}, coalesce( \
                                (select min(last_id) from outbox.cursors where pipeline = {pipeline}), 0)) as until"
                );
                ask::one(connection, &select).await
            }
            Database::Sqlite(connection) => {
                let select = format!(
                    "select coalesce((select min(id) - 1 from outbox_events), 0), \
                            coalesce((select min(last_id) from outbox_cursors where pipeline = {pipeline}), 0)"
                );
                let row = sqlx::query_as(AssertSqlSafe(select)).fetch_one(connection);
                let range = row.await.map(|(from, until)| Range { from, until });
                range.map_err(Error::from)
            }
        };
        let Range { from, until } = range.context("ask what is retained")?;
        Ok((EventId(from.min(until)), EventId(until)))
    }

    /// Notes a new replay, held by this process, and sets its number; and notes it among the acts.
    pub(crate) async fn create(
        &mut self,
        job: &mut Job,
        reason: Option<&str>,
    ) -> Result<(), Error> {
        let selection = serde_json::to_string(&job.selection).context("write the selection")?;
        // PostgreSQL knows who asks.
        let (column, who) = match &self.database {
            Database::Postgres(_) => ("", String::new()),
            Database::Sqlite(_) => (", created_by", format!(", {}", ask::literal(&self.who))),
        };
        let statement = format!(
            "insert into {} (pipeline, selection, topic, rate, from_id, until_id, last_id, holder, expires_at{column}) \
             values ({}, {}, {}, {}, {}, {}, {}, {}, {}{who}) returning id",
            self.table(),
            ask::literal(&job.pipeline),
            ask::literal(&selection),
            job.topic.as_deref().map_or("null".to_owned(), ask::literal),
            job.rate,
            job.from,
            job.until,
            job.last_id,
            ask::literal(&self.holder),
            self.expiry()
        );
        job.id = match &mut self.database {
            Database::Postgres(connection) => {
                let mut transaction = begin(connection).await?;
                let row = transaction.fetch_one(sqlx::raw_sql(AssertSqlSafe(statement)));
                let id = row.await.and_then(|row| row.try_get_unchecked(0));
                let id = id.context("note the replay")?;
                transaction.commit().await.context("note the replay")?;
                id
            }
            Database::Sqlite(connection) => {
                let id = sqlx::query_scalar(AssertSqlSafe(statement));
                id.fetch_one(connection).await.context("note the replay")?
            }
        };
        self.note_act(job, reason).await
    }

    async fn note_act(&mut self, job: &Job, reason: Option<&str>) -> Result<(), Error> {
        let topic = job
            .topic
            .as_ref()
            .map_or(String::new(), |topic| format!(" to topic {topic}"));
        let selector = format!("replay {}: {}{topic}", job.id, job.selection);
        match &mut self.database {
            Database::Postgres(connection) => {
                let mut transaction = begin(connection).await?;
                let insert = "insert into outbox.acts (who, action, pipeline, selector, events, reason) \
                              values ($1, 'replay', $2, $3, 0, $4)";
                sqlx::query(insert)
                    .persistent(false)
                    .bind(&self.who)
                    .bind(&job.pipeline)
                    .bind(selector)
                    .bind(reason)
                    .execute(&mut *transaction)
                    .await
                    .context("note the act")?;
                transaction.commit().await
            }
            Database::Sqlite(connection) => {
                let insert = "insert into outbox_acts (who, action, pipeline, selector, events, reason) \
                              values (?1, 'replay', ?2, ?3, 0, ?4)";
                sqlx::query(insert)
                    .bind(&self.who)
                    .bind(&job.pipeline)
                    .bind(selector)
                    .bind(reason)
                    .execute(connection)
                    .await
                    .map(drop)
            }
        }
        .context("note the act")
    }

    /// Takes over a replay that nobody is at.
    pub(crate) async fn resume(&mut self, id: i64, rate: Option<u32>) -> Result<Job, Error> {
        let rate = rate.map_or(String::new(), |rate| format!("rate = {rate}, "));
        let statement = format!(
            "update {} set {rate}holder = {holder}, expires_at = {} \
              where id = {id} and state = 'open' and (expires_at <= {} or holder = {holder})",
            self.table(),
            self.expiry(),
            self.now(),
            holder = ask::literal(&self.holder),
        );
        let taken = self.execute(statement).await;
        let taken = taken.context("take the replay over")?;
        let known = self.listed(&format!("where id = {id}")).await;
        let known = known.context("read the replay")?;
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
        let expiry = self.expiry();
        self.write(job, &format!("expires_at = {expiry}")).await
    }

    /// The end; false when it was cancelled or taken over meanwhile.
    pub(crate) async fn finish(&mut self, job: &Job) -> Result<bool, Error> {
        let over = self.long_ago();
        self.write(job, &format!("expires_at = {over}, state = 'done'"))
            .await
    }

    /// Lets go of it, so that it can be resumed at once.
    pub(crate) async fn release(&mut self, job: &Job) -> Result<bool, Error> {
        let over = self.long_ago();
        self.write(job, &format!("expires_at = {over}")).await
    }

    async fn write(&mut self, job: &Job, more: &str) -> Result<bool, Error> {
        let statement = format!(
            "update {} set last_id = {}, published = {}, skipped = {}, updated_at = {}, {more} \
              where id = {} and state = 'open' and holder = {}",
            self.table(),
            job.last_id,
            job.published,
            job.skipped,
            self.now(),
            job.id,
            ask::literal(&self.holder)
        );
        let written = self.execute(statement).await;
        Ok(written.context("write down how far the replay has come")? == 1)
    }

    /// Lists the replays, newest first.
    ///
    /// # Errors
    /// When the database refuses, in particular when it is not migrated.
    pub(crate) async fn list(&mut self) -> Result<Vec<Listed>, Error> {
        let listed = self.listed("order by id desc limit 100").await;
        listed.context("list the replays")
    }

    /// Ends a replay for good; whoever is at it stops within a page. False when it had ended already.
    ///
    /// # Errors
    /// When the database refuses.
    pub(crate) async fn cancel(&mut self, id: i64) -> Result<bool, Error> {
        let statement = format!(
            "update {} set state = 'cancelled', updated_at = {} where id = {id} and state = 'open'",
            self.table(),
            self.now()
        );
        let done = self.execute(statement).await;
        Ok(done.context("cancel the replay")? == 1)
    }

    async fn listed(&mut self, which: &str) -> Result<Vec<Listed>, Error> {
        match &mut self.database {
            Database::Postgres(connection) => {
                ask::all(connection, &format!("{LIST_POSTGRES} {which}")).await
            }
            Database::Sqlite(connection) => {
                let select = AssertSqlSafe(format!("{LIST_SQLITE} {which}"));
                let rows: Vec<String> = sqlx::query_scalar(select).fetch_all(connection).await?;
                rows.iter()
                    .map(|row| serde_json::from_str(row).context("understand the answer"))
                    .collect()
            }
        }
    }

    async fn execute(&mut self, statement: String) -> Result<u64, Error> {
        let statement = sqlx::raw_sql(AssertSqlSafe(statement));
        Ok(match &mut self.database {
            Database::Postgres(connection) => {
                let mut transaction = begin(connection).await?;
                let done = transaction.execute(statement).await?;
                transaction.commit().await?;
                done.rows_affected()
            }
            Database::Sqlite(connection) => connection.execute(statement).await?.rows_affected(),
        })
    }

    fn table(&self) -> &'static str {
        match self.database {
            Database::Postgres(_) => "outbox.replays",
            Database::Sqlite(_) => "outbox_replays",
        }
    }

    fn now(&self) -> &'static str {
        match self.database {
            Database::Postgres(_) => "clock_timestamp()",
            Database::Sqlite(_) => "cast(round(unixepoch('subsec') * 1000000) as integer)",
        }
    }

    fn expiry(&self) -> String {
        let now = self.now();
        match self.database {
            Database::Postgres(_) => format!("{now} + interval '{} seconds'", EXPIRY.as_secs()),
            Database::Sqlite(_) => format!("{now} + {}", EXPIRY.as_micros()),
        }
    }

    fn long_ago(&self) -> &'static str {
        match self.database {
            Database::Postgres(_) => "'-infinity'",
            Database::Sqlite(_) => "0",
        }
    }
}

/// As long as a question of the commands may take.
const STATEMENT_MAX: Duration = Duration::from_secs(5);

async fn begin(
    connection: &mut PgConnection,
) -> Result<sqlx::Transaction<'_, sqlx::Postgres>, Error> {
    ask::begin(connection, STATEMENT_MAX).await
}
