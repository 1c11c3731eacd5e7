//! The books in a SQLite file: `outbox_cursors`, `outbox_leases`, `outbox_parked`.
//!
//! Whoever changes a lease holds the file's write lock from the first look on, so nothing can come in between. Time is
//! that of the machine, the same for all who share the file.

mod parked;
pub mod pipelines;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions, Connection, Executor};
use tokio::time::timeout;

use super::{
    Acquired, Due, Fenced, Ledger, LedgerError, NEWEST_MIGRATION, Parked, Pause, Renewed,
    Resolution, Resolved, Settings, Tenure, too_old,
};
use crate::event::{EventId, EventKey, Start};
use crate::position::{Position, Window};
use crate::source::sqlite::{connect, newest_id};

/// How long a statement waits for another writer, unless the lease is so short that it should not.
const BUSY_MAX: Duration = Duration::from_secs(5);

/// The books of one pipeline in one file.
pub struct SqliteLedger {
    options: SqliteConnectOptions,
    settings: Settings,
    connection: Option<SqliteConnection>,
    epoch: i64,
}

impl SqliteLedger {
    /// Books that open the file when they are first used. It has to be there and to be migrated.
    #[must_use]
    pub fn new(options: SqliteConnectOptions, settings: Settings) -> Self {
        Self {
            options: options
                .create_if_missing(false)
                .busy_timeout(BUSY_MAX.min(settings.lease_ttl / 2))
                .disable_statement_logging(),
            settings,
            connection: None,
            epoch: 0,
        }
    }

    /// Runs one piece of work on the connection; after any failure the connection is given up, and with it whatever
    /// transaction was left open.
    async fn with<T>(
        &mut self,
        work: impl AsyncFnOnce(&mut SqliteConnection, &Settings, i64) -> Result<T, anyhow::Error>,
    ) -> Result<T, LedgerError> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => open(&self.options).await?,
        };
        let limit = self.settings.lease_ttl;
        let done = timeout(limit, work(&mut connection, &self.settings, self.epoch))
            .await
            .map_err(|_| anyhow!("no answer from SQLite within {} s", limit.as_secs_f32()))??;
        self.connection = Some(connection);
        Ok(done)
    }
}

impl Ledger for SqliteLedger {
    async fn acquire(&mut self) -> Result<Acquired, LedgerError> {
        let acquired = self
            .with(async |connection, settings, _| acquire(connection, settings).await)
            .await?;
        Ok(match acquired {
            Ok((epoch, tenure)) => {
                self.epoch = epoch;
                Acquired::Ours(tenure)
            }
            Err(NotFree::Held(holder, expires_in)) => Acquired::Held { holder, expires_in },
            Err(NotFree::Paused(pause)) => Acquired::Paused(pause),
        })
    }

    async fn renew(&mut self) -> Result<Renewed, LedgerError> {
        self.with(async |connection, settings, epoch| {
            let paused: Option<bool> = sqlx::query_scalar(
                "update outbox_leases
                    set expires_at = cast(round(unixepoch('subsec') * 1000000) as integer) + ?3
                  where pipeline = ?1 and shard = 0 and epoch = ?2
                 returning exists (select 1 from outbox_pauses p where p.pipeline = ?1)",
            )
            .bind(settings.pipeline.as_str())
            .bind(epoch)
            .bind(ttl_us(settings))
            .fetch_optional(connection)
            .await
            .context("renew the lease")?;
            Ok(match paused {
                None => Renewed::Lost,
                Some(false) => Renewed::Extended,
                Some(true) => Renewed::Paused,
            })
        })
        .await
    }

    async fn acknowledge(&mut self, position: &Position) -> Result<Fenced, LedgerError> {
        self.with(async |connection, settings, epoch| {
            let moved = set_position(connection, settings, epoch, position)
                .await
                .context("move the cursor")?;
            Ok(fenced(moved))
        })
        .await
    }

    async fn park(&mut self, parked: &[Parked]) -> Result<Fenced, LedgerError> {
        self.with(async |connection, settings, epoch| {
            connection
                .execute("pragma synchronous = full")
                .await
                .context("ask for durability")?;
            let answer = parked::park(connection, settings, epoch, parked).await?;
            relax(connection).await?;
            Ok(answer)
        })
        .await
    }

    async fn due(&mut self, rows: usize, bytes: usize) -> Result<Vec<Due>, LedgerError> {
        self.with(async |connection, settings, _| {
            parked::due(connection, settings, rows, bytes).await
        })
        .await
    }

    async fn resolve(&mut self, resolved: &Resolved) -> Result<Resolution, LedgerError> {
        // What is lost of this with the machine's last moments is done once more, and the cursor with it.
        self.with(async |connection, settings, epoch| {
            parked::resolve(connection, settings, epoch, resolved).await
        })
        .await
    }

    async fn skipped(&mut self, event: EventKey) -> Result<Option<String>, LedgerError> {
        self.with(async |connection, settings, _| {
            pipelines::skipped(connection, settings, event).await
        })
        .await
    }

    async fn release(&mut self, _settled: bool) -> Result<(), LedgerError> {
        self.with(async |connection, settings, epoch| {
            sqlx::query(
                "update outbox_leases set expires_at = 0 where pipeline = ?1 and shard = 0 and epoch = ?2",
            )
            .bind(settings.pipeline.as_str())
            .bind(epoch)
            .execute(connection)
            .await
            .context("release the lease")
        })
        .await?;
        // No lease has this epoch: what is written from now on is refused, also before somebody else takes over.
        self.epoch = 0;
        if let Some(connection) = self.connection.take() {
            connection.close().await.context("close the file")?;
        }
        Ok(())
    }
}

/// Why a lease can't be taken.
enum NotFree {
    /// Another relay has it, for this long.
    Held(String, Duration),
    /// An operator has paused the pipeline.
    Paused(Pause),
}

async fn open(options: &SqliteConnectOptions) -> Result<SqliteConnection, anyhow::Error> {
    let mut connection = connect(options).await?;
    relax(&mut connection).await?;
    Ok(connection)
}

/// A cursor that is lost with the machine's last moments is a few duplicates, not worth a flush each time. Only with a
/// write-ahead log, whose commits are lost from the end only; with any other journal the file could be damaged.
async fn relax(connection: &mut SqliteConnection) -> Result<(), anyhow::Error> {
    let journal: String = sqlx::query_scalar("pragma journal_mode")
        .fetch_one(&mut *connection)
        .await
        .context("read the journal mode")?;
    if journal == "wal" {
        connection
            .execute("pragma synchronous = normal")
            .await
            .context("set the durability")?;
    }
    Ok(())
}

/// An older program must not work with the tables of a newer one.
async fn demand_known(connection: &mut SqliteConnection) -> Result<(), anyhow::Error> {
    let there =
        "select count(*) from sqlite_schema where type = 'table' and name = 'outbox_migrations'";
    let there: i64 = sqlx::query_scalar(there)
        .fetch_one(&mut *connection)
        .await?;
    if there == 0 {
        return Ok(());
    }
    let newest: i64 = sqlx::query_scalar("select coalesce(max(version), 0) from outbox_migrations")
        .fetch_one(connection)
        .await
        .context("read the list of migrations")?;
    ensure!(newest <= NEWEST_MIGRATION, too_old(newest));
    Ok(())
}

async fn acquire(
    connection: &mut SqliteConnection,
    settings: &Settings,
) -> Result<Result<(i64, Tenure), NotFree>, anyhow::Error> {
    // First without the write lock, so that a standby never makes the service wait.
    if let Some(not_free) = not_free(connection, settings).await? {
        return Ok(Err(not_free));
    }
    demand_known(connection).await?;
    let mut transaction = connection
        .begin_with("begin immediate")
        .await
        .context("begin to take the lease")?;
    if let Some(not_free) = not_free(&mut transaction, settings).await? {
        transaction.rollback().await.context("leave the lease")?;
        return Ok(Err(not_free));
    }
    let epoch = take_lease(&mut transaction, settings).await?;
    let position = match stored_position(&mut transaction, settings.pipeline.as_str()).await? {
        Some(position) => position,
        None => {
            let position = starting_position(&mut transaction, settings.start).await?;
            set_position(&mut transaction, settings, epoch, &position)
                .await
                .context("write the first cursor")?;
            position
        }
    };
    let log = log_name(&mut transaction, settings).await?;
    let tenure = Tenure {
        position,
        log,
        held: parked::held(&mut transaction, settings).await?,
        dead_letters: parked::dead_letters(&mut transaction, settings).await?,
    };
    transaction.commit().await.context("take the lease")?;
    Ok(Ok((epoch, tenure)))
}

async fn not_free(
    connection: &mut SqliteConnection,
    settings: &Settings,
) -> Result<Option<NotFree>, anyhow::Error> {
    let held: Option<(String, i64)> = sqlx::query_as(
        "select holder, expires_in
           from (select holder,
                        expires_at - cast(round(unixepoch('subsec') * 1000000) as integer) as expires_in
                   from outbox_leases
                  where pipeline = ?1 and shard = 0 and holder <> ?2)
          where expires_in > 0",
    )
    .bind(settings.pipeline.as_str())
    .bind(&settings.holder)
    .fetch_optional(&mut *connection)
    .await
    .context("look for the lease")?;
    if let Some((holder, us)) = held {
        return Ok(Some(NotFree::Held(
            holder,
            Duration::from_micros(us.unsigned_abs()),
        )));
    }
    let pause = pipelines::pause_of(connection, settings.pipeline.as_str()).await?;
    Ok(pause.map(NotFree::Paused))
}

/// Only under the write lock, after a look that the lease is free.
async fn take_lease(
    connection: &mut SqliteConnection,
    settings: &Settings,
) -> Result<i64, anyhow::Error> {
    let epoch: i64 = sqlx::query_scalar(
        "insert into outbox_leases as l (pipeline, holder, epoch, expires_at)
         values (?1, ?2, 1, cast(round(unixepoch('subsec') * 1000000) as integer) + ?3)
         on conflict (pipeline, shard) do update
            set holder = excluded.holder, epoch = l.epoch + 1, expires_at = excluded.expires_at
         returning epoch",
    )
    .bind(settings.pipeline.as_str())
    .bind(&settings.holder)
    .bind(ttl_us(settings))
    .fetch_one(&mut *connection)
    .await
    .context("write the lease")?;
    // The cursor carries the epoch too, so that one look at its own row fences every later write.
    sqlx::query(
        "insert into outbox_cursors (pipeline, epoch) values (?1, ?2)
         on conflict (pipeline, shard) do update set epoch = excluded.epoch",
    )
    .bind(settings.pipeline.as_str())
    .bind(epoch)
    .execute(connection)
    .await
    .context("write the epoch of the cursor")?;
    Ok(epoch)
}

/// The file may lose its newest transactions with the machine's last moments, and use their ids again.
async fn log_name(
    connection: &mut SqliteConnection,
    settings: &Settings,
) -> Result<String, anyhow::Error> {
    let begun: String =
        sqlx::query_scalar("select begun from outbox_cursors where pipeline = ?1 and shard = 0")
            .bind(settings.pipeline.as_str())
            .fetch_one(connection)
            .await
            .context("read which cursor this is")?;
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    Ok(format!("{}/{begun}", boot.trim()))
}

async fn starting_position(
    connection: &mut SqliteConnection,
    start: Start,
) -> Result<Position, anyhow::Error> {
    let newest = newest_id(connection).await?;
    let before_first = match start {
        Start::Earliest => EventId(0),
        Start::Latest => newest,
        Start::Event(id) => EventId(id.0 - 1),
        Start::Time(us) => {
            // Read once in a pipeline's life; there is no index on the time.
            let first: Option<i64> =
                sqlx::query_scalar("select min(id) from outbox_events where occurred_at >= ?1")
                    .bind(us)
                    .fetch_one(connection)
                    .await
                    .context("find the event to start from")?;
            first.map_or(newest, |id| EventId(id - 1))
        }
    };
    let window = Window {
        ceiling: before_first,
        next_floor: before_first,
        ..Window::beginning()
    };
    Ok(Position {
        window: Arc::new(window),
        last_id: before_first,
    })
}

type CursorRow = (Option<String>, Option<String>, i64, i64, i64, i64);

async fn stored_position(
    connection: &mut SqliteConnection,
    pipeline: &str,
) -> Result<Option<Position>, anyhow::Error> {
    let row: CursorRow = sqlx::query_as(
        "select prev, cur, coalesce(floor, 0), coalesce(ceiling, 0), coalesce(next_floor, 0), coalesce(last_id, 0)
           from outbox_cursors where pipeline = ?1 and shard = 0",
    )
    .bind(pipeline)
    .fetch_one(connection)
    .await
    .context("read the cursor")?;
    let (Some(prev), Some(cur), floor, ceiling, next_floor, last_id) = row else {
        return Ok(None);
    };
    Ok(Some(Position {
        window: Arc::new(Window {
            prev: prev.parse()?,
            cur: cur.parse()?,
            floor: EventId(floor),
            ceiling: EventId(ceiling),
            next_floor: EventId(next_floor),
        }),
        last_id: EventId(last_id),
    }))
}

async fn set_position(
    connection: &mut SqliteConnection,
    settings: &Settings,
    epoch: i64,
    position: &Position,
) -> Result<u64, sqlx::Error> {
    let Window {
        prev,
        cur,
        floor,
        ceiling,
        next_floor,
    } = &*position.window;
    let done = sqlx::query(
        "update outbox_cursors
            set prev = ?3, cur = ?4, floor = ?5, ceiling = ?6, next_floor = ?7, last_id = ?8,
                updated_at = cast(round(unixepoch('subsec') * 1000000) as integer)
          where pipeline = ?1 and shard = 0 and epoch = ?2",
    )
    .bind(settings.pipeline.as_str())
    .bind(epoch)
    .bind(prev.to_string())
    .bind(cur.to_string())
    .bind(floor.0)
    .bind(ceiling.0)
    .bind(next_floor.0)
    .bind(position.last_id.0)
    .execute(connection)
    .await?;
    Ok(done.rows_affected())
}

fn ttl_us(settings: &Settings) -> i64 {
    i64::try_from(settings.lease_ttl.as_micros()).unwrap_or(i64::MAX / 2)
}

fn fenced(rows: u64) -> Fenced {
    if rows == 0 {
        Fenced::Lost
    } else {
        Fenced::Written
    }
}
