//! What an audit found, for people and machines. Holds ids and places, never payloads or keys.

use serde::Serialize;

/// Of each kind so many are shown.
pub(super) const EXAMPLES_MAX: usize = 5;

/// What was found in every pipeline that was looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// In the order of the configuration.
    pub pipelines: Vec<PipelineReport>,
}

impl Report {
    /// Whether every promise holds, as far as it could be judged.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.pipelines.iter().all(|pipeline| pipeline.holds)
    }
}

/// What was found in one pipeline.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PipelineReport {
    /// Its name.
    pub pipeline: String,
    /// Whether every promise holds, as far as it could be judged.
    pub holds: bool,
    /// Events of the retained log that it takes.
    pub events: u64,
    /// Records that were read.
    pub records: u64,
    /// The topics that they were read from.
    pub topics: Vec<String>,
    /// Events that are in their topics.
    pub found: u64,
    /// Events that the pipeline's cursor has not passed and that are not in their topics yet.
    pub waiting: u64,
    /// Events set aside in the database, or waiting behind one that was.
    pub parked: u64,
    /// Events of the retained log that an operator gave up.
    pub dropped: u64,
    /// Removed from the log before they were published, by `retention.drop_unpublished_after` (I4).
    pub lost: Lost,
    /// What can't be known.
    pub not_judged: NotJudged,
    /// Settled and in no topic (I3, I4).
    pub missing: Finding,
    /// Delivered before an earlier event of the same entity (I2).
    pub out_of_order: Finding,
    /// With another topic, key or payload than the log asks for.
    pub altered: Finding,
    /// Never committed (I1).
    pub unknown: Finding,
    /// There more than once.
    pub doubled: Doubled,
    /// Whether a duplicate breaks no promise.
    pub duplicates_allowed: bool,
    /// What else is good to know.
    pub notes: Vec<String>,
}

/// Events that retention removed before a pipeline had published them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Lost {
    /// How many.
    pub count: u64,
    /// The newest few removals, the last one first.
    pub removals: Vec<LostEvents>,
}

/// One removal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LostEvents {
    /// Such as "ids 1200 to 1999".
    pub ids: String,
    /// How many events of these the pipeline had not published.
    pub events: u64,
    /// When, in UTC.
    pub at: String,
}

impl From<(String, i64, String)> for LostEvents {
    fn from((ids, events, at): (String, i64, String)) -> Self {
        let events = u64::try_from(events).unwrap_or_default();
        Self { ids, events, at }
    }
}

impl LostEvents {
    /// Whether one of them has this id or a later one.
    fn reaches(&self, from_id: i64) -> bool {
        let last = self.ids.rsplit(' ').next().unwrap_or_default();
        last.parse().is_ok_and(|last: i64| last >= from_id)
    }
}

impl Lost {
    /// Of all removals, the oldest first, those of events from this id on.
    pub(super) fn of(removals: Vec<LostEvents>, from_id: i64) -> Self {
        let mut removals: Vec<LostEvents> = removals
            .into_iter()
            .filter(|removal| removal.reaches(from_id))
            .collect();
        let count = removals.iter().map(|removal| removal.events).sum();
        removals.reverse();
        removals.truncate(EXAMPLES_MAX);
        Self { count, removals }
    }
}

/// What can't be known, because one side no longer has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NotJudged {
    /// Records of events that the log no longer retains.
    pub records_beyond_the_log: u64,
    /// Events so old that their topic may no longer retain them.
    pub events_beyond_the_topic: u64,
    /// Events that compaction may have removed: a later record of their key is there, or they delete it.
    pub events_compacted: u64,
    /// Events from before the pipeline's first record, where it does not start at `earliest`.
    pub events_before_the_start: u64,
    /// Records that another pipeline writes to the same topic.
    pub records_of_other_pipelines: u64,
}

/// One kind of finding.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How many.
    pub count: u64,
    /// The first few.
    pub examples: Vec<Example>,
}

impl Finding {
    pub(super) fn add(&mut self, example: impl FnOnce() -> Example) {
        self.count += 1;
        if self.examples.len() < EXAMPLES_MAX {
            self.examples.push(example());
        }
    }
}

/// Duplicates, and whether a crash explains them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Doubled {
    /// Records beyond the first of their event.
    pub count: u64,
    /// Stretches of a partition in which they come one after the other, in the order of the first time.
    pub runs: u64,
    /// Records of the longest.
    pub longest_run: u64,
    /// Those that begin further back than `relay.in_flight_events`, or are in another partition than the first: left by a
    /// replay, a cursor that was set back, or a crash while a backlog was drained or while other shards went on.
    pub beyond_reach: u64,
    /// The first few.
    pub examples: Vec<Example>,
}

/// Where something was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Example {
    /// The event's uuid.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub event_id: Option<String>,
    /// The event's place in the log.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sequence: Option<i64>,
    /// Where the record is, or should be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topic: Option<String>,
    /// The partition.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partition: Option<i32>,
    /// The offset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<i64>,
    /// What about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub what: Option<&'static str>,
}
