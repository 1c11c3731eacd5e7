//! The guard of what an event costs (`benches/cost`): its parts that read, judge and show, and what it is given.

#![allow(dead_code, reason = "the guard uses more of these files")]

use clap::ValueEnum;
use expect_test::expect;
use outbox_relay::event::Event;
use outbox_relay::source::postgres::row::{Decoder, Row};
use outbox_relay::source::postgres::{CaptureMode, PostgresSource, Settings};
use outbox_relay::source::{EVENT_BYTES_MAX, PageLimits};
use sqlx::AssertSqlSafe;
use sqlx::postgres::PgRow;
use sqlx::{Executor, Row as _, ValueRef};

use crate::bench::workload::{self, Workload};
use crate::harness::postgres::TestDatabase;

#[path = "../../benches/cost/bounds.rs"]
mod bounds;
#[path = "../../benches/cost/callgrind.rs"]
mod callgrind;
#[path = "../../benches/cost/recording.rs"]
mod recording;

use bounds::{BOUNDS, Bound, Cost, Stage, Verdict};
use callgrind::Count;
use recording::{RecordedRow, events, rows};

/// As callgrind 3.19 writes it: names in full once, positions and costs in between.
const PROFILE: &str = "\
# callgrind format
version: 1
creator: callgrind-3.19.0
positions: line
events: Ir

ob=(1) /bin/program
fn=(1) main
0 10
cfn=(2) malloc
calls=3 0
0 300
cfn=(3) _int_malloc
calls=100 0
0 100
+1 5
cfn=(2)
calls=4 +7
0 400

fn=(2)
0 700
cfn=(3)
calls=7 0
0 70

fn=(4) other
0 1
cfn=(5) realloc'2
calls=2 0
0 20
cfn=(6) __libc_calloc
calls=1 0
0 20

fn=(5)
0 1
cfn=(2)
calls=1000 0
0 20

totals: 12345
";

#[test]
fn a_profile_is_read() {
    let count = Count::parse(PROFILE).unwrap();
    assert_eq!(count.instructions, 12_345);
    assert_eq!(count.allocations, 3 + 4 + 2 + 1);
}

#[test]
fn a_profile_that_tells_nothing_is_refused() {
    let refusal = |profile: &str| Count::parse(profile).unwrap_err().to_string();
    let (cut, _) = PROFILE.split_once("totals").unwrap();
    expect!["the profile has no end"].assert_eq(&refusal(cut));
    let strange = PROFILE
        .replace("alloc\n", "\n")
        .replace("realloc'2", "mi_new");
    expect!["the profile knows no allocator of the C library"].assert_eq(&refusal(&strange));
    expect![[r#"read "calls=x 0""#]].assert_eq(&refusal("calls=x 0"));
}

const BOUND: Bound = Bound {
    stage: Stage::EncodeHeaders,
    measured: Cost {
        instructions: 1000.0,
        allocations: 2.0,
    },
};

fn cost(instructions: f64, allocations: f64) -> Cost {
    Cost {
        instructions,
        allocations,
    }
}

#[test]
fn a_cost_is_judged_by_its_bound() {
    for (instructions, allocations, verdict) in [
        (1000.0, 2.0, Verdict::Within),
        (1099.0, 2.24, Verdict::Within),
        (1101.0, 2.0, Verdict::Above),
        (1000.0, 2.26, Verdict::Above),
        (500.0, 3.0, Verdict::Above),
        (851.0, 1.7, Verdict::Within),
        (849.0, 2.0, Verdict::Loose),
        (1000.0, 1.0, Verdict::Loose),
    ] {
        let judged = BOUND.judge(cost(instructions, allocations));
        assert_eq!(judged, verdict, "{instructions} {allocations}");
    }
    // An allocation now and then is not one per event.
    let none = Bound {
        measured: cost(1000.0, 0.0),
        ..BOUND
    };
    assert_eq!(none.judge(cost(1000.0, 0.04)), Verdict::Within);
    assert_eq!(none.judge(cost(1000.0, 1.0)), Verdict::Above);
    // One more per event is too much, however many there are.
    let many = Bound {
        measured: cost(1000.0, 20.0),
        ..BOUND
    };
    assert_eq!(many.judge(cost(1000.0, 20.2)), Verdict::Within);
    assert_eq!(many.judge(cost(1000.0, 20.5)), Verdict::Above);
}

#[test]
fn a_remark_says_what_changed_and_where_to_look() {
    let remark = |instructions, allocations| {
        BOUND
            .remark(cost(instructions, allocations), "target/callgrind/x")
            .unwrap_or_default()
    };
    assert_eq!(remark(1000.0, 2.0), "");
    expect![[r#"
        encode-headers has become dearer: 1200 instructions per event, 1000 until now
          where: callgrind_annotate --inclusive=yes target/callgrind/x"#]]
    .assert_eq(&remark(1200.0, 2.0));
    expect![[r#"
        encode-headers has become dearer: 1200 instructions per event, 1000 until now; 3.00 allocations per event, 2.00 until now
          where: callgrind_annotate --inclusive=yes target/callgrind/x"#]].assert_eq(&remark(1200.0, 3.0));
    expect!["encode-headers has become cheaper: tighten its bound in benches/cost/bounds.rs to 700 instructions and 2.00 allocations"].assert_eq(&remark(700.4, 2.0));
}

#[test]
fn the_table_shows_costs_beside_their_bounds() {
    expect![[r#"
        | stage              | instructions |  bound | allocations | bound |
        |--------------------|-------------:|-------:|------------:|------:|
        | encode-headers     |         1234 |   1100 |        3.00 |  2.25 |
    "#]]
    .assert_eq(&bounds::table(&[(BOUND, cost(1234.5, 3.0))]));
}

#[test]
fn every_stage_has_a_bound() {
    let bound: Vec<Stage> = BOUNDS.iter().map(|bound| bound.stage).collect();
    assert_eq!(bound, Stage::value_variants());
}

#[test]
fn the_documentation_has_the_table_of_what_was_measured() {
    let text = include_str!("../../docs/performance.md");
    let measured = BOUNDS.map(|bound| (bound, bound.measured));
    let table = bounds::table(&measured);
    assert!(text.contains(&table), "docs/performance.md lacks:\n{table}");
}

fn decoded(rows: &[RecordedRow]) -> Vec<Event> {
    let mut decoder = Decoder::new(EVENT_BYTES_MAX);
    let decode = |row: &RecordedRow| match decoder.decode(&row.fields()) {
        Ok(Row::Event(event)) => event,
        other => panic!("{other:?}"),
    };
    rows.iter().map(decode).collect()
}

#[test]
fn a_recording_is_the_same_every_time_and_has_its_shape() {
    let recorded = events(2_000);
    assert_eq!(recorded, events(2_000));
    assert_eq!(decoded(&rows(&recorded)), recorded);
    let payload = |event: &Event| event.payload.bytes().map(<[u8]>::len);
    assert!(
        recorded
            .iter()
            .all(|event| payload(event) == Some(recording::PAYLOAD_BYTES))
    );
    let admitted = recorded
        .iter()
        .filter(|event| event.event_type == recording::EVENT_TYPE);
    assert_eq!(admitted.count(), 200, "a filter drops 90 %");
}

/// The guard counts what the bench times.
#[test]
fn a_recording_is_what_the_figures_are_of() {
    assert_eq!(recording::KEYS, workload::KEYS);
    assert_eq!(recording::EVENT_TYPES, i64::from(workload::EVENT_TYPES));
    assert_eq!(recording::EVENT_TYPE, workload::EVENT_TYPE);
    let bytes = u32::try_from(recording::PAYLOAD_BYTES).unwrap();
    assert_eq!(bytes, workload::PAYLOAD_BYTES);
}

#[tokio::test]
async fn a_recording_is_what_postgresql_sends() {
    let Some(database) = TestDatabase::create().await else {
        return;
    };
    let workload = Workload::of(100);
    workload.fill(&mut database.connect().await).await.unwrap();
    let headers = format!(
        "update outbox.events set headers = '{}' where id % 2 = 0",
        recording::HEADERS
    );
    sqlx::query(AssertSqlSafe(headers))
        .execute(&database.pool)
        .await
        .unwrap();
    let mut source = PostgresSource::new(Settings {
        connector: database.options.clone().into(),
        direct_connector: database.options.clone().into(),
        mode: CaptureMode::Poll,
        poll_interval: std::time::Duration::from_millis(200),
    });
    source.open().await.unwrap();
    let limits = PageLimits {
        rows: 100,
        bytes: usize::MAX,
    };
    let statement = source.statement(limits);
    let answer = database
        .pool
        .fetch_all(sqlx::raw_sql(AssertSqlSafe(statement)))
        .await
        .unwrap();
    let field = |row: &PgRow, index| {
        let value = row.try_get_raw(index).unwrap();
        (!value.is_null()).then(|| value.as_bytes().unwrap().to_vec())
    };
    let sent: Vec<RecordedRow> = answer
        .iter()
        .map(|row| RecordedRow(std::array::from_fn(|index| field(row, index))))
        .collect();
    let events = decoded(&sent);
    assert_eq!(events.len(), 100);
    // Which transaction wrote them is the server's affair.
    let without_xid = |rows: Vec<RecordedRow>| -> Vec<Vec<Option<Vec<u8>>>> {
        rows.into_iter()
            .map(|RecordedRow(fields)| fields[..fields.len() - 1].to_vec())
            .collect()
    };
    assert_eq!(without_xid(rows(&events)), without_xid(sent));
    // And what the guard makes up looks like it.
    let sizes = |events: &[Event]| {
        let size = |event: &Event| {
            (
                event.payload.bytes().map(<[u8]>::len),
                event.content_type.clone(),
            )
        };
        events.iter().map(size).collect::<Vec<_>>()
    };
    assert_eq!(sizes(&recording::events(100)), sizes(&events));
}
