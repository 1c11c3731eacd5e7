//! Keeps room in the log: partitions are made ahead of the newest id, and events that are old and published leave.
//!
//! Never stands in the way of writers or of the relay: an insert that fits no partition goes to the default one, and an event
//! that stays too long costs space only. So trouble is logged and tried again. Beside the flow, on connections of its own.
//!
//! # What an event's age is told by
//!
//! Writers set `occurred_at`, so it tells nothing. Every fortieth of `retention.keep` the relay notes a *sample*: which
//! events are committed now, and how many seconds its own clock, which nobody can set, has counted so far. An event that a
//! sample of `keep` ago has is at least `keep` old; one that committed later, whatever its id, is in no such sample. Time
//! during which no relay runs counts as the database's clock has it, up to a fortieth of `keep`, and that much is added to
//! `keep`: a clock that is set forth removes nothing early, and a relay that was away for long removes late.
//!
//! While a relay runs, a published event is gone when it is `keep` and a tenth of it old, or two looks after `keep` where
//! that is longer.

mod outlived;
pub mod postgres;
pub mod sqlite;

use std::time::Duration;

use tokio::time::Instant;

pub use self::outlived::Outlived;

use crate::event::PipelineName;

/// How long events are kept.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Published events stay at least this long; none: for ever.
    pub keep: Option<Duration>,
    /// Events that a pipeline has not published go when they are older than this; none: never.
    pub drop_unpublished_after: Option<Duration>,
    /// What the log may take, in bytes; for the forecast only.
    pub disk_budget_bytes: Option<u64>,
    /// Between two looks.
    pub interval: Duration,
    /// Events per partition.
    pub partition_events: u64,
    /// Partitions that lie wholly beyond the newest id.
    pub partitions_ahead: u32,
    /// These have to have published an event before it goes, also while they have no cursor yet.
    pub pipelines: Vec<PipelineName>,
}

/// Samples of this many for the time that events are kept.
const SAMPLES: u32 = 40;

/// A sample is noted this often where events are kept for ever: for the forecast.
const SPACING_MAX: Duration = Duration::from_hours(6);

/// Rows that are looked at in one transaction: no writer of a SQLite file waits longer than for these.
const ROWS_AT_ONCE: i64 = 5_000;

/// Transactions that delete rows in one look: what is left goes in the next.
const BATCHES_MAX: usize = 200;

impl Settings {
    /// Between two samples.
    fn spacing(&self) -> Duration {
        let keep = self.keep.unwrap_or(Duration::MAX);
        (keep / SAMPLES).clamp(Duration::from_millis(1), SPACING_MAX)
    }

    /// Samples that are older than this are not needed.
    fn longest(&self) -> Duration {
        let keep = self.keep.unwrap_or_default();
        keep.max(self.drop_unpublished_after.unwrap_or_default())
    }
}

/// The seconds that relays have counted, and when this one was told.
#[derive(Clone, Copy, Debug)]
struct Counted {
    seconds: f64,
    at: Instant,
}

impl Counted {
    /// To be asked before the question is sent.
    fn elapsed(self) -> f64 {
        self.at.elapsed().as_secs_f64()
    }
}

/// Events that left.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Gone {
    first_id: i64,
    last_id: i64,
    events: u64,
    /// Of these, by one pipeline or more.
    unpublished: u64,
    /// Pipelines that had not published them.
    lost_to: Vec<String>,
}

impl Gone {
    /// Says that events were lost, where they were.
    fn tell_loss(&self) {
        let Self {
            first_id,
            last_id,
            events: _,
            unpublished,
            lost_to,
        } = self;
        if *unpublished > 0 {
            tracing::error!(
                first_id,
                last_id,
                unpublished,
                pipelines = lost_to.join(", "),
                "removed events that these pipelines had NOT published: they are older than \
                 retention.drop_unpublished_after; `outbox-relay acts` keeps the ids. Find out why the pipelines stand with \
                 `outbox-relay status`, or set retention.drop_unpublished_after = \"never\", before more are lost"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_lie_a_fortieth_of_the_time_apart() {
        let settings = |keep| Settings {
            keep,
            drop_unpublished_after: None,
            disk_budget_bytes: None,
            interval: Duration::from_mins(1),
            partition_events: 1,
            partitions_ahead: 1,
            pipelines: Vec::new(),
        };
        for (keep, spacing) in [
            (Some(Duration::from_hours(40)), Duration::from_hours(1)),
            (Some(Duration::from_secs(1)), Duration::from_millis(25)),
            (Some(Duration::ZERO), Duration::from_millis(1)),
            (Some(Duration::from_hours(24 * 365)), SPACING_MAX),
            (None, SPACING_MAX),
        ] {
            assert_eq!(settings(keep).spacing(), spacing, "{keep:?}");
        }
    }
}
