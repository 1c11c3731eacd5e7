//! One judge over a history: did what happened keep the promises I1 to I9?
//!
//! Knows plain facts only and shares no code with the relay, so that the two can't be wrong in the same way.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// The promises of the design.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Promise {
    /// Only committed rows leave, as they were written.
    I1,
    /// First deliveries of an entity follow its commit order.
    I2,
    /// Progress passes only what is confirmed or parked, and never goes back.
    I3,
    /// Everything committed is delivered or parked.
    I4,
    /// What is in memory is bounded.
    I5,
    /// A rejected event stops its own entity and nobody else.
    I6,
    /// Losing hints costs latency only.
    I7,
    /// One owner at a time, and a former owner publishes nothing new.
    I8,
    /// Where it is asked for, consumers see each event once.
    I9,
}

/// Something that happened. Events go by their id; `owner` is one life of a process, `life` one opening of its sink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fact {
    /// A transaction with this event committed; the order of these facts is the commit order.
    Committed(Committed),
    /// A reader was told to begin again from its last position.
    Sought { owner: u32 },
    /// A page came out of the log.
    Captured { owner: u32, ids: Vec<i64> },
    /// The sink of an owner began anew.
    Opened { owner: u32, life: u32 },
    /// The sink took a record over.
    HandedOver { owner: u32, life: u32, id: i64 },
    /// A record left the process.
    Sent { owner: u32, id: i64 },
    /// A record is in the broker's log for consumers to see; `intact` if it says what was committed.
    Appended { id: i64, intact: bool },
    /// The relay was told that a record is delivered.
    Confirmed { life: u32, id: i64 },
    /// An event is durably set aside; `reason` if it says why.
    Parked { owner: u32, id: i64, reason: bool },
    /// An event is set aside no more.
    Unparked { id: i64 },
    /// An operator asks for a parked event to be published, or to be dropped.
    Wanted { id: i64, drop: bool },
    /// What was wrong with an event is mended: it is poison no more.
    Mended { id: i64 },
    /// The cursor was written: it passed these events, and went back before those.
    Moved {
        passed: Vec<i64>,
        regained: Vec<i64>,
    },
    /// The lease was granted or extended.
    Leased { owner: u32, until_ms: u64 },
    /// The lease was given back.
    Released { owner: u32 },
    /// A process died.
    Crashed { owner: u32 },
    /// Faults are over, and nothing moves any more (or should have come to rest long ago).
    Quiet,
}

/// A committed event as the judge has to know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    pub id: i64,
    pub entity: String,
    /// Whether the pipeline's filter admits it.
    pub wanted: bool,
    /// Whether it will be rejected, by whomever.
    pub poison: bool,
    /// At least this much memory.
    pub bytes: usize,
    /// Whether anybody was told that it is there.
    pub hinted: bool,
}

/// What is configured.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub in_flight_rows: usize,
    pub in_flight_bytes: usize,
    pub page_rows: usize,
    pub exactly_once: bool,
    pub parked_max: usize,
    pub parked_max_per_entity: usize,
    pub rejected: Rejected,
}

/// What is to become of poison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejected {
    /// It waits, and its entity behind it.
    Waits,
    /// It is set aside alone.
    DeadLetter,
    /// It is gone.
    Dropped,
}

/// Facts in the order of their times, in milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    pub facts: Vec<(u64, Fact)>,
}

/// A promise that was broken.
#[derive(Clone, PartialEq, Eq)]
pub struct Violation {
    pub promise: Promise,
    pub at_ms: u64,
    pub what: String,
}

impl fmt::Debug for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            promise,
            at_ms,
            what,
        } = self;
        write!(f, "{promise:?} at {at_ms} ms: {what}")
    }
}

/// All broken promises of a history, in the order in which they broke.
pub fn judge(history: &History, bounds: &Bounds) -> Vec<Violation> {
    let mut judge = Judge::new(*bounds);
    for (at_ms, fact) in &history.facts {
        judge.at_ms = *at_ms;
        judge.hear(fact);
    }
    judge.violations
}

struct Judge {
    bounds: Bounds,
    at_ms: u64,
    violations: Vec<Violation>,
    committed: BTreeMap<i64, Committed>,
    /// Wanted events per entity in commit order.
    entities: BTreeMap<String, Vec<i64>>,
    appended: BTreeSet<i64>,
    confirmed: BTreeSet<i64>,
    parked: BTreeSet<i64>,
    /// Operators asked for them to be dropped.
    unwanted: BTreeSet<i64>,
    /// They were.
    dropped: BTreeSet<i64>,
    mended: BTreeSet<i64>,
    ever_handed_over: BTreeSet<i64>,
    /// Published after all, these are not in the transaction that moves the position.
    ever_parked: BTreeSet<i64>,
    past: BTreeSet<i64>,
    /// Per life: handed over and not confirmed.
    unconfirmed: BTreeMap<u32, BTreeSet<i64>>,
    /// Per life and entity: the place in commit order of the last hand-over.
    handed_over: BTreeMap<(u32, String), usize>,
    /// Per owner: read, and neither handed over nor parked.
    read: BTreeMap<u32, BTreeSet<i64>>,
    leases: BTreeMap<u32, u64>,
}

impl Judge {
    fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            at_ms: 0,
            violations: Vec::new(),
            committed: BTreeMap::new(),
            entities: BTreeMap::new(),
            appended: BTreeSet::new(),
            confirmed: BTreeSet::new(),
            parked: BTreeSet::new(),
            unwanted: BTreeSet::new(),
            dropped: BTreeSet::new(),
            mended: BTreeSet::new(),
            ever_handed_over: BTreeSet::new(),
            ever_parked: BTreeSet::new(),
            past: BTreeSet::new(),
            unconfirmed: BTreeMap::new(),
            handed_over: BTreeMap::new(),
            read: BTreeMap::new(),
            leases: BTreeMap::new(),
        }
    }

    fn broken(&mut self, promise: Promise, what: String) {
        self.violations.push(Violation {
            promise,
            at_ms: self.at_ms,
            what,
        });
    }

    fn hear(&mut self, fact: &Fact) {
        match fact {
            Fact::Committed(event) => self.commit(event),
            Fact::Sought { owner } => {
                self.read.insert(*owner, BTreeSet::new());
            }
            Fact::Captured { owner, ids } => self.capture(*owner, ids),
            Fact::HandedOver { owner, life, id } => self.hand_over(*owner, *life, *id),
            Fact::Sent { owner, id } => {
                if self
                    .leases
                    .get(owner)
                    .is_none_or(|until| *until < self.at_ms)
                {
                    self.broken(
                        Promise::I8,
                        format!("event {id} left owner {owner} after its lease"),
                    );
                }
            }
            Fact::Appended { id, intact } => self.append(*id, *intact),
            Fact::Confirmed { life, id } => {
                if !self.appended.contains(id) {
                    self.broken(
                        Promise::I3,
                        format!("event {id} is confirmed and not in the log"),
                    );
                }
                self.confirmed.insert(*id);
                self.unconfirmed.entry(*life).or_default().remove(id);
            }
            Fact::Parked { owner, id, reason } => self.park(*owner, *id, *reason),
            Fact::Unparked { id } => self.unpark(*id),
            Fact::Wanted { id, drop } => {
                if *drop {
                    self.unwanted.insert(*id);
                } else {
                    self.unwanted.remove(id);
                }
            }
            Fact::Mended { id } => {
                self.mended.insert(*id);
            }
            Fact::Moved { passed, regained } => self.advance(passed, regained),
            Fact::Leased { owner, until_ms } => {
                let other = self
                    .leases
                    .iter()
                    .find(|(other, until)| *other != owner && **until > self.at_ms);
                if let Some((other, until)) = other {
                    let what = format!("owner {owner} has a lease, {other} has one to {until}");
                    self.broken(Promise::I8, what);
                }
                self.leases.insert(*owner, *until_ms);
            }
            Fact::Released { owner } => {
                // Over at this very moment, where a lease that runs out still holds for the whole millisecond.
                let until = self.at_ms.saturating_sub(1);
                self.leases.insert(*owner, until);
            }
            Fact::Opened { .. } | Fact::Crashed { .. } => {}
            Fact::Quiet => self.rest(),
        }
    }

    fn commit(&mut self, event: &Committed) {
        if event.wanted {
            let entity = self.entities.entry(event.entity.clone()).or_default();
            entity.push(event.id);
        }
        self.committed.insert(event.id, event.clone());
    }

    /// Entity and place in its commit order.
    fn place(&self, id: i64) -> Option<(String, usize)> {
        let entity = &self.committed.get(&id)?.entity;
        let events = self.entities.get(entity)?;
        let place = events.iter().position(|other| *other == id)?;
        Some((entity.clone(), place))
    }

    fn capture(&mut self, owner: u32, ids: &[i64]) {
        let wanted = |id: &&i64| self.committed.get(id).is_some_and(|event| event.wanted);
        // Of these nothing is heard any more.
        let silent = |id: &&i64| self.is_given_up(**id);
        let ids = ids.iter().filter(wanted).filter(|id| !silent(id));
        let ids: Vec<i64> = ids.copied().collect();
        let read = self.read.entry(owner).or_default();
        read.extend(ids);
        // Events that wait for their topics have a place in flight.
        let (rows, most) = (
            read.len(),
            3 * self.bounds.page_rows + self.bounds.in_flight_rows,
        );
        if rows > most {
            self.broken(
                Promise::I5,
                format!("{rows} events are read ahead, three pages and the flight have {most}"),
            );
        }
    }

    fn hand_over(&mut self, owner: u32, life: u32, id: i64) {
        if self
            .leases
            .get(&owner)
            .is_none_or(|until| *until <= self.at_ms)
        {
            self.broken(
                Promise::I8,
                format!("owner {owner} without a lease handed over event {id}"),
            );
        }
        let Some((entity, place)) = self.place(id) else {
            self.broken(
                Promise::I1,
                format!("event {id} was handed over: not committed, or not wanted"),
            );
            return;
        };
        let last = if self.has_place(id) {
            self.handed_over.insert((life, entity.clone()), place)
        } else {
            None
        };
        if last.is_some_and(|last| last >= place) {
            self.broken(
                Promise::I2,
                format!("life {life} handed event {id} of {entity} over twice or too late"),
            );
        }
        self.read.entry(owner).or_default().remove(&id);
        self.ever_handed_over.insert(id);
        let unconfirmed = self.unconfirmed.entry(life).or_default();
        unconfirmed.insert(id);
        let rows = unconfirmed.len();
        let bytes: usize = unconfirmed
            .iter()
            .filter_map(|id| Some(self.committed.get(id)?.bytes))
            .sum();
        let Bounds {
            in_flight_rows,
            in_flight_bytes,
            ..
        } = self.bounds;
        if rows > in_flight_rows || (rows > 1 && bytes > in_flight_bytes) {
            self.broken(
                Promise::I5,
                format!("{rows} events, {bytes} bytes in flight; {in_flight_rows}, {in_flight_bytes} allowed"),
            );
        }
    }

    fn append(&mut self, id: i64, intact: bool) {
        let Some((entity, place)) = self.place(id) else {
            self.broken(
                Promise::I1,
                format!("event {id} is in the log: not committed, or not wanted"),
            );
            return;
        };
        if !intact {
            self.broken(
                Promise::I1,
                format!("event {id} is not in the log as it was written"),
            );
        }
        let first_delivery = self.appended.insert(id);
        if first_delivery && self.has_place(id) {
            let before = &self.entities[&entity][..place];
            let missing = |id: &&i64| {
                self.has_place(**id) && !self.appended.contains(id) && !self.dropped.contains(id)
            };
            if let Some(missing) = before.iter().find(missing) {
                let what = format!("event {id} of {entity} is in the log before event {missing}");
                self.broken(Promise::I2, what);
            }
        } else if !first_delivery && self.bounds.exactly_once && !self.ever_parked.contains(&id) {
            self.broken(Promise::I9, format!("event {id} is in the log twice"));
        }
    }

    /// Whether the order of its entity counts for an event: not for poison that nobody waits for.
    fn has_place(&self, id: i64) -> bool {
        self.bounds.rejected == Rejected::Waits
            || !self.committed.get(&id).is_some_and(|event| event.poison)
    }

    /// Whether an event is poison or comes after one of its entity; mended and dropped ones left out if so asked.
    fn is_held_up(&self, id: i64, still: bool) -> bool {
        let poison = |id: &i64| {
            self.committed[id].poison
                && !(still && (self.mended.contains(id) || self.dropped.contains(id)))
        };
        if self.bounds.rejected != Rejected::Waits {
            return poison(&id);
        }
        self.place(id).is_some_and(|(entity, place)| {
            let events = &self.entities[&entity][..=place];
            events.iter().any(poison)
        })
    }

    fn unpark(&mut self, id: i64) {
        self.parked.remove(&id);
        if self.unwanted.contains(&id) {
            self.dropped.insert(id);
        } else if !self.confirmed.contains(&id) {
            let what =
                format!("event {id} is set aside no more, and neither confirmed nor dropped");
            self.broken(Promise::I3, what);
        }
    }

    /// Whether nothing but the event itself stops its entity.
    fn is_first_poison(&self, id: i64) -> bool {
        self.place(id).is_some_and(|(entity, place)| {
            let events = &self.entities[&entity][..=place];
            events.iter().find(|id| self.committed[id].poison) == Some(&id)
        })
    }

    fn park(&mut self, owner: u32, id: i64, reason: bool) {
        self.read.entry(owner).or_default().remove(&id);
        let first_word = self.parked.insert(id);
        self.ever_parked.insert(id);
        if first_word && !reason && self.is_first_poison(id) {
            let what = format!("event {id} was rejected and is parked without a reason");
            self.broken(Promise::I6, what);
        }
        if !self.is_held_up(id, false) {
            self.broken(
                Promise::I6,
                format!("event {id} is parked: nothing of its entity was rejected"),
            );
        }
        let Some(Committed { entity, .. }) = self.committed.get(&id) else {
            return self.broken(
                Promise::I1,
                format!("event {id} is parked and not committed"),
            );
        };
        let same = |other: &&i64| {
            let other = self.committed.get(other);
            other.is_some_and(|other| other.entity == *entity)
        };
        let (all, of_entity) = (self.parked.len(), self.parked.iter().filter(same).count());
        let Bounds {
            parked_max,
            parked_max_per_entity,
            ..
        } = self.bounds;
        let waits = self.bounds.rejected == Rejected::Waits;
        // What was refused after its hand-over is set aside however little room is left, and so is what precedes something
        // that is: that can't make room.
        let precedes = self.ever_parked.iter().any(|other| *other > id);
        if !first_word || precedes || self.ever_handed_over.contains(&id) {
            return;
        }
        if all > parked_max || (waits && of_entity > parked_max_per_entity) {
            let what = format!(
                "{all} events are parked, {of_entity} of {entity}; {parked_max} and {parked_max_per_entity} allowed"
            );
            self.broken(Promise::I5, what);
        }
    }

    fn advance(&mut self, passed: &[i64], regained: &[i64]) {
        if let Some(id) = regained.first() {
            let what = format!("the cursor went back before event {id}");
            self.broken(Promise::I3, what);
        }
        let unsettled = passed.iter().find(|id| {
            self.committed.get(id).is_none_or(|event| event.wanted)
                && !self.confirmed.contains(id)
                && !self.parked.contains(id)
                && !self.dropped.contains(id)
                && !self.is_given_up(**id)
        });
        if let Some(id) = unsettled {
            let what = format!("the cursor passed event {id}: neither confirmed nor parked");
            self.broken(Promise::I3, what);
        }
        self.past.retain(|id| !regained.contains(id));
        self.past.extend(passed);
    }

    /// Rejected where nothing is kept of it.
    fn is_given_up(&self, id: i64) -> bool {
        let poison = self.committed.get(&id).is_some_and(|event| event.poison);
        self.bounds.rejected == Rejected::Dropped && poison
    }

    fn rest(&mut self) {
        for event in self.committed.clone().values().filter(|event| event.wanted) {
            let id = event.id;
            let (appended, parked) = (self.appended.contains(&id), self.parked.contains(&id));
            let lost = if event.hinted {
                Promise::I4
            } else {
                Promise::I7
            };
            let gone = self.dropped.contains(&id) || self.is_given_up(id);
            if !appended && !parked && !gone {
                self.broken(lost, format!("event {id} is neither delivered nor parked"));
            } else if appended && self.is_held_up(id, true) {
                let what = format!("event {id} is delivered past a rejected one");
                self.broken(Promise::I6, what);
            } else if !appended && !gone && !self.is_held_up(id, true) {
                let what = format!("event {id} is still parked, and nothing holds it any more");
                self.broken(Promise::I6, what);
            }
            if !self.past.contains(&id) {
                self.broken(lost, format!("event {id} was never passed by the cursor"));
            }
        }
    }
}
