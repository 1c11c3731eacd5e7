//! Topics: made as set, or missed with a clear reason; their limits; and what happens when one disappears.

use std::time::Duration;

use outbox_relay::event::{Record, Seq};
use outbox_relay::sink::kafka::{KafkaSink, Settings};
use outbox_relay::sink::{NotPrepared, Receipt, Refused, Sink};
use rdkafka::admin::{AdminOptions, NewTopic, TopicReplication};
use tokio::time::{Instant, sleep, timeout};

use super::cluster::{
    LONG, admin, assert_complete_and_in_order, brokers, consume, hand_over, open, opened,
    partitions, publish, record, settings, topic, topic_config,
};

#[tokio::test]
async fn topics_are_created_as_set() {
    let Some(brokers) = brokers("kafka::topic::topics_are_created_as_set") else {
        return;
    };
    let topic = topic("created");
    let mut settings = settings(&brokers);
    settings.topics.partitions = 5;
    settings.topics.replication_factor = 1;
    settings.topics.config = [
        ("cleanup.policy".to_owned(), "compact".to_owned()),
        ("retention.ms".to_owned(), "123456".to_owned()),
    ]
    .into();
    let mut sink = opened(settings, &[&topic]).await;
    assert_eq!(partitions(&brokers, &topic), 5);
    let config = topic_config(&brokers, &topic).await;
    assert_eq!(config["cleanup.policy"], "compact");
    assert_eq!(config["retention.ms"], "123456");
    // A second time it is only found.
    sink.prepare(&topic).await.expect("prepared again");
}

#[tokio::test]
async fn a_compacted_topic_gets_its_tombstones() {
    let Some(brokers) = brokers("kafka::topic::a_compacted_topic_gets_its_tombstones") else {
        return;
    };
    let topic = topic("compacted");
    let mut settings = settings(&brokers);
    settings.topics.config = [("cleanup.policy".to_owned(), "compact".to_owned())].into();
    let mut sink = opened(settings, &[&topic]).await;
    let tombstone = Record {
        value: None,
        ..record(&topic, b"a", b"")
    };
    publish(&mut sink, &[record(&topic, b"a", b"1"), tombstone]).await;
    let arrived = consume(&brokers, &topic).await;
    let values: Vec<_> = arrived.into_iter().map(|record| record.value).collect();
    assert_eq!(values, [Some(b"1".to_vec()), None]);
}

#[tokio::test]
async fn a_missing_topic_is_rejected_when_topics_are_not_created() {
    let Some(brokers) =
        brokers("kafka::topic::a_missing_topic_is_rejected_when_topics_are_not_created")
    else {
        return;
    };
    let topic = topic("missing");
    let mut settings = settings(&brokers);
    settings.topics.create = false;
    let mut sink = KafkaSink::new(settings);
    sink.open().await.expect("open");
    // A broker may hear of a topic late. After that everybody waits for the answer: the quickest counts, because the machine may
    // hold up any of them.
    let mut took = Vec::new();
    let mut refused = None;
    for _ in 0..3 {
        let began = Instant::now();
        let Err(NotPrepared::Rejected(rejection)) = sink.prepare(&topic).await else {
            panic!("the topic does not exist");
        };
        took.push(began.elapsed());
        refused = Some(rejection);
    }
    let second = Duration::from_secs(1);
    assert!(
        took[0] > second && took.iter().min() < Some(&second),
        "{took:?}"
    );
    let rejection = refused.expect("three times");
    let expected = format!("topic {topic} does not exist and sink.kafka.topics.create is false");
    assert_eq!(rejection.to_string(), expected);
    let refused = sink.hand_over(Seq(0), &record(&topic, b"a", b"1"));
    assert_eq!(refused, Err(Refused::Unprepared));
}

#[tokio::test]
async fn a_topic_that_cannot_be_created_says_why() {
    let Some(brokers) = brokers("kafka::topic::a_topic_that_cannot_be_created_says_why") else {
        return;
    };
    let mut settings = settings(&brokers);
    settings.topics.replication_factor = 3;
    let mut sink = KafkaSink::new(settings);
    sink.open().await.expect("open");
    // There is one broker, and there may be three tomorrow.
    let Err(NotPrepared::Unknown(error)) = sink.prepare(&topic("replicas")).await else {
        panic!("there is one broker");
    };
    assert!(
        error.to_string().contains("InvalidReplicationFactor"),
        "{error}"
    );
}

#[tokio::test]
async fn the_size_limit_of_a_topic_is_checked_before_the_hand_over() {
    let Some(brokers) =
        brokers("kafka::topic::the_size_limit_of_a_topic_is_checked_before_the_hand_over")
    else {
        return;
    };
    let topic = topic("small");
    let mut sink = opened(limited(&brokers, 10_000), &[&topic]).await;
    let large = vec![b'x'; 20_000];
    let refused = sink.hand_over(Seq(0), &record(&topic, b"a", &large));
    let Err(Refused::Rejected(rejection)) = refused else {
        panic!("{refused:?}");
    };
    assert!(
        rejection
            .to_string()
            .contains("takes 10000 (max.message.bytes)"),
        "{rejection}"
    );
    // Batches have to fit as well: two of these do not.
    let values: Vec<String> = (0..300).map(|number| format!("{number:>9000}")).collect();
    let records: Vec<Record<'_>> = values
        .iter()
        .map(|value| record(&topic, b"a", value.as_bytes()))
        .collect();
    publish(&mut sink, &records).await;
    let arrived = consume(&brokers, &topic).await;
    assert_eq!(arrived.len(), 300);
    assert_complete_and_in_order(&arrived, 300);
}

#[tokio::test]
async fn the_largest_record_that_is_not_refused_arrives() {
    let Some(brokers) = brokers("kafka::topic::the_largest_record_that_is_not_refused_arrives")
    else {
        return;
    };
    let topic = topic("brim");
    let mut sink = opened(limited(&brokers, 10_000), &[&topic]).await;
    let value = vec![b'x'; 10_000];
    let largest = (0..=value.len())
        .rev()
        .map(|bytes| record(&topic, b"a", &value[..bytes]))
        .find(|record| record.size_bytes() <= 10_000)
        .expect("one that fits");
    let largest = Record {
        headers: vec![("name".into(), None)],
        value: Some(value[..largest.value.expect("a value").len() - 14].into()),
        ..record(&topic, b"a", b"")
    };
    assert_eq!(largest.size_bytes(), 10_000);
    publish(&mut sink, &[largest]).await;
}

#[tokio::test]
async fn a_topic_with_a_large_limit_takes_a_large_record() {
    let Some(brokers) = brokers("kafka::topic::a_topic_with_a_large_limit_takes_a_large_record")
    else {
        return;
    };
    let topic = topic("large");
    let mut sink = opened(limited(&brokers, 30 << 20), &[&topic]).await;
    let mut value = vec![0; 20 << 20];
    let mut state = 1_u32;
    for byte in &mut value {
        // Nothing that compresses.
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = state.to_be_bytes()[0];
    }
    let records = [
        record(&topic, b"a", b"before"),
        record(&topic, b"a", &value),
        record(&topic, b"a", b"after"),
    ];
    publish(&mut sink, &records).await;
    let arrived = consume(&brokers, &topic).await;
    assert_eq!(arrived.len(), 3);
    assert_eq!(arrived[0].text(), "before");
    assert!(arrived[1].value.as_ref() == Some(&value));
    assert_eq!(arrived[2].text(), "after");
}

#[tokio::test]
async fn a_record_that_can_never_be_queued_is_rejected() {
    let Some(brokers) = brokers("kafka::topic::a_record_that_can_never_be_queued_is_rejected")
    else {
        return;
    };
    let topic = topic("queue");
    let settings = Settings {
        queue_bytes: bytesize::ByteSize::mib(1),
        ..limited(&brokers, 30 << 20)
    };
    let mut sink = opened(settings, &[&topic]).await;
    let value = vec![b'x'; 2 << 20];
    let refused = sink.hand_over(Seq(0), &record(&topic, b"a", &value));
    let Err(Refused::Rejected(rejection)) = refused else {
        panic!("nothing would ever make room: {refused:?}");
    };
    assert!(
        rejection.to_string().contains("sink.kafka.queue_bytes"),
        "{rejection}"
    );
    publish(&mut sink, &[record(&topic, b"a", b"1")]).await;
}

#[tokio::test]
async fn a_limit_that_was_lowered_rejects_only_what_exceeds_it() {
    let Some(brokers) =
        brokers("kafka::topic::a_limit_that_was_lowered_rejects_only_what_exceeds_it")
    else {
        return;
    };
    let topic = topic("lowered");
    let settings = Settings {
        compression: "none".to_owned(),
        ..limited(&brokers, 100_000)
    };
    let mut sink = opened(settings, &[&topic]).await;
    publish(&mut sink, &[record(&topic, b"a", b"before")]).await;
    lower_limit(&brokers, &topic, "10000").await;
    // The sink knows the old limit, and the records share a batch.
    let small = vec![b'x'; 6_000];
    let mut receipts = Vec::new();
    for seq in 0..100 {
        receipts.append(&mut hand_over(&mut sink, seq, &record(&topic, b"a", &small)).await);
    }
    let rejection = timeout(LONG, async {
        loop {
            sink.receipts(&mut receipts).await.expect("receipts");
            let rejected = receipts.iter().find_map(|receipt| match receipt {
                Receipt::Rejected(_, rejection) => Some(rejection.clone()),
                Receipt::Delivered(_) => None,
            });
            if let Some(rejection) = rejected {
                break rejection;
            }
            assert!(receipts.len() < 100, "no batch was too large");
        }
    });
    // Each of them fits: a batch shares its fate, and the next life finds nothing wrong.
    let rejection = rejection.await.expect("a receipt").to_string();
    assert!(rejection.contains("MessageSizeTooLarge"), "{rejection}");
    // The next life has heard of the new limit.
    open(&mut sink, &[&topic]).await;
    let large = vec![b'x'; 20_000];
    let refused = sink.hand_over(Seq(0), &record(&topic, b"a", &large));
    assert!(matches!(refused, Err(Refused::Rejected(_))), "{refused:?}");
    publish(&mut sink, &vec![record(&topic, b"a", &small); 100]).await;
}

#[tokio::test]
async fn a_topic_deleted_in_the_middle_is_created_again() {
    let Some(brokers) = brokers("kafka::topic::a_topic_deleted_in_the_middle_is_created_again")
    else {
        return;
    };
    let topic = topic("deleted");
    let mut sink = opened(settings(&brokers), &[&topic]).await;
    publish(&mut sink, &[record(&topic, b"a", b"before")]).await;
    let began = Instant::now();
    let error = publish_into_the_void(&brokers, &topic, &mut sink).await;
    eprintln!(
        "the life ended {:?} after the deletion: {error}",
        began.elapsed()
    );
    assert!(error.contains(&format!("topic {topic} is gone")), "{error}");
    let began = Instant::now();
    open(&mut sink, &[&topic]).await;
    publish(&mut sink, &[record(&topic, b"a", b"after")]).await;
    eprintln!("publishing again {:?} later", began.elapsed());
    assert_eq!(partitions(&brokers, &topic), 4);
    let arrived = consume(&brokers, &topic).await;
    assert_eq!(arrived.last().expect("a record").text(), "after");
}

#[tokio::test]
async fn a_topic_deleted_in_the_middle_stays_away_when_topics_are_not_created() {
    let Some(brokers) = brokers(
        "kafka::topic::a_topic_deleted_in_the_middle_stays_away_when_topics_are_not_created",
    ) else {
        return;
    };
    let topic = topic("gone");
    let new = NewTopic::new(&topic, 1, TopicReplication::Fixed(1));
    let created = admin(&brokers)
        .create_topics([&new], &AdminOptions::new())
        .await;
    created.expect("an answer")[0].as_ref().expect("created");
    let mut settings = settings(&brokers);
    settings.topics.create = false;
    let mut sink = opened(settings, &[&topic]).await;
    publish(&mut sink, &[record(&topic, b"a", b"before")]).await;
    let error = publish_into_the_void(&brokers, &topic, &mut sink).await;
    assert!(error.contains(&format!("topic {topic} is gone")), "{error}");
    sink.open().await.expect("open");
    let Err(NotPrepared::Rejected(rejection)) = sink.prepare(&topic).await else {
        panic!("the topic was deleted");
    };
    assert!(
        rejection.to_string().contains("does not exist"),
        "{rejection}"
    );
}

/// Deletes the topic and goes on publishing to it, until the sink gives up.
async fn publish_into_the_void(brokers: &str, topic: &str, sink: &mut KafkaSink) -> String {
    let deleted = admin(brokers)
        .delete_topics(&[topic], &AdminOptions::new())
        .await;
    deleted.expect("an answer")[0].as_ref().expect("deleted");
    let mut receipts = Vec::new();
    timeout(LONG, async {
        for seq in 1.. {
            match sink.hand_over(Seq(seq), &record(topic, b"a", b"during")) {
                Ok(()) | Err(Refused::Full) => {}
                Err(Refused::Broken(error)) => return error.to_string(),
                Err(refused) => panic!("{refused:?}"),
            }
            let wait = Duration::from_millis(10);
            if let Ok(Err(error)) = timeout(wait, sink.receipts(&mut receipts)).await {
                return error.to_string();
            }
        }
        unreachable!("numbers do not end")
    })
    .await
    .expect("the end of a life")
}

async fn lower_limit(brokers: &str, topic: &str, bytes: &str) {
    use rdkafka::admin::{AlterConfig, ResourceSpecifier};
    let alter = AlterConfig::new(ResourceSpecifier::Topic(topic)).set("max.message.bytes", bytes);
    let altered = admin(brokers)
        .alter_configs([&alter], &AdminOptions::new())
        .await;
    altered.expect("an answer")[0].as_ref().expect("altered");
    while topic_config(brokers, topic).await["max.message.bytes"] != bytes {
        sleep(Duration::from_millis(20)).await;
    }
}

/// Topics that take records of at most so many bytes.
fn limited(brokers: &str, bytes: usize) -> Settings {
    let mut settings = settings(brokers);
    settings.topics.config = [("max.message.bytes".to_owned(), bytes.to_string())].into();
    settings
}

/// One look-up for all of them: a relay that begins again does not wait for each.
#[tokio::test]
async fn many_topics_are_made_and_found_together() {
    let Some(brokers) = brokers("kafka::topic::many_topics_are_made_and_found_together") else {
        return;
    };
    let prefix = topic("many");
    let names: Vec<String> = (0..60).map(|number| format!("{prefix}-{number}")).collect();
    let mut settings = settings(&brokers);
    settings.topics.partitions = 1;
    let mut sink = opened(settings.clone(), &[]).await;
    for (name, answer) in sink.look_up(names.clone()).await {
        sink.learn(&name, answer).expect("made");
    }
    for (seq, name) in (0..).zip(&names) {
        hand_over(&mut sink, seq, &record(name, b"a", b"1")).await;
    }
    // What is known outlives a session: no topic is asked for again.
    sink.open().await.expect("open");
    let again = sink.hand_over(Seq(0), &record(&names[59], b"a", b"2"));
    assert_eq!(again, Ok(()));
    let mut other = opened(settings, &[]).await;
    let answers = other.look_up(names).await;
    assert_eq!(answers.len(), 60);
    assert!(
        answers.iter().all(|(_, answer)| answer.is_ok()),
        "{answers:?}"
    );
}

/// Refuses a topic, and says why.
async fn refusal(sink: &mut KafkaSink, topic: &str) -> String {
    match sink.prepare(topic).await {
        Err(NotPrepared::Rejected(rejection)) => rejection.to_string(),
        other => panic!("{topic}: {other:?}"),
    }
}

#[tokio::test]
async fn names_that_can_not_be_are_refused_with_the_reason() {
    let Some(brokers) = brokers("kafka::topic::names_that_can_not_be_are_refused_with_the_reason")
    else {
        return;
    };
    let taken = format!("{}.taken", topic("names"));
    let mut settings = settings(&brokers);
    settings.topics.max = 1;
    settings.transactional_id = Some("shop".to_owned());
    let mut sink = opened(settings, &[&taken]).await;
    let refused = refusal(&mut sink, "__consumer_offsets").await;
    assert!(refused.contains("belong to Kafka"), "{refused}");
    for own in ["shop.main.0.positions", "shop_other_7.positions"] {
        let refused = refusal(&mut sink, own).await;
        assert!(refused.contains("keeps its positions"), "{refused}");
    }
    let refused = refusal(&mut sink, &topic("one-more")).await;
    assert!(refused.contains("sink.kafka.topics.max is 1"), "{refused}");
    let collides = taken.replace('.', "_");
    let mut sink = opened(self::settings(&brokers), &[]).await;
    let refused = refusal(&mut sink, &collides).await;
    assert!(
        refused.contains(&format!("collides with topic {taken}")),
        "{refused}"
    );
}

#[tokio::test]
async fn the_setting_that_the_broker_refuses_is_named() {
    let Some(brokers) = brokers("kafka::topic::the_setting_that_the_broker_refuses_is_named")
    else {
        return;
    };
    let mut settings = settings(&brokers);
    settings.topics.config = [
        ("cleanup.policy".to_owned(), "compact".to_owned()),
        ("retention.ms".to_owned(), "soon".to_owned()),
    ]
    .into();
    let mut sink = opened(settings, &[]).await;
    let Err(NotPrepared::Unknown(error)) = sink.prepare(&topic("settings")).await else {
        panic!("no number");
    };
    assert!(
        error.to_string().contains("\"retention.ms\" = \"soon\""),
        "{error}"
    );
}

/// An operator raises the limit and tries again, without a new start.
#[tokio::test]
async fn a_raised_limit_is_noticed() {
    let Some(brokers) = brokers("kafka::topic::a_raised_limit_is_noticed") else {
        return;
    };
    let topic = topic("raised");
    let mut sink = opened(limited(&brokers, 10_000), &[&topic]).await;
    let large = vec![b'x'; 20_000];
    let large = record(&topic, b"a", &large);
    let refused = sink.hand_over(Seq(0), &large);
    let Err(Refused::Rejected(rejection)) = refused else {
        panic!("{refused:?}");
    };
    assert!(
        rejection.to_string().starts_with("too large: "),
        "{rejection}"
    );
    lower_limit(&brokers, &topic, "30000").await;
    sink.doubt();
    assert_eq!(sink.hand_over(Seq(0), &large), Err(Refused::Unprepared));
    sink.prepare(&topic).await.expect("asked again");
    assert_eq!(sink.hand_over(Seq(0), &large), Ok(()));
}
