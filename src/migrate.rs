//! The tables of the outbox: brings a database to the version that this program needs.
//!
//! The migrations are part of the program. Applying them is idempotent, all or nothing, and may be done by many at once.
//! The books of what was applied lie beside the tables, under a name that does not meet the service's own migrations.

use std::collections::BTreeSet;
use std::fmt::{self, Write};
use std::time::Duration;

use anyhow::{Context, ensure};
use sqlx::migrate::Migrator;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions, Connection, Executor};
use tokio::time::sleep;

use crate::source::{postgres, sqlite};

/// Where the applied versions are written down. A service that uses sqlx has its own `_sqlx_migrations`.
const POSTGRES_TABLE: &str = "outbox.migrations";
const SQLITE_TABLE: &str = "outbox_migrations";

/// The database that SQL is meant for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// PostgreSQL 14 to 18.
    Postgres,
    /// SQLite 3.38 or newer.
    Sqlite,
}

/// One migration.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Its number; they are applied in ascending order.
    pub number: i64,
    /// What it is about.
    pub description: String,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04} {}", self.number, self.description)
    }
}

/// What a run found and did, each in ascending order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Applied by this run.
    pub applied: Vec<Version>,
    /// Those that were there before.
    pub present: Vec<Version>,
}

/// Brings a PostgreSQL database up to date, in one transaction that also works through a transaction-mode pooler.
///
/// # Errors
/// When the server can't be reached, the rights do not suffice, or what was applied before is not what this program
/// knows (it is older than the database, or the books were changed). Nothing was changed then.
pub async fn postgres(options: PgConnectOptions) -> anyhow::Result<Report> {
    // Without named statements, of which a pooler would hand the next transaction somebody else's.
    let options = options
        .statement_cache_capacity(0)
        .disable_statement_logging();
    let mut connection = postgres::connect(&options).await?;
    let mut transaction = connection.begin().await.context("begin to migrate")?;
    // One at a time. Not the lock that sqlx takes: that one belongs to the session, which a pooler gives to others.
    transaction
        .execute("select pg_advisory_xact_lock(1868721016, 3)")
        .await
        .context("wait for other migrations")?;
    let pending = pending_in_postgres(&mut transaction).await?;
    migrator(Kind::Postgres)
        .run(&mut *transaction)
        .await
        .context("migrate the database")?;
    // For `pending_postgres`, which everyone may ask who reads events.
    transaction
        .execute("grant select on outbox.migrations to outbox_relay")
        .await
        .context("grant the right to see what was applied")?;
    transaction
        .commit()
        .await
        .context("commit the migrations")?;
    connection.close().await.context("close the connection")?;
    Ok(report(Kind::Postgres, pending))
}

/// Brings a SQLite file up to date and switches it to the write-ahead log, with which the relay's reading does not block
/// the service's writing. Creates the file if the options say so.
///
/// # Errors
/// When the file can't be opened or stays locked, or what was applied before is not what this program knows.
pub async fn sqlite(options: SqliteConnectOptions) -> anyhow::Result<Report> {
    let mut connection = sqlite::connect(&options.disable_statement_logging()).await?;
    let encoding: String = sqlx::query_scalar("pragma encoding")
        .fetch_one(&mut connection)
        .await
        .context("read the encoding")?;
    ensure!(
        encoding == "UTF-8",
        "the texts of the file are in {encoding}; only UTF-8 is supported"
    );
    use_write_ahead_log(&mut connection).await?;
    // The write lock from the start: sqlx takes none with SQLite.
    let mut transaction = connection
        .begin_with("begin immediate")
        .await
        .context("begin to migrate")?;
    let pending = pending_in_sqlite(&mut transaction).await?;
    migrator(Kind::Sqlite)
        .run(&mut *transaction)
        .await
        .context("migrate the file")?;
    transaction
        .commit()
        .await
        .context("commit the migrations")?;
    connection.close().await.context("close the file")?;
    Ok(report(Kind::Sqlite, pending))
}

/// The migrations that a PostgreSQL database lacks. Changes nothing, and needs no more rights than the relay has.
///
/// # Errors
/// When the server can't be reached or refuses to show what was applied.
pub async fn pending_postgres(options: PgConnectOptions) -> anyhow::Result<Vec<Version>> {
    let options = options
        .statement_cache_capacity(0)
        .disable_statement_logging();
    let mut connection = postgres::connect(&options).await?;
    let mut transaction = connection
        .begin()
        .await
        .context("begin to look at the migrations")?;
    let pending = pending_in_postgres(&mut transaction).await?;
    transaction.rollback().await.context("end the look")?;
    connection.close().await.context("close the connection")?;
    Ok(pending)
}

/// The migrations that a SQLite file lacks. Changes nothing.
///
/// # Errors
/// When the file is not there or can't be read.
pub async fn pending_sqlite(options: SqliteConnectOptions) -> anyhow::Result<Vec<Version>> {
    let options = options.create_if_missing(false).disable_statement_logging();
    let mut connection = sqlite::connect(&options).await?;
    let pending = pending_in_sqlite(&mut connection).await?;
    connection.close().await.context("close the file")?;
    Ok(pending)
}

/// All migrations as one script for `psql` or `sqlite3`, for those who let no program change their tables. It writes
/// down what it applied, so that [`postgres`] and [`sqlite`] find nothing left to do. For a database without any.
#[must_use]
pub fn print(kind: Kind) -> String {
    let mut script = String::new();
    // Outside of the transaction, where the journal can't be changed.
    if kind == Kind::Sqlite {
        script.push_str("pragma journal_mode = wal;\n\n");
    }
    script.push_str("begin;\n\n");
    for migration in migrator(kind).iter() {
        script.push_str(migration.sql.as_str());
        script.push('\n');
    }
    script.push_str(books(kind));
    for migration in migrator(kind).iter() {
        let _ = writeln!(
            script,
            "insert into {} (version, description, success, checksum, execution_time)\nvalues ({}, '{}', true, {}, -1);",
            table(kind),
            migration.version,
            migration.description.replace('\'', "''"),
            blob(kind, &migration.checksum),
        );
    }
    script.push_str("\ncommit;\n");
    script
}

/// The table that sqlx would create, with the same columns.
fn books(kind: Kind) -> &'static str {
    match kind {
        Kind::Postgres => {
            "-- What was applied.\n\
             create table outbox.migrations (\n    \
                 version        bigint      primary key,\n    \
                 description    text        not null,\n    \
                 installed_on   timestamptz not null default now(),\n    \
                 success        boolean     not null,\n    \
                 checksum       bytea       not null,\n    \
                 execution_time bigint      not null\n\
             );\n\
             grant select on outbox.migrations to outbox_relay;\n"
        }
        Kind::Sqlite => {
            "-- What was applied.\n\
             create table outbox_migrations (\n    \
                 version        bigint    primary key,\n    \
                 description    text      not null,\n    \
                 installed_on   timestamp not null default current_timestamp,\n    \
                 success        boolean   not null,\n    \
                 checksum       blob      not null,\n    \
                 execution_time bigint    not null\n\
             );\n"
        }
    }
}

fn table(kind: Kind) -> &'static str {
    match kind {
        Kind::Postgres => POSTGRES_TABLE,
        Kind::Sqlite => SQLITE_TABLE,
    }
}

fn blob(kind: Kind, bytes: &[u8]) -> String {
    let mut hex = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        let _ = write!(hex, "{byte:02x}");
    }
    match kind {
        Kind::Postgres => format!("'\\x{hex}'"),
        Kind::Sqlite => format!("x'{hex}'"),
    }
}

fn migrator(kind: Kind) -> Migrator {
    let mut migrator = match kind {
        Kind::Postgres => sqlx::migrate!("migrations/postgres"),
        Kind::Sqlite => sqlx::migrate!("migrations/sqlite"),
    };
    if kind == Kind::Postgres {
        migrator.create_schema("outbox");
    }
    migrator.dangerous_set_table_name(table(kind));
    migrator.set_locking(false);
    migrator
}

fn versions(kind: Kind) -> Vec<Version> {
    let version = |migration: &sqlx::migrate::Migration| Version {
        number: migration.version,
        description: migration.description.to_string(),
    };
    migrator(kind).iter().map(version).collect()
}

fn lacking(kind: Kind, applied: Vec<i64>) -> Vec<Version> {
    let applied: BTreeSet<i64> = applied.into_iter().collect();
    let mut versions = versions(kind);
    versions.retain(|version| !applied.contains(&version.number));
    versions
}

fn report(kind: Kind, applied: Vec<Version>) -> Report {
    let mut present = versions(kind);
    present.retain(|version| !applied.contains(version));
    Report { applied, present }
}

async fn pending_in_postgres(connection: &mut PgConnection) -> anyhow::Result<Vec<Version>> {
    let there: bool = sqlx::query_scalar("select to_regclass('outbox.migrations') is not null")
        .fetch_one(&mut *connection)
        .await
        .context("look for the applied migrations")?;
    let applied = if there {
        sqlx::query_scalar("select version from outbox.migrations where success")
            .fetch_all(connection)
            .await
            .context("read the applied migrations")?
    } else {
        Vec::new()
    };
    Ok(lacking(Kind::Postgres, applied))
}

async fn pending_in_sqlite(connection: &mut SqliteConnection) -> anyhow::Result<Vec<Version>> {
    let there: bool = sqlx::query_scalar(
        "select count(*) > 0 from sqlite_schema where type = 'table' and name = 'outbox_migrations'",
    )
    .fetch_one(&mut *connection)
    .await
    .context("look for the applied migrations")?;
    let applied = if there {
        sqlx::query_scalar("select version from outbox_migrations where success")
            .fetch_all(connection)
            .await
            .context("read the applied migrations")?
    } else {
        Vec::new()
    };
    Ok(lacking(Kind::Sqlite, applied))
}

/// Changing the journal needs the file for itself for a moment, and SQLite does not wait for that.
async fn use_write_ahead_log(connection: &mut SqliteConnection) -> anyhow::Result<()> {
    const ATTEMPTS: u32 = 50;
    const PAUSE: Duration = Duration::from_millis(100);
    for attempt in 1.. {
        let changed = sqlx::query_scalar::<_, String>("pragma journal_mode = wal")
            .fetch_one(&mut *connection)
            .await;
        match changed {
            Ok(journal) if journal == "wal" => break,
            Ok(journal) => {
                tracing::warn!(%journal, "the file has no write-ahead log: the relay's reading will block writers for moments");
                break;
            }
            Err(error) if attempt == ATTEMPTS || !busy(&error) => {
                return Err(error).context("switch the file to the write-ahead log");
            }
            Err(_) => sleep(PAUSE).await,
        }
    }
    Ok(())
}

fn busy(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    let code = code.and_then(|code| code.parse::<u32>().ok());
    code.is_some_and(|code| code & 0xff == 5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_is_part_of_the_program() {
        for (kind, folder) in [(Kind::Postgres, "postgres"), (Kind::Sqlite, "sqlite")] {
            let folder = format!("{}/migrations/{folder}", env!("CARGO_MANIFEST_DIR"));
            let files = std::fs::read_dir(folder).unwrap().count();
            assert_eq!(
                versions(kind).len(),
                files,
                "{kind:?}: touch src/migrate.rs"
            );
        }
    }

    #[test]
    fn what_was_applied_is_not_pending() {
        let all = versions(Kind::Sqlite);
        assert_eq!(lacking(Kind::Sqlite, Vec::new()), all);
        let numbers = all.iter().map(|version| version.number).collect();
        assert_eq!(lacking(Kind::Sqlite, numbers), []);
        assert_eq!(all[0].to_string(), "0001 outbox");
    }
}
