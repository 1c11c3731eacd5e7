//! The whole program between a real PostgreSQL and a real Kafka: the binary that users start, stopped, killed and cut off
//! as it happens to them, judged by what a consumer reads.
//!
//! Every test has a database, topics and processes of its own. They wait for facts, never for time alone.
#![allow(
    clippy::unwrap_used,
    clippy::let_underscore_must_use,
    clippy::unchecked_time_subtraction,
    reason = "a test ends where something is not as it has to be"
)]
#![allow(clippy::too_many_lines, reason = "a test is a story")]
#![allow(clippy::doc_markdown, reason = "names of products are no code")]

mod acl;
mod broker;
mod clock;
mod crash;
mod database;
mod dropped;
mod exactly_once;
mod fenced;
mod figures;
mod indicators;
mod kafka;
mod load;
mod pipelines;
mod process;
mod proxy;
mod records;
mod redrive;
mod rejected;
mod reload;
mod replay;
mod replicas;
mod retention;
mod rotated;
mod services;
mod shards;
mod start;
mod stops;
mod verify;

use std::time::Duration;

use sqlx::PgPool;
use tokio::time::{Instant, sleep};

use self::kafka::Kafka;
use self::load::{Load, Seen};
use self::process::{Process, Setup};
use crate::harness::postgres::TestDatabase;

/// Long enough for anything on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// A relay between a database and topics of its own.
struct Line {
    database: TestDatabase,
    kafka: Kafka,
    setup: Setup,
}

impl Line {
    /// None where a service is missing, which is then said.
    async fn create(test: &str) -> Option<Self> {
        let brokers = crate::fresh::needed(test, "KAFKA_BROKERS")?;
        let database = TestDatabase::create().await?;
        let kafka = Kafka::new(brokers);
        let mut setup = Setup::new(&database.url);
        setup.kafka(&kafka);
        Some(Self {
            database,
            kafka,
            setup,
        })
    }

    /// The same, with the tables and the topics of a [`Load`].
    async fn with_load(test: &str) -> Option<(Self, Load)> {
        let line = Self::create(test).await?;
        let load = Load::prepare(&line.database.options, &line.kafka).await;
        Some((line, load))
    }

    async fn ready(&self) -> Process {
        let relay = self.setup.start();
        relay.ready().await;
        relay
    }
}

/// Looks again and again until there is an answer.
///
/// # Panics
/// When there is none in time.
async fn eventually<T>(
    what: &str,
    within: Duration,
    mut look: impl AsyncFnMut() -> Option<T>,
) -> T {
    let deadline = Instant::now() + within;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {within:?}: {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

/// Runs a statement that was put together here.
async fn run(pool: &PgPool, statement: impl Into<String>) {
    let statement = statement.into();
    sqlx::raw_sql(sqlx::AssertSqlSafe(statement.clone()))
        .execute(pool)
        .await
        .unwrap_or_else(|error| panic!("{statement}: {error}"));
}

/// One number out of the database.
async fn number(pool: &PgPool, query: &'static str) -> i64 {
    sqlx::query_scalar(query).fetch_one(pool).await.unwrap()
}

/// Waits until everything that is committed is behind the position that was written down: delivered, parked or left out.
/// An id by itself does not say so, as that of a transaction which was in progress may be behind it already. For one pipeline
/// with one shard.
async fn settled(pool: &PgPool) {
    const AHEAD: &str = "select count(*) from outbox.events e where not exists (
        select from outbox.cursors c
         where pg_visible_in_snapshot(e.xid, c.prev)
            or pg_visible_in_snapshot(e.xid, c.cur) and e.id <= c.last_id)";
    eventually("everything settled", PATIENCE, async || {
        (number(pool, AHEAD).await == 0).then_some(())
    })
    .await;
}

/// Waits until a consumer has read everything that the load committed, and judges it.
async fn complete(load: &Load, kafka: &Kafka) -> Seen {
    let committed = load.committed().await;
    let mut reader = kafka.reader(&load.topics());
    let mut seen = Seen::default();
    eventually("everything that was committed", PATIENCE, async || {
        for record in reader.read_to_end().await {
            seen.add(&record);
        }
        (seen.missing(&committed) == 0).then_some(())
    })
    .await;
    seen.judge(&committed);
    seen
}
