//! Ids that go backwards: whatever becomes of the sequence, every committed event is read, and writers go on.

use std::collections::BTreeSet;

use outbox_relay::event::{Shard, Start};
use outbox_relay::source::Source;
use outbox_relay::source::postgres::PostgresSource;
use sqlx::Connection;
use sqlx::postgres::PgConnection;

use super::database::{Database, ask, number, sql, with_database};
use super::sabotage::{Idea, WrongSource};
use super::schedules::{NOTHING, Relay, drain, emit, emit_many, small_partitions};
use super::writers::Random;

const TRUNCATE: &str = "truncate outbox.events restart identity";

fn all(from: u64, to: u64) -> Vec<u64> {
    (from..=to).collect()
}

/// A relay that has published 100 events, and a writer.
async fn after_a_hundred(database: &Database) -> (Relay<'_>, PgConnection) {
    let mut writer = database.connect().await;
    sql(&mut writer, &emit_many(1, 100)).await;
    let mut relay = Relay::start(database, Start::Earliest).await;
    assert_eq!(relay.drain().await, all(1, 100));
    (relay, writer)
}

/// The newest id of the sequence, and the highest of a row.
async fn ids(connection: &mut PgConnection) -> (i64, i64) {
    let number = |text: String| text.parse().expect("a number");
    (
        number(
            ask(
                connection,
                "select last_value::text from outbox.events_id_seq",
            )
            .await,
        ),
        number(
            ask(
                connection,
                "select coalesce(max(id), 0)::text from outbox.events",
            )
            .await,
        ),
    )
}

#[tokio::test]
async fn a_table_that_was_truncated_is_read_from_its_new_beginning() {
    let test = "a_table_that_was_truncated_is_read_from_its_new_beginning";
    with_database(test, async |database| {
        let (mut relay, mut writer) = after_a_hundred(database).await;
        sql(&mut writer, TRUNCATE).await;
        sql(&mut writer, &emit_many(101, 150)).await;
        assert_eq!(relay.drain().await, all(101, 150));
        sql(&mut writer, &emit_many(151, 250)).await;
        assert_eq!(relay.drain().await, all(151, 250));
        let (newest, _) = ids(&mut writer).await;
        assert!(newest > 1_000, "no id comes a second time: {newest}");
        // Nothing of it is read again, by this reader or the next.
        assert_eq!(relay.restart().await.drain().await, NOTHING);
    })
    .await;
}

#[tokio::test]
async fn a_reset_that_overtook_itself_before_a_look_is_found() {
    let test = "a_reset_that_overtook_itself_before_a_look_is_found";
    with_database(test, async |database| {
        let (mut relay, mut writer) = after_a_hundred(database).await;
        for reset in [
            TRUNCATE,
            "delete from outbox.events; select setval('outbox.events_id_seq', 1, false)",
            "delete from outbox.events; alter sequence outbox.events_id_seq restart",
            "delete from outbox.events where id > 40; select setval('outbox.events_id_seq', 40)",
        ] {
            let statement = format!("begin; {reset}; {}; commit", emit_many(1_001, 9_000));
            sql(&mut writer, &statement).await;
            assert_eq!(relay.drain().await, all(1_001, 9_000), "{reset}");
            // Back to a small log, as it was.
            sql(
                &mut writer,
                "delete from outbox.events; select setval('outbox.events_id_seq', 1, false)",
            )
            .await;
            sql(&mut writer, &emit_many(1, 100)).await;
            assert_eq!(relay.drain().await, all(1, 100), "before the next");
        }
    })
    .await;
}

#[tokio::test]
async fn a_reset_while_no_relay_runs_is_found() {
    let test = "a_reset_while_no_relay_runs_is_found";
    with_database(test, async |database| {
        let (mut relay, mut writer) = after_a_hundred(database).await;
        for events in [50, 150, 3_000] {
            let last = relay.durable.clone();
            drop(relay);
            sql(&mut writer, TRUNCATE).await;
            sql(&mut writer, &emit_many(1, events)).await;
            relay = Relay::start(database, Start::Earliest).await;
            assert_eq!(relay.durable, last, "the position is as it was");
            assert_eq!(relay.drain().await, all(1, events));
        }
    })
    .await;
}

#[tokio::test]
async fn a_reset_in_the_middle_of_a_window_loses_nothing() {
    let test = "a_reset_in_the_middle_of_a_window_loses_nothing";
    with_database(test, async |database| {
        let (mut relay, mut writer) = after_a_hundred(database).await;
        sql(&mut writer, &emit_many(101, 200)).await;
        let page = relay.page(10).await;
        relay.acknowledge(page.end).await;
        sql(
            &mut writer,
            "delete from outbox.events where id > 150; select setval('outbox.events_id_seq', 150)",
        )
        .await;
        sql(&mut writer, &emit_many(301, 310)).await;
        let rest = relay.drain().await;
        assert_eq!(rest, [all(111, 150), all(301, 310)].concat());
        // The same for one that begins again there.
        sql(&mut writer, &emit_many(401, 500)).await;
        let page = relay.page(10).await;
        relay.acknowledge(page.end).await;
        sql(&mut writer, TRUNCATE).await;
        sql(&mut writer, &emit_many(601, 605)).await;
        assert_eq!(relay.restart().await.drain().await, all(601, 605));
    })
    .await;
}

#[tokio::test]
async fn a_sequence_behind_the_rows_hides_none_and_stops_no_writer() {
    let test = "a_sequence_behind_the_rows_hides_none_and_stops_no_writer";
    with_database(test, async |database| {
        let (mut relay, mut writer) = after_a_hundred(database).await;
        // Set back, with the rows still there: each insert would meet an id that is taken.
        sql(&mut writer, "select setval('outbox.events_id_seq', 1, false)").await;
        assert_eq!(relay.drain().await, NOTHING);
        sql(&mut writer, &emit(101)).await;
        assert_eq!(relay.drain().await, [101]);
        // Rows with ids of their own, as a copy brings them: found at the next look at everything.
        let copied = "insert into outbox.events (id, aggregate_type, aggregate_id, event_type, payload) \
                      select n, 'thing', 'e', 'changed', n::text::json from generate_series(5001, 5100) n";
        sql(&mut writer, copied).await;
        let mut relay = relay.restart().await;
        assert_eq!(relay.drain().await, all(5_001, 5_100));
        let (newest, highest) = ids(&mut writer).await;
        assert!(newest > highest, "{newest} {highest}");
        sql(&mut writer, &emit(5_101)).await;
        assert_eq!(relay.drain().await, [5_101]);
    })
    .await;
}

#[tokio::test]
async fn rows_that_came_without_a_sequence_are_found_while_a_relay_runs() {
    let test = "rows_that_came_without_a_sequence_are_found_while_a_relay_runs";
    with_database(test, async |database| {
        let (mut relay, mut writer) = after_a_hundred(database).await;
        let copied = "insert into outbox.events (id, aggregate_type, aggregate_id, event_type, payload) \
                      select n, 'thing', 'e', 'changed', n::text::json from generate_series(5001, 5100) n";
        sql(&mut writer, copied).await;
        let mut got = Vec::new();
        // Every row is asked each 10 s; a look that passes in between must not lose them.
        let found = async {
            while got.is_empty() {
                got = relay.drain().await;
                relay.source.wake().await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(60), found)
            .await
            .expect("they are found");
        assert_eq!(got, all(5_001, 5_100));
    })
    .await;
}

#[tokio::test]
async fn a_transaction_that_is_open_across_a_reset_is_read() {
    let test = "a_transaction_that_is_open_across_a_reset_is_read";
    with_database(test, async |database| {
        let (mut relay, mut writer) = after_a_hundred(database).await;
        let mut late = database.connect().await;
        sql(&mut late, &format!("begin; {}", emit(101))).await;
        sql(&mut writer, &emit_many(102, 150)).await;
        assert_eq!(relay.drain().await, all(102, 150));
        // The late transaction has the only rows of the new beginning, and overtakes what was.
        sql(
            &mut writer,
            "delete from outbox.events; select setval('outbox.events_id_seq', 1, false)",
        )
        .await;
        sql(&mut late, &emit_many(201, 290)).await;
        sql(&mut late, "select setval('outbox.events_id_seq', 200)").await;
        sql(&mut late, &emit_many(291, 300)).await;
        sql(&mut late, "commit").await;
        let got: BTreeSet<u64> = relay.drain().await.into_iter().collect();
        let expected: BTreeSet<u64> = [101].into_iter().chain(201..=300).collect();
        assert_eq!(got, expected);
    })
    .await;
}

/// One reader sets the sequence up; another, which has not looked yet, must not take the new ids for all there is.
#[tokio::test]
async fn each_reader_finds_a_reset_that_another_one_has_mended() {
    let test = "each_reader_finds_a_reset_that_another_one_has_mended";
    with_database(test, async |database| {
        let (mut relay, mut writer) = after_a_hundred(database).await;
        sql(&mut writer, &emit_many(101, 5_000)).await;
        assert_eq!(relay.drain().await, all(101, 5_000));
        let halves: Vec<Shard> = (0..2).map(|index| Shard { index, count: 2 }).collect();
        let mut others: Vec<PostgresSource> = halves
            .iter()
            .map(|shard| {
                let pipeline = "main".parse().expect("a name");
                let mut source = database.source().of_shard(pipeline, *shard);
                source.seek(relay.durable.clone());
                source
            })
            .collect();
        for other in &mut others {
            assert_eq!(drain(other).await, NOTHING);
        }
        sql(&mut writer, TRUNCATE).await;
        sql(&mut writer, &emit_many(7_001, 7_050)).await;
        assert_eq!(relay.drain().await, all(7_001, 7_050));
        let mut of_shards = Vec::new();
        let found = async {
            while of_shards.is_empty() {
                for other in &mut others {
                    of_shards.extend(drain(other).await);
                    other.wake().await;
                }
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(60), found)
            .await
            .expect("the shard finds them");
        assert_eq!(of_shards, all(7_001, 7_050), "one entity is one shard's");
    })
    .await;
}

#[tokio::test]
async fn a_reset_is_read_across_small_partitions() {
    let test = "a_reset_is_read_across_small_partitions";
    with_database(test, async |database| {
        small_partitions(database, 8, 1_000).await;
        let mut writer = database.connect().await;
        sql(&mut writer, &emit_many(1, 5_000)).await;
        let mut relay = Relay::start(database, Start::Earliest).await;
        assert_eq!(relay.drain().await, all(1, 5_000));
        let statement = format!("begin; {TRUNCATE}; {}; commit", emit_many(10_001, 16_000));
        sql(&mut writer, &statement).await;
        assert_eq!(relay.drain().await, all(10_001, 16_000));
    })
    .await;
}

/// What a random schedule does next.
#[derive(Debug)]
enum Step {
    Emit(u64),
    Begin,
    EmitLate(u64),
    EndLate { commits: bool },
    Delete,
    Truncate,
    SetBack,
    Look,
    Restart,
}

fn step(random: &mut Random) -> Step {
    match random.below(100) {
        0..10 => Step::Emit(1 + random.below(400)),
        10..30 => Step::Emit(1 + random.below(5)),
        30..38 => Step::Begin,
        38..50 => Step::EmitLate(1 + random.below(200)),
        50..58 => Step::EndLate {
            commits: random.chance(70),
        },
        58..63 => Step::Delete,
        63..68 => Step::Truncate,
        68..75 => Step::SetBack,
        75..93 => Step::Look,
        _ => Step::Restart,
    }
}

/// Events that were committed, still there when the relay looked, and never read.
async fn lost_in_a_random_schedule<S: Source>(
    database: &Database,
    seed: u64,
    mut make: impl FnMut() -> S,
) -> BTreeSet<u64> {
    let mut random = Random::new(seed);
    let mut writer = database.connect().await;
    let mut late = database.connect().await;
    // An insert waits for an open transaction that has the same id, and this test ends that one later.
    sql(&mut writer, "set lock_timeout = '50ms'").await;
    sql(&mut late, "set lock_timeout = '50ms'").await;
    let (mut open, mut pending, mut next) = (false, Vec::new(), 1);
    let (mut committed, mut read) = (BTreeSet::new(), BTreeSet::new());
    let mut source = make();
    let mut at = outbox_relay::position::Position::beginning();
    source.seek(at.clone());
    for _ in 0..60 {
        let step = step(&mut random);
        match step {
            Step::Emit(events) => {
                // A sequence that was set back, and that no relay has looked at since, makes an insert fail.
                let statement = emit_many(next, next + events - 1);
                if sqlx::raw_sql(sqlx::AssertSqlSafe(statement))
                    .execute(&mut writer)
                    .await
                    .is_ok()
                {
                    committed.extend(next..next + events);
                }
                next += events;
            }
            Step::Begin if !open => {
                sql(&mut late, "begin; select pg_current_xact_id()").await;
                open = true;
            }
            Step::EmitLate(events) if open => {
                let statement = format!("savepoint s; {}", emit_many(next, next + events - 1));
                if sqlx::raw_sql(sqlx::AssertSqlSafe(statement))
                    .execute(&mut late)
                    .await
                    .is_ok()
                {
                    pending.extend(next..next + events);
                } else {
                    sql(&mut late, "rollback to savepoint s").await;
                }
                next += events;
            }
            Step::EndLate { commits } if open => {
                sql(&mut late, if commits { "commit" } else { "rollback" }).await;
                if commits {
                    committed.extend(pending.iter().copied());
                }
                pending.clear();
                open = false;
            }
            Step::Delete => {
                let gone = "with gone as (delete from outbox.events where random() < 0.5 returning payload::text::bigint p) \
                            select coalesce(string_agg(p::text, ','), '') from gone";
                for n in ask(&mut writer, gone)
                    .await
                    .split(',')
                    .filter(|n| !n.is_empty())
                {
                    committed.remove(&n.parse().expect("a number"));
                }
            }
            Step::Truncate if !open => {
                sql(&mut writer, TRUNCATE).await;
                committed.clear();
            }
            Step::SetBack => {
                let to = 1 + random.below(next);
                sql(
                    &mut writer,
                    &format!(
                        "select setval('outbox.events_id_seq', least({to}, (select last_value from outbox.events_id_seq)))"
                    ),
                )
                .await;
            }
            Step::Look => look(&mut source, &mut writer, &mut at, &mut read).await,
            Step::Restart => {
                look(&mut source, &mut writer, &mut at, &mut read).await;
                source = make();
                source.seek(at.clone());
            }
            _ => {}
        }
    }
    if open {
        sql(&mut late, "commit").await;
        committed.extend(pending);
    }
    look(&mut source, &mut writer, &mut at, &mut read).await;
    // The last look is a new session's, which asks every row.
    source = make();
    source.seek(at.clone());
    read_all(&mut source, &mut writer, &mut at, &mut read).await;
    writer.close().await.expect("close");
    committed.difference(&read).copied().collect()
}

/// A look that asks what the sequence is, and whether rows lie above it, which a relay does ten times a second. What a
/// person does and undoes between two of these is not promised to be seen.
async fn look<S: Source>(
    source: &mut S,
    writer: &mut PgConnection,
    at: &mut outbox_relay::position::Position,
    read: &mut BTreeSet<u64>,
) {
    tokio::time::sleep(std::time::Duration::from_millis(110)).await;
    read_all(source, writer, at, read).await;
}

async fn read_all<S: Source>(
    source: &mut S,
    writer: &mut PgConnection,
    at: &mut outbox_relay::position::Position,
    read: &mut BTreeSet<u64>,
) {
    let limits = outbox_relay::source::PageLimits {
        rows: 100,
        bytes: 1_000_000,
    };
    loop {
        let page = source.capture(limits, at).await.expect("capture");
        if page.events.is_empty() && !page.more {
            return;
        }
        read.extend(super::schedules::numbers(&page));
        *at = page.end;
        // A position counts as acknowledged when a transaction that wrote it has ended.
        sql(writer, "select pg_current_xact_id()").await;
    }
}

const SCHEDULES: u64 = 12;

#[tokio::test]
async fn random_resets_lose_nothing() {
    let test = "random_resets_lose_nothing";
    let seed = number("RELAY_TEST_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("{test}: RELAY_TEST_SEED={seed}");
    for n in 0..SCHEDULES {
        with_database(test, async |database| {
            let seed = seed.wrapping_add(n);
            let lost = lost_in_a_random_schedule(database, seed, || database.source()).await;
            assert!(lost.is_empty(), "RELAY_TEST_SEED={seed}: lost {lost:?}");
        })
        .await;
    }
}

#[tokio::test]
async fn a_reader_that_trusts_ids_is_caught_by_random_resets() {
    let test = "a_reader_that_trusts_ids_is_caught_by_random_resets";
    let mut caught = false;
    for seed in 0..SCHEDULES {
        let mut ran = false;
        with_database(test, async |database| {
            let make = || WrongSource::new(Idea::IdCursor, database.options.clone());
            caught |= !lost_in_a_random_schedule(database, seed, make)
                .await
                .is_empty();
            ran = true;
        })
        .await;
        if !ran || caught {
            return;
        }
    }
    panic!("a reader that trusts ids was not seen to lose anything");
}
