//! The shop's database: a SQLite file in a temporary directory, or a temporary database on a PostgreSQL server.
//!
//! A client writes as any service would: the row first, then the event that tells of it, in one transaction.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteSynchronous};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor};
use tempfile::TempDir;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use uuid::Uuid;

use super::checker::{Fingerprint, Written};
use super::shop::{Change, Document, Row, Transaction};
use crate::migrate;
use crate::source::postgres::Connector;
use crate::source::sqlite;
use crate::supervise::sqlite_options;

/// The shop's own tables. The version of a row counts its changes.
const TABLES: &str = "
create table customers (id integer primary key, version integer not null, document text not null);
create table products (id integer primary key, version integer not null, document text not null);
create table orders (id integer primary key, version integer not null, document text not null);";

/// Where the shop keeps its rows and its outbox.
pub(super) enum Store {
    Sqlite {
        _folder: TempDir,
        path: PathBuf,
        /// SQLite has one writer at a time, and whom it lets wait it may let wait for long: clients queue here instead.
        turn: Arc<Semaphore>,
    },
    Postgres {
        /// The database that the URL names; only used to create and drop the other one.
        server: Box<PgConnectOptions>,
        name: String,
        /// Whether the database may be there.
        begun: bool,
        /// Roles that the migrations will create for the whole server.
        new_roles: Vec<String>,
    },
}

impl Store {
    /// A new file in a directory of its own.
    pub(super) async fn sqlite() -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("outbox-relay-demo-")
            .tempdir()
            .context("create a temporary directory")?;
        let path = folder.path().join("shop.db");
        migrate::sqlite(sqlite_options(&path).create_if_missing(true)).await?;
        let mut connection = sqlite::connect(&client_options(&path)).await?;
        connection
            .execute(TABLES)
            .await
            .context("create the shop's tables")?;
        connection.close().await.context("close the file")?;
        Ok(Self::Sqlite {
            _folder: folder,
            path,
            turn: Arc::new(Semaphore::new(1)),
        })
    }

    /// Names a database on this server; nothing is there before [`create`](Self::create).
    pub(super) fn postgres(server: PgConnectOptions, random: &str) -> Self {
        Self::Postgres {
            server: Box::new(server.disable_statement_logging()),
            name: format!("outbox_demo_{random}"),
            begun: false,
            new_roles: Vec::new(),
        }
    }

    /// Creates what [`postgres`](Self::postgres) named.
    pub(super) async fn create(&mut self) -> Result<()> {
        let Self::Postgres {
            server,
            name,
            begun,
            new_roles,
        } = self
        else {
            return Ok(());
        };
        let mut connection = Connector::from(&**server).connect().await?;
        *new_roles = sqlx::query_scalar(
            "select name
               from unnest(array['outbox_writer', 'outbox_relay']) as name
              where not exists (select from pg_roles where rolname = name)",
        )
        .fetch_all(&mut connection)
        .await
        .context("look at the server's roles")?;
        *begun = true;
        connection
            .execute(AssertSqlSafe(format!("create database {name}")))
            .await
            .context("create a temporary database")?;
        connection.close().await.context("close the connection")?;
        let options = (**server).clone().database(name);
        migrate::postgres(options.clone()).await?;
        let mut connection = Connector::from(options).connect().await?;
        connection
            .execute(TABLES)
            .await
            .context("create the shop's tables")?;
        connection.close().await.context("close the connection")
    }

    /// Drops what was created; also right when that was only half done.
    pub(super) async fn remove(self) -> Result<()> {
        let Self::Postgres {
            server,
            name,
            begun: true,
            new_roles,
        } = self
        else {
            return Ok(());
        };
        let mut connection = Connector::from(*server).connect().await?;
        connection
            .execute(AssertSqlSafe(format!(
                "drop database if exists {name} with (force)"
            )))
            .await
            .with_context(|| format!("drop the temporary database {name}"))?;
        for role in new_roles {
            // Refused where another database has begun to use it meanwhile, and then it has to stay.
            let _ = connection
                .execute(AssertSqlSafe(format!("drop role if exists {role}")))
                .await;
        }
        connection.close().await.context("close the connection")
    }

    /// The options for the temporary database; none for a file.
    pub(super) fn postgres_options(&self) -> Option<PgConnectOptions> {
        match self {
            Self::Postgres { server, name, .. } => Some((**server).clone().database(name)),
            Self::Sqlite { .. } => None,
        }
    }

    /// One more client of the shop.
    pub(super) async fn client(&self) -> Result<Client> {
        Ok(match self {
            Self::Sqlite { path, turn, .. } => Client::Sqlite {
                connection: sqlite::connect(&client_options(path)).await?,
                turn: turn.clone(),
            },
            Self::Postgres { server, name, .. } => Client::Postgres(
                Connector::from((**server).clone().database(name))
                    .connect()
                    .await?,
            ),
        })
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite { .. } => f.write_str("SQLite file"),
            Self::Postgres { name, .. } => write!(f, "PostgreSQL {name}"),
        }
    }
}

fn client_options(path: &std::path::Path) -> SqliteConnectOptions {
    sqlite_options(path)
        .create_if_missing(false)
        .busy_timeout(Duration::from_secs(30))
        // The file does not outlive the demo.
        .synchronous(SqliteSynchronous::Normal)
        .disable_statement_logging()
}

/// What a transaction wrote before it ended.
pub(super) struct Done {
    pub(super) events: Vec<Written>,
    /// Just before the commit was asked for.
    pub(super) ended_at: Instant,
}

/// One connection of the service.
pub(super) enum Client {
    Sqlite {
        connection: SqliteConnection,
        turn: Arc<Semaphore>,
    },
    Postgres(PgConnection),
}

impl Client {
    /// Runs one transaction to its end, which is a commit unless the shop refuses.
    pub(super) async fn execute(&mut self, transaction: &Transaction) -> Result<Done> {
        match self {
            Self::Sqlite { connection, turn } => {
                let _turn = turn.acquire().await.context("wait for the file")?;
                in_sqlite(connection, transaction).await
            }
            Self::Postgres(connection) => in_postgres(connection, transaction).await,
        }
    }
}

async fn in_sqlite(connection: &mut SqliteConnection, shop: &Transaction) -> Result<Done> {
    let mut transaction = connection
        .begin_with("begin immediate")
        .await
        .context("begin")?;
    let mut events = Vec::with_capacity(shop.changes.len());
    for change in &shop.changes {
        let row = sqlx::query_scalar(AssertSqlSafe(statement(change)))
            .bind(i64::from(change.entity.number));
        let row = match document(change)? {
            Some(document) => row.bind(document),
            None => row,
        };
        let version: i64 = row
            .fetch_one(&mut *transaction)
            .await
            .with_context(|| format!("change {}", change.entity))?;
        let payload = payload(change, version)?;
        let id = Uuid::new_v4();
        sqlx::query(
            "insert into outbox_events (event_id, aggregate_type, aggregate_id, event_type, payload)
             values ($1, $2, $3, $4, $5)",
        )
        .bind(id.to_string())
        .bind(change.entity.kind.name())
        .bind(change.entity.number.to_string())
        .bind(change.event_type)
        .bind(payload.as_deref())
        .execute(&mut *transaction)
        .await
        .context("emit")?;
        events.push(written(change, id, version, payload.as_deref()));
    }
    let ended_at = Instant::now();
    match shop.refusal {
        None => transaction.commit().await.context("commit")?,
        Some(_) => transaction.rollback().await.context("roll back")?,
    }
    Ok(Done { events, ended_at })
}

async fn in_postgres(connection: &mut PgConnection, shop: &Transaction) -> Result<Done> {
    let mut transaction = connection.begin().await.context("begin")?;
    let mut events = Vec::with_capacity(shop.changes.len());
    for change in &shop.changes {
        let row = sqlx::query_scalar(AssertSqlSafe(statement(change)))
            .bind(i64::from(change.entity.number));
        let row = match document(change)? {
            Some(document) => row.bind(document),
            None => row,
        };
        // The row first: its lock decides the order of the entity's events.
        let version: i32 = row
            .fetch_one(&mut *transaction)
            .await
            .with_context(|| format!("change {}", change.entity))?;
        let version = i64::from(version);
        let payload = payload(change, version)?;
        let id: String = sqlx::query_scalar("select outbox.emit($1, $2, $3, $4::text::json)::text")
            .bind(change.entity.kind.name())
            .bind(change.entity.number.to_string())
            .bind(change.event_type)
            .bind(payload.as_deref())
            .fetch_one(&mut *transaction)
            .await
            .context("emit")?;
        let id = Uuid::parse_str(&id).context("read the event's id")?;
        events.push(written(change, id, version, payload.as_deref()));
    }
    let ended_at = Instant::now();
    match shop.refusal {
        None => transaction.commit().await.context("commit")?,
        Some(_) => transaction.rollback().await.context("roll back")?,
    }
    Ok(Done { events, ended_at })
}

/// The change of the entity's own row, found by its primary key; answers with the row's version.
fn statement(change: &Change) -> String {
    let table = change.entity.kind.name();
    match change.row {
        Row::Insert(_) => format!(
            "insert into {table}s (id, version, document) values ($1, 1, $2) returning version"
        ),
        Row::Update(_) => format!(
            "update {table}s set version = version + 1, document = $2 where id = $1 returning version"
        ),
        Row::Delete => format!("delete from {table}s where id = $1 returning version + 1"),
    }
}

fn document(change: &Change) -> Result<Option<String>> {
    match &change.row {
        Row::Insert(document) | Row::Update(document) => serde_json::to_string(document)
            .map(Some)
            .context("write a document"),
        Row::Delete => Ok(None),
    }
}

/// What consumers read; nothing at all for what is gone, which removes the key from a compacted topic.
fn payload(change: &Change, version: i64) -> Result<Option<String>> {
    #[derive(Serialize)]
    struct Payload<'a> {
        id: u32,
        version: i64,
        #[serde(flatten)]
        document: &'a Document,
    }
    let (Row::Insert(document) | Row::Update(document)) = &change.row else {
        return Ok(None);
    };
    serde_json::to_string(&Payload {
        id: change.entity.number,
        version,
        document,
    })
    .map(Some)
    .context("write a payload")
}

fn written(change: &Change, id: Uuid, version: i64, payload: Option<&str>) -> Written {
    Written {
        id,
        entity: change.entity,
        version,
        event_type: change.event_type,
        payload: Fingerprint::of(payload.map(str::as_bytes)),
    }
}
