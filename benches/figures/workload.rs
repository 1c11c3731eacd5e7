//! Backlogs of a given shape, written by the database itself.

use std::fmt;

use anyhow::{Context, Error};
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Executor};

/// Entities of a backlog.
pub const KEYS: u32 = 10_000;
/// Every event has one of so many types, so a filter for one of them drops 90 %.
pub const EVENT_TYPES: u32 = 10;
/// What a filter lets through.
pub const EVENT_TYPE: &str = "type0";
/// The payload of the figures that name no other.
pub const PAYLOAD_BYTES: u32 = 233;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Keys {
    Uniform,
    /// The key of rank k is taken with a probability that goes with 1/k^0.99.
    Zipf,
}

/// What the events of a backlog look like. Two backlogs of one shape are the same, so they are shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Workload {
    pub events: i64,
    pub payload_bytes: u32,
    pub per_transaction: i64,
    pub keys: Keys,
    /// Aggregate types, each of which goes to a topic of its own.
    pub topics: u32,
}

impl Workload {
    pub fn of(events: i64) -> Self {
        Self {
            events,
            payload_bytes: PAYLOAD_BYTES,
            per_transaction: 100,
            keys: Keys::Uniform,
            topics: 1,
        }
    }

    /// Rows of a bare loop's select: 5,000, or about 8 MiB.
    pub fn page(&self) -> i64 {
        (8 * 1024 * 1024 / i64::from(self.payload_bytes)).clamp(1, 5000)
    }

    pub fn aggregate_types(&self) -> Vec<String> {
        (0..self.topics).map(|n| format!("event{n}")).collect()
    }

    /// Appends the events to the log, in transactions of their own, without waiting for the disk.
    pub async fn fill(&self, db: &mut PgConnection) -> Result<(), Error> {
        let Self {
            events,
            per_transaction,
            ..
        } = self;
        let row = self.row();
        db.execute("set synchronous_commit = off; set outbox.notify = off")
            .await?;
        db.execute(sqlx::raw_sql(AssertSqlSafe(format!(
            "do $$ declare first bigint := 1; begin
               while first <= {events} loop
                 insert into outbox.events (aggregate_type, aggregate_id, event_type, payload)
                 {row} from generate_series(first, least(first + {per_transaction} - 1, {events})) n;
                 commit;
                 first := first + {per_transaction};
               end loop;
             end $$"
        ))))
        .await
        .with_context(|| format!("write a backlog of {self}"))?;
        Ok(())
    }

    /// A `select` of the columns for event `n`.
    pub fn row(&self) -> String {
        self.row_of(&format!("'event' || n % {}", self.topics))
    }

    /// The same for an aggregate type, which is SQL too.
    pub fn row_of(&self, aggregate_type: &str) -> String {
        let key = match self.keys {
            Keys::Uniform => format!("(hashint8(n)::bigint & 2147483647) % {KEYS}"),
            Keys::Zipf => zipf_key(KEYS, 0.99),
        };
        format!(
            "select {aggregate_type}, ({key})::text, 'type' || n % {EVENT_TYPES}, {}",
            payload(self.payload_bytes)
        )
    }
}

/// Makes partitions from the first id on, of an empty log: those that the migration has made are for five million events.
pub async fn make_partitions(
    db: &mut PgConnection,
    partitions: i32,
    events: i64,
) -> Result<(), Error> {
    db.execute(AssertSqlSafe(format!(
        "do $$ declare name text; begin
           for name in select inhrelid::regclass::text from pg_inherits
                        where inhparent = 'outbox.events'::regclass and inhrelid <> 'outbox.events_default'::regclass
           loop execute 'drop table ' || name; end loop;
         end $$;
         select outbox.make_partitions({partitions}, {events})"
    )))
    .await
    .context("make partitions")?;
    Ok(())
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} events of {} bytes, {} per transaction, {:?} keys, {} topics",
            self.events, self.payload_bytes, self.per_transaction, self.keys, self.topics
        )
    }
}

/// A JSON payload of so many bytes for event `n`. Half of it is text that repeats and half are digits that do not, so it
/// compresses as events do: to about the half.
fn payload(bytes: u32) -> String {
    let chunks = bytes / 32 + 1;
    format!(
        "(select left('{{\"n\":' || n || ',\"state\":\"placed\",\"note\":\"' || string_agg(case when i % 2 = 0 \
         then md5(n::text || i) else 'the customer asks to ring twice ' end, ''), {}) || '\"}}' \
         from generate_series(1, {chunks}) i)::json",
        bytes.saturating_sub(2)
    )
}

/// The rank of event `n` among the keys, as SQL, by the method of Gray et al., "Quickly generating billion-record synthetic
/// databases" (1994), which YCSB uses too; the chance comes from a hash, so it is the same in every run.
fn zipf_key(keys: u32, theta: f64) -> String {
    let zeta = |n: u32| (1..=n).map(|k| f64::from(k).powf(-theta)).sum::<f64>();
    let all = zeta(keys);
    let alpha = 1.0 / (1.0 - theta);
    let eta = (1.0 - (2.0 / f64::from(keys)).powf(1.0 - theta)) / (1.0 - zeta(2) / all);
    let second = 1.0 + 0.5_f64.powf(theta);
    format!(
        "select case when u * {all} < 1 then 0 when u * {all} < {second} then 1 \
         else least(floor({keys} * ({eta} * u - {eta} + 1) ^ {alpha}), {keys} - 1)::int end \
         from (select (hashint8(n)::bigint + 2147483648)::float8 / 4294967296) z (u)"
    )
}
