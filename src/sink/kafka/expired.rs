//! Events that are older than their topic keeps records: the broker takes them and deletes them soon, so that a replay or an
//! import looks published and reaches no consumer.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

/// Those that come together are counted together.
const COUNT_FOR: Duration = Duration::from_secs(3);

struct Counted {
    events: u64,
    since: Instant,
    told: bool,
}

/// Counts them by topic, and tells of each topic once.
#[derive(Default)]
pub(super) struct Expired(HashMap<String, Counted>);

impl Expired {
    pub(super) fn count(&mut self, topic: &str) {
        if let Some(counted) = self.0.get_mut(topic) {
            counted.events += 1;
            return;
        }
        let counted = Counted {
            events: 1,
            since: Instant::now(),
            told: false,
        };
        self.0.insert(topic.to_owned(), counted);
    }

    /// What is to be said now.
    pub(super) fn warnings(&mut self, at_the_end: bool) -> Vec<String> {
        let due = self.0.iter_mut().filter(|(_, counted)| {
            !counted.told && (at_the_end || counted.since.elapsed() >= COUNT_FOR)
        });
        due.map(|(topic, counted)| {
            counted.told = true;
            format!(
                "{} events for topic {topic} are older than it keeps records (retention.ms): the broker deletes them soon, \
                 and consumers may never see them; raise retention.ms of the topic, then publish them again with \
                 `outbox-relay replay`",
                counted.events
            )
        })
        .collect()
    }
}
