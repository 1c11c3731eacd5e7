//! The parts of the bench (`benches/figures`) that decide what is right and what is shown.

#![allow(dead_code, reason = "the bench uses more of these files")]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use expect_test::expect;
use sqlx::{AssertSqlSafe, Row};

use crate::harness::postgres::TestDatabase;

#[path = "../../benches/figures/cursors.rs"]
mod cursors;
#[path = "../../benches/figures/judge.rs"]
mod judge;
#[path = "../../benches/figures/plots.rs"]
mod plots;
#[path = "../../benches/figures/recorder.rs"]
mod recorder;
#[path = "../../benches/figures/report.rs"]
mod report;
#[path = "../../benches/figures/workload.rs"]
pub(crate) mod workload;

use judge::{Expected, Found};
use recorder::Recorder;
use report::{Header, Place, Report, Spread, median, number};
use workload::{EVENT_TYPE, Keys, Workload};

/// Judges events 1, 2 and 3 by what came: topic, key and sequence.
fn verdict(came: &[(&str, &str, i64)], pipelines: usize, doubles: bool) -> String {
    let expected = Expected::all(3);
    let mut found = Found::default();
    for (topic, key, sequence) in came {
        if let Err(error) = found.event(topic, Some(key.as_bytes()), *sequence, 0) {
            return error.to_string();
        }
    }
    match expected.judge(&found, pipelines, doubles) {
        Ok(()) => "right".to_owned(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_right_history_is_right() {
    let once = [("p.0.e", "a", 1), ("p.0.e", "b", 3), ("p.0.e", "a", 2)];
    assert_eq!(verdict(&once, 1, false), "right");
    let twice: Vec<_> = once
        .iter()
        .flat_map(|(_, key, n)| [("p.0.e", *key, *n), ("p.1.e", *key, *n)])
        .collect();
    assert_eq!(verdict(&twice, 2, false), "right");
    let again = [&once[..], &once[..1]].concat();
    assert_eq!(verdict(&again, 1, true), "right");
}

#[test]
fn a_wrong_answer_is_named() {
    let (a1, a2, b3, b4) = (
        ("p.e", "a", 1),
        ("p.e", "a", 2),
        ("p.e", "b", 3),
        ("p.e", "b", 4),
    );
    let says = |came: &[_]| verdict(came, 1, false);
    expect!["WRONG: 2 events are in Kafka, and 3 were emitted"].assert_eq(&says(&[a1, a2]));
    expect!["WRONG: 1 events came twice without a crash"].assert_eq(&says(&[a1, a2, a1, b3]));
    expect!["WRONG: 2 events are in Kafka, and 3 were emitted"].assert_eq(&says(&[a1, a2, a1]));
    expect!["WRONG: these are not the events that were emitted"].assert_eq(&says(&[a1, a2, b4]));
    expect!["WRONG: event 1 comes after 2 of its key, in p.e"].assert_eq(&says(&[a2, a1, b3]));
    expect!["WRONG: 3 events are in Kafka, and 6 were emitted"].assert_eq(&verdict(
        &[a1, a2, b3],
        2,
        false,
    ));
}

#[test]
fn the_time_of_a_drain_is_from_the_first_record_to_the_last() {
    let mut found = Found::default();
    assert!(found.milliseconds().is_err());
    found.record(1_500);
    assert!(found.milliseconds().is_err());
    found.record(4_000);
    found.record(1_000);
    assert_eq!(found.milliseconds().unwrap(), 3_000);
}

#[test]
fn a_late_start_counts_as_latency() {
    let began = Instant::now();
    let mut recorder = Recorder::new().unwrap();
    // One was held up for a second; those that were due meanwhile are late as well.
    for n in 0..1000 {
        let due = began + Duration::from_millis(n);
        let seen = due.max(began + Duration::from_secs(1));
        recorder.record(due, seen).unwrap();
    }
    let [p50, p99, p999] = recorder.milliseconds();
    assert!((495.0..505.0).contains(&p50), "{p50}");
    assert!((985.0..995.0).contains(&p99), "{p99}");
    assert!((995.0..1005.0).contains(&p999), "{p999}");
}

#[test]
fn figures_have_three_digits() {
    let shown: Vec<String> = [
        0.0,
        0.123_4,
        9.994,
        9.996,
        99.94,
        99.96,
        1234.0,
        9994.0,
        9996.0,
        123_456.0,
        999_400.0,
        999_600.0,
        -12_345.0,
        f64::NAN,
        f64::INFINITY,
    ]
    .into_iter()
    .map(number)
    .collect();
    expect!["0 0.12 9.99 10.0 99.9 100 1234 9994 10.0k 123k 999k 1.00M -12.3k - -"]
        .assert_eq(&shown.join(" "));
}

#[test]
fn rounds_come_to_a_median_and_a_spread() {
    assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
    assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
    assert!(median(&[]).is_nan());
    let spread = Spread::of(vec![3.0, 1.0, 2.0]);
    assert_eq!(spread.to_string(), "2.00 (1.00..3.00)");
}

fn report() -> Report {
    let mut report = Report::new(Header {
        relay: "0.0.0".to_owned(),
        commit: "0123456789ab".to_owned(),
        machine: "2 cores of a machine, 8 GiB".to_owned(),
        kernel: "6.0.0".to_owned(),
        load_average: 0.5,
        stolen_percent: Some(1.25),
        postgres: "17.6 (fsync on)".to_owned(),
        kafka: "4.1.0".to_owned(),
        sizes: "2 rounds".to_owned(),
        caveats: vec!["--quick".to_owned()],
    });
    let mut place = Place {
        case: "drain",
        variant: "233 B",
        limit: "bare loop",
    };
    // Each round's ratio is 0.5, though the medians of three rounds would say so as well; the second row tells the difference.
    report.add(&place, "events/s", 100_000.0, 200_000.0);
    report.add(&place, "events/s", 150_000.0, 300_000.0);
    report.add(&place, "peak MiB", 30.0, None);
    place.variant = "8 KiB";
    for (relay, limit) in [(1.0, 10.0), (2.0, 2.0), (4.0, 1.0)] {
        report.add(&place, "events/s", relay, limit);
    }
    for (row, at) in [(0, 233.0), (2, 8192.0)] {
        report.rows[row].axes.insert("payload bytes".to_owned(), at);
    }
    report.skipped.push("stall: no process".to_owned());
    report
}

#[test]
fn the_table_says_it_all() {
    expect![[r#"
        outbox-relay 0.0.0 0123456789ab
        2 cores of a machine, 8 GiB, Linux 6.0.0, load 0.5, the host took 1.2 %
        PostgreSQL 17.6 (fsync on); Kafka 4.1.0
        2 rounds
        NOT FIGURES: --quick

        drain, beside: bare loop
               figure    relay              limit              ratio
        233 B  events/s  125k (100k..150k)  250k (200k..300k)  0.50
               peak MiB  30.0               -                  -
        8 KiB  events/s  2.00 (1.00..4.00)  2.00 (1.00..10.0)  1.00 (0.10..4.00)

        SKIPPED stall: no process
    "#]]
    .assert_eq(&report().show(false));
    expect![[r#"
        outbox-relay 0.0.0 0123456789ab
        2 cores of a machine, 8 GiB, Linux 6.0.0, load 0.5, the host took 1.2 %
        PostgreSQL 17.6 (fsync on); Kafka 4.1.0
        2 rounds
        NOT FIGURES: --quick

        ### drain, beside: bare loop

        |  | events/s | peak MiB |
        |---|---|---|
        | 233 B | 125k / 250k (0.50) | 30.0 |
        | 8 KiB | 2.00 / 2.00 (0.10..4.00) | - |

        SKIPPED stall: no process
    "#]]
    .assert_eq(&report().show(true));
}

#[test]
fn the_widest_table_fits_a_screen() {
    let mut report = Report::new(report().header);
    for variant in ["10000/s, listen", "32 writers, off"] {
        let place = Place {
            case: "latency",
            variant,
            limit: "no relay, no notifications",
        };
        for (relay, limit) in [
            (12_345.0, 98_765.0),
            (23_456.0, 12_345.0),
            (34_567.0, 1_234.0),
        ] {
            report.add(&place, "from commit p99.9 ms", relay, limit);
        }
    }
    let table = report.show(false);
    let widest = table.lines().map(|line| line.chars().count()).max();
    assert!(widest.unwrap() > 80, "the test lost its wide cells");
    assert!(widest.unwrap() <= 100, "{table}");
}

#[test]
fn what_was_written_is_read_again_and_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("out.json");
    report().write(&file).unwrap();
    let mut read = Report::read(&file).unwrap();
    assert_eq!(read.show(false), report().show(false));
    let drawn = plots::draw(&read, folder.path()).unwrap();
    let expected: Vec<PathBuf> = vec![folder.path().join("drain-payload-bytes.svg")];
    assert_eq!(drawn, expected);
    let picture = std::fs::read_to_string(&drawn[0]).unwrap();
    for text in [
        "relay",
        "bare loop",
        "payload bytes",
        "0123456789ab",
        "NOT FIGURES",
    ] {
        assert!(picture.contains(text), "{text}");
    }
    read.failed.push("drain: WRONG".to_owned());
    assert!(plots::draw(&read, folder.path()).is_err());
    assert!(read.show(false).ends_with("\nFAILED drain: WRONG\n"));
}

#[tokio::test]
async fn a_backlog_has_the_shape_that_was_asked_for() {
    let Some(database) = TestDatabase::create().await else {
        return;
    };
    let workload = Workload {
        payload_bytes: 233,
        per_transaction: 10,
        topics: 3,
        keys: Keys::Zipf,
        ..Workload::of(20_000)
    };
    workload.fill(&mut database.connect().await).await.unwrap();
    let row = sqlx::query(
        "select count(*), count(distinct xid), count(distinct aggregate_type), \
                min(octet_length(payload::text)), max(octet_length(payload::text)), \
                count(*) filter (where event_type = $1), \
                count(*) filter (where aggregate_id = '0'), count(*) filter (where aggregate_id = '1'), \
                max(aggregate_id::int), count(distinct payload::text) \
           from outbox.events",
    )
    .bind(EVENT_TYPE)
    .fetch_one(&database.pool)
    .await
    .unwrap();
    let count = |n: usize| row.get::<i64, _>(n);
    assert_eq!((count(0), count(1), count(2)), (20_000, 2_000, 3));
    assert_eq!((row.get::<i32, _>(3), row.get::<i32, _>(4)), (233, 233));
    assert_eq!(count(5), 2_000, "a filter drops 90 %");
    // 1 / 1^0.99 and 1 / 2^0.99, of a sum of 10.22 over 10,000 keys.
    assert!((1850..2060).contains(&count(6)), "{}", count(6));
    assert!((910..1060).contains(&count(7)), "{}", count(7));
    assert!((9_000..10_000).contains(&row.get::<i32, _>(8)));
    assert_eq!(count(9), 20_000);
}

#[tokio::test]
async fn a_cursor_without_an_id_has_arrived_nowhere() {
    let Some(database) = TestDatabase::create().await else {
        return;
    };
    let mut db = database.connect().await;
    // Pipeline, shard, last id; how many of the run's two pipelines are behind 0, and behind 6.
    for (cursor, behind) in [
        ("'other-0', 0, 9", [2, 2]),
        ("'run-0', 0, null", [2, 2]),
        ("'run-0', 1, 7", [2, 2]),
        ("'run-0', 0, 0", [1, 2]),
        ("'run-0', 0, 6", [1, 1]),
        ("'run-1', 0, 6", [0, 0]),
    ] {
        let write = format!(
            "insert into outbox.cursors (pipeline, shard, last_id) values ({cursor})
             on conflict (pipeline, shard) do update set last_id = excluded.last_id"
        );
        sqlx::raw_sql(AssertSqlSafe(write))
            .execute(&mut db)
            .await
            .unwrap();
        for (last, behind) in [0, 6].into_iter().zip(behind) {
            let found = cursors::behind(&mut db, "run", 2, last).await.unwrap();
            assert_eq!(found, behind, "behind {last} with {cursor}");
        }
    }
}
