//! The books as people see them: read without a lease, whether or not a relay runs.
//!
//! Only reads, and every read is bounded by an index: looking at an outbox in trouble must not add to the trouble.

pub mod postgres;
pub mod sqlite;

use serde::{Deserialize, Serialize};

use super::Pause;

/// What the database knows about all pipelines.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Books {
    /// The newest id that the log handed out, 0 before the first.
    pub newest_id: i64,
    /// Every pipeline that ever ran, by name.
    pub pipelines: Vec<PipelineBooks>,
    /// The relays that are there, as they say themselves. A file has no such list.
    pub relays: Vec<LiveRelay>,
    /// What the log takes.
    pub log: LogSize,
    /// What keeps the log from being shorter.
    pub retained: Retained,
    /// Where the database is a server.
    pub server: Option<Server>,
}

/// A relay that runs, owner or standby.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LiveRelay {
    /// As leases name it.
    pub holder: String,
    /// The pipelines of its configuration.
    pub pipelines: Vec<String>,
}

/// What the log takes on the disk, and how fast that grows while nothing of it is given back.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LogSize {
    /// Tables and indexes; of a SQLite outbox the whole file.
    pub bytes: u64,
    /// Age of the oldest event that is retained: what its `occurred_at` says, within the bounds that the samples of the log
    /// set; none without any.
    pub oldest_seconds: Option<f64>,
    /// How fast it grows; none where the log was observed for less than an hour.
    pub growth: Option<Growth>,
}

/// What came in during a time of an hour to about a day.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Growth {
    /// How long that was.
    pub observed_seconds: f64,
    /// Ids that were handed out.
    pub ids: i64,
    /// What an event takes with its indexes, on average; the space of empty tables is left out.
    pub bytes_per_event: f64,
}

impl Growth {
    /// What comes in.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a forecast is for people")]
    pub fn bytes_per_second(&self) -> f64 {
        self.ids as f64 * self.bytes_per_event / self.observed_seconds.max(1.0)
    }
}

/// What there is to know of events that are retained, and of those that were lost.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Retained {
    /// The event with the lowest id.
    pub first: Option<FirstRetained>,
    /// Since the last sample of the log was noted; none before the first.
    pub sampled_seconds_ago: Option<f64>,
    /// Constraints that refer to the log, as `name of table`.
    pub foreign_keys: Vec<String>,
    /// What `retention.drop_unpublished_after` has cost within the last seven days.
    pub lost: Vec<LostEvents>,
}

/// Why the event with the lowest id is there.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FirstRetained {
    /// Its id.
    pub id: i64,
    /// It is committed for this long at least, by the database's clock; none where no sample tells.
    pub at_least_seconds: Option<f64>,
    /// Of that, for this long as relays have counted.
    pub counted_seconds: Option<f64>,
    /// Pipelines whose cursor has not passed it.
    pub held_by: Vec<String>,
    /// Whether it is parked and its content is only here.
    pub parked: bool,
    /// Replays that have still to read it.
    pub replays: Vec<i64>,
}

/// Events that a pipeline lost to retention.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LostEvents {
    /// The pipeline.
    pub pipeline: String,
    /// How many.
    pub events: i64,
    /// Since the last of them was removed.
    pub seconds_ago: f64,
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
    /// Of these, the dead letters: they hold no entity.
    pub dead_letters: i64,
    /// That an operator has paused it.
    pub paused: Option<Pause>,
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
