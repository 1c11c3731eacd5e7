//! One suite for everything that publishes: the contract of [`Sink`], held by each of them.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use outbox_relay::event::{Record, Seq};
use outbox_relay::sink::kafka::{Delivery, KafkaSink, Settings};
use outbox_relay::sink::stdout::StdoutSink;
use outbox_relay::sink::{Receipt, Refused, Sink};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::DefaultProducerContext;
use serde_json::Value;
use tokio::time::timeout;

use crate::kafka::cluster::{
    Arrived, assert_complete_and_in_order, brokers, consume, delivered, delivered_seq, hand_over,
    now_ms, open, publish, record, settings, topic,
};

/// A kind of sink, and a way to see what it published.
trait Bench {
    type Sink: Sink;

    /// A sink whose queue is full after some hundred records.
    fn sink(&self) -> Self::Sink;

    /// A sink whose other end does not answer, where there is such a thing.
    fn unreachable(&self) -> Option<Self::Sink>;

    /// A new topic, to be prepared.
    fn topic(&self, what: &str) -> String {
        topic(what)
    }

    /// What is in a topic.
    async fn arrived(&self, topic: &str) -> Vec<Arrived>;
}

#[tokio::test]
async fn kafka_on_a_real_broker() {
    if let Some(brokers) = brokers("contract::sink::kafka_on_a_real_broker") {
        let cluster = None;
        hold(&Kafka { brokers, cluster }).await;
    }
}

#[tokio::test]
async fn kafka_exactly_once() {
    if let Some(brokers) = brokers("contract::sink::kafka_exactly_once") {
        hold(&ExactlyOnce(Kafka {
            brokers,
            cluster: None,
        }))
        .await;
    }
}

#[tokio::test]
async fn kafka_on_a_mock_cluster() {
    let cluster = MockCluster::new(1).expect("a cluster");
    let bench = Kafka {
        brokers: cluster.bootstrap_servers(),
        cluster: Some(cluster),
    };
    hold(&bench).await;
}

#[tokio::test]
async fn stdout() {
    hold(&Stdout(Shared::default())).await;
}

async fn hold(bench: &impl Bench) {
    every_record_is_delivered_once_and_in_order(bench).await;
    a_full_queue_pauses_and_reorders_nothing(bench).await;
    a_topic_that_is_not_prepared_is_refused(bench).await;
    what_is_absent_is_not_what_is_empty(bench).await;
    keys_and_times_are_kept(bench).await;
    a_new_life_forgets_the_old_one(bench).await;
    receipts_survive_cancellation(bench).await;
    check_tells_when_nobody_answers(bench).await;
}

async fn every_record_is_delivered_once_and_in_order(bench: &impl Bench) {
    let topic = bench.topic("order");
    let mut sink = bench.sink();
    open(&mut sink, &[&topic]).await;
    sink.check().await.expect("somebody answers");
    publish(&mut sink, &numbered(&topic, 5_000)).await;
    let nothing_more = timeout(Duration::from_millis(200), sink.receipts(&mut Vec::new())).await;
    assert!(nothing_more.is_err(), "{nothing_more:?}");
    let arrived = bench.arrived(&topic).await;
    assert_eq!(arrived.len(), 5_000);
    assert_complete_and_in_order(&arrived, 5_000);
}

async fn a_full_queue_pauses_and_reorders_nothing(bench: &impl Bench) {
    let topic = bench.topic("full");
    let mut sink = bench.sink();
    open(&mut sink, &[&topic]).await;
    let mut receipts = Vec::new();
    let mut pauses = 0;
    for (seq, record) in (0..).zip(&numbered(&topic, 5_000)) {
        match sink.hand_over(Seq(seq), record) {
            Ok(()) => {}
            Err(Refused::Full) => {
                pauses += 1;
                receipts.append(&mut hand_over(&mut sink, seq, record).await);
            }
            Err(refused) => panic!("{refused:?}"),
        }
    }
    assert!(pauses > 0, "the queue was never full");
    delivered(&mut sink, &mut receipts, 5_000).await;
    let arrived = bench.arrived(&topic).await;
    assert_eq!(arrived.len(), 5_000);
    assert_complete_and_in_order(&arrived, 5_000);
}

async fn a_topic_that_is_not_prepared_is_refused(bench: &impl Bench) {
    let (prepared, other) = (bench.topic("prepared"), bench.topic("other"));
    let mut sink = bench.sink();
    open(&mut sink, &[&prepared]).await;
    let refused = sink.hand_over(Seq(0), &record(&other, b"a", b"1"));
    assert_eq!(refused, Err(Refused::Unprepared));
    publish(&mut sink, &[record(&prepared, b"a", b"1")]).await;
    open(&mut sink, &[]).await;
    let refused = sink.hand_over(Seq(0), &record(&other, b"a", b"2"));
    assert_eq!(refused, Err(Refused::Unprepared), "in a new life");
}

async fn what_is_absent_is_not_what_is_empty(bench: &impl Bench) {
    let topic = bench.topic("absent");
    let mut sink = bench.sink();
    open(&mut sink, &[&topic]).await;
    let mut tombstone = record(&topic, b"a", b"");
    tombstone.value = None;
    let mut empty = record(&topic, b"a", b"");
    empty.headers = vec![
        ("absent".into(), None),
        ("binary".into(), Some(b"\0\xff".as_slice().into())),
        ("empty".into(), Some(b"".as_slice().into())),
        ("text".into(), Some(b"caf\xc3\xa9".as_slice().into())),
    ];
    publish(&mut sink, &[tombstone, empty]).await;
    let arrived = bench.arrived(&topic).await;
    assert_eq!(arrived.len(), 2);
    assert_eq!(arrived[0].value, None, "a tombstone");
    assert_eq!(arrived[0].headers, vec![]);
    assert_eq!(arrived[1].value, Some(vec![]));
    let headers = [
        ("absent", None),
        ("binary", Some(b"\0\xff".to_vec())),
        ("empty", Some(vec![])),
        ("text", Some("café".into())),
    ];
    let headers = headers.map(|(name, value)| (name.to_owned(), value));
    assert_eq!(arrived[1].headers, headers);
}

async fn keys_and_times_are_kept(bench: &impl Bench) {
    let topic = bench.topic("keys");
    let mut sink = bench.sink();
    open(&mut sink, &[&topic]).await;
    let now = now_ms();
    let sent: BTreeSet<(Option<Vec<u8>>, i64)> = [
        (None, now),
        (Some(b"".to_vec()), now - 1),
        (Some(b"order-1".to_vec()), 1),
        (Some("größe".into()), 1_000_000_000_000),
        (Some(b"\0\xfe\xff".to_vec()), now - 2),
        (Some(vec![b'x'; 10_000]), now - 3),
    ]
    .into();
    let records: Vec<Record<'_>> = sent
        .iter()
        .map(|(key, timestamp_ms)| Record {
            key: key.as_deref().map(Into::into),
            timestamp_ms: *timestamp_ms,
            ..record(&topic, b"", b"1")
        })
        .collect();
    publish(&mut sink, &records).await;
    let arrived = bench.arrived(&topic).await;
    let arrived: BTreeSet<_> = arrived
        .into_iter()
        .map(|record| (record.key, record.timestamp_ms.expect("a time")))
        .collect();
    assert_eq!(arrived, sent);
}

async fn a_new_life_forgets_the_old_one(bench: &impl Bench) {
    let topic = bench.topic("life");
    let mut sink = bench.sink();
    for _ in 0..3 {
        open(&mut sink, &[&topic]).await;
        for seq in 1_000.. {
            match sink.hand_over(Seq(seq), &record(&topic, b"a", b"old")) {
                Ok(()) => {}
                Err(Refused::Full) => break,
                Err(refused) => panic!("{refused:?}"),
            }
        }
    }
    sink.close().await;
    // Also where there is no life to end.
    sink.close().await;
    assert_eq!(sink.trouble(), None);
    open(&mut sink, &[&topic]).await;
    let mut receipts = Vec::new();
    for seq in 0..10 {
        receipts.append(&mut hand_over(&mut sink, seq, &record(&topic, b"a", b"new")).await);
    }
    delivered(&mut sink, &mut receipts, 10).await;
    let seqs: BTreeSet<u64> = receipts.iter().map(delivered_seq).collect();
    assert_eq!(seqs, (0..10).collect());
    let late = timeout(Duration::from_millis(300), sink.receipts(&mut receipts)).await;
    assert!(late.is_err(), "of the old life: {receipts:?}");
    let arrived = bench.arrived(&topic).await;
    let new = arrived.iter().filter(|record| record.text() == "new");
    assert_eq!(new.count(), 10);
}

async fn receipts_survive_cancellation(bench: &impl Bench) {
    let topic = bench.topic("cancel");
    let mut sink = bench.sink();
    open(&mut sink, &[&topic]).await;
    let mut receipts: Vec<Receipt> = Vec::new();
    for seq in 0..300 {
        receipts.append(&mut hand_over(&mut sink, seq, &record(&topic, b"a", b"1")).await);
        drop(timeout(Duration::ZERO, sink.receipts(&mut receipts)).await);
    }
    delivered(&mut sink, &mut receipts, 300).await;
}

async fn check_tells_when_nobody_answers(bench: &impl Bench) {
    let Some(mut sink) = bench.unreachable() else {
        return;
    };
    sink.open().await.expect("opening needs nobody");
    let checked = timeout(Duration::from_secs(30), sink.check()).await;
    let error = checked.expect("in time").expect_err("nobody answers");
    assert!(error.to_string().contains("answer"), "{error}");
}

fn numbered(topic: &str, count: usize) -> Vec<Record<'_>> {
    (0..count)
        .map(|number| Record {
            key: Some(format!("key-{}", number % 37).into_bytes().into()),
            value: Some(number.to_string().into_bytes().into()),
            ..record(topic, b"", b"")
        })
        .collect()
}

/// Kafka at these brokers, or librdkafka's imitation, which can't create topics on request.
struct Kafka {
    brokers: String,
    cluster: Option<MockCluster<'static, DefaultProducerContext>>,
}

impl Bench for Kafka {
    type Sink = KafkaSink;

    fn sink(&self) -> KafkaSink {
        KafkaSink::new(Settings {
            queue_records: 500,
            ..settings(&self.brokers)
        })
    }

    fn unreachable(&self) -> Option<KafkaSink> {
        // Refuses connections: bound once, and closed again.
        let free = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
        let address = free.expect("a free port").to_string();
        Some(KafkaSink::new(settings(&address)))
    }

    fn topic(&self, what: &str) -> String {
        let topic = topic(what);
        if let Some(cluster) = &self.cluster {
            cluster.create_topic(&topic, 4, 1).expect("a topic");
        }
        topic
    }

    async fn arrived(&self, topic: &str) -> Vec<Arrived> {
        consume(&self.brokers, topic).await
    }
}

/// Kafka with transactions.
struct ExactlyOnce(Kafka);

impl Bench for ExactlyOnce {
    type Sink = KafkaSink;

    fn sink(&self) -> KafkaSink {
        KafkaSink::new(Settings {
            queue_records: 500,
            delivery: Delivery::ExactlyOnce,
            transactional_id: Some(topic("transactions")),
            ..settings(&self.0.brokers)
        })
    }

    fn unreachable(&self) -> Option<KafkaSink> {
        self.0.unreachable()
    }

    async fn arrived(&self, topic: &str) -> Vec<Arrived> {
        self.0.arrived(topic).await
    }
}

/// A writer that a test can look into.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("not poisoned").write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

struct Stdout(Shared);

impl Bench for Stdout {
    type Sink = StdoutSink;

    fn sink(&self) -> StdoutSink {
        StdoutSink::to(self.0.clone())
    }

    fn unreachable(&self) -> Option<StdoutSink> {
        None
    }

    async fn arrived(&self, topic: &str) -> Vec<Arrived> {
        let written = self.0.0.lock().expect("not poisoned");
        let lines = written
            .split(|byte| *byte == b'\n')
            .filter(|l| !l.is_empty());
        lines
            .map(|line| serde_json::from_slice::<Value>(line).expect("JSON"))
            .filter(|line| line["topic"] == topic)
            .map(|line| Arrived {
                partition: 0,
                key: bytes(&line["key"]),
                value: bytes(&line["value"]),
                headers: line["headers"]
                    .as_object()
                    .expect("an object")
                    .iter()
                    .map(|(name, value)| (name.clone(), bytes(value)))
                    .collect(),
                timestamp_ms: line["timestamp_ms"].as_i64(),
            })
            .collect()
    }
}

fn bytes(value: &Value) -> Option<Vec<u8>> {
    match value {
        Value::Null => None,
        Value::String(text) => Some(text.clone().into_bytes()),
        encoded => {
            let text = encoded["base64"].as_str().expect("base64");
            Some(BASE64_STANDARD.decode(text).expect("base64"))
        }
    }
}
