//! What becomes of events that were set aside: published after all, in order, or given up; and the limits of it.

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::Value;
use sqlx::PgPool;

use super::kafka::Received;
use super::{Line, PATIENCE, eventually, number, run, settled};

const PARKED: &str = "select count(*) from outbox.parked";

/// One event with headers that can't be read.
async fn emit_bad(pool: &PgPool, entity: &str, payload: &str) {
    run(
        pool,
        format!(
            "alter table outbox.events drop constraint if exists events_headers_can_leave;
             insert into outbox.events (aggregate_type, aggregate_id, event_type, payload, headers)
             values ('order', '{entity}', 'bad', '{payload}', '[1]')"
        ),
    )
    .await;
}

async fn emit(pool: &PgPool, entity: &str, from: u32, to: u32) {
    run(
        pool,
        format!("select outbox.emit('order', '{entity}', 'good', n::text::json) from generate_series({from}, {to}) n"),
    )
    .await;
}

/// Somebody corrects the events where they are set aside.
async fn mend(pool: &PgPool) {
    run(
        pool,
        "update outbox.parked set headers = '{}' where headers::text = '[1]'",
    )
    .await;
}

/// Runs a command to its end, against the database and without a daemon.
fn command(line: &Line, args: &[&str], code: i32) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_outbox-relay"))
        .args(args)
        .env_clear()
        .env("RELAY_SOURCE__POSTGRES__URL", &line.database.url)
        .env("RELAY_ADMIN__ENABLED", "false")
        .output()
        .unwrap();
    let [out, err] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    assert_eq!(output.status.code(), Some(code), "{args:?}: {out}{err}");
    out + &err
}

pub(super) async fn parked_are(pool: &PgPool, count: i64) {
    eventually(&format!("{count} parked events"), PATIENCE, async || {
        (number(pool, PARKED).await == count).then_some(())
    })
    .await;
}

/// First deliveries of each entity, in their order; all of them ascend.
fn first_deliveries(records: &[Received]) -> BTreeMap<String, Vec<i64>> {
    let mut seen: BTreeMap<String, Vec<i64>> = BTreeMap::new();
    for record in records {
        let sequence = str::from_utf8(record.header("sequence").unwrap()).unwrap();
        let sequence: i64 = sequence.parse().unwrap();
        let of_entity = seen.entry(record.key_text().to_owned()).or_default();
        if !of_entity.contains(&sequence) {
            assert!(
                of_entity.last().is_none_or(|last| *last < sequence),
                "{}",
                record.key_text()
            );
            of_entity.push(sequence);
        }
    }
    seen
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redriven_entity_arrives_complete_and_in_order_across_a_kill() {
    let test = "a_redriven_entity_arrives_complete_and_in_order_across_a_kill";
    let Some(mut line) = Line::create(test).await else {
        return;
    };
    line.kafka.create(&["order"]).await;
    line.setup.set("RELAY__LEASE_TTL", "2s");
    line.setup.set("RELAY__REDRIVE_RATE", "40");
    let pool = &line.database.pool;
    emit(pool, "1", 1, 5).await;
    emit_bad(pool, "1", "6").await;
    emit(pool, "1", 7, 120).await;
    emit(pool, "2", 1, 5).await;
    let relay = line.ready().await;
    parked_are(pool, 115).await;
    settled(pool).await;

    // Neither the cause is mended nor the order kept by asking for the wrong one.
    let bad = number(pool, "select id from outbox.parked where error is not null").await;
    let refused = command(&line, &["parked", "redrive", &(bad + 1).to_string()], 1);
    assert!(refused.contains(&format!("redrive {bad} and")), "{refused}");
    let would = command(&line, &["parked", "redrive", "--all", "--dry-run"], 0);
    assert!(would.contains("1 event would be redriven"), "{would}");
    let asked = command(&line, &["parked", "redrive", &bad.to_string()], 0);
    assert!(asked.contains("its owner"), "{asked}");
    eventually("a second attempt", PATIENCE, async || {
        let attempts = number(pool, "select max(attempts)::bigint from outbox.parked").await;
        (attempts == 2).then_some(())
    })
    .await;
    assert_eq!(number(pool, PARKED).await, 115);

    mend(pool).await;
    command(
        &line,
        &[
            "parked", "redrive", "--entity", "order/1", "--reason", "mended",
        ],
        0,
    );
    // New events come all the time, and the relay dies in the middle.
    emit(pool, "1", 121, 140).await;
    eventually("the first are through", PATIENCE, async || {
        (number(pool, PARKED).await < 110).then_some(())
    })
    .await;
    relay.kill().await;
    let left = number(pool, PARKED).await;
    assert!(left > 0, "it was too fast to be killed in the middle");
    emit(pool, "1", 141, 160).await;
    let relay = line.ready().await;
    emit(pool, "1", 161, 180).await;
    parked_are(pool, 0).await;
    eventually("nobody waits", PATIENCE, async || {
        (relay.metric("outbox_waiting_entities{pipeline=\"main\",shard=\"0\"}")? < 0.5)
            .then_some(())
    })
    .await;
    // The entity is free: nothing is parked any more on its way.
    let before = relay.metric("outbox_parked_events_total{pipeline=\"main\",shard=\"0\"}");
    emit(pool, "1", 181, 200).await;
    settled(pool).await;
    assert_eq!(
        relay.metric("outbox_parked_events_total{pipeline=\"main\",shard=\"0\"}"),
        before
    );
    relay.stop().await;
    let seen = first_deliveries(&line.kafka.read(&["order"]).await);
    assert_eq!((seen["1"].len(), seen["2"].len()), (200, 5));
    let acts: Value = serde_json::from_str(&command(&line, &["acts", "--json"], 0)).unwrap();
    assert_eq!(
        (acts[0]["reason"].as_str(), acts[0]["events"].as_i64()),
        (Some("mended"), Some(1))
    );
    assert!(acts[0]["database_user"].is_string(), "{acts}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_event_lets_the_others_go() {
    let Some(line) = Line::create("a_dropped_event_lets_the_others_go").await else {
        return;
    };
    line.kafka.create(&["order"]).await;
    let pool = &line.database.pool;
    emit_bad(pool, "1", "1").await;
    emit(pool, "1", 2, 10).await;
    let relay = line.ready().await;
    parked_are(pool, 10).await;
    settled(pool).await;
    let nothing = command(
        &line,
        &[
            "parked",
            "drop",
            "--error",
            "no such error",
            "--reason",
            "x",
        ],
        0,
    );
    assert!(
        nothing.contains("nothing that is parked matches"),
        "{nothing}"
    );
    command(
        &line,
        &[
            "parked",
            "drop",
            "--entity",
            "order/1",
            "--reason",
            "never mind",
        ],
        0,
    );
    parked_are(pool, 0).await;
    let records = line.kafka.read(&["order"]).await;
    let texts: Vec<&str> = records.iter().map(Received::text).collect();
    assert_eq!(texts, ["2", "3", "4", "5", "6", "7", "8", "9", "10"]);
    relay.stop().await;
}

/// A hundred are refused with the bad one and stay parked behind it. Were they suspected for ever, little would be in flight
/// from then on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_was_refused_with_a_redriven_event_is_not_suspected_any_more() {
    let test = "who_was_refused_with_a_redriven_event_is_not_suspected_any_more";
    let Some(mut line) = Line::create(test).await else {
        return;
    };
    line.kafka.create(&["order"]).await;
    // The relay lets clocks differ by a day, the broker does not.
    line.kafka
        .alter("order", "message.timestamp.before.max.ms", "3600000")
        .await;
    // All of a batch leave together.
    line.setup.set("SINK__KAFKA__LINGER", "100ms");
    let pool = &line.database.pool;
    let old = async |entity: &str| {
        let old = format!(
            "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload, occurred_at)
             values ('order', '{entity}', 'bad', '1', clock_timestamp() - interval '2 hours')"
        );
        run(pool, old).await;
    };
    old("1").await;
    emit(pool, "1", 1, 100).await;
    let relay = line.ready().await;
    parked_are(pool, 101).await;
    let refused = || {
        let log = relay.log();
        let lines = log
            .lines()
            .filter(|line| line.contains("the broker refused a batch"));
        let suspected = |line: &str| {
            let (_, after) = line.split_once(" events=")?;
            let (events, _) = after.split_once(' ')?;
            events.parse::<u32>().ok()
        };
        lines
            .map(|line| suspected(line).unwrap())
            .collect::<Vec<_>>()
    };
    // Behind the first delivery of each partition many may be under way.
    let others =
        "select outbox.emit('order', 'other ' || n, 'good', '1') from generate_series(1, 30) n";
    run(pool, others).await;
    settled(pool).await;
    let before = refused().len();
    command(&line, &["parked", "redrive", "--all"], 0);
    relay
        .says("parked events were rejected again and stay parked")
        .await;
    let redriven = refused().split_off(before);
    assert_eq!(redriven.first(), Some(&101), "{redriven:?}");
    old("2").await;
    parked_are(pool, 102).await;
    assert_eq!(refused().last(), Some(&1), "{}", relay.log());
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_letter_is_stored_and_copied_and_its_entity_goes_on() {
    let test = "a_dead_letter_is_stored_and_copied_and_its_entity_goes_on";
    let Some(mut line) = Line::create(test).await else {
        return;
    };
    line.kafka.create(&["order", "dead"]).await;
    let (order, dead) = (line.kafka.topic("order"), line.kafka.topic("dead"));
    line.setup.set("PIPELINE__ON_REJECTED", "dead_letter");
    line.setup.set("PIPELINE__DEAD_LETTER_TOPIC", &dead);
    let pool = &line.database.pool;
    emit_bad(pool, "1", "1").await;
    // Too large for either topic.
    run(
        pool,
        "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload)
         values ('order', '1', 'large', to_json(repeat('x', 1100000)))",
    )
    .await;
    emit(pool, "1", 3, 10).await;
    let relay = line.ready().await;
    settled(pool).await;
    assert_eq!(line.kafka.read(&["order"]).await.len(), 8);
    parked_are(pool, 2).await;
    let copies = line.kafka.read(&["dead"]).await;
    let [copy] = &copies[..] else {
        panic!("one copy: {copies:?}")
    };
    let header = |name: &str| {
        copy.header(name)
            .map(|value| str::from_utf8(value).unwrap())
    };
    assert!(
        header("dead-letter-error").unwrap().contains("headers"),
        "{copy:?}"
    );
    assert_eq!(header("dead-letter-topic"), Some(&order[..]));
    assert_eq!(header("dead-letter-aggregate-type"), Some("order"));
    assert_eq!(header("dead-letter-aggregate-id"), Some("1"));
    assert_eq!(header("dead-letter-attempts"), Some("1"));
    assert_eq!(
        (header("type"), header("dead-letter-headers")),
        (Some("bad"), Some("[1]"))
    );
    assert_eq!((copy.key_text(), copy.text()), ("1", "1"));
    let refused = relay.metric("outbox_dead_letters_refused_total{pipeline=\"main\",shard=\"0\"}");
    assert_eq!(refused, Some(1.0));
    relay.says("refused by its topic too").await;

    mend(pool).await;
    command(&line, &["parked", "redrive", "--all"], 0);
    parked_are(pool, 1).await;
    eventually("the dead letter after all", PATIENCE, async || {
        (line.kafka.read(&["order"]).await.len() == 9).then_some(())
    })
    .await;
    assert_eq!(
        line.kafka.read(&["dead"]).await.len(),
        1,
        "it is not copied again"
    );
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_dropped_by_policy_is_counted_and_logged() {
    let Some(mut line) = Line::create("what_is_dropped_by_policy_is_counted_and_logged").await
    else {
        return;
    };
    line.kafka.create(&["order"]).await;
    line.setup.set("PIPELINE__ON_REJECTED", "drop");
    let pool = &line.database.pool;
    emit_bad(pool, "entity-1", "1").await;
    emit(pool, "entity-1", 2, 10).await;
    let relay = line.ready().await;
    settled(pool).await;
    assert_eq!(line.kafka.read(&["order"]).await.len(), 9);
    assert_eq!(number(pool, PARKED).await, 0);
    let dropped = relay.metric("outbox_dropped_events_total{pipeline=\"main\",shard=\"0\"}");
    assert_eq!(dropped, Some(1.0));
    let log = relay.log();
    let told = log
        .lines()
        .find(|line| line.contains("dropped an event"))
        .unwrap();
    for part in ["event=1", "entity-1", "order", "headers are not"] {
        assert!(told.contains(part), "{told}");
    }
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pipeline_halts_at_its_limits_and_goes_on_when_there_is_room() {
    let test = "a_pipeline_halts_at_its_limits_and_goes_on_when_there_is_room";
    let Some(mut line) = Line::create(test).await else {
        return;
    };
    line.kafka.create(&["order"]).await;
    line.setup.set("PIPELINE__PARKED_MAX", "10");
    line.setup.set("PIPELINE__PARKED_MAX_PER_ENTITY", "5");
    line.setup.set("RELAY__LEASE_TTL", "2s");
    let pool = &line.database.pool;
    emit_bad(pool, "1", "1").await;
    emit(pool, "1", 2, 8).await;
    emit(pool, "2", 1, 5).await;
    let relay = line.setup.start();
    let reason = relay.not_ready(&["parked_max_per_entity is 5"]).await;
    assert!(reason.contains("5 events of its entity are"), "{reason}");
    assert!(
        reason.contains("--entity \\\\\\\"order/1\\\\\\\"") || reason.contains("order/1"),
        "{reason}"
    );
    assert_eq!(number(pool, PARKED).await, 5);
    assert_eq!(relay.pipeline("main").unwrap()["state"], "halted");
    // Also a relay that is started in this state makes room when somebody asks.
    relay.stop().await;
    let relay = line.setup.start();
    relay.not_ready(&["parked_max_per_entity is 5"]).await;
    command(
        &line,
        &["parked", "drop", "--all", "--reason", "make room"],
        0,
    );
    settled(pool).await;
    relay.ready().await;
    parked_are(pool, 0).await;

    for entity in 10..25 {
        emit_bad(pool, &entity.to_string(), "1").await;
    }
    let reason = relay.not_ready(&["parked_max is 10"]).await;
    assert!(
        reason.contains("outbox-relay parked list --pipeline main"),
        "{reason}"
    );
    assert_eq!(number(pool, PARKED).await, 10);
    mend(pool).await;
    command(&line, &["parked", "redrive", "--all"], 0);
    eventually("everybody is read", PATIENCE, async || {
        (number(
            pool,
            "select count(*) from outbox.parked where error is not null",
        )
        .await
            == 5)
            .then_some(())
    })
    .await;
    settled(pool).await;
    relay.stop().await;
    let seen = first_deliveries(&line.kafka.read(&["order"]).await);
    assert_eq!(seen.values().map(Vec::len).sum::<usize>(), 7 + 5 + 10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_bad_event_among_100_000_delays_nobody() {
    let Some(line) = Line::create("one_bad_event_among_100_000_delays_nobody").await else {
        return;
    };
    line.kafka.create(&["order"]).await;
    let pool = &line.database.pool;
    let many = "select outbox.emit('order', (n % 1000)::text, 'good', n::text::json) from generate_series(1, 50000) n";
    run(pool, many).await;
    emit_bad(pool, "bad", "1").await;
    run(pool, many).await;
    emit(pool, "bad", 1, 3).await;
    let relay = line.ready().await;
    settled(pool).await;
    // Nothing was read twice and nothing began again: whoever came after it did not wait for it.
    assert_eq!(
        relay.metric("outbox_captured_events_total{pipeline=\"main\",shard=\"0\"}"),
        Some(100_004.0)
    );
    assert_eq!(
        relay.metric("outbox_restarts_total{pipeline=\"main\",shard=\"0\"}"),
        Some(0.0)
    );
    assert_eq!(number(pool, PARKED).await, 4);
    let records = line.kafka.read(&["order"]).await;
    assert_eq!(records.len(), 100_000);
    let mut newest: BTreeMap<&str, i64> = BTreeMap::new();
    for record in &records {
        let sequence = str::from_utf8(record.header("sequence").unwrap())
            .unwrap()
            .parse()
            .unwrap();
        let before = newest.insert(record.key_text(), sequence);
        assert!(
            before.is_none_or(|before| before < sequence),
            "{}",
            record.key_text()
        );
    }
    relay.stop().await;
}
