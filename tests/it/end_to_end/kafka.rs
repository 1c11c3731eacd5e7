//! Topics of one test, and a consumer that reads them from the beginning.

use std::collections::HashMap;
use std::time::Duration;

use rdkafka::admin::{
    AdminClient, AdminOptions, AlterConfig, NewTopic, ResourceSpecifier, TopicReplication,
};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::message::{BorrowedMessage, Headers, Message};
use rdkafka::{Offset, TopicPartitionList};
use tokio::time::timeout;
use uuid::Uuid;

use super::{PATIENCE, eventually};

const PARTITIONS: i32 = 3;

pub(super) struct Kafka {
    pub(super) brokers: String,
    pub(super) prefix: String,
}

/// A record as a consumer sees it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Received {
    pub(super) topic: String,
    pub(super) partition: i32,
    pub(super) offset: i64,
    pub(super) key: Option<Vec<u8>>,
    pub(super) value: Option<Vec<u8>>,
    pub(super) headers: Vec<(String, Option<Vec<u8>>)>,
    pub(super) timestamp_ms: Option<i64>,
}

impl Received {
    pub(super) fn header(&self, name: &str) -> Option<&[u8]> {
        let (_, value) = self.headers.iter().find(|(header, _)| header == name)?;
        value.as_deref()
    }

    pub(super) fn text(&self) -> &str {
        str::from_utf8(self.value.as_deref().unwrap_or_default()).unwrap()
    }

    pub(super) fn key_text(&self) -> &str {
        str::from_utf8(self.key.as_deref().unwrap_or_default()).unwrap()
    }
}

impl Kafka {
    /// Topics with a prefix of their own on these brokers.
    pub(super) fn new(brokers: String) -> Self {
        let prefix = format!("e2e-{}", &Uuid::new_v4().simple().to_string()[..12]);
        Self { brokers, prefix }
    }

    /// The topic's name with the prefix.
    pub(super) fn topic(&self, name: &str) -> String {
        format!("{}.{name}", self.prefix)
    }

    fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.brokers);
        config
    }

    /// Makes topics; the names are given without the prefix.
    pub(super) async fn create(&self, names: &[&str]) {
        for name in names {
            self.create_with(name, PARTITIONS, &[]).await;
        }
    }

    /// Sets one setting of a topic, and no other; its name is given without the prefix.
    pub(super) async fn alter(&self, name: &str, setting: &str, value: &str) {
        let topic = self.topic(name);
        let alter = AlterConfig::new(ResourceSpecifier::Topic(&topic)).set(setting, value);
        let altered = self
            .admin()
            .alter_configs([&alter], &AdminOptions::new())
            .await;
        altered.unwrap()[0].as_ref().unwrap();
    }

    /// Makes one topic with settings.
    pub(super) async fn create_with(&self, name: &str, partitions: i32, settings: &[(&str, &str)]) {
        let name = self.topic(name);
        let mut topic = NewTopic::new(&name, partitions, TopicReplication::Fixed(1));
        topic.config = settings.to_vec();
        let created = self.admin().create_topics(&[topic], &options()).await;
        created.unwrap().remove(0).unwrap();
    }

    /// Deletes what stands before these offsets of the partitions, as retention does.
    pub(super) async fn let_go(&self, name: &str, offsets: &[i64]) {
        let mut before = TopicPartitionList::new();
        for (partition, offset) in (0..).zip(offsets) {
            let offset = Offset::Offset(*offset);
            before
                .add_partition_offset(&self.topic(name), partition, offset)
                .unwrap();
        }
        self.admin()
            .delete_records(&before, &options())
            .await
            .unwrap();
    }

    fn admin(&self) -> AdminClient<DefaultClientContext> {
        self.client().create().unwrap()
    }

    /// Reads topics from the beginning; their names are given with the prefix.
    pub(super) fn reader(&self, topics: &[String]) -> Reader {
        self.reader_with(topics, PARTITIONS)
    }

    /// The same for topics of so many partitions, whose names are given without the prefix.
    pub(super) fn reader_of(&self, names: &[&str], partitions: i32) -> Reader {
        let topics: Vec<String> = names.iter().map(|name| self.topic(name)).collect();
        self.reader_with(&topics, partitions)
    }

    fn reader_with(&self, topics: &[String], count: i32) -> Reader {
        let consumer: StreamConsumer = self
            .client()
            .set("group.id", "nobody")
            .set("enable.auto.commit", "false")
            .set("fetch.wait.max.ms", "20")
            .create()
            .unwrap();
        let mut reader = Reader {
            consumer,
            next: HashMap::new(),
        };
        let mut partitions = TopicPartitionList::new();
        for topic in topics {
            for partition in 0..count {
                reader.next.insert((topic.clone(), partition), 0);
                partitions
                    .add_partition_offset(topic, partition, Offset::Beginning)
                    .unwrap();
            }
        }
        reader.consumer.assign(&partitions).unwrap();
        reader
    }

    /// Everything that is in the topics now.
    pub(super) async fn read(&self, names: &[&str]) -> Vec<Received> {
        let topics: Vec<String> = names.iter().map(|name| self.topic(name)).collect();
        self.reader(&topics).read_to_end().await
    }
}

fn options() -> AdminOptions {
    AdminOptions::new().operation_timeout(Some(Duration::from_secs(20)))
}

pub(super) struct Reader {
    consumer: StreamConsumer,
    /// The next offset of each partition.
    next: HashMap<(String, i32), i64>,
}

impl Reader {
    /// Reads on until there are this many records and no more of them come: where there are transactions the end of a
    /// partition is no record.
    pub(super) async fn read_on(&mut self, at_least: usize) -> Vec<Received> {
        let mut records = Vec::new();
        loop {
            let patience = if records.len() < at_least {
                PATIENCE
            } else {
                Duration::from_millis(500)
            };
            match timeout(patience, self.consumer.recv()).await {
                Ok(Ok(record)) => records.push(received(&record)),
                // Trouble of the consumer passes.
                Ok(Err(_)) => {}
                Err(_) => return records,
            }
        }
    }

    /// Reads on, up to what is the end now.
    pub(super) async fn read_to_end(&mut self) -> Vec<Received> {
        let mut ends = Vec::new();
        for partition in self.next.keys() {
            let (topic, number) = partition;
            // A broker that has just come back does not lead all its partitions yet.
            let end = eventually("the end of a partition", PATIENCE, async || {
                let ends = self.consumer.fetch_watermarks(topic, *number, PATIENCE);
                ends.ok().map(|(_, end)| end)
            })
            .await;
            ends.push((partition.clone(), end));
        }
        let mut records = Vec::new();
        while ends
            .iter()
            .any(|(partition, end)| self.next[partition] < *end)
        {
            let record = timeout(Duration::from_secs(20), self.consumer.recv())
                .await
                .expect("a record before the end");
            let Ok(record) = record else { continue };
            let partition = (record.topic().to_owned(), record.partition());
            self.next.insert(partition, record.offset() + 1);
            records.push(received(&record));
        }
        records
    }
}

fn received(record: &BorrowedMessage<'_>) -> Received {
    Received {
        topic: record.topic().to_owned(),
        partition: record.partition(),
        offset: record.offset(),
        key: record.key().map(<[u8]>::to_vec),
        value: record.payload().map(<[u8]>::to_vec),
        headers: record.headers().map_or(Vec::new(), |headers| {
            headers
                .iter()
                .map(|header| (header.key.to_owned(), header.value.map(<[u8]>::to_vec)))
                .collect()
        }),
        timestamp_ms: record.timestamp().to_millis(),
    }
}
