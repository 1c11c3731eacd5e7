//! Events that need not be in any topic, by the books. Pure.

use uuid::Uuid;

use super::expect::Fingerprint;

/// What is parked, and what operators gave up.
#[derive(Clone, Debug, Default)]
pub(super) struct SetAside {
    /// Ascending by id.
    parked: Vec<(i64, Fingerprint)>,
    /// Ascending by id.
    dropped: Vec<(i64, Fingerprint)>,
}

impl SetAside {
    /// Ids and uuids of what is parked and of what was dropped; both ascend by id.
    pub(super) fn new(parked: Vec<(i64, Uuid)>, dropped: Vec<(i64, Uuid)>) -> Self {
        let events = |events: Vec<(i64, Uuid)>| {
            let events = events.into_iter();
            events.map(|(id, uuid)| (id, fingerprint(uuid))).collect()
        };
        Self {
            parked: events(parked),
            dropped: events(dropped),
        }
    }

    /// How many are parked.
    pub(super) fn parked(&self) -> u64 {
        self.parked.len() as u64
    }

    pub(super) fn is_parked(&self, id: i64, event_id: Fingerprint) -> bool {
        is_among(&self.parked, id, event_id)
    }

    pub(super) fn is_dropped(&self, id: i64, event_id: Fingerprint) -> bool {
        is_among(&self.dropped, id, event_id)
    }
}

/// By the uuid too: after a failover that lost transactions, or a reset of the sequence, an id may be that of another event.
fn is_among(events: &[(i64, Fingerprint)], id: i64, event_id: Fingerprint) -> bool {
    let first = events.partition_point(|(known, _)| *known < id);
    let mut same_id = events[first..].iter().take_while(|(known, _)| *known == id);
    same_id.any(|(_, known)| *known == event_id)
}

/// Of an event's uuid.
pub(super) fn fingerprint(event_id: Uuid) -> Fingerprint {
    Fingerprint::of(Some(event_id.as_bytes()))
}
