//! Whether what is in Kafka is what was emitted: a bench that measures a wrong answer fails. Pure; never does I/O.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use anyhow::{Context, Error, ensure};

/// The events that have to be there: how many, and sums of their ids that tell whether they are the right ones.
#[derive(Clone, Copy, Debug)]
pub struct Expected {
    pub events: i64,
    /// The highest id.
    pub last: i64,
    pub sum: i64,
    pub xor: i64,
}

/// What is in Kafka, record by record in the order of each partition.
#[derive(Default)]
pub struct Found {
    pub records: i64,
    /// Records whose event was there already.
    doubled: i64,
    sum: i64,
    xor: i64,
    /// When the first and the last one were appended, in milliseconds since the Unix epoch.
    times_ms: Option<(i64, i64)>,
    hasher: RandomState,
    /// By topic and key.
    newest: HashMap<u64, i64>,
    /// A bit for each id, by pipeline.
    known: HashMap<String, Vec<u64>>,
}

impl Expected {
    /// The events from 1 to `last`.
    pub fn all(last: i64) -> Self {
        Self {
            events: last,
            last,
            sum: last * (last + 1) / 2,
            xor: (1..=last).fold(0, |xor, id| xor ^ id),
        }
    }

    /// Whether a relay with so many pipelines has published exactly these; `doubles` says that it may have done so twice.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn judge(&self, found: &Found, pipelines: usize, doubles: bool) -> Result<(), Error> {
        let times = i64::try_from(pipelines)?;
        let distinct = found.records - found.doubled;
        ensure!(
            distinct == self.events * times,
            "WRONG: {distinct} events are in Kafka, and {} were emitted",
            self.events * times
        );
        let xor = if times % 2 == 0 { 0 } else { self.xor };
        ensure!(
            found.sum == self.sum * times && found.xor == xor,
            "WRONG: these are not the events that were emitted"
        );
        ensure!(
            doubles || found.doubled == 0,
            "WRONG: {} events came twice without a crash",
            found.doubled
        );
        Ok(())
    }
}

impl Found {
    /// A record, of nothing known.
    pub fn record(&mut self, at_ms: i64) {
        self.records += 1;
        let (first, last) = self.times_ms.unwrap_or((at_ms, at_ms));
        self.times_ms = Some((first.min(at_ms), last.max(at_ms)));
    }

    /// A record of the event with the id `sequence`, in a topic `PIPELINE.AGGREGATE_TYPE`.
    ///
    /// # Errors
    /// When a later event of its key was there first.
    pub fn event(
        &mut self,
        topic: &str,
        key: Option<&[u8]>,
        sequence: i64,
        at_ms: i64,
    ) -> Result<(), Error> {
        self.record(at_ms);
        let (pipeline, _) = topic.rsplit_once('.').context("a topic of the bench")?;
        if !self.is_new(pipeline, usize::try_from(sequence)?) {
            self.doubled += 1;
            return Ok(());
        }
        self.sum = self.sum.wrapping_add(sequence);
        self.xor ^= sequence;
        let entity = self.hasher.hash_one((topic, key));
        let newest = self.newest.entry(entity).or_insert(sequence);
        ensure!(
            *newest <= sequence,
            "WRONG: event {sequence} comes after {newest} of its key, in {topic}"
        );
        *newest = sequence;
        Ok(())
    }

    fn is_new(&mut self, pipeline: &str, sequence: usize) -> bool {
        // Not through the entry: that would want a copy of the name for each record.
        if !self.known.contains_key(pipeline) {
            self.known.insert(pipeline.to_owned(), Vec::new());
        }
        let Some(known) = self.known.get_mut(pipeline) else {
            return true;
        };
        let (word, bit) = (sequence / 64, 1 << (sequence % 64));
        if known.len() <= word {
            known.resize(word + 1, 0);
        }
        let is_new = known[word] & bit == 0;
        known[word] |= bit;
        is_new
    }

    /// When the last record was appended, in milliseconds since the Unix epoch.
    pub fn last_ms(&self) -> Result<i64, Error> {
        let (_, last) = self.times_ms.context("WRONG: there is no record")?;
        Ok(last)
    }

    /// From the first record to the last.
    ///
    /// # Errors
    /// When that is too short to tell.
    pub fn milliseconds(&self) -> Result<i64, Error> {
        let (first, last) = self.times_ms.context("WRONG: there is no record")?;
        ensure!(
            last > first,
            "all records came within a millisecond: use more --events"
        );
        Ok(last - first)
    }
}
