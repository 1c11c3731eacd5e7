//! Where a pipeline stands in the log: windows between two snapshots, and a place inside one.
//!
//! A [`Position`] is deterministic: the same position always yields the same events in the same order, in any process.
//! Pure; never does I/O.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::event::EventId;

/// PostgreSQL's `pg_snapshot`: which transactions had ended when it was taken.
///
/// Source: PostgreSQL documentation, "Transaction ID and Snapshot Information Functions".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// All below had ended.
    pub xmin: u64,
    /// All from here on had not ended.
    pub xmax: u64,
    /// Those in between that were in progress, ascending.
    pub in_progress: Vec<u64>,
}

impl Snapshot {
    /// Sees nothing: what a pipeline that starts at the beginning has seen.
    #[must_use]
    pub fn nothing() -> Self {
        // 1:1: is the smallest that PostgreSQL accepts; ordinary transactions start at 3.
        Self {
            xmin: 1,
            xmax: 1,
            in_progress: Vec::new(),
        }
    }

    /// Whether the transaction had ended when the snapshot was taken.
    #[must_use]
    pub fn sees(&self, xid: u64) -> bool {
        xid < self.xmin || (xid < self.xmax && self.in_progress.binary_search(&xid).is_err())
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:", self.xmin, self.xmax)?;
        for (n, xid) in self.in_progress.iter().enumerate() {
            if n > 0 {
                f.write_str(",")?;
            }
            xid.fmt(f)?;
        }
        Ok(())
    }
}

/// A text that is not `xmin:xmax:xid,xid,…` in ascending order.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a snapshot: {0:?}")]
pub struct NotASnapshot(String);

impl FromStr for Snapshot {
    type Err = NotASnapshot;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let mut parts = text.split(':');
            let xmin: u64 = parts.next()?.parse().ok()?;
            let xmax: u64 = parts.next()?.parse().ok()?;
            let list = parts.next()?;
            if parts.next().is_some() || xmin == 0 || xmax < xmin {
                return None;
            }
            let in_progress = list
                .split(',')
                .filter(|_| !list.is_empty())
                .map(|xid| xid.parse().ok().filter(|xid| (xmin..xmax).contains(xid)))
                .collect::<Option<Vec<u64>>>()?;
            in_progress.is_sorted_by(|a, b| a < b).then_some(Self {
                xmin,
                xmax,
                in_progress,
            })
        };
        parse().ok_or_else(|| NotASnapshot(text.to_owned()))
    }
}

/// The events visible in `cur` and not in `prev`, with ids in bounds that make finding them cheap.
///
/// A log with one writer (SQLite) needs no snapshots: its windows are the ids in `floor < id <= ceiling`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// What was published before this window.
    pub prev: Snapshot,
    /// What is published after it.
    pub cur: Snapshot,
    /// No transaction at or above `prev.xmax` owns an id at or below this one. May lag, must not lead.
    pub floor: EventId,
    /// No event visible in `cur` has an id above this one.
    pub ceiling: EventId,
    /// The floor of the window that follows, whose `prev` is this `cur`.
    pub next_floor: EventId,
}

impl Window {
    /// The window before the first: everything is still to come.
    #[must_use]
    pub fn beginning() -> Self {
        Self {
            prev: Snapshot::nothing(),
            cur: Snapshot::nothing(),
            floor: EventId(0),
            ceiling: EventId(0),
            next_floor: EventId(0),
        }
    }
}

/// Everything before this is delivered or durably parked: whole windows, and of this one the ids up to `last_id`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    /// The window that is being read.
    pub window: Arc<Window>,
    /// The last id of it that is done with; the window's ceiling when all of it is.
    pub last_id: EventId,
}

impl Position {
    /// Before the first event of the log.
    #[must_use]
    pub fn beginning() -> Self {
        Self {
            window: Arc::new(Window::beginning()),
            last_id: EventId(0),
        }
    }

    /// Whether the window has nothing left.
    #[must_use]
    pub fn at_end_of_window(&self) -> bool {
        self.last_id >= self.window.ceiling
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_read_as_it_is_written() {
        for text in ["1:1:", "10:20:", "10:20:10,14,19"] {
            assert_eq!(text.parse::<Snapshot>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "", "1", "1:2", "0:1:", "2:1:", "1:5:5", "1:5:3,2", "1:5:2,2", "1:5:x", "1:5:2:",
            "-1:5:",
        ] {
            assert_eq!(
                text.parse::<Snapshot>(),
                Err(NotASnapshot(text.to_owned())),
                "{text}"
            );
        }
    }

    #[test]
    fn a_snapshot_sees_what_had_ended() {
        let snapshot: Snapshot = "10:20:12,15".parse().unwrap();
        let seen: Vec<u64> = (8..22).filter(|xid| snapshot.sees(*xid)).collect();
        assert_eq!(seen, [8, 9, 10, 11, 13, 14, 16, 17, 18, 19]);
        assert!(!Snapshot::nothing().sees(3));
    }
}
