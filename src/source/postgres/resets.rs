//! Notices that ids began anew: a sequence that was set back, made anew, or never brought along with its rows. Pure.
//!
//! What is new is told by snapshots alone; the ids between which a window looks for it are a belief about how ids are
//! handed out, and a person can make that belief false. So it is tried, all the time and by what costs next to nothing: the
//! newest id must not fall; no row of a page may lie where the belief says that none can be, and each page begins a little
//! below its floor for that; ten times a second, the sequence must still be the same one and no row may lie above it. At the
//! beginning of a session, when the sequence is another one, and every 10 s all rows are asked.

use std::cmp::Reverse;
use std::time::Duration;

use tokio::time::Instant;

use super::late::Late;
use super::statement::{Belief, Tried};
use crate::event::EventId;
use crate::position::{Position, Window};

/// It is asked this often at most whether the sequence is another one.
const SEQUENCE_INTERVAL: Duration = Duration::from_millis(100);
/// All rows are asked this often.
const ROWS_INTERVAL: Duration = Duration::from_secs(10);

/// What is known of the sequence, and since when the belief was not tried.
pub(super) struct Resets {
    mark: Option<String>,
    sequence_at: Option<Instant>,
    /// What was believed then.
    same: Belief,
    /// What was believed when all rows were asked.
    tried: Belief,
    rows_at: Option<Instant>,
    /// Positions in older windows say nothing about ids that are handed out now.
    since: (u64, Reverse<usize>),
    /// How often ids began anew.
    count: u64,
}

/// What the answer to the question that opens a window means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The belief holds as far as it was tried.
    Holds,
    /// The sequence is another one: all rows have to be asked.
    Doubtful,
    /// Ids began anew.
    Reset,
}

/// An answer to that question.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) newest: EventId,
    /// Where it was asked what the sequence is.
    pub(super) mark: Option<String>,
    pub(super) contradicted: bool,
    /// Where all rows were asked; none where there is no row.
    pub(super) newest_row: Option<EventId>,
}

impl Answer {
    /// Whether rows show it, which windows that were opened before may have missed.
    pub(super) fn shows_rows(&self) -> bool {
        self.contradicted || self.newest_row.is_some_and(|row| row > self.newest)
    }
}

/// What is believed of rows that a window did not see.
pub(super) fn belief(window: &Window, late: &Late) -> Belief {
    Belief {
        snapshot: window.cur.clone(),
        floor: window.next_floor,
        late_from: late.from(window.cur.in_progress.iter().copied()),
    }
}

impl Resets {
    /// Nothing was tried since this position was written.
    pub(super) fn since(position: &Position) -> Self {
        Self {
            mark: None,
            sequence_at: None,
            same: belief(&position.window, &Late::default()),
            tried: belief(&position.window, &Late::default()),
            rows_at: None,
            since: (0, Reverse(usize::MAX)),
            count: 0,
        }
    }

    /// What the next question is to ask besides.
    pub(super) fn due(&self, now: Instant) -> Tried {
        let passed =
            |at: Option<Instant>, interval| at.is_none_or(|at| now.duration_since(at) >= interval);
        if passed(self.rows_at, ROWS_INTERVAL) {
            Tried::Rows
        } else if passed(self.sequence_at, SEQUENCE_INTERVAL) {
            Tried::Sequence
        } else {
            Tried::No
        }
    }

    /// What was believed when all rows were asked.
    pub(super) fn tried(&self) -> &Belief {
        &self.tried
    }

    /// What was believed when the sequence was the same one.
    pub(super) fn same(&self) -> &Belief {
        &self.same
    }

    /// What an answer means, when the window before ended at `before`.
    pub(super) fn judge(&mut self, tried: Tried, answer: &Answer, before: EventId) -> Verdict {
        if answer.newest < before || answer.shows_rows() {
            return Verdict::Reset;
        }
        let Some(mark) = &answer.mark else {
            return Verdict::Holds;
        };
        let another = self.mark.as_ref().is_some_and(|known| known != mark);
        if another && tried != Tried::Rows {
            return Verdict::Doubtful;
        }
        self.mark = Some(mark.clone());
        Verdict::Holds
    }

    /// The belief held, and this window was opened.
    pub(super) fn opened(&mut self, tried: Tried, window: &Window, late: &Late, now: Instant) {
        if tried == Tried::Rows {
            self.tried = belief(window, late);
            self.rows_at = Some(now);
        }
        if tried != Tried::No {
            self.same = belief(window, late);
            self.sequence_at = Some(now);
        }
    }

    /// Ids began anew, and this window looks at all of them.
    pub(super) fn began_anew(&mut self, window: &Window) {
        self.tried = belief(window, &Late::default());
        self.same = self.tried.clone();
        self.mark = None;
        self.since = window.cur.age();
        self.count += 1;
    }

    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Whether this is the window that looks at all ids, because they began anew.
    pub(super) fn looks_at_all(&self, window: &Window) -> bool {
        window.cur.age() == self.since
    }

    /// Whether what was handed out before this position was written is below what is handed out now.
    pub(super) fn covers(&self, position: &Position) -> bool {
        position.window.cur.age() >= self.since
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position(cur: &str, next_floor: i64) -> Position {
        let mut position = Position::beginning();
        let window = Window {
            cur: cur.parse().unwrap(),
            next_floor: EventId(next_floor),
            ..Window::beginning()
        };
        position.window = window.into();
        position
    }

    fn answer(newest: i64, mark: &str) -> Answer {
        Answer {
            newest: EventId(newest),
            mark: Some(mark.to_owned()),
            contradicted: false,
            newest_row: None,
        }
    }

    #[test]
    fn a_newest_id_that_falls_is_a_reset() {
        let mut resets = Resets::since(&position("10:10:", 100));
        let before = EventId(100);
        assert_eq!(
            resets.judge(Tried::No, &answer(100, "a"), before),
            Verdict::Holds
        );
        assert_eq!(
            resets.judge(Tried::No, &answer(99, "a"), before),
            Verdict::Reset
        );
    }

    #[test]
    fn another_sequence_is_looked_into_once() {
        let mut resets = Resets::since(&position("10:10:", 100));
        let before = EventId(100);
        resets.judge(Tried::Rows, &answer(100, "a"), before);
        assert_eq!(
            resets.judge(Tried::Sequence, &answer(150, "b"), before),
            Verdict::Doubtful
        );
        assert_eq!(
            resets.judge(Tried::Rows, &answer(150, "b"), before),
            Verdict::Holds
        );
        assert_eq!(
            resets.judge(Tried::Sequence, &answer(150, "b"), before),
            Verdict::Holds
        );
    }

    #[test]
    fn a_row_where_none_can_be_is_a_reset() {
        let mut resets = Resets::since(&position("10:10:", 100));
        let contradicted = Answer {
            contradicted: true,
            ..answer(150, "a")
        };
        assert_eq!(
            resets.judge(Tried::Sequence, &contradicted, EventId(100)),
            Verdict::Reset
        );
        let row_above = Answer {
            newest_row: Some(EventId(151)),
            ..answer(150, "a")
        };
        assert_eq!(
            resets.judge(Tried::Rows, &row_above, EventId(100)),
            Verdict::Reset
        );
    }

    #[test]
    fn positions_from_before_a_reset_raise_no_floor() {
        let mut resets = Resets::since(&position("10:10:", 100));
        assert!(resets.covers(&position("9:9:", 90)));
        resets.began_anew(&position("20:20:", 0).window);
        assert!(!resets.covers(&position("19:19:", 100)));
        assert!(resets.covers(&position("20:20:", 60)));
    }

    #[tokio::test(start_paused = true)]
    async fn rows_are_asked_from_where_they_were_asked_before() {
        let mut resets = Resets::since(&position("10:10:", 100));
        let now = Instant::now();
        assert_eq!(resets.due(now), Tried::Rows);
        let late = Late::default();
        resets.opened(Tried::Rows, &position("11:11:", 110).window, &late, now);
        assert_eq!(resets.due(now), Tried::No);
        resets.opened(Tried::No, &position("12:12:", 120).window, &late, now);
        assert_eq!(resets.due(now + SEQUENCE_INTERVAL), Tried::Sequence);
        assert_eq!(resets.due(now + ROWS_INTERVAL), Tried::Rows);
        assert_eq!(resets.tried().floor, EventId(110));
    }
}
