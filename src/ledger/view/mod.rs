//! The books as people see them: read without a lease, whether or not a relay runs.
//!
//! Only reads, and every read is bounded by an index: looking at an outbox in trouble must not add to the trouble.

pub mod postgres;
pub mod sqlite;

use serde::{Deserialize, Serialize};

/// What the database knows about all pipelines.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Books {
    /// The newest id that the log handed out, 0 before the first.
    pub newest_id: i64,
    /// Every pipeline that ever ran, by name.
    pub pipelines: Vec<PipelineBooks>,
    /// What the log takes.
    pub log: LogSize,
    /// Where the database is a server.
    pub server: Option<Server>,
}

/// What the log takes on the disk, and how fast that grows while nothing of it is given back.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LogSize {
    /// Tables and indexes; of a SQLite outbox the whole file.
    pub bytes: u64,
    /// Age of the oldest event that is retained; none without any.
    pub oldest_seconds: Option<f64>,
    /// By the rate of the newest 100,000 ids and the average size; none without events.
    pub bytes_per_second: Option<f64>,
}

/// What the database knows about one pipeline.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PipelineBooks {
    /// Its name.
    pub pipeline: String,
    /// Which of its shards, from 0 on.
    pub shard: i32,
    /// How many it has.
    pub shards: i32,
    /// The last id up to which everything is delivered, parked or left out, but for transactions that were in progress when the
    /// log was read; none before the first cursor.
    pub last_id: Option<i64>,
    /// Ids between that and the newest: events that wait, and gaps.
    pub backlog_ids: Option<i64>,
    /// Who owns it; none when no lease is in force.
    pub owner: Option<Owner>,
    /// Since the cursor was written, which happens when something was published.
    pub cursor_age_seconds: Option<f64>,
    /// Age of the oldest event that is committed and that the cursor has not passed.
    pub oldest_unpublished_seconds: Option<f64>,
    /// Why that is not known, where it is not.
    pub oldest_unpublished_unknown: Option<String>,
    /// Events of this shard that are set aside.
    pub parked_events: i64,
    /// Their entities.
    pub parked_entities: i64,
    /// Where the cursor was written, when not in this database: a relay that takes the lease makes it fit.
    pub moved: Option<Moved>,
}

/// What waits of one shard of a pipeline: the part of its books that a relay asks for every few seconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Waiting {
    /// The pipeline.
    pub pipeline: String,
    /// Which of its shards, from 0 on.
    pub shard: i32,
    /// How many it has.
    pub shards: i32,
    /// The newest id that the log handed out.
    pub newest_id: i64,
    /// Ids between the cursor and the newest; none before the first cursor.
    pub backlog_ids: Option<i64>,
    /// Age of the oldest event that is committed and that the cursor has not passed.
    pub oldest_unpublished_seconds: Option<f64>,
    /// Why that is not known, where it is not.
    pub oldest_unpublished_unknown: Option<String>,
    /// Who owns it; none when no lease is in force.
    pub holder: Option<String>,
}

impl PipelineBooks {
    /// The pipeline, with its shard where there are several.
    #[must_use]
    pub fn name(&self) -> String {
        match self.shards {
            ..=1 => self.pipeline.clone(),
            _ => format!("{}/{}", self.pipeline, self.shard),
        }
    }
}

/// How a cursor came into a database that it does not belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Moved {
    /// From another cluster, as by a dump and restore: the transaction ids of cursor and rows mean nothing here.
    Cluster,
    /// From another timeline, as by a failover or a point-in-time restore: transaction ids may have been used again.
    Timeline,
}

/// The holder of a lease that is in force.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Owner {
    /// As the relay named itself: host, process id, random part.
    pub holder: String,
    /// Until the lease ends if it is not renewed, by the database's clock.
    pub lease_ends_in_seconds: f64,
}

/// What else is going on at the server. Nothing of it holds a relay up; it explains what a person sees there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Server {
    /// As the server writes it.
    pub version: String,
    /// A standby, whose books are a copy.
    pub in_recovery: bool,
    /// Whether this role is shown the transactions of others.
    pub sees_all_transactions: bool,
    /// The one that has been open longest, without our own.
    pub oldest_transaction: Option<OpenTransaction>,
    /// Prepared and neither committed nor rolled back.
    pub prepared_transactions: i64,
    /// Age of the oldest of them.
    pub oldest_prepared_seconds: Option<f64>,
}

/// A transaction in progress.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OpenTransaction {
    /// Since it began.
    pub seconds: f64,
    /// The server process.
    pub pid: i32,
    /// Who.
    pub user: Option<String>,
    /// In which database.
    pub database: Option<String>,
    /// What the client calls itself.
    pub application: Option<String>,
    /// `active`, `idle in transaction` …
    pub state: Option<String>,
}

fn backlog(newest_id: i64, last_id: i64) -> i64 {
    (newest_id - last_id).max(0)
}
