//! Who is there for a pipeline, and how many shards it has: `outbox.members`, `outbox.pipelines`.
//!
//! A member says now and then that it is there, and sees who else is and who owns what. How the shards are spread is each
//! member's own conclusion from that; what keeps two of them apart is the lease, as ever.

use std::fmt::Write;
use std::time::Duration;

use anyhow::Context;
use serde::Deserialize;
use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{AssertSqlSafe, Connection, Executor};
use tokio::time::timeout;

use super::{
    BEGIN, Connector, LedgerError, Settings, execute, fetch_one, get, in_path, literal, restored,
    set_position, stored_position,
};
use crate::event::PipelineName;
use crate::position::{Position, Snapshot, Window};
use crate::source::postgres::ask;

/// For one statement of the roster.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// What one look at a pipeline shows.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Crew {
    /// Its name.
    pub pipeline: String,
    /// How many shards it has.
    pub shards: u32,
    /// The relays that are there, in the order in which they came.
    pub members: Vec<Member>,
    /// Its leases, by shard.
    pub leases: Vec<Lease>,
}

/// A relay that is there.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Member {
    /// As leases name it.
    pub holder: String,
    /// How many shards it is told to make.
    pub shards: u32,
}

/// The lease of a shard.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Lease {
    /// Whoever owns the shard; none when the lease is not in force.
    pub holder: Option<String>,
    /// Nobody has owned the shard since its cursor was exact.
    pub settled: bool,
}

/// The roster as one process keeps it, for all of its pipelines.
pub struct Roster {
    connector: Connector,
    connection: Option<PgConnection>,
    holder: String,
    lease_ttl: Duration,
    /// Its pipelines, and how many shards each is to have.
    pipelines: Vec<(PipelineName, u32)>,
}

impl Roster {
    /// A roster that connects when it is first used.
    #[must_use]
    pub fn new(
        connector: impl Into<Connector>,
        holder: String,
        lease_ttl: Duration,
        pipelines: Vec<(PipelineName, u32)>,
    ) -> Self {
        Self {
            connector: connector.into(),
            connection: None,
            holder,
            lease_ttl,
            pipelines,
        }
    }

    /// Looks who is there and who owns what; with `beat` says first that this process is. In the order of its pipelines.
    ///
    /// # Errors
    /// When the database can't be asked.
    pub async fn look(&mut self, beat: bool) -> Result<Vec<Crew>, LedgerError> {
        let statement = self.statement(beat);
        let mut connection = self.connected().await?;
        let crews: Vec<Crew> = ask::change(&mut connection, &statement, ANSWER_MAX)
            .await
            .context("look who else is there")?;
        self.connection = Some(connection);
        let in_order = self.pipelines.iter().map(|(name, _)| {
            let found = crews.iter().find(|crew| crew.pipeline == name.as_str());
            found
                .cloned()
                .with_context(|| format!("pipeline {name} is not registered"))
        });
        Ok(in_order.collect::<Result<_, _>>()?)
    }

    fn statement(&self, beat: bool) -> String {
        let holder = literal(&self.holder);
        let names: Vec<String> = self
            .pipelines
            .iter()
            .map(|(name, _)| literal(name.as_str()))
            .collect();
        let mut statement = String::new();
        if beat {
            // Gone before its leases are, so that whoever takes these over counts without it.
            let ends = format!(
                "clock_timestamp() + interval '{} milliseconds'",
                self.lease_ttl.as_millis() * 2 / 3
            );
            let rows: Vec<String> = names
                .iter()
                .zip(&self.pipelines)
                .map(|(name, (_, shards))| format!("({name}, {holder}, {shards}, {ends})"))
                .collect();
            for (name, shards) in &self.pipelines {
                statement += &register(name, *shards);
            }
            let _ = write!(
                statement,
                "insert into outbox.members (pipeline, holder, shards, expires_at) values {} \
                 on conflict (pipeline, holder) do update \
                    set shards = excluded.shards, expires_at = excluded.expires_at; \
                 delete from outbox.members where expires_at < clock_timestamp() - interval '1 minute'; ",
                rows.join(", ")
            );
        }
        statement
            + &format!(
                "select coalesce(json_agg(crew), '[]')::text from ( \
                    select p.pipeline, p.shards, \
                           (select coalesce(json_agg(json_build_object('holder', m.holder, 'shards', m.shards) \
                                                     order by m.joined_at, m.holder), '[]') \
                              from outbox.members m \
                             where m.pipeline = p.pipeline and m.expires_at > clock_timestamp()) as members, \
                           (select json_agg(json_build_object( \
                                      'holder', case when l.expires_at > clock_timestamp() then l.holder end, \
                                      'settled', coalesce(l.settled, false)) order by s.shard) \
                              from generate_series(0, p.shards - 1) s (shard) \
                              left join outbox.leases l on l.pipeline = p.pipeline and l.shard = s.shard) as leases \
                      from outbox.pipelines p where p.pipeline in ({})) crew",
                names.join(", ")
            )
    }

    /// Says that this process is gone, so that nobody counts on it.
    ///
    /// # Errors
    /// When the database can't be asked; the others find out by themselves.
    pub async fn leave(&mut self) -> Result<(), LedgerError> {
        let statement = format!(
            "delete from outbox.members where holder = {}",
            literal(&self.holder)
        );
        let mut connection = self.connected().await?;
        let left = connection.execute(sqlx::raw_sql(AssertSqlSafe(in_path(&statement))));
        timeout(ANSWER_MAX, left)
            .await
            .context("no answer from the database")?
            .context("leave the roster")?;
        connection.close().await.context("close the connection")?;
        Ok(())
    }

    /// Gives a pipeline another number of shards, if everybody who is there wants that and every shard was given back
    /// settled. Says whether it did; each new shard goes on where the old ones of its entities stood.
    ///
    /// # Errors
    /// When the answer is unknown; it is then seen at the next look.
    pub async fn reshard(
        &mut self,
        pipeline: &PipelineName,
        shards: u32,
    ) -> Result<bool, LedgerError> {
        let mut connection = self.connected().await?;
        if restored::is_restored(&mut connection).await? {
            restored::adopt(&self.connector).await?;
            return Ok(false);
        }
        let changed = timeout(
            self.lease_ttl,
            reshard(&mut connection, pipeline, &self.holder, shards),
        )
        .await
        .context("no answer from the database")??;
        self.connection = Some(connection);
        Ok(changed)
    }

    async fn connected(&mut self) -> Result<PgConnection, anyhow::Error> {
        match self.connection.take() {
            Some(connection) => Ok(connection),
            None => self.connector.connect().await,
        }
    }
}

/// SQL that notes a pipeline which nobody knows yet, with cursors for all of its shards: nothing is dropped from the log
/// before each of them has begun.
fn register(pipeline: &PipelineName, shards: u32) -> String {
    let pipeline = literal(pipeline.as_str());
    format!(
        "insert into outbox.pipelines (pipeline, shards) \
         select {pipeline}, {shards} where not exists (select from outbox.pipelines where pipeline = {pipeline}) \
         on conflict do nothing; \
         insert into outbox.cursors (pipeline, shard) \
         select p.pipeline, s.shard from outbox.pipelines p cross join generate_series(0, p.shards - 1) s (shard) \
          where p.pipeline = {pipeline} \
            and not exists (select from outbox.cursors c where c.pipeline = p.pipeline and c.shard = s.shard) \
         on conflict do nothing; "
    )
}

/// How many shards the pipeline has: as many as the settings say, if nobody knows it yet.
pub(super) async fn shards(
    connection: &mut PgConnection,
    settings: &Settings,
) -> Result<u32, anyhow::Error> {
    let name = literal(settings.pipeline.as_str());
    let row = fetch_one(
        connection,
        format!(
            "{}select shards from outbox.pipelines where pipeline = {name}",
            register(&settings.pipeline, settings.shard.count)
        ),
    )
    .await
    .context("ask how many shards the pipeline has")?;
    Ok(u32::try_from(get::<i32>(&row, 0)?)?)
}

async fn reshard(
    connection: &mut PgConnection,
    pipeline: &PipelineName,
    holder: &str,
    shards: u32,
) -> Result<bool, anyhow::Error> {
    let mut transaction = connection.begin_with(BEGIN).await.context("begin")?;
    let changed = change(&mut transaction, pipeline, holder, shards).await?;
    // Dropped, it would keep its locks until the connection is used again.
    let ended = if changed {
        transaction.commit().await
    } else {
        transaction.rollback().await
    };
    ended.context("end the transaction")?;
    Ok(changed)
}

async fn change(
    transaction: &mut PgConnection,
    pipeline: &PipelineName,
    holder: &str,
    shards: u32,
) -> Result<bool, anyhow::Error> {
    let name = literal(pipeline.as_str());
    // Whoever takes a lease meanwhile waits, and finds that its shard is not what it was.
    let row = fetch_one(
        transaction,
        format!(
            "select shards, generation from outbox.pipelines where pipeline = {name} for update"
        ),
    )
    .await
    .context("lock the pipeline")?;
    let (before, generation): (i32, i64) = (get(&row, 0)?, get(&row, 1)?);
    let row = fetch_one(
        transaction,
        format!(
            "select (select count(*) from outbox.leases \
                      where pipeline = {name} and settled and expires_at <= clock_timestamp()) = {before} \
                and not exists (select from outbox.leases where pipeline = {name} and expires_at > clock_timestamp()) \
                and not exists (select from outbox.members \
                                 where pipeline = {name} and shards <> {shards} and expires_at > clock_timestamp()), \
                    (select coalesce(max(epoch), 0) + 1 from outbox.leases where pipeline = {name})"
        ),
    )
    .await
    .context("look whether the shards are given back")?;
    let (free, epoch): (bool, i64) = (get(&row, 0)?, get(&row, 1)?);
    if !free || u32::try_from(before)? == shards {
        return Ok(false);
    }
    let Some(stood) = stood(transaction, &name, usize::try_from(before)?).await? else {
        // Somebody deleted a cursor; its shard has to begin first.
        return Ok(false);
    };
    let start = Position::meet(&stood).context("a pipeline without a shard")?;
    forget_former(transaction, &name, &start).await?;
    let mut statements = String::new();
    if stood.iter().any(|position| *position != start) {
        for (shard, Position { window, last_id }) in stood.iter().enumerate() {
            let Window { prev, cur, .. } = &**window;
            let _ = write!(
                statements,
                "insert into outbox.former_cursors (pipeline, generation, shards, shard, prev, cur, last_id) \
                 values ({name}, {generation}, {before}, {shard}, '{prev}', '{cur}', {last_id}); "
            );
        }
    }
    let (identity, timeline) = restored::identity(transaction).await?;
    let _ = write!(
        statements,
        "delete from outbox.cursors where pipeline = {name}; delete from outbox.leases where pipeline = {name}; \
         insert into outbox.leases (pipeline, shard, holder, epoch, expires_at, settled) \
         select {name}, shard, {holder}, {epoch}, '-infinity', true from generate_series(0, {shards} - 1) shard; \
         insert into outbox.cursors (pipeline, shard, epoch, system_identifier, timeline) \
         select {name}, shard, {epoch}, {identity}, {timeline} from generate_series(0, {shards} - 1) shard; \
         update outbox.cursors set {position} where pipeline = {name}; \
         update outbox.pipelines set shards = {shards}, generation = generation + 1 where pipeline = {name}",
        holder = literal(holder),
        position = set_position(&start),
    );
    execute(transaction, statements)
        .await
        .context("change the number of shards")?;
    Ok(true)
}

/// Where the shards of a pipeline stand; none unless there are so many that have begun.
async fn stood(
    connection: &mut PgConnection,
    name: &str,
    shards: usize,
) -> Result<Option<Vec<Position>>, anyhow::Error> {
    let cursors = connection
        .fetch_all(sqlx::raw_sql(AssertSqlSafe(format!(
            "select prev::text, cur::text, floor, ceiling, next_floor, last_id from outbox.cursors \
              where pipeline = {name} order by shard"
        ))))
        .await
        .context("read the cursors")?;
    let positions: Vec<Option<Position>> = cursors
        .iter()
        .map(stored_position)
        .collect::<Result<_, _>>()?;
    let positions: Option<Vec<Position>> = positions.into_iter().collect();
    Ok(positions.filter(|positions| positions.len() == shards))
}

/// Former cursors are needed as long as a window may begin before the end of theirs.
async fn forget_former(
    connection: &mut PgConnection,
    name: &str,
    start: &Position,
) -> Result<(), anyhow::Error> {
    let rows: Vec<PgRow> = connection
        .fetch_all(sqlx::raw_sql(AssertSqlSafe(format!(
            "select generation, shard, cur::text from outbox.former_cursors where pipeline = {name}"
        ))))
        .await
        .context("read the former cursors")?;
    for row in rows {
        let cur: Snapshot = get::<String>(&row, 2)?.parse()?;
        if cur.age() > start.window.prev.age() {
            continue;
        }
        let (generation, shard): (i64, i32) = (get(&row, 0)?, get(&row, 1)?);
        execute(
            connection,
            format!(
                "delete from outbox.former_cursors \
                  where pipeline = {name} and generation = {generation} and shard = {shard}"
            ),
        )
        .await
        .context("forget a former cursor")?;
    }
    Ok(())
}
