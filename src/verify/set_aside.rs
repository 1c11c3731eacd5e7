//! Events that need not be in any topic, by the books. Pure.

use uuid::Uuid;

use super::expect::Fingerprint;

/// What is parked, and what operators gave up.
#[derive(Clone, Debug, Default)]
pub(super) struct SetAside {
    /// Ids, ascending.
    parked: Vec<i64>,
    /// Ascending by id.
    dropped: Vec<(i64, Fingerprint)>,
}

impl SetAside {
    /// Ids of what is parked, ids and uuids of what was dropped; both ascend by id.
    pub(super) fn new(parked: Vec<i64>, dropped: Vec<(i64, Uuid)>) -> Self {
        let dropped = dropped.into_iter();
        Self {
            parked,
            dropped: dropped.map(|(id, uuid)| (id, fingerprint(uuid))).collect(),
        }
    }

    /// How many are parked.
    pub(super) fn parked(&self) -> u64 {
        self.parked.len() as u64
    }

    pub(super) fn is_parked(&self, id: i64) -> bool {
        self.parked.binary_search(&id).is_ok()
    }

    /// By the uuid too: after a failover that lost transactions an id may be that of another event.
    pub(super) fn is_dropped(&self, id: i64, event_id: Fingerprint) -> bool {
        let first = self.dropped.partition_point(|(dropped, _)| *dropped < id);
        let same_id = self.dropped[first..].iter();
        let mut same_id = same_id.take_while(|(dropped, _)| *dropped == id);
        same_id.any(|(_, dropped)| *dropped == event_id)
    }
}

/// Of an event's uuid.
pub(super) fn fingerprint(event_id: Uuid) -> Fingerprint {
    Fingerprint::of(Some(event_id.as_bytes()))
}
