//! The auditor on real topics: a clean run, and each way of spoiling one by hand.

use std::collections::BTreeSet;
use std::time::Duration;

use rdkafka::config::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use serde_json::Value;

use super::kafka::{Kafka, Received};
use super::process::Setup;
use super::{Line, PATIENCE, complete, eventually, number, run};
use crate::harness::sqlite::TestFile;

/// What `outbox-relay verify --json` says, and its exit code.
pub(super) async fn verify(setup: &Setup, arguments: &[&str]) -> (i32, Value) {
    let mut command = setup.command("verify");
    command.arg("--json").args(arguments);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap());
    let output = output.await.unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let report =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"));
    (output.status.code().unwrap(), report)
}

/// Missing, out of order, altered, unknown, doubled of the only pipeline.
pub(super) fn counts(report: &Value) -> [u64; 5] {
    let pipeline = &report["pipelines"][0];
    ["missing", "out_of_order", "altered", "unknown", "doubled"]
        .map(|kind| pipeline[kind]["count"].as_u64().unwrap())
}

/// Waits until the cursor has passed everything.
pub(super) async fn settled(setup: &Setup) -> Value {
    eventually("everything settled", PATIENCE, async || {
        let (_, report) = verify(setup, &[]).await;
        let pipelines = report["pipelines"].as_array().unwrap();
        let waiting = pipelines.iter().any(|pipeline| pipeline["waiting"] != 0);
        (!waiting && pipelines[0]["found"] != 0).then_some(report)
    })
    .await
}

/// Puts a record back as it was seen, or as it was changed since.
async fn produce(kafka: &Kafka, record: &Received) {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &kafka.brokers)
        .create()
        .unwrap();
    let mut headers = OwnedHeaders::new();
    for (key, value) in &record.headers {
        headers = headers.insert(Header {
            key,
            value: value.as_deref(),
        });
    }
    let mut out = FutureRecord::to(&record.topic)
        .partition(record.partition)
        .headers(headers);
    out.key = record.key.as_deref();
    out.payload = record.value.as_deref();
    producer.send(out, Duration::from_secs(20)).await.unwrap();
}

fn set_header(record: &mut Received, name: &str, value: &str) {
    let header = record.headers.iter_mut().find(|(header, _)| header == name);
    header.unwrap().1 = Some(value.as_bytes().to_vec());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clean_run_is_told_from_every_spoilt_one() {
    let Some((line, load)) = Line::with_load("a_clean_run_is_told_from_every_spoilt_one").await
    else {
        return;
    };
    let relay = line.ready().await;
    load.write(200).await;
    complete(&load, &line.kafka).await;
    let report = settled(&line.setup).await;
    assert_eq!(counts(&report), [0; 5], "{report}");
    let events = number(&line.database.pool, "select count(*) from outbox.events").await;
    for key in ["events", "found", "records"] {
        assert_eq!(report["pipelines"][0][key], events);
    }
    let (code, _) = verify(&line.setup, &["--no-duplicates"]).await;
    assert_eq!(code, 0);
    relay.stop().await;

    let records = line.kafka.read(&["order"]).await;
    // An event of a transaction that was taken back: its id was given out and its row never was.
    let (doomed,): (i64,) = sqlx::query_as(
        "select min(n) from generate_series((select min(id) from outbox.events), (select max(id) from outbox.events)) n
          where not exists (select from outbox.events where id = n)",
    )
    .fetch_one(&line.database.pool)
    .await
    .unwrap();
    let mut ghost = records[0].clone();
    set_header(&mut ghost, "id", "0191f3a0-1111-4222-8333-444455556666");
    set_header(&mut ghost, "sequence", &doomed.to_string());
    produce(&line.kafka, &ghost).await;
    let (code, report) = verify(&line.setup, &[]).await;
    assert_eq!((code, counts(&report)), (3, [0, 0, 0, 1, 0]), "{report}");
    let example = &report["pipelines"][0]["unknown"]["examples"][0];
    assert_eq!(example["sequence"], doomed);
    assert_eq!(example["topic"], line.kafka.topic("order"));

    // One that was never produced: a row that the cursor has passed. Its transaction is that of another row.
    run(
        &line.database.pool,
        "insert into outbox.events (xid, aggregate_type, aggregate_id, event_type, payload)
         select xid, 'order', '1', 'changed', '{}' from outbox.events order by id limit 1;
         update outbox.cursors set last_id = ceiling + 1000000, ceiling = ceiling + 1000000",
    )
    .await;
    let (code, report) = verify(&line.setup, &[]).await;
    assert_eq!((code, counts(&report)), (3, [1, 0, 0, 1, 0]), "{report}");
    let newest = number(&line.database.pool, "select max(id) from outbox.events").await;
    let example = &report["pipelines"][0]["missing"]["examples"][0];
    assert_eq!(example["sequence"], newest);
    assert!(example["event_id"].is_string());

    // A payload that is not the log's, behind the right one.
    let mut altered = records[0].clone();
    altered.value = Some(b"{\"n\": 0}".to_vec());
    produce(&line.kafka, &altered).await;
    let (code, report) = verify(&line.setup, &[]).await;
    assert_eq!((code, counts(&report)), (3, [1, 0, 1, 1, 1]), "{report}");

    let mut command = line.setup.command("verify");
    command.arg("--progress");
    let output = tokio::task::spawn_blocking(move || command.output().unwrap());
    let output = output.await.unwrap();
    let progress = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<&str> = progress.lines().collect();
    let read = |read: i64, what: &str| format!("main: {read}{what} read");
    let records = events + 2;
    assert_eq!(
        lines,
        [
            read(events + 1, " events of the log"),
            read(records, &format!(" of {records} records of the topics"))
        ]
    );
    let said = String::from_utf8(output.stdout).unwrap();
    for part in [
        "pipeline main: ",
        "missing       1 ",
        "out of order  0 ",
        "altered       1 ",
        "unknown       1 ",
        "it is not in the log",
        "a promise is broken",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(!said.contains("{\"n\""), "{said}");

    // Only what is younger than all of that.
    let from = newest.to_string();
    run(
        &line.database.pool,
        "delete from outbox.events where id = (select max(id) from outbox.events)",
    )
    .await;
    let (code, report) = verify(&line.setup, &["--from-id", &from]).await;
    assert_eq!((code, counts(&report)), (0, [0; 5]), "{report}");
    let (code, _) = verify(&line.setup, &["--since", "2099-01-01T00:00:00Z"]).await;
    assert_eq!(code, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn swapped_and_doubled_events_are_found() {
    let Some(line) = Line::create("swapped_and_doubled_events_are_found").await else {
        return;
    };
    line.kafka.create(&["order"]).await;
    run(
        &line.database.pool,
        "select outbox.emit('order', '1', 'changed', json_build_object('n', n)) from generate_series(1, 10) n",
    )
    .await;
    // What the relay makes of them, to be produced by hand in another order.
    let relay = line.ready().await;
    settled(&line.setup).await;
    relay.stop().await;
    let records = line.kafka.read(&["order"]).await;
    let kafka = Kafka::new(line.kafka.brokers.clone());
    kafka.create(&["order"]).await;
    let mut setup = line.setup.clone_for(&line.database.url);
    setup.kafka(&kafka);
    for n in [0, 1, 3, 2, 4, 3, 2, 4, 5, 6, 7, 8, 9] {
        let mut record: Received = records[n].clone();
        record.topic = kafka.topic("order");
        produce(&kafka, &record).await;
    }
    let (code, report) = verify(&setup, &[]).await;
    assert_eq!((code, counts(&report)), (3, [0, 1, 0, 0, 3]), "{report}");
    let pipeline = &report["pipelines"][0];
    let late = &pipeline["out_of_order"]["examples"][0];
    assert_eq!(
        (&late["offset"], &late["partition"]),
        (&3.into(), &records[0].partition.into())
    );
    assert_eq!(pipeline["doubled"]["longest_run"], 3);
    assert_eq!(pipeline["doubled"]["beyond_reach"], 0);
    // The clean ones still are; a duplicate counts only where it must not be.
    let (code, _) = verify(&line.setup, &["--no-duplicates"]).await;
    assert_eq!(code, 0);
    produce(&line.kafka, &records[9]).await;
    let (code, _) = verify(&line.setup, &[]).await;
    assert_eq!(code, 0);
    let (code, report) = verify(&line.setup, &["--no-duplicates"]).await;
    assert_eq!((code, counts(&report)), (3, [0, 0, 0, 0, 1]), "{report}");

    // Nor where the relay promises that there is none. A note says what else may look like a broken promise.
    let mut strict = line.setup.clone_for(&line.database.url);
    strict.set("SINK__KAFKA__DELIVERY", "exactly-once");
    strict.set("SINK__KAFKA__TRANSACTIONAL_ID", "verify");
    strict.set("PIPELINE__ON_REJECTED", "drop");
    let (code, report) = verify(&strict, &[]).await;
    assert_eq!((code, counts(&report)), (3, [0, 0, 0, 0, 1]), "{report}");
    let notes = report["pipelines"][0]["notes"].to_string();
    assert!(
        notes.contains("what was dropped counts as missing"),
        "{notes}"
    );

    // A cursor from elsewhere says nothing about these events.
    run(
        &line.database.pool,
        "update outbox.cursors set system_identifier = 1;
         select outbox.emit('order', '1', 'changed')",
    )
    .await;
    let (code, report) = verify(&line.setup, &[]).await;
    assert_eq!((code, &report["pipelines"][0]["waiting"]), (0, &1.into()));
    let note = report["pipelines"][0]["notes"][0].as_str().unwrap();
    assert!(note.contains("another cluster"), "{note}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_format_and_payload_is_recognised() {
    let Some(mut line) = Line::create("every_format_and_payload_is_recognised").await else {
        return;
    };
    line.setup.set("PIPELINES__PLAIN__FORMAT", "plain");
    for format in ["binary", "json"] {
        let name = format.to_uppercase();
        line.setup.set(
            &format!("PIPELINES__{name}__FORMAT"),
            &format!("cloudevents_{format}"),
        );
        let topic = line.kafka.topic(&format!("{{aggregate_type}}.{format}"));
        line.setup.set(&format!("PIPELINES__{name}__TOPIC"), &topic);
    }
    line.setup
        .set("PIPELINES__JSON__FILTER__EVENT_TYPES", "[\"odd\"]");
    line.setup
        .set("PIPELINES__JSON__KEY", "{aggregate_type}/{aggregate_id}");
    run(
        &line.database.pool,
        r#"insert into outbox.events (aggregate_type, aggregate_id, event_type, payload, headers)
           select 'order', n::text, 'odd', payload::json, '{"tenant": "acme", "tenant": "b"}'
             from unnest(array['{"n":  12345678901234567890123}', ' {"a":1,"a":2} ', '"\u0000 \/"', 'null', '1', null]) with ordinality p (payload, n);
           select outbox.emit_bytes('order', '1', 'odd', '\x00ff', 'application/avro');
           select outbox.emit('order', '', 'odd', '1');
           select outbox.emit('order', 'é', 'other', '1');
           select outbox.emit('no topic!', '1', 'odd', '1');
           select outbox.emit('no topic!', '1', 'odd', '2')"#,
    )
    .await;
    let relay = line.setup.start();
    let report = eventually("everything settled", PATIENCE, async || {
        let (_, report) = verify(&line.setup, &[]).await;
        let pipelines = report["pipelines"].as_array().unwrap();
        pipelines
            .iter()
            .all(|pipeline| pipeline["found"].as_u64() >= Some(8) && pipeline["waiting"] == 0)
            .then_some(report)
    })
    .await;
    relay.stop().await;
    for pipeline in report["pipelines"].as_array().unwrap() {
        let found = if pipeline["pipeline"] == "json" { 8 } else { 9 };
        assert_eq!(pipeline["holds"], true, "{pipeline}");
        assert_eq!(
            (&pipeline["found"], &pipeline["parked"]),
            (&found.into(), &2.into()),
            "{pipeline}"
        );
        assert_eq!(pipeline["not_judged"]["records_of_other_pipelines"], 0);
    }
    let (code, report) = verify(&line.setup, &["--pipeline", "binary"]).await;
    assert_eq!(
        (code, report["pipelines"].as_array().unwrap().len()),
        (0, 1)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_either_side_let_go_of_is_not_held_against_it() {
    let Some(mut line) = Line::create("what_either_side_let_go_of_is_not_held_against_it").await
    else {
        return;
    };
    line.setup.set("SINK__KAFKA__TOPICS__PARTITIONS", "2");
    let pool = &line.database.pool;
    run(
        pool,
        "select outbox.emit('order', (n % 10)::text, 'changed', '1') from generate_series(1, 100) n",
    )
    .await;
    let relay = line.ready().await;
    settled(&line.setup).await;
    relay.stop().await;
    // The log lets go of its older half, the topic of what was in it before the younger quarter.
    run(pool, "delete from outbox.events where id <= 50").await;
    let (code, report) = verify(&line.setup, &[]).await;
    assert_eq!((code, counts(&report)), (0, [0; 5]), "{report}");
    let not_judged =
        |report: &Value, what: &str| report["pipelines"][0]["not_judged"][what].clone();
    assert_eq!(not_judged(&report, "records_beyond_the_log"), 50);

    let records = line.kafka.reader_of(&["order"], 2).read_to_end().await;
    let first_kept = |partition| {
        let mut kept = records
            .iter()
            .filter(|record| record.partition == partition);
        let sequence = |record: &Received| -> i64 {
            str::from_utf8(record.header("sequence").unwrap())
                .unwrap()
                .parse()
                .unwrap()
        };
        kept.find(|record| sequence(record) > 75)
            .map(|record| record.offset)
            .unwrap()
    };
    line.kafka
        .let_go("order", &[first_kept(0), first_kept(1)])
        .await;
    let (code, report) = verify(&line.setup, &[]).await;
    assert_eq!((code, counts(&report)), (0, [0; 5]), "{report}");
    assert_eq!(
        not_judged(&report, "events_beyond_the_topic"),
        25,
        "{report}"
    );

    // What compaction would have removed is not there, as if it had never been produced.
    let compacted = line.kafka.topic("compacted");
    line.setup.set("PIPELINE__TOPIC", &compacted);
    let (code, report) = verify(&line.setup, &[]).await;
    assert_eq!((code, counts(&report)[0]), (3, 50), "{report}");
    line.kafka
        .create_with("compacted", 2, &[("cleanup.policy", "compact")])
        .await;
    let mut newest = BTreeSet::new();
    for mut record in records.iter().rev().cloned() {
        if newest.insert(record.key.clone()) {
            compacted.clone_into(&mut record.topic);
            produce(&line.kafka, &record).await;
        }
    }
    let (code, report) = verify(&line.setup, &[]).await;
    assert_eq!((code, counts(&report)), (0, [0; 5]), "{report}");
    assert_eq!(not_judged(&report, "events_compacted"), 40, "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_retention_dropped_is_not_unknown_even_behind_older_events() {
    const TEST: &str = "what_retention_dropped_is_not_unknown_even_behind_older_events";
    let Some(line) = Line::create(TEST).await else {
        return;
    };
    let pool = &line.database.pool;
    // The oldest events are in the default partition, which retention never drops.
    run(
        pool,
        "do $$ declare name text; begin
           for name in select inhrelid::regclass::text from pg_inherits
                        where inhparent = 'outbox.events'::regclass and inhrelid <> 'outbox.events_default'::regclass
           loop execute 'drop table ' || name; end loop;
         end $$;
         select outbox.emit('order', '1', 'changed', '1') from generate_series(1, 5) n;
         create table outbox.a partition of outbox.events for values from (6) to (11);
         create table outbox.b partition of outbox.events for values from (11) to (16);
         create table outbox.c partition of outbox.events for values from (16) to (10000);
         select outbox.emit('order', '1', 'changed', '1') from generate_series(1, 20) n",
    )
    .await;
    let relay = line.ready().await;
    let report = settled(&line.setup).await;
    assert_eq!(counts(&report), [0; 5], "{report}");
    relay.stop().await;
    run(pool, "drop table outbox.a; truncate only outbox.b").await;
    let (code, report) = verify(&line.setup, &[]).await;
    assert_eq!((code, counts(&report)), (0, [0; 5]), "{report}");
    let not_judged = &report["pipelines"][0]["not_judged"];
    assert_eq!(not_judged["records_beyond_the_log"], 10, "{report}");
    run(pool, "delete from outbox.events where id = 18").await;
    let (_, report) = verify(&line.setup, &[]).await;
    assert_eq!(counts(&report), [0, 0, 0, 1, 0], "{report}");
}

/// An outbox in a file, topics, and a relay's settings for them; none where Kafka is missing, which is then said.
pub(super) async fn sqlite(test: &str) -> Option<(TestFile, Kafka, Setup)> {
    let brokers = crate::fresh::needed(test, "KAFKA_BROKERS")?;
    let file = TestFile::create().await;
    let kafka = Kafka::new(brokers);
    kafka.create(&["order"]).await;
    let mut setup = Setup::new("");
    setup.kafka(&kafka);
    setup.set("SOURCE__KIND", "sqlite");
    let path = file.options.get_filename().to_str().unwrap().to_owned();
    setup.set("SOURCE__SQLITE__PATH", &path);
    Some((file, kafka, setup))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sqlite_outbox_is_audited_too() {
    const TEST: &str = "a_sqlite_outbox_is_audited_too";
    let Some((file, _, setup)) = sqlite(TEST).await else {
        return;
    };
    let mut connection = file.connect().await;
    for n in 0..30 {
        sqlx::query("insert into outbox_events (aggregate_type, aggregate_id, event_type, payload, payload_bytes) values ('order', ?, 'changed', ?, ?)")
            .bind((n % 3).to_string())
            .bind((n % 4 > 0).then(|| n.to_string()))
            .bind((n % 8 == 0).then(|| vec![0_u8, 255]))
            .execute(&mut connection)
            .await
            .unwrap();
    }
    let relay = setup.start();
    let report = settled(&setup).await;
    relay.stop().await;
    assert_eq!(counts(&report), [0; 5], "{report}");
    assert_eq!(report["pipelines"][0]["found"], 30);
    // The auditor and the table disagree in one way each.
    for (spoil, expected) in [
        (
            "update outbox_events set event_id = '0191f3a0-1111-4222-8333-444455556666' where id = 7",
            [1, 0, 0, 1, 0],
        ),
        (
            "update outbox_events set payload = '{}' where id = 3",
            [1, 0, 1, 1, 0],
        ),
        // What was deleted is not held against anybody.
        (
            "delete from outbox_events where id = 11;
             insert into outbox_events (aggregate_type, aggregate_id, event_type) values ('order', '1', 'x');
             update outbox_cursors set last_id = 31",
            [2, 0, 1, 1, 0],
        ),
    ] {
        sqlx::raw_sql(spoil).execute(&mut connection).await.unwrap();
        let (code, report) = verify(&setup, &[]).await;
        assert_eq!((code, counts(&report)), (3, expected), "{spoil}: {report}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_audit_needs_the_relays_rights_only_and_a_pooler_will_do() {
    const TEST: &str = "an_audit_needs_the_relays_rights_only_and_a_pooler_will_do";
    let Some(pooler) = crate::fresh::needed(TEST, "PGBOUNCER_URL") else {
        return;
    };
    let Some(brokers) = crate::fresh::needed(TEST, "KAFKA_BROKERS") else {
        return;
    };
    crate::fresh::database(TEST, async |database| {
        let mut writer = database.writer("writer").await;
        crate::fresh::emit(&mut writer, "1").await;
        let role = database.login("auditor", "in role outbox_relay").await;
        let (server, _) = pooler.rsplit_once('/').unwrap();
        for url in [database.url(&role), format!("{server}/{}", database.name)] {
            let mut setup = Setup::new(&url);
            setup.kafka(&Kafka::new(brokers.clone()));
            let (code, report) = verify(&setup, &["--from-id", "0"]).await;
            assert_eq!(code, 0, "{report}");
            assert_eq!(report["pipelines"][0]["waiting"], 1, "{report}");
            let note = &report["pipelines"][0]["notes"][0];
            assert_eq!(note, "there is no cursor yet: nothing counts as settled");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_audit_beside_a_busy_relay_accuses_nobody() {
    let Some((line, load)) = Line::with_load("an_audit_beside_a_busy_relay_accuses_nobody").await
    else {
        return;
    };
    let relay = line.ready().await;
    let writing = load.start(4);
    for _ in 0..8 {
        writing.commits(40).await;
        let (code, report) = verify(&line.setup, &[]).await;
        assert_eq!((code, counts(&report)), (0, [0; 5]), "{report}");
    }
    writing.stop().await;
    relay.stop().await;
}
