//! The topics that a life knows: what was delivered to each, and which can't be used.

use std::collections::HashMap;

use metrics::Counter;
use tokio::time::{Duration, Instant};

use crate::event::Rejection;
use crate::telemetry::PipelineMetrics;

/// Topics by small numbers, with what was delivered to each since the last report.
#[derive(Default)]
pub(super) struct Topics {
    known: Vec<TopicTally>,
    indexes: HashMap<String, u32>,
    refused: HashMap<String, (Instant, Rejection)>,
}

struct TopicTally {
    delivered: u64,
    counter: Counter,
}

impl Topics {
    /// The tag of an event that goes nowhere.
    pub(super) const NONE: u32 = u32::MAX;
    /// For this long a topic that can't be used is not asked about again.
    const REFUSAL: Duration = Duration::from_secs(10);

    pub(super) fn index_of(&mut self, name: &str, metrics: &PipelineMetrics) -> u32 {
        if let Some(index) = self.indexes.get(name) {
            return *index;
        }
        let index = u32::try_from(self.known.len()).unwrap_or(Self::NONE);
        self.indexes.insert(name.to_owned(), index);
        self.known.push(TopicTally {
            delivered: 0,
            counter: metrics.delivered(name),
        });
        index
    }

    /// Whether a record was handed over to it in this life.
    pub(super) fn knows(&self, name: &str) -> bool {
        self.indexes.contains_key(name)
    }

    pub(super) fn delivered(&mut self, tag: u32) {
        if let Some(topic) = self.known.get_mut(tag as usize) {
            topic.delivered += 1;
        }
    }

    /// Passes the tallies on and returns their sum.
    pub(super) fn flush(&mut self) -> u64 {
        self.known
            .iter_mut()
            .map(|topic| {
                let delivered = std::mem::take(&mut topic.delivered);
                topic.counter.increment(delivered);
                delivered
            })
            .sum()
    }

    pub(super) fn refuse(&mut self, name: &str, rejection: Rejection) {
        self.refused
            .insert(name.to_owned(), (Instant::now(), rejection));
    }

    pub(super) fn forget_refusals(&mut self) {
        self.refused.clear();
    }

    pub(super) fn refusal(&self, name: &str) -> Option<Rejection> {
        let (at, rejection) = self.refused.get(name)?;
        (at.elapsed() < Self::REFUSAL).then(|| rejection.clone())
    }
}
