//! Where the events of transactions that commit late can lie. Pure.

use std::collections::BTreeMap;

use crate::event::EventId;
use crate::position::Window;

/// Of transactions in progress, ids below which they have none.
///
/// A transaction that had not begun when a window did owns no id at or below the floor of that window, and one that is seen
/// in progress for the first time in it had not. Of those that were in progress before the first window nothing is known.
#[derive(Default)]
pub(super) struct Late {
    from: BTreeMap<u64, EventId>,
}

impl Late {
    /// What a window tells of the transactions that are in progress at its end. To be told of all windows one after the other.
    pub(super) fn learn(&mut self, window: &Window) {
        let in_progress = &window.cur.in_progress;
        self.from
            .retain(|xid, _| in_progress.binary_search(xid).is_ok());
        let new = in_progress.partition_point(|xid| *xid < window.prev.xmax);
        let new = in_progress[new..].iter().copied();
        self.from.extend(new.map(|xid| (xid, window.floor)));
    }

    /// The id above which all the events of these transactions lie; 0 if nothing is known of one of them.
    pub(super) fn from(&self, xids: impl Iterator<Item = u64>) -> EventId {
        let known = |xid| self.from.get(&xid).copied().unwrap_or(EventId(0));
        xids.map(known).min().unwrap_or(EventId(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(prev: &str, cur: &str, floor: i64) -> Window {
        Window {
            prev: prev.parse().unwrap(),
            cur: cur.parse().unwrap(),
            floor: EventId(floor),
            ..Window::beginning()
        }
    }

    #[test]
    fn a_transaction_keeps_the_floor_under_which_it_was_first_seen() {
        let mut late = Late::default();
        late.learn(&window("10:12:10", "10:14:10,13", 100));
        assert_eq!(late.from([13].into_iter()), EventId(100));
        assert_eq!(late.from([10].into_iter()), EventId(0), "older than this");
        late.learn(&window("10:14:10,13", "13:17:13,16", 200));
        assert_eq!(late.from([13].into_iter()), EventId(100));
        assert_eq!(late.from([16].into_iter()), EventId(200));
        assert_eq!(late.from([13, 16].into_iter()), EventId(100));
        late.learn(&window("13:17:13,16", "16:17:16", 300));
        assert_eq!(late.from([13].into_iter()), EventId(0), "it has ended");
    }
}
