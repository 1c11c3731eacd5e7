//! Where a pipeline stands in the log: windows between two snapshots, and a place inside one.
//!
//! A [`Position`] is deterministic: the same position always yields the same events in the same order, in any process.
//! Pure; never does I/O.

use std::cmp::{Ordering, Reverse};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

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

    /// Compares snapshots of one server: the later one has a higher end, or the same and fewer in progress.
    #[must_use]
    pub fn age(&self) -> (u64, Reverse<usize>) {
        (self.xmax, Reverse(self.in_progress.len()))
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

    /// The transactions that were in progress when it began and had ended when it was opened: the only ones with events of
    /// it at or below the floor.
    pub fn ended(&self) -> impl Iterator<Item = u64> {
        let begun = self.prev.in_progress.iter().copied();
        begun.filter(|xid| self.cur.sees(*xid))
    }
}

/// Everything before this is delivered or durably parked: whole windows, and of this one the ids up to `last_id`.
///
/// Written down outside of a database it is a JSON object with the columns of the cursor; the names are not to be changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "Written", try_from = "Written")]
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

    /// Compares two positions of one pipeline in one log: `Greater` is further. Each window begins where the one before it
    /// ends, so that they follow each other as their snapshots do.
    #[must_use]
    pub fn compare(&self, other: &Self) -> Ordering {
        let place = |position: &Self| {
            let Window { prev, cur, .. } = &*position.window;
            (cur.age(), prev.age(), position.last_id)
        };
        place(self).cmp(&place(other))
    }
    /// The furthest position that none of these, of one log, has not passed yet: what is before it is before each of them.
    /// None of none.
    ///
    /// The snapshots of a server follow each other, so the earliest `prev` is behind every one of the positions. Of what
    /// lies between it and the earliest `cur` a position has passed everything if its own window begins after that, and else
    /// the ids up to its last one.
    #[must_use]
    pub fn meet(positions: &[Self]) -> Option<Self> {
        let windows = || positions.iter().map(|position| &position.window);
        let prev = windows()
            .map(|window| &window.prev)
            .min_by_key(|prev| prev.age())?;
        let cur = windows()
            .map(|window| &window.cur)
            .min_by_key(|cur| cur.age())?;
        let ceiling = windows().map(|window| window.ceiling).min()?;
        let inside = positions
            .iter()
            .filter(|position| position.window.prev.age() < cur.age());
        let window = Window {
            prev: prev.clone(),
            cur: cur.clone(),
            floor: windows().map(|window| window.floor).min()?,
            ceiling,
            next_floor: windows().map(|window| window.next_floor).min()?,
        };
        Some(Self {
            window: Arc::new(window),
            last_id: inside
                .map(|position| position.last_id)
                .min()
                .unwrap_or(ceiling),
        })
    }
}

/// A position as it is written down.
#[derive(Clone, Serialize, Deserialize)]
struct Written {
    prev: String,
    cur: String,
    floor: i64,
    ceiling: i64,
    next_floor: i64,
    last_id: i64,
}

impl From<Position> for Written {
    fn from(Position { window, last_id }: Position) -> Self {
        let Window {
            prev,
            cur,
            floor,
            ceiling,
            next_floor,
        } = &*window;
        Self {
            prev: prev.to_string(),
            cur: cur.to_string(),
            floor: floor.0,
            ceiling: ceiling.0,
            next_floor: next_floor.0,
            last_id: last_id.0,
        }
    }
}

impl TryFrom<Written> for Position {
    type Error = NotASnapshot;

    fn try_from(written: Written) -> Result<Self, NotASnapshot> {
        let Written {
            prev,
            cur,
            floor,
            ceiling,
            next_floor,
            last_id,
        } = written;
        let window = Window {
            prev: prev.parse()?,
            cur: cur.parse()?,
            floor: EventId(floor),
            ceiling: EventId(ceiling),
            next_floor: EventId(next_floor),
        };
        Ok(Self {
            window: Arc::new(window),
            last_id: EventId(last_id),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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

    /// A pipeline's way through a log: snapshots of transactions that begin and end at random, and stops in each window.
    fn way(windows: Vec<(u8, Vec<prop::sample::Index>, Vec<i64>)>) -> Vec<Position> {
        let (mut prev, mut next, mut open) = (Snapshot::nothing(), 3, Vec::new());
        let (mut floor, mut way) = (0, vec![Position::beginning()]);
        for (begun, ended, mut stops) in windows {
            for _ in 0..begun {
                open.push(next);
                next += 1;
            }
            for index in ended.iter().take(open.len()) {
                open.remove(index.index(open.len()));
            }
            // As PostgreSQL does: the end is behind the last transaction that has ended.
            let ended = (3..next).rev().find(|xid| !open.contains(xid));
            let xmax = ended.map_or(3, |xid| xid + 1).max(prev.xmax);
            let in_progress: Vec<u64> = open.iter().copied().filter(|xid| *xid < xmax).collect();
            let cur = Snapshot {
                xmin: in_progress.first().copied().unwrap_or(xmax),
                xmax,
                in_progress,
            };
            let ceiling = floor + i64::try_from(stops.len()).unwrap();
            let window = Arc::new(Window {
                prev,
                cur: cur.clone(),
                floor: EventId(0),
                ceiling: EventId(ceiling),
                next_floor: EventId(0),
            });
            // A late transaction's ids are low: a window begins below the end of the one before.
            stops.sort_unstable();
            stops.dedup();
            let inside = stops.into_iter().filter(|stop| *stop < ceiling);
            way.extend(inside.chain([ceiling]).map(|last_id| Position {
                window: window.clone(),
                last_id: EventId(last_id),
            }));
            (prev, floor) = (cur, ceiling);
        }
        way.dedup();
        way
    }

    proptest! {
        #[test]
        fn a_pipeline_only_goes_further(
            windows in prop::collection::vec(
                (0_u8..4, prop::collection::vec(any::<prop::sample::Index>(), 0..4), prop::collection::vec(0_i64..20, 0..5)),
                0..20,
            ),
        ) {
            let way = way(windows);
            for (at, position) in way.iter().enumerate() {
                for (other_at, other) in way.iter().enumerate() {
                    // Windows without a new snapshot hold nothing: between them nothing is lost or repeated.
                    let empty = |position: &Position| position.window.prev == position.window.cur;
                    if !empty(position) && !empty(other) {
                        prop_assert_eq!(position.compare(other), at.cmp(&other_at), "{:?} {:?}", position, other);
                    }
                }
                let text = serde_json::to_string(position).unwrap();
                prop_assert_eq!(&serde_json::from_str::<Position>(&text).unwrap(), position);
            }
        }
    }

    /// The snapshots of a server whose transactions begin and end at random, in the order in which they were taken.
    fn snapshots(steps: Vec<(u8, Vec<prop::sample::Index>)>) -> Vec<Snapshot> {
        let (mut next, mut open, mut end) = (3, Vec::new(), 3);
        let mut taken = vec![Snapshot::nothing()];
        for (begun, ended) in steps {
            for _ in 0..begun {
                open.push(next);
                next += 1;
            }
            for index in ended.iter().take(open.len()) {
                end = end.max(open.remove(index.index(open.len())) + 1);
            }
            let in_progress: Vec<u64> = open.iter().copied().filter(|xid| *xid < end).collect();
            taken.push(Snapshot {
                xmin: in_progress.first().copied().unwrap_or(end),
                xmax: end,
                in_progress,
            });
        }
        taken
    }

    proptest! {
        #[test]
        fn where_shards_meet_none_of_them_has_been(
            steps in prop::collection::vec((0_u8..3, prop::collection::vec(any::<prop::sample::Index>(), 0..3)), 1..12),
            shards in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0_i64..30), 1..6),
        ) {
            let taken = snapshots(steps);
            // Ids that had been given out when a snapshot was taken.
            let ceiling = |snapshot: usize| EventId(i64::try_from(snapshot).unwrap() * 3);
            let positions: Vec<Position> = shards
                .iter()
                .map(|(from, to, last_id)| {
                    let (a, b) = (from.index(taken.len()), to.index(taken.len()));
                    let (prev, cur) = (a.min(b), a.max(b));
                    let window = Window {
                        prev: taken[prev].clone(),
                        cur: taken[cur].clone(),
                        floor: ceiling(prev),
                        ceiling: ceiling(cur),
                        next_floor: ceiling(cur),
                    };
                    let last_id = EventId(*last_id).min(window.ceiling);
                    Position { window: Arc::new(window), last_id }
                })
                .collect();
            let meet = Position::meet(&positions).unwrap();
            let passed = |position: &Position, xid: u64, id: EventId| {
                let Window { prev, cur, .. } = &*position.window;
                prev.sees(xid) || (cur.sees(xid) && id <= position.last_id)
            };
            let last = taken.last().unwrap().xmax;
            for xid in 3..=last {
                for id in (0..40).map(EventId) {
                    // A transaction's ids were given out before the first snapshot that sees it.
                    let seen = (0..taken.len()).find(|n| taken[*n].sees(xid));
                    if seen.is_none_or(|n| id > ceiling(n)) {
                        continue;
                    }
                    let all = positions.iter().all(|position| passed(position, xid, id));
                    prop_assert!(!passed(&meet, xid, id) || all, "{xid} {id:?} {meet:?} {positions:?}");
                    if positions.iter().all(|position| position.window == positions[0].window) {
                        prop_assert_eq!(passed(&meet, xid, id), all, "{} {:?}", xid, id);
                    }
                }
            }
            let lags = positions.iter().all(|position| {
                meet.window.floor <= position.window.floor
                    && meet.window.next_floor <= position.window.next_floor
            });
            prop_assert!(lags);
        }
    }

    #[test]
    fn a_position_is_written_in_a_form_that_stays() {
        let window = Window {
            prev: "10:12:".parse().unwrap(),
            cur: "10:20:10,15".parse().unwrap(),
            floor: EventId(3),
            ceiling: EventId(9),
            next_floor: EventId(4),
        };
        let position = Position {
            window: Arc::new(window),
            last_id: EventId(7),
        };
        let text = r#"{"prev":"10:12:","cur":"10:20:10,15","floor":3,"ceiling":9,"next_floor":4,"last_id":7}"#;
        assert_eq!(serde_json::to_string(&position).unwrap(), text);
        assert!(serde_json::from_str::<Position>(&text.replace("10:12:", "x")).is_err());
    }
}
