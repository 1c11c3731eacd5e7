//! Events that can't be published: they are set aside, or stop their pipeline, and nobody else is affected.

use sqlx::PgPool;

use super::kafka::Received;
use super::{Line, PATIENCE, eventually, number, run, settled};

const BAD: [(&str, &str, &str); 5] = [
    (
        "too large",
        "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload)
         values ('order', 'too large', 'bad', to_json(repeat('x', 1100000)))",
        "max.message.bytes",
    ),
    (
        "long",
        "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload)
         values (repeat('x', 300), 'long', 'bad', '1')",
        "topic",
    ),
    (
        "spaces",
        "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload)
         values ('with spaces', 'spaces', 'bad', '1')",
        "topic",
    ),
    (
        "headers",
        "alter table outbox.events drop constraint events_headers_can_leave;
         insert into outbox.events (aggregate_type, aggregate_id, event_type, payload, headers)
         values ('order', 'headers', 'bad', '1', '[1, 2]')",
        "headers",
    ),
    (
        "future",
        "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload, occurred_at)
         values ('order', 'future', 'bad', '1', '3000-01-01')",
        "timestamp",
    ),
];

async fn others(pool: &PgPool, from: u32) {
    run(
        pool,
        format!(
            "select outbox.emit('order', (n % 100)::text, 'good', n::text::json)
               from generate_series({from}, {from} + 4999) n"
        ),
    )
    .await;
}

fn judge(records: &[Received], total: usize) {
    let mut newest = std::collections::HashMap::new();
    let mut good = std::collections::HashSet::new();
    for record in records {
        assert_ne!(
            record.header("type"),
            Some(&b"bad"[..]),
            "{}",
            record.key_text()
        );
        assert_ne!(
            record.header("type"),
            Some(&b"later"[..]),
            "{}",
            record.key_text()
        );
        let n: u32 = record.text().parse().unwrap();
        if good.insert(n) {
            let before = newest.insert(record.key_text().to_owned(), n).unwrap_or(0);
            assert!(n > before, "{n} after {before}");
        }
    }
    assert_eq!(good.len(), total);
    eprintln!("{} duplicates", records.len() - total);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rejected_events_are_parked_and_nobody_else_waits() {
    let Some(line) = Line::create("rejected_events_are_parked_and_nobody_else_waits").await else {
        return;
    };
    line.kafka.create(&["order"]).await;
    let pool = &line.database.pool;
    let later = "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload)
                 select aggregate_type, aggregate_id, 'later', '0' from outbox.events where event_type = 'bad'";
    others(pool, 1).await;
    for (_, bad, _) in BAD {
        run(pool, bad).await;
    }
    run(pool, later).await;
    others(pool, 5001).await;
    let relay = line.ready().await;
    settled(pool).await;
    relay.ready().await;
    let parked: Vec<(String, String, Option<String>)> =
        sqlx::query_as("select aggregate_id, event_type, error from outbox.parked order by id")
            .fetch_all(pool)
            .await
            .unwrap();
    assert_eq!(parked.len(), 2 * BAD.len(), "{parked:?}");
    for ((id, kind, error), (bad, _, word)) in parked.iter().zip(BAD) {
        let error = error.as_deref().unwrap();
        assert_eq!((&id[..], &kind[..]), (bad, "bad"));
        assert!(error.to_lowercase().contains(word), "{bad}: {error}");
        eprintln!("{bad}: {error:.200}");
    }
    for (id, kind, error) in &parked[BAD.len()..] {
        assert_eq!((&kind[..], error), ("later", &None), "{id}");
    }
    judge(&line.kafka.read(&["order"]).await, 10_000);
    eventually("the waiting entities", PATIENCE, async || {
        let waiting = relay.metric("outbox_waiting_entities{pipeline=\"main\",shard=\"0\"}")?;
        (waiting > 4.5).then_some(())
    })
    .await;
    relay.stop().await;

    // A restart knows them still.
    let relay = line.ready().await;
    run(pool, later).await;
    run(pool, "select outbox.emit('order', '1', 'good', '10001')").await;
    settled(pool).await;
    assert_eq!(
        number(
            pool,
            "select count(*) from outbox.parked where error is null"
        )
        .await,
        10
    );
    judge(&line.kafka.read(&["order"]).await, 10_001);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_halted_pipeline_halts_alone() {
    let Some(mut line) = Line::create("a_halted_pipeline_halts_alone").await else {
        return;
    };
    line.kafka.create(&["order", "customer"]).await;
    line.setup.config(
        "[pipelines.strict]
         on_rejected = 'halt'
         filter.aggregate_types = ['order']
         [pipelines.other]
         filter.aggregate_types = ['customer']",
    );
    let pool = &line.database.pool;
    run(
        pool,
        "alter table outbox.events drop constraint events_headers_can_leave;
         select outbox.emit('order', '1', 'good', '1');
         insert into outbox.events (aggregate_type, aggregate_id, event_type, payload, headers)
         values ('order', '1', 'bad', '1', '[1]');
         select outbox.emit('order', '2', 'good', '2')",
    )
    .await;
    let relay = line.setup.start();
    let reason = relay.not_ready(&["halted"]).await;
    eprintln!("{reason}");
    assert!(reason.contains("headers"), "{reason}");
    run(pool, "select outbox.emit('customer', n::text, 'good', n::text::json) from generate_series(1, 500) n").await;
    eventually("the other pipeline", PATIENCE, async || {
        (line.kafka.read(&["customer"]).await.len() == 500).then_some(())
    })
    .await;
    assert_eq!(relay.pipeline("strict").unwrap()["state"], "halted");
    assert_eq!(relay.pipeline("other").unwrap()["state"], "running");
    assert_eq!(number(pool, "select count(*) from outbox.parked").await, 0);
    // Nothing behind the event, whatever its entity.
    assert!(
        line.kafka
            .read(&["order"])
            .await
            .iter()
            .all(|record| record.text() == "1")
    );
    relay.stop().await;

    // Once the event can be published the pipeline goes on where it halted.
    run(
        pool,
        "update outbox.events set headers = '{}' where event_type = 'bad'",
    )
    .await;
    let relay = line.ready().await;
    eventually("the rest", PATIENCE, async || {
        let records = line.kafka.read(&["order"]).await;
        let keys: std::collections::BTreeSet<_> = records.iter().map(Received::key_text).collect();
        (records.len() >= 3 && keys.len() == 2).then_some(())
    })
    .await;
    relay.stop().await;
}

/// The relay lets clocks differ by a day, the broker does not: it refuses the whole batch after the hand-over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_refused_batch_only_the_bad_event_is_parked() {
    let Some(line) = Line::create("of_a_refused_batch_only_the_bad_event_is_parked").await else {
        return;
    };
    line.kafka.create(&["order"]).await;
    let hour_ms = "3600000";
    line.kafka
        .alter("order", "message.timestamp.before.max.ms", hour_ms)
        .await;
    let pool = &line.database.pool;
    for from in [1, 5001] {
        others(pool, from).await;
        run(
            pool,
            format!(
                "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload, occurred_at)
                 values ('order', 'old {from}', 'bad', '1', clock_timestamp() - interval '2 hours'),
                        ('order', 'old {from}', 'later', '0', clock_timestamp())"
            ),
        )
        .await;
    }
    others(pool, 10_001).await;
    let relay = line.setup.start();
    let began = tokio::time::Instant::now();
    settled(pool).await;
    eprintln!("two bad events found in {:?}", began.elapsed());
    let parked: Vec<(String, bool)> =
        sqlx::query_as("select event_type, error is not null from outbox.parked order by id")
            .fetch_all(pool)
            .await
            .unwrap();
    let parked: Vec<(&str, bool)> = parked.iter().map(|(kind, why)| (&kind[..], *why)).collect();
    let each = [("bad", true), ("later", false)];
    let expected = [each, each].concat();
    assert_eq!(parked, expected);
    judge(&line.kafka.read(&["order"]).await, 15_000);
    relay.stop().await;
}

/// Each is one event that the log takes, and that no topic or no index entry does.
const EXTREME: [&str; 5] = [
    // 10,000 bytes that do not compress, as aggregate type and as aggregate id.
    "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload)
     select names.long, names.long, 'bad', '1'
       from (select string_agg(md5(n::text), ' ') as long from generate_series(1, 310) n) names",
    "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload, occurred_at)
     values ('order', 'infinity', 'bad', '1', 'infinity')",
    "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload, occurred_at)
     values ('order', 'last year', 'bad', '1', '294276-12-31')",
    "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload, occurred_at)
     values ('with spaces', 'first year', 'bad', '1', '-infinity')",
    "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload)
     values ('with spaces', 'deep', 'bad', (repeat('[', 6000) || repeat(']', 6000))::json)",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn extremes_that_the_log_takes_are_parked_and_it_flows_on() {
    let Some(line) = Line::create("extremes_that_the_log_takes_are_parked_and_it_flows_on").await
    else {
        return;
    };
    line.kafka.create(&["order"]).await;
    let pool = &line.database.pool;
    for extreme in EXTREME {
        run(pool, extreme).await;
    }
    others(pool, 1).await;
    let relay = line.ready().await;
    settled(pool).await;
    relay.ready().await;
    let as_written = "select count(*) from outbox.parked p join outbox.events e using (id, event_id, aggregate_type, \
                      aggregate_id, event_type, occurred_at) where p.payload = e.payload::text and p.error is not null";
    assert_eq!(
        number(pool, as_written).await,
        i64::try_from(EXTREME.len()).unwrap()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limit_that_was_raised_counts_at_the_next_redrive() {
    const ORDER: &str = "order";
    let Some(mut line) = Line::create("a_limit_that_was_raised_counts_at_the_next_redrive").await
    else {
        return;
    };
    line.kafka
        .create_with(ORDER, 1, &[("max.message.bytes", "100000")])
        .await;
    line.setup.set("SINK__KAFKA__TOPICS__CREATE", "false");
    let relay = line.ready().await;
    let pool = &line.database.pool;
    let emit = "select outbox.emit('order', '900', 'big', to_json(repeat('x', 150000)))";
    run(pool, emit).await;
    let error = eventually("the event is parked", PATIENCE, async || {
        let error: Option<String> = sqlx::query_scalar("select error from outbox.parked")
            .fetch_optional(pool)
            .await
            .unwrap();
        error
    })
    .await;
    assert!(error.starts_with("too large: "), "{error}");
    line.kafka
        .alter(ORDER, "max.message.bytes", "3000000")
        .await;
    let redriven = line
        .setup
        .command("parked")
        .args(["redrive", "--all"])
        .output()
        .unwrap();
    assert!(redriven.status.success(), "{redriven:?}");
    let mut reader = line.kafka.reader(&[line.kafka.topic(ORDER)]);
    assert_eq!(reader.read_on(1).await[0].key_text(), "900");
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_that_a_topic_does_not_keep_are_told_with_their_number() {
    let Some(line) =
        Line::create("events_that_a_topic_does_not_keep_are_told_with_their_number").await
    else {
        return;
    };
    for (name, policy) in [("order", "delete"), ("cart", "compact")] {
        let settings = [("retention.ms", "3600000"), ("cleanup.policy", policy)];
        line.kafka.create_with(name, 1, &settings).await;
    }
    let relay = line.ready().await;
    run(
        &line.database.pool,
        "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload, occurred_at)
         select kind, n::text, 'placed', '{}', clock_timestamp() - interval '1 hour' * (n - 1)
           from unnest(array['order', 'cart']) kind, generate_series(1, 8) n",
    )
    .await;
    let topic = line.kafka.topic("order");
    let told = format!("events for topic {topic} are older than it keeps records");
    // The second is as old as that to the second, and becomes so before it is published.
    relay.says(&told).await;
    let log = relay.log();
    let count = log.lines().find(|line| line.contains(&told)).unwrap();
    assert!(
        count.contains("6 events") || count.contains("7 events"),
        "{count}"
    );
    assert!(!log.contains(&line.kafka.topic("cart")), "{log}");
    relay.stop().await;
}
