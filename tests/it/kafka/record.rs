//! What the broker keeps of a record, and which records it refuses.

use std::collections::BTreeSet;
use std::env;
use std::time::Duration;

use outbox_relay::event::{Record, Seq};
use outbox_relay::sink::kafka::{KafkaSink, Settings};
use outbox_relay::sink::{Receipt, Refused, Sink, SinkError};
use rdkafka::admin::{AdminOptions, AlterConfig, ResourceSpecifier};
use rdkafka::mocking::MockCluster;
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};
use tokio::time::{sleep, timeout};

use super::cluster::{
    Arrived, LONG, admin, brokers, consume, now_ms, open, opened, publish, record, settings, topic,
    topic_config,
};

const YEAR_MS: i64 = 31_556_952_000;

#[tokio::test]
async fn every_compression_can_be_read() {
    let Some(brokers) = brokers("kafka::record::every_compression_can_be_read") else {
        return;
    };
    for compression in ["none", "lz4", "zstd", "snappy", "gzip"] {
        let topic = topic(compression);
        let settings = Settings {
            compression: compression.to_owned(),
            ..settings(&brokers)
        };
        let mut sink = opened(settings, &[&topic]).await;
        let values: Vec<String> = (0..500).map(|n| format!("{n} {n:0>200}")).collect();
        let records: Vec<Record<'_>> = values
            .iter()
            .map(|value| record(&topic, b"a", value.as_bytes()))
            .collect();
        publish(&mut sink, &records).await;
        let arrived = consume(&brokers, &topic).await;
        let arrived: Vec<&str> = arrived.iter().map(Arrived::text).collect();
        assert_eq!(arrived, values, "{compression}");
    }
}

#[tokio::test]
async fn the_beginning_of_time_is_not_now() {
    let Some(brokers) = brokers("kafka::record::the_beginning_of_time_is_not_now") else {
        return;
    };
    let topic = topic("epoch");
    let mut sink = opened(settings(&brokers), &[&topic]).await;
    let old = Record {
        timestamp_ms: 0,
        ..record(&topic, b"a", b"1")
    };
    publish(&mut sink, &[old]).await;
    let arrived = consume(&brokers, &topic).await;
    // Librdkafka takes 0 for "not set"; a millisecond later is as close as it gets.
    assert_eq!(arrived[0].timestamp_ms, Some(1));
}

#[tokio::test]
async fn a_time_that_the_broker_would_refuse_is_refused_before_the_hand_over() {
    let Some(brokers) = brokers(
        "kafka::record::a_time_that_the_broker_would_refuse_is_refused_before_the_hand_over",
    ) else {
        return;
    };
    let topic = topic("future");
    let mut settings = settings(&brokers);
    let two_years = (2 * YEAR_MS).to_string();
    settings.topics.config = [("message.timestamp.before.max.ms".to_owned(), two_years)].into();
    let mut sink = opened(settings, &[&topic]).await;
    for timestamp_ms in [now_ms() + 1_000 * YEAR_MS, now_ms() - 3 * YEAR_MS, i64::MAX] {
        let refused = sink.hand_over(
            Seq(0),
            &Record {
                timestamp_ms,
                ..record(&topic, b"a", b"1")
            },
        );
        let Err(Refused::Rejected(rejection)) = refused else {
            panic!("{timestamp_ms}: {refused:?}");
        };
        assert!(
            rejection.to_string().contains("message.timestamp."),
            "{rejection}"
        );
    }
    // By default an hour ahead is the most.
    let times = [-YEAR_MS, 0, 3_500_000].map(|offset_ms| Record {
        timestamp_ms: now_ms() + offset_ms,
        ..record(&topic, b"a", b"1")
    });
    publish(&mut sink, &times).await;
}

#[tokio::test]
async fn a_record_that_the_broker_refuses_is_told_from_its_batch() {
    let Some(brokers) =
        brokers("kafka::record::a_record_that_the_broker_refuses_is_told_from_its_batch")
    else {
        return;
    };
    let topic = topic("refused");
    let mut settings = settings(&brokers);
    settings.topics.partitions = 1;
    let mut sink = opened(settings, &[&topic]).await;
    // The sink does not hear of this, and finds nothing wrong with old records.
    alter(&brokers, &topic, "message.timestamp.before.max.ms", "60000").await;
    for refused in [0, 50, 99] {
        let records: Vec<Record<'_>> = (0..100)
            .map(|number| Record {
                timestamp_ms: now_ms() - if number == refused { YEAR_MS } else { 0 },
                ..record(&topic, b"a", b"1")
            })
            .collect();
        is_told(&mut sink, &records, refused).await;
        open_with_old_times(&mut sink, &brokers, &topic).await;
        publish(&mut sink, &vec![record(&topic, b"a", b"after"); 100]).await;
    }
    let arrived = consume(&brokers, &topic).await;
    assert!(arrived.len() >= 300);
}

/// Opens while old times are allowed, so that the sink lets them pass.
async fn open_with_old_times(sink: &mut KafkaSink, brokers: &str, topic: &str) {
    const NAME: &str = "message.timestamp.before.max.ms";
    alter(brokers, topic, NAME, "9223372036854775807").await;
    open(sink, &[topic]).await;
    alter(brokers, topic, NAME, "60000").await;
}

/// The broker takes a batch only after the one before it, but whatever comes first of a producer in a partition. Were the
/// first records of a life not to wait for each other, some of these lives would append what follows a refused batch.
#[tokio::test]
async fn nothing_is_appended_after_a_refused_record() {
    const LIVES: usize = 30;
    let Some(brokers) = brokers("kafka::record::nothing_is_appended_after_a_refused_record") else {
        return;
    };
    let topic = topic("gap");
    let mut settings = settings(&brokers);
    settings.topics.partitions = 1;
    settings.topics.config = [(
        "message.timestamp.before.max.ms".to_owned(),
        "3600000".to_owned(),
    )]
    .into();
    settings.properties = [("batch.num.messages".to_owned(), "100".to_owned())].into();
    let mut sink = opened(settings, &[&topic]).await;
    let mut records = vec![record(&topic, b"a", b"1"); 2_000];
    // The sink lets clocks differ by a day, the broker does not.
    records[0].timestamp_ms -= 2 * 3_600_000;
    for life in 0..LIVES {
        if let Err(ended) = until_rejected(&mut sink, &records, &mut Vec::new()).await {
            eprintln!("life {life}: {ended}");
        }
        open(&mut sink, &[&topic]).await;
    }
    assert_eq!(consume(&brokers, &topic).await, []);
    // Once it is known there, the producer is refused whatever does not follow.
    records.swap(0, 1_000);
    for life in 0..3 {
        if let Err(ended) = until_rejected(&mut sink, &records, &mut Vec::new()).await {
            eprintln!("life {life}: {ended}");
        }
        open(&mut sink, &[&topic]).await;
    }
    let arrived = consume(&brokers, &topic).await.len();
    assert!(arrived <= 3 * 1_000, "{arrived}");
}

#[tokio::test]
async fn a_refused_record_is_told_while_others_are_handed_over() {
    let Some(brokers) =
        brokers("kafka::record::a_refused_record_is_told_while_others_are_handed_over")
    else {
        return;
    };
    let topic = topic("busy");
    let mut sink = opened(settings(&brokers), &[&topic]).await;
    alter(&brokers, &topic, "message.timestamp.before.max.ms", "60000").await;
    publish(&mut sink, &[record(&topic, b"a", b"before")]).await;
    // As in the loop: records are handed over for as long as that works, then receipts are taken.
    let records: Vec<Record<'_>> = (0..30_000)
        .map(|number| Record {
            key: Some(format!("key-{}", number % 100).into_bytes().into()),
            timestamp_ms: now_ms() - if number == 3_000 { YEAR_MS } else { 0 },
            ..record(&topic, b"", b"1")
        })
        .collect();
    is_told(&mut sink, &records, 3_000).await;
}

#[tokio::test]
async fn after_a_fatal_error_a_new_life_works() {
    let cluster = MockCluster::new(1).expect("a cluster");
    let topic = topic("fatal");
    cluster.create_topic(&topic, 4, 1).expect("a topic");
    let brokers = cluster.bootstrap_servers();
    let mut sink = opened(settings(&brokers), &[&topic]).await;
    publish(&mut sink, &[record(&topic, b"a", b"before")]).await;
    let out_of_order = RDKafkaRespErr::RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER;
    cluster.request_errors(RDKafkaApiKey::Produce, &[out_of_order]);
    let mut receipts = Vec::new();
    for seq in 0..1_000 {
        let key = format!("key-{}", seq % 100);
        match sink.hand_over(Seq(seq), &record(&topic, key.as_bytes(), b"lost")) {
            Ok(()) => {}
            Err(Refused::Full | Refused::Broken(_)) => break,
            Err(refused) => panic!("{refused:?}"),
        }
    }
    // Without a message timeout librdkafka itself would keep silent about what it still holds.
    let ended = timeout(Duration::from_secs(10), async {
        loop {
            if let Err(error) = sink.receipts(&mut receipts).await {
                return error;
            }
        }
    });
    let error = ended.await.expect("a dead producer is noticed");
    assert!(error.to_string().contains("sequence"), "{error}");
    let refused = sink.hand_over(Seq(1_000), &record(&topic, b"a", b"lost"));
    assert!(matches!(refused, Err(Refused::Broken(_))), "{refused:?}");
    open(&mut sink, &[&topic]).await;
    publish(&mut sink, &[record(&topic, b"a", b"after")]).await;
    let arrived = consume(&brokers, &topic).await;
    assert!(arrived.iter().any(|record| record.text() == "after"));
}

/// Publishes until records are rejected. The bad one has to be among them, and its innocent companions must not be rejected
/// again when they are handed over alone. On a busy machine a life may end without a word.
async fn is_told(sink: &mut KafkaSink, records: &[Record<'_>], bad: usize) {
    let topic = records[0].topic.clone();
    let brokers = env::var("KAFKA_BROKERS").expect("set, as the test runs");
    for _ in 0..5 {
        let mut receipts = Vec::new();
        let ended = until_rejected(sink, records, &mut receipts).await;
        let refused: BTreeSet<Seq> = receipts.iter().filter_map(rejected_seq).collect();
        open_with_old_times(sink, &brokers, &topic).await;
        if refused.is_empty() {
            eprintln!("{}", ended.expect_err("a rejection or an error"));
            continue;
        }
        let bad = Seq(u64::try_from(bad).expect("few"));
        assert!(refused.contains(&bad), "{refused:?}");
        for seq in [*refused.first().expect("one"), bad] {
            let record = &records[usize::try_from(seq.0).expect("few")];
            receipts.clear();
            let told = until_rejected(sink, std::slice::from_ref(record), &mut receipts);
            if seq == bad {
                told.await.expect("a rejection");
                assert_eq!(receipts.len(), 1, "{receipts:?}");
                open_with_old_times(sink, &brokers, &topic).await;
            } else {
                drop(told);
                publish(sink, std::slice::from_ref(record)).await;
            }
        }
        return;
    }
    panic!("no record was rejected");
}

/// Hands records over until one is rejected.
async fn until_rejected(
    sink: &mut KafkaSink,
    records: &[Record<'_>],
    receipts: &mut Vec<Receipt>,
) -> Result<(), SinkError> {
    let rejected = |receipts: &[Receipt]| receipts.iter().find_map(rejected_seq).is_some();
    for (seq, record) in (0..).zip(records) {
        while let Err(refused) = sink.hand_over(Seq(seq), record) {
            assert_eq!(refused, Refused::Full);
            sink.receipts(receipts).await?;
            if rejected(receipts) {
                return Ok(());
            }
        }
    }
    timeout(LONG, async {
        while !rejected(receipts) {
            sink.receipts(receipts).await?;
        }
        Ok(())
    })
    .await
    .expect("in time")
}

fn rejected_seq(receipt: &Receipt) -> Option<Seq> {
    match receipt {
        Receipt::Rejected(seq, _) => Some(*seq),
        Receipt::Delivered(_) => None,
    }
}

/// Sets one setting of a topic, and no other.
async fn alter(brokers: &str, topic: &str, name: &str, value: &str) {
    let alter = AlterConfig::new(ResourceSpecifier::Topic(topic)).set(name, value);
    let altered = admin(brokers)
        .alter_configs([&alter], &AdminOptions::new())
        .await;
    altered.expect("an answer")[0].as_ref().expect("altered");
    while topic_config(brokers, topic).await[name] != value {
        sleep(Duration::from_millis(20)).await;
    }
}
