//! Every metric of the relay, by name. The only place where metric macros stand.
//!
//! The README's table, the dashboard and the alerts are tested against [`METRICS`]: a name that is not here does not
//! exist.

mod latency;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use metrics::{Counter, Gauge, Label};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

use self::latency::LatencyHistogram;
pub use self::latency::LatencyTally;
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
    "outbox_capture_microseconds_total",
    "time spent waiting for the database to answer reads",
);
const STARVED_TIME: Metric = counter(
    "outbox_starved_microseconds_total",
    "time in which the sink had room and no event was at hand: idle, or the source is the bottleneck",
);
const BLOCKED_TIME: Metric = counter(
    "outbox_blocked_microseconds_total",
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
    "events set aside: rejected, or waiting behind a rejected one",
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
    "dead letters that the topic for them refused too; they are stored all the same",
);
const RESTARTS: Metric = counter(
    "outbox_restarts_total",
    "times that the pipeline began again from its last position after trouble",
);
const IN_FLIGHT_EVENTS: Metric = gauge(
    "outbox_in_flight_events",
    "events handed over and not confirmed",
);
const IN_FLIGHT_BYTES: Metric = gauge("outbox_in_flight_bytes", "their bytes");
const BACKLOG: Metric = gauge(
    "outbox_backlog_ids",
    "ids between the position and the newest of the log: events that wait, and gaps",
);
const OLDEST: Metric = gauge(
    "outbox_oldest_unpublished_seconds",
    "age of the oldest event that was read and is not confirmed",
);
const WAITING: Metric = gauge(
    "outbox_waiting_entities",
    "entities that wait behind a parked event",
);
const SET_ASIDE: Metric = gauge(
    "outbox_set_aside_events",
    "events that are parked or dead letters; at parked_max the pipeline halts",
);
const OWNER: Metric = gauge("outbox_owner", "1 where this process owns the shard");
const PAUSED: Metric = gauge(
    "outbox_paused",
    "1 where an operator has paused the pipeline, as this process knows it",
);
const SHARDS: Metric = gauge("outbox_shards", "how many shards the pipeline has");
const READY: Metric = gauge(
    "outbox_ready",
    "1 while the pipeline moves or stands by, 0 while something is in its way",
);
const LATENCY: Metric = Metric {
    name: "outbox_publish_latency_seconds",
    kind: Kind::Histogram,
    meaning: "from the emit to the sink's confirmation",
};
const LOG_BYTES: Metric = gauge(
    "outbox_log_bytes",
    "what the log takes on the disk; absent until that is known",
);
const LOG_BUDGET: Metric = gauge(
    "outbox_log_budget_bytes",
    "what it may take (`retention.disk_budget`), where that is set",
);
const RETIRED: Metric = counter(
    "outbox_retired_events_total",
    "events whose space was given back, published or not",
);
const RETIRED_UNPUBLISHED: Metric = counter(
    "outbox_retired_unpublished_events_total",
    "of these, events that a pipeline had not published: lost to it, by `retention.drop_unpublished_after`",
);
const BUILD: Metric = gauge("outbox_build_info", "1, with the version as label");

/// All metrics.
pub const METRICS: [Metric; 28] = [
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
    LATENCY,
    LOG_BYTES,
    LOG_BUDGET,
    RETIRED,
    RETIRED_UNPUBLISHED,
    BUILD,
];

/// Where the metrics of this process are counted and shown.
#[derive(Clone)]
pub struct Exporter(PrometheusHandle);

impl Exporter {
    /// Takes all metrics of the process from now on.
    ///
    /// # Errors
    /// When another recorder does that.
    pub fn install() -> Result<Self, anyhow::Error> {
        let handle = PrometheusBuilder::new()
            .install_recorder()
            .context("install the metrics recorder")?;
        describe();
        Ok(Self(handle))
    }

    /// All of them in Prometheus' text format.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = self.0.render();
        latency::write(&mut text);
        text
    }
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
            Kind::Counter => metrics::describe_counter!(name, meaning),
            Kind::Gauge => metrics::describe_gauge!(name, meaning),
            // The one that there is describes itself.
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
    /// Ids between the position and the newest.
    pub backlog_ids: i64,
    /// Age of the oldest event that is not confirmed.
    pub oldest_unpublished: Duration,
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
    capture_time: Counter,
    starved_time: Counter,
    blocked_time: Counter,
    filtered: Counter,
    parked: Counter,
    redriven: Counter,
    dropped: Counter,
    letter_refused: Counter,
    restarts: Counter,
    in_flight_events: Gauge,
    in_flight_bytes: Gauge,
    backlog: Gauge,
    oldest: Gauge,
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
        Self {
            captured: counter(CAPTURED),
            pages: counter(PAGES),
            capture_time: counter(CAPTURE_TIME),
            starved_time: counter(STARVED_TIME),
            blocked_time: counter(BLOCKED_TIME),
            filtered: counter(FILTERED),
            parked: counter(PARKED),
            redriven: counter(REDRIVEN),
            dropped: counter(DROPPED),
            letter_refused: counter(LETTER_REFUSED),
            restarts: counter(RESTARTS),
            in_flight_events: gauge(IN_FLIGHT_EVENTS),
            in_flight_bytes: gauge(IN_FLIGHT_BYTES),
            backlog: gauge(BACKLOG),
            oldest: gauge(OLDEST),
            waiting: gauge(WAITING),
            set_aside: gauge(SET_ASIDE),
            owner: gauge(OWNER),
            paused: gauge(PAUSED),
            latency: LatencyHistogram::of(labels()),
            labels: all,
        }
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
        self.capture_time.increment(microseconds(took));
    }

    /// The sink had room and no event was at hand.
    pub fn starved(&self, time: Duration) {
        self.starved_time.increment(microseconds(time));
    }

    /// Events were at hand and the sink had no room.
    pub fn blocked(&self, time: Duration) {
        self.blocked_time.increment(microseconds(time));
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

    /// Whether this process owns the shard. Of one that it does not own its gauges know nothing.
    pub fn owner(&self, owner: bool) {
        self.owner.set(f64::from(u8::from(owner)));
        if !owner {
            self.levels(Levels::default());
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
            backlog_ids,
            oldest_unpublished,
            waiting_entities,
            set_aside_events,
        } = levels;
        self.in_flight_events.set(in_flight_events as f64);
        self.in_flight_bytes.set(in_flight_bytes as f64);
        self.backlog.set(backlog_ids as f64);
        self.oldest.set(oldest_unpublished.as_secs_f64());
        self.waiting.set(waiting_entities as f64);
        self.set_aside.set(set_aside_events as f64);
    }

    /// Passes on what was tallied since the last time.
    pub fn latencies(&self, tally: &mut LatencyTally) {
        self.latency.take(tally);
    }
}

/// The metrics of the log as a whole.
pub struct LogMetrics {
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
            retired: metrics::counter!(RETIRED.name),
            retired_unpublished: metrics::counter!(RETIRED_UNPUBLISHED.name),
        }
    }

    /// What it takes. Until that is known there is no such gauge: 0 would say that the log is empty.
    #[expect(clippy::cast_precision_loss, reason = "a gauge is for people")]
    pub fn size(&self, bytes: u64) {
        metrics::gauge!(LOG_BYTES.name).set(bytes as f64);
    }

    /// Events whose space was given back.
    pub fn retired(&self, events: u64, unpublished: u64) {
        self.retired.increment(events);
        self.retired_unpublished.increment(unpublished);
    }
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
