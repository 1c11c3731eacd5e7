//! Reads the topics: a plain consumer without a group's offsets, from the earliest record, `read_committed`.

use std::collections::BTreeSet;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Error, anyhow, bail};
use rdkafka::admin::{AdminClient, AdminOptions, ResourceSpecifier};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::message::{BorrowedMessage, Headers, Message};
use rdkafka::topic_partition_list::TopicPartitionListElem;
use rdkafka::{Offset, TopicPartitionList};

use super::judge::{Judge, Partition, Topic};

/// For one answer.
const ANSWER_MAX: Duration = Duration::from_secs(15);
/// Brokers that send nothing for so long have a problem.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// A question that is answered with an error is asked again so often.
const ASKED_MAX: usize = 100;
const POLL: Duration = Duration::from_millis(100);
/// Records between two signs of life.
const STEP: u64 = 10_000;

/// A consumer of a cluster. Its calls wait: not for tasks that must not.
pub(super) struct Cluster {
    consumer: BaseConsumer,
}

impl Cluster {
    pub(super) fn new(mut client: ClientConfig) -> Result<Self, Error> {
        client
            // Asked for by librdkafka; nothing is committed and nobody else is in it.
            .set("group.id", "outbox-relay-verify")
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("auto.offset.reset", "earliest")
            .set("isolation.level", "read_committed")
            .set("enable.partition.eof", "true")
            .set("queued.max.messages.kbytes", "16384");
        let consumer = client.create().context("make a Kafka consumer")?;
        Ok(Self { consumer })
    }

    /// Those of the topics that exist, with what is in them now; with a time, in milliseconds since the Unix epoch, only
    /// what is from then on or younger.
    pub(super) fn topics(
        &self,
        wanted: &BTreeSet<String>,
        since_ms: Option<i64>,
    ) -> Result<Vec<Topic>, Error> {
        let metadata = self.consumer.fetch_metadata(None, ANSWER_MAX);
        let metadata = metadata.context("ask Kafka for its topics")?;
        let existing = metadata
            .topics()
            .iter()
            .filter(|topic| wanted.contains(topic.name()));
        let mut topics = Vec::new();
        for topic in existing {
            let name = topic.name();
            let partitions = (0..).zip(topic.partitions());
            let partitions = partitions
                .map(|(number, _)| self.partition(name, number, since_ms))
                .collect::<Result<_, _>>()
                .with_context(|| format!("ask Kafka what is in topic {name}"))?;
            topics.push(Topic {
                name: name.to_owned(),
                compacted: false,
                partitions,
            });
        }
        Ok(topics)
    }

    /// A broker that has just come back does not lead all its partitions yet.
    fn partition(
        &self,
        topic: &str,
        number: i32,
        since_ms: Option<i64>,
    ) -> Result<Partition, KafkaError> {
        let mut asked = 0;
        loop {
            match self.ask_partition(topic, number, since_ms) {
                Err(error)
                    if asked < ASKED_MAX
                        && error.rdkafka_error_code() != Some(Code::OperationTimedOut) =>
                {
                    sleep(POLL);
                }
                answer => return answer,
            }
            asked += 1;
        }
    }

    fn ask_partition(
        &self,
        topic: &str,
        number: i32,
        since_ms: Option<i64>,
    ) -> Result<Partition, KafkaError> {
        let (low, end) = self.consumer.fetch_watermarks(topic, number, ANSWER_MAX)?;
        let mut start = low;
        if let Some(ms) = since_ms {
            let mut times = TopicPartitionList::new();
            times.add_partition_offset(topic, number, Offset::Offset(ms))?;
            let found = self.consumer.offsets_for_times(times, ANSWER_MAX)?;
            let found = found.elements().first().map(TopicPartitionListElem::offset);
            start = match found {
                Some(Offset::Offset(offset)) => offset.max(low),
                // Nothing is that young.
                _ => end,
            };
        }
        Ok(Partition {
            start,
            end,
            truncated: low > 0 && start == low,
        })
    }

    /// Hands every record to the judge, topic by topic; `step` is told of each ten thousand, and of the end.
    pub(super) fn read(
        &self,
        topics: &[Topic],
        judge: &mut Judge,
        step: impl Fn(u64, bool),
    ) -> Result<(), Error> {
        let mut records = 0;
        for (index, topic) in topics.iter().enumerate() {
            self.read_topic(topic, |partition, message| {
                let headers = message.headers();
                let header = |name: &str| {
                    let headers = headers?;
                    headers.iter().find(|header| header.key == name)?.value
                };
                let seen = judge.recognise(header, message.key(), message.payload());
                judge.record(index, partition, message.offset(), &seen);
                records += 1;
                if records % STEP == 0 {
                    step(records, false);
                }
            })
            .with_context(|| format!("read topic {}", topic.name))?;
        }
        step(records, true);
        Ok(())
    }

    fn read_topic(
        &self,
        topic: &Topic,
        mut each: impl FnMut(i32, &BorrowedMessage<'_>),
    ) -> Result<(), Error> {
        let mut assignment = TopicPartitionList::new();
        let mut left = BTreeSet::new();
        for (number, partition) in (0..).zip(&topic.partitions) {
            if partition.start < partition.end {
                assignment.add_partition_offset(
                    &topic.name,
                    number,
                    Offset::Offset(partition.start),
                )?;
                left.insert(number);
            }
        }
        self.consumer.assign(&assignment)?;
        let (mut silent, mut trouble) = (Duration::ZERO, None);
        while !left.is_empty() {
            match self.consumer.poll(POLL) {
                Some(Ok(message)) => {
                    silent = Duration::ZERO;
                    let number = message.partition();
                    let end = end_of(topic, number);
                    if message.offset() < end {
                        each(number, &message);
                    }
                    if message.offset() + 1 >= end {
                        left.remove(&number);
                    }
                }
                // Also the end: what follows the last record may be a mark of a transaction.
                Some(Err(KafkaError::PartitionEOF(number))) => {
                    left.remove(&number);
                }
                // The next answer may be better. Nobody needs the group.
                Some(Err(error)) => {
                    if error.rdkafka_error_code() != Some(Code::GroupAuthorizationFailed) {
                        trouble = Some(error);
                    }
                }
                None => {
                    silent += POLL;
                    if silent >= SILENCE_MAX {
                        let error = trouble.map_or_else(|| anyhow!("no answer"), Error::from);
                        return Err(
                            error.context(format!("nothing for {} s", SILENCE_MAX.as_secs()))
                        );
                    }
                }
            }
        }
        self.consumer.unassign()?;
        Ok(())
    }
}

fn end_of(topic: &Topic, number: i32) -> i64 {
    let number = usize::try_from(number).unwrap_or(usize::MAX);
    topic
        .partitions
        .get(number)
        .map_or(0, |partition| partition.end)
}

/// Finds out which topics are compacted.
///
/// # Errors
/// When the cluster does not say: describing settings is a right of its own.
pub(super) async fn mark_compacted(
    client: &ClientConfig,
    topics: &mut [Topic],
) -> Result<(), Error> {
    if topics.is_empty() {
        return Ok(());
    }
    let admin: AdminClient<DefaultClientContext> = client.create()?;
    let wanted: Vec<ResourceSpecifier<'_>> = topics
        .iter()
        .map(|topic| ResourceSpecifier::Topic(&topic.name))
        .collect();
    let options = AdminOptions::new().request_timeout(Some(ANSWER_MAX));
    let described = admin.describe_configs(&wanted, &options).await?;
    if described.len() != topics.len() {
        bail!(
            "Kafka describes {} of {} topics",
            described.len(),
            topics.len()
        );
    }
    for (topic, described) in topics.iter_mut().zip(described) {
        let described = described.map_err(KafkaError::AdminOp)?;
        let policy = described
            .get("cleanup.policy")
            .and_then(|entry| entry.value.as_deref());
        topic.compacted = policy.is_some_and(|policy| policy.contains("compact"));
    }
    Ok(())
}
