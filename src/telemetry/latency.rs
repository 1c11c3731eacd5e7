//! How long events take, as a histogram for Prometheus.
//!
//! Those of the exporter keep each sample, 16 bytes with a reading of the clock, until somebody asks or sweeps: at 350,000
//! events a second 25 MiB in five seconds, and then a sweep that holds up everything. Here an event is an addition.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use metrics::{Key, Label};
use metrics_exporter_prometheus::{LabelSet, formatting};

use super::LATENCY;

/// The upper bounds of the buckets, in microseconds.
const BOUNDS_US: [i64; 16] = [
    1_000,
    2_000,
    3_000,
    5_000,
    10_000,
    20_000,
    50_000,
    100_000,
    200_000,
    500_000,
    1_000_000,
    2_000_000,
    5_000_000,
    10_000_000,
    60_000_000,
    3_600_000_000,
];
/// With what is above the last bound.
const BUCKETS: usize = BOUNDS_US.len() + 1;

/// Latencies since they were passed on last.
#[derive(Debug, Default)]
pub struct LatencyTally {
    counts: [u64; BUCKETS],
    sum_us: u64,
}

impl LatencyTally {
    /// One event that took this long, in microseconds; none where the writer's clock is ahead.
    pub fn add(&mut self, us: i64) {
        let bucket = BOUNDS_US.partition_point(|bound| *bound < us);
        self.counts[bucket] += 1;
        self.sum_us += u64::try_from(us).unwrap_or(0);
    }
}

/// Those of one shard of a pipeline since the process began.
#[derive(Debug, Default)]
pub(super) struct LatencyHistogram {
    counts: [AtomicU64; BUCKETS],
    sum_us: AtomicU64,
}

/// As the recorder of all other metrics does, this outlives whoever counts.
static HISTOGRAMS: Mutex<BTreeMap<Vec<Label>, Arc<LatencyHistogram>>> = Mutex::new(BTreeMap::new());

impl LatencyHistogram {
    /// The one with these labels.
    pub(super) fn of(labels: Vec<Label>) -> Arc<Self> {
        let mut all = HISTOGRAMS.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(labels).or_default().clone()
    }

    /// Takes what was tallied.
    pub(super) fn take(&self, tally: &mut LatencyTally) {
        let LatencyTally { counts, sum_us } = std::mem::take(tally);
        for (all, count) in self.counts.iter().zip(counts) {
            if count > 0 {
                all.fetch_add(count, Ordering::Relaxed);
            }
        }
        self.sum_us.fetch_add(sum_us, Ordering::Relaxed);
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "Prometheus counts in floating point"
    )]
    fn write(&self, text: &mut String, labels: &LabelSet) {
        let name = LATENCY.name;
        let mut events = 0;
        for (at, count) in self.counts.iter().enumerate() {
            events += count.load(Ordering::Relaxed);
            let bound = BOUNDS_US.get(at).map(|us| *us as f64 / 1e6);
            let le = bound.map_or("+Inf".to_owned(), |seconds| seconds.to_string());
            let bucket = Some("bucket");
            formatting::write_metric_line(
                text,
                name,
                bucket,
                labels,
                Some(("le", le)),
                events,
                None,
            );
        }
        let sum = self.sum_us.load(Ordering::Relaxed) as f64 / 1e6;
        let none: Option<(&str, &str)> = None;
        formatting::write_metric_line(text, name, Some("sum"), labels, none, sum, None);
        formatting::write_metric_line(text, name, Some("count"), labels, none, events, None);
    }
}

/// Writes all of them in Prometheus' text format.
#[expect(
    clippy::default_trait_access,
    reason = "the type is one of the exporter's dependencies"
)]
pub(super) fn write(text: &mut String) {
    let all = HISTOGRAMS.lock().unwrap_or_else(PoisonError::into_inner);
    formatting::write_help_line(text, LATENCY.name, None, None, LATENCY.meaning);
    formatting::write_type_line(text, LATENCY.name, None, None, "histogram");
    for (labels, histogram) in &*all {
        let key = Key::from_parts(LATENCY.name, labels.clone());
        let labels = LabelSet::from_key_and_global(&key, &Default::default());
        histogram.write(text, &labels);
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_event_counts_in_its_bucket_and_with_its_own_time() {
        let labels = vec![Label::new("pipeline", "tallied")];
        let mut tally = LatencyTally::default();
        for us in [-5, 0, 1_000, 1_001, 4_000, 7_200_000_000] {
            tally.add(us);
        }
        LatencyHistogram::of(labels.clone()).take(&mut tally);
        tally.add(500);
        LatencyHistogram::of(labels).take(&mut tally);
        let mut text = String::new();
        write(&mut text);
        let ours: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("outbox_publish_latency_seconds"))
            .filter_map(|line| line.split_once("pipeline=\"tallied\""))
            .map(|(_, rest)| rest)
            .collect();
        assert_eq!(
            &ours[..5],
            [
                ",le=\"0.001\"} 4",
                ",le=\"0.002\"} 5",
                ",le=\"0.003\"} 5",
                ",le=\"0.005\"} 6",
                ",le=\"0.01\"} 6",
            ]
        );
        assert_eq!(
            &ours[15..],
            [",le=\"3600\"} 6", ",le=\"+Inf\"} 7", "} 7200.006501", "} 7",]
        );
    }
}
