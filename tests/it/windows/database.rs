//! A database of its own for each test: made with the migrations, dropped at the end, whatever the end is.

use std::panic::{AssertUnwindSafe, resume_unwind};
use std::str::FromStr;
use std::time::Duration;

use futures_util::FutureExt;
use outbox_relay::event::{PipelineName, Shard, Start};
use outbox_relay::ledger::postgres::PostgresLedger;
use outbox_relay::ledger::{self};
use outbox_relay::source::postgres::{CaptureMode, PostgresSource, Settings};
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor, Row};

use crate::harness::hostile;

const MIGRATION: &str = include_str!("../../../migrations/postgres/0001_outbox.sql");

/// One database of the server at `DATABASE_URL`.
pub(crate) struct Database {
    pub(crate) name: String,
    pub(crate) options: PgConnectOptions,
}

/// Runs `work` with a database of its own; without a server it says so and returns, unless services are required.
pub(crate) async fn with_database(test: &str, work: impl AsyncFnOnce(&Database)) {
    if let Some(server) = from_environment("DATABASE_URL", test) {
        with_database_of(server, work).await;
    }
}

/// The same on a given server, which may have crashed meanwhile.
pub(crate) async fn with_database_of(server: PgConnectOptions, work: impl AsyncFnOnce(&Database)) {
    with_database_in(server, "UTF8", work).await;
}

/// The same with the texts of the database in this encoding.
pub(crate) async fn with_database_in(
    server: PgConnectOptions,
    encoding: &str,
    work: impl AsyncFnOnce(&Database),
) {
    let database = Database {
        name: format!("windows_{}", uuid::Uuid::new_v4().simple()),
        options: server.clone(),
    };
    let mut admin = connect(&server).await;
    let create = format!(
        "create database {} template template0 encoding '{encoding}' lc_collate 'C' lc_ctype 'C'",
        database.name
    );
    sql(&mut admin, &create).await;
    let database = Database {
        options: server.clone().database(&database.name),
        ..database
    };
    let mut owner = database.connect().await;
    hostile::spoil(&mut owner).await;
    sql(&mut owner, MIGRATION).await;
    drop(owner);
    let end = AssertUnwindSafe(work(&database)).catch_unwind().await;
    // A prepared transaction outlives its session and would keep the database.
    let mut connection = database.connect().await;
    let left = connection
        .fetch_all("select gid from pg_prepared_xacts where database = current_database()")
        .await
        .expect("list what is prepared");
    for row in left {
        let gid: String = row.get(0);
        sql(&mut connection, &format!("rollback prepared '{gid}'")).await;
    }
    drop(connection);
    let mut admin = connect(&server).await;
    for name in [database.name.clone(), format!("{}_other", database.name)] {
        let drop_it = format!("drop database if exists {name} with (force)");
        sql(&mut admin, &drop_it).await;
    }
    if let Err(panic) = end {
        resume_unwind(panic);
    }
}

/// Where a service listens. None, and a line that says so, when nobody named one.
pub(crate) fn from_environment(variable: &str, test: &str) -> Option<PgConnectOptions> {
    if let Ok(url) = std::env::var(variable) {
        let options = PgConnectOptions::from_str(&url).expect("a PostgreSQL URL");
        return Some(options.disable_statement_logging());
    }
    assert!(
        std::env::var("RELAY_TEST_REQUIRE").as_deref() != Ok("1"),
        "{test}: {variable} is not set, and RELAY_TEST_REQUIRE=1 forbids to skip"
    );
    println!("SKIPPED {test}: {variable} is not set");
    None
}

/// A number from the environment, for the length and the seed of a run.
pub(crate) fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().expect(variable))
}

async fn connect(options: &PgConnectOptions) -> PgConnection {
    PgConnection::connect_with(options).await.expect("connect")
}

/// Runs statements by the simple protocol.
pub(crate) async fn sql(connection: &mut PgConnection, text: &str) {
    if let Err(error) = connection
        .execute(sqlx::raw_sql(AssertSqlSafe(text.to_owned())))
        .await
    {
        panic!("{error}\n{}", &text[..text.len().min(2_000)]);
    }
}

/// The first column of the first row, as text.
pub(crate) async fn ask(connection: &mut PgConnection, text: &str) -> String {
    let rows = connection
        .fetch_all(sqlx::raw_sql(AssertSqlSafe(text.to_owned())))
        .await;
    match rows {
        Ok(rows) => rows
            .first()
            .expect("a row")
            .try_get_unchecked(0)
            .expect("a text"),
        Err(error) => panic!("{error}\n{text}"),
    }
}

impl Database {
    pub(crate) async fn connect(&self) -> PgConnection {
        connect(&hostile::of_tests(self.options.clone())).await
    }

    /// The same database through PgBouncer.
    pub(crate) fn through_pgbouncer(&self, test: &str) -> Option<Database> {
        Some(Database {
            name: self.name.clone(),
            options: from_environment("PGBOUNCER_URL", test)?.database(&self.name),
        })
    }

    pub(crate) fn source(&self) -> PostgresSource {
        PostgresSource::new(Settings {
            connector: self.options.clone().into(),
            direct_connector: self.options.clone().into(),
            mode: CaptureMode::Poll,
            poll_interval: Duration::from_millis(5),
        })
    }

    /// The reader and the books of one shard.
    pub(crate) fn shard(&self, shard: Shard, holder: &str) -> (PostgresSource, PostgresLedger) {
        let pipeline = PipelineName::from_str("orders").expect("a name");
        let settings = ledger::Settings {
            pipeline: pipeline.clone(),
            shard,
            holder: holder.to_owned(),
            lease_ttl: Duration::from_secs(60),
            start: Start::Earliest,
        };
        (
            self.source().of_shard(pipeline, shard),
            PostgresLedger::new(self.options.clone(), settings),
        )
    }

    pub(crate) fn ledger(&self, start: Start) -> PostgresLedger {
        let settings = ledger::Settings {
            pipeline: PipelineName::from_str("orders").expect("a name"),
            shard: Shard::whole(),
            holder: "the only one".to_owned(),
            lease_ttl: Duration::from_secs(60),
            start,
        };
        PostgresLedger::new(self.options.clone(), settings)
    }
}
