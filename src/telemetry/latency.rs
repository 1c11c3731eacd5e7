//! How long events take, as a histogram for Prometheus. (… → sink → receipt → *here*)
//!
//! Keeps counts, never samples, whatever the rate.
//!
//! Those of the exporter keep each sample, 16 bytes with a reading of the clock, until somebody asks or sweeps: at 350,000
//! events a second 25 MiB in five seconds, and then a sweep over all of them. Here an event is an addition.

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
    sum_us: f64,
}

impl LatencyTally {
    /// One event that took this long, in microseconds; less than nothing, where the writer's clock is ahead, is nothing.
    #[expect(
        clippy::cast_precision_loss,
        reason = "Prometheus counts in floating point"
    )]
    pub fn add(&mut self, us: i64) {
        let bucket = BOUNDS_US.partition_point(|bound| *bound < us);
        self.counts[bucket] += 1;
        // Writers may say any time: a few from the beginning of the calendar are more than 64 bits of microseconds.
        self.sum_us += us.max(0) as f64;
    }
}

/// Those of one shard of a pipeline since the process began.
#[derive(Debug, Default)]
pub(super) struct LatencyHistogram {
    counts: [AtomicU64; BUCKETS],
    /// The bits of a floating-point number.
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
        let add = |bits| Some((f64::from_bits(bits) + sum_us).to_bits());
        // It has always a next value.
        let _ = self
            .sum_us
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
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
        let sum = f64::from_bits(self.sum_us.load(Ordering::Relaxed)) / 1e6;
        let none: Option<(&str, &str)> = None;
        formatting::write_metric_line(text, name, Some("sum"), labels, none, sum, None);
        formatting::write_metric_line(text, name, Some("count"), labels, none, events, None);
    }
}

/// Writes all of them in Prometheus' text format.
pub(super) fn write(text: &mut String) {
    let all = HISTOGRAMS.lock().unwrap_or_else(PoisonError::into_inner);
    formatting::write_help_line(text, LATENCY.name, None, None, LATENCY.meaning);
    formatting::write_type_line(text, LATENCY.name, None, None, "histogram");
    for (labels, histogram) in &*all {
        let key = Key::from_parts(LATENCY.name, labels.clone());
        let labels = LabelSet::from_key_and_global(&key, &<_>::default());
        histogram.write(text, &labels);
    }
    text.push('\n');
}

#[cfg(test)]
#[expect(clippy::cast_precision_loss, reason = "as above")]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn every_event_counts_in_its_bucket_and_with_its_own_time() {
        let histogram = LatencyHistogram::default();
        let mut tally = LatencyTally::default();
        for us in [-5, 0, 1_000, 1_001, 4_000, 7_200_000_000] {
            tally.add(us);
        }
        histogram.take(&mut tally);
        tally.add(500);
        histogram.take(&mut tally);
        let key = Key::from_parts("any", vec![Label::new("pipeline", "a\\b\"c")]);
        let labels = LabelSet::from_key_and_global(&key, &<_>::default());
        let mut text = String::new();
        histogram.write(&mut text, &labels);
        expect![[r#"
            outbox_publish_latency_seconds_bucket{pipeline="a\\b\"c",le="0.001"} 4
            outbox_publish_latency_seconds_bucket{pipeline="a\\b\"c",le="0.002"} 5
            outbox_publish_latency_seconds_bucket{pipeline="a\\b\"c",le="0.003"} 5
            outbox_publish_latency_seconds_bucket{pipeline="a\\b\"c",le="0.005"} 6
            outbox_publish_latency_seconds_bucket{pipeline="a\\b\"c",le="0.01"} 6
            outbox_publish_latency_seconds_bucket{pipeline="a\\b\"c",le="0.02"} 6
            outbox_publish_latency_seconds_bucket{pipeline="a\\b\"c",le="0.05"} 6
            outbox_publish_latency_seconds_bucket{pipeline="a\\b\"c",le="0.1"} 6
            outbox_publish_latency_seconds_bucket{pipeline="a\\b\"c",le="0.2"} 6
            outbox_publish_latency_seconds_bucket{pipeline="a\\b\"c",le="0.5"} 6
            outbox_publish_latency_seconds_bucket{pipeline="a\\b\"c",le="1"} 6
            outbox_publish_latency_seconds_bucket{pipeline="a\\b\"c",le="2"} 6
            outbox_publish_latency_seconds_bucket{pipeline="a\\b\"c",le="5"} 6
            outbox_publish_latency_seconds_bucket{pipeline="a\\b\"c",le="10"} 6
            outbox_publish_latency_seconds_bucket{pipeline="a\\b\"c",le="60"} 6
            outbox_publish_latency_seconds_bucket{pipeline="a\\b\"c",le="3600"} 6
            outbox_publish_latency_seconds_bucket{pipeline="a\\b\"c",le="+Inf"} 7
            outbox_publish_latency_seconds_sum{pipeline="a\\b\"c"} 7200.006501
            outbox_publish_latency_seconds_count{pipeline="a\\b\"c"} 7
        "#]]
        .assert_eq(&text);
    }

    /// Writers may say any time.
    #[test]
    fn the_sum_does_not_overflow() {
        let histogram = LatencyHistogram::default();
        let mut tally = LatencyTally::default();
        for _ in 0..3 {
            tally.add(i64::MAX);
            histogram.take(&mut tally);
        }
        let sum = f64::from_bits(histogram.sum_us.load(Ordering::Relaxed));
        assert!((sum / i64::MAX as f64 - 3.0).abs() < 1e-9, "{sum}");
    }
}
