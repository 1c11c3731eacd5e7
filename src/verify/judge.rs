//! Holds the topics against the log. Pure: no I/O, clock or logging.
//!
//! The log comes first, in the order of its ids, then the records, partition by partition in the order of their offsets.
//! An event takes 48 bytes until the verdict and 4 more for it: 10 million fit into some 520 MB.

use std::collections::HashMap;
use std::ops::Range;

use super::expect::{Emitted, Fingerprint, Rules, partition_of};
use super::record::{self, Identity, Seen};
use super::report::{Example, PipelineReport};
use super::set_aside::{SetAside, fingerprint};

/// The partition of an event whose topic does not exist, and of one that was not found.
const NOWHERE: u16 = u16::MAX;

/// The first records of a partition whose beginning is gone, from which is taken how far back it reaches: transactions
/// that committed late are mixed up with what came before them.
const MARGIN_RECORDS: u64 = 10_000;

/// What is judged by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    /// How far back a crash reaches.
    pub(super) in_flight_events: u64,
    /// Whether the pipeline began with the oldest event.
    pub(super) from_earliest: bool,
    pub(super) duplicates_allowed: bool,
    /// Records of older events are not looked at.
    pub(super) from_id: i64,
}

/// One topic as it was before the log was read.
#[derive(Clone, Debug)]
pub(super) struct Topic {
    pub(super) name: String,
    /// Whether only the newest record of a key is kept.
    pub(super) compacted: bool,
    pub(super) partitions: Vec<Partition>,
}

/// One partition of a topic; their numbers are their indices.
#[derive(Clone, Copy, Debug)]
pub(super) struct Partition {
    /// The first offset that is read.
    pub(super) start: i64,
    /// The offset that is no longer read.
    pub(super) end: i64,
    /// Whether records that would be read are gone.
    pub(super) truncated: bool,
}

/// Which part of the log is retained.
#[derive(Clone, Debug, Default)]
pub(super) struct Retained {
    /// From this id on an event that is not there was never committed; none when nothing is left.
    pub(super) first: Option<i64>,
    /// Ids above the first whose partition of the table is gone: from the one, up to and without the other.
    pub(super) gone: Vec<(i64, i64)>,
}

impl Retained {
    fn reaches(&self, id: i64) -> bool {
        self.first.is_some_and(|first| id >= first)
            && !self
                .gone
                .iter()
                .any(|(from, to)| (*from..*to).contains(&id))
    }
}

/// One event of the log in memory.
#[derive(Clone, Copy)]
struct Entry {
    id: i64,
    entity: u64,
    /// Of its first delivery.
    offset: i64,
    event_id: Fingerprint,
    value: Fingerprint,
    key: Fingerprint,
    /// Of its first delivery among those of its partition.
    ordinal: u32,
    /// The partition that its key asks for.
    home: u16,
    /// The partition of its first delivery.
    found: u16,
    copies: u16,
    flags: u8,
}

const TAKEN: u8 = 1;
const SETTLED: u8 = 2;
/// Other pipelines write it to one of the topics too.
const SHARED: u8 = 4;
const TOMBSTONE: u8 = 8;

impl Entry {
    fn is(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// What is known of one partition while it is read.
struct Place {
    topic: usize,
    number: i32,
    truncated: bool,
    records: u64,
    /// The newest event among the first records; everything up to it may be gone.
    horizon: i64,
    /// The event of the first record; what is older may be from before the pipeline's start.
    begins: Option<i64>,
    /// First deliveries so far.
    firsts: u32,
    run: Option<Run>,
}

/// Duplicates one after the other.
struct Run {
    last: u32,
    length: u64,
    beyond_reach: bool,
}

struct Known {
    name: String,
    compacted: bool,
    places: Range<usize>,
    /// Whether every record was in the partition that its key asks for.
    predictable: bool,
}

/// One pipeline on trial.
pub(super) struct Judge {
    terms: Terms,
    rules: Rules,
    others: Vec<Rules>,
    set_aside: SetAside,
    retained: Retained,
    topics: Vec<Known>,
    by_name: HashMap<String, usize>,
    places: Vec<Place>,
    entries: Vec<Entry>,
    report: PipelineReport,
}

impl Judge {
    /// `others` are the rules of the other pipelines of the same outbox.
    pub(super) fn new(
        terms: Terms,
        rules: Rules,
        others: Vec<Rules>,
        set_aside: SetAside,
        topics: &[Topic],
    ) -> Self {
        let mut judge = Self {
            terms,
            rules,
            others,
            set_aside,
            retained: Retained::default(),
            topics: Vec::new(),
            by_name: HashMap::new(),
            places: Vec::new(),
            entries: Vec::new(),
            report: PipelineReport {
                duplicates_allowed: terms.duplicates_allowed,
                topics: topics.iter().map(|topic| topic.name.clone()).collect(),
                ..PipelineReport::default()
            },
        };
        for topic in topics {
            judge.add_topic(topic);
        }
        judge
    }

    fn add_topic(&mut self, topic: &Topic) {
        let first = self.places.len();
        for (number, partition) in (0..).zip(&topic.partitions) {
            let empty = partition.start >= partition.end;
            self.places.push(Place {
                topic: self.topics.len(),
                number,
                truncated: partition.truncated,
                records: 0,
                horizon: if empty { i64::MAX } else { i64::MIN },
                begins: None,
                firsts: 0,
                run: None,
            });
        }
        self.by_name.insert(topic.name.clone(), self.topics.len());
        self.topics.push(Known {
            name: topic.name.clone(),
            compacted: topic.compacted,
            places: first..self.places.len(),
            predictable: true,
        });
    }

    /// Which part of the log follows.
    pub(super) fn retained(&mut self, retained: Retained) {
        self.retained = retained;
    }

    /// The next event of the log.
    pub(super) fn event(&mut self, event: &Emitted) {
        let (taken, key) = (self.rules.take(event), self.rules.key(event));
        let shared = self
            .others
            .iter()
            .any(|rules| rules.take(event) && self.by_name.contains_key(&rules.topic(event)));
        let tombstone = event.payload.is_none() && event.payload_bytes.is_none();
        let flag = |flag, set| if set { flag } else { 0 };
        let entry = Entry {
            id: event.id,
            entity: event.entity(),
            offset: 0,
            event_id: fingerprint(event.event_id),
            value: self.rules.value(event),
            key: Fingerprint::of(Some(key.as_bytes())),
            ordinal: 0,
            home: self.home(&self.rules.topic(event), &key),
            found: NOWHERE,
            copies: 0,
            flags: flag(TAKEN, taken)
                | flag(SETTLED, event.settled)
                | flag(SHARED, shared)
                | flag(TOMBSTONE, tombstone),
        };
        self.report.events += u64::from(taken);
        self.entries.push(entry);
    }

    fn home(&self, topic: &str, key: &str) -> u16 {
        let Some(topic) = self.by_name.get(topic) else {
            return NOWHERE;
        };
        let places = &self.topics[*topic].places;
        let place = places.start + partition_of(key.as_bytes(), places.len());
        u16::try_from(place).unwrap_or(NOWHERE)
    }

    /// Reads a record in the pipeline's format, or, where others write to its topics too, in theirs.
    pub(super) fn recognise<'a>(
        &self,
        header: impl Fn(&str) -> Option<&'a [u8]>,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
    ) -> Seen {
        let own = record::read(self.rules.format, &header, key, value);
        let other = |rules: &Rules| record::read(rules.format, &header, key, value);
        match own.identity {
            Some(_) => own,
            None => self
                .others
                .iter()
                .map(other)
                .find(|seen| seen.identity.is_some())
                .unwrap_or(own),
        }
    }

    /// The next record of a partition of the topic with this index.
    pub(super) fn record(&mut self, topic: usize, partition: i32, offset: i64, seen: &Seen) {
        let Ok(number) = usize::try_from(partition) else {
            return;
        };
        let index = self.topics[topic].places.start + number;
        let example = self.example(index, offset, seen.identity);
        let Some(identity) = seen.identity else {
            self.report.records += 1;
            let what = Some("it does not say which event it is");
            self.report.unknown.add(|| Example { what, ..example });
            return;
        };
        self.places[index].meet(identity.sequence);
        if identity.sequence < self.terms.from_id {
            return;
        }
        self.report.records += 1;
        let Ok(found) = self
            .entries
            .binary_search_by_key(&identity.sequence, |e| e.id)
        else {
            self.stranger(identity, example);
            return;
        };
        let entry = self.entries[found];
        if entry.event_id != fingerprint(identity.event_id) {
            let what = Some("the log has another event in its place");
            self.report.unknown.add(|| Example { what, ..example });
            return;
        }
        let alteration = self.alteration(&entry, topic, seen);
        let again = entry.copies > 0;
        if entry.is(SHARED) && (alteration.is_some() || again) {
            self.report.not_judged.records_of_other_pipelines += 1;
            return;
        }
        if let Some(what) = alteration {
            let what = Some(what);
            self.report.altered.add(|| Example {
                what,
                ..example.clone()
            });
        }
        if again {
            self.again(found, index, example);
        } else {
            self.first(found, index, offset);
        }
    }

    fn example(&self, place: usize, offset: i64, identity: Option<Identity>) -> Example {
        let place = &self.places[place];
        Example {
            event_id: identity.map(|identity| identity.event_id.to_string()),
            sequence: identity.map(|identity| identity.sequence),
            topic: Some(self.topics[place.topic].name.clone()),
            partition: Some(place.number),
            offset: Some(offset),
            what: None,
        }
    }

    /// An event that is not in the log.
    fn stranger(&mut self, identity: Identity, example: Example) {
        let Identity { event_id, sequence } = identity;
        let committed = self.set_aside.is_parked(sequence, fingerprint(event_id))
            || self.set_aside.is_dropped(sequence, fingerprint(event_id));
        if committed || !self.retained.reaches(sequence) {
            self.report.not_judged.records_beyond_the_log += 1;
        } else {
            let what = Some("it is not in the log");
            self.report.unknown.add(|| Example { what, ..example });
        }
    }

    fn alteration(&self, entry: &Entry, topic: usize, seen: &Seen) -> Option<&'static str> {
        if !entry.is(TAKEN) {
            Some("the filter leaves it out")
        } else if !self.topics[topic].places.contains(&usize::from(entry.home)) {
            Some("it belongs in another topic")
        } else if entry.key != seen.key {
            Some("the key is another")
        } else if entry.value != seen.value {
            Some("the payload is another")
        } else {
            None
        }
    }

    fn first(&mut self, found: usize, index: usize, offset: i64) {
        let place = &mut self.places[index];
        let entry = &mut self.entries[found];
        place.begins.get_or_insert(entry.id);
        entry.found = u16::try_from(index).unwrap_or(NOWHERE);
        entry.offset = offset;
        entry.ordinal = place.firsts;
        entry.copies = 1;
        place.firsts += 1;
        place.run = None;
        if entry.found != entry.home {
            self.topics[place.topic].predictable = false;
        }
    }

    fn again(&mut self, found: usize, index: usize, example: Example) {
        let entry = &mut self.entries[found];
        entry.copies = entry.copies.saturating_add(1);
        let elsewhere = usize::from(entry.found) != index;
        let doubled = &mut self.report.doubled;
        doubled.count += 1;
        if doubled.examples.len() < super::report::EXAMPLES_MAX {
            doubled.examples.push(example);
        }
        if elsewhere {
            doubled.beyond_reach += 1;
            return;
        }
        let place = &mut self.places[index];
        let reach = u64::from(place.firsts - entry.ordinal);
        let run = match place.run.take().filter(|run| run.last < entry.ordinal) {
            Some(run) => Run {
                last: entry.ordinal,
                length: run.length + 1,
                ..run
            },
            None => {
                doubled.runs += 1;
                Run {
                    last: entry.ordinal,
                    length: 1,
                    beyond_reach: reach > self.terms.in_flight_events,
                }
            }
        };
        doubled.longest_run = doubled.longest_run.max(run.length);
        doubled.beyond_reach += u64::from(run.beyond_reach);
        place.run = Some(run);
    }

    /// The verdict. Of events that are missing or out of order the examples lack the uuid, which is not kept.
    pub(super) fn verdict(mut self) -> PipelineReport {
        self.judge_presence();
        self.judge_order();
        let report = &mut self.report;
        let promises = [
            &report.missing,
            &report.out_of_order,
            &report.altered,
            &report.unknown,
        ];
        report.holds = promises.iter().all(|finding| finding.count == 0)
            && (report.duplicates_allowed || report.doubled.count == 0);
        self.report
    }

    fn judge_presence(&mut self) {
        let compacted = self.newest_of_compacted_keys();
        let mut parked_and_found = 0;
        for entry in self.entries.iter().filter(|entry| entry.is(TAKEN)) {
            let parked = self.set_aside.is_parked(entry.id, entry.event_id);
            let unknowable = &mut self.report.not_judged;
            if entry.copies > 0 {
                self.report.found += 1;
                parked_and_found += u64::from(parked);
            } else if parked {
                // Counted with those that the log no longer has.
            } else if !entry.is(SETTLED) {
                self.report.waiting += 1;
            } else if self.set_aside.is_dropped(entry.id, entry.event_id) {
                self.report.dropped += 1;
            } else if !self.terms.from_earliest && self.topics.before(&self.places, entry) {
                unknowable.events_before_the_start += 1;
            } else if self.topics.beyond(&self.places, entry) {
                unknowable.events_beyond_the_topic += 1;
            } else if compacted.removed(self.topics.of(&self.places, entry.home), entry) {
                unknowable.events_compacted += 1;
            } else {
                let place = self.places.get(usize::from(entry.home));
                self.report.missing.add(|| Example {
                    sequence: Some(entry.id),
                    topic: place.map(|place| self.topics[place.topic].name.clone()),
                    what: place.is_none().then_some("its topic does not exist"),
                    ..Example::default()
                });
            }
        }
        self.report.parked = self.set_aside.parked() - parked_and_found;
    }

    /// The newest event that was found of every key in a compacted topic of which one is missing.
    fn newest_of_compacted_keys(&self) -> Compacted {
        let mut newest = HashMap::new();
        if !self.topics.iter().any(|topic| topic.compacted) {
            return Compacted(newest);
        }
        let key = |entry: &Entry| {
            let topic = self.topics.of(&self.places, entry.home)?;
            self.topics[topic].compacted.then_some((topic, entry.key))
        };
        let missing = |entry: &&Entry| entry.copies == 0 && entry.is(TAKEN) && entry.is(SETTLED);
        for key in self.entries.iter().filter(missing).filter_map(key) {
            newest.insert(key, i64::MIN);
        }
        for entry in self.entries.iter().filter(|entry| entry.copies > 0) {
            if let Some(id) = key(entry).and_then(|key| newest.get_mut(&key)) {
                *id = entry.id;
            }
        }
        Compacted(newest)
    }

    /// Within a partition, each event of an entity has to come before the next one.
    fn judge_order(&mut self) {
        let entries = &self.entries;
        let mut order: Vec<u32> = (0..)
            .zip(entries)
            .filter(|(_, entry)| entry.copies > 0)
            .map(|(index, _)| index)
            .collect();
        let at = |index: u32| &entries[index as usize];
        order.sort_unstable_by_key(|index| (at(*index).entity, at(*index).found, *index));
        // From the last event of an entity to its first: the one delivered earliest of those that are later.
        let mut earliest: Option<&Entry> = None;
        let mut late: Vec<(u32, i64)> = Vec::new();
        for index in order.into_iter().rev() {
            let entry = at(index);
            let later = earliest.filter(|e| (e.entity, e.found) == (entry.entity, entry.found));
            match later {
                Some(later) if later.offset < entry.offset => {
                    let place = &self.places[usize::from(entry.found)];
                    // What is gone may have held an earlier delivery of this one, if the later one was repeated after it.
                    let gone = place.truncated || self.topics[place.topic].compacted;
                    // What is older than the first record was replayed: the pipeline began later.
                    let replayed = !self.terms.from_earliest && place.begins > Some(entry.id);
                    if !(replayed || gone && later.copies > 1) {
                        late.push((index, later.id));
                    }
                }
                _ => earliest = Some(entry),
            }
        }
        late.sort_unstable();
        for (index, _) in late {
            let entry = self.entries[index as usize];
            let example = self.example(usize::from(entry.found), entry.offset, None);
            let sequence = Some(entry.id);
            self.report.out_of_order.add(|| Example {
                sequence,
                ..example
            });
        }
    }
}

impl Place {
    /// Learns how far back the partition reaches.
    fn meet(&mut self, sequence: i64) {
        if self.records < MARGIN_RECORDS {
            self.horizon = self.horizon.max(sequence);
        }
        self.records += 1;
    }
}

struct Compacted(HashMap<(usize, Fingerprint), i64>);

impl Compacted {
    /// Whether compaction may have removed the event from the topic.
    fn removed(&self, topic: Option<usize>, entry: &Entry) -> bool {
        let newest = topic.and_then(|topic| self.0.get(&(topic, entry.key)));
        newest.is_some_and(|newest| *newest > entry.id || entry.is(TOMBSTONE))
    }
}

trait Topics {
    fn of(&self, places: &[Place], place: u16) -> Option<usize>;
    /// The partitions in which an event may be: one, or all of its topic where that can't be foretold.
    fn homes<'a>(&self, places: &'a [Place], entry: &Entry) -> &'a [Place];
    fn beyond(&self, places: &[Place], entry: &Entry) -> bool;
    fn before(&self, places: &[Place], entry: &Entry) -> bool;
}

impl Topics for Vec<Known> {
    fn of(&self, places: &[Place], place: u16) -> Option<usize> {
        places.get(usize::from(place)).map(|place| place.topic)
    }

    /// Whether the event is so old that its partition may have let go of it.
    fn beyond(&self, places: &[Place], entry: &Entry) -> bool {
        let gone = |place: &Place| place.truncated && entry.id <= place.horizon;
        self.homes(places, entry).iter().any(gone)
    }

    /// Whether the event is older than the first record of its partition. Not than the oldest of the topic: a replay may
    /// bring events from before the start.
    fn before(&self, places: &[Place], entry: &Entry) -> bool {
        let before = |place: &Place| place.begins.is_none_or(|first| entry.id < first);
        let homes = self.homes(places, entry);
        homes.is_empty() || homes.iter().any(before)
    }

    fn homes<'a>(&self, places: &'a [Place], entry: &Entry) -> &'a [Place] {
        let home = usize::from(entry.home);
        match places.get(home).map(|place| &self[place.topic]) {
            Some(topic) if topic.predictable => &places[home..=home],
            Some(topic) => &places[topic.places.clone()],
            None => &[],
        }
    }
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
