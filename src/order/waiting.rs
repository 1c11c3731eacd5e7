//! Entities of which an event is parked: their later events wait behind it.

use std::collections::HashMap;

use crate::event::{Event, EventId};

/// The first parked event of each entity that waits.
#[derive(Debug, Default)]
pub struct Waiting {
    /// Aggregate type → aggregate id → first parked event.
    entities: HashMap<String, HashMap<String, EventId>>,
}

impl Waiting {
    /// From aggregate type, aggregate id and first parked event.
    #[must_use]
    pub fn new(parked: impl IntoIterator<Item = (String, String, EventId)>) -> Self {
        let mut waiting = Self::default();
        for (aggregate_type, aggregate_id, first) in parked {
            waiting
                .entities
                .entry(aggregate_type)
                .or_default()
                .insert(aggregate_id, first);
        }
        waiting
    }

    /// Notes that an event of the entity is parked.
    pub fn park(&mut self, event: &Event) {
        let first = self
            .entities
            .entry(event.aggregate_type.to_string())
            .or_default()
            .entry(event.aggregate_id.to_string())
            .or_insert(event.id);
        *first = event.id.min(*first);
    }

    /// Whether the event has to wait: an event of its entity that precedes it (or it itself, when the log is read again)
    /// is parked. Within one entity the order of the ids is the commit order.
    #[must_use]
    pub fn holds(&self, event: &Event) -> bool {
        if self.entities.is_empty() {
            return false;
        }
        self.entities
            .get(&event.aggregate_type[..])
            .and_then(|entities| entities.get(&event.aggregate_id[..]))
            .is_some_and(|first| *first <= event.id)
    }

    /// How many entities wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entities.values().map(HashMap::len).sum()
    }

    /// Whether none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entities.is_empty()
    }
}
