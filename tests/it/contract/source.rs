//! What every source keeps: the contract of [`Source`], one suite for all of them.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use outbox_relay::event::{Event, EventId, Payload};
use outbox_relay::migrate;
use outbox_relay::position::Position;
use outbox_relay::source::{Page, PageLimits, Source};
use sqlx::{Connection, Executor};
use tokio::time::timeout;
use uuid::Uuid;

use crate::harness::log::{Log, PolledPostgres, SqliteLog, Writer, event};
use crate::harness::postgres::execute;

mod databases;

const PATIENCE: Duration = Duration::from_secs(10);
const ROOMY: PageLimits = PageLimits {
    rows: 1000,
    bytes: 256 << 20,
};

/// Lists the suite once, and runs it for each log.
macro_rules! kept_by {
    ($log:ident as $module:ident) => {
        mod $module {
            kept_by! { in $log:
                everything_once_and_in_order,
                an_empty_log_is_an_empty_page,
                the_first_event_after_idle_looks,
                the_same_position_yields_the_same_events,
                pages_keep_to_their_rows,
                pages_keep_to_their_bytes,
                no_more_means_no_more,
                an_event_appears_after_a_wake,
                a_wake_is_bounded,
                one_look_answers_all_hints_before_it,
                what_is_rolled_back_never_appears,
                contents_come_through_byte_for_byte,
                huge_payloads_come_through,
                a_dropped_capture_loses_nothing,
                many_writers_at_once,
            }
        }
    };
    (in $log:ident: $($test:ident,)*) => {
        $(
            #[tokio::test]
            async fn $test() {
                if let Some(log) = <$crate::harness::log::$log as super::Log>::create().await {
                    super::$test(log).await;
                }
            }
        )*
    };
}

kept_by!(SqliteLog as sqlite);
kept_by!(PolledPostgres as postgres_poll);
kept_by!(HeardPostgres as postgres_listen);

async fn everything_once_and_in_order<L: Log>(mut log: L) {
    let mut reader = Reader::new(&log);
    let mut emitted = Vec::new();
    for round in 1..=20 {
        let events = (0..round).map(|n| event(&format!("e{}", n % 3))).collect();
        emitted.extend(log.emit(events).await);
        if round % 3 == 0 {
            reader.drain(&mut log, ROOMY).await;
        }
    }
    reader.drain(&mut log, ROOMY).await;
    assert_eq!(reader.events(), emitted);
    let mut again = Reader::new(&log);
    again.drain(&mut log, PageLimits { rows: 7, ..ROOMY }).await;
    assert_eq!(again.events(), emitted);
}

async fn an_empty_log_is_an_empty_page<L: Log>(log: L) {
    let mut source = log.source();
    for _ in 0..3 {
        let page = capture(&mut source, ROOMY, &Position::beginning()).await;
        assert_eq!(page.events, []);
        assert!(!page.more);
    }
}

/// An id that was never handed out is not one that was passed.
async fn the_first_event_after_idle_looks<L: Log>(mut log: L) {
    let mut reader = Reader::new(&log);
    for _ in 0..3 {
        reader.drain(&mut log, ROOMY).await;
    }
    let emitted = log.emit(vec![event("e1")]).await;
    reader.drain(&mut log, ROOMY).await;
    assert_eq!(reader.events(), emitted);
}

async fn the_same_position_yields_the_same_events<L: Log>(mut log: L) {
    let mut reader = Reader::new(&log);
    for round in 0..4 {
        log.emit((0..9).map(|n| event(&format!("e{n}"))).collect())
            .await;
        if round != 2 {
            reader
                .drain(&mut log, PageLimits { rows: 4, ..ROOMY })
                .await;
        }
    }
    assert_eq!(reader.events().len(), 36);
    assert_repeatable(&mut log, &reader.pages).await;
}

async fn pages_keep_to_their_rows<L: Log>(mut log: L) {
    log.emit((0..50).map(|_| event("e")).collect()).await;
    for rows in [1, 2, 7, 49, 50, 51] {
        let mut reader = Reader::new(&log);
        reader.drain(&mut log, PageLimits { rows, ..ROOMY }).await;
        assert_eq!(reader.events().len(), 50, "{rows} rows");
        let most = reader.pages.iter().map(|page| page.events.len()).max();
        assert!(most <= Some(rows), "{most:?} of {rows} rows");
    }
}

async fn pages_keep_to_their_bytes<L: Log>(mut log: L) {
    let sizes = [
        10, 40_000, 10, 10, 900, 900, 20_000, 900, 900, 900, 10, 40_000,
    ];
    let events = sizes.iter().map(|size| sized(*size)).collect();
    let emitted = log.emit(events).await;
    for bytes in [1, 2000, 5000, 30_000, 200_000] {
        let mut reader = Reader::new(&log);
        reader.drain(&mut log, PageLimits { bytes, ..ROOMY }).await;
        assert_eq!(reader.events(), emitted, "{bytes} bytes");
        for page in &reader.pages {
            let held: usize = page.events.iter().map(Event::size_bytes).sum();
            let count = page.events.len();
            assert!(
                held <= bytes || count == 1,
                "{count} events of {held} bytes in a page of {bytes}"
            );
        }
    }
}

/// A page without more was read when there was nothing that it leaves out.
async fn no_more_means_no_more<L: Log>(mut log: L) {
    let limits = PageLimits { rows: 4, ..ROOMY };
    let mut source = log.source();
    log.emit((0..6).map(|_| event("e")).collect()).await;
    let first = capture(&mut source, limits, &Position::beginning()).await;
    assert!(first.more);
    // Committed while a window is being read that does not hold it.
    log.emit(vec![event("late")]).await;
    let mut count = first.events.len();
    loop {
        let page = capture(&mut source, limits, &Position::beginning()).await;
        count += page.events.len();
        if !page.more {
            break;
        }
    }
    assert_eq!(count, 7);
}

async fn an_event_appears_after_a_wake<L: Log>(mut log: L) {
    let mut reader = Reader::new(&log);
    reader.drain(&mut log, ROOMY).await;
    let mut emitted = Vec::new();
    for n in 0..5_u64 {
        // At once, and after it has been idle for a while.
        tokio::time::sleep(Duration::from_millis(n * 50)).await;
        emitted.extend(log.emit(vec![event("e")]).await);
        reader.wait_for(&mut log, emitted.len()).await;
    }
    assert_eq!(reader.events(), emitted);
}

async fn a_wake_is_bounded<L: Log>(log: L) {
    let mut source = log.source();
    let mut slept = Vec::new();
    for _ in 0..12 {
        capture(&mut source, ROOMY, &Position::beginning()).await;
        let began = Instant::now();
        timeout(PATIENCE, source.wake()).await.expect("it wakes");
        slept.push(began.elapsed());
    }
    // The machine may hold up one or another; who sleeps too long does so each time.
    slept.sort_unstable();
    let bound = log.wake_max() + Duration::from_millis(500);
    assert!(slept[9] <= bound, "slept {slept:?}");
}

async fn one_look_answers_all_hints_before_it<L: Log>(mut log: L) {
    const COMMITS: usize = 300;
    /// Nobody waits that long who has just seen events, or hints of them.
    const CALM: Duration = Duration::from_millis(50);
    let mut reader = Reader::new(&log);
    reader.drain(&mut log, ROOMY).await;
    reader.source.wake().await;
    let told = async {
        while !log.tells().await {
            reader.source.wake().await;
        }
    };
    timeout(PATIENCE, told).await.expect("it listens");
    for _ in 0..COMMITS {
        log.emit(vec![event("e")]).await;
    }
    let mut looks = 0;
    loop {
        reader.drain(&mut log, ROOMY).await;
        looks += 1;
        let began = Instant::now();
        reader.source.wake().await;
        if began.elapsed() >= CALM {
            break;
        }
    }
    assert_eq!(reader.events().len(), COMMITS);
    assert!(looks < COMMITS / 3, "{looks} looks");
}

async fn what_is_rolled_back_never_appears<L: Log>(mut log: L) {
    let mut reader = Reader::new(&log);
    let mut emitted = Vec::new();
    for _ in 0..5 {
        log.writer()
            .emit_in_vain(vec![event("e1"), event("e2")])
            .await;
        reader.drain(&mut log, ROOMY).await;
        emitted.extend(log.emit(vec![event("e1")]).await);
        log.writer().emit_in_vain(vec![event("e1")]).await;
        reader.drain(&mut log, ROOMY).await;
    }
    assert_eq!(reader.events(), emitted);
}

async fn contents_come_through_byte_for_byte<L: Log>(mut log: L) {
    let json = |text: &'static str| Payload::Json(text.into());
    let payloads = [
        Payload::Tombstone,
        Payload::Encoded(Vec::new().into()),
        Payload::Encoded((0..=255).collect::<Vec<u8>>().into()),
        json(r#"{"nul":"a\u0000b"}"#),
        json(
            r#"{"big": 9007199254740993, "bigger":123456789012345678901234567890, "x":1.10, "e":1E400}"#,
        ),
        json("{\"b\" : 1,\n\t\"a\":2, \"a\":3}"),
        json("null"),
        json(r#""zażółć 🦀 \ud83e\udd80""#),
        json(" [ ] "),
    ];
    let mut events: Vec<Event> = payloads
        .into_iter()
        .map(|payload| Event {
            payload,
            ..event("e")
        })
        .collect();
    events.push(Event {
        aggregate_type: "Zamówienie 'a\"b\\c' % $1".into(),
        aggregate_id: "".into(),
        event_type: "line\nbreak\ttab\u{1f980}".into(),
        content_type: Some("application/vnd.acme+avro; v=\"1\"".into()),
        headers: Some(r#"{"tenant": "a\u0000", "n":"é", "tenant":"twice", "number":1.0}"#.into()),
        ..event("e")
    });
    events.push(Event {
        content_type: Some("".into()),
        headers: Some("{}".into()),
        occurred_at_us: 1,
        ..event("e")
    });
    events.push(Event {
        occurred_at_us: -86_400_000_001,
        ..event("e")
    });
    let emitted = log.emit(events).await;
    let mut reader = Reader::new(&log);
    reader.drain(&mut log, ROOMY).await;
    assert_eq!(reader.events(), emitted);
}

async fn huge_payloads_come_through<L: Log>(mut log: L) {
    let mut emitted = Vec::new();
    for mib in [1, 7] {
        let json = format!("\"{}\"", "zażółć ".repeat((mib << 20) / 11));
        let bytes: Vec<u8> = (0_u32..)
            .map(|n| (n.wrapping_mul(n) >> 3).to_le_bytes()[0])
            .take(mib << 20)
            .collect();
        for payload in [Payload::Json(json.into()), Payload::Encoded(bytes.into())] {
            let huge = Event {
                payload,
                ..event("huge")
            };
            emitted.extend(log.emit(vec![huge, event("small")]).await);
        }
    }
    let limits = PageLimits {
        rows: 1000,
        bytes: 4 << 20,
    };
    let mut reader = Reader::new(&log);
    reader.drain(&mut log, limits).await;
    // Not assert_eq, which would print them.
    assert!(reader.events() == emitted);
    for page in &reader.pages {
        let held: usize = page.events.iter().map(Event::size_bytes).sum();
        assert!(
            held <= limits.bytes || page.events.len() == 1,
            "{held} bytes"
        );
    }
}

/// The loop drops a capture whenever something else ends its life; the next one starts where the last page ended.
async fn a_dropped_capture_loses_nothing<L: Log>(mut log: L) {
    let emitted = log.emit((0..300).map(|_| event("e")).collect()).await;
    let mut source = log.source();
    let mut at = Position::beginning();
    let mut seen = Vec::new();
    for round in 0.. {
        let limits = PageLimits { rows: 10, ..ROOMY };
        let patience = Duration::from_micros(round * 50);
        let Ok(page) = timeout(patience, source.capture(limits, &at)).await else {
            continue;
        };
        let page = page.unwrap();
        at = page.end.clone();
        seen.extend(page.events);
        if !page.more {
            break;
        }
    }
    assert_eq!(seen, emitted);
}

/// Each writer has an entity of its own, so the order of its events is the order in which it emitted them.
async fn many_writers_at_once<L: Log>(mut log: L) {
    const TRANSACTIONS: usize = 60;
    let mut writers = Vec::new();
    for n in 0..5 {
        let mut writer = log.connect().await;
        writers.push(async move {
            let mut emitted = Vec::new();
            for transaction in 0..TRANSACTIONS {
                let events = vec![event(&format!("e{n}")); 1 + transaction % 3];
                if (transaction + n) % 4 == 0 {
                    writer.emit_in_vain(events).await;
                } else {
                    let ids = writer.emit(events).await.into_iter().map(|event| event.id);
                    emitted.extend(ids);
                }
            }
            (format!("e{n}"), emitted)
        });
    }
    let done = Cell::new(false);
    let writing = async {
        let emitted = join_all(writers).await;
        done.set(true);
        emitted
    };
    let mut reader = Reader::new(&log);
    let reading = async {
        // One more time after the last commit.
        while !done.get() {
            reader
                .drain(&mut log, PageLimits { rows: 10, ..ROOMY })
                .await;
            reader.source.wake().await;
        }
        reader.drain(&mut log, ROOMY).await;
    };
    let (emitted, ()) = tokio::join!(writing, reading);
    assert_eq!(by_entity(reader.events()), emitted.into_iter().collect());
}

/// Reads a log as the loop does: page after page, and what was read is written down.
struct Reader<S> {
    source: S,
    written: Position,
    pages: Vec<Page>,
}

impl<S: Source> Reader<S> {
    fn new<L: Log<Source = S>>(log: &L) -> Self {
        Self::from(log, Position::beginning())
    }

    fn from<L: Log<Source = S>>(log: &L, position: Position) -> Self {
        let mut source = log.source();
        source.seek(position.clone());
        Self {
            source,
            written: position,
            pages: Vec::new(),
        }
    }

    async fn read(&mut self, log: &mut impl Log, limits: PageLimits) -> bool {
        let page = capture(&mut self.source, limits, &self.written).await;
        log.write().await;
        self.written = page.end.clone();
        let more = page.more;
        self.pages.push(page);
        more
    }

    /// Reads until there is no more.
    async fn drain(&mut self, log: &mut impl Log, limits: PageLimits) {
        while self.read(log, limits).await {}
    }

    /// Reads, and sleeps while there is nothing, until it has seen so many.
    async fn wait_for(&mut self, log: &mut impl Log, count: usize) {
        let waiting = async {
            while self.events().len() < count {
                if !self.read(log, ROOMY).await {
                    self.source.wake().await;
                }
            }
        };
        timeout(PATIENCE, waiting).await.unwrap();
    }

    fn events(&self) -> Vec<Event> {
        let pages = self.pages.iter();
        pages.flat_map(|page| page.events.clone()).collect()
    }
}

async fn capture<S: Source>(source: &mut S, limits: PageLimits, written: &Position) -> Page {
    source.capture(limits, written).await.unwrap()
}

/// From every event on, another reader finds the rest of its window in the same order, and then all that follows.
async fn assert_repeatable<L: Log>(log: &mut L, pages: &[Page]) {
    let history: Vec<(Position, Event)> = pages
        .iter()
        .flat_map(|page| page.events.iter().map(move |event| (page, event)))
        .map(|(page, event)| {
            let window = page.end.window.clone();
            let last_id = event.id;
            (Position { window, last_id }, event.clone())
        })
        .collect();
    for (n, (position, _)) in history.iter().enumerate() {
        let rest = &history[n + 1..];
        for rows in [1, 3, 1000] {
            let mut reader = Reader::from(log, position.clone());
            reader.drain(log, PageLimits { rows, ..ROOMY }).await;
            let same_window = |at: &Position| at.window == position.window;
            let expected: Vec<&Event> = rest
                .iter()
                .filter(|(at, _)| same_window(at))
                .map(|(_, event)| event)
                .collect();
            let found: Vec<&Event> = reader
                .pages
                .iter()
                .filter(|page| same_window(&page.end))
                .flat_map(|page| &page.events)
                .collect();
            assert_eq!(found, expected, "the rest of the window from {position:?}");
            assert_eq!(
                by_entity(reader.events()),
                by_entity(rest.iter().map(|(_, event)| event.clone()).collect()),
                "all from {position:?}"
            );
        }
    }
}

fn by_entity(events: Vec<Event>) -> BTreeMap<String, Vec<EventId>> {
    let mut entities: BTreeMap<String, Vec<EventId>> = BTreeMap::new();
    for event in events {
        let entity = entities.entry(event.aggregate_id.to_string()).or_default();
        entity.push(event.id);
    }
    entities
}

fn sized(bytes: usize) -> Event {
    Event {
        payload: Payload::Encoded(vec![7; bytes].into()),
        ..event("e")
    }
}
