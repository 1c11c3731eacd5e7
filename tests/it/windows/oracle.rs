//! What a run must and must not show. Pure; shares no code with what it judges: it knows what writers committed and what
//! a reader was given, not how.

use std::collections::{HashMap, HashSet};
use std::fmt;

/// Names one event of a run.
pub(crate) type Token = u64;

/// What a writer says of an event that it committed: which change of its entity, and which event of that change.
///
/// The number of the change is counted in the entity's own row under its lock, so it is the commit order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) entity: String,
    pub(crate) change: u64,
    pub(crate) part: u64,
}

/// An event as a reader was given it.
#[derive(Clone, Debug)]
pub(crate) struct Delivery {
    /// Which life of the reader.
    pub(crate) life: usize,
    pub(crate) token: Token,
    pub(crate) written: Written,
    /// Whether the durable position had passed it when that life ended.
    pub(crate) acknowledged: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Fault {
    /// Committed and never delivered.
    Lost(Token),
    /// Delivered and never committed.
    Uncommitted(Token),
    /// Delivered twice in one life.
    Twice(Token),
    /// Delivered in a later life although the durable position had passed it.
    AcknowledgedAgain(Token),
    /// The first delivery came after one of a later change of the same entity.
    OutOfOrder(Token),
    /// What was committed was changed on its way.
    Changed(Token),
    /// After a restart the rest of the window was not what it had been.
    NotTheSameAgain(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Everything that is wrong with a run.
pub(crate) fn judge(committed: &HashMap<Token, Written>, deliveries: &[Delivery]) -> Vec<Fault> {
    let mut faults = Vec::new();
    let mut seen_in_life: HashSet<(usize, Token)> = HashSet::new();
    let mut seen: HashMap<Token, bool> = HashMap::new();
    let mut newest: HashMap<&str, (u64, u64)> = HashMap::new();
    for delivery in deliveries {
        let Delivery {
            life,
            token,
            written,
            acknowledged,
        } = delivery;
        match committed.get(token) {
            None => faults.push(Fault::Uncommitted(*token)),
            Some(as_committed) if as_committed != written => faults.push(Fault::Changed(*token)),
            Some(_) => {}
        }
        if !seen_in_life.insert((*life, *token)) {
            faults.push(Fault::Twice(*token));
        }
        match seen.insert(*token, *acknowledged) {
            Some(true) => faults.push(Fault::AcknowledgedAgain(*token)),
            Some(false) => {}
            None => {
                let place = (written.change, written.part);
                let last = newest.entry(&written.entity).or_default();
                if place < *last {
                    faults.push(Fault::OutOfOrder(*token));
                }
                *last = place.max(*last);
            }
        }
    }
    let mut lost: Vec<Token> = committed
        .keys()
        .filter(|token| !seen.contains_key(token))
        .copied()
        .collect();
    lost.sort_unstable();
    faults.extend(lost.into_iter().map(Fault::Lost));
    faults
}

/// Each kind of fault is found in a history that has it.
#[test]
fn the_oracle_finds_each_fault() {
    let written = |change| Written {
        entity: "a".to_owned(),
        change,
        part: 0,
    };
    let delivery = |life, token, acknowledged| Delivery {
        life,
        token,
        written: written(token),
        acknowledged,
    };
    let committed: HashMap<Token, Written> = [(1, written(1)), (2, written(2))].into();
    let of = |deliveries: &[Delivery]| judge(&committed, deliveries);

    assert_eq!(of(&[delivery(1, 1, false), delivery(1, 2, false)]), []);
    assert_eq!(
        of(&[
            delivery(1, 1, false),
            delivery(2, 1, true),
            delivery(2, 2, true)
        ]),
        []
    );
    assert_eq!(of(&[delivery(1, 1, false)]), [Fault::Lost(2)]);
    assert_eq!(
        of(&[
            delivery(1, 1, false),
            delivery(1, 2, false),
            delivery(1, 3, false)
        ]),
        [Fault::Uncommitted(3)]
    );
    assert_eq!(
        of(&[
            delivery(1, 1, false),
            delivery(1, 1, false),
            delivery(1, 2, false)
        ]),
        [Fault::Twice(1)]
    );
    assert_eq!(
        of(&[
            delivery(1, 1, true),
            delivery(2, 1, false),
            delivery(2, 2, false)
        ]),
        [Fault::AcknowledgedAgain(1)]
    );
    assert_eq!(
        of(&[delivery(1, 2, false), delivery(1, 1, false)]),
        [Fault::OutOfOrder(1)]
    );
    let mut changed = delivery(1, 2, false);
    changed.written.part = 7;
    assert_eq!(of(&[delivery(1, 1, false), changed]), [Fault::Changed(2)]);
}
