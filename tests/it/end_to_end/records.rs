//! What a record looks like, byte for byte.

use std::collections::HashMap;

use super::process::Setup;
use super::{Line, PATIENCE, complete, eventually, run};
use crate::harness::postgres::TestDatabase;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_committed_arrives_in_order_and_nothing_else() {
    let Some((line, load)) =
        Line::with_load("what_is_committed_arrives_in_order_and_nothing_else").await
    else {
        return;
    };
    // Half of it is there before the relay, half comes while it runs.
    load.write(150).await;
    let relay = line.ready().await;
    load.write(150).await;
    let seen = complete(&load, &line.kafka).await;
    assert_eq!(seen.duplicates, 0);
    relay.stop().await;
}

/// Writers may say any time, and their clocks may be ahead.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_of_any_time_are_published_and_counted() {
    let Some(line) = Line::create("events_of_any_time_are_published_and_counted").await else {
        return;
    };
    line.kafka.create(&["order"]).await;
    let emit = "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload, occurred_at)
                select 'order', '1', 'any', '1', t::timestamptz
                  from unnest(array['-infinity', '4713-01-01 BC', '1970-01-01', (now() + '1 s')::text]) t";
    run(&line.database.pool, emit).await;
    let relay = line.ready().await;
    let labels = "{pipeline=\"main\",shard=\"0\"";
    let latency = |figure: &str| relay.metric(&format!("outbox_publish_latency_seconds_{figure}"));
    eventually("four events counted", PATIENCE, async || {
        (latency(&format!("count{labels}}}"))? == 4.0).then_some(())
    })
    .await;
    assert_eq!(latency(&format!("bucket{labels},le=\"3600\"}}")), Some(1.0));
    assert_eq!(latency(&format!("bucket{labels},le=\"+Inf\"}}")), Some(4.0));
    // More than the 6,700 years of the second one.
    let sum = latency(&format!("sum{labels}}}")).unwrap();
    assert!(sum > 6_700.0 * 365.0 * 86_400.0, "{sum}");
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_are_exact() {
    let Some(line) = Line::create("records_are_exact").await else {
        return;
    };
    line.kafka.create(&["odd", "blob"]).await;
    let large = format!("{{\"text\": \"{}\"}}", "x".repeat(900 * 1024));
    let texts = [
        // No parser in between: beyond 2^53, a key twice, white space, text that no database text can hold.
        r#"{"n": 12345678901234567890123, "m": 1.0000000000000000001}"#.to_owned(),
        r#"{"a": 1,   "a": 2 , "b":{}}"#.to_owned(),
        r#"{"zero": "\u0000", "lone": "\ud800", "pair": "\ud83d\ude00", "slash": "\/"}"#.to_owned(),
        "  \"só\\n\"  ".to_owned(),
        "null".to_owned(),
        large,
    ];
    let mut blobs = vec![Vec::new(), vec![0xff, 0xfe, 0, 0x80, b'\n'], vec![0]];
    blobs.push((0..900 * 1024).map(|n: u32| n.to_le_bytes()[0]).collect());
    let pool = &line.database.pool;
    for (n, text) in texts.iter().enumerate() {
        sqlx::query(
            "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload, headers, occurred_at)
             values ('odd', 'entity é', $1, $2::json, $3::json, '2024-02-29 12:34:56.789123+00')",
        )
        .bind(format!("type {n}"))
        .bind(text)
        .bind(r#"{"tenant": "acme", "empty": "", "umlaut": "ä\u0000", "none": null}"#)
        .execute(pool)
        .await
        .unwrap();
    }
    run(pool, "select outbox.emit('odd', 'entity é', 'deleted')").await;
    run(pool, "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload) values ('odd', '', '', '1')").await;
    for blob in &blobs {
        sqlx::query("select outbox.emit_bytes('blob', '1', 'encoded', $1, 'application/avro')")
            .bind(blob)
            .execute(pool)
            .await
            .unwrap();
    }
    let relay = line.ready().await;
    let total = texts.len() + blobs.len() + 2;
    let records = eventually("all records", PATIENCE, async || {
        let records = line.kafka.read(&["odd", "blob"]).await;
        (records.len() >= total).then_some(records)
    })
    .await;
    assert_eq!(records.len(), total);
    let rows: Vec<(i64, String, String)> =
        sqlx::query_as("select id, event_id::text, event_type from outbox.events")
            .fetch_all(pool)
            .await
            .unwrap();
    let rows: HashMap<String, (i64, String)> = rows
        .into_iter()
        .map(|(id, event_id, kind)| (event_id, (id, kind)))
        .collect();
    for record in &records {
        let event_id = str::from_utf8(record.header("id").unwrap()).unwrap();
        let (id, event_type) = &rows[event_id];
        assert_eq!(record.header("type"), Some(event_type.as_bytes()));
        assert_eq!(record.header("sequence"), Some(id.to_string().as_bytes()));
    }
    let odd: Vec<_> = records
        .iter()
        .filter(|record| record.key_text() == "entity é")
        .collect();
    for (record, text) in odd.iter().zip(&texts) {
        assert!(
            record.value.as_deref() == Some(text.as_bytes()),
            "{text:.80}"
        );
        assert_eq!(record.header("tenant"), Some(&b"acme"[..]));
        assert_eq!(record.header("empty"), Some(&b""[..]));
        assert_eq!(record.header("umlaut"), Some("ä\0".as_bytes()));
        // A null header is not an empty one, and the relay's own names can't be taken.
        assert_eq!(
            record
                .headers
                .iter()
                .filter(|(name, _)| name == "id")
                .count(),
            1
        );
        assert!(
            record
                .headers
                .iter()
                .any(|(name, value)| name == "none" && value.is_none())
        );
        assert_eq!(record.timestamp_ms, Some(1_709_210_096_789));
    }
    let tombstone = odd.last().unwrap();
    assert_eq!((odd.len(), &tombstone.value), (texts.len() + 1, &None));
    let unnamed: Vec<_> = records
        .iter()
        .filter(|record| record.key_text().is_empty())
        .collect();
    assert_eq!(unnamed.len(), 1);
    let bytes: Vec<_> = records
        .iter()
        .filter(|record| record.topic == line.kafka.topic("blob"))
        .collect();
    for (record, blob) in bytes.iter().zip(&blobs) {
        assert!(record.value.as_ref() == Some(blob), "{} bytes", blob.len());
        assert_eq!(
            record.header("content-type"),
            Some(&b"application/avro"[..])
        );
    }
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stdout_takes_one_line_of_json_each() {
    let Some(database) = TestDatabase::create().await else {
        return;
    };
    let mut setup = Setup::new(&database.url);
    setup.set("SINK__KIND", "stdout");
    run(
        &database.pool,
        "select outbox.emit('order', n::text, 'placed', json_build_object('n', n), '{\"a\": \"b\"}')
           from generate_series(1, 1000) n;
         select outbox.emit('order', '1', 'deleted')",
    )
    .await;
    let relay = setup.start();
    let lines = eventually("1001 lines", PATIENCE, async || {
        let out = relay.out();
        let lines: Vec<String> = out.split_inclusive('\n').map(str::to_owned).collect();
        (lines.len() >= 1001 && out.ends_with('\n')).then_some(lines)
    })
    .await;
    assert_eq!(lines.len(), 1001);
    for (n, line) in (1..).zip(&lines[..1000]) {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["topic"], "order");
        assert_eq!(line["key"], n.to_string());
        assert_eq!(line["headers"]["a"], "b");
        let value: serde_json::Value =
            serde_json::from_str(line["value"].as_str().unwrap()).unwrap();
        assert_eq!(value["n"], n);
    }
    let tombstone: serde_json::Value = serde_json::from_str(&lines[1000]).unwrap();
    assert!(tombstone["value"].is_null());
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pipe_that_nobody_reads_keeps_nothing_else_waiting() {
    let Some(database) = TestDatabase::create().await else {
        return;
    };
    let mut setup = Setup::new(&database.url);
    setup.set("SINK__KIND", "stdout");
    setup.set("RELAY__LEASE_TTL", "4s");
    setup.set("RELAY__DRAIN_TIMEOUT", "1s");
    // More than a pipe holds.
    run(
        &database.pool,
        "select outbox.emit('order', n::text, 'placed', json_build_object('n', repeat('x', 1000)))
           from generate_series(1, 1000) n",
    )
    .await;
    let mut relay = setup.start_unread();
    relay
        .not_ready(&["has confirmed nothing for 6 s and more"])
        .await;
    assert!(relay.owns(), "the lease is kept");
    relay.signal("TERM");
    relay.exit().await;
}
