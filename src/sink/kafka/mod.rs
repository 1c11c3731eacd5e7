//! Publishes to Apache Kafka through librdkafka. (source → order → route → encode → *sink*)
//!
//! Never retries a record behind the loop's back, never waits in the hand-over, and never turns an outage into a
//! rejection: with no message timeout librdkafka itself retries for ever, in order.

mod asker;
mod check;
mod expired;
mod life;
mod partition;
mod polled;
mod properties;
mod settings;
mod topic;
mod transaction;
mod trouble;

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::future::ready;

use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::KafkaError;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::BaseRecord;

use self::expired::Expired;
use self::life::Life;
use self::partition::Partitions;
pub use self::partition::partition_of;
pub use self::settings::{Delivery, Sasl, Settings, Tls, Topics};
pub use self::topic::Found;
use self::topic::{ASKS_MAX, ASKS_OF_ABSENT_MAX, MESSAGE_BYTES_DEFAULT, Topic};
pub use self::transaction::positions_topic;
use super::{Known, LookUp, NotPrepared, Receipt, Refused, Sink, SinkError};
use crate::event::{Record, Rejection, Seq};
use crate::position::Position;

/// A Kafka cluster.
pub struct KafkaSink {
    settings: Settings,
    /// What the files said of which the producer was made, as a hash.
    made_of: u64,
    life: Option<Life>,
    /// What is known of topics outlives a life; which of their partitions know the producer does not.
    topics: HashMap<String, (Topic, Option<Partitions>)>,
    /// How many were made.
    created: usize,
    /// One of them, of this life or one before: for questions that any answer would do for. Without a name the brokers would
    /// tell of all topics that there are.
    familiar: Option<String>,
    /// Topics that a life before was not allowed to write to. That shows only when a record is refused, which ends a life
    /// and takes other records along.
    denied: BTreeSet<String>,
    /// Topics that were not there when they were last asked for.
    absent: BTreeSet<String>,
    expired: Expired,
    /// Batches must fit the smallest topic: a broker refuses a batch as a whole.
    batch_bytes: usize,
}

impl fmt::Debug for KafkaSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KafkaSink")
            .field("brokers", &self.settings.brokers)
            .finish_non_exhaustive()
    }
}

impl KafkaSink {
    /// A sink that connects when it is opened.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            made_of: 0,
            life: None,
            topics: HashMap::new(),
            created: 0,
            familiar: None,
            denied: BTreeSet::new(),
            absent: BTreeSet::new(),
            expired: Expired::default(),
            batch_bytes: MESSAGE_BYTES_DEFAULT,
        }
    }
}

impl Sink for KafkaSink {
    async fn open(&mut self) -> Result<(), SinkError> {
        self.close().await;
        for (_, partitions) in self.topics.values_mut() {
            *partitions = None;
        }
        // Before they are read: what changes meanwhile is seen later.
        self.made_of = self.settings.fingerprint();
        self.settings = self.settings.current()?;
        let config = self.settings.producer(self.batch_bytes);
        self.life = Some(Life::begin(&config, self.settings.exactly_once())?);
        Ok(())
    }

    async fn close(&mut self) {
        if let Some(life) = self.life.take() {
            let (denied, lost) = life.end().await;
            for name in denied.iter().chain(&lost) {
                self.topics.remove(name);
            }
            self.denied.extend(denied);
        }
    }

    async fn resume(&mut self, log: &str) -> Result<Option<Position>, SinkError> {
        let life = self.life.as_mut().ok_or_else(not_open)?;
        let resumed = life.resume(&self.settings, log).await;
        resumed.map_err(|SinkError(why)| SinkError(life.with_trouble(why)))
    }

    fn commit(&mut self, position: &Position) {
        if let Some(life) = &mut self.life {
            life.commit(position);
        }
    }

    async fn check(&mut self) -> Result<(), SinkError> {
        let life = self.life.as_ref().ok_or_else(not_open)?;
        // The answer comes from any broker that is reached.
        let answer = life.metadata(self.familiar.as_deref()).await;
        let trouble = life.trouble.borrow().clone();
        match answer {
            Ok(()) => {
                life.trouble.send_replace(None);
                Ok(())
            }
            Err(error) => Err(SinkError(trouble.unwrap_or_else(|| {
                let why = trouble::answer(&error);
                format!("no answer from Kafka at {}: {why}", self.settings.brokers)
            }))),
        }
    }

    /// A librdkafka that was told of a cluster without brokers forgets all that it knew, and connects to nobody any more
    /// (2.10 to 2.13, <https://github.com/confluentinc/librdkafka/issues/5301>). A broker tells that as long as the
    /// controller has fenced all of them, such as after a pause of the machine.
    async fn is_cut_off(&mut self) -> bool {
        let Some(life) = &self.life else {
            return false;
        };
        // The last question gives time to one that was about to connect again by itself.
        let topic = self.familiar.as_deref();
        life.has_nobody(topic).await
            && life::answers_others(&self.settings, topic).await
            && life.has_nobody(topic).await
    }

    fn warnings(&mut self, at_the_end: bool) -> Vec<String> {
        self.expired.warnings(at_the_end)
    }

    /// librdkafka reads its files when a client is made, and logs in with the same password for ever.
    fn outdated(&self) -> Option<String> {
        (self.life.is_some() && self.settings.fingerprint() != self.made_of).then(|| {
            "a file with the password or the certificates for Kafka has changed: connecting anew with its content"
                .to_owned()
        })
    }

    fn look_up(&mut self, names: Vec<String>) -> LookUp {
        let mut answers = Vec::new();
        let mut asked = Vec::new();
        let mut asks_max = ASKS_OF_ABSENT_MAX;
        for name in names {
            if let Some(reason) = self.settings.refuses_topic(&name) {
                answers.push((name, Err(NotPrepared::Rejected(Rejection(reason)))));
            } else if self.denied.remove(&name) {
                // Told once for each life that was refused; the next time it is tried again.
                let lacks = lacks("Write", &format!("topic {name}"));
                answers.push((name, Err(NotPrepared::Rejected(Rejection(lacks)))));
            } else {
                // A broker that has not heard of it yet must not get its events parked; that it is still not there is believed
                // sooner.
                if !self.absent.remove(&name) || self.settings.topics.create {
                    asks_max = ASKS_MAX;
                }
                asked.push(name);
            }
        }
        let Some(life) = self.life.as_ref().filter(|_| !asked.is_empty()) else {
            let not_open = |name| (name, Err(NotPrepared::Unknown(not_open())));
            answers.extend(asked.into_iter().map(not_open));
            return Box::pin(ready(answers));
        };
        let settings = match self.settings.current() {
            Ok(settings) => settings,
            Err(error) => {
                let unread = |name| (name, Err(NotPrepared::Unknown(error.clone())));
                answers.extend(asked.into_iter().map(unread));
                return Box::pin(ready(answers));
            }
        };
        let producer = life.asker();
        let room = self.settings.topics.max.saturating_sub(self.created);
        Box::pin(async move {
            let found = topic::look_up(&settings, asked, asks_max, room).await;
            answers.extend(producer.introduce(found).await);
            answers
        })
    }

    fn learn(&mut self, name: &str, answer: Result<Known, NotPrepared>) -> Result<(), NotPrepared> {
        if matches!(answer, Err(NotPrepared::Rejected(_))) {
            self.topics.remove(name);
            self.absent.insert(name.to_owned());
        }
        let Some(Found { topic, created }) = answer?.0 else {
            return Ok(());
        };
        self.created += usize::from(created);
        self.familiar = Some(name.to_owned());
        let bytes = topic.message_bytes_max;
        // Where it is known already its first records are as well.
        match self.topics.entry(name.to_owned()) {
            Entry::Occupied(mut known) if known.get().0.partitions == topic.partitions => {
                known.get_mut().0 = topic;
            }
            Entry::Occupied(mut known) => *known.get_mut() = (topic, None),
            Entry::Vacant(vacant) => {
                vacant.insert((topic, None));
            }
        }
        if bytes < self.batch_bytes {
            self.batch_bytes = bytes;
            return Err(NotPrepared::Reopen(SinkError(format!(
                "topic {name} takes {bytes} bytes at most: starting again with smaller batches"
            ))));
        }
        Ok(())
    }

    fn doubt(&mut self) {
        for (topic, _) in self.topics.values_mut() {
            topic.doubt();
        }
    }

    fn leaves_behind(&self) -> bool {
        self.settings.exactly_once().is_none()
    }

    fn hand_over(&mut self, seq: Seq, record: &Record<'_>) -> Result<(), Refused> {
        let Some((topic, partitions)) = self.topics.get_mut(&*record.topic) else {
            return Err(Refused::Unprepared);
        };
        let bytes = record.size_bytes();
        if let Err(rejection) = topic.admit(record, bytes) {
            return Err(if topic.is_out_of_date() {
                Refused::Unprepared
            } else {
                Refused::Rejected(rejection)
            });
        }
        let queue_bytes = self.settings.queue_bytes.as_u64();
        if bytes as u64 > queue_bytes {
            return Err(Refused::Rejected(Rejection::new(format!(
                "too large: the record has {bytes} bytes, the queue takes {queue_bytes} (sink.kafka.queue_bytes)"
            ))));
        }
        let Some(life) = &mut self.life else {
            return Err(Refused::Broken(not_open()));
        };
        let partitions =
            *partitions.get_or_insert_with(|| life.first_records.add(topic.partitions));
        let admission = life
            .admit(partitions, record.key.as_deref())
            .map_err(|refused| match refused {
                Refused::Later(partition) => Refused::Later(format!(
                    "topic {}, {partition} takes nothing: its first record of this session is not confirmed (has it a \
                     leader, and enough in-sync replicas?)",
                    record.topic
                )),
                refused => refused,
            })?;
        let mut headers = OwnedHeaders::new_with_capacity(record.headers.len());
        for (key, value) in &record.headers {
            headers = headers.insert(Header {
                key,
                value: value.as_deref(),
            });
        }
        let message = BaseRecord::<[u8], [u8], usize> {
            topic: &record.topic,
            partition: None,
            payload: record.value.as_deref(),
            key: record.key.as_deref(),
            // Librdkafka takes 0 for "not set" and puts in the present.
            timestamp: Some(record.timestamp_ms.max(1)),
            headers: Some(headers),
            delivery_opaque: usize::try_from(seq.0).expect("64-bit platforms only"),
        };
        let handed_over = life.hand_over(message, admission);
        if handed_over.is_ok() && topic.forgets(record) {
            self.expired.count(&record.topic);
        }
        if life.lost.contains(&*record.topic) {
            self.topics.remove(&*record.topic);
        }
        handed_over
    }

    async fn receipts(&mut self, into: &mut Vec<Receipt>) -> Result<(), SinkError> {
        let Some(life) = &mut self.life else {
            return Err(not_open());
        };
        let known = into.len();
        let received = life.receipts(into).await;
        let refused = |receipt: &Receipt| matches!(receipt, Receipt::Rejected(..));
        if into[known..].iter().any(refused) {
            // The limits may have been lowered.
            self.topics.clear();
        }
        received
    }

    fn trouble(&self) -> Option<String> {
        self.life.as_ref()?.trouble.borrow().clone()
    }
}

/// The version of librdkafka.
#[must_use]
pub fn version() -> String {
    rdkafka::util::get_rdkafka_version().1
}

fn not_open() -> SinkError {
    SinkError("the Kafka producer is not open".to_owned())
}

/// A right, as `kafka-acls.sh --operation` calls it, that the brokers want to see.
fn lacks(right: &str, of: &str) -> String {
    format!("the user that the relay logs in as lacks the right {right} on {of}")
}

/// Leaves out the value of a property, which may be a secret.
fn not_set_up(error: KafkaError) -> SinkError {
    let reason = match error {
        KafkaError::ClientConfig(_, reason, name, _) => format!("{reason} ({name})"),
        error => error.to_string(),
    };
    SinkError(format!("set up the Kafka client: {reason}"))
}

fn log_librdkafka(level: RDKafkaLogLevel, facility: &str, message: &str) {
    match level {
        // What it thinks of settings that were chosen here, at every beginning of a life.
        _ if facility == "CONFWARN" => tracing::debug!(facility, "librdkafka: {message}"),
        // What librdkafka calls an error, such as a refused connection, mends itself: the pipeline's state is what counts.
        RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical => {
            tracing::warn!(facility, "librdkafka: {message}");
        }
        RDKafkaLogLevel::Error | RDKafkaLogLevel::Warning => {
            tracing::info!(facility, "librdkafka: {message}");
        }
        _ => tracing::debug!(facility, "librdkafka: {message}"),
    }
}
