//! The demo's broker, embedded or real, and the consumer that reads from it what anybody would read.
//!
//! Knows nothing of how the relay publishes; it shares the connection's settings with it and no more.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::{Client, DefaultClientContext};
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::message::{BorrowedMessage, Headers, Message};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::DefaultProducerContext;
use rdkafka::{ClientContext, Offset, TopicPartitionList};
use tokio::sync::{mpsc, watch};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use super::Happening;
use super::checker::{Fingerprint, Seen};
use super::shop::{Entity, Kind};
use crate::sink::kafka::Settings;

const PARTITIONS: i32 = 8;
const ANSWER_MAX: Duration = Duration::from_secs(10);
const REACH_MAX: Duration = Duration::from_secs(5);

/// Where the records go.
pub(super) enum Broker {
    /// librdkafka's mock cluster, in this process; it speaks the protocol on a port of the loopback interface.
    Embedded(MockCluster<'static, DefaultProducerContext>),
    /// Somebody's cluster.
    Real {
        topics: Topics,
        /// Whether the topics may be there.
        begun: bool,
    },
}

/// The demo's topics: the name of the kind behind a prefix.
#[derive(Clone, Debug)]
pub(super) struct Topics {
    prefix: String,
}

impl Topics {
    fn embedded() -> Self {
        Self {
            prefix: String::new(),
        }
    }

    fn names(&self) -> [String; 3] {
        Kind::ALL.map(|kind| format!("{}{}", self.prefix, kind.name()))
    }

    fn kind(&self, topic: &str) -> Option<Kind> {
        let name = topic.strip_prefix(&self.prefix)?;
        Kind::ALL.into_iter().find(|kind| kind.name() == name)
    }

    fn partitions(&self, offset: Offset) -> Result<TopicPartitionList, KafkaError> {
        let mut partitions = TopicPartitionList::new();
        for topic in self.names() {
            partitions.add_partition_range(&topic, 0, PARTITIONS - 1);
        }
        partitions.set_all_offsets(offset)?;
        Ok(partitions)
    }

    /// For the relay's pipeline.
    pub(super) fn template(&self) -> String {
        format!("{}{{aggregate_type}}", self.prefix)
    }
}

impl Broker {
    /// Starts one inside this process, with its topics.
    pub(super) fn embedded() -> Result<Self> {
        let cluster = MockCluster::new(1).context("start the embedded broker")?;
        for topic in Topics::embedded().names() {
            cluster
                .create_topic(&topic, PARTITIONS, 1)
                .context("create a topic of the embedded broker")?;
        }
        Ok(Self::Embedded(cluster))
    }

    /// Nothing is on the cluster before [`create`](Self::create).
    pub(super) fn real(random: &str) -> Self {
        Self::Real {
            topics: Topics {
                prefix: format!("demo-{random}-"),
            },
            begun: false,
        }
    }

    pub(super) fn topics(&self) -> Topics {
        match self {
            Self::Embedded(_) => Topics::embedded(),
            Self::Real { topics, .. } => topics.clone(),
        }
    }

    /// How to reach it, where it decides that itself.
    pub(super) fn address(&self) -> Option<String> {
        match self {
            Self::Embedded(cluster) => Some(cluster.bootstrap_servers()),
            Self::Real { .. } => None,
        }
    }

    /// Creates the topics on a real cluster.
    pub(super) async fn create(&mut self, settings: &Settings) -> Result<()> {
        let Self::Real { topics, begun } = self else {
            return Ok(());
        };
        let admin = admin(settings)?;
        let admin = Arc::new(admin);
        let asked = admin.clone();
        spawn_blocking(move || asked.inner().fetch_metadata(None, REACH_MAX).map(drop))
            .await?
            .map_err(|error| {
                anyhow!(
                    "no answer from Kafka at {}: {}",
                    settings.brokers,
                    plain(&error)
                )
            })?;
        let names = topics.names();
        // As many replicas as the cluster thinks right.
        let new = names
            .each_ref()
            .map(|name| NewTopic::new(name, PARTITIONS, TopicReplication::Fixed(-1)));
        *begun = true;
        let created = admin
            .create_topics(&new, &options())
            .await
            .map_err(|error| anyhow!("create the demo's topics: {}", plain(&error)))?;
        for created in created {
            if let Err((topic, code)) = created {
                bail!("create topic {topic}: {code}");
            }
        }
        for name in names {
            appeared(&admin, &name).await?;
        }
        Ok(())
    }

    /// Deletes what was created; also right when that was only half done.
    pub(super) async fn remove(self, settings: &Settings) -> Result<()> {
        let Self::Real {
            topics,
            begun: true,
        } = self
        else {
            return Ok(());
        };
        let names = topics.names();
        let deleted = admin(settings)?
            .delete_topics(&names.each_ref().map(String::as_str), &options())
            .await
            .map_err(|error| anyhow!("delete the demo's topics: {}", plain(&error)))?;
        for deleted in deleted {
            match deleted {
                Ok(_) | Err((_, Code::UnknownTopic | Code::UnknownTopicOrPartition)) => {}
                Err((topic, code)) => bail!("delete topic {topic}: {code}"),
            }
        }
        Ok(())
    }

    /// A consumer at the beginning of every partition.
    pub(super) fn consumer(&self, settings: &Settings, random: &str) -> Result<Reader> {
        let mut config = settings.client();
        config
            .set("client.id", "outbox-relay-demo")
            .set("group.id", format!("outbox-relay-demo-{random}"))
            .set("enable.auto.commit", "false")
            .set("enable.partition.eof", "true")
            // The embedded broker answers an empty fetch only after the whole wait, whatever arrives meanwhile; a real
            // one answers nothing else on the connection before.
            .set("fetch.wait.max.ms", "4")
            .set("fetch.error.backoff.ms", "50")
            .set("fetch.queue.backoff.ms", "5");
        let consumer: StreamConsumer = config.create().context("set up the consumer")?;
        let topics = self.topics();
        consumer
            .assign(&topics.partitions(Offset::Beginning)?)
            .context("assign the partitions to the consumer")?;
        Ok(Reader {
            consumer: Arc::new(consumer),
            topics,
        })
    }
}

impl fmt::Display for Broker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedded(_) => f.write_str("embedded Kafka broker"),
            Self::Real { topics, .. } => write!(f, "Kafka {}*", topics.prefix),
        }
    }
}

/// Where the partitions ended when nothing was published any more: by kind and partition.
pub(super) type Ends = [[i64; PARTITIONS as usize]; 3];

/// Reads every partition from its beginning.
#[derive(Clone)]
pub(super) struct Reader {
    consumer: Arc<StreamConsumer>,
    topics: Topics,
}

impl Reader {
    /// Asks the broker where the partitions end.
    pub(super) async fn ends(&self) -> Result<Ends> {
        let Self { consumer, topics } = self.clone();
        let asked = spawn_blocking(move || {
            // What comes at the end of all times: one question for all partitions.
            let latest = topics.partitions(Offset::End)?;
            let found = consumer.offsets_for_times(latest, ANSWER_MAX)?;
            let mut ends = Ends::default();
            for found in found.elements() {
                found.error()?;
                let kind = topics.kind(found.topic());
                let kind = kind.expect("only the demo's topics were asked for");
                let partition = found.partition().unsigned_abs() as usize;
                ends[kind as usize][partition] = found.offset().to_raw().unwrap_or_default();
            }
            Ok(ends)
        });
        asked.await?.map_err(|error: KafkaError| {
            anyhow!("ask for the ends of the topics: {}", plain(&error))
        })
    }

    /// Passes on what it reads, until it has read up to the ends, once they are known. Says so when it has looked into
    /// every partition for the first time.
    pub(super) async fn read(
        self,
        happenings: mpsc::Sender<Happening>,
        ready: watch::Sender<bool>,
        mut ends: watch::Receiver<Option<Ends>>,
    ) -> Result<()> {
        let mut next = Ends::default();
        let mut looked_into = 0;
        loop {
            let end = *ends.borrow_and_update();
            if end.is_some_and(|end| reached(&next, &end)) {
                return Ok(());
            }
            let silence_max = end.map_or(Duration::MAX, |_| ANSWER_MAX);
            let received = tokio::select! {
                received = timeout(silence_max, self.consumer.recv()) => {
                    received.context("the consumer could not read the topics to their ends")?
                }
                _ = ends.changed() => continue,
            };
            match received {
                Ok(message) => {
                    let kind = self.topics.kind(message.topic());
                    let seen = seen(&message, kind);
                    if let Some(kind) = kind {
                        next[kind as usize][usize::try_from(seen.partition)?] = seen.offset + 1;
                    }
                    if happenings
                        .send(Happening::Seen(seen, Instant::now()))
                        .await
                        .is_err()
                    {
                        return Ok(());
                    }
                }
                Err(KafkaError::PartitionEOF(_)) => {
                    // Every partition is empty when it is looked into first.
                    looked_into += 1;
                    ready.send_replace(looked_into >= next.as_flattened().len());
                }
                Err(KafkaError::MessageConsumptionFatal(code)) => bail!("consume: {code}"),
                // An outage; librdkafka goes on by itself.
                Err(_) => sleep(Duration::from_millis(50)).await,
            }
        }
    }
}

fn reached(next: &Ends, ends: &Ends) -> bool {
    let mut pairs = next.as_flattened().iter().zip(ends.as_flattened());
    pairs.all(|(next, end)| next >= end)
}

fn seen(message: &BorrowedMessage<'_>, kind: Option<Kind>) -> Seen {
    let header = |name: &str| -> Option<&str> {
        let headers = message.headers()?;
        let header = headers.iter().find(|header| header.key == name)?;
        std::str::from_utf8(header.value?).ok()
    };
    let number = message
        .key()
        .and_then(|key| std::str::from_utf8(key).ok()?.parse().ok());
    Seen {
        id: header("id").and_then(|id| Uuid::parse_str(id).ok()),
        entity: kind
            .zip(number)
            .map(|(kind, number)| Entity { kind, number }),
        partition: message.partition(),
        offset: message.offset(),
        event_type: header("type").unwrap_or_default().to_owned(),
        payload: Fingerprint::of(message.payload()),
    }
}

fn admin(settings: &Settings) -> Result<AdminClient<DefaultClientContext>> {
    settings
        .client()
        .create()
        .context("set up the Kafka admin client")
}

fn options() -> AdminOptions {
    AdminOptions::new()
        .request_timeout(Some(ANSWER_MAX))
        .operation_timeout(Some(ANSWER_MAX))
}

/// The broker answers a creation before every broker has heard of it.
async fn appeared(admin: &Arc<AdminClient<DefaultClientContext>>, topic: &str) -> Result<()> {
    for _ in 0..100 {
        let (admin, name) = (admin.clone(), topic.to_owned());
        let partitions = spawn_blocking(move || partitions(admin.inner(), &name)).await?;
        if partitions == PARTITIONS.unsigned_abs() as usize {
            return Ok(());
        }
        sleep(Duration::from_millis(50)).await;
    }
    bail!("topic {topic} was created and does not appear")
}

fn partitions<C: ClientContext>(client: &Client<C>, topic: &str) -> usize {
    let answer = client.fetch_metadata(Some(topic), ANSWER_MAX);
    answer.map_or(0, |answer| {
        let partitions = answer.topics().iter().map(|topic| topic.partitions().len());
        partitions.sum()
    })
}

/// The reason without the library's words around it.
fn plain(error: &KafkaError) -> String {
    error
        .rdkafka_error_code()
        .map_or_else(|| error.to_string(), |code| code.to_string())
}
