//! Events that were refused after their hand-over: one of them is to blame, or several.

use std::collections::HashSet;

use crate::event::EventKey;

/// So many refused events are tried one by one; more of them in a narrow flight first.
const FEW: usize = 32;

/// Who is suspected, and how much may be in flight until the culprits are found.
///
/// A batch of a broker shares its fate, so that thousands of innocent events may be refused with a bad one. To try each of
/// them alone takes a round trip each. Instead the flight is narrowed to 32 events, so that the next refusal leaves no
/// more than these, and only they are tried alone: two more lives, and for n suspects about n / 32 + 32 round trips.
#[derive(Debug, Default)]
pub struct Suspects {
    /// Refused together with many others: the flight is narrow until all of them are settled.
    many: HashSet<EventKey>,
    /// Refused together with few others: each is handed over when nothing else is in flight.
    few: HashSet<EventKey>,
}

impl Suspects {
    /// Notes events that were refused in one life.
    pub fn accuse(&mut self, refused: &[EventKey]) {
        if refused.len() > FEW {
            self.many.extend(refused);
        } else {
            self.few.extend(refused);
        }
    }

    /// Notes that an event has arrived, or is settled in another way.
    pub fn acquit(&mut self, event: EventKey) {
        if !self.is_empty() {
            self.many.remove(&event);
            self.few.remove(&event);
        }
    }

    /// Whether the event has to be in flight alone: refused once more, it is to blame.
    #[must_use]
    pub fn is_tried_alone(&self, event: EventKey) -> bool {
        self.few.contains(&event)
    }

    /// How many events may be in flight before this one, as far as suspicion goes.
    #[must_use]
    pub fn in_flight_before(&self, event: EventKey) -> usize {
        if self.few.contains(&event) {
            0
        } else if self.many.is_empty() {
            usize::MAX
        } else {
            FEW - 1
        }
    }

    /// How many events are suspected.
    #[must_use]
    pub fn len(&self) -> usize {
        self.many.union(&self.few).count()
    }

    /// Whether nobody is suspected.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.many.is_empty() && self.few.is_empty()
    }
}
