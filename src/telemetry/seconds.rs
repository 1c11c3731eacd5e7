//! Counters of time, in seconds, as Prometheus wants them. (… → *here*)
//!
//! The recorder of the other metrics counts whole numbers only. Here microseconds are counted and seconds are shown.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use metrics::{Key, Label};
use metrics_exporter_prometheus::{LabelSet, formatting};

use super::Metric;

/// One of them, since the process began.
#[derive(Debug, Default)]
pub(super) struct SecondsCounter(AtomicU64);

type Counters = BTreeMap<&'static str, (&'static str, BTreeMap<Vec<Label>, Arc<SecondsCounter>>)>;

/// By name, with the meaning. As the recorder of all other metrics does, this outlives whoever counts.
static COUNTERS: Mutex<Counters> = Mutex::new(BTreeMap::new());

impl SecondsCounter {
    /// The one with this name and these labels.
    pub(super) fn of(metric: Metric, labels: Vec<Label>) -> Arc<Self> {
        let mut all = COUNTERS.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, counters) = all
            .entry(metric.name)
            .or_insert_with(|| (metric.meaning, BTreeMap::new()));
        counters.entry(labels).or_default().clone()
    }

    pub(super) fn add(&self, time: Duration) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.0.fetch_add(us, Ordering::Relaxed);
    }

    fn seconds(&self) -> f64 {
        Duration::from_micros(self.0.load(Ordering::Relaxed)).as_secs_f64()
    }
}

/// Writes all of them in Prometheus' text format.
pub(super) fn write(text: &mut String) {
    let all = COUNTERS.lock().unwrap_or_else(PoisonError::into_inner);
    for (name, (meaning, counters)) in &*all {
        formatting::write_help_line(text, name, None, None, meaning);
        formatting::write_type_line(text, name, None, None, "counter");
        for (labels, counter) in counters {
            let key = Key::from_parts(*name, labels.clone());
            let labels = LabelSet::from_key_and_global(&key, &<_>::default());
            let none: Option<(&str, &str)> = None;
            formatting::write_metric_line(text, name, None, &labels, none, counter.seconds(), None);
        }
        text.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_second_are_shown() {
        let metric = super::super::counter("any_seconds_total", "any time");
        let counter = SecondsCounter::of(metric, vec![Label::new("a", "b")]);
        counter.add(Duration::from_millis(1_250));
        counter.add(Duration::from_millis(250));
        let mut text = String::new();
        write(&mut text);
        let expected = "# HELP any_seconds_total any time\n# TYPE any_seconds_total counter\n\
                        any_seconds_total{a=\"b\"} 1.5\n";
        assert!(text.contains(expected), "{text}");
    }
}
