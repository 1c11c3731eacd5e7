//! When what is handed over becomes a batch, which a sink may commit as one.

use std::time::Duration;

use tokio::time::Instant;

use super::publish::Pause;

/// While more is at hand a batch goes on: a commit costs the same for few events and for many. The first one is short, so
/// that the beginning of a backlog does not wait for it, and each goes on for twice as long as the one before.
const SHORTEST: Duration = Duration::from_millis(25);
const LONGEST: Duration = Duration::from_millis(200);

/// The records that were handed over since the last batch ended.
pub(super) struct Batch {
    /// When the first of them was.
    since: Option<Instant>,
    /// How long it goes on while there is more.
    goes_on: Duration,
}

impl Batch {
    pub(super) fn new() -> Self {
        Self {
            since: None,
            goes_on: SHORTEST,
        }
    }

    /// A record is handed over; the clock is read for the first one only.
    pub(super) fn begin(&mut self) {
        self.since.get_or_insert_with(Instant::now);
    }

    /// When it is over, whatever else comes.
    pub(super) fn until(&self) -> Option<Instant> {
        self.since.map(|since| since + self.goes_on)
    }

    /// Whether there is a batch that is over: nothing more is to come soon, or has room, or it has gone on for long enough.
    /// Then the next one begins.
    pub(super) fn ends(&mut self, pause: &Pause, more: bool, now: Instant) -> bool {
        let caught_up = matches!(pause, Pause::Starved) && !more;
        let due = self.until().is_some_and(|until| now >= until);
        if caught_up {
            self.goes_on = SHORTEST;
        } else if due {
            self.goes_on = (self.goes_on * 2).min(LONGEST);
        }
        (caught_up || due || matches!(pause, Pause::Blocked | Pause::Topic(_) | Pause::Later(_)))
            && self.since.take().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_record_there_is_no_batch() {
        let mut batch = Batch::new();
        assert_eq!(batch.until(), None);
        assert!(!batch.ends(&Pause::Starved, false, Instant::now()));
    }

    #[test]
    fn a_batch_ends_when_nothing_more_comes_or_has_room() {
        let now = Instant::now();
        for (pause, more, ends) in [
            (Pause::Starved, false, true),
            (Pause::Starved, true, false),
            (Pause::Blocked, true, true),
            (Pause::Full, true, false),
            (Pause::Turn, true, false),
        ] {
            let mut batch = Batch::new();
            batch.begin();
            assert_eq!(batch.ends(&pause, more, now), ends);
        }
    }

    #[test]
    fn batches_of_a_backlog_go_on_for_longer_and_longer() {
        let mut batch = Batch::new();
        for expected in [25, 50, 100, 200, 200] {
            batch.begin();
            assert_eq!(batch.goes_on, Duration::from_millis(expected));
            let until = batch.until().unwrap();
            assert!(!batch.ends(&Pause::Turn, true, until - Duration::from_millis(1)));
            assert!(batch.ends(&Pause::Turn, true, until));
        }
        batch.begin();
        assert!(batch.ends(&Pause::Starved, false, Instant::now()));
        assert_eq!(batch.goes_on, SHORTEST);
    }
}
