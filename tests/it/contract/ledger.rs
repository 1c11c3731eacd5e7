//! What every ledger keeps: the contract of [`Ledger`], one suite for all of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use outbox_relay::event::{Event, EventId, HeldEntity, Payload, Shard, Start};
use outbox_relay::ledger::{Acquired, Fenced, Ledger, Parked, Renewed, Settings, Tenure};
use outbox_relay::position::{Position, Snapshot, Window};
use outbox_relay::source::{PageLimits, Source};
use sqlx::{Executor, Row};

use crate::harness::books::Books;
use crate::harness::log::{Log, PolledPostgres, SqliteLog, event};

/// Long enough that nothing expires by accident on a busy machine.
const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(1500);

macro_rules! kept_by {
    ($log:ident as $module:ident) => {
        mod $module {
            kept_by! { in $log:
                one_owner,
                the_same_holder_may_ask_again,
                a_standby_takes_over_after_the_expiry,
                a_standby_takes_over_at_once_after_a_release,
                renewing_keeps_the_lease,
                writes_of_a_former_owner_change_nothing,
                writes_after_a_release_change_nothing,
                writes_before_the_lease_change_nothing,
                pipelines_do_not_meet,
                the_next_tenure_starts_with_what_was_acknowledged,
                parking_twice_keeps_the_first,
                parked_events_keep_their_contents,
                parked_entities_are_reported_with_their_first_event,
                earliest_starts_at_the_beginning,
                latest_starts_with_what_comes,
                latest_in_an_empty_log_starts_with_its_first_event,
                a_time_starts_with_the_first_event_from_then_on,
                a_time_to_come_starts_with_what_comes,
                the_start_is_decided_once,
                the_log_keeps_its_name_while_its_positions_mean_the_same,
                of_two_that_race_one_wins,
                of_two_that_race_for_an_expired_lease_one_wins,
            }
        }
    };
    (in $log:ident: $($test:ident,)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                if let Some(log) = <$crate::harness::log::$log as super::Log>::create().await {
                    super::$test(log).await;
                }
            }
        )*
    };
}

kept_by!(SqliteLog as sqlite);
kept_by!(PolledPostgres as postgres);

async fn one_owner<B: Books>(books: B) {
    let mut first = books.ledger(settings("first", LONG));
    let mut second = books.ledger(settings("second's \"name\"", LONG));
    assert_eq!(ours(&mut first).await.position, Position::beginning());
    let (holder, expires_in) = held(&mut second).await;
    assert_eq!(holder, "first");
    assert!(
        expires_in <= LONG && expires_in > LONG / 2,
        "{expires_in:?}"
    );
    first.release(true).await.unwrap();
    ours(&mut second).await;
    assert_eq!(held(&mut first).await.0, "second's \"name\"");
}

/// After an answer that was lost the lease is its own, and what it did before is fenced.
async fn the_same_holder_may_ask_again<B: Books>(books: B) {
    let mut first = books.ledger(settings("first", LONG));
    ours(&mut first).await;
    first.acknowledge(&position(7)).await.unwrap();
    let mut again = books.ledger(settings("first", LONG));
    assert_eq!(ours(&mut again).await.position, position(7));
    assert_eq!(first.renew().await.unwrap(), Renewed::Lost);
    assert_eq!(again.renew().await.unwrap(), Renewed::Extended);
}

async fn a_standby_takes_over_after_the_expiry<B: Books>(books: B) {
    let began = Instant::now();
    let mut first = books.ledger(settings("first", SHORT));
    ours(&mut first).await;
    let mut second = books.ledger(settings("second", LONG));
    let (_, expires_in) = held(&mut second).await;
    assert!(expires_in <= SHORT, "{expires_in:?}");
    take_over(&mut second).await;
    assert!(began.elapsed() >= SHORT, "{:?}", began.elapsed());
    assert_eq!(held(&mut first).await.0, "second");
}

async fn a_standby_takes_over_at_once_after_a_release<B: Books>(books: B) {
    let mut first = books.ledger(settings("first", LONG));
    ours(&mut first).await;
    first.acknowledge(&position(3)).await.unwrap();
    first.release(true).await.unwrap();
    let mut second = books.ledger(settings("second", LONG));
    assert_eq!(ours(&mut second).await.position, position(3));
}

async fn renewing_keeps_the_lease<B: Books>(books: B) {
    let mut first = books.ledger(settings("first", SHORT));
    let mut second = books.ledger(settings("second", SHORT));
    ours(&mut first).await;
    for _ in 0..8 {
        tokio::time::sleep(SHORT / 4).await;
        assert_eq!(first.renew().await.unwrap(), Renewed::Extended);
        let (_, expires_in) = held(&mut second).await;
        assert!(expires_in > SHORT / 4, "{expires_in:?}");
    }
}

async fn writes_of_a_former_owner_change_nothing<B: Books>(mut books: B) {
    let mut first = books.ledger(settings("first", SHORT));
    ours(&mut first).await;
    first.acknowledge(&position(3)).await.unwrap();
    let mut second = books.ledger(settings("second", LONG));
    assert_eq!(take_over(&mut second).await.position, position(3));
    assert_eq!(first.acknowledge(&position(9)).await.unwrap(), Fenced::Lost);
    assert_eq!(first.park(&[rejected(1)]).await.unwrap(), Fenced::Lost);
    assert_eq!(first.renew().await.unwrap(), Renewed::Lost);
    first.release(true).await.unwrap();
    assert_eq!(books.parked().await, []);
    let mut third = books.ledger(settings("third", LONG));
    let (holder, expires_in) = held(&mut third).await;
    assert_eq!(holder, "second");
    assert!(expires_in > SHORT, "{expires_in:?}");
    assert_eq!(second.renew().await.unwrap(), Renewed::Extended);
    second.release(true).await.unwrap();
    assert_eq!(ours(&mut third).await.position, position(3));
}

async fn writes_after_a_release_change_nothing<B: Books>(mut books: B) {
    let mut first = books.ledger(settings("first", LONG));
    ours(&mut first).await;
    first.release(true).await.unwrap();
    assert_eq!(first.acknowledge(&position(9)).await.unwrap(), Fenced::Lost);
    assert_eq!(first.park(&[rejected(1)]).await.unwrap(), Fenced::Lost);
    assert_eq!(first.renew().await.unwrap(), Renewed::Lost);
    assert_eq!(books.parked().await, []);
    let mut second = books.ledger(settings("second", LONG));
    assert_eq!(ours(&mut second).await.position, Position::beginning());
}

async fn writes_before_the_lease_change_nothing<B: Books>(mut books: B) {
    let mut first = books.ledger(settings("first", LONG));
    assert_eq!(first.acknowledge(&position(9)).await.unwrap(), Fenced::Lost);
    assert_eq!(first.park(&[rejected(1)]).await.unwrap(), Fenced::Lost);
    assert_eq!(first.renew().await.unwrap(), Renewed::Lost);
    assert_eq!(books.parked().await, []);
    assert_eq!(ours(&mut first).await.position, Position::beginning());
}

async fn pipelines_do_not_meet<B: Books>(books: B) {
    let other = Settings {
        pipeline: "other".parse().unwrap(),
        ..settings("second", LONG)
    };
    let mut first = books.ledger(settings("first", LONG));
    ours(&mut first).await;
    let mut second = books.ledger(other);
    ours(&mut second).await;
    first.acknowledge(&position(3)).await.unwrap();
    first.park(&[rejected(1)]).await.unwrap();
    second.release(true).await.unwrap();
    let tenure = ours(&mut second).await;
    assert_eq!(
        (tenure.position, tenure.held, tenure.dead_letters),
        (Position::beginning(), vec![], vec![])
    );
    assert_eq!(first.renew().await.unwrap(), Renewed::Extended);
}

async fn the_next_tenure_starts_with_what_was_acknowledged<B: Books>(books: B) {
    let mut ledger = books.ledger(settings("first", LONG));
    let tenure = ours(&mut ledger).await;
    let busy = Snapshot {
        xmin: 1_000,
        xmax: u64::from(u32::MAX) * 5,
        in_progress: (0..2_000).map(|n| 1_000 + n * n * 7).collect(),
    };
    let positions = [
        tenure.position,
        position(12),
        Position {
            window: Arc::new(Window {
                prev: "3:3:".parse().unwrap(),
                cur: busy.clone(),
                floor: EventId(1),
                ceiling: EventId(i64::MAX),
                next_floor: EventId(2),
            }),
            last_id: EventId(i64::MAX - 1),
        },
        Position {
            window: Arc::new(Window {
                prev: busy.clone(),
                cur: busy,
                floor: EventId(5),
                ceiling: EventId(6),
                next_floor: EventId(4),
            }),
            last_id: EventId(0),
        },
    ];
    for position in positions {
        assert_eq!(
            ledger.acknowledge(&position).await.unwrap(),
            Fenced::Written
        );
        // A new life of the same process, and then another process.
        assert_eq!(ours(&mut ledger).await.position, position);
        ledger.release(true).await.unwrap();
        ledger = books.ledger(settings("next", LONG));
        assert_eq!(ours(&mut ledger).await.position, position);
    }
}

async fn parking_twice_keeps_the_first<B: Books>(mut books: B) {
    let mut ledger = books.ledger(settings("first", LONG));
    ours(&mut ledger).await;
    let again = Parked {
        error: Some("another reason".to_owned()),
        ..rejected(1)
    };
    for (parked, error) in [
        (vec![], None),
        (vec![rejected(1), waiting(2)], Some("too large")),
        (vec![waiting(1)], Some("too large")),
        (vec![again, waiting(3)], Some("too large")),
    ] {
        assert_eq!(ledger.park(&parked).await.unwrap(), Fenced::Written);
        let first = books.parked().await.into_iter().next();
        assert_eq!(first.and_then(|row| row.4).as_deref(), error);
    }
    let rows = books.parked().await;
    let rows: Vec<_> = rows.iter().map(|row| (row.0, row.4.as_deref())).collect();
    assert_eq!(rows, [(1, Some("too large")), (2, None), (3, None)]);
}

async fn parked_events_keep_their_contents<B: Books>(mut books: B) {
    let mut ledger = books.ledger(settings("first", LONG));
    ours(&mut ledger).await;
    let json = r#"{"b" : 9007199254740993, "a":"\u0000", "a":1.10}"#;
    let payloads = [
        Payload::Tombstone,
        Payload::Json(json.into()),
        Payload::Encoded(vec![].into()),
        Payload::Encoded(vec![0, 255].into()),
        Payload::Ambiguous(json.into(), vec![1].into()),
        Payload::Encoded(vec![9; 20 << 20].into()),
    ];
    let parked: Vec<Parked> = (1..)
        .zip(payloads)
        .map(|(id, payload)| Parked {
            event: Event {
                id: EventId(id),
                payload,
                headers: (id == 1).then(|| r#"{"a" :"\u0000"}"#.into()),
                ..event("it's\u{1f980}")
            },
            error: Some("it's a 'reason'".to_owned()),
            holds: true,
        })
        .collect();
    assert_eq!(ledger.park(&parked).await.unwrap(), Fenced::Written);
    let rows = books.parked().await;
    let contents: Vec<_> = rows[..5]
        .iter()
        .map(|(_, json, bytes, headers, _)| (json.as_deref(), bytes.as_deref(), headers.as_deref()))
        .collect();
    assert_eq!(
        contents,
        [
            (None, None, Some(r#"{"a" :"\u0000"}"#)),
            (Some(json), None, None),
            (None, Some(&[][..]), None),
            (None, Some(&[0, 255][..]), None),
            (Some(json), Some(&[1][..]), None),
        ]
    );
    assert!(
        rows[5]
            .2
            .as_ref()
            .is_some_and(|bytes| bytes.len() == 20 << 20)
    );
    assert_eq!(rows[0].4.as_deref(), Some("it's a 'reason'"));
}

async fn parked_entities_are_reported_with_their_first_event<B: Books>(books: B) {
    let mut ledger = books.ledger(settings("first", LONG));
    assert_eq!(ours(&mut ledger).await.held, []);
    let of = |id, kind: &str, entity: &str| Parked {
        event: Event {
            id: EventId(id),
            aggregate_type: kind.into(),
            aggregate_id: entity.into(),
            ..event("")
        },
        error: None,
        holds: id != 11,
    };
    ledger
        .park(&[
            of(9, "Order", "1"),
            of(5, "Order", "1"),
            of(7, "Order", "2"),
            of(11, "Order", "3"),
        ])
        .await
        .unwrap();
    ledger.park(&[of(8, "Customer", "1")]).await.unwrap();
    ledger.release(true).await.unwrap();
    let mut next = books.ledger(settings("next", LONG));
    let tenure = ours(&mut next).await;
    let mut held = tenure.held;
    held.sort_unstable();
    let expected = [
        ("Customer", "1", 8, 8, 1),
        ("Order", "1", 5, 9, 2),
        ("Order", "2", 7, 7, 1),
    ]
    .map(|(kind, entity, first, last, events)| HeldEntity {
        aggregate_type: kind.to_owned(),
        aggregate_id: entity.to_owned(),
        first: EventId(first),
        last: EventId(last),
        events,
        is_passed: false,
    });
    for held in &mut held {
        held.is_passed = false;
    }
    assert_eq!(held, expected);
    assert_eq!(tenure.dead_letters.len(), 1);
    assert_eq!(tenure.dead_letters[0].id, EventId(11));
}

async fn earliest_starts_at_the_beginning<B: Books>(mut books: B) {
    let emitted = books.emit(vec![event("e"), event("e")]).await;
    assert_eq!(started(&mut books, Start::Earliest, vec![]).await, emitted);
}

async fn latest_starts_with_what_comes<B: Books>(mut books: B) {
    books.emit(vec![event("e"), event("e")]).await;
    let later = vec![event("e"), event("e")];
    let seen = started(&mut books, Start::Latest, later.clone()).await;
    assert_eq!(ids(&seen), ids(&later));
}

async fn latest_in_an_empty_log_starts_with_its_first_event<B: Books>(mut books: B) {
    let later = vec![event("e"), event("e")];
    let seen = started(&mut books, Start::Latest, later.clone()).await;
    assert_eq!(ids(&seen), ids(&later));
}

async fn a_time_starts_with_the_first_event_from_then_on<B: Books>(mut books: B) {
    let mut all: Vec<Event> = [100, 300, 200, 400].map(occurred).into();
    books.emit(all.clone()).await;
    let later = vec![occurred(50)];
    let seen = started(&mut books, Start::Time(300_000_000), later.clone()).await;
    all.extend(later);
    assert_eq!(ids(&seen), ids(&all[1..]));
}

async fn a_time_to_come_starts_with_what_comes<B: Books>(mut books: B) {
    for round in 0..2 {
        let later = vec![occurred(round), occurred(round)];
        let mut ledger = books.ledger(Settings {
            pipeline: format!("p{round}").parse().unwrap(),
            start: Start::Time(i64::from(u32::MAX) * 1_000_000),
            ..settings("first", LONG)
        });
        let tenure = ours(&mut ledger).await;
        books.emit(later.clone()).await;
        let seen = read_from(&mut books, tenure.position).await;
        assert_eq!(ids(&seen), ids(&later));
    }
}

async fn the_start_is_decided_once<B: Books>(mut books: B) {
    let mut first = books.ledger(Settings {
        start: Start::Latest,
        ..settings("first", LONG)
    });
    let tenure = ours(&mut first).await;
    books.emit(vec![event("e")]).await;
    first.release(true).await.unwrap();
    for start in [Start::Latest, Start::Earliest, Start::Time(0)] {
        let mut next = books.ledger(Settings {
            start,
            ..settings("next", LONG)
        });
        assert_eq!(ours(&mut next).await, tenure);
        next.release(true).await.unwrap();
    }
}

async fn of_two_that_race_one_wins<B: Books>(books: B) {
    for round in 0..60 {
        let settings = |holder| Settings {
            pipeline: format!("race-{round}").parse().unwrap(),
            shard: Shard::whole(),
            ..settings(holder, LONG)
        };
        // Connected before the race, where it matters: released leases are raced for in odd rounds.
        let (mut first, second) = (books.ledger(settings("a")), books.ledger(settings("b")));
        if round % 2 == 1 {
            ours(&mut first).await;
            first.release(true).await.unwrap();
        }
        assert_eq!(winners(first, second).await, 1, "round {round}");
    }
}

async fn of_two_that_race_for_an_expired_lease_one_wins<B: Books>(books: B) {
    for round in 0..8 {
        let settings = |holder, ttl| Settings {
            pipeline: format!("race-{round}").parse().unwrap(),
            shard: Shard::whole(),
            ..settings(holder, ttl)
        };
        let ttl = Duration::from_millis(300);
        let mut dead = books.ledger(settings("dead", ttl));
        // On a busy machine 300 ms may not be enough to be told so.
        if dead.acquire().await.is_err() {
            continue;
        }
        drop(dead);
        let (mut first, mut second) = (
            books.ledger(settings("a", LONG)),
            books.ledger(settings("b", LONG)),
        );
        let race = tokio::join!(
            tokio::spawn(async move { take_over_or_lose(&mut first).await }),
            tokio::spawn(async move { take_over_or_lose(&mut second).await })
        );
        assert_ne!(race.0.unwrap(), race.1.unwrap(), "round {round}");
    }
}

async fn winners<L: Ledger + 'static>(mut first: L, mut second: L) -> usize {
    let race = tokio::join!(
        tokio::spawn(async move { first.acquire().await.unwrap() }),
        tokio::spawn(async move { second.acquire().await.unwrap() })
    );
    [race.0.unwrap(), race.1.unwrap()]
        .iter()
        .filter(|acquired| matches!(acquired, Acquired::Ours(_)))
        .count()
}

/// A position that was written down elsewhere counts only under the name of the log that it came from.
async fn the_log_keeps_its_name_while_its_positions_mean_the_same<B: Books>(mut books: B) {
    let name = async |books: &B, holder: &str| {
        let mut ledger = books.ledger(settings(holder, LONG));
        let tenure = ours(&mut ledger).await;
        ledger.release(true).await.unwrap();
        tenure.log
    };
    let first = name(&books, "first").await;
    assert_eq!(name(&books, "second").await, first);
    books.forget_cursors().await;
    assert_ne!(
        name(&books, "third").await,
        first,
        "a cursor that began anew"
    );
}

#[tokio::test]
async fn a_crash_of_the_server_gives_the_log_another_name() {
    let Some(books) = PolledPostgres::create().await else {
        return;
    };
    let mut ledger = books.ledger(settings("first", LONG));
    let first = ours(&mut ledger).await.log;
    ledger.release(true).await.unwrap();
    // Which is what a crash does to an unlogged table.
    let emptied = sqlx::query("truncate outbox.incarnation").execute(&books.database.pool);
    emptied.await.unwrap();
    let mut ledger = books.ledger(settings("second", LONG));
    assert_ne!(ours(&mut ledger).await.log, first);
}

/// Asks without a pause until the dead holder's lease is taken: by this one (true) or by another.
async fn take_over_or_lose(ledger: &mut impl Ledger) -> bool {
    loop {
        match ledger.acquire().await.unwrap() {
            Acquired::Ours(_) => return true,
            Acquired::Held { holder, .. } if holder != "dead" => return false,
            Acquired::Held { .. } => {}
            other @ (Acquired::Resharded { .. } | Acquired::Paused(_)) => panic!("{other:?}"),
        }
    }
}

fn settings(holder: &str, lease_ttl: Duration) -> Settings {
    Settings {
        pipeline: "default".parse().unwrap(),
        shard: Shard::whole(),
        holder: holder.to_owned(),
        lease_ttl,
        start: Start::Earliest,
    }
}

async fn ours(ledger: &mut impl Ledger) -> Tenure {
    match ledger.acquire().await.unwrap() {
        Acquired::Ours(tenure) => tenure,
        other => panic!("{other:?}"),
    }
}

async fn held(ledger: &mut impl Ledger) -> (String, Duration) {
    match ledger.acquire().await.unwrap() {
        Acquired::Held { holder, expires_in } => (holder, expires_in),
        other => panic!("not held: {other:?}"),
    }
}

async fn take_over(ledger: &mut impl Ledger) -> Tenure {
    loop {
        match ledger.acquire().await.unwrap() {
            Acquired::Ours(tenure) => return tenure,
            Acquired::Held { expires_in, .. } => tokio::time::sleep(expires_in).await,
            other @ (Acquired::Resharded { .. } | Acquired::Paused(_)) => panic!("{other:?}"),
        }
    }
}

/// What a new pipeline sees: acquires, emits `later`, and reads from the position that the tenure names.
async fn started<B: Books>(books: &mut B, start: Start, later: Vec<Event>) -> Vec<Event> {
    let mut ledger = books.ledger(Settings {
        start,
        ..settings("first", LONG)
    });
    let tenure = ours(&mut ledger).await;
    if !later.is_empty() {
        books.emit(later).await;
    }
    read_from(books, tenure.position).await
}

async fn read_from<B: Books>(books: &mut B, mut position: Position) -> Vec<Event> {
    let mut source = books.source();
    source.seek(position.clone());
    let limits = PageLimits {
        rows: 100,
        bytes: 1 << 20,
    };
    let mut events = Vec::new();
    loop {
        let page = source.capture(limits, &position).await.unwrap();
        books.write().await;
        position = page.end;
        events.extend(page.events);
        if !page.more {
            return events;
        }
    }
}

fn ids(events: &[Event]) -> Vec<uuid::Uuid> {
    events.iter().map(|event| event.event_id).collect()
}

fn occurred(seconds: i64) -> Event {
    Event {
        occurred_at_us: seconds * 1_000_000,
        ..event("e")
    }
}

fn rejected(id: i64) -> Parked {
    Parked {
        error: Some("too large".to_owned()),
        ..waiting(id)
    }
}

fn waiting(id: i64) -> Parked {
    Parked {
        event: Event {
            id: EventId(id),
            event_id: uuid::Uuid::from_u128(id.unsigned_abs().into()),
            ..event("e")
        },
        error: None,
        holds: true,
    }
}

fn position(last_id: i64) -> Position {
    Position {
        window: Arc::new(Window {
            prev: "10:20:11,13".parse().unwrap(),
            cur: "15:30:15,16,29".parse().unwrap(),
            floor: EventId(2),
            ceiling: EventId(40),
            next_floor: EventId(38),
        }),
        last_id: EventId(last_id),
    }
}

/// An event that occurred in time, in a transaction that is still open when the pipeline begins, is not passed over.
#[tokio::test]
async fn what_is_in_progress_at_the_start_comes_later() {
    let Some(mut books) = PolledPostgres::create().await else {
        return;
    };
    let late = books.begin_late(vec![occurred(300)]).await;
    let old = [occurred(100), occurred(250), occurred(150)];
    let old = books.emit(old.into()).await;
    let mut begun = Vec::new();
    for (name, start, from) in [
        ("latest", Start::Latest, 3),
        ("time", Start::Time(200_000_000), 1),
        (
            "time-to-come",
            Start::Time(i64::from(u32::MAX) * 1_000_000),
            3,
        ),
    ] {
        let mut ledger = books.ledger(Settings {
            pipeline: name.parse().unwrap(),
            start,
            ..settings("first", LONG)
        });
        begun.push((name, ours(&mut ledger).await.position, &old[from..]));
    }
    let late = late.commit().await;
    for (name, position, old) in begun {
        let seen = read_from(&mut books, position).await;
        assert_eq!(ids(&seen), ids(&[old, &late].concat()), "{name}");
    }
}

/// A commit that returned is on the disk: only cursors may be lost with the machine.
#[tokio::test]
async fn sqlite_parks_with_a_write_ahead_log() {
    let books = SqliteLog::create().await.unwrap();
    let mut ledger = books.ledger(settings("first", LONG));
    ours(&mut ledger).await;
    let mut connection = books.file.connect().await;
    let row = connection.fetch_one("pragma journal_mode").await.unwrap();
    assert_eq!(row.get::<String, _>(0), "wal");
    for n in 1..4 {
        assert_eq!(ledger.park(&[rejected(n)]).await.unwrap(), Fenced::Written);
        assert_eq!(
            ledger.acknowledge(&position(n)).await.unwrap(),
            Fenced::Written
        );
    }
}
