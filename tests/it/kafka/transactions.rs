//! Exactly-once delivery against a real broker: who owns a transactional id, and which position counts.

use std::sync::Arc;
use std::time::{Duration, Instant};

use outbox_relay::event::{EventId, Seq};
use outbox_relay::position::{Position, Window};
use outbox_relay::sink::kafka::{Delivery, KafkaSink, Settings, positions_topic};
use outbox_relay::sink::{Receipt, Refused, Sink, SinkError};
use rdkafka::config::ClientConfig;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use tokio::time::timeout;

use super::cluster::{
    Arrived, LOG, LONG, brokers, consume, hand_over, open, opened, record, settings, topic,
};

fn exactly_once(brokers: &str, id: &str) -> Settings {
    Settings {
        delivery: Delivery::ExactlyOnce,
        transactional_id: Some(id.to_owned()),
        ..settings(brokers)
    }
}

fn position(last_id: i64) -> Position {
    Position {
        window: Arc::new(Window::beginning()),
        last_id: EventId(last_id),
    }
}

/// Hands one record over and asks for the commit.
async fn close(sink: &mut KafkaSink, topic: &str, value: &str, last_id: i64) {
    let none = hand_over(sink, 0, &record(topic, b"a", value.as_bytes())).await;
    assert_eq!(none, [], "before the commit");
    sink.commit(&position(last_id));
}

/// The next ones; signs of life are none.
async fn receipts(sink: &mut KafkaSink) -> Result<Vec<Receipt>, SinkError> {
    let mut receipts = Vec::new();
    while receipts.is_empty() {
        let received = timeout(LONG, sink.receipts(&mut receipts)).await;
        received.expect("in time")?;
    }
    Ok(receipts)
}

async fn texts(brokers: &str, topic: &str) -> Vec<String> {
    let arrived = consume(brokers, topic).await;
    arrived
        .iter()
        .map(|r| Arrived::text(r).to_owned())
        .collect()
}

/// Waits until these can be read and no others: a broker says that a transaction is committed before it is so in each
/// partition. What one hides that stays open, it hides for a minute.
async fn texts_become(brokers: &str, topic: &str, expected: &[&str]) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let texts = texts(brokers, topic).await;
        if texts == expected || Instant::now() >= deadline {
            assert_eq!(texts, expected);
            return;
        }
    }
}

/// A life of a new process.
async fn successor(brokers: &str, id: &str, log: &str) -> (KafkaSink, Option<Position>) {
    let mut sink = KafkaSink::new(exactly_once(brokers, id));
    sink.open().await.expect("open");
    let position = sink.resume(log).await.expect("resume");
    (sink, position)
}

#[tokio::test]
async fn the_position_is_that_of_the_last_commit_in_this_log() {
    let Some(brokers) =
        brokers("kafka::transactions::the_position_is_that_of_the_last_commit_in_this_log")
    else {
        return;
    };
    let (topic, id) = (topic("committed"), topic("id"));
    let (_, nothing) = successor(&brokers, &id, LOG).await;
    assert_eq!(nothing, None);
    let mut sink = opened(exactly_once(&brokers, &id), &[&topic]).await;
    for last_id in [7, 8] {
        close(&mut sink, &topic, &last_id.to_string(), last_id).await;
        let full = sink.hand_over(Seq(1), &record(&topic, b"a", b"early"));
        assert_eq!(full, Err(Refused::Full));
        assert_eq!(
            receipts(&mut sink).await,
            Ok(vec![Receipt::Delivered(Seq(0))])
        );
    }
    texts_become(&brokers, &topic, &["7", "8"]).await;
    let (_, committed) = successor(&brokers, &id, LOG).await;
    assert_eq!(committed, Some(position(8)));
    let (_, of_another_log) = successor(&brokers, &id, "another").await;
    assert_eq!(of_another_log, None);
    let (_, of_another_id) = successor(&brokers, &super::cluster::topic("id"), LOG).await;
    assert_eq!(of_another_id, None);
}

#[tokio::test]
async fn a_successor_shuts_the_owner_before_out() {
    let Some(brokers) = brokers("kafka::transactions::a_successor_shuts_the_owner_before_out")
    else {
        return;
    };
    let (topic, id) = (topic("fenced"), topic("id"));
    let mut old = opened(exactly_once(&brokers, &id), &[&topic]).await;
    close(&mut old, &topic, "first", 1).await;
    receipts(&mut old).await.expect("committed");
    let early = hand_over(&mut old, 1, &record(&topic, b"a", b"late")).await;
    assert_eq!(early, []);
    let (mut new, committed) = successor(&brokers, &id, LOG).await;
    assert_eq!(committed, Some(position(1)));
    old.commit(&position(2));
    let fenced = receipts(&mut old).await.expect_err("fenced").to_string();
    assert!(
        fenced.to_lowercase().contains("fenced") || fenced.contains("taken over"),
        "{fenced}"
    );
    open(&mut new, &[&topic]).await;
    close(&mut new, &topic, "second", 2).await;
    receipts(&mut new).await.expect("committed");
    texts_become(&brokers, &topic, &["first", "second"]).await;
}

#[tokio::test]
async fn a_life_that_ends_takes_its_transaction_back_at_once() {
    let Some(brokers) =
        brokers("kafka::transactions::a_life_that_ends_takes_its_transaction_back_at_once")
    else {
        return;
    };
    let (topic, id) = (topic("aborted"), topic("id"));
    let mut sink = opened(exactly_once(&brokers, &id), &[&topic]).await;
    let early = hand_over(&mut sink, 0, &record(&topic, b"a", b"aborted")).await;
    assert_eq!(early, []);
    // Until it has arrived there is nothing to take back.
    let nothing = timeout(Duration::from_millis(300), sink.receipts(&mut Vec::new())).await;
    assert!(nothing.is_err(), "{nothing:?}");
    sink.open().await.expect("open");
    // Nobody has initialised the id again: an open transaction would hide what follows it for a minute.
    let other = super::cluster::topic("id");
    let mut neighbour = opened(exactly_once(&brokers, &other), &[&topic]).await;
    close(&mut neighbour, &topic, "visible", 1).await;
    receipts(&mut neighbour).await.expect("committed");
    texts_become(&brokers, &topic, &["visible"]).await;
}

#[tokio::test]
async fn the_position_is_found_behind_many_that_were_aborted() {
    let Some(brokers) =
        brokers("kafka::transactions::the_position_is_found_behind_many_that_were_aborted")
    else {
        return;
    };
    let (topic, id) = (topic("behind"), topic("id"));
    let mut sink = opened(exactly_once(&brokers, &id), &[&topic]).await;
    close(&mut sink, &topic, "1", 41).await;
    receipts(&mut sink).await.expect("committed");
    let (owner, brokers_of_owner) = (id.clone(), brokers.clone());
    let aborted = tokio::task::spawn_blocking(move || {
        let producer: BaseProducer = ClientConfig::new()
            .set("bootstrap.servers", &brokers_of_owner)
            .set("transactional.id", &owner)
            .create()
            .expect("a producer");
        producer.init_transactions(LONG).expect("initialised");
        producer.begin_transaction().expect("begun");
        let positions = positions_topic(&owner);
        for _ in 0..300 {
            let record = BaseRecord::to(&positions).key(&owner).payload("aborted");
            producer
                .send(record)
                .map_err(|(error, _)| error)
                .expect("sent");
        }
        producer.flush(LONG).expect("arrived");
        producer.abort_transaction(LONG).expect("aborted");
    });
    aborted.await.expect("no panic");
    let (_, committed) = successor(&brokers, &id, LOG).await;
    assert_eq!(committed, Some(position(41)));
}
