//! A PostgreSQL database of its own for each test, on the server of `DATABASE_URL`.

use std::io::Write;
use std::str::FromStr;

use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor};
use uuid::Uuid;

use super::hostile;

/// The server that tests may create databases on, or none, which is then said aloud.
///
/// # Panics
/// When there is none and `RELAY_TEST_REQUIRE=1`.
pub fn server() -> Option<PgConnectOptions> {
    let reason = match std::env::var("DATABASE_URL") {
        Ok(_) if set("RELAY_TEST_FAST") => "RELAY_TEST_FAST is set",
        Ok(url) => return Some(PgConnectOptions::from_str(&url).expect("DATABASE_URL is a URL")),
        Err(_) => "DATABASE_URL is not set",
    };
    assert!(!set("RELAY_TEST_REQUIRE"), "{reason}");
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("a test");
    // Not println: the test runner would swallow it.
    let _ = writeln!(std::io::stderr(), "SKIPPED {name}: {reason}");
    None
}

fn set(name: &str) -> bool {
    std::env::var(name).is_ok_and(|value| !value.is_empty() && value != "0")
}

/// A database with the outbox in it, dropped with the value, whatever became of the test.
pub struct TestDatabase {
    pub url: String,
    pub options: PgConnectOptions,
    pub pool: PgPool,
    server: PgConnectOptions,
    name: String,
}

impl TestDatabase {
    /// A migrated database, or none without a server: `let Some(database) = … else { return };`
    pub async fn create() -> Option<Self> {
        let database = Self::create_empty().await?;
        outbox_relay::migrate::postgres(database.options.clone())
            .await
            .unwrap();
        Some(database)
    }

    /// The same without the outbox.
    pub async fn create_empty() -> Option<Self> {
        let server = server()?.disable_statement_logging();
        let name = format!("relay_test_{}", Uuid::new_v4().simple());
        let mut connection = PgConnection::connect_with(&server).await.unwrap();
        // Nobody connects to template0, so many tests can copy it at once.
        execute(
            &mut connection,
            format!("create database {name} template template0"),
        )
        .await;
        connection.close().await.unwrap();
        let options = server.clone().database(&name);
        let database = Self {
            url: options.to_url_lossy().to_string(),
            pool: PgPoolOptions::new()
                .max_connections(10)
                .connect_lazy_with(hostile::of_tests(options.clone())),
            options,
            server,
            name,
        };
        hostile::spoil(&mut database.connect().await).await;
        Some(database)
    }

    /// A connection of its own.
    pub async fn connect(&self) -> PgConnection {
        let options = hostile::of_tests(self.options.clone());
        PgConnection::connect_with(&options).await.unwrap()
    }

    async fn remove(server: PgConnectOptions, name: String) {
        let mut connection = PgConnection::connect_with(&server).await.unwrap();
        let prepared: Vec<String> =
            sqlx::query_scalar("select gid from pg_prepared_xacts where database = $1")
                .bind(&name)
                .fetch_all(&mut connection)
                .await
                .unwrap();
        if !prepared.is_empty() {
            let mut inside = PgConnection::connect_with(&server.database(&name))
                .await
                .unwrap();
            for gid in prepared {
                execute(&mut inside, format!("rollback prepared '{gid}'")).await;
            }
            inside.close().await.unwrap();
        }
        execute(
            &mut connection,
            format!("drop database {name} with (force)"),
        )
        .await;
        connection.close().await.unwrap();
    }
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        let (server, name) = (self.server.clone(), self.name.clone());
        // A thread of its own: the test's runtime may be on its way down.
        let removed = std::thread::spawn(move || {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap()
                .block_on(Self::remove(server, name));
        })
        .join();
        if removed.is_err() {
            let _ = writeln!(std::io::stderr(), "{}: could not be dropped", self.name);
        }
    }
}

/// Runs a statement that was put together here.
pub async fn execute(connection: &mut PgConnection, statement: String) {
    connection
        .execute(sqlx::raw_sql(AssertSqlSafe(statement)))
        .await
        .unwrap();
}
