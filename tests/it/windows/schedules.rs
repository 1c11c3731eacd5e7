//! Schedules that were thought up to hurt, each as small as it can be.

use std::str::FromStr;

use outbox_relay::event::{EventId, Payload, Start};
use outbox_relay::ledger::postgres::PostgresLedger;
use outbox_relay::ledger::{Acquired, Fenced, Ledger};
use outbox_relay::position::{Position, Snapshot};
use outbox_relay::source::postgres::PostgresSource;
use outbox_relay::source::{Page, PageLimits, Source};

use super::database::{Database, ask, sql, with_database};

const LIMITS: PageLimits = PageLimits {
    rows: 100,
    bytes: 1_000_000,
};

/// No events.
pub(crate) const NOTHING: [u64; 0] = [];

/// Emits the event that is known by this number.
pub(crate) fn emit(n: u64) -> String {
    format!("select outbox.emit('thing', 'e', 'changed', '{n}')")
}

pub(crate) fn emit_many(from: u64, to: u64) -> String {
    format!(
        "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload) \
         select 'thing', 'e', 'changed', n::text::json from generate_series({from}, {to}) n"
    )
}

pub(crate) fn numbers(page: &Page) -> Vec<u64> {
    page.events
        .iter()
        .map(|event| {
            let Payload::Json(json) = &event.payload else {
                panic!("a number")
            };
            let number: u64 = serde_json::from_slice(json).expect("a number");
            number
        })
        .collect()
}

/// Everything up to an empty page, by a reader that acknowledges nothing.
pub(crate) async fn drain(source: &mut impl Source) -> Vec<u64> {
    let mut all = Vec::new();
    loop {
        let page = source
            .capture(LIMITS, &Position::beginning())
            .await
            .expect("capture");
        if page.events.is_empty() {
            return all;
        }
        all.extend(numbers(&page));
    }
}

/// A source and a ledger, as the relay joins them.
pub(crate) struct Relay<'a> {
    database: &'a Database,
    pub(crate) source: PostgresSource,
    pub(crate) ledger: PostgresLedger,
    pub(crate) durable: Position,
}

impl<'a> Relay<'a> {
    pub(crate) async fn start(database: &'a Database, start: Start) -> Relay<'a> {
        let mut ledger = database.ledger(start);
        let Acquired::Ours(tenure) = ledger.acquire().await.expect("acquire") else {
            panic!("nobody else is here");
        };
        let mut source = database.source();
        source.seek(tenure.position.clone());
        Relay {
            database,
            source,
            ledger,
            durable: tenure.position,
        }
    }

    pub(crate) async fn restart(self) -> Relay<'a> {
        let database = self.database;
        drop(self);
        // The start is for a pipeline without a cursor.
        Self::start(database, Start::Earliest).await
    }

    pub(crate) async fn page(&mut self, rows: usize) -> Page {
        let limits = PageLimits { rows, ..LIMITS };
        self.source
            .capture(limits, &self.durable)
            .await
            .expect("capture")
    }

    pub(crate) async fn acknowledge(&mut self, position: Position) {
        assert_eq!(
            self.ledger.acknowledge(&position).await.expect("move"),
            Fenced::Written
        );
        self.durable = position;
    }

    /// Everything up to an empty page, acknowledged page by page.
    pub(crate) async fn drain(&mut self) -> Vec<u64> {
        let mut all = Vec::new();
        loop {
            let page = self.page(100).await;
            if page.events.is_empty() {
                return all;
            }
            all.extend(numbers(&page));
            self.acknowledge(page.end).await;
        }
    }
}

#[tokio::test]
async fn a_transaction_that_ends_three_windows_later_holds_nobody_up() {
    with_database("three_windows_later", async |database| {
        let mut relay = Relay::start(database, Start::Earliest).await;
        let mut late = database.connect().await;
        let mut live = database.connect().await;
        sql(&mut late, &format!("begin; {}; {}", emit(1), emit(2))).await;
        for n in 3..9 {
            sql(&mut live, &emit(n)).await;
            assert_eq!(relay.drain().await, [n]);
        }
        sql(&mut late, &format!("{}; commit", emit(9))).await;
        sql(&mut live, &emit(10)).await;
        let page = relay.page(100).await;
        assert_eq!(numbers(&page), [1, 2, 9, 10]);
        assert!(
            page.events[1].id <= page.end.window.floor && page.events[2].id > page.end.window.floor,
            "the case is one transaction on both sides of the floor: {:?}",
            page.end.window
        );
        relay.acknowledge(page.end).await;
        assert_eq!(relay.drain().await, NOTHING);
        assert_eq!(relay.restart().await.drain().await, NOTHING);
    })
    .await;
}

#[tokio::test]
async fn a_late_bulk_in_small_pages_with_live_events_between_and_restarts() {
    with_database("late_bulk", async |database| {
        let mut relay = Relay::start(database, Start::Earliest).await;
        let mut late = database.connect().await;
        let mut other = database.connect().await;
        let mut live = database.connect().await;
        // Two late transactions, interleaved, so that their rows have to be merged.
        sql(&mut late, &format!("begin; {}", emit_many(1, 5_000))).await;
        sql(&mut other, &format!("begin; {}", emit_many(5_001, 5_100))).await;
        sql(&mut late, &emit_many(5_101, 10_000)).await;
        for n in 10_001..10_004 {
            sql(&mut live, &emit(n)).await;
            assert_eq!(relay.drain().await, [n]);
        }
        sql(&mut other, "commit").await;
        sql(&mut late, "commit").await;
        let mut got = Vec::new();
        let mut emitted = 10_003;
        for pages in 0.. {
            let page = relay.page(73).await;
            if page.events.is_empty() {
                break;
            }
            got.extend(numbers(&page));
            if pages < 100 {
                emitted += 1;
                sql(&mut live, &emit(emitted)).await;
            }
            // What was not acknowledged comes again in the next life.
            if pages % 10 == 7 {
                let mut middle = page.end.clone();
                middle.last_id = page.events[page.events.len() / 2].id;
                got.truncate(got.len() - (page.events.len() - page.events.len() / 2 - 1));
                relay.acknowledge(middle).await;
                relay = relay.restart().await;
            } else {
                relay.acknowledge(page.end).await;
            }
        }
        let expected: Vec<u64> = (1..=10_000).chain(10_004..=emitted).collect();
        assert!(got == expected, "{} of {}", got.len(), expected.len());
    })
    .await;
}

#[tokio::test]
async fn a_prepared_transaction_across_restarts() {
    with_database("prepared_across_restarts", async |database| {
        let mut relay = Relay::start(database, Start::Earliest).await;
        let mut live = database.connect().await;
        let gid = format!("{}-a", database.name);
        let other = format!("{}-b", database.name);
        for (gid, n) in [(&gid, 1), (&other, 2)] {
            sql(&mut live, "begin; set local outbox.notify = off").await;
            sql(&mut live, &emit(n)).await;
            sql(&mut live, &format!("prepare transaction '{gid}'")).await;
        }
        for n in 3..8 {
            sql(&mut live, &emit(n)).await;
            assert_eq!(relay.drain().await, [n]);
            relay = relay.restart().await;
            assert_eq!(relay.drain().await, NOTHING);
        }
        sql(&mut live, &format!("commit prepared '{gid}'")).await;
        assert_eq!(relay.drain().await, [1]);
        relay = relay.restart().await;
        sql(&mut live, &format!("rollback prepared '{other}'")).await;
        sql(&mut live, &emit(8)).await;
        assert_eq!(relay.drain().await, [8]);
    })
    .await;
}

#[tokio::test]
async fn a_position_gives_the_same_events_whenever_it_is_read() {
    with_database("the_same_again", async |database| {
        let mut relay = Relay::start(database, Start::Earliest).await;
        let mut late = database.connect().await;
        let mut live = database.connect().await;
        let mut never = database.connect().await;
        sql(&mut late, &format!("begin; {}", emit_many(1, 30))).await;
        sql(&mut never, &format!("begin; {}", emit_many(900, 930))).await;
        sql(&mut live, &emit(31)).await;
        assert_eq!(relay.drain().await, [31]);
        sql(&mut live, &emit(32)).await;
        assert_eq!(relay.drain().await, [32]);
        sql(&mut late, "commit").await;
        sql(&mut live, &emit_many(33, 50)).await;
        let first = relay.page(7).await;
        let window = first.end.window.clone();
        // What happens now is of later windows.
        sql(&mut never, "commit").await;
        sql(&mut live, &emit_many(60, 70)).await;
        let expected: Vec<u64> = (1..=30).chain(33..=50).collect();
        let mut got = numbers(&first);
        let mut places = vec![first.end.clone()];
        while !places[places.len() - 1].at_end_of_window() {
            let page = relay.page(7).await;
            got.extend(numbers(&page));
            places.push(page.end);
        }
        assert_eq!(got, expected);
        for (n, place) in places.into_iter().enumerate() {
            relay.acknowledge(place).await;
            relay = relay.restart().await;
            assert_eq!(relay.durable.window, window, "stored as it was");
            let mut rest = Vec::new();
            let mut rows = 1;
            let mut at = relay.durable.clone();
            while !at.at_end_of_window() {
                let page = relay.page(rows).await;
                rest.extend(numbers(&page));
                at = page.end;
                rows = rows % 11 + 3;
            }
            assert_eq!(rest, expected[(7 * (n + 1)).min(expected.len())..]);
        }
        // `never` was not late for the last window, but is for the next one.
        let expected: Vec<u64> = (900..=930).chain(60..=70).collect();
        assert_eq!(relay.drain().await, expected);
    })
    .await;
}

#[tokio::test]
async fn a_page_ends_at_its_bytes() {
    with_database("bytes", async |database| {
        let mut relay = Relay::start(database, Start::Earliest).await;
        let mut writer = database.connect().await;
        let mut late = database.connect().await;
        // Numbers with 10,000 spaces in front.
        let wide = |from, to| {
            format!(
                "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload) \
                 select 'thing', 'e', 'changed', (repeat(' ', 10000) || n)::json \
                   from generate_series({from}, {to}) n"
            )
        };
        sql(&mut late, &format!("begin; {}", wide(1, 20))).await;
        for n in 21..23 {
            sql(&mut writer, &emit(n)).await;
            relay.drain().await;
        }
        sql(&mut late, "commit").await;
        sql(&mut writer, &wide(23, 60)).await;
        let mut got = Vec::new();
        let mut bytes = 25_000;
        loop {
            let limits = PageLimits { rows: 100, bytes };
            let page = relay.source.capture(limits, &relay.durable).await;
            let page = page.expect("capture");
            if page.events.is_empty() {
                break;
            }
            let size: usize = page
                .events
                .iter()
                .map(outbox_relay::event::Event::size_bytes)
                .sum();
            assert!(
                page.events.len() == 1 || size < bytes + 11_000,
                "{} events of {size} bytes",
                page.events.len()
            );
            got.extend(numbers(&page));
            relay.acknowledge(page.end).await;
            if got.len() % 3 == 0 {
                relay = relay.restart().await;
            }
            // The first event of a page is taken whatever its size.
            bytes = if bytes == 1 { 25_000 } else { 1 };
        }
        let expected: Vec<u64> = (1..=20).chain(23..=60).collect();
        assert_eq!(got, expected);
    })
    .await;
}

#[tokio::test]
async fn gaps_in_the_sequence_are_nothing() {
    with_database("gaps", async |database| {
        let mut relay = Relay::start(database, Start::Earliest).await;
        let mut writer = database.connect().await;
        let mut expected = Vec::new();
        for n in 0..30 {
            let gap = format!("begin; {}; rollback", emit_many(1, n * 7));
            sql(&mut writer, &gap).await;
            sql(&mut writer, "select nextval('outbox.events_id_seq')").await;
            sql(&mut writer, &emit(n)).await;
            expected.push(n);
            if n % 3 == 0 {
                assert_eq!(relay.drain().await, expected);
                expected.clear();
            }
            if n % 9 == 0 {
                relay = relay.restart().await;
            }
        }
        // The newest ids belong to nobody.
        sql(
            &mut writer,
            &format!("begin; {}; rollback", emit_many(1, 99)),
        )
        .await;
        assert_eq!(relay.drain().await, expected);
        sql(&mut writer, &emit(77)).await;
        assert_eq!(relay.drain().await, [77]);
    })
    .await;
}

/// Replaces the partitions by some of ten rows each, so that they run out.
pub(crate) async fn small_partitions(database: &Database, ahead: u32, rows: u32) {
    let mut connection = database.connect().await;
    sql(
        &mut connection,
        "do $$ declare p regclass; begin
            for p in select inhrelid from pg_inherits where inhparent = 'outbox.events'::regclass
                        and inhrelid <> 'outbox.events_default'::regclass loop
                execute format('drop table %s', p);
            end loop; end $$",
    )
    .await;
    let make = format!("select outbox.make_partitions({ahead}, {rows})::text");
    ask(&mut connection, &make).await;
}

#[tokio::test]
async fn when_partitions_run_out_the_default_one_takes_over() {
    with_database("default_partition", async |database| {
        small_partitions(database, 2, 10).await;
        let mut relay = Relay::start(database, Start::Earliest).await;
        let mut writer = database.connect().await;
        let mut late = database.connect().await;
        let in_default = "select count(*)::text from outbox.events_default";
        let mut expected = Vec::new();
        // A transaction whose rows lie in a partition and, later, in the default one.
        sql(&mut late, &format!("begin; {}", emit(1_000))).await;
        for round in 0..4_u64 {
            for n in round * 50..round * 50 + 50 {
                sql(&mut writer, &emit(n)).await;
                expected.push(n);
                if n % 7 == 0 {
                    assert_eq!(relay.drain().await, expected);
                    expected.clear();
                }
            }
            if round == 1 {
                sql(&mut late, &format!("{}; commit", emit(1_001))).await;
                expected.insert(0, 1_000);
                expected.push(1_001);
            }
            let before: u64 = ask(&mut writer, in_default)
                .await
                .parse()
                .expect("a number");
            assert!(before > 0, "round {round}: the partitions did not run out");
            if round >= 1 {
                let made = ask(&mut writer, "select outbox.make_partitions(2, 10)::text").await;
                assert_ne!(made, "0", "round {round}");
                // From here until they run out again rows lie in partitions of their own.
                let skip = "select nextval('outbox.events_id_seq') from generate_series(1, 10)";
                sql(&mut writer, skip).await;
                sql(&mut writer, &emit(2_000 + round)).await;
                expected.push(2_000 + round);
                assert_eq!(ask(&mut writer, in_default).await, before.to_string());
            }
            relay = relay.restart().await;
        }
        assert_eq!(relay.drain().await, expected);
        assert_eq!(
            ask(&mut writer, "select count(*)::text from outbox.events").await,
            "205"
        );
    })
    .await;
}

#[tokio::test]
async fn the_first_event_of_an_outbox_is_not_skipped() {
    let starts = [
        Start::Earliest,
        Start::Latest,
        // Now, before and after; nothing is in the log at any of them.
        Start::Time(0),
        Start::Time(4_000_000_000_000_000),
    ];
    for start in starts {
        with_database("the_first_event", async |database| {
            let mut relay = Relay::start(database, start).await;
            // The ends of empty windows may be acknowledged.
            for _ in 0..3 {
                let page = relay.page(10).await;
                assert!(page.events.is_empty());
                relay.acknowledge(page.end).await;
            }
            relay = relay.restart().await;
            let mut writer = database.connect().await;
            sql(&mut writer, &emit(1)).await;
            assert_eq!(relay.drain().await, [1], "{start:?}");
        })
        .await;
    }
}

#[tokio::test]
async fn what_is_open_while_a_pipeline_starts_is_not_skipped() {
    for (earlier, ends_before_the_first_window) in
        [(true, true), (true, false), (false, true), (false, false)]
    {
        for start in [Start::Earliest, Start::Latest, Start::Time(0)] {
            with_database("open_at_start", async |database| {
                let mut writer = database.connect().await;
                let mut open = database.connect().await;
                let start = match start {
                    Start::Time(_) => {
                        let now =
                            "select (extract(epoch from clock_timestamp()) * 1e6)::bigint::text";
                        Start::Time(ask(&mut writer, now).await.parse().expect("a number"))
                    }
                    other => other,
                };
                sql(&mut open, &format!("begin; {}", emit(1))).await;
                if earlier {
                    sql(&mut writer, &emit(2)).await;
                }
                let mut relay = Relay::start(database, start).await;
                let mut got = Vec::new();
                if !ends_before_the_first_window {
                    got = relay.drain().await;
                }
                sql(&mut open, "commit").await;
                sql(&mut writer, &emit(3)).await;
                got.extend(relay.drain().await);
                got.sort_unstable();
                let mut expected = vec![1, 2, 3];
                expected.retain(|n| *n != 2 || (earlier && start != Start::Latest));
                assert_eq!(got, expected, "{start:?}, earlier: {earlier}");
            })
            .await;
        }
    }
}

#[tokio::test]
async fn a_start_at_a_time_leaves_out_what_occurred_before() {
    with_database("start_at_a_time", async |database| {
        let mut writer = database.connect().await;
        sql(&mut writer, &emit_many(1, 10)).await;
        let now = "select (extract(epoch from clock_timestamp()) * 1e6)::bigint::text";
        let now = ask(&mut writer, now).await.parse().expect("a number");
        sql(&mut writer, "select pg_sleep(0.01)").await;
        sql(&mut writer, &emit_many(11, 20)).await;
        let mut relay = Relay::start(database, Start::Time(now)).await;
        let first = relay.page(3).await;
        assert_eq!(numbers(&first), [11, 12, 13]);
        relay.acknowledge(first.end).await;
        relay = relay.restart().await;
        sql(&mut writer, &emit(21)).await;
        let expected: Vec<u64> = (14..=21).collect();
        assert_eq!(relay.drain().await, expected);
    })
    .await;
}

#[tokio::test]
async fn an_empty_page_means_that_there_is_nothing_new() {
    with_database("empty_page", async |database| {
        let mut relay = Relay::start(database, Start::Earliest).await;
        let mut writer = database.connect().await;
        sql(&mut writer, &emit_many(1, 10)).await;
        // The newest id is nobody's, so the window does not end with its last event.
        sql(&mut writer, "select nextval('outbox.events_id_seq')").await;
        let page = relay.page(10).await;
        assert_eq!(page.events.len(), 10);
        relay.acknowledge(page.end).await;
        relay = relay.restart().await;
        sql(&mut writer, &emit(11)).await;
        assert_eq!(relay.drain().await, [11]);

        // A page that ends an older window does not know whether that was all.
        sql(&mut writer, &emit_many(12, 16)).await;
        assert_eq!(relay.page(3).await.events.len(), 3);
        sql(&mut writer, &emit(17)).await;
        let page = relay.page(3).await;
        assert_eq!(numbers(&page), [15, 16]);
        assert!(page.more);
    })
    .await;
}

#[tokio::test]
async fn empty_windows_move_nothing() {
    with_database("empty_windows", async |database| {
        let mut relay = Relay::start(database, Start::Earliest).await;
        let mut writer = database.connect().await;
        sql(&mut writer, &emit_many(1, 10)).await;
        assert_eq!(relay.drain().await.len(), 10);
        let books = "select last_value || ' ' || (select string_agg(c::text || c.xmin, '') from outbox.cursors c) \
                       from outbox.events_id_seq";
        let before = ask(&mut writer, books).await;
        let durable = relay.durable.clone();
        for _ in 0..20 {
            let page = relay.page(10).await;
            assert!(page.events.is_empty() && !page.more);
            assert_eq!(page.end.window.ceiling, durable.window.ceiling);
            assert_eq!(page.end.last_id, durable.last_id);
        }
        assert_eq!(ask(&mut writer, books).await, before);
    })
    .await;
}

/// A restored database hands the same ids out again; what was known of ids before a seek must not be used after it.
#[tokio::test]
async fn a_seek_forgets_the_floor() {
    with_database("seek_forgets", async |database| {
        let mut relay = Relay::start(database, Start::Earliest).await;
        let mut writer = database.connect().await;
        sql(&mut writer, &emit_many(1, 1_000)).await;
        assert_eq!(relay.drain().await.len(), 1_000);
        relay.drain().await;
        let restored = "truncate outbox.events; alter sequence outbox.events_id_seq restart";
        sql(&mut writer, restored).await;
        relay.durable = Position::beginning();
        relay.source.seek(Position::beginning());
        let mut got = Vec::new();
        for n in 1..=5 {
            got.extend(relay.drain().await);
            sql(&mut writer, &emit(n)).await;
        }
        got.extend(relay.drain().await);
        assert_eq!(got, [1, 2, 3, 4, 5]);
    })
    .await;
}

/// A transaction that has its xid but not its id yet, while windows come and go.
#[tokio::test]
async fn an_id_that_is_taken_long_after_its_xid() {
    with_database("xid_long_before_id", async |database| {
        let mut relay = Relay::start(database, Start::Earliest).await;
        let mut slow = database.connect().await;
        let mut live = database.connect().await;
        sql(&mut slow, "begin; select pg_current_xact_id()").await;
        for n in 1..4 {
            sql(&mut live, &emit(n)).await;
            assert_eq!(relay.drain().await, [n]);
        }
        sql(&mut slow, &emit(4)).await;
        for n in 5..8 {
            sql(&mut live, &emit(n)).await;
            assert_eq!(relay.drain().await, [n]);
        }
        sql(&mut slow, "commit").await;
        assert_eq!(relay.drain().await, [4]);
    })
    .await;
}

/// Defaults are evaluated in the order of the columns; see `Window::floor` for what relies on it.
#[tokio::test]
async fn the_xid_stands_before_the_id() {
    with_database("column_order", async |database| {
        let mut connection = database.connect().await;
        let order = "select string_agg(attname, ' ' order by attnum) from pg_attribute \
                      where attrelid = 'outbox.events'::regclass and attname in ('xid', 'id')";
        assert_eq!(ask(&mut connection, order).await, "xid id");
        // Rows of every way in carry the xid of the whole transaction, whatever savepoint made them.
        sql(
            &mut connection,
            &format!(
                "begin; savepoint s; {}; savepoint t; {}; commit",
                emit(1),
                emit_many(2, 3)
            ),
        )
        .await;
        let xids = "select (count(distinct xid) || ' ' || bool_and(pg_visible_in_snapshot(xid, \
                    pg_current_snapshot()))) from outbox.events";
        assert_eq!(ask(&mut connection, xids).await, "1 true");
    })
    .await;
}

/// The ceiling is what was handed out, not what the sequence has in its row.
#[tokio::test]
async fn the_ceiling_of_an_unused_sequence_is_zero() {
    with_database("unused_sequence", async |database| {
        let mut relay = Relay::start(database, Start::Earliest).await;
        let page = relay.page(10).await;
        assert_eq!(page.end.window.ceiling, EventId(0));
        let snapshot = page.end.window.cur.to_string();
        assert_eq!(
            Snapshot::from_str(&snapshot).expect("a snapshot"),
            page.end.window.cur
        );
    })
    .await;
}
