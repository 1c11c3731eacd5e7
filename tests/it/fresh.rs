//! Databases with the outbox in them, made for one test and dropped after it.
//!
//! Roles belong to the whole server, so those of a test carry the name of its database and are dropped with it.

use std::panic::{AssertUnwindSafe, resume_unwind};

use futures_util::FutureExt;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, Connection};

use crate::harness::hostile;

/// What `migrate` applies.
pub(crate) const MIGRATIONS: [&str; 1] =
    [include_str!("../../migrations/postgres/0001_outbox.sql")];

const PASSWORD: &str = "for-tests-only";

/// A variable that a test needs. Without it the test is skipped, or fails when everything is required.
pub(crate) fn needed(test: &str, variable: &str) -> Option<String> {
    let fast = std::env::var("RELAY_TEST_FAST").is_ok_and(|fast| fast == "1");
    let value = std::env::var(variable).ok().filter(|_| !fast);
    if value.is_none() {
        skip(test, &format!("{variable} is not set"));
    }
    value
}

/// Says that a test is skipped, and why.
pub(crate) fn skip(test: &str, reason: &str) {
    let required = std::env::var("RELAY_TEST_REQUIRE").is_ok_and(|require| require == "1");
    assert!(!required, "{test} is required: {reason}");
    println!("SKIPPED {test}: {reason}");
}

/// One database of one test.
pub(crate) struct Database {
    /// Its name, and the beginning of the names of its roles.
    pub(crate) name: String,
    options: PgConnectOptions,
}

/// Runs a test on a migrated database of its own.
pub(crate) async fn database(test: &str, work: impl AsyncFnOnce(&Database)) {
    empty_database(test, async |database| {
        let mut owner = database.superuser().await;
        for migration in MIGRATIONS {
            run(&mut owner, migration).await;
        }
        owner.close().await.expect("close");
        work(database).await;
    })
    .await;
}

/// Runs a test on an empty database of its own.
pub(crate) async fn empty_database(test: &str, work: impl AsyncFnOnce(&Database)) {
    let Some(url) = needed(test, "DATABASE_URL") else {
        return;
    };
    let server: PgConnectOptions = url.parse().expect("DATABASE_URL");
    let mut admin = PgConnection::connect_with(&server).await.expect("connect");
    let name = format!("test_{}", uuid::Uuid::new_v4().simple());
    run(&mut admin, &format!("create database {name}")).await;
    let database = Database {
        options: server.database(&name),
        name,
    };
    hostile::spoil(&mut database.superuser().await).await;
    let outcome = AssertUnwindSafe(work(&database)).catch_unwind().await;
    let name = &database.name;
    run(&mut admin, &format!("drop database {name} with (force)")).await;
    let roles: Vec<String> = sqlx::query_scalar(
        "select rolname::text from pg_roles where starts_with(rolname::text, $1)",
    )
    .bind(name)
    .fetch_all(&mut admin)
    .await
    .expect("roles of the test");
    for role in roles {
        run(&mut admin, &format!("drop role {role}")).await;
    }
    if let Err(panic) = outcome {
        resume_unwind(panic);
    }
}

impl Database {
    /// A connection that may do everything.
    pub(crate) async fn superuser(&self) -> PgConnection {
        PgConnection::connect_with(&hostile::of_tests(self.options()))
            .await
            .expect("connect")
    }

    /// How to connect as a superuser.
    pub(crate) fn options(&self) -> PgConnectOptions {
        self.options.clone()
    }

    /// Makes a role that may log in, with further words of `create role`; returns its name.
    pub(crate) async fn login(&self, label: &str, attributes: &str) -> String {
        let role = format!("{}_{label}", self.name);
        let mut admin = self.superuser().await;
        let create = format!("create role {role} login password '{PASSWORD}' {attributes}");
        run(&mut admin, &create).await;
        role
    }

    /// A connection as a role made by `login`.
    pub(crate) async fn connect(&self, role: &str) -> PgConnection {
        let options = hostile::of_tests(self.options().username(role).password(PASSWORD));
        PgConnection::connect_with(&options).await.expect("connect")
    }

    /// The URL for a role made by `login`, as every driver understands it.
    pub(crate) fn url(&self, role: &str) -> String {
        let (host, port) = (self.options.get_host(), self.options.get_port());
        format!("postgres://{role}:{PASSWORD}@{host}:{port}/{}", self.name)
    }

    /// A connection as a new member of `outbox_writer`.
    pub(crate) async fn writer(&self, label: &str) -> PgConnection {
        let role = self.login(label, "in role outbox_writer").await;
        self.connect(&role).await
    }

    /// A connection as a new member of `outbox_relay`.
    pub(crate) async fn relay(&self, label: &str) -> PgConnection {
        let role = self.login(label, "in role outbox_relay").await;
        self.connect(&role).await
    }
}

/// Runs statements that must succeed.
pub(crate) async fn run(connection: &mut PgConnection, sql: &str) {
    if let Err(error) = attempt(connection, sql).await {
        panic!("{sql}: {error}");
    }
}

/// Runs statements.
pub(crate) async fn attempt(connection: &mut PgConnection, sql: &str) -> Result<(), sqlx::Error> {
    let sql = AssertSqlSafe(sql.to_owned());
    sqlx::raw_sql(sql).execute(connection).await.map(|_| ())
}

/// The only value of the only row, as text.
pub(crate) async fn value(connection: &mut PgConnection, sql: &str) -> String {
    let mut values = values(connection, sql).await;
    assert_eq!(values.len(), 1, "{sql}: {values:?}");
    values.remove(0)
}

/// The first column of every row: it must be text.
pub(crate) async fn values(connection: &mut PgConnection, sql: &str) -> Vec<String> {
    let fetched: Result<Vec<Option<String>>, _> = sqlx::query_scalar(AssertSqlSafe(sql.to_owned()))
        .fetch_all(connection)
        .await;
    let nulls_shown = |value: Option<String>| value.unwrap_or_else(|| "null".to_owned());
    match fetched {
        Ok(rows) => rows.into_iter().map(nulls_shown).collect(),
        Err(error) => panic!("{sql}: {error}"),
    }
}

/// Runs statements that must be refused; returns SQLSTATE and message.
pub(crate) async fn refused(connection: &mut PgConnection, sql: &str) -> (String, String) {
    match attempt(connection, sql).await {
        Ok(()) => panic!("{sql}: was not refused"),
        Err(sqlx::Error::Database(error)) => (
            error.code().expect("PostgreSQL has a code").into_owned(),
            error.message().to_owned(),
        ),
        Err(error) => panic!("{sql}: {error}"),
    }
}

/// Each statement is refused, with this SQLSTATE and a message that contains the text.
pub(crate) async fn all_refused(connection: &mut PgConnection, cases: &[(&str, &str, &str)]) {
    for (sql, state, text) in cases {
        let (code, message) = refused(connection, sql).await;
        assert_eq!(code, *state, "{sql}: {message}");
        assert!(message.contains(text), "{sql}: {message}");
    }
}

/// Emits one event of an order.
pub(crate) async fn emit(connection: &mut PgConnection, id: &str) {
    run(
        connection,
        &format!("select outbox.emit('order', '{id}', 'order.placed', '{{}}')"),
    )
    .await;
}
