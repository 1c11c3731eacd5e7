//! What every ledger does with parked events, and what operators see of them and ask for.

use std::time::Duration;

use outbox_relay::event::{Event, EventId, EventKey, Payload, Shard, Start};
use outbox_relay::ledger::acts::{Action, ParkedDetail, Selector, Wish};
use outbox_relay::ledger::{
    Acquired, Due, Fenced, Ledger, Parked, Released, Renewed, Resolution, Resolved, Settings,
};
use outbox_relay::position::{Position, Window};

use crate::harness::books::Books;
use crate::harness::log::{PolledPostgres, event};

macro_rules! kept_by {
    ($log:ident as $module:ident) => {
        mod $module {
            kept_by! { in $log:
                nothing_is_due_before_somebody_asks,
                an_entity_is_due_from_its_oldest_event_on,
                what_waits_behind_a_dropped_event_is_due,
                a_drop_that_was_taken_back_stays,
                what_is_rejected_again_waits_again,
                a_dead_letter_is_due_alone,
                due_events_are_as_they_were_written,
                due_events_are_bounded_in_rows_and_bytes,
                a_former_owner_resolves_nothing,
                a_wish_outlives_its_owner,
                a_wish_that_is_taken_back_drops_nothing,
                what_the_cursor_has_not_passed_is_not_due,
                selectors_find_what_they_say,
                a_wish_is_noted_with_who_and_why,
                one_event_is_shown_with_its_history,
                whatever_the_log_holds_is_parked,
                one_bad_event_keeps_no_other_from_being_parked,
                an_id_that_comes_again_is_another_event,
            }
        }
    };
    (in $log:ident: $($test:ident,)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                if let Some(log) = <$crate::harness::log::$log as $crate::harness::log::Log>::create().await {
                    super::$test(log).await;
                }
            }
        )*
    };
}

kept_by!(SqliteLog as sqlite);
kept_by!(PolledPostgres as postgres);

mod postgres_only {
    kept_by! { in PolledPostgres:
        a_later_event_with_a_lower_id_is_due_last,
        no_setting_or_object_of_the_database_matters,
    }
}

const ROWS: usize = 100;
const BYTES: usize = 1 << 20;

fn settings(holder: &str) -> Settings {
    Settings {
        pipeline: "default".parse().unwrap(),
        shard: Shard::whole(),
        holder: holder.to_owned(),
        lease_ttl: Duration::from_secs(60),
        start: Start::Earliest,
    }
}

/// Owns the pipeline, whose cursor has passed everything here.
async fn owner<B: Books>(books: &B) -> B::Ledger {
    let mut ledger = books.ledger(settings("first"));
    assert!(matches!(ledger.acquire().await.unwrap(), Acquired::Ours(_)));
    assert_eq!(
        ledger.acknowledge(&position(1000)).await.unwrap(),
        Fenced::Written
    );
    ledger
}

fn position(last_id: i64) -> Position {
    let window = Window {
        ceiling: EventId(last_id),
        ..Window::beginning()
    };
    Position {
        window: std::sync::Arc::new(window),
        last_id: EventId(last_id),
    }
}

fn parked(id: i64, entity: &str, error: Option<&str>) -> Parked {
    Parked {
        event: Event {
            id: EventId(id),
            event_id: key(id).event_id,
            aggregate_type: "order".into(),
            aggregate_id: entity.into(),
            ..event("e")
        },
        error: error.map(str::to_owned),
        holds: true,
    }
}

fn dead_letter(id: i64, entity: &str) -> Parked {
    Parked {
        holds: false,
        ..parked(id, entity, Some("too large"))
    }
}

async fn due(ledger: &mut impl Ledger) -> Vec<i64> {
    let due = ledger.due(ROWS, BYTES).await.unwrap();
    due.iter().map(|due| due.event.id.0).collect()
}

async fn delivered(ledger: &mut impl Ledger, ids: &[i64]) -> Vec<(String, String)> {
    let resolved = Resolved {
        delivered: ids.iter().map(|id| key(*id)).collect(),
        ..Resolved::default()
    };
    free(ledger.resolve(&resolved).await.unwrap())
}

fn free(resolution: Resolution) -> Vec<(String, String)> {
    match resolution {
        Resolution::Written(Released { free, .. }) => free,
        Resolution::Lost => panic!("the lease is ours"),
    }
}

fn key(id: i64) -> EventKey {
    EventKey {
        id: EventId(id),
        event_id: uuid::Uuid::from_u128(id.unsigned_abs().into()),
    }
}

fn id(id: i64) -> Selector {
    Selector {
        id: Some(EventId(id)),
        ..Selector::default()
    }
}

fn wish(action: Action, selector: Selector) -> Wish {
    Wish {
        action,
        selector,
        with_waiting: false,
        who: "it's me@here".to_owned(),
        reason: Some("the cause is \"mended\"".to_owned()),
    }
}

async fn nothing_is_due_before_somebody_asks<B: Books>(books: B) {
    let mut ledger = owner(&books).await;
    let some = [
        parked(1, "a", Some("bad")),
        parked(2, "a", None),
        dead_letter(3, "b"),
    ];
    ledger.park(&some).await.unwrap();
    assert_eq!(due(&mut ledger).await, [0; 0]);
}

async fn an_entity_is_due_from_its_oldest_event_on<B: Books>(mut books: B) {
    let mut ledger = owner(&books).await;
    let some = [
        parked(1, "a", Some("bad")),
        parked(2, "a", None),
        parked(3, "b", Some("bad")),
        parked(4, "a", None),
        parked(5, "a", Some("worse")),
        parked(6, "a", None),
    ];
    ledger.park(&some).await.unwrap();
    books.mark(&wish(Action::Redrive, id(1))).await;
    assert_eq!(due(&mut ledger).await, [1, 2, 4]);
    // What comes meanwhile waits behind; nothing is free as long as something is left.
    assert_eq!(delivered(&mut ledger, &[1]).await, []);
    assert_eq!(due(&mut ledger).await, [2, 4]);
    assert_eq!(delivered(&mut ledger, &[2, 4]).await, []);
    assert_eq!(
        due(&mut ledger).await,
        [0; 0],
        "the next one was rejected, and nobody asked for it"
    );
    books.mark(&wish(Action::Redrive, id(5))).await;
    assert_eq!(due(&mut ledger).await, [5, 6]);
    ledger.park(&[parked(7, "a", None)]).await.unwrap();
    assert_eq!(delivered(&mut ledger, &[5, 6]).await, []);
    assert_eq!(due(&mut ledger).await, [7]);
    assert_eq!(
        delivered(&mut ledger, &[7]).await,
        [("order".to_owned(), "a".to_owned())]
    );
    assert_eq!(due(&mut ledger).await, [0; 0]);
}

async fn what_waits_behind_a_dropped_event_is_due<B: Books>(mut books: B) {
    let mut ledger = owner(&books).await;
    let some = [
        parked(1, "a", Some("bad")),
        parked(2, "a", None),
        parked(3, "a", None),
    ];
    ledger.park(&some).await.unwrap();
    books.mark(&wish(Action::Drop, id(1))).await;
    let first = ledger.due(ROWS, BYTES).await.unwrap();
    // Alone: were the next one published before this is gone, who takes the wish back would reorder them.
    assert!(
        matches!(&first[..], [Due { drop: true, event, .. }] if event.id == EventId(1)),
        "{first:?}"
    );
    let resolved = Resolved {
        dropped: vec![key(1)],
        ..Resolved::default()
    };
    assert_eq!(free(ledger.resolve(&resolved).await.unwrap()), []);
    assert_eq!(due(&mut ledger).await, [2, 3]);
}

async fn a_drop_that_was_taken_back_stays<B: Books>(mut books: B) {
    let mut ledger = owner(&books).await;
    let some = [parked(1, "a", Some("bad")), parked(2, "b", Some("bad"))];
    ledger.park(&some).await.unwrap();
    for n in [1, 2] {
        books.mark(&wish(Action::Drop, id(n))).await;
    }
    assert_eq!(due(&mut ledger).await, [1, 2]);
    books.mark(&wish(Action::Redrive, id(1))).await;
    let resolved = Resolved {
        dropped: vec![key(1), key(2)],
        ..Resolved::default()
    };
    let Resolution::Written(released) = ledger.resolve(&resolved).await.unwrap() else {
        panic!("the lease is ours");
    };
    assert_eq!(released.kept, [key(1)]);
    assert_eq!(released.free, [("order".to_owned(), "b".to_owned())]);
    assert_eq!(due(&mut ledger).await, [1]);
}

async fn what_is_rejected_again_waits_again<B: Books>(mut books: B) {
    let mut ledger = owner(&books).await;
    let some = [parked(1, "a", Some("bad")), parked(2, "a", None)];
    ledger.park(&some).await.unwrap();
    for attempt in 1..4 {
        books.mark(&wish(Action::Redrive, id(1))).await;
        let again = ledger.due(ROWS, BYTES).await.unwrap();
        assert_eq!((again.len(), again[0].attempts), (2, attempt));
        let resolved = Resolved {
            rejected: vec![(key(1), format!("it's bad {attempt}"))],
            ..Resolved::default()
        };
        assert_eq!(free(ledger.resolve(&resolved).await.unwrap()), []);
        assert_eq!(due(&mut ledger).await, [0; 0]);
    }
    let [shown] = &books.show(&id(1)).await[..] else {
        panic!("one event")
    };
    assert_eq!(shown.event.error.as_deref(), Some("it's bad 3"));
    let history: Vec<&str> = shown.history.iter().map(|time| &time.error[..]).collect();
    assert_eq!(history, ["bad", "it's bad 1", "it's bad 2", "it's bad 3"]);
}

async fn a_dead_letter_is_due_alone<B: Books>(mut books: B) {
    let mut ledger = owner(&books).await;
    let some = [
        dead_letter(1, "a"),
        dead_letter(2, "a"),
        parked(3, "a", Some("bad")),
    ];
    ledger.park(&some).await.unwrap();
    books.mark(&wish(Action::Redrive, id(2))).await;
    assert_eq!(due(&mut ledger).await, [2]);
    assert_eq!(delivered(&mut ledger, &[2]).await, []);
    assert_eq!(due(&mut ledger).await, [0; 0]);
}

async fn due_events_are_as_they_were_written<B: Books>(mut books: B) {
    let mut ledger = owner(&books).await;
    let json = r#"{"b" : 9007199254740993, "a":"\u0000", "a":1.10}"#;
    let payloads = [
        Payload::Tombstone,
        Payload::Json(json.into()),
        Payload::Encoded(vec![].into()),
        Payload::Encoded(vec![0, 255].into()),
        Payload::Ambiguous(json.into(), vec![1].into()),
    ];
    let some: Vec<Parked> = (1..)
        .zip(payloads)
        .map(|(id, payload)| Parked {
            event: Event {
                id: EventId(id),
                payload,
                headers: (id == 1).then(|| r#"{"a" :"\u0000"}"#.into()),
                content_type: (id == 2).then(|| "text/plain".into()),
                occurred_at_us: 1_700_000_000_123_456 + id,
                ..event("it's\u{1f980}")
            },
            ..dead_letter(id, "")
        })
        .collect();
    ledger.park(&some).await.unwrap();
    books
        .mark(&wish(Action::Redrive, Selector::default()))
        .await;
    let found = ledger.due(ROWS, BYTES).await.unwrap();
    let written: Vec<&Event> = some.iter().map(|parked| &parked.event).collect();
    let found: Vec<&Event> = found.iter().map(|due| &due.event).collect();
    assert_eq!(found, written);
}

async fn due_events_are_bounded_in_rows_and_bytes<B: Books>(mut books: B) {
    let mut ledger = owner(&books).await;
    let some: Vec<Parked> = (1..=9)
        .map(|id| Parked {
            event: Event {
                payload: Payload::Encoded(vec![9; 1000].into()),
                headers: None,
                ..parked(id, "a", None).event
            },
            error: (id == 1).then(|| "bad".to_owned()),
            holds: true,
        })
        .collect();
    ledger.park(&some).await.unwrap();
    books.mark(&wish(Action::Redrive, id(1))).await;
    for (rows, bytes, count) in [(4, BYTES, 4), (ROWS, 3500, 3), (ROWS, 10, 1), (1, 0, 1)] {
        let due = ledger.due(rows, bytes).await.unwrap();
        let ids: Vec<i64> = due.iter().map(|due| due.event.id.0).collect();
        assert_eq!(
            ids,
            (1..=count).collect::<Vec<i64>>(),
            "{rows} rows, {bytes} bytes"
        );
    }
}

async fn a_former_owner_resolves_nothing<B: Books>(mut books: B) {
    let mut ledger = owner(&books).await;
    ledger.park(&[parked(1, "a", Some("bad"))]).await.unwrap();
    ledger.release(true).await.unwrap();
    let mut next = books.ledger(settings("next"));
    next.acquire().await.unwrap();
    let resolved = Resolved {
        delivered: vec![key(1)],
        rejected: vec![(key(1), "no".to_owned())],
        ..Resolved::default()
    };
    assert_eq!(ledger.resolve(&resolved).await.unwrap(), Resolution::Lost);
    let [shown] = &books.show(&id(1)).await[..] else {
        panic!("it is still there")
    };
    assert_eq!(shown.event.attempts, 1);
}

async fn a_wish_outlives_its_owner<B: Books>(mut books: B) {
    let mut ledger = owner(&books).await;
    let some = [
        parked(1, "a", Some("bad")),
        parked(2, "a", None),
        parked(3, "a", None),
    ];
    ledger.park(&some).await.unwrap();
    books.mark(&wish(Action::Redrive, id(1))).await;
    assert_eq!(due(&mut ledger).await, [1, 2, 3]);
    delivered(&mut ledger, &[1]).await;
    drop(ledger);
    let mut next = books.ledger(settings("first"));
    let Acquired::Ours(tenure) = next.acquire().await.unwrap() else {
        panic!("the same holder may ask again")
    };
    assert_eq!(
        (tenure.held[0].first, tenure.held[0].events),
        (EventId(2), 2)
    );
    assert_eq!(due(&mut next).await, [2, 3]);
}

async fn a_wish_that_is_taken_back_drops_nothing<B: Books>(mut books: B) {
    let mut ledger = owner(&books).await;
    ledger.park(&[parked(1, "a", Some("bad"))]).await.unwrap();
    books.mark(&wish(Action::Drop, id(1))).await;
    assert_eq!(due(&mut ledger).await, [1]);
    books.mark(&wish(Action::Redrive, id(1))).await;
    let resolved = Resolved {
        dropped: vec![key(1)],
        ..Resolved::default()
    };
    assert_eq!(free(ledger.resolve(&resolved).await.unwrap()), []);
    assert_eq!(due(&mut ledger).await, [1]);
}

/// What precedes it in its entity may still come out of the log, and must not be overtaken.
async fn what_the_cursor_has_not_passed_is_not_due<B: Books>(mut books: B) {
    let emitted = books.emit((0..3).map(|_| event("e")).collect()).await;
    let mut ledger = books.ledger(settings("first"));
    ledger.acquire().await.unwrap();
    let mut source = books.source();
    use outbox_relay::source::{PageLimits, Source};
    source.seek(Position::beginning());
    let limits = PageLimits {
        rows: 2,
        bytes: BYTES,
    };
    let page = source
        .capture(limits, &Position::beginning())
        .await
        .unwrap();
    let [one, two] = [0, 1].map(|index| page.events[index].clone());
    let three = Event {
        id: EventId(two.id.0 + 1),
        ..emitted[2].clone()
    };
    let holding = |event: &Event, error: &str| Parked {
        event: event.clone(),
        error: Some(error.to_owned()),
        holds: true,
    };
    ledger
        .park(&[holding(&one, "bad"), holding(&three, "bad")])
        .await
        .unwrap();
    books
        .mark(&wish(Action::Redrive, Selector::default()))
        .await;
    assert_eq!(due(&mut ledger).await, [0; 0]);
    ledger.acknowledge(&page.end).await.unwrap();
    assert_eq!(due(&mut ledger).await, [one.id.0]);
    let rest = source.capture(limits, &page.end).await.unwrap();
    ledger.acknowledge(&rest.end).await.unwrap();
    assert_eq!(due(&mut ledger).await, [one.id.0, three.id.0]);
}

async fn selectors_find_what_they_say<B: Books>(mut books: B) {
    let mut ledger = owner(&books).await;
    let some = [
        parked(1, "it's", Some("too LARGE")),
        parked(2, "it's", None),
        parked(3, "b", Some("no topic")),
        dead_letter(4, "b"),
        parked(5, "c", None),
        parked(6, "c", None),
    ];
    ledger.park(&some).await.unwrap();
    let cases = [
        (Selector::default(), vec![1, 3, 4, 5]),
        (id(2), vec![2]),
        (
            Selector {
                entity: Some("order/it's".parse().unwrap()),
                ..Selector::default()
            },
            vec![1],
        ),
        (
            Selector {
                error: Some("Too large".to_owned()),
                ..Selector::default()
            },
            vec![1, 4],
        ),
        (
            Selector {
                pipeline: Some("other".parse().unwrap()),
                ..Selector::default()
            },
            vec![],
        ),
        (
            Selector {
                older_than: Some(Duration::from_secs(3600)),
                ..Selector::default()
            },
            vec![],
        ),
        (
            Selector {
                older_than: Some(Duration::ZERO),
                pipeline: Some("default".parse().unwrap()),
                ..Selector::default()
            },
            vec![1, 3, 4, 5],
        ),
    ];
    for (selector, expected) in cases {
        let found = books.list(&selector).await;
        let mut ids: Vec<i64> = found.events.iter().map(|event| event.id).collect();
        ids.sort_unstable();
        assert_eq!(ids, expected, "{selector}");
        assert_eq!(
            usize::try_from(found.total).unwrap(),
            expected.len(),
            "{selector}"
        );
    }
    let all = books.list(&Selector::default()).await.events;
    let waiting: Vec<_> = all
        .iter()
        .map(|event| (event.id, event.waiting_events))
        .collect();
    assert!(waiting.contains(&(1, 1)) && waiting.contains(&(4, 0)) && waiting.contains(&(5, 1)));
}

async fn a_wish_is_noted_with_who_and_why<B: Books>(mut books: B) {
    let mut ledger = owner(&books).await;
    let some = [
        parked(1, "a", Some("bad")),
        parked(2, "a", None),
        parked(3, "b", Some("bad")),
    ];
    ledger.park(&some).await.unwrap();
    let nothing = books.mark(&wish(Action::Redrive, id(9))).await;
    assert!(nothing.is_empty() && books.acts().await.is_empty());
    let selector = Selector {
        error: Some("BAD".to_owned()),
        ..Selector::default()
    };
    let marked = books.mark(&wish(Action::Redrive, selector)).await;
    assert_eq!((&marked[0].pipeline[..], marked[0].events), ("default", 2));
    let whole = Wish {
        with_waiting: true,
        ..wish(Action::Drop, id(1))
    };
    assert_eq!(books.mark(&whole).await[0].events, 2);
    let acts = books.acts().await;
    let noted: Vec<_> = acts
        .iter()
        .map(|act| (&act.action[..], &act.selector[..], act.events))
        .collect();
    assert_eq!(
        noted,
        [("drop", "id 1", 2), ("redrive", "error \"BAD\"", 2)]
    );
    assert_eq!(acts[0].who, "it's me@here");
    assert_eq!(acts[0].reason.as_deref(), Some("the cause is \"mended\""));
    assert!(acts[0].at.ends_with('Z'), "{}", acts[0].at);
}

async fn one_event_is_shown_with_its_history<B: Books>(mut books: B) {
    let mut ledger = owner(&books).await;
    let large = Parked {
        event: Event {
            payload: Payload::Json(format!("\"{}\"", "x".repeat(5000)).into()),
            ..parked(1, "a", None).event
        },
        ..parked(1, "a", Some("too large"))
    };
    ledger.park(&[large, parked(2, "a", None)]).await.unwrap();
    let [shown] = &books.show(&id(1)).await[..] else {
        panic!("one event")
    };
    let ParkedDetail {
        behind,
        payload,
        payload_bytes,
        history,
        ..
    } = shown;
    assert_eq!((*behind, *payload_bytes), (None, 5002));
    assert_eq!(payload.as_ref().map(String::len), Some(100));
    assert_eq!(history[0].error, "too large");
    assert_eq!(books.show(&id(2)).await[0].behind, Some(1));
}

/// Text that no compression makes short enough for an index entry.
fn incompressible(bytes: usize) -> String {
    let mut state = 1_u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        char::from(b'!' + u8::try_from((state >> 33) % 94).unwrap())
    };
    (0..bytes).map(|_| next()).collect()
}

async fn whatever_the_log_holds_is_parked<B: Books>(mut books: B) {
    let mut ledger = owner(&books).await;
    let long = incompressible(100_000);
    let deep = format!("{}1{}", "[".repeat(21_820), "]".repeat(21_820));
    let with = |id: i64, change: &dyn Fn(&mut Event)| {
        let mut parked = parked(id, &id.to_string(), Some("bad"));
        change(&mut parked.event);
        parked
    };
    let mut some = vec![
        with(1, &|event| event.aggregate_type = (&long[..]).into()),
        with(2, &|event| event.aggregate_id = (&long[..]).into()),
        with(3, &|event| event.event_type = (&long[..]).into()),
        with(4, &|event| event.content_type = Some((&long[..]).into())),
        with(5, &|event| {
            event.payload = Payload::Json(deep.clone().into())
        }),
        with(6, &|event| event.headers = Some((&deep[..]).into())),
        with(7, &|event| {
            event.payload = Payload::Json("\"\\ud800\"".into())
        }),
        with(8, &|event| event.occurred_at_us = i64::MAX),
        with(9, &|event| event.occurred_at_us = i64::MIN),
        with(10, &|event| event.occurred_at_us = -62_000_000_000_123_456),
        with(11, &|event| {
            event.occurred_at_us = 9_223_372_036_854_775_806
        }),
        with(12, &|event| {
            event.payload = Payload::Encoded(vec![0; 3 << 20].into())
        }),
    ];
    some[0].error = Some("a\0b".to_owned());
    some[1].error = Some("\u{1f980}".repeat(1 << 20));
    ledger.park(&some).await.unwrap();
    let resolved = Resolved {
        rejected: vec![(key(3), format!("a\0{}", "x".repeat(1 << 20)))],
        ..Resolved::default()
    };
    ledger.resolve(&resolved).await.unwrap();
    for parked in &some {
        let [shown] = &books.show(&id(parked.event.id.0)).await[..] else {
            panic!("one event")
        };
        let error = shown.event.error.as_ref().unwrap();
        assert!(!shown.history.is_empty() && error.len() <= 8192 && !error.contains('\0'));
    }
    books
        .mark(&wish(Action::Redrive, Selector::default()))
        .await;
    let found = ledger.due(ROWS, 1 << 30).await.unwrap();
    assert_eq!(found.len(), some.len());
    for (found, written) in found.iter().zip(&some) {
        assert!(found.event == written.event, "event {}", written.event.id);
    }
    drop(ledger);
    let mut next = books.ledger(settings("first"));
    let Acquired::Ours(tenure) = next.acquire().await.unwrap() else {
        panic!("the same holder may ask again")
    };
    assert_eq!(tenure.held.len(), some.len());
}

async fn one_bad_event_keeps_no_other_from_being_parked<B: Books>(mut books: B) {
    let mut ledger = owner(&books).await;
    // No text of PostgreSQL holds it.
    let bad = parked(2, "a\0b", Some("bad"));
    let some = [
        parked(1, "a", Some("bad")),
        bad,
        parked(3, "c", Some("bad")),
    ];
    assert_eq!(ledger.park(&some).await.unwrap(), Fenced::Written);
    assert_eq!(books.show(&id(2)).await.len(), 1);
    books
        .mark(&wish(Action::Redrive, Selector::default()))
        .await;
    let found = due(&mut ledger).await;
    assert!(found.contains(&1) && found.contains(&3), "{found:?}");
    books.mark(&wish(Action::Drop, id(2))).await;
    assert!(due(&mut ledger).await.contains(&2));
    let resolved = Resolved {
        dropped: vec![key(2)],
        ..Resolved::default()
    };
    ledger.resolve(&resolved).await.unwrap();
    assert!(books.show(&id(2)).await.is_empty());
}

async fn an_id_that_comes_again_is_another_event<B: Books>(mut books: B) {
    let mut ledger = owner(&books).await;
    let old = parked(5, "a", Some("bad"));
    let mut new = parked(5, "b", Some("bad"));
    new.event.event_id = key(7).event_id;
    ledger.park(std::slice::from_ref(&old)).await.unwrap();
    ledger.park(&[new.clone(), old.clone()]).await.unwrap();
    assert_eq!(books.show(&id(5)).await.len(), 2);
    books.mark(&wish(Action::Redrive, id(5))).await;
    assert_eq!(due(&mut ledger).await, [5, 5]);
    let resolved = Resolved {
        delivered: vec![new.event.key()],
        ..Resolved::default()
    };
    let freed = free(ledger.resolve(&resolved).await.unwrap());
    assert_eq!(freed, [("order".to_owned(), "b".to_owned())]);
    let left = ledger.due(ROWS, BYTES).await.unwrap();
    assert_eq!((left.len(), left[0].event.key()), (1, old.event.key()));
}

/// The sequence was reset after the first was parked and passed.
async fn a_later_event_with_a_lower_id_is_due_last<B: Books>(mut books: B) {
    let mut ledger = owner(&books).await;
    ledger.park(&[parked(500, "a", Some("bad"))]).await.unwrap();
    ledger.park(&[parked(5, "a", None)]).await.unwrap();
    ledger
        .park(&[parked(4, "b", None), parked(9, "a", None)])
        .await
        .unwrap();
    books.mark(&wish(Action::Redrive, id(500))).await;
    assert_eq!(due(&mut ledger).await, [500, 5, 9]);
    assert_eq!(books.show(&id(5)).await[0].behind, Some(500));
    assert_eq!(delivered(&mut ledger, &[500]).await, []);
    assert_eq!(due(&mut ledger).await, [5, 9]);
}

/// A database whose owner prefers other settings, with functions of the catalog's names before those of the catalog.
async fn no_setting_or_object_of_the_database_matters(books: PolledPostgres) {
    let hostile = "
        do $$ declare one text; begin
            foreach one in array array[
                'clock_timestamp() returns timestamptz',
                'pg_visible_in_snapshot(xid8, pg_snapshot) returns boolean',
                'hashtextextended(text, bigint) returns bigint',
                'octet_length(text) returns integer',
                'to_char(timestamp, text) returns text',
                'jsonb_array_length(jsonb) returns integer'] loop
                execute format('create or replace function public.%s language plpgsql as %L', one,
                               'begin raise ''a function of public was called''; end');
            end loop;
            foreach one in array array[
                'search_path = public, pg_catalog', 'default_transaction_isolation = serializable',
                'DateStyle = ''SQL, DMY''', 'IntervalStyle = sql_standard', 'timezone = ''Asia/Kathmandu''',
                'extra_float_digits = -15', 'bytea_output = escape'] loop
                execute format('alter database %I set %s', current_database(), one);
            end loop;
        end $$";
    sqlx::raw_sql(hostile)
        .execute(&books.database.pool)
        .await
        .unwrap();
    let mut ledger = owner(&books).await;
    assert_eq!(ledger.renew().await.unwrap(), Renewed::Extended);
    let some = [parked(1, "a", Some("bad")), parked(2, "a", None)];
    assert_eq!(ledger.park(&some).await.unwrap(), Fenced::Written);
    sqlx::query("update outbox.parked set wanted = 'redrive' where id = 1")
        .execute(&books.database.pool)
        .await
        .unwrap();
    let found = ledger.due(ROWS, BYTES).await.unwrap();
    assert_eq!((&found[0].event, found.len()), (&some[0].event, 2));
    let resolved = Resolved {
        rejected: vec![(key(1), "again".to_owned())],
        ..Resolved::default()
    };
    assert_eq!(free(ledger.resolve(&resolved).await.unwrap()), []);
    ledger.release(true).await.unwrap();
    let mut next = books.ledger(settings("next"));
    let Acquired::Ours(tenure) = next.acquire().await.unwrap() else {
        panic!("the lease was released")
    };
    assert_eq!(tenure.position, position(1000));
    assert_eq!(tenure.held[0].events, 2);
}
