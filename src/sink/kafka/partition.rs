//! Which partition a key goes to, and in which partitions the broker knows this producer.
//!
//! A broker takes a batch of an idempotent producer only after the one before it, but the first one that it sees of a
//! producer in a partition it takes whatever its number is. So when the very first batch is refused, the next one, which is
//! on its way already, is appended: later records of an entity without an earlier one. A partition gets one record
//! therefore, and more of them once that one has arrived.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::event::Seq;

/// Brokers forget a producer that has been silent for a day (`producer.id.expiration.ms`), or for less if so configured.
const KNOWN_FOR: Duration = Duration::from_mins(10);

/// A first record that takes longer than this holds up its own partition only.
const WAIT_MAX: Duration = Duration::from_secs(1);

/// The partition, of `count`, that a Java producer picks for a key; librdkafka's `murmur2` picks the same one.
///
/// # Panics
/// When there is no partition.
#[must_use]
pub fn partition_of(key: &[u8], count: usize) -> usize {
    (murmur2(key) & 0x7fff_ffff) as usize % count
}

/// MurmurHash2 with the seed of Kafka: <https://github.com/apache/kafka>, `Utils.murmur2`.
fn murmur2(bytes: &[u8]) -> u32 {
    const SEED: u32 = 0x9747_b28c;
    const M: u32 = 0x5bd1_e995;
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let mut hash = SEED ^ length;
    let (words, rest) = bytes.as_chunks();
    for word in words {
        let mut word = u32::from_le_bytes(*word).wrapping_mul(M);
        word ^= word >> 24;
        hash = hash.wrapping_mul(M) ^ word.wrapping_mul(M);
    }
    if !rest.is_empty() {
        for (at, byte) in rest.iter().enumerate() {
            hash ^= u32::from(*byte) << (8 * at);
        }
        hash = hash.wrapping_mul(M);
    }
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(M);
    hash ^ hash >> 15
}

/// Where the first records of a life have to wait for each other.
pub(super) struct FirstRecords {
    partitions: Vec<Partition>,
    awaited: HashMap<Seq, usize>,
    now: Instant,
}

#[derive(Clone, Copy)]
enum Partition {
    Unknown,
    /// Its first record is on its way, since then.
    Awaited(Instant),
    /// The broker knows us there; when it last got a record.
    Known(Instant),
}

/// The partitions of one topic.
#[derive(Clone, Copy, Debug)]
pub(super) struct Partitions {
    first: usize,
    count: usize,
}

impl FirstRecords {
    pub(super) fn new() -> Self {
        Self {
            partitions: Vec::new(),
            awaited: HashMap::new(),
            now: Instant::now(),
        }
    }

    /// Notes a topic with so many partitions.
    pub(super) fn add(&mut self, count: usize) -> Partitions {
        let (first, count) = (self.partitions.len(), count.max(1));
        self.partitions.resize(first + count, Partition::Unknown);
        Partitions { first, count }
    }

    /// Whether a record with this key may be handed over now. Records without a key have no order to lose.
    pub(super) fn admit(&self, partitions: Partitions, key: Option<&[u8]>) -> Admission {
        let Some(key) = key else {
            return Admission::Free;
        };
        let place = partitions.first + partition_of(key, partitions.count);
        match self.partitions[place] {
            Partition::Awaited(since) if self.now < since + WAIT_MAX => Admission::Wait,
            Partition::Awaited(_) => Admission::Later(place - partitions.first),
            Partition::Known(at) if self.now < at + KNOWN_FOR => Admission::To(place),
            Partition::Known(_) | Partition::Unknown => Admission::First(place),
        }
    }

    pub(super) fn handed_over(&mut self, seq: Seq, admission: Admission) {
        match admission {
            Admission::First(place) => {
                self.partitions[place] = Partition::Awaited(self.now);
                self.awaited.insert(seq, place);
            }
            Admission::To(place) => self.partitions[place] = Partition::Known(self.now),
            Admission::Free | Admission::Wait | Admission::Later(_) => {}
        }
    }

    pub(super) fn delivered(&mut self, seq: Seq) {
        if !self.awaited.is_empty()
            && let Some(place) = self.awaited.remove(&seq)
        {
            self.partitions[place] = Partition::Known(self.now);
        }
    }

    /// Reads the clock; to be called often enough, not for every record.
    pub(super) fn look_at_the_clock(&mut self) {
        self.now = Instant::now();
    }
}

/// Whether and how a record may be handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    Free,
    /// To a partition where the broker knows us.
    To(usize),
    /// As the first one of its partition.
    First(usize),
    /// Not before the first record of its partition has arrived.
    Wait,
    /// The same, and that takes long: this partition of its topic takes nothing at the moment.
    Later(usize),
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From the tests of Kafka's Java client.
    #[test]
    fn hashes_are_those_of_the_java_client() {
        for (text, hash) in [
            ("21", -973_932_308),
            ("foobar", -790_332_482),
            ("a-little-bit-long-string", -985_981_536),
            ("a-little-bit-longer-string", -1_486_304_829),
            (
                "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8",
                -58_897_971,
            ),
            ("abc", 479_470_107),
        ] {
            assert_eq!(murmur2(text.as_bytes()).cast_signed(), hash, "{text}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_partition_gets_one_record_until_it_has_arrived() {
        let mut first = FirstRecords::new();
        let (one, other) = (first.add(1), first.add(1));
        let key = Some(&b"a"[..]);
        assert_eq!(first.admit(one, key), Admission::First(0));
        first.handed_over(Seq(0), Admission::First(0));
        assert_eq!(first.admit(one, key), Admission::Wait);
        assert_eq!(first.admit(one, None), Admission::Free);
        tokio::time::advance(WAIT_MAX).await;
        first.look_at_the_clock();
        assert_eq!(first.admit(one, key), Admission::Later(0));
        assert_eq!(first.admit(other, key), Admission::First(1));
        first.delivered(Seq(0));
        assert_eq!(first.admit(one, key), Admission::To(0));
        tokio::time::advance(KNOWN_FOR / 2).await;
        first.look_at_the_clock();
        first.handed_over(Seq(1), Admission::To(0));
        tokio::time::advance(KNOWN_FOR * 2 / 3).await;
        first.look_at_the_clock();
        assert_eq!(first.admit(one, key), Admission::To(0));
        tokio::time::advance(KNOWN_FOR).await;
        first.look_at_the_clock();
        assert_eq!(
            first.admit(one, key),
            Admission::First(0),
            "after a silence"
        );
    }
}
