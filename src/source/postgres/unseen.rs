//! Which ids have been handed out and not been seen yet. Pure: the time is an argument.
//!
//! Of several open transactions one notifies, so that others commit without a hint. Whoever is in that case had taken its
//! ids before the one that notifies ended, and so before the look that its notification caused: as long as all ids are
//! seen that were handed out until a look, nobody has to be waited for.

use std::time::Duration;

use tokio::time::Instant;

use crate::event::EventId;

/// An id is waited for this long at least, and twice that at most: a transaction that was rolled back never shows its own.
const WAITED_FOR: Duration = Duration::from_millis(64);

/// Counts of ids, in two generations: what is still missing when the younger one gets old is not waited for any longer.
#[derive(Debug)]
pub(super) struct Unseen {
    older: i64,
    younger: i64,
    /// The ids of the older generation are above this one.
    older_after: EventId,
    /// And those of the younger one above this one.
    younger_after: EventId,
    /// The newest id that was handed out.
    ceiling: EventId,
    turned_at: Instant,
}

impl Unseen {
    /// Everything is still to be seen.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            older: 0,
            younger: 0,
            older_after: EventId(0),
            younger_after: EventId(0),
            ceiling: EventId(0),
            turned_at: now,
        }
    }

    /// A look has found these events, when `ceiling` was the newest id that had been handed out.
    pub(super) fn looked(
        &mut self,
        ceiling: EventId,
        found: impl Iterator<Item = EventId>,
        now: Instant,
    ) {
        let age = now.duration_since(self.turned_at);
        if age >= WAITED_FOR {
            self.turn();
            if age >= 2 * WAITED_FOR {
                self.turn();
            }
            self.turned_at = now;
        }
        self.younger += (ceiling.0 - self.ceiling.0).max(0);
        self.ceiling = self.ceiling.max(ceiling);
        for id in found {
            if id > self.younger_after {
                self.younger -= 1;
            } else if id > self.older_after {
                self.older -= 1;
            }
        }
    }

    /// Whether there are any.
    pub(super) fn any(&self) -> bool {
        self.older > 0 || self.younger > 0
    }

    fn turn(&mut self) {
        self.older = self.younger;
        self.older_after = self.younger_after;
        self.younger = 0;
        self.younger_after = self.ceiling;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks, each after so many milliseconds, with the newest id and the ids that are found; whether any is missing.
    fn after_looks(looks: &[(u64, i64, &[i64])]) -> Vec<bool> {
        let mut now = Instant::now();
        let mut unseen = Unseen::new(now);
        let looked = looks.iter().map(|(millis, ceiling, found)| {
            now += Duration::from_millis(*millis);
            unseen.looked(EventId(*ceiling), found.iter().copied().map(EventId), now);
            unseen.any()
        });
        looked.collect()
    }

    #[test]
    fn all_are_seen_when_each_id_was() {
        let looks: [(u64, i64, &[i64]); 4] =
            [(1, 2, &[1, 2]), (1, 2, &[]), (1, 5, &[3, 5]), (1, 5, &[4])];
        assert_eq!(after_looks(&looks), [false, false, true, false]);
    }

    #[test]
    fn what_was_rolled_back_is_forgotten() {
        let looks: [(u64, i64, &[i64]); 5] = [
            (1, 2, &[2]),
            (63, 3, &[3]),
            (32, 4, &[4]),
            (31, 5, &[5]),
            (1, 6, &[6]),
        ];
        assert_eq!(after_looks(&looks), [true, true, true, true, false]);
    }

    #[test]
    fn one_that_was_forgotten_does_not_stand_for_another() {
        let looks: [(u64, i64, &[i64]); 3] = [(1, 1, &[]), (200, 2, &[2]), (1, 3, &[1])];
        assert_eq!(after_looks(&looks), [true, false, true]);
    }

    #[test]
    fn after_a_pause_nothing_old_is_waited_for() {
        let looks: [(u64, i64, &[i64]); 3] = [(1, 9, &[]), (1000, 10, &[10]), (1, 11, &[11])];
        assert_eq!(after_looks(&looks), [true, false, false]);
    }
}
