use std::collections::BTreeSet;
use std::fmt::Write;
use std::sync::Arc;

use expect_test::{Expect, expect};
use proptest::prelude::*;

use super::{InFlight, Settled, Suspects, Waiting};
use uuid::Uuid;

use crate::event::{Event, EventId, EventKey, HeldEntity, Payload, Seq};
use crate::position::{Position, Window};

fn key(id: i64) -> EventKey {
    EventKey {
        id: EventId(id),
        event_id: Uuid::from_u128(id.unsigned_abs().into()),
    }
}

fn end(ceiling: i64) -> Position {
    let window = Window {
        ceiling: EventId(ceiling),
        ..Window::beginning()
    };
    Position {
        window: Arc::new(window),
        last_id: EventId(ceiling),
    }
}

/// Runs a story: `page 1 2 3` begins a page and takes its events up (10 bytes each), `settle 0 2` settles by sequence
/// number; each `settle` shows what was released.
fn check(story: &str, expected: &Expect) {
    let mut in_flight = InFlight::new(4, 35);
    let mut seen = String::new();
    let mut last = end(0);
    for step in story.split(';').map(str::trim) {
        let (verb, numbers) = step.split_once(' ').unwrap();
        let numbers = numbers.split(' ').map(|n| n.parse::<i64>().unwrap());
        match verb {
            "page" => {
                let ids: Vec<i64> = numbers.collect();
                last = end(ids[ids.len() - 1] + 100);
                in_flight.begin_page(ids.len(), last.clone());
                for id in ids {
                    let room = in_flight.has_room_for(10);
                    in_flight.push(key(id), 10, id, 0);
                    if !room {
                        writeln!(seen, "no room for {id}").unwrap();
                    }
                }
            }
            "again" => {
                let ids: Vec<i64> = numbers.collect();
                in_flight.begin_page(ids.len(), last.clone());
                for id in ids {
                    in_flight.push_again(key(id), 10, id, 0);
                }
            }
            "settle" => {
                for seq in numbers {
                    if in_flight.settle(Seq(seq.unsigned_abs())) == Settled::Unknown {
                        writeln!(seen, "unknown {seq}").unwrap();
                    }
                }
                let rest = in_flight.rows();
                match in_flight.advance() {
                    None => writeln!(seen, "nothing of {rest}").unwrap(),
                    Some(advance) => writeln!(
                        seen,
                        "{} events to {}/{}",
                        advance.events, advance.position.last_id, advance.position.window.ceiling
                    )
                    .unwrap(),
                }
            }
            other => panic!("unknown step {other}"),
        }
    }
    expected.assert_eq(&seen);
}

#[test]
fn only_the_prefix_without_a_gap_is_released() {
    check(
        "page 1 2 3; settle 1 2; settle 0",
        &expect![[r#"
            nothing of 3
            3 events to 103/103
        "#]],
    );
}

#[test]
fn inside_a_page_the_position_is_the_last_event() {
    check(
        "page 1 2; page 7 9; settle 0; settle 1 2; settle 3",
        &expect![[r#"
            no room for 9
            1 events to 1/102
            2 events to 7/109
            1 events to 109/109
        "#]],
    );
}

#[test]
fn a_second_word_about_an_event_changes_nothing() {
    check(
        "page 1 2; settle 0 0 9; settle 0",
        &expect![[r#"
            unknown 0
            unknown 9
            1 events to 1/102
            unknown 0
            nothing of 1
        "#]],
    );
}

#[test]
fn room_ends_with_rows_or_bytes() {
    check(
        "page 1 2 3 4; settle 0 1 2 3; page 5 6",
        &expect![[r#"
            no room for 4
            4 events to 104/104
        "#]],
    );
}

#[test]
fn behind_the_last_event_is_inside_its_page_or_at_the_end_of_it() {
    let mut in_flight = InFlight::new(10, 1000);
    assert_eq!(in_flight.taken_up(), None);
    in_flight.begin_page(2, end(102));
    in_flight.push(key(1), 1, 0, 0);
    let inside = in_flight.taken_up().unwrap();
    assert_eq!((inside.last_id.0, inside.window.ceiling.0), (1, 102));
    let seq = in_flight.push(key(2), 1, 0, 0);
    assert_eq!(in_flight.taken_up(), Some(end(102)));
    in_flight.settle(seq);
    in_flight.begin_page(1, end(105));
    assert_eq!(
        in_flight.taken_up(),
        Some(end(102)),
        "nothing of the next page"
    );
}

#[test]
fn one_event_larger_than_all_room_is_taken_when_alone() {
    let mut in_flight = InFlight::new(4, 35);
    assert!(in_flight.has_room_for(1000));
    in_flight.begin_page(2, end(2));
    in_flight.push(key(1), 1000, 0, 0);
    assert!(!in_flight.has_room_for(1));
}

fn event(id: i64, aggregate_type: &'static str, aggregate_id: &'static str) -> Event {
    Event {
        id: EventId(id),
        event_id: uuid::Uuid::nil(),
        aggregate_type: aggregate_type.into(),
        aggregate_id: aggregate_id.into(),
        event_type: "placed".into(),
        payload: Payload::Tombstone,
        content_type: None,
        headers: None,
        occurred_at_us: 0,
    }
}

#[test]
fn events_that_come_again_move_no_position() {
    check(
        "page 1 2; again 8 9; settle 0 1 2; page 5; settle 3 4",
        &expect![[r#"
            3 events to 102/102
            2 events to 105/105
        "#]],
    );
    check(
        "page 1 2; again 8 9; settle 1 3; settle 0; settle 2",
        &expect![[r#"
            nothing of 4
            2 events to 102/102
            2 events to 102/102
        "#]],
    );
}

#[test]
fn an_event_is_released_with_all_before_it() {
    let mut in_flight = InFlight::new(4, 35);
    in_flight.begin_page(2, end(2));
    let [first, second] = [1, 2].map(|id| in_flight.push(key(id), 1, 0, 0));
    in_flight.settle(second);
    in_flight.advance();
    assert!(!in_flight.is_released(second));
    in_flight.settle(first);
    assert!(!in_flight.is_released(first));
    in_flight.advance();
    assert!(in_flight.is_released(first) && in_flight.is_released(second));
}

#[test]
fn an_entity_is_counted_and_let_go() {
    let mut waiting = Waiting::new([HeldEntity {
        aggregate_type: "order".to_owned(),
        aggregate_id: "1".to_owned(),
        first: EventId(3),
        last: EventId(5),
        events: 2,
        is_passed: false,
    }]);
    for id in [5, 6, 6] {
        waiting.park(&event(id, "order", "1"));
    }
    waiting.park(&event(7, "order", "2"));
    assert_eq!((waiting.events_of("order", "1"), waiting.events()), (3, 4));
    assert!(waiting.has(&event(5, "order", "1")) && !waiting.has(&event(7, "order", "1")));
    waiting.remove("order", "1", 2);
    waiting.remove("customer", "1", 2);
    assert_eq!((waiting.events_of("order", "1"), waiting.events()), (1, 2));
    assert!(waiting.holds(&event(9, "order", "1")));
    waiting.release("order", "1");
    waiting.release("customer", "1");
    assert!(!waiting.holds(&event(9, "order", "1")) && waiting.holds(&event(9, "order", "2")));
    assert_eq!((waiting.len(), waiting.events()), (1, 1));
}

#[test]
fn a_parked_event_holds_its_own_entity_from_itself_on() {
    let mut waiting = Waiting::default();
    waiting.park(&event(5, "order", "1"));
    waiting.park(&event(8, "order", "1"));
    assert!(
        !waiting.holds(&event(4, "order", "1")),
        "what precedes it flows when the log is read again"
    );
    assert!(waiting.holds(&event(5, "order", "1")));
    assert!(waiting.holds(&event(6, "order", "1")));
    assert!(!waiting.holds(&event(6, "order", "2")));
    assert!(!waiting.holds(&event(6, "customer", "1")));
    assert_eq!(waiting.len(), 1);
}

/// Publishes events 0 to `count` life after life to a broker that refuses every batch with a culprit in it and names nobody.
/// Returns who was condemned, how many lives it took, and how often a record was waited for.
fn hunt(count: i64, batch: usize, culprits: &BTreeSet<i64>) -> (BTreeSet<i64>, usize, usize) {
    let mut suspects = Suspects::default();
    let (mut condemned, mut first, mut lives, mut waits) = (BTreeSet::new(), 0, 0, 0);
    'lives: while first < count {
        lives += 1;
        while first < count {
            let mut flight = Vec::new();
            for id in first..count {
                let tried = flight.len() == 1 && suspects.is_tried_alone(key(first));
                let room = suspects.in_flight_before(key(id)).min(20_000);
                if tried || flight.len() > room {
                    break;
                }
                flight.push(id);
            }
            waits += 1;
            for batch in flight.chunks(batch) {
                let bad = |id: &i64| culprits.contains(id) && !condemned.contains(id);
                if batch.iter().any(bad) {
                    if flight.len() == 1 && suspects.is_tried_alone(key(first)) {
                        suspects.acquit(key(first));
                        condemned.insert(first);
                    } else {
                        let refused: Vec<EventKey> = batch.iter().copied().map(key).collect();
                        suspects.accuse(&refused);
                    }
                    continue 'lives;
                }
                for id in batch {
                    suspects.acquit(key(*id));
                }
                first += i64::try_from(batch.len()).unwrap();
            }
        }
    }
    assert!(suspects.is_empty(), "{suspects:?}");
    (condemned, lives, waits)
}

#[test]
fn a_culprit_among_ten_thousand_is_found_in_three_lives() {
    for culprit in [0, 1, 31, 32, 5_000, 9_999] {
        let culprits = BTreeSet::from([culprit]);
        let (condemned, lives, waits) = hunt(10_000, 10_000, &culprits);
        assert_eq!(condemned, culprits);
        assert!(lives <= 4, "{lives} lives");
        assert!(waits < 10_000 / 32 + 40, "{waits} round trips");
    }
}

proptest! {
    #[test]
    fn nobody_is_condemned_but_the_culprits(
        count in 1_i64..3_000,
        batch in 1_usize..2_000,
        culprits in prop::collection::btree_set(0_i64..3_000, 0..6),
    ) {
        let culprits: BTreeSet<i64> = culprits.into_iter().filter(|id| *id < count).collect();
        let (condemned, lives, _) = hunt(count, batch, &culprits);
        prop_assert!(lives <= 1 + 3 * culprits.len(), "{lives} lives");
        prop_assert_eq!(condemned, culprits);
    }

    /// Against the naive model: a list of all events and pages, and a set of settled numbers.
    #[test]
    fn releases_exactly_the_settled_prefix(
        pages in prop::collection::vec(1_usize..5, 1..20),
        order in prop::collection::vec(any::<prop::sample::Index>(), 100),
    ) {
        let total: usize = pages.iter().sum();
        let mut in_flight = InFlight::new(usize::MAX, usize::MAX);
        let mut ends = Vec::new();
        let mut id = 0;
        for page in &pages {
            in_flight.begin_page(*page, end(id + 1000));
            for _ in 0..*page {
                id += 1;
                in_flight.push(key(id), 1, id, 7);
            }
            ends.push((id, 1000 + id - i64::try_from(*page).unwrap()));
        }
        let mut unsettled: Vec<usize> = (0..total).collect();
        let mut settled = vec![false; total];
        let mut released = 0;
        for index in order {
            if unsettled.is_empty() {
                break;
            }
            let seq = unsettled.swap_remove(index.index(unsettled.len()));
            prop_assert_eq!(in_flight.settle(Seq(seq as u64)), Settled::Now { tag: 7, occurred_at_us: i64::try_from(seq).unwrap() + 1 });
            settled[seq] = true;
            let prefix = settled.iter().take_while(|settled| **settled).count();
            let advance = in_flight.advance();
            prop_assert_eq!(advance.is_some(), prefix > released);
            if let Some(advance) = advance {
                prop_assert_eq!(usize::try_from(advance.events).unwrap(), prefix - released);
                let last = i64::try_from(prefix).unwrap();
                let expected = ends.iter().find(|(id, _)| *id == last).map_or(last, |(_, end)| *end);
                prop_assert_eq!(advance.position.last_id, EventId(expected));
            }
            released = prefix;
            prop_assert_eq!(in_flight.rows(), total - prefix);
            prop_assert_eq!(in_flight.bytes(), total - prefix);
        }
    }
}

#[test]
fn a_later_event_with_a_lower_id_waits_too() {
    let mut waiting = Waiting::default();
    waiting.park(&event(500, "order", "1"));
    let later = event(5, "order", "1");
    assert!(!waiting.holds(&later), "it may precede what is parked");
    waiting.pass();
    assert!(
        waiting.holds(&later),
        "the log was read past what is parked"
    );
    let again = event(500, "order", "1");
    assert!(!waiting.has(&again), "the id came again, for another event");
    waiting.park(&later);
    waiting.park(&again);
    assert_eq!(waiting.events_of("order", "1"), 3);
}

#[test]
fn what_is_read_again_is_not_passed_before_it_came() {
    let mut waiting = Waiting::default();
    let parked = event(500, "order", "1");
    waiting.park(&parked);
    waiting.read_again();
    waiting.park(&event(400, "order", "2"));
    waiting.pass();
    assert!(waiting.has(&parked), "it comes out of the log once more");
    assert!(!waiting.has(&event(400, "order", "2")));
    waiting.park(&parked);
    assert_eq!(waiting.events_of("order", "1"), 1);
    waiting.pass();
    assert!(!waiting.has(&parked));
}
