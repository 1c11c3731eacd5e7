//! The topics of one measurement: made, watched, read to the end, deleted.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, bail, ensure};
use outbox_relay::config::{Config, Sink};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::FromClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Headers, Message};
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer, ThreadedProducer};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::judge::Found;

const ANSWER_MAX: Duration = Duration::from_secs(30);
/// A consumer that is given nothing for so long will not get it.
const SILENCE_MAX: Duration = Duration::from_mins(1);

/// That of relay.toml.
pub const COMPRESSION: &str = "lz4";

/// What a record of 1 MiB needs.
pub const RECORD_BYTES_MAX: &str = "4194304";

/// A Kafka cluster, and how it is reached. Its properties may be secrets.
#[derive(Clone)]
pub struct Cluster {
    pub brokers: String,
    /// Of librdkafka.
    pub properties: BTreeMap<String, String>,
}

impl Cluster {
    /// With the properties of a file, a `NAME=VALUE` a line.
    pub fn new(brokers: String, file: Option<&Path>) -> Result<Self, Error> {
        let mut properties = BTreeMap::new();
        let text = match file {
            Some(file) => std::fs::read_to_string(file)
                .with_context(|| format!("read --kafka-config {}", file.display()))?,
            None => String::new(),
        };
        for line in text.lines().map(str::trim) {
            if !line.is_empty() && !line.starts_with('#') {
                let property = line.split_once('=');
                let (name, value) =
                    property.context("--kafka-config has a line that is no NAME=VALUE")?;
                properties.insert(name.trim().to_owned(), value.trim().to_owned());
            }
        }
        Ok(Self {
            brokers,
            properties,
        })
    }

    fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.brokers);
        for (name, value) in &self.properties {
            config.set(name, value);
        }
        config
    }

    fn admin(&self) -> Result<AdminClient<DefaultClientContext>, Error> {
        self.client().create().context("make an admin client")
    }

    /// Reads what is committed, tells the ends of partitions, and has no part in a group.
    pub fn consumer(&self) -> Result<BaseConsumer, Error> {
        self.client()
            // A broker that was away leads in a new epoch, and what is known of the old one is refused.
            .set("metadata.max.age.ms", "2000")
            .set("group.id", "figures")
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("isolation.level", "read_committed")
            .set("enable.partition.eof", "true")
            .set("queued.max.messages.kbytes", "32768")
            .create()
            .context("make a consumer")
    }

    /// The producer of the bare loop: a relay's, to the last property.
    pub fn producer<P: FromClientConfig>(&self, compression: &str) -> Result<P, Error> {
        let settings = [
            // Is never connected to.
            ("RELAY_SOURCE__POSTGRES__URL", "postgres://nobody@nowhere/"),
            ("RELAY_SINK__KAFKA__BROKERS", &self.brokers),
            ("RELAY_SINK__KAFKA__COMPRESSION", compression),
        ];
        let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let Sink::Kafka(mut settings) = Config::load(None, settings)?.sink else {
            bail!("relay.toml is made for another sink");
        };
        settings.properties.clone_from(&self.properties);
        settings
            .default_producer()
            .create()
            .context("make a producer")
    }
}

/// Deleted by [`Topics::delete`] only: a run that fails leaves that to the end of the bench.
pub struct Topics {
    pub names: Vec<String>,
    partitions: i32,
    cluster: Cluster,
    watch: RefCell<BaseConsumer>,
}

impl Topics {
    /// Creates them, with the broker's clock as the time of a record.
    pub async fn create(
        cluster: &Cluster,
        names: Vec<String>,
        partitions: i32,
    ) -> Result<Self, Error> {
        let admin = cluster.admin()?;
        let new: Vec<NewTopic<'_>> = names
            .iter()
            .map(|name| {
                NewTopic::new(name, partitions, TopicReplication::Fixed(-1))
                    .set("message.timestamp.type", "LogAppendTime")
                    .set("max.message.bytes", RECORD_BYTES_MAX)
            })
            .collect();
        let options = AdminOptions::new().operation_timeout(Some(ANSWER_MAX));
        for created in admin.create_topics(&new, &options).await? {
            created.map_err(|(topic, code)| {
                anyhow::anyhow!("{code}").context(format!("create topic {topic}"))
            })?;
        }
        let topics = Self {
            names,
            partitions,
            cluster: cluster.clone(),
            watch: RefCell::new(cluster.consumer()?),
        };
        topics.await_leaders().await?;
        Ok(topics)
    }

    /// Those of one aggregate type, for reading.
    pub fn only(&self, aggregate_type: &str) -> Result<Self, Error> {
        let ending = format!(".{aggregate_type}");
        let names = self.names.iter().filter(|name| name.ends_with(&ending));
        Ok(Self {
            names: names.cloned().collect(),
            partitions: self.partitions,
            cluster: self.cluster.clone(),
            watch: RefCell::new(self.cluster.consumer()?),
        })
    }

    /// A partition without a leader would cost the first of them who writes to it.
    async fn await_leaders(&self) -> Result<(), Error> {
        let began = Instant::now();
        loop {
            match self.records() {
                Ok(_) => return Ok(()),
                Err(error) if began.elapsed() > ANSWER_MAX => return Err(error),
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    pub async fn delete(self) -> Result<(), Error> {
        delete(&self.cluster, &self.names).await
    }

    fn list(&self, offset: Offset) -> Result<TopicPartitionList, KafkaError> {
        let mut list = TopicPartitionList::new();
        for name in &self.names {
            for partition in 0..self.partitions {
                list.add_partition_offset(name, partition, offset)?;
            }
        }
        Ok(list)
    }

    /// How many records have been appended, marks of transactions included: one question to each broker.
    pub fn records(&self) -> Result<i64, Error> {
        let list = self.list(Offset::End)?;
        let asked = self.watch.borrow().offsets_for_times(list, ANSWER_MAX);
        if asked.is_err() {
            // One that was told of a cluster without brokers never answers again (confluentinc/librdkafka#5301).
            self.watch.replace(self.cluster.consumer()?);
        }
        let ends = asked.context("ask for the ends of partitions")?;
        let mut records = 0;
        for end in ends.elements() {
            end.error()?;
            match end.offset() {
                Offset::Offset(offset) => records += offset,
                other => bail!("the end of {} is {other:?}", end.topic()),
            }
        }
        Ok(records)
    }

    /// Reads everything and hands each record to `each`.
    pub fn read(
        &self,
        mut each: impl FnMut(&BorrowedMessage<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let consumer = self.cluster.consumer()?;
        consumer.assign(&self.list(Offset::Beginning)?)?;
        let partitions = usize::try_from(self.partitions)?;
        let (mut ended, mut heard) = (0, Instant::now());
        while ended < partitions * self.names.len() {
            match consumer.poll(Duration::from_millis(100)) {
                Some(Ok(message)) => {
                    heard = Instant::now();
                    each(&message)?;
                }
                // Nobody writes any more.
                Some(Err(KafkaError::PartitionEOF(_))) => ended += 1,
                Some(Err(error)) => return Err(error).context("read the topics"),
                None => ensure!(heard.elapsed() < SILENCE_MAX, "the topics can't be read"),
            }
        }
        Ok(())
    }

    /// Reads everything that a relay has written.
    pub fn found(&self) -> Result<Found, Error> {
        let mut found = Found::default();
        self.read(|message| {
            let at_ms = message.timestamp().to_millis().unwrap_or_default();
            found.event(message.topic(), message.key(), sequence(message)?, at_ms)
        })?;
        Ok(found)
    }

    /// Reads everything that a bare loop without headers has written: its records carry no sequence.
    pub fn counted(&self) -> Result<Found, Error> {
        let mut found = Found::default();
        self.read(|message| {
            found.record(message.timestamp().to_millis().unwrap_or_default());
            Ok(())
        })?;
        Ok(found)
    }
}

pub async fn delete(cluster: &Cluster, names: &[String]) -> Result<(), Error> {
    let admin = cluster.admin()?;
    let existing: BTreeSet<String> = admin
        .inner()
        .fetch_metadata(None, ANSWER_MAX)?
        .topics()
        .iter()
        .map(|topic| topic.name().to_owned())
        .collect();
    // With the positions of an exactly-once relay.
    let names: Vec<&str> = existing
        .iter()
        .filter(|topic| names.iter().any(|name| topic.starts_with(&name[..])))
        .map(String::as_str)
        .collect();
    if !names.is_empty() {
        admin.delete_topics(&names, &AdminOptions::new()).await?;
    }
    Ok(())
}

fn sequence(message: &BorrowedMessage<'_>) -> Result<i64, Error> {
    let headers = message.headers().context("a record without headers")?;
    let sequence = headers
        .iter()
        .find(|header| header.key == "sequence")
        .and_then(|header| header.value)
        .context("a record without its sequence")?;
    Ok(std::str::from_utf8(sequence)?.parse()?)
}

/// Produces one record and waits for it.
pub fn produce_one(cluster: &Cluster, topic: &str, key: &str) -> Result<(), Error> {
    let producer: ThreadedProducer<DefaultProducerContext> = cluster.producer(COMPRESSION)?;
    producer
        .send(BaseRecord::to(topic).key(key).payload("{}"))
        .map_err(|(error, _)| error)?;
    producer.flush(ANSWER_MAX)?;
    Ok(())
}
