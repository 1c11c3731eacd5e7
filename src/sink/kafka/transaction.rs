//! Exactly-once: the records of a batch and the position behind it in one Kafka transaction.
//!
//! A transactional id belongs to one pipeline of one outbox. Whoever initialises it fences the owner before, and what that
//! one left open is aborted or completed; after that the last committed position is what it is. It stands in a compacted
//! topic with one partition that nobody else writes to, so that no other transaction hides it.

use std::collections::BTreeMap;
use std::thread::{sleep, yield_now};
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::message::Message;
use rdkafka::producer::Producer;
use rdkafka::{Offset, TopicPartitionList};
use serde::{Deserialize, Serialize};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::Instant;

use super::life::KafkaProducer;
use super::topic;
use super::{NotPrepared, Settings, SinkError, Topics, lacks};
use crate::crash;
use crate::event::{Rejection, Seq};
use crate::position::Position;

/// For initialising and for committing; both wait for brokers.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// For reading the position back.
const READ_MAX: Duration = Duration::from_secs(15);
/// For a polite end of a transaction whose life is over.
const ABORT_MAX: Duration = Duration::from_secs(1);
/// While records arrive the loop hears of it about so often. It calls a sink stalled that says nothing for three seconds.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);
/// The number that the record with the position has among those of a life.
pub(super) const POSITION: Seq = Seq(u64::MAX);

/// The transactions of one life, one after the other.
pub(super) struct Transactions {
    id: String,
    /// The name of the log that positions belong to; none before the life is resumed.
    log: Option<String>,
    state: State,
    /// Confirmed by brokers, and visible to nobody before the commit.
    arrived: Vec<Seq>,
    /// When the transaction began, or gave the last sign of life.
    told_at: Instant,
}

enum State {
    /// No transaction is open.
    Idle,
    Open,
    /// Nothing more is taken; the record with the position waits for room, if there is one.
    Closing(Option<String>),
    Committing(JoinHandle<Result<(), KafkaError>>),
}

/// What the record of a position holds.
#[derive(Serialize, Deserialize)]
struct Committed {
    log: String,
    position: Position,
}

/// The topic that holds the positions of a transactional id.
#[must_use]
pub fn positions_topic(transactional_id: &str) -> String {
    format!("{transactional_id}.positions")
}

impl Transactions {
    pub(super) fn new(id: String) -> Self {
        Self {
            id,
            log: None,
            state: State::Idle,
            arrived: Vec::new(),
            told_at: Instant::now(),
        }
    }

    pub(super) fn resumed(&mut self, log: &str) {
        self.log = Some(log.to_owned());
    }

    /// Makes sure that a transaction is open; false while one is being committed.
    pub(super) fn admit(&mut self, producer: &KafkaProducer) -> Result<bool, SinkError> {
        match self.state {
            State::Idle if self.log.is_none() => Err(SinkError(
                "the transactional id is not initialised".to_owned(),
            )),
            State::Idle => {
                crash::point("before_begin");
                // Answered by librdkafka itself.
                producer.begin_transaction().map_err(|error| {
                    SinkError(format!("begin a transaction: {}", self.reason(&error)))
                })?;
                crash::point("after_begin");
                self.state = State::Open;
                self.told_at = Instant::now();
                Ok(true)
            }
            State::Open => Ok(true),
            State::Closing(_) | State::Committing(_) => Ok(false),
        }
    }

    pub(super) fn arrived(&mut self, seq: Seq) {
        if seq != POSITION {
            self.arrived.push(seq);
        }
    }

    /// Whether it is time for a sign of life; asked when a record has just arrived.
    pub(super) fn gives_sign(&mut self) -> bool {
        let now = Instant::now();
        let due = now >= self.told_at + SIGN_OF_LIFE;
        if due {
            self.told_at = now;
        }
        due
    }

    /// Takes nothing more until the transaction is committed with this position.
    pub(super) fn close(&mut self, position: &Position) {
        if !matches!(self.state, State::Open) {
            return;
        }
        let committed = Committed {
            log: self.log.clone().unwrap_or_default(),
            position: position.clone(),
        };
        let text = serde_json::to_string(&committed).expect("texts and numbers are JSON");
        self.state = State::Closing(Some(text));
    }

    /// The record with the position while it has to be sent: topic, key and value.
    pub(super) fn position_to_send(&self) -> Option<(String, &str, &str)> {
        match &self.state {
            State::Closing(Some(text)) => Some((positions_topic(&self.id), &self.id, text)),
            _ => None,
        }
    }

    pub(super) fn position_is_sent(&mut self) {
        self.state = State::Closing(None);
    }

    /// Begins to commit once everything has arrived.
    pub(super) fn everything_arrived(&mut self, producer: &KafkaProducer) {
        if !matches!(self.state, State::Closing(None)) {
            return;
        }
        crash::point("before_commit");
        let producer = producer.clone();
        self.state = State::Committing(spawn_blocking(move || commit(&producer)));
    }

    pub(super) fn is_committing(&self) -> bool {
        matches!(self.state, State::Committing(_))
    }

    /// Waits for the end of a commit, and appends what is delivered with it.
    ///
    /// # Cancel safety
    /// Safe: the commit goes on.
    ///
    /// # Errors
    /// When it is unknown whether it was committed; the next life reads that back.
    pub(super) async fn committed(&mut self) -> Result<Vec<Seq>, SinkError> {
        let State::Committing(commit) = &mut self.state else {
            return std::future::pending().await;
        };
        let ended = commit.await.unwrap_or(Err(KafkaError::Canceled));
        ended.map_err(|error| SinkError(format!("commit: {}", self.reason(&error))))?;
        crash::point("after_commit");
        self.state = State::Idle;
        Ok(std::mem::take(&mut self.arrived))
    }

    fn reason(&self, error: &KafkaError) -> String {
        let fenced = matches!(error, KafkaError::Transaction(error)
            if matches!(error.code(), Code::Fenced | Code::ProducerFenced | Code::InvalidProducerEpoch));
        if fenced {
            format!(
                "{error}: another relay has taken over transactional id {} (is it used for another outbox too?)",
                self.id
            )
        } else {
            error.to_string()
        }
    }

    pub(super) fn takes_records(&self) -> bool {
        matches!(self.state, State::Open)
    }

    /// Whether something would stay open, and keep consumers waiting, until the broker's patience ends.
    pub(super) fn is_open(&self) -> bool {
        matches!(self.state, State::Open | State::Closing(_))
    }
}

/// Takes back what nobody will commit any more.
pub(super) fn abort(producer: &KafkaProducer) {
    if let Err(error) = producer.abort_transaction(ABORT_MAX) {
        // The next owner does it, or the broker after its timeout.
        tracing::debug!(%error, "could not abort the transaction");
    }
}

/// Waits in the calls of librdkafka.
fn commit(producer: &KafkaProducer) -> Result<(), KafkaError> {
    // What has arrived counts as outstanding until librdkafka has heard that we know. The binding would flush, and does so
    // by waiting 100 ms for nothing.
    let began = Instant::now();
    while producer.in_flight_count() > 0 && began.elapsed() < ANSWER_MAX {
        yield_now();
        if began.elapsed() > Duration::from_millis(1) {
            sleep(Duration::from_micros(100));
        }
    }
    producer.commit_transaction(ANSWER_MAX)
}

/// Fences whoever used the transactional id before, and reads the last committed position of this log.
pub(super) async fn resume(
    producer: &KafkaProducer,
    settings: &Settings,
    id: &str,
    log: &str,
) -> Result<Option<Position>, SinkError> {
    let topic = positions_topic(id);
    let mut of_topic = settings.clone();
    let config = [
        ("cleanup.policy", "compact"),
        // Only closed segments are compacted.
        ("segment.bytes", "16777216"),
    ];
    of_topic.topics = Topics {
        partitions: 1,
        config: config
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into_iter()
            .collect::<BTreeMap<_, _>>(),
        ..of_topic.topics
    };
    match topic::find_or_create(&of_topic, &topic).await {
        Ok(_) => {}
        Err(NotPrepared::Unknown(error) | NotPrepared::Reopen(error)) => return Err(error),
        Err(NotPrepared::Rejected(Rejection(reason))) => return Err(SinkError(reason)),
    }
    let (producer, config) = (producer.clone(), settings.reader(id));
    let (id, log) = (id.to_owned(), log.to_owned());
    let asked = spawn_blocking(move || {
        producer
            .init_transactions(ANSWER_MAX)
            .map_err(|error| SinkError(not_initialised(&id, &error)))?;
        // Else it would ask when the first position waits for the answer.
        producer
            .client()
            .fetch_metadata(Some(&topic), READ_MAX)
            .map_err(|error| SinkError(format!("ask about topic {topic}: {error}")))?;
        let unread = |error| SinkError(format!("read the position in topic {topic}: {error}"));
        let consumer: BaseConsumer = config.create().map_err(unread)?;
        let last = last_record(&consumer, &topic).map_err(unread)?;
        let committed = match last {
            Some(Last { key, .. }) if key.as_deref() != Some(id.as_bytes()) => {
                tracing::error!(
                    topic,
                    "the last record in the topic of the positions has another key than the transactional id: a relay did \
                     not write it; it is ignored, and the relay goes on from the cursor in the database"
                );
                None
            }
            Some(Last { value, .. }) => position_of(&value.unwrap_or_default(), &log, &topic),
            None => None,
        };
        Ok((consumer, committed))
    });
    let (consumer, committed) = asked
        .await
        .unwrap_or_else(|error| Err(SinkError(error.to_string())))?;
    // Its end takes up to 150 ms.
    spawn_blocking(move || drop(consumer));
    Ok(committed)
}

fn not_initialised(id: &str, error: &KafkaError) -> String {
    let refused = matches!(error, KafkaError::Transaction(error)
        if error.code() == Code::TransactionalIdAuthorizationFailed);
    let lacks = if refused {
        format!(": {}", lacks("Describe or Write", "it"))
    } else {
        String::new()
    };
    format!("initialise transactional id {id}{lacks}: {error}")
}

/// The position of this log; that of another one means nothing here.
fn position_of(value: &[u8], log: &str, topic: &str) -> Option<Position> {
    match serde_json::from_slice::<Committed>(value) {
        Ok(committed) if committed.log == log => Some(committed.position),
        Ok(_) => {
            tracing::info!(
                topic,
                "the committed position is of another database or cursor"
            );
            None
        }
        Err(error) => {
            tracing::warn!(topic, %error, "not a position");
            None
        }
    }
}

/// A record in the topic of the positions.
struct Last {
    key: Option<Vec<u8>>,
    value: Option<Vec<u8>>,
}

/// The last committed record of a topic with one partition. Behind it may be many that were aborted.
fn last_record(consumer: &BaseConsumer, topic: &str) -> Result<Option<Last>, KafkaError> {
    let (low, high) = consumer.fetch_watermarks(topic, 0, READ_MAX)?;
    let mut back = 10;
    loop {
        let from = low.max(high - back);
        let last = last_from(consumer, topic, from)?;
        if last.is_some() || from == low {
            return Ok(last);
        }
        back *= 10;
    }
}

fn last_from(consumer: &BaseConsumer, topic: &str, from: i64) -> Result<Option<Last>, KafkaError> {
    let mut assignment = TopicPartitionList::new();
    assignment.add_partition_offset(topic, 0, Offset::Offset(from))?;
    consumer.assign(&assignment)?;
    let (mut last, deadline) = (None, Instant::now() + READ_MAX);
    while Instant::now() < deadline {
        match consumer.poll(Duration::from_millis(100)) {
            None => {}
            Some(Ok(record)) => {
                last = Some(Last {
                    key: record.key().map(<[u8]>::to_vec),
                    value: record.payload().map(<[u8]>::to_vec),
                });
            }
            Some(Err(KafkaError::PartitionEOF(_))) => return Ok(last),
            // Passes, or the deadline does.
            Some(Err(error)) => tracing::debug!(%error, "while the position is read"),
        }
    }
    Err(KafkaError::MessageConsumption(Code::OperationTimedOut))
}
