//! The books in PostgreSQL: `outbox.cursors`, `outbox.leases`, `outbox.parked`.
//!
//! The frequent statements go by the simple protocol, one round trip each, so that they work through a transaction-mode
//! pooler; what they inline is numbers and names of a closed alphabet. Time is the database's.

mod parked;
pub mod pipelines;
pub mod places;
mod restored;
pub mod roster;
mod version;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{AssertSqlSafe, Connection, Executor, Row};
use tokio::time::timeout;
use uuid::Uuid;

use super::{
    Acquired, Due, Fenced, Ledger, LedgerError, Parked, Pause, Renewed, Resolution, Resolved,
    Settings, Tenure,
};
use crate::event::{EventId, EventKey, Shard, Start};
use crate::position::{Position, Window};
use crate::source::postgres::ask::literal;
use crate::source::postgres::{Connector, NEWEST_ID};

/// The books of one pipeline in one database.
pub struct PostgresLedger {
    connector: Connector,
    settings: Settings,
    connection: Option<PgConnection>,
    fence: Fence,
}

/// What every write of a tenure depends on.
///
/// The incarnation is for who reaches the server through a pooler: it hides a crash and a failover, after which the ids of
/// transactions that were lost are given to new ones. What was read then, from a position of before, has holes. The
/// identity is for a copy of the database, with the same lease in it, that has taken the server's place.
#[derive(Clone, Debug, Default)]
struct Fence {
    epoch: i64,
    incarnation: Uuid,
    system_identifier: i64,
}

impl Fence {
    /// A condition that holds while the lease is ours and the server has not lost a transaction.
    fn holds(&self, settings: &Settings) -> String {
        let Self {
            epoch,
            incarnation,
            system_identifier,
        } = self;
        format!(
            "{} and epoch = {epoch} and '{incarnation}' = (select id from outbox.incarnation) \
             and {system_identifier} = (select system_identifier from pg_control_system())",
            of_shard(settings)
        )
    }
}

impl PostgresLedger {
    /// Books that connect when they are first used.
    #[must_use]
    pub fn new(connector: impl Into<Connector>, settings: Settings) -> Self {
        Self {
            connector: connector.into(),
            settings,
            connection: None,
            fence: Fence::default(),
        }
    }

    /// Runs one piece of work on the connection; after any failure the connection is given up, and with it whatever
    /// state an unread answer left behind.
    async fn with<T>(
        &mut self,
        work: impl AsyncFnOnce(&mut PgConnection, &Settings, &Fence) -> Result<T, anyhow::Error>,
    ) -> Result<T, LedgerError> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.connector.connect().await?,
        };
        let limit = self.settings.lease_ttl;
        let done = timeout(limit, work(&mut connection, &self.settings, &self.fence))
            .await
            .map_err(|_| {
                anyhow!(
                    "no answer from the database within {} s",
                    limit.as_secs_f32()
                )
            })??;
        self.connection = Some(connection);
        Ok(done)
    }
}

impl Ledger for PostgresLedger {
    async fn acquire(&mut self) -> Result<Acquired, LedgerError> {
        loop {
            let taken = self
                .with(async |connection, settings, _| acquire(connection, settings).await)
                .await?;
            match taken {
                Taken::Ours(fence, tenure) => {
                    self.fence = fence;
                    return Ok(Acquired::Ours(tenure));
                }
                Taken::Held(holder, expires_in) => {
                    return Ok(Acquired::Held { holder, expires_in });
                }
                Taken::Paused(pause) => return Ok(Acquired::Paused(pause)),
                Taken::Restored => restored::adopt(&self.connector).await?,
                Taken::Resharded(shards) => return Ok(Acquired::Resharded { shards }),
            }
        }
    }

    async fn renew(&mut self) -> Result<Renewed, LedgerError> {
        self.with(async |connection, settings, fence| {
            let renewed = connection
                .fetch_optional(sqlx::raw_sql(AssertSqlSafe(in_path(&format!(
                    "update outbox.leases set expires_at = {} where {} \
                     returning exists (select from outbox.pauses p where p.pipeline = {})",
                    expiry(settings),
                    fence.holds(settings),
                    literal(settings.pipeline.as_str())
                )))))
                .await
                .context("renew the lease")?;
            Ok(match renewed.map(|row| get(&row, 0)).transpose()? {
                None => Renewed::Lost,
                Some(false) => Renewed::Extended,
                Some(true) => Renewed::Paused,
            })
        })
        .await
    }

    async fn acknowledge(&mut self, position: &Position) -> Result<Fenced, LedgerError> {
        let update = set_position(position);
        self.with(async |connection, settings, fence| {
            // A cursor that is lost with the server's last moments is a few duplicates, not worth a flush each time.
            let moved = execute(
                connection,
                format!(
                    "set local synchronous_commit = off; \
                     update outbox.cursors set {update}, updated_at = clock_timestamp() where {}",
                    fence.holds(settings)
                ),
            )
            .await
            .context("move the cursor")?;
            Ok(fenced(moved))
        })
        .await
    }

    async fn park(&mut self, parked: &[Parked]) -> Result<Fenced, LedgerError> {
        self.with(async |connection, settings, fence| {
            parked::park(connection, settings, fence, parked).await
        })
        .await
    }

    async fn due(&mut self, rows: usize, bytes: usize) -> Result<Vec<Due>, LedgerError> {
        self.with(async |connection, settings, fence| {
            parked::due(connection, settings, fence, (rows, bytes)).await
        })
        .await
    }

    async fn resolve(&mut self, resolved: &Resolved) -> Result<Resolution, LedgerError> {
        self.with(async |connection, settings, fence| {
            parked::resolve(connection, settings, fence, resolved).await
        })
        .await
    }

    async fn skipped(&mut self, event: EventKey) -> Result<Option<String>, LedgerError> {
        self.with(async |connection, settings, _| {
            pipelines::skipped(connection, settings, event).await
        })
        .await
    }

    async fn release(&mut self, settled: bool) -> Result<(), LedgerError> {
        self.with(async |connection, settings, Fence { epoch, .. }| {
            execute(
                connection,
                format!(
                    "update outbox.leases set expires_at = '-infinity', settled = {settled} where {} and epoch = {epoch}",
                    of_shard(settings)
                ),
            )
            .await
            .context("release the lease")
        })
        .await?;
        // No lease has this epoch: what is written from now on is refused, also before somebody else takes over.
        self.fence.epoch = 0;
        if let Some(connection) = self.connection.take() {
            // The lease is released; a connection that does not close politely is closed all the same.
            connection.close().await.context("close the connection")?;
        }
        Ok(())
    }
}

/// What came of asking for the lease.
enum Taken {
    Ours(Fence, Tenure),
    Held(String, Duration),
    /// An operator has paused the pipeline.
    Paused(Pause),
    /// The log has to be adopted first.
    Restored,
    /// The pipeline has this many shards.
    Resharded(u32),
}

async fn acquire(
    connection: &mut PgConnection,
    settings: &Settings,
) -> Result<Taken, anyhow::Error> {
    if let Some(taken) = not_free(connection, settings).await? {
        return Ok(taken);
    }
    version::demand_known(connection).await?;
    if restored::is_restored(connection).await? {
        return Ok(Taken::Restored);
    }
    // Before everything that is read from here on, so that a crash in between fences us.
    let incarnation = incarnation(connection).await?;
    // Read before the lease is taken, which is a write: the floor of a pipeline that starts here (see Window::floor).
    let newest = newest_id(connection).await?;
    let shards = roster::shards(connection, settings).await?;
    if shards != settings.shard.count {
        return Ok(Taken::Resharded(shards));
    }
    let Some(epoch) = take_lease(connection, settings).await? else {
        let taken = not_free(connection, settings).await?;
        return Ok(
            taken.unwrap_or_else(|| Taken::Held("another relay".to_owned(), settings.lease_ttl))
        );
    };
    let (identity, timeline) = restored::identity(connection).await?;
    let fence = Fence {
        epoch,
        incarnation,
        system_identifier: identity,
    };
    let row = fetch_one(
        connection,
        format!(
            "select prev::text, cur::text, floor, ceiling, next_floor, last_id, system_identifier, timeline \
               from outbox.cursors where {}",
            of_shard(settings)
        ),
    )
    .await
    .context("read the cursor")?;
    let position = match stored_position(&row)? {
        Some(position) => {
            let stored: (Option<i64>, Option<i32>) = (get(&row, 6)?, get(&row, 7)?);
            ensure!(
                stored.0 == Some(identity),
                "the cursor of pipeline {} came from another cluster just now: trying again",
                settings.pipeline
            );
            if stored.1 != Some(timeline) {
                restored::promoted(connection, settings, &fence, timeline).await?;
            }
            position
        }
        None => begin(connection, settings, &fence, newest, timeline).await?,
    };
    let log = log_name(connection, settings, &fence, timeline).await?;
    let tenure = Tenure {
        position,
        log,
        held: parked::held(connection, settings).await?,
        dead_letters: parked::dead_letters(connection, settings).await?,
    };
    Ok(Taken::Ours(fence, tenure))
}

/// Writes the first cursor of a pipeline.
async fn begin(
    connection: &mut PgConnection,
    settings: &Settings,
    fence: &Fence,
    newest_before_lease: EventId,
    timeline: i32,
) -> Result<Position, anyhow::Error> {
    let position = starting_position(connection, settings.start, newest_before_lease).await?;
    let written = execute(
        connection,
        format!(
            "update outbox.cursors set {}, system_identifier = {}, timeline = {timeline} where {}",
            set_position(&position),
            fence.system_identifier,
            fence.holds(settings)
        ),
    )
    .await
    .context("write the first cursor")?;
    ensure!(
        written == 1,
        "the lease was lost while the first cursor was written"
    );
    Ok(position)
}

/// Transaction ids mean something within one life of one server; a copy of the database beside it goes its own way.
async fn log_name(
    connection: &mut PgConnection,
    settings: &Settings,
    fence: &Fence,
    timeline: i32,
) -> Result<String, anyhow::Error> {
    let row = fetch_one(
        connection,
        format!(
            "select begun || '/' || (select oid from pg_database where datname = current_database()) \
               from outbox.cursors where {}",
            of_shard(settings)
        ),
    )
    .await
    .context("read which cursor this is")?;
    let Fence {
        incarnation,
        system_identifier,
        ..
    } = fence;
    let begun: String = get(&row, 0)?;
    Ok(format!(
        "{system_identifier}/{timeline}/{incarnation}/{begun}"
    ))
}

/// Why the lease can't be taken. Asked before anything is written, so that a standby costs the database nothing but a look.
async fn not_free(
    connection: &mut PgConnection,
    settings: &Settings,
) -> Result<Option<Taken>, anyhow::Error> {
    let row = fetch_one(
        connection,
        format!(
            "select l.holder, extract(epoch from l.expires_at - clock_timestamp())::float8, {}, p.who, p.reason \
               from (values (1)) one \
               left join outbox.leases l on l.pipeline = {pipeline} and l.shard = {} \
                and l.expires_at > clock_timestamp() and l.holder <> {} \
               left join outbox.pauses p on p.pipeline = {pipeline}",
            pipelines::SINCE,
            settings.shard.index,
            literal(&settings.holder),
            pipeline = literal(settings.pipeline.as_str()),
        ),
    )
    .await
    .context("look for the lease")?;
    if let Some(holder) = get::<Option<String>>(&row, 0)? {
        let seconds: f64 = get(&row, 1)?;
        let expires_in = Duration::try_from_secs_f64(seconds).unwrap_or_default();
        return Ok(Some(Taken::Held(holder, expires_in)));
    }
    let Some(since) = get::<Option<String>>(&row, 2)? else {
        return Ok(None);
    };
    Ok(Some(Taken::Paused(Pause {
        since,
        by: get(&row, 3)?,
        reason: get(&row, 4)?,
    })))
}

async fn take_lease(
    connection: &mut PgConnection,
    settings: &Settings,
) -> Result<Option<i64>, anyhow::Error> {
    let (pipeline, holder) = (
        literal(settings.pipeline.as_str()),
        literal(&settings.holder),
    );
    let Shard { index, count } = settings.shard;
    // The cursor carries the epoch too, so that one look at its own row fences every later write. The number of shards is
    // read under a lock that whoever changes it waits for.
    let row = connection
        .fetch_optional(sqlx::raw_sql(AssertSqlSafe(in_path(&format!(
            "with known as ( \
                select shards from outbox.pipelines where pipeline = {pipeline} and shards = {count} \
                   and not exists (select from outbox.pauses p where p.pipeline = {pipeline}) for share), \
             lease as ( \
                insert into outbox.leases as l (pipeline, shard, holder, epoch, expires_at) \
                select {pipeline}, {index}, {holder}, 1, {expiry} from known \
                on conflict (pipeline, shard) do update \
                   set holder = excluded.holder, epoch = l.epoch + 1, expires_at = excluded.expires_at, settled = false \
                 where l.expires_at <= clock_timestamp() or l.holder = excluded.holder \
                returning epoch) \
             insert into outbox.cursors as c (pipeline, shard, epoch) select {pipeline}, {index}, epoch from lease \
             on conflict (pipeline, shard) do update set epoch = excluded.epoch \
             returning epoch",
            expiry = expiry(settings)
        )))))
        .await
        .context("take the lease")?;
    row.map(|row| get(&row, 0)).transpose()
}

/// Which life of the server this is; begins it if nobody has.
async fn incarnation(connection: &mut PgConnection) -> Result<Uuid, anyhow::Error> {
    execute(
        connection,
        "insert into outbox.incarnation select where not exists (select from outbox.incarnation) \
         on conflict do nothing"
            .to_owned(),
    )
    .await
    .context("mark the incarnation of the server")?;
    let row = fetch_one(
        connection,
        "select id::text from outbox.incarnation".to_owned(),
    )
    .await
    .context("read the incarnation of the server")?;
    get::<String>(&row, 0)?
        .parse()
        .context("decode the incarnation of the server")
}

async fn newest_id(connection: &mut PgConnection) -> Result<EventId, anyhow::Error> {
    let row = fetch_one(connection, format!("select {NEWEST_ID}"))
        .await
        .context("read the newest id")?;
    Ok(EventId(get(&row, 0)?))
}

/// A pipeline that does not start at the beginning starts inside of a window that ends now, so that what is in progress
/// now lies in the windows after it, however low its ids are.
async fn starting_position(
    connection: &mut PgConnection,
    start: Start,
    newest_before_lease: EventId,
) -> Result<Position, anyhow::Error> {
    let before_first = match start {
        Start::Earliest => return Ok(Position::beginning()),
        Start::Latest => NEWEST_ID.to_owned(),
        Start::Event(id) => format!("{}::bigint", id.0 - 1),
        // Read once in a pipeline's life; there is no index on the time.
        Start::Time(us) => format!(
            "coalesce((select min(id) - 1 from outbox.events \
                        where occurred_at >= timestamptz 'epoch' + {us} * interval '1 microsecond'), {NEWEST_ID})"
        ),
    };
    let row = fetch_one(
        connection,
        format!("select pg_current_snapshot()::text, {NEWEST_ID}, {before_first}"),
    )
    .await
    .context("find where to start")?;
    let before_first = EventId(get(&row, 2)?);
    let window = Window {
        cur: get::<String>(&row, 0)?.parse()?,
        floor: before_first,
        ceiling: EventId(get(&row, 1)?),
        next_floor: newest_before_lease,
        ..Window::beginning()
    };
    Ok(Position {
        window: Arc::new(window),
        last_id: before_first,
    })
}

fn stored_position(row: &PgRow) -> Result<Option<Position>, anyhow::Error> {
    let Some(prev) = get::<Option<String>>(row, 0)? else {
        return Ok(None);
    };
    let window = Window {
        prev: prev.parse()?,
        cur: get::<String>(row, 1)?.parse()?,
        floor: EventId(get(row, 2)?),
        ceiling: EventId(get(row, 3)?),
        next_floor: EventId(get(row, 4)?),
    };
    Ok(Some(Position {
        window: Arc::new(window),
        last_id: EventId(get(row, 5)?),
    }))
}

fn set_position(position: &Position) -> String {
    let Window {
        prev,
        cur,
        floor,
        ceiling,
        next_floor,
    } = &*position.window;
    let last_id = position.last_id;
    format!(
        "prev = '{prev}', cur = '{cur}', floor = {floor}, ceiling = {ceiling}, next_floor = {next_floor}, \
         last_id = {last_id}"
    )
}

fn of_shard(settings: &Settings) -> String {
    format!(
        "pipeline = {} and shard = {}",
        literal(settings.pipeline.as_str()),
        settings.shard.index
    )
}

/// Whether an entity is the shard's, as SQL over its two columns.
fn is_ours(settings: &Settings) -> String {
    let Shard { index, count } = settings.shard;
    if count == 1 {
        "true".to_owned()
    } else {
        format!("outbox.shard_of(aggregate_type, aggregate_id, {count}) = {index}")
    }
}

fn expiry(settings: &Settings) -> String {
    format!(
        "clock_timestamp() + interval '{} milliseconds'",
        settings.lease_ttl.as_millis()
    )
}

fn fenced(rows: u64) -> Fenced {
    if rows == 0 {
        Fenced::Lost
    } else {
        Fenced::Written
    }
}

/// One message that depends on no setting of session, role or database: names are those of the catalog whatever a schema of
/// the path has, and the isolation level is the one that fences and conflicts rest on.
fn in_path(statement: &str) -> String {
    format!("{BEGIN}; {statement}; commit")
}

/// See [`in_path`].
const BEGIN: &str =
    "begin isolation level read committed; set local search_path to pg_catalog, pg_temp";

/// Inside a transaction, which has begun with [`BEGIN`], the statement stands as it is.
fn of_transaction(connection: &PgConnection, statement: String) -> String {
    if connection.is_in_transaction() {
        statement
    } else {
        in_path(&statement)
    }
}

async fn execute(connection: &mut PgConnection, statement: String) -> Result<u64, anyhow::Error> {
    let statement = of_transaction(connection, statement);
    let done = connection
        .execute(sqlx::raw_sql(AssertSqlSafe(statement)))
        .await?;
    Ok(done.rows_affected())
}

async fn fetch_one(
    connection: &mut PgConnection,
    statement: String,
) -> Result<PgRow, anyhow::Error> {
    let statement = of_transaction(connection, statement);
    Ok(connection
        .fetch_one(sqlx::raw_sql(AssertSqlSafe(statement)))
        .await?)
}

/// Decodes a column whatever alias the server uses for its type.
fn get<'r, T>(row: &'r PgRow, index: usize) -> Result<T, anyhow::Error>
where
    T: sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres>,
{
    row.try_get_unchecked(index)
        .with_context(|| format!("decode column {index}"))
}
