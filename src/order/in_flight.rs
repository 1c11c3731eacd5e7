//! What was taken up and is not yet acknowledged, in log order.

use std::collections::VecDeque;

use crate::event::{EventId, EventKey, Seq};
use crate::position::Position;

#[derive(Clone, Copy, Debug)]
struct Slot {
    event: EventKey,
    /// How far into its page the position is once this slot has left.
    passes: EventId,
    bytes: usize,
    occurred_at_us: i64,
    tag: u32,
    settled: bool,
}

/// The end of a page: reached when every event before `end_seq` is settled.
#[derive(Clone, Debug)]
struct Mark {
    end_seq: u64,
    end: Position,
}

/// How [`InFlight::settle`] took a receipt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// First word about this event; what was noted of it when it was taken up.
    Now {
        /// Whatever the caller noted.
        tag: u32,
        /// When it was emitted, in microseconds since the Unix epoch.
        occurred_at_us: i64,
    },
    /// Settled before, or never taken up in this life.
    Unknown,
}

/// What [`InFlight::advance`] released.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advance {
    /// Everything before it is settled.
    pub position: Position,
    /// How many events left.
    pub events: u64,
    /// When the oldest of them was emitted, in microseconds since the Unix epoch; none when no event left.
    pub oldest_us: Option<i64>,
}

/// A queue in log order: events enter at the back, are settled in any order, and leave at the front.
#[derive(Debug)]
pub struct InFlight {
    slots: VecDeque<Slot>,
    marks: VecDeque<Mark>,
    /// The sequence number of the front slot.
    base: u64,
    bytes: usize,
    unsettled: usize,
    rows_max: usize,
    bytes_max: usize,
}

impl InFlight {
    /// An empty queue that has room for `rows_max` events and, unless a single one is larger, `bytes_max` bytes.
    #[must_use]
    pub fn new(rows_max: usize, bytes_max: usize) -> Self {
        Self {
            slots: VecDeque::new(),
            marks: VecDeque::new(),
            base: 0,
            bytes: 0,
            unsettled: 0,
            rows_max,
            bytes_max,
        }
    }

    /// Whether an event of this size may be taken up now.
    #[must_use]
    pub fn has_room_for(&self, bytes: usize) -> bool {
        self.slots.is_empty()
            || (self.slots.len() < self.rows_max && self.bytes + bytes <= self.bytes_max)
    }

    /// The number that the next event gets.
    #[must_use]
    pub fn next_seq(&self) -> Seq {
        Seq(self.base + self.slots.len() as u64)
    }

    /// Takes up the next event of the log.
    pub fn push(&mut self, event: EventKey, bytes: usize, occurred_at_us: i64, tag: u32) -> Seq {
        self.push_slot(event, event.id, bytes, occurred_at_us, tag)
    }

    /// Takes up an event that the position has passed already, inside of a page that ends where the one before ends:
    /// the position stays where it is.
    pub fn push_again(
        &mut self,
        event: EventKey,
        bytes: usize,
        occurred_at_us: i64,
        tag: u32,
    ) -> Seq {
        let passes = self.marks.back().map_or(event.id, |page| page.end.last_id);
        self.push_slot(event, passes, bytes, occurred_at_us, tag)
    }

    fn push_slot(
        &mut self,
        event: EventKey,
        passes: EventId,
        bytes: usize,
        occurred_at_us: i64,
        tag: u32,
    ) -> Seq {
        let seq = self.next_seq();
        self.slots.push_back(Slot {
            event,
            passes,
            bytes,
            occurred_at_us,
            tag,
            settled: false,
        });
        self.bytes += bytes;
        self.unsettled += 1;
        seq
    }

    /// Notes that the next `events` events are those of a page that ends at `end`.
    pub fn begin_page(&mut self, events: usize, end: Position) {
        let begun = self
            .marks
            .back()
            .map_or(self.next_seq().0, |mark| mark.end_seq);
        self.marks.push_back(Mark {
            end_seq: begun + events as u64,
            end,
        });
    }

    /// Notes that an event is delivered, durably parked or left out by the filter.
    pub fn settle(&mut self, seq: Seq) -> Settled {
        let slot = seq
            .0
            .checked_sub(self.base)
            .and_then(|index| usize::try_from(index).ok())
            .and_then(|index| self.slots.get_mut(index));
        match slot {
            Some(slot) if !slot.settled => {
                slot.settled = true;
                self.unsettled -= 1;
                Settled::Now {
                    tag: slot.tag,
                    occurred_at_us: slot.occurred_at_us,
                }
            }
            _ => Settled::Unknown,
        }
    }

    /// Notes something else of an event that was taken up.
    pub fn retag(&mut self, seq: Seq, tag: u32) {
        let index = seq.0.checked_sub(self.base);
        let index = index.and_then(|index| usize::try_from(index).ok());
        if let Some(slot) = index.and_then(|index| self.slots.get_mut(index)) {
            slot.tag = tag;
        }
    }

    /// Events taken up and not settled.
    #[must_use]
    pub fn unsettled(&self) -> usize {
        self.unsettled
    }

    /// The event with this number, while it is in flight.
    #[must_use]
    pub fn event_of(&self, seq: Seq) -> Option<EventKey> {
        let index = usize::try_from(seq.0.checked_sub(self.base)?).ok()?;
        self.slots.get(index).map(|slot| slot.event)
    }

    /// Releases what is settled without a gap; none when the front has not moved.
    pub fn advance(&mut self) -> Option<Advance> {
        let before = self.base;
        let oldest_us = self.oldest_us();
        let mut last_id = None;
        while let Some(slot) = self.slots.front().filter(|slot| slot.settled) {
            last_id = Some(slot.passes);
            self.bytes -= slot.bytes;
            self.base += 1;
            self.slots.pop_front();
        }
        let mut position = None;
        while let Some(mark) = self.marks.pop_front_if(|mark| mark.end_seq <= self.base) {
            last_id = last_id.filter(|_| mark.end_seq < self.base);
            position = Some(mark.end);
        }
        if let (Some(last_id), Some(page)) = (last_id, self.marks.front()) {
            position = Some(Position {
                window: page.end.window.clone(),
                last_id,
            });
        }
        let events = self.base - before;
        position.map(|position| Advance {
            position,
            events,
            oldest_us: oldest_us.filter(|_| events > 0),
        })
    }

    /// Behind the last event that was taken up; none when nothing is in flight.
    #[must_use]
    pub fn taken_up(&self) -> Option<Position> {
        let last = self.slots.back()?;
        let end_seq = self.next_seq().0;
        // A page may have begun of which nothing is taken up: its window is not this event's.
        let page = self.marks.iter().find(|page| page.end_seq >= end_seq)?;
        Some(if page.end_seq == end_seq {
            page.end.clone()
        } else {
            Position {
                window: page.end.window.clone(),
                last_id: last.passes,
            }
        })
    }

    /// Whether this event and all before it are settled and released.
    #[must_use]
    pub fn is_released(&self, seq: Seq) -> bool {
        seq.0 < self.base
    }

    /// Events taken up and not released.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.slots.len()
    }

    /// Their bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Nothing is in flight and every page is released.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty() && self.marks.is_empty()
    }

    /// When the oldest event in flight was emitted, in microseconds since the Unix epoch.
    #[must_use]
    pub fn oldest_us(&self) -> Option<i64> {
        self.slots.front().map(|slot| slot.occurred_at_us)
    }
}
