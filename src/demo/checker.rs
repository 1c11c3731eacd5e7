//! Judges a run: what the shop wrote down against what a consumer saw. Pure, and shares no code with the relay.
//!
//! The shop's own record is the truth. The order of an entity is the order of the versions that the database gave to its
//! row, which is the order of the commits.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use uuid::Uuid;

use super::shop::Entity;

/// An event as the shop wrote it, in a transaction that has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Written {
    pub(super) id: Uuid,
    pub(super) entity: Entity,
    /// The version of the entity's row after the change; ascends in the order of the commits.
    pub(super) version: i64,
    pub(super) event_type: &'static str,
    pub(super) payload: Fingerprint,
}

/// A record as a consumer saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    /// None when the record has no header that could be one.
    pub(super) id: Option<Uuid>,
    /// By topic and key; none when they name nothing of the shop.
    pub(super) entity: Option<Entity>,
    pub(super) partition: i32,
    pub(super) offset: i64,
    pub(super) event_type: String,
    pub(super) payload: Fingerprint,
}

/// Stands for a payload, so that a long run need not keep them all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fingerprint(u64);

impl Fingerprint {
    pub(super) fn of(payload: Option<&[u8]>) -> Self {
        let mut hasher = DefaultHasher::new();
        payload.hash(&mut hasher);
        Self(hasher.finish())
    }
}

/// What was found; everything but `committed`, `consumed` and `rolled_back` has to be 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Events that the shop committed.
    pub(crate) committed: usize,
    /// Records that the consumer saw.
    pub(crate) consumed: usize,
    /// Events that were emitted and rolled back.
    pub(crate) rolled_back: usize,
    /// Committed and never seen.
    pub(crate) lost: usize,
    /// Seen again.
    pub(crate) duplicated: usize,
    /// Seen after a later event of the same entity, or in another partition than the entity's first.
    pub(crate) out_of_order: usize,
    /// Seen with another topic, key, type or payload than was written.
    pub(crate) altered: usize,
    /// Rolled back, and seen.
    pub(crate) rolled_back_seen: usize,
    /// Seen, and never written by this shop.
    pub(crate) unknown: usize,
}

impl Verdict {
    /// Whether everything is as it should be.
    pub(crate) fn holds(&self) -> bool {
        let Self {
            committed: _,
            consumed: _,
            rolled_back: _,
            lost,
            duplicated,
            out_of_order,
            altered,
            rolled_back_seen,
            unknown,
        } = self;
        [
            lost,
            duplicated,
            out_of_order,
            altered,
            rolled_back_seen,
            unknown,
        ]
        .iter()
        .all(|found| **found == 0)
    }
}

/// Compares the whole record of the shop with everything that was seen, in the order in which it was seen.
pub(super) fn judge(committed: &[Written], rolled_back: &[Uuid], seen: &[Seen]) -> Verdict {
    let truth: HashMap<Uuid, &Written> = committed.iter().map(|w| (w.id, w)).collect();
    let taken_back: HashSet<Uuid> = rolled_back.iter().copied().collect();
    let mut verdict = Verdict {
        committed: committed.len(),
        consumed: seen.len(),
        rolled_back: rolled_back.len(),
        ..Verdict::default()
    };
    let mut met: HashSet<Uuid> = HashSet::with_capacity(committed.len());
    // Per entity: the latest version seen, and the partition of the first.
    let mut progress: HashMap<Entity, (i64, i32)> = HashMap::new();
    for record in seen {
        let written = match record.id {
            Some(id) if taken_back.contains(&id) => {
                verdict.rolled_back_seen += 1;
                continue;
            }
            Some(id) => truth.get(&id),
            None => None,
        };
        let Some(written) = written else {
            verdict.unknown += 1;
            continue;
        };
        if !met.insert(written.id) {
            verdict.duplicated += 1;
            continue;
        }
        let same = record.entity == Some(written.entity)
            && record.event_type == written.event_type
            && record.payload == written.payload;
        verdict.altered += usize::from(!same);
        let (latest, partition) = progress
            .entry(written.entity)
            .or_insert((i64::MIN, record.partition));
        let in_order = written.version > *latest && record.partition == *partition;
        verdict.out_of_order += usize::from(!in_order);
        *latest = written.version.max(*latest);
    }
    verdict.lost = committed.len() - met.len();
    verdict
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::shop::Kind;

    const TYPES: [&str; 4] = ["placed", "paid", "shipped", "delivered"];

    /// Two orders of four events each, as written and as a faultless consumer sees them.
    fn faultless() -> (Vec<Written>, Vec<Seen>) {
        let written: Vec<Written> = (0..8_u32)
            .map(|n| Written {
                id: Uuid::from_u128(u128::from(n) + 1),
                entity: Entity {
                    kind: Kind::Order,
                    number: n % 2,
                },
                version: i64::from(n / 2) + 1,
                event_type: TYPES[n as usize / 2],
                payload: Fingerprint::of(Some(&n.to_be_bytes())),
            })
            .collect();
        let seen = written
            .iter()
            .enumerate()
            .map(|(n, written)| Seen {
                id: Some(written.id),
                entity: Some(written.entity),
                partition: i32::from(written.entity.number == 1),
                offset: i64::try_from(n).unwrap() / 2,
                event_type: written.event_type.to_owned(),
                payload: written.payload,
            })
            .collect();
        (written, seen)
    }

    /// Spoils what the consumer saw and returns what the checker says to that.
    fn spoil(spoil: impl FnOnce(&mut Vec<Seen>)) -> Verdict {
        let (written, mut seen) = faultless();
        spoil(&mut seen);
        judge(&written, &[Uuid::from_u128(99)], &seen)
    }

    fn sound() -> Verdict {
        Verdict {
            committed: 8,
            consumed: 8,
            rolled_back: 1,
            ..Verdict::default()
        }
    }

    #[test]
    fn a_faultless_run_holds() {
        let verdict = spoil(|_| {});
        assert_eq!(verdict, sound());
        assert!(verdict.holds());
    }

    #[test]
    fn entities_may_overtake_each_other() {
        assert!(spoil(|seen| seen.sort_by_key(|seen| seen.partition)).holds());
    }

    #[test]
    fn a_lost_event_is_found() {
        let verdict = spoil(|seen| drop(seen.remove(3)));
        let expected = Verdict {
            consumed: 7,
            lost: 1,
            ..sound()
        };
        assert_eq!(verdict, expected);
        assert!(!verdict.holds());
    }

    #[test]
    fn a_doubled_event_is_found() {
        let verdict = spoil(|seen| seen.push(seen[3].clone()));
        let expected = Verdict {
            consumed: 9,
            duplicated: 1,
            ..sound()
        };
        assert_eq!(verdict, expected);
        assert!(!verdict.holds());
    }

    #[test]
    fn swapped_events_of_one_entity_are_found() {
        let verdict = spoil(|seen| seen.swap(2, 4));
        let expected = Verdict {
            out_of_order: 1,
            ..sound()
        };
        assert_eq!(verdict, expected);
        assert!(!verdict.holds());
    }

    #[test]
    fn an_entity_in_two_partitions_is_found() {
        let verdict = spoil(|seen| seen[7].partition = 5);
        assert_eq!(verdict.out_of_order, 1);
        assert!(!verdict.holds());
    }

    #[test]
    fn a_rolled_back_event_that_was_seen_is_found() {
        let verdict = spoil(|seen| {
            let mut ghost = seen[0].clone();
            ghost.id = Some(Uuid::from_u128(99));
            seen.push(ghost);
        });
        let expected = Verdict {
            consumed: 9,
            rolled_back_seen: 1,
            ..sound()
        };
        assert_eq!(verdict, expected);
        assert!(!verdict.holds());
    }

    #[test]
    fn an_event_that_nobody_wrote_is_found() {
        for id in [None, Some(Uuid::from_u128(77))] {
            let verdict = spoil(|seen| {
                let mut stranger = seen[0].clone();
                stranger.id = id;
                seen.push(stranger);
            });
            assert_eq!(verdict.unknown, 1);
            assert!(!verdict.holds());
        }
    }

    #[test]
    fn an_altered_event_is_found() {
        let alterations: [fn(&mut Seen); 4] = [
            |seen| seen.entity = None,
            |seen| seen.entity.as_mut().unwrap().kind = Kind::Product,
            |seen| seen.event_type.push('!'),
            |seen| seen.payload = Fingerprint::of(None),
        ];
        for alter in alterations {
            let verdict = spoil(|seen| alter(&mut seen[5]));
            assert_eq!(verdict.altered, 1);
            assert!(!verdict.holds());
        }
    }
}
