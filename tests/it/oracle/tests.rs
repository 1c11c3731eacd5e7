//! Every promise has a bad history that the judge must reject.

use super::*;

const BOUNDS: Bounds = Bounds {
    in_flight_rows: 2,
    in_flight_bytes: 100,
    page_rows: 2,
    exactly_once: false,
    parked_max: 3,
    parked_max_per_entity: 2,
    rejected: Rejected::Waits,
};

fn committed(id: i64, entity: &str) -> Fact {
    Fact::Committed(event(id, entity))
}

fn event(id: i64, entity: &str) -> Committed {
    Committed {
        id,
        entity: entity.to_owned(),
        wanted: true,
        poison: false,
        bytes: 10,
        hinted: true,
    }
}

fn leased() -> Fact {
    Fact::Leased {
        owner: 1,
        until_ms: 1000,
    }
}

fn handed_over(id: i64) -> Fact {
    Fact::HandedOver {
        owner: 1,
        life: 1,
        id,
    }
}

fn appended(id: i64) -> Fact {
    Fact::Appended { id, intact: true }
}

fn confirmed(id: i64) -> Fact {
    Fact::Confirmed { life: 1, id }
}

/// From the hand-over to the confirmation.
fn delivered(id: i64) -> [Fact; 4] {
    let sent = Fact::Sent { owner: 1, id };
    [handed_over(id), sent, appended(id), confirmed(id)]
}

fn moved(passed: &[i64]) -> Fact {
    Fact::Moved {
        passed: passed.to_vec(),
        regained: Vec::new(),
    }
}

fn parked(id: i64) -> Fact {
    Fact::Parked {
        owner: 1,
        id,
        reason: true,
    }
}

fn broken(facts: impl IntoIterator<Item = Fact>) -> Vec<Promise> {
    broken_within(facts, &BOUNDS)
}

fn broken_within(facts: impl IntoIterator<Item = Fact>, bounds: &Bounds) -> Vec<Promise> {
    let facts = facts.into_iter().zip(10..);
    let history = History {
        facts: facts.map(|(fact, at_ms)| (at_ms, fact)).collect(),
    };
    let mut broken: Vec<Promise> = judge(&history, bounds)
        .into_iter()
        .map(|violation| violation.promise)
        .collect();
    broken.dedup();
    broken
}

/// Two events of one entity and one of another, and what happens to them.
fn story(rest: impl IntoIterator<Item = Fact>) -> Vec<Fact> {
    let mut facts = vec![
        leased(),
        committed(1, "a"),
        committed(2, "b"),
        committed(3, "a"),
    ];
    facts.extend(rest);
    facts
}

#[test]
fn a_good_history_is_accepted() {
    let good = [delivered(1), delivered(2), delivered(3)].concat();
    let zombie = [appended(1)];
    let end = [moved(&[1, 2]), moved(&[3]), Fact::Quiet];
    assert_eq!(broken(story([&good[..], &zombie, &end].concat())), []);
}

#[test]
fn a_good_history_with_a_rejected_event_is_accepted() {
    let mut facts = story([]);
    facts[1] = Fact::Committed(Committed {
        poison: true,
        ..event(1, "a")
    });
    facts.extend([&delivered(2)[..], &[parked(1), parked(3)]].concat());
    facts.extend([moved(&[1, 2, 3]), Fact::Quiet]);
    assert_eq!(broken(facts), []);
}

#[test]
fn i1_refuses_what_was_not_committed_or_not_written_so() {
    assert_eq!(broken(story([handed_over(4)])), [Promise::I1]);
    assert_eq!(broken(story([appended(4)])), [Promise::I1]);
    let changed = Fact::Appended {
        id: 1,
        intact: false,
    };
    assert_eq!(broken(story([changed])), [Promise::I1]);
}

#[test]
fn i2_refuses_another_order_than_that_of_the_commits() {
    assert_eq!(broken(story([appended(3), appended(1)])), [Promise::I2]);
    assert_eq!(
        broken(story([handed_over(3), handed_over(1)])),
        [Promise::I2]
    );
    let twice = [delivered(1), delivered(1)].concat();
    assert_eq!(broken(story(twice)), [Promise::I2]);
}

#[test]
fn i2_takes_the_order_of_commits_and_not_of_ids() {
    let late = [leased(), committed(2, "a"), committed(1, "a")];
    let good = [&late[..], &[appended(2), appended(1)]].concat();
    assert_eq!(broken(good), []);
    let bad = [&late[..], &[appended(1), appended(2)]].concat();
    assert_eq!(broken(bad), [Promise::I2]);
}

#[test]
fn i3_refuses_progress_past_what_is_not_confirmed() {
    assert_eq!(broken(story([appended(1), moved(&[1])])), [Promise::I3]);
    assert_eq!(broken(story([confirmed(1)])), [Promise::I3]);
}

#[test]
fn i3_refuses_a_cursor_that_goes_back() {
    let back = Fact::Moved {
        passed: Vec::new(),
        regained: vec![1],
    };
    let facts = [&delivered(1)[..], &[moved(&[1]), back]].concat();
    assert_eq!(broken(story(facts)), [Promise::I3]);
}

#[test]
fn i4_refuses_an_event_that_is_left_over() {
    let facts = [&delivered(1)[..], &delivered(2), &[moved(&[1, 2])]].concat();
    let facts = [&facts[..], &[Fact::Quiet]].concat();
    assert_eq!(broken(story(facts)), [Promise::I4]);
}

#[test]
fn i5_refuses_more_than_the_bounds() {
    let mut rows = story([committed(4, "c")]);
    rows.extend([handed_over(1), handed_over(2), handed_over(3)]);
    assert_eq!(broken(rows), [Promise::I5]);

    let mut bytes = story([]);
    bytes[1] = Fact::Committed(Committed {
        bytes: 95,
        ..event(1, "a")
    });
    bytes.extend([handed_over(1), handed_over(2)]);
    assert_eq!(broken(bytes), [Promise::I5]);

    let ahead = Fact::Captured {
        owner: 1,
        ids: (1..=9).collect(),
    };
    let facts = (1..=9).map(|id| committed(id, "a")).chain([ahead]);
    assert_eq!(broken(facts), [Promise::I5]);
}

#[test]
fn i6_refuses_that_others_wait_or_that_the_entity_does_not() {
    assert_eq!(broken(story([parked(2)])), [Promise::I6]);
    let mut facts = story([]);
    facts[1] = Fact::Committed(Committed {
        poison: true,
        ..event(1, "a")
    });
    facts.extend([appended(1), parked(1), appended(2), parked(2)]);
    facts.extend([appended(3), parked(3), moved(&[1, 2, 3]), Fact::Quiet]);
    assert_eq!(broken(facts), [Promise::I6]);
}

#[test]
fn i6_refuses_that_nobody_knows_why_an_entity_waits() {
    let mut facts = story([]);
    facts[1] = Fact::Committed(Committed {
        poison: true,
        ..event(1, "a")
    });
    facts.push(Fact::Parked {
        owner: 1,
        id: 1,
        reason: false,
    });
    assert_eq!(broken(facts), [Promise::I6]);
}

/// Event 1 is poison and both of its entity are parked.
fn poisoned(rest: impl IntoIterator<Item = Fact>) -> Vec<Fact> {
    let mut facts = story([]);
    facts[1] = Fact::Committed(Committed {
        poison: true,
        ..event(1, "a")
    });
    facts.extend(
        [
            &delivered(2)[..],
            &[parked(1), parked(3), moved(&[1, 2, 3])],
        ]
        .concat(),
    );
    facts.extend(rest);
    facts
}

#[test]
fn a_redriven_entity_is_accepted_in_its_order_only() {
    let mended = [Fact::Mended { id: 1 }];
    let unparked = [1, 3].map(|id| Fact::Unparked { id });
    let good = [
        &mended[..],
        &delivered(1),
        &delivered(3),
        &unparked,
        &[Fact::Quiet],
    ]
    .concat();
    assert_eq!(broken(poisoned(good)), []);
    let early = [&mended[..], &unparked[..1], &delivered(1)].concat();
    assert_eq!(broken(poisoned(early)), [Promise::I3]);
    let overtaken = [&mended[..], &delivered(3)].concat();
    assert_eq!(broken(poisoned(overtaken)), [Promise::I2]);
    let left = [&mended[..], &delivered(1), &[Fact::Quiet]].concat();
    assert_eq!(broken(poisoned(left)), [Promise::I6]);
}

#[test]
fn a_dropped_event_is_missed_by_nobody() {
    let wanted = Fact::Wanted { id: 1, drop: true };
    let unparked = [1, 3].map(|id| Fact::Unparked { id });
    let good = [&[wanted.clone(), unparked[0].clone()][..], &delivered(3)].concat();
    let good = [&good[..], &[unparked[1].clone(), Fact::Quiet]].concat();
    assert_eq!(broken(poisoned(good)), []);
    assert_eq!(broken(poisoned([unparked[0].clone()])), [Promise::I3]);
}

#[test]
fn i5_refuses_more_parked_events_than_allowed() {
    let later = (4..=5).flat_map(|id| [committed(id, "a"), parked(id)]);
    assert_eq!(broken(poisoned(later)), [Promise::I5]);
}

#[test]
fn i7_refuses_that_a_lost_hint_loses_the_event() {
    let silent = Fact::Committed(Committed {
        hinted: false,
        ..event(1, "a")
    });
    assert_eq!(broken([silent, Fact::Quiet]), [Promise::I7]);
}

#[test]
fn i8_refuses_two_owners_and_late_hand_overs() {
    let second = Fact::Leased {
        owner: 2,
        until_ms: 1000,
    };
    assert_eq!(broken([leased(), second]), [Promise::I8]);
    let released = Fact::Released { owner: 1 };
    assert_eq!(
        broken(story([released.clone(), handed_over(1)])),
        [Promise::I8]
    );
    let sent = Fact::Sent { owner: 1, id: 1 };
    assert_eq!(
        broken(story([handed_over(1), released, sent])),
        [Promise::I8]
    );
    let short = Fact::Leased {
        owner: 1,
        until_ms: 14,
    };
    assert_eq!(broken(story([short, handed_over(1)])), [Promise::I8]);
}

#[test]
fn i9_refuses_a_second_copy() {
    let twice = story([appended(1), appended(1)]);
    let bounds = Bounds {
        exactly_once: true,
        ..BOUNDS
    };
    assert_eq!(broken(twice.clone()), []);
    assert_eq!(broken_within(twice, &bounds), [Promise::I9]);
}
