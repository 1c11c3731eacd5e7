//! What people are told while nothing moves, and at the end.

use std::process::Output;
use std::time::Duration;

use serde_json::Value;

use super::exactly_once::exactly_once;
use super::process::{Process, Setup};
use super::{Line, PATIENCE, eventually, number, run};
use crate::harness::postgres::TestDatabase;

const BACKLOG: &str = "outbox_backlog_ids{pipeline=\"main\",shard=\"0\"}";
const OLDEST: &str = "outbox_oldest_unpublished_seconds{pipeline=\"main\",shard=\"0\"}";

fn emit(events: u32) -> String {
    format!(
        "select outbox.emit('order', n::text, 'placed', '{{}}') from generate_series(1, {events}) n"
    )
}

async fn waits(relay: &Process, least: f64) {
    eventually("the backlog", PATIENCE, async || {
        let (ids, seconds) = (relay.metric(BACKLOG)?, relay.metric(OLDEST)?);
        (ids >= least && seconds > 0.0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_backlog_is_told_where_the_broker_was_never_there() {
    let Some(database) = TestDatabase::create().await else {
        return;
    };
    let mut setup = Setup::new(&database.url);
    setup.set("SINK__KAFKA__BROKERS", "127.0.0.1:1");
    setup.set("PIPELINE__SHARDS", "2");
    run(&database.pool, emit(50)).await;
    let relay = setup.start();
    relay.not_ready(&["127.0.0.1:1"]).await;
    waits(&relay, 50.0).await;
    let view = eventually("the same in the status", PATIENCE, async || {
        let view = relay.pipeline("main")?;
        (view["backlog_ids"] == 50 && view["newest_id"] == 50).then_some(view)
    })
    .await;
    assert!(
        view["oldest_unpublished_seconds"].as_f64() > Some(0.0),
        "{view}"
    );
    assert!(
        view["state_since"].is_string() && view["for_seconds"].is_u64(),
        "{view}"
    );

    // What stays is told at the end.
    let log = ended(relay).await;
    assert!(
        log.contains("about 50 events of pipeline main wait, the oldest for "),
        "{log}"
    );
    assert!(log.contains("the next relay publishes them"), "{log}");
}

/// Lets it stop, and returns its log.
async fn ended(mut relay: Process) -> String {
    relay.signal("TERM");
    assert_eq!(relay.exit().await.code(), Some(0), "{}", relay.log());
    relay.log()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_backlog_is_told_while_the_pipeline_is_halted_and_by_the_owner_alone() {
    let test = "the_backlog_is_told_while_the_pipeline_is_halted_and_by_the_owner_alone";
    let Some(mut line) = Line::create(test).await else {
        return;
    };
    line.setup.set("PIPELINE__ON_REJECTED", "halt");
    line.kafka.create(&["order"]).await;
    let pool = &line.database.pool;
    run(pool, "select outbox.emit('no topic!', '1', 'placed', '{}')").await;
    let relay = line.setup.start();
    eventually("the halt", PATIENCE, async || {
        (relay.state() == "halted").then_some(())
    })
    .await;
    run(pool, emit(3)).await;
    waits(&relay, 4.0).await;

    // A standby does not know, and says nothing instead of 0.
    let standby = line.ready().await;
    let (_, metrics) = standby.get("/metrics").unwrap();
    for name in [
        "outbox_backlog_ids{",
        "outbox_oldest_unpublished_seconds{",
        "outbox_in_flight_events{",
        "outbox_set_aside_events{",
    ] {
        let shown = metrics.lines().any(|line| line.starts_with(name));
        assert!(!shown, "{metrics}");
    }
    for name in [
        "process_resident_memory_bytes ",
        "process_cpu_seconds_total ",
    ] {
        assert!(
            metrics.lines().any(|line| line.starts_with(name)),
            "{metrics}"
        );
    }
    standby.stop().await;
    relay.stop().await;
}

/// Two pipelines of which one has shards, and looks that are far apart.
fn polling(line: &mut Line) {
    line.setup.set("SOURCE__POSTGRES__CAPTURE", "poll");
    line.setup.set("SOURCE__POSTGRES__POLL_INTERVAL", "30s");
    line.setup.unset("PIPELINE__TOPIC");
    let config = format!(
        "[pipelines.one]
         topic = '{}'
         [pipelines.spread]
         topic = '{}'
         shards = 3
         ",
        line.kafka.topic("one"),
        line.kafka.topic("spread"),
    );
    line.setup.config(&config);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_covers_what_was_committed_just_before() {
    let Some(mut line) = Line::create("a_stop_covers_what_was_committed_just_before").await else {
        return;
    };
    polling(&mut line);
    stop_covers(&line).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_covers_what_was_committed_just_before_exactly_once() {
    let test = "a_stop_covers_what_was_committed_just_before_exactly_once";
    let Some(mut line) = Line::create(test).await else {
        return;
    };
    polling(&mut line);
    exactly_once(&mut line);
    stop_covers(&line).await;
}

async fn stop_covers(line: &Line) {
    const EVENTS: usize = 2_000;
    line.kafka.create(&["one", "spread"]).await;
    let relay = line.ready().await;
    // Idle: the next look is half a minute away.
    run(&line.database.pool, emit(1)).await;
    eventually("the first event", PATIENCE * 2, async || {
        let delivered = |name| relay.pipeline(name)?["delivered_events"].as_u64();
        let (_, body) = relay.get("/status")?;
        let status: Value = serde_json::from_str(&body).unwrap();
        let views = status["pipelines"].as_array()?.iter();
        let spread = views.filter(|view| view["pipeline"] == "spread");
        let spread: u64 = spread
            .filter_map(|view| view["delivered_events"].as_u64())
            .sum();
        (delivered("one") == Some(1) && spread == 1).then_some(())
    })
    .await;
    run(&line.database.pool, emit(u32::try_from(EVENTS).unwrap())).await;
    let log = ended(relay).await;
    assert!(log.contains("stopped: 0 events wait"), "{log}");
    for topic in ["one", "spread"] {
        let mut reader = line.kafka.reader(&[line.kafka.topic(topic)]);
        let records = reader.read_on(EVENTS + 1).await;
        assert_eq!(records.len(), EVENTS + 1, "{topic}");
    }
}

/// Runs it as a job.
async fn job(line: &Line, brokers: Option<&str>) -> Output {
    let mut command = line.setup.command("run");
    command
        .arg("--until-empty")
        .arg("--config")
        .arg(line.setup.write_config());
    command.env("RELAY_ADMIN__ENABLED", "false");
    if let Some(brokers) = brokers {
        command.env("RELAY_SINK__KAFKA__BROKERS", brokers);
    }
    let job = tokio::task::spawn_blocking(move || command.output().unwrap());
    tokio::time::timeout(PATIENCE * 2, job)
        .await
        .expect("it ends")
        .unwrap()
}

fn log_of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_ends_when_nothing_waits_whoever_published_it() {
    let Some(mut line) = Line::create("a_job_ends_when_nothing_waits_whoever_published_it").await
    else {
        return;
    };
    polling(&mut line);
    line.kafka.create(&["one", "spread"]).await;
    run(&line.database.pool, emit(500)).await;
    let output = job(&line, None).await;
    let log = log_of(&output);
    assert_eq!(output.status.code(), Some(0), "{log}");
    assert!(log.contains("stopped: 0 events wait"), "{log}");
    for topic in ["one", "spread"] {
        assert_eq!(line.kafka.read(&[topic]).await.len(), 500, "{topic}");
    }

    // Beside a relay that owns the pipelines.
    line.setup.set("SOURCE__POSTGRES__POLL_INTERVAL", "1s");
    let relay = line.ready().await;
    run(&line.database.pool, emit(500)).await;
    let output = job(&line, None).await;
    let log = log_of(&output);
    assert_eq!(output.status.code(), Some(0), "{log}");
    let behind = "select count(*) from outbox.events e, outbox.cursors c \
                   where not pg_visible_in_snapshot(e.xid, c.cur)";
    assert_eq!(number(&line.database.pool, behind).await, 0);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_halts_or_is_stopped_too_early_fails() {
    let Some(mut line) = Line::create("a_job_that_halts_or_is_stopped_too_early_fails").await
    else {
        return;
    };
    line.setup.set("PIPELINE__ON_REJECTED", "halt");
    let pool = &line.database.pool;
    run(pool, "select outbox.emit('no topic!', '1', 'placed', '{}')").await;
    let output = job(&line, None).await;
    let log = log_of(&output);
    assert_eq!(output.status.code(), Some(1), "{log}");
    assert!(log.contains("pipeline main has halted: event 1"), "{log}");

    let mut command = line.setup.command("run");
    command.arg("--until-empty");
    command.env("RELAY_ADMIN__ENABLED", "false");
    command.env("RELAY_SINK__KAFKA__BROKERS", "127.0.0.1:1");
    command.stderr(std::process::Stdio::piped());
    let child = command.spawn().unwrap();
    let owned = "select count(*) from outbox.leases where expires_at > clock_timestamp()";
    eventually("the lease", PATIENCE, async || {
        (number(pool, owned).await == 1).then_some(())
    })
    .await;
    super::process::signal(&child.id().to_string(), "TERM");
    let ends = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap());
    let output = tokio::time::timeout(Duration::from_secs(30), ends).await;
    let output = output.expect("it ends").unwrap();
    let log = log_of(&output);
    assert_eq!(output.status.code(), Some(1), "{log}");
    assert!(
        log.contains("asked to stop before everything was published: about 1 events"),
        "{log}"
    );
}
