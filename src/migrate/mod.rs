//! The tables of the outbox: brings a database to the version that this program needs.
//!
//! The migrations are part of the program. Applying them is idempotent, all or nothing, and may be done by many at once.
//! The books of what was applied lie beside the tables, under a name that does not meet the service's own migrations.

pub mod objects;

use std::fmt::{self, Write};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde::Deserialize;
use sqlx::migrate::{Migration, Migrator};
use sqlx::postgres::PgConnection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor, Row};
use tokio::time::sleep;

use self::objects::Comparison;
use crate::source::postgres::{Connector, ask};
use crate::source::sqlite;

static POSTGRES: Migrator = sqlx::migrate!("migrations/postgres");
static SQLITE: Migrator = sqlx::migrate!("migrations/sqlite");

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

/// The first partitions of the log in PostgreSQL.
#[derive(Clone, Copy, Debug)]
pub struct Partitions {
    /// Events in each.
    pub events: u64,
    /// How many lie ahead.
    pub ahead: u32,
}

impl Default for Partitions {
    fn default() -> Self {
        Self {
            events: 5_000_000,
            ahead: 8,
        }
    }
}

impl Partitions {
    /// Tells the migration, until the end of its transaction.
    fn statement(self) -> String {
        let Self { events, ahead } = self;
        format!(
            "set local outbox.partition_events = '{events}'; set local outbox.partitions_ahead = '{ahead}';\n"
        )
    }
}

/// Brings a PostgreSQL database up to date, in one transaction that also works through a transaction-mode pooler.
///
/// Writes nothing, and needs no right to, when there is nothing to do. What a copy of the schema has without its list of
/// migrations, it recognises, lists, and gives the rights to anew.
///
/// # Errors
/// When the server can't be reached, the rights do not suffice, what was applied before is not what this program
/// knows (it is older than the database, or a migration was changed since), or the schema has other objects of these names.
/// Nothing was changed then.
pub async fn postgres(connector: impl Into<Connector>) -> anyhow::Result<Report> {
    postgres_with(connector, Partitions::default()).await
}

/// As [`postgres`](fn@postgres), with first partitions as the configuration has them.
///
/// # Errors
/// As [`postgres`](fn@postgres).
pub async fn postgres_with(
    connector: impl Into<Connector>,
    partitions: Partitions,
) -> anyhow::Result<Report> {
    /// Each attempt that fails like this was overtaken by another migration, which is complete then.
    const ATTEMPTS: u32 = 5;
    let connector = connector.into();
    let mut attempt = 1;
    loop {
        match migrate_postgres(&connector, partitions).await {
            Err(error) if attempt < ATTEMPTS && was_overtaken(&error) => attempt += 1,
            done => return done,
        }
    }
}

async fn migrate_postgres(connector: &Connector, partitions: Partitions) -> anyhow::Result<Report> {
    let mut connection = connector.connect().await?;
    let mut transaction = ask::begin(&mut connection, Duration::ZERO)
        .await
        .context("begin to migrate")?;
    let applied = applied_in_postgres(&mut transaction).await?;
    let pending = pending(Kind::Postgres, &applied)?;
    if !pending.is_empty() {
        // Migrations that run at the same time meet at the names that they make, where nobody else can keep them waiting.
        own_schema(&mut transaction).await?;
        let all = || -> String {
            let statements = steps(Kind::Postgres, &pending).map(|(_, statements)| statements);
            std::iter::once(partitions.statement())
                .chain(statements)
                .collect()
        };
        let statements = match objects::compare(&objects::present(&mut transaction).await?) {
            Comparison::Nothing => all(),
            Comparison::Same => recognised(&pending),
            Comparison::Different(_) if !applied.is_empty() => all(),
            Comparison::Different(differences) => bail!(different(&differences)),
        };
        transaction
            .execute(sqlx::raw_sql(AssertSqlSafe(statements)))
            .await
            .context("apply the migrations")?;
    }
    let report = report(Kind::Postgres, &pending);
    transaction
        .commit()
        .await
        .context("commit the migrations")?;
    connection.close().await.context("close the connection")?;
    Ok(report)
}

/// For a schema that has everything but the list of migrations: the list, and the rights, which copies leave out.
fn recognised(pending: &[&Migration]) -> String {
    let mut statements = POSTGRES_BOOKS.to_owned();
    for migration in pending {
        statements.push_str(&listed(Kind::Postgres, migration));
    }
    statements + &objects::grants()
}

fn different(differences: &[String]) -> String {
    const SHOWN: usize = 5;
    let shown = differences[..differences.len().min(SHOWN)].join("; ");
    let more = differences.len().saturating_sub(SHOWN);
    let more = match more {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    format!(
        "the schema outbox has tables of an outbox, but not as this program makes them ({shown}{more}), and no list of \
         migrations (outbox.migrations): restore the list, or move these tables to another schema and migrate again"
    )
}

/// Whoever owns the schema may drop what is in it.
async fn own_schema(connection: &mut PgConnection) -> anyhow::Result<()> {
    #[derive(Deserialize)]
    struct Schema {
        owner: Option<String>,
        me: String,
        trusted: bool,
    }
    let Schema { owner, me, trusted } = ask::one(
        connection,
        "select r.rolname::text as owner, current_user::text as me, \
                coalesce(r.rolname = current_user or r.rolsuper or r.rolname = 'pg_database_owner', true) as trusted \
           from (values (1)) one \
           left join pg_namespace s on s.nspname = 'outbox' \
           left join pg_roles r on r.oid = s.nspowner",
    )
    .await
    .context("look at the owner of the schema outbox")?;
    ensure!(
        trusted,
        "the schema outbox belongs to the role {owner}, who may drop what is in it, and you are {me}: migrate as {owner}, or run \
         alter schema outbox owner to {me}",
        owner = owner.unwrap_or_default()
    );
    Ok(())
}

/// Whether the error says that somebody else has made an object of the same name meanwhile.
fn was_overtaken(error: &anyhow::Error) -> bool {
    // unique_violation, and duplicate schema, table, function and object. And undefined_object: a role that another database of
    // the server was making when this one looked is known to the next transaction only.
    const CODES: [&str; 6] = ["23505", "42P06", "42P07", "42723", "42710", "42704"];
    let code = error.chain().find_map(|cause| {
        cause
            .downcast_ref::<sqlx::Error>()?
            .as_database_error()?
            .code()
    });
    code.is_some_and(|code| CODES.contains(&&*code))
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
    // The write lock from the start, so that one migrates at a time.
    let mut transaction = connection
        .begin_with("begin immediate")
        .await
        .context("begin to migrate")?;
    let applied = applied_in_sqlite(&mut transaction).await?;
    let pending = pending(Kind::Sqlite, &applied)?;
    for (migration, statements) in steps(Kind::Sqlite, &pending) {
        transaction
            .execute(sqlx::raw_sql(AssertSqlSafe(statements)))
            .await
            .with_context(|| format!("apply migration {}", version(migration)))?;
    }
    let report = report(Kind::Sqlite, &pending);
    transaction
        .commit()
        .await
        .context("commit the migrations")?;
    connection.close().await.context("close the file")?;
    Ok(report)
}

/// The migrations that a PostgreSQL database lacks. Changes nothing, and needs no more rights than the relay has.
///
/// # Errors
/// When the server can't be reached or does not show what was applied, or that is not what this program knows.
pub async fn pending_postgres(connector: impl Into<Connector>) -> anyhow::Result<Vec<Version>> {
    let mut connection = connector.into().connect().await?;
    let applied = applied_in_postgres(&mut connection).await?;
    connection.close().await.context("close the connection")?;
    let pending = pending(Kind::Postgres, &applied)?;
    Ok(pending.into_iter().map(version).collect())
}

/// The migrations that a SQLite file lacks. Changes nothing.
///
/// # Errors
/// When the file is not there or can't be read, or what was applied is not what this program knows.
pub async fn pending_sqlite(options: SqliteConnectOptions) -> anyhow::Result<Vec<Version>> {
    let options = options.create_if_missing(false).disable_statement_logging();
    let mut connection = sqlite::connect(&options).await?;
    let applied = applied_in_sqlite(&mut connection).await?;
    connection.close().await.context("close the file")?;
    let pending = pending(Kind::Sqlite, &applied)?;
    Ok(pending.into_iter().map(version).collect())
}

/// All migrations as one script for `psql` or `sqlite3`, for those who let no program change their tables. It writes
/// down what it applied, so that [`postgres`](fn@postgres) and [`sqlite`](fn@sqlite) find nothing left to do. For a database that has
/// none of them.
#[must_use]
pub fn print(kind: Kind) -> String {
    print_with(kind, Partitions::default())
}

/// As [`print`](fn@print), with first partitions as the configuration has them.
#[must_use]
pub fn print_with(kind: Kind, partitions: Partitions) -> String {
    let mut script = String::new();
    // Outside of the transaction, where the journal can't be changed.
    if kind == Kind::Sqlite {
        script.push_str("pragma journal_mode = wal;\n\n");
    }
    script.push_str("begin;\n\n");
    // As in the program: no object of another schema is called, and no text is read in another way.
    if kind == Kind::Postgres {
        script.push_str(
            "set local search_path = pg_catalog, pg_temp;\nset local standard_conforming_strings = on;\n\n",
        );
        script.push_str(&partitions.statement());
        script.push('\n');
    }
    let all: Vec<&Migration> = migrator(kind).iter().collect();
    for (_, statements) in steps(kind, &all) {
        script.push_str(&statements);
        script.push('\n');
    }
    script.push_str("commit;\n");
    script
}

/// What was applied is written down beside the tables, under a name that no other program's migrations use.
const POSTGRES_BOOKS: &str = "
create table if not exists outbox.migrations (
    version     bigint      primary key,
    description text        not null,
    checksum    text        not null,
    applied_at  timestamptz not null default clock_timestamp()
);
grant select on outbox.migrations to outbox_relay;
";

const SQLITE_BOOKS: &str = "
create table if not exists outbox_migrations (
    version     integer primary key,
    description text    not null,
    checksum    text    not null,
    applied_at  text    not null default current_timestamp
);
";

/// The statements of each migration, which also write it down.
fn steps<'m>(
    kind: Kind,
    migrations: &[&'m Migration],
) -> impl Iterator<Item = (&'m Migration, String)> {
    let books = match kind {
        Kind::Postgres => POSTGRES_BOOKS,
        Kind::Sqlite => SQLITE_BOOKS,
    };
    migrations.iter().map(move |migration| {
        let statements = format!(
            "{}{books}{}",
            migration.sql.as_str(),
            listed(kind, migration)
        );
        (*migration, statements)
    })
}

/// The statement that notes a migration in the list.
fn listed(kind: Kind, migration: &Migration) -> String {
    let table = match kind {
        Kind::Postgres => "outbox.migrations",
        Kind::Sqlite => "outbox_migrations",
    };
    format!(
        "insert into {table} (version, description, checksum)\nvalues ({}, '{}', '{}');\n",
        migration.version,
        migration.description.replace('\'', "''"),
        checksum(migration)
    )
}

fn migrator(kind: Kind) -> &'static Migrator {
    match kind {
        Kind::Postgres => &POSTGRES,
        Kind::Sqlite => &SQLITE,
    }
}

fn version(migration: &Migration) -> Version {
    Version {
        number: migration.version,
        description: migration.description.to_string(),
    }
}

fn checksum(migration: &Migration) -> String {
    let mut hex = String::new();
    for byte in &*migration.checksum {
        let _ = write!(hex, "{byte:02x}");
    }
    hex
}

/// A migration that was written down: its number and checksum.
type Applied = (i64, String);

fn pending(kind: Kind, applied: &[Applied]) -> anyhow::Result<Vec<&'static Migration>> {
    let known = migrator(kind);
    for (number, found) in applied {
        let migration = known.iter().find(|migration| migration.version == *number);
        let migration = migration.with_context(|| {
            format!("the database has migration {number}, which this program does not know: it is too old")
        })?;
        ensure!(
            checksum(migration) == *found,
            "migration {} was applied with another text than the one that this program has",
            version(migration)
        );
    }
    let lacking = |migration: &&Migration| applied.iter().all(|(n, _)| *n != migration.version);
    Ok(known.iter().filter(lacking).collect())
}

fn report(kind: Kind, applied: &[&Migration]) -> Report {
    let applied: Vec<Version> = applied.iter().copied().map(version).collect();
    let mut present: Vec<Version> = migrator(kind).iter().map(version).collect();
    present.retain(|version| !applied.contains(version));
    Report { applied, present }
}

async fn applied_in_postgres(connection: &mut PgConnection) -> anyhow::Result<Vec<Applied>> {
    // By the simple protocol: a pooler would give the next transaction somebody else's prepared statements.
    let there = connection
        .fetch_one(sqlx::raw_sql(
            "select pg_catalog.to_regclass('outbox.migrations') is not null",
        ))
        .await
        .context("look for the applied migrations")?;
    if !there.try_get_unchecked::<bool, _>(0)? {
        return Ok(Vec::new());
    }
    let rows = connection
        .fetch_all(sqlx::raw_sql(
            "select version, checksum from outbox.migrations",
        ))
        .await
        .context("read the applied migrations")?;
    rows.iter()
        .map(|row| Ok((row.try_get_unchecked(0)?, row.try_get_unchecked(1)?)))
        .collect()
}

async fn applied_in_sqlite(connection: &mut SqliteConnection) -> anyhow::Result<Vec<Applied>> {
    let there: bool = sqlx::query_scalar(
        "select count(*) > 0 from sqlite_schema where type = 'table' and name = 'outbox_migrations'",
    )
    .fetch_one(&mut *connection)
    .await
    .context("look for the applied migrations")?;
    if !there {
        return Ok(Vec::new());
    }
    sqlx::query_as("select version, checksum from outbox_migrations")
        .fetch_all(connection)
        .await
        .context("read the applied migrations")
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
    let code = error
        .as_database_error()
        .and_then(sqlx::error::DatabaseError::code);
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
            let known = migrator(kind).iter().count();
            assert_eq!(known, files, "{kind:?}: touch src/migrate.rs");
        }
    }

    #[test]
    fn a_relay_knows_the_newest_migration() {
        for kind in [Kind::Postgres, Kind::Sqlite] {
            let newest = migrator(kind)
                .iter()
                .map(|migration| migration.version)
                .max();
            assert_eq!(newest, Some(crate::ledger::NEWEST_MIGRATION), "{kind:?}");
        }
    }

    fn applied(kind: Kind) -> Vec<Applied> {
        let one = |migration: &Migration| (migration.version, checksum(migration));
        migrator(kind).iter().map(one).collect()
    }

    #[test]
    fn what_was_applied_is_not_pending() {
        let all = pending(Kind::Sqlite, &[]).unwrap();
        assert_eq!(version(all[0]).to_string(), "0001 outbox");
        assert_eq!(
            pending(Kind::Sqlite, &applied(Kind::Sqlite)).unwrap().len(),
            0
        );
    }

    #[test]
    fn a_newer_database_is_refused() {
        let mut applied = applied(Kind::Postgres);
        applied.push((9999, String::new()));
        let refused = pending(Kind::Postgres, &applied).unwrap_err().to_string();
        assert!(refused.contains("9999"), "{refused}");
    }

    #[test]
    fn a_changed_migration_is_refused() {
        let mut applied = applied(Kind::Postgres);
        applied[0].1.push('0');
        let refused = pending(Kind::Postgres, &applied).unwrap_err().to_string();
        assert!(refused.contains("0001 outbox"), "{refused}");
    }
}
