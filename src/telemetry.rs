//! Every metric of the relay, by name. The only place where metric macros stand.
//!
//! The README's table, the dashboard and the alerts are tested against [`METRICS`]: a name that is not here does not
//! exist.

mod latency;
mod process;
mod seconds;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use metrics::{Counter, Gauge, Label};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

use self::latency::LatencyHistogram;
pub use self::latency::LatencyTally;
use self::seconds::SecondsCounter;
use crate::event::Shard;

/// A metric's name, kind and meaning.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// As Prometheus sees it.
    pub name: &'static str,
    /// Counter, gauge or histogram.
    pub kind: Kind,
    /// For people.
    pub meaning: &'static str,
}

/// The kinds of metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts by size.
    Histogram,
}

const fn counter(name: &'static str, meaning: &'static str) -> Metric {
    Metric {
        name,
        kind: Kind::Counter,
        meaning,
    }
}

const fn gauge(name: &'static str, meaning: &'static str) -> Metric {
    Metric {
        name,
        kind: Kind::Gauge,
        meaning,
    }
}

const CAPTURED: Metric = counter(
    "outbox_captured_events_total",
    "events read from the outbox",
);
const PAGES: Metric = counter(
    "outbox_captured_pages_total",
    "reads of the outbox, empty ones included",
);
const CAPTURE_TIME: Metric = counter(
    "outbox_capture_seconds_total",
    "time spent waiting for the database to answer reads of the outbox",
);
const STARVED_TIME: Metric = counter(
    "outbox_starved_seconds_total",
    "time in which the sink had room and no event was at hand: idle, or the source is the bottleneck",
);
const BLOCKED_TIME: Metric = counter(
    "outbox_blocked_seconds_total",
    "time in which events were at hand and the sink had no room: the sink is the bottleneck",
);
const FILTERED: Metric = counter(
    "outbox_filtered_events_total",
    "events that the pipeline's filter left out",
);
const DELIVERED: Metric = counter(
    "outbox_delivered_events_total",
    "events confirmed by the sink, by topic",
);
const PARKED: Metric = counter(
    "outbox_parked_events_total",
    "events set aside (parked): rejected, or waiting behind a rejected one",
);
const REDRIVEN: Metric = counter(
    "outbox_redriven_events_total",
    "parked events that were published after all",
);
const DROPPED: Metric = counter(
    "outbox_dropped_events_total",
    "events given up: rejected where the policy is to drop, or dropped by an operator",
);
const LETTER_REFUSED: Metric = counter(
    "outbox_dead_letters_refused_total",
    "copies of dead letters that the topic for dead letters refused; the events are stored in the database all the same",
);
const RESTARTS: Metric = counter(
    "outbox_restarts_total",
    "times that the pipeline began again from its last position after trouble",
);
const IN_FLIGHT_EVENTS: Metric = gauge(
    "outbox_in_flight_events",
    "events handed over to the sink and not confirmed; absent where this process does not own the shard",
);
const IN_FLIGHT_BYTES: Metric = gauge(
    "outbox_in_flight_bytes",
    "bytes of the events handed over to the sink and not confirmed; absent where this process does not own the shard",
);
const BACKLOG: Metric = gauge(
    "outbox_backlog_ids",
    "ids between the cursor and the newest of the log: events of all shards that wait, and gaps; each shard of a pipeline \
     counts the same ids, so take the largest and not the sum; asked of the database every 5 s, absent where it is not known",
);
const OLDEST: Metric = gauge(
    "outbox_oldest_unpublished_seconds",
    "age of the oldest committed event that is not confirmed, 0 without one; asked of the database every 5 s, absent where it \
     is not known",
);
const WAITING: Metric = gauge(
    "outbox_waiting_entities",
    "entities that wait behind a parked event; absent where this process does not own the shard",
);
const SET_ASIDE: Metric = gauge(
    "outbox_set_aside_events",
    "events that are parked or dead letters, at parked_max the pipeline halts; absent where this process does not own the shard",
);
const OWNER: Metric = gauge(
    "outbox_owner",
    "1 where this process owns the shard, else 0",
);
const PAUSED: Metric = gauge(
    "outbox_paused",
    "1 where an operator has paused the pipeline, as this process knows it",
);
const SHARDS: Metric = gauge("outbox_shards", "how many shards the pipeline has");
const READY: Metric = gauge(
    "outbox_ready",
    "1 while the pipeline moves or stands by, 0 while something is in its way",
);
const HALTED: Metric = gauge(
    "outbox_halted",
    "1 while the pipeline has halted and waits for a person (`on_rejected = \"halt\"`, or parked_max is reached), else 0",
);
const LATENCY: Metric = Metric {
    name: "outbox_publish_latency_seconds",
    kind: Kind::Histogram,
    meaning: "time from the emit of an event to the confirmation of the sink",
};
const LOG_BYTES: Metric = gauge(
    "outbox_log_bytes",
    "what the outbox takes on the disk, with its indexes; absent where the database does not say",
);
const LOG_BUDGET: Metric = gauge(
    "outbox_log_budget_bytes",
    "what the outbox may take on the disk (`retention.disk_budget`); absent where that is not set",
);
const RETIRED: Metric = counter(
    "outbox_retired_events_total",
    "events that retention removed from the outbox, published or not",
);
const RETIRED_UNPUBLISHED: Metric = counter(
    "outbox_retired_unpublished_events_total",
    "events that retention removed before every pipeline had published them: lost, by `retention.drop_unpublished_after`",
);
const BUILD: Metric = gauge(
    "outbox_build_info",
    "1, with the version of outbox-relay as label",
);

/// All metrics.
pub const METRICS: [Metric; 29] = [
    CAPTURED,
    PAGES,
    CAPTURE_TIME,
    STARVED_TIME,
    BLOCKED_TIME,
    FILTERED,
    DELIVERED,
    PARKED,
    REDRIVEN,
    DROPPED,
    LETTER_REFUSED,
    RESTARTS,
    IN_FLIGHT_EVENTS,
    IN_FLIGHT_BYTES,
    BACKLOG,
    OLDEST,
    WAITING,
    SET_ASIDE,
    OWNER,
    PAUSED,
    SHARDS,
    READY,
    HALTED,
    LATENCY,
    LOG_BYTES,
    LOG_BUDGET,
    RETIRED,
    RETIRED_UNPUBLISHED,
    BUILD,
];

/// Where the metrics of this process are counted and shown.
#[derive(Clone)]
pub struct Exporter {
    handle: PrometheusHandle,
    began_us: i64,
}

impl Exporter {
    /// Takes all metrics of the process from now on; `now_us` is the wall clock, in microseconds since the Unix epoch.
    ///
    /// # Errors
    /// When another recorder does that.
    pub fn install(now_us: i64) -> Result<Self, anyhow::Error> {
        let handle = PrometheusBuilder::new()
            .install_recorder()
            .context("install the metrics recorder")?;
        describe();
        Ok(Self {
            handle,
            began_us: now_us,
        })
    }

    /// All of them in Prometheus' text format.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = known(&self.handle.render());
        latency::write(&mut text);
        seconds::write(&mut text);
        process::write(&mut text, self.began_us);
        text
    }
}

/// The value of a gauge that is not known. Such a gauge is not shown: a false 0 would keep alerts silent.
const UNKNOWN: f64 = f64::NAN;

/// Leaves out the gauges whose value is not known.
fn known(text: &str) -> String {
    let lines = text.lines().filter(|line| !line.ends_with(" NaN"));
    lines.flat_map(|line| [line, "\n"]).collect()
}

/// Tells the recorder what each metric means.
#[expect(clippy::disallowed_macros, reason = "the one place that names metrics")]
fn describe() {
    for Metric {
        name,
        kind,
        meaning,
    } in METRICS
    {
        match kind {
            // Those in seconds describe themselves, as the histogram does.
            Kind::Counter if name.ends_with("_seconds_total") => {}
            Kind::Counter => metrics::describe_counter!(name, meaning),
            Kind::Gauge => metrics::describe_gauge!(name, meaning),
            Kind::Histogram => {}
        }
    }
    metrics::gauge!(BUILD.name, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
}

/// What a pipeline's gauges show.
#[derive(Clone, Copy, Debug, Default)]
pub struct Levels {
    /// Events handed over and not confirmed.
    pub in_flight_events: usize,
    /// Their bytes.
    pub in_flight_bytes: usize,
    /// Entities behind a parked event.
    pub waiting_entities: usize,
    /// Events that are parked or dead letters.
    pub set_aside_events: usize,
}

/// Whether a pipeline moves or stands by. Set from its status when the metrics are asked for: most of what is in its way
/// ends the life that reports the other gauges, and a standby has none.
#[expect(clippy::disallowed_macros, reason = "the one place that names metrics")]
pub fn ready(pipeline: &str, ready: bool) {
    metrics::gauge!(READY.name, "pipeline" => pipeline.to_owned()).set(f64::from(u8::from(ready)));
}

/// Whether a pipeline has halted; from its status, as whether it is ready.
#[expect(clippy::disallowed_macros, reason = "the one place that names metrics")]
pub fn halted(pipeline: &str, halted: bool) {
    metrics::gauge!(HALTED.name, "pipeline" => pipeline.to_owned())
        .set(f64::from(u8::from(halted)));
}

/// How many shards a pipeline has.
#[expect(clippy::disallowed_macros, reason = "the one place that names metrics")]
pub fn shards(pipeline: &str, shards: u32) {
    metrics::gauge!(SHARDS.name, "pipeline" => pipeline.to_owned()).set(f64::from(shards));
}

/// The metrics of one shard of a pipeline, looked up once: no look-up per event.
pub struct PipelineMetrics {
    labels: Vec<Label>,
    captured: Counter,
    pages: Counter,
    capture_time: Arc<SecondsCounter>,
    starved_time: Arc<SecondsCounter>,
    blocked_time: Arc<SecondsCounter>,
    filtered: Counter,
    parked: Counter,
    redriven: Counter,
    dropped: Counter,
    letter_refused: Counter,
    restarts: Counter,
    in_flight_events: Gauge,
    in_flight_bytes: Gauge,
    waiting: Gauge,
    set_aside: Gauge,
    owner: Gauge,
    paused: Gauge,
    latency: Arc<LatencyHistogram>,
}

#[expect(clippy::disallowed_macros, reason = "the one place that names metrics")]
impl PipelineMetrics {
    /// Those of one shard of the pipeline with this name.
    #[must_use]
    pub fn new(pipeline: &str, shard: Shard) -> Self {
        let all = vec![
            Label::new("pipeline", pipeline.to_owned()),
            Label::new("shard", shard.index.to_string()),
        ];
        let labels = || all.clone();
        let counter = |metric: Metric| metrics::counter!(metric.name, labels());
        let gauge = |metric: Metric| metrics::gauge!(metric.name, labels());
        let metrics = Self {
            captured: counter(CAPTURED),
            pages: counter(PAGES),
            capture_time: SecondsCounter::of(CAPTURE_TIME, labels()),
            starved_time: SecondsCounter::of(STARVED_TIME, labels()),
            blocked_time: SecondsCounter::of(BLOCKED_TIME, labels()),
            filtered: counter(FILTERED),
            parked: counter(PARKED),
            redriven: counter(REDRIVEN),
            dropped: counter(DROPPED),
            letter_refused: counter(LETTER_REFUSED),
            restarts: counter(RESTARTS),
            in_flight_events: gauge(IN_FLIGHT_EVENTS),
            in_flight_bytes: gauge(IN_FLIGHT_BYTES),
            waiting: gauge(WAITING),
            set_aside: gauge(SET_ASIDE),
            owner: gauge(OWNER),
            paused: gauge(PAUSED),
            latency: LatencyHistogram::of(labels()),
            labels: all,
        };
        metrics.owner(false);
        metrics
    }

    /// The counter of what is delivered to one topic.
    pub fn delivered(&self, topic: &str) -> Counter {
        let mut labels = self.labels.clone();
        labels.push(Label::new("topic", topic.to_owned()));
        metrics::counter!(DELIVERED.name, labels)
    }

    /// One read of the outbox.
    pub fn captured(&self, events: usize, took: Duration) {
        self.pages.increment(1);
        self.captured.increment(events as u64);
        self.capture_time.add(took);
    }

    /// The sink had room and no event was at hand.
    pub fn starved(&self, time: Duration) {
        self.starved_time.add(time);
    }

    /// Events were at hand and the sink had no room.
    pub fn blocked(&self, time: Duration) {
        self.blocked_time.add(time);
    }

    /// Events that the filter left out.
    pub fn filtered(&self, events: u64) {
        self.filtered.increment(events);
    }

    /// Events set aside.
    pub fn parked(&self, events: usize) {
        self.parked.increment(events as u64);
    }

    /// Parked events that were published after all.
    pub fn redriven(&self, events: u64) {
        self.redriven.increment(events);
    }

    /// Events that were given up.
    pub fn dropped(&self, events: u64) {
        self.dropped.increment(events);
    }

    /// A dead letter that its topic refused.
    pub fn dead_letter_refused(&self) {
        self.letter_refused.increment(1);
    }

    /// The pipeline begins again.
    pub fn restarted(&self) {
        self.restarts.increment(1);
    }

    /// Whether this process owns the shard. Of one that it does not own its gauges know nothing, and show nothing.
    pub fn owner(&self, owner: bool) {
        self.owner.set(f64::from(u8::from(owner)));
        if !owner {
            for gauge in [
                &self.in_flight_events,
                &self.in_flight_bytes,
                &self.waiting,
                &self.set_aside,
            ] {
                gauge.set(UNKNOWN);
            }
        }
    }

    /// Whether an operator has paused the pipeline, as this process knows it.
    pub fn paused(&self, paused: bool) {
        self.paused.set(f64::from(u8::from(paused)));
    }

    /// The gauges, together.
    #[expect(clippy::cast_precision_loss, reason = "a gauge is for people")]
    pub fn levels(&self, levels: Levels) {
        let Levels {
            in_flight_events,
            in_flight_bytes,
            waiting_entities,
            set_aside_events,
        } = levels;
        self.in_flight_events.set(in_flight_events as f64);
        self.in_flight_bytes.set(in_flight_bytes as f64);
        self.waiting.set(waiting_entities as f64);
        self.set_aside.set(set_aside_events as f64);
    }

    /// Passes on what was tallied since the last time.
    pub fn latencies(&self, tally: &mut LatencyTally) {
        self.latency.take(tally);
    }
}

/// How much of one shard waits.
pub struct BacklogMetrics {
    ids: Gauge,
    oldest: Gauge,
}

#[expect(clippy::disallowed_macros, reason = "the one place that names metrics")]
impl BacklogMetrics {
    /// Of one shard of the pipeline with this name; nothing is known yet.
    #[must_use]
    pub fn new(pipeline: &str, shard: u32) -> Self {
        let labels = vec![
            Label::new("pipeline", pipeline.to_owned()),
            Label::new("shard", shard.to_string()),
        ];
        let gauges = Self {
            ids: metrics::gauge!(BACKLOG.name, labels.clone()),
            oldest: metrics::gauge!(OLDEST.name, labels),
        };
        gauges.set(None);
        gauges
    }

    /// Ids that wait and the age of the oldest event in seconds, each as far as it is known.
    #[expect(clippy::cast_precision_loss, reason = "a gauge is for people")]
    pub fn set(&self, known: Option<(Option<i64>, Option<f64>)>) {
        let (ids, oldest_seconds) = known.unwrap_or_default();
        self.ids.set(ids.map_or(UNKNOWN, |ids| ids as f64));
        self.oldest.set(oldest_seconds.unwrap_or(UNKNOWN));
    }
}

/// The metrics of the log as a whole.
pub struct LogMetrics {
    bytes: Gauge,
    retired: Counter,
    retired_unpublished: Counter,
}

#[expect(clippy::disallowed_macros, reason = "the one place that names metrics")]
impl LogMetrics {
    /// With what the log may take.
    #[expect(clippy::cast_precision_loss, reason = "a gauge is for people")]
    #[must_use]
    pub fn new(budget_bytes: Option<u64>) -> Self {
        if let Some(bytes) = budget_bytes {
            metrics::gauge!(LOG_BUDGET.name).set(bytes as f64);
        }
        Self {
            bytes: {
                let bytes = metrics::gauge!(LOG_BYTES.name);
                bytes.set(UNKNOWN);
                bytes
            },
            retired: metrics::counter!(RETIRED.name),
            retired_unpublished: metrics::counter!(RETIRED_UNPUBLISHED.name),
        }
    }

    /// What it takes, if that is known.
    #[expect(clippy::cast_precision_loss, reason = "a gauge is for people")]
    pub fn size(&self, bytes: Option<u64>) {
        self.bytes.set(bytes.map_or(UNKNOWN, |bytes| bytes as f64));
    }

    /// Events whose space was given back.
    pub fn retired(&self, events: u64, unpublished: u64) {
        self.retired.increment(events);
        self.retired_unpublished.increment(unpublished);
    }
}

#[cfg(test)]
mod tests {
    use super::known;

    #[test]
    fn a_gauge_that_is_not_known_is_not_shown() {
        let text = "# TYPE a gauge\na{b=\"NaN\"} 0\na{b=\"c\"} NaN\n\n# TYPE d gauge\nd NaN\n";
        assert_eq!(
            known(text),
            "# TYPE a gauge\na{b=\"NaN\"} 0\n\n# TYPE d gauge\n"
        );
    }
}
