//! Entities of which an event is parked: their later events wait behind it.

use std::collections::HashMap;

use crate::event::{Event, EventId, HeldEntity};

/// Every entity that waits.
#[derive(Debug, Default)]
pub struct Waiting {
    /// Aggregate type → aggregate id → its parked events.
    entities: HashMap<String, HashMap<String, Held>>,
    /// Of all entities.
    events: usize,
    /// The newest event that was ever parked here.
    newest: EventId,
    /// Something was parked since the last [`pass`](Self::pass).
    may_pass: bool,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    first: EventId,
    last: EventId,
    events: usize,
    /// The cursor has passed one of them: whatever comes out of the log is later, whatever its id. After the sequence was
    /// reset a later event has a lower id.
    is_passed: bool,
    /// Events from the first to the last may come out of the log again.
    may_come_again: bool,
    /// The last of them has come since the log is read from where it is read now.
    is_read: bool,
}

impl Waiting {
    /// What is parked already.
    #[must_use]
    pub fn new(held: impl IntoIterator<Item = HeldEntity>) -> Self {
        let mut waiting = Self::default();
        for entity in held {
            let HeldEntity {
                aggregate_type,
                aggregate_id,
                first,
                last,
                events,
                is_passed,
            } = entity;
            waiting.events += events;
            waiting.newest = waiting.newest.max(last);
            let of_type = waiting.entities.entry(aggregate_type).or_default();
            of_type.insert(
                aggregate_id,
                Held {
                    first,
                    last,
                    events,
                    is_passed,
                    may_come_again: true,
                    is_read: true,
                },
            );
        }
        waiting
    }

    fn held(&self, event: &Event) -> Option<&Held> {
        if self.entities.is_empty() {
            return None;
        }
        self.entities
            .get(&event.aggregate_type[..])?
            .get(&event.aggregate_id[..])
    }

    /// Notes that an event of the entity is parked. Within one entity the order of the ids is the commit order, so one that
    /// is not newer than all before has been parked already and is read again.
    pub fn park(&mut self, event: &Event) {
        let known = self.has(event);
        let held = self
            .entities
            .entry(event.aggregate_type.to_string())
            .or_default()
            .entry(event.aggregate_id.to_string())
            .or_insert(Held {
                first: event.id,
                last: event.id,
                events: 0,
                is_passed: false,
                may_come_again: true,
                is_read: true,
            });
        if !held.may_come_again {
            (held.first, held.last, held.may_come_again) = (event.id, event.id, true);
        }
        self.may_pass = true;
        self.newest = event.id.max(self.newest);
        held.is_read |= event.id >= held.last;
        held.first = event.id.min(held.first);
        held.last = event.id.max(held.last);
        if !known {
            held.events += 1;
            self.events += 1;
        }
    }

    /// Whether the event itself is parked.
    #[must_use]
    pub fn has(&self, event: &Event) -> bool {
        self.held(event)
            .is_some_and(|held| held.may_come_again && (held.first..=held.last).contains(&event.id))
    }

    /// Whether the event has to wait: an event of its entity that precedes it (or it itself, when the log is read again)
    /// is parked.
    #[must_use]
    pub fn holds(&self, event: &Event) -> bool {
        self.held(event)
            .is_some_and(|held| held.is_passed || held.first <= event.id)
    }

    /// Notes that the log is read again from a position that may lie before what is parked.
    pub fn read_again(&mut self) {
        for held in self.entities.values_mut().flat_map(HashMap::values_mut) {
            held.is_read &= !held.may_come_again;
        }
    }

    /// Notes that the position is past everything that was read: of what is parked, none comes out of the log again but what
    /// has still to be read again.
    pub fn pass(&mut self) {
        if std::mem::take(&mut self.may_pass) {
            for held in self.entities.values_mut().flat_map(HashMap::values_mut) {
                if held.is_read {
                    (held.is_passed, held.may_come_again) = (true, false);
                } else {
                    self.may_pass = true;
                }
            }
        }
    }

    /// Notes that this many parked events of an entity are there no more.
    pub fn remove(&mut self, aggregate_type: &str, aggregate_id: &str, events: usize) {
        let of_type = self.entities.get_mut(aggregate_type);
        if let Some(held) = of_type.and_then(|entities| entities.get_mut(aggregate_id)) {
            let events = events.min(held.events);
            held.events -= events;
            self.events -= events;
        }
    }

    /// Lets the entity go: none of its events is parked any more.
    pub fn release(&mut self, aggregate_type: &str, aggregate_id: &str) {
        let Some(of_type) = self.entities.get_mut(aggregate_type) else {
            return;
        };
        if let Some(held) = of_type.remove(aggregate_id) {
            self.events -= held.events;
        }
        if of_type.is_empty() {
            self.entities.remove(aggregate_type);
        }
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

    /// How many events are parked.
    #[must_use]
    pub fn events(&self) -> usize {
        self.events
    }

    /// The newest event that was parked, 0 without one.
    #[must_use]
    pub fn newest(&self) -> EventId {
        self.newest
    }

    /// How many of one entity.
    #[must_use]
    pub fn events_of(&self, aggregate_type: &str, aggregate_id: &str) -> usize {
        self.entities
            .get(aggregate_type)
            .and_then(|entities| entities.get(aggregate_id))
            .map_or(0, |held| held.events)
    }
}
