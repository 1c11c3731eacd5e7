//! One producer, from its creation to its end.
//!
//! librdkafka forgets nothing by itself and never forgives a fatal error, so that a new life needs a new producer.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use rdkafka::client::{Client, ClientContext};
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::message::{DeliveryResult, Message};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer, ProducerContext, PurgeConfig};
use tokio::sync::{mpsc, watch};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout_at};

use super::asker::Asker;
use super::partition::{Admission, FirstRecords, Partitions};
use super::polled::PolledProducer;
use super::transaction::{self, POSITION, Transactions};
use super::trouble;
use super::{Receipt, Refused, Settings, SinkError, lacks, log_librdkafka, not_set_up};
use crate::crash;
use crate::event::{Rejection, Seq};
use crate::position::Position;

/// For one question to a broker.
const ASK_TIMEOUT: Duration = Duration::from_secs(3);

/// How long a dying producer may take to say what became of the rest.
const LAST_WORDS: Duration = Duration::from_secs(1);

pub(super) type KafkaProducer = PolledProducer<Context>;

/// A producer and what it says.
pub(super) struct Life {
    producer: KafkaProducer,
    pub(super) trouble: Arc<watch::Sender<Option<String>>>,
    news: mpsc::UnboundedReceiver<News>,
    received: Vec<News>,
    /// Records handed over about which nothing has been said.
    outstanding: usize,
    /// How many those were when the queue was full.
    full_at: Option<usize>,
    pub(super) first_records: FirstRecords,
    /// Topics that may not be written to.
    denied: BTreeSet<String>,
    /// Topics that are gone.
    pub(super) lost: BTreeSet<String>,
    /// For exactly-once only. What is aborted needs no care for first records.
    transactions: Option<Transactions>,
    /// Set once a record has failed, or everything.
    dying: Option<Dying>,
}

/// What is known while a producer dies.
struct Dying {
    reason: String,
    failed: Vec<(Seq, Code)>,
    until: Instant,
}

/// What librdkafka says.
enum News {
    Delivered(Seq),
    /// With the topic, where that is gone.
    Failed(Seq, Code, Option<String>),
    /// This topic may not be written to.
    Denied(String),
    /// The producer is dead.
    Fatal,
}

/// Runs on librdkafka's polling thread; only passes on what happened.
pub(super) struct Context {
    news: mpsc::UnboundedSender<News>,
    trouble: Arc<watch::Sender<Option<String>>>,
}

impl Context {
    fn tell(&self, news: News) {
        // The receiver is gone when a life has ended: nobody waits for this.
        drop(self.news.send(news));
    }
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        if let Some(topic) = denied(facility, message) {
            self.tell(News::Denied(topic.to_owned()));
        }
        log_librdkafka(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        let code = error.rdkafka_error_code();
        let text = trouble::words(code, reason);
        self.trouble.send_if_modified(|trouble| {
            // That all of them are down says less than why the last one is.
            let known = code == Some(Code::AllBrokersDown) && trouble.is_some();
            if !known {
                *trouble = Some(text);
            }
            !known
        });
        // The others mend themselves, and come by the dozen a second, also while nobody listens.
        if code == Some(Code::Fatal) {
            self.tell(News::Fatal);
        }
    }
}

impl ProducerContext for Context {
    /// A sequence number, carried as a pointer's bits: nothing is allocated per record.
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, opaque: usize) {
        let seq = seq_of(opaque);
        self.tell(match result {
            Ok(_) => News::Delivered(seq),
            Err((error, message)) => {
                let code = error.rdkafka_error_code().unwrap_or(Code::Unknown);
                if code == Code::TopicAuthorizationFailed {
                    self.tell(News::Denied(message.topic().to_owned()));
                }
                // Later complaints must not hide which one it is.
                let lost = of_a_lost_topic(code).then(|| message.topic().to_owned());
                News::Failed(seq, code, lost)
            }
        });
    }
}

fn seq_of(opaque: usize) -> Seq {
    Seq(opaque as u64)
}

impl Life {
    /// A producer that connects by itself.
    pub(super) fn begin(
        config: &ClientConfig,
        transactional_id: Option<&str>,
    ) -> Result<Self, SinkError> {
        let (sender, news) = mpsc::unbounded_channel();
        let trouble = Arc::new(watch::Sender::new(None));
        let context = Context {
            news: sender,
            trouble: trouble.clone(),
        };
        let producer = PolledProducer::create(config, context).map_err(not_set_up)?;
        Ok(Self {
            producer,
            trouble,
            news,
            received: Vec::new(),
            outstanding: 0,
            full_at: None,
            first_records: FirstRecords::new(),
            denied: BTreeSet::new(),
            lost: BTreeSet::new(),
            transactions: transactional_id.map(|id| Transactions::new(id.to_owned())),
            dying: None,
        })
    }

    /// Returns when nothing that is queued will be sent any more, with the topics that it was not allowed to write to, and those
    /// that are gone.
    pub(super) async fn end(self) -> (BTreeSet<String>, BTreeSet<String>) {
        let producer = self.producer;
        let open = self.transactions.is_some_and(|all| all.is_open());
        // All wait for librdkafka's threads, which may be looking a name up.
        let purged = spawn_blocking(move || {
            purge(&producer);
            if open {
                transaction::abort(&producer);
            }
            producer
        });
        if let Ok(producer) = purged.await {
            spawn_blocking(move || drop(producer));
        }
        (self.denied, self.lost)
    }

    /// What a look-up needs of this life.
    pub(super) fn asker(&self) -> Asker {
        Asker {
            producer: self.producer.clone(),
            trouble: self.trouble.clone(),
        }
    }

    /// As [`Sink::resume`](super::Sink::resume).
    pub(super) async fn resume(
        &mut self,
        settings: &Settings,
        log: &str,
    ) -> Result<Option<Position>, SinkError> {
        let (Some(id), Some(transactions)) = (settings.exactly_once(), &mut self.transactions)
        else {
            return Ok(None);
        };
        let committed = transaction::resume(&self.producer, settings, id, log).await?;
        transactions.resumed(log);
        Ok(committed)
    }

    /// As [`Sink::commit`](super::Sink::commit).
    pub(super) fn commit(&mut self, position: &Position) {
        if let Some(transactions) = &mut self.transactions {
            transactions.close(position);
        }
    }

    /// Asks a broker about one topic, or about all there are.
    pub(super) async fn metadata(&self, topic: Option<&str>) -> Result<(), KafkaError> {
        self.asker().metadata(topic).await
    }

    /// Whether there is no broker to which a connection is up, nor comes up for a while. A broker that is only slow to
    /// answer has one.
    pub(super) async fn has_nobody(&self, topic: Option<&str>) -> bool {
        const NOBODY: Code = Code::BrokerTransportFailure;
        matches!(
            self.metadata(topic).await,
            Err(KafkaError::MetadataFetch(NOBODY))
        )
    }

    /// Whether a record may be handed over now.
    pub(super) fn admit(
        &mut self,
        partitions: Partitions,
        key: Option<&[u8]>,
    ) -> Result<Admission, Refused> {
        if let Some(transactions) = &mut self.transactions {
            return match transactions.admit(&self.producer) {
                Ok(true) => Ok(Admission::Free),
                Ok(false) => Err(Refused::Full),
                // The receipts say why.
                Err(_) if self.owes_receipts() => Err(Refused::Full),
                Err(error) => Err(Refused::Broken(error)),
            };
        }
        if self.outstanding == 0 {
            // Else receipts come in, and the time is told with them.
            self.first_records.look_at_the_clock();
        }
        if self.first_records.admit(partitions, key) == Admission::Wait {
            self.first_records.look_at_the_clock();
        }
        match self.first_records.admit(partitions, key) {
            Admission::Wait => Err(Refused::Full),
            Admission::Later(partition) => Err(Refused::Later(format!("partition {partition}"))),
            admission => Ok(admission),
        }
    }

    pub(super) fn hand_over(
        &mut self,
        record: BaseRecord<'_, [u8], [u8], usize>,
        admission: Admission,
    ) -> Result<(), Refused> {
        let seq = seq_of(record.delivery_opaque);
        match self.producer.send(record) {
            Ok(()) => {
                self.outstanding += 1;
                self.first_records.handed_over(seq, admission);
                crash::point("after_produce");
                Ok(())
            }
            Err((KafkaError::MessageProduction(Code::QueueFull), _)) => {
                self.full_at = Some(self.outstanding);
                Err(Refused::Full)
            }
            // The receipts say why.
            Err((KafkaError::MessageProduction(Code::Fatal), _)) if self.owes_receipts() => {
                Err(Refused::Full)
            }
            Err((KafkaError::MessageProduction(code), _)) if refused_for_good(code) => {
                Err(Refused::Rejected(Rejection::new(code.to_string())))
            }
            Err((KafkaError::MessageProduction(code), record)) if of_a_lost_topic(code) => {
                self.lost.insert(record.topic.to_owned());
                let lost = format!("topic {} is gone", record.topic);
                Err(Refused::Broken(SinkError(lost)))
            }
            Err((error, _)) => {
                let reason = fatal(&self.producer);
                let reason = reason.unwrap_or_else(|| self.with_trouble(error.to_string()));
                Err(Refused::Broken(SinkError(reason)))
            }
        }
    }

    fn owes_receipts(&self) -> bool {
        let failed = |dying: &Dying| !dying.failed.is_empty();
        self.outstanding > 0 || self.dying.as_ref().is_some_and(failed)
    }

    /// As [`Sink::receipts`](super::Sink::receipts).
    pub(super) async fn receipts(&mut self, into: &mut Vec<Receipt>) -> Result<(), SinkError> {
        const AT_ONCE: usize = 8192;
        let known = into.len();
        loop {
            if let Some(dying) = &self.dying
                && (self.outstanding == 0 || Instant::now() >= dying.until)
            {
                return self.last_receipts(into);
            }
            if self.dying.is_none() {
                self.close_transaction()?;
            }
            let until = self.dying.as_ref().map(|dying| dying.until);
            let received = self.news.recv_many(&mut self.received, AT_ONCE);
            match (until, &mut self.transactions) {
                (Some(until), _) => drop(timeout_at(until, received).await),
                (None, Some(transactions)) if transactions.is_committing() => {
                    tokio::select! {
                        biased;
                        _ = received => {}
                        committed = transactions.committed() => {
                            into.extend(committed?.into_iter().map(Receipt::Delivered));
                        }
                    }
                }
                (None, _) => drop(received.await),
            }
            let outstanding = self.outstanding;
            self.note(into);
            let sign = self.outstanding < outstanding && self.gives_sign();
            if self.dying.is_none() && (into.len() > known || self.has_room_again() || sign) {
                self.trouble
                    .send_if_modified(|trouble| trouble.take().is_some());
                return Ok(());
            }
        }
    }

    /// Whether a transaction may take more of those for which the queue was full. What has arrived gets its receipt only
    /// with the commit.
    fn has_room_again(&mut self) -> bool {
        let open = |transactions: &Transactions| transactions.takes_records();
        let room = self
            .full_at
            .is_some_and(|outstanding| self.outstanding < outstanding)
            && self.transactions.as_ref().is_some_and(open);
        if room {
            self.full_at = None;
        }
        room
    }

    /// Whether the loop has to hear that a long transaction makes progress, now that records of it have arrived.
    fn gives_sign(&mut self) -> bool {
        let transactions = self.transactions.as_mut();
        transactions.is_some_and(Transactions::gives_sign)
    }

    /// Goes on with the end of a transaction, as far as that is possible now.
    fn close_transaction(&mut self) -> Result<(), SinkError> {
        let Some(transactions) = &mut self.transactions else {
            return Ok(());
        };
        if let Some((topic, key, value)) = transactions.position_to_send() {
            let opaque = usize::try_from(POSITION.0).expect("64-bit platforms only");
            let record = BaseRecord::with_opaque_to(&topic, opaque)
                .key(key.as_bytes())
                .payload(value.as_bytes())
                .partition(0);
            match self.producer.send(record) {
                Ok(()) => {
                    self.outstanding += 1;
                    transactions.position_is_sent();
                }
                // Receipts make room.
                Err((KafkaError::MessageProduction(Code::QueueFull), _))
                    if self.outstanding > 0 => {}
                Err((error, _)) => {
                    return Err(SinkError(format!("write the position: {error}")));
                }
            }
        }
        if self.outstanding == 0 {
            transactions.everything_arrived(&self.producer);
        }
        Ok(())
    }

    fn note(&mut self, into: &mut Vec<Receipt>) {
        self.first_records.look_at_the_clock();
        for news in self.received.drain(..) {
            let (reason, failed) = match news {
                News::Delivered(seq) => {
                    self.outstanding -= 1;
                    match &mut self.transactions {
                        Some(transactions) => transactions.arrived(seq),
                        None => {
                            self.first_records.delivered(seq);
                            into.push(Receipt::Delivered(seq));
                        }
                    }
                    continue;
                }
                News::Failed(seq, code, lost) => {
                    self.outstanding -= 1;
                    let reason = match lost {
                        Some(topic) => {
                            let gone = format!("topic {topic} is gone");
                            self.lost.insert(topic);
                            gone
                        }
                        None => code.to_string(),
                    };
                    (reason, Some((seq, code)))
                }
                News::Denied(topic) => {
                    self.denied.insert(topic);
                    continue;
                }
                // After a fatal error nothing is sent any more, and without a message timeout nothing is said about it.
                News::Fatal => match fatal(&self.producer) {
                    Some(reason) => (reason, None),
                    None => continue,
                },
            };
            let dying = self.dying.get_or_insert_with(|| {
                // Makes it say what became of the rest.
                let producer = self.producer.clone();
                spawn_blocking(move || purge(&producer));
                Dying {
                    reason,
                    failed: Vec::new(),
                    until: Instant::now() + LAST_WORDS,
                }
            });
            dying.failed.extend(failed);
        }
    }

    /// What was refused, or else why the producer died.
    ///
    /// A broker refuses a batch as a whole. With several culprits it names them, and librdkafka tells them from the rest;
    /// with one, librdkafka blames all of the batch (2.12.1).
    fn last_receipts(&mut self, into: &mut Vec<Receipt>) -> Result<(), SinkError> {
        let lost = || SinkError("the Kafka producer is dead".to_owned());
        let Dying { reason, failed, .. } = self.dying.as_mut().ok_or_else(lost)?;
        let known = into.len();
        let refused = failed
            .drain(..)
            .filter(|(seq, code)| refused_for_good(*code) && *seq != POSITION);
        into.extend(
            refused.map(|(seq, code)| Receipt::Rejected(seq, Rejection::new(explained(code)))),
        );
        if into.len() > known {
            return Ok(());
        }
        if let Some(topic) = self.denied.first() {
            return Err(SinkError(lacks("Write", &format!("topic {topic}"))));
        }
        let reason = std::mem::take(reason);
        Err(SinkError(self.with_trouble(reason)))
    }

    /// Adds what librdkafka last complained about.
    pub(super) fn with_trouble(&self, reason: String) -> String {
        with_trouble(&self.trouble, reason)
    }
}

/// Adds what librdkafka last complained about.
pub(super) fn with_trouble(trouble: &watch::Sender<Option<String>>, reason: String) -> String {
    match &*trouble.borrow() {
        Some(trouble) if !reason.contains(trouble) => format!("{reason} ({trouble})"),
        _ => reason,
    }
}

/// Whether the brokers answer a client that knows nothing of them yet.
pub(super) async fn answers_others(settings: &Settings, topic: Option<&str>) -> bool {
    let (config, topic) = (settings.client(), topic.map(str::to_owned));
    let asked = spawn_blocking(move || {
        let client: BaseProducer<_> = config.create_with_context(Silent).ok()?;
        // The second answer comes from a broker that the first one named: those have to be reached.
        let answered = (0..2).all(|_| ask(client.client(), topic.as_deref()).is_ok());
        Some((answered, client))
    });
    let Ok(Some((answered, client))) = asked.await else {
        return false;
    };
    // Waits for its threads, which may be looking a name up.
    spawn_blocking(move || drop(client));
    answered
}

/// What this client has to say, the producer says as well.
struct Silent;

impl ClientContext for Silent {
    fn log(&self, _: RDKafkaLogLevel, _: &str, _: &str) {}

    fn error(&self, _: KafkaError, _: &str) {}
}

impl ProducerContext for Silent {
    type DeliveryOpaque = ();

    fn delivery(&self, _: &DeliveryResult<'_>, (): ()) {}
}

/// An answer without brokers, as it comes from one that the controller has fenced, is of no use.
pub(super) fn ask<C: ClientContext>(
    client: &Client<C>,
    topic: Option<&str>,
) -> Result<(), KafkaError> {
    let metadata = client.fetch_metadata(topic, ASK_TIMEOUT)?;
    if metadata.brokers().is_empty() {
        return Err(KafkaError::MetadataFetch(Code::BrokerNotAvailable));
    }
    Ok(())
}

fn purge(producer: &KafkaProducer) {
    producer.purge(PurgeConfig::default().queue().inflight());
}

/// The topic that keeps a transaction from being written because it may not be written to. librdkafka says so in its log
/// alone, and of all records of the transaction no more than that they are purged (2.12.1).
fn denied<'a>(facility: &str, message: &'a str) -> Option<&'a str> {
    let said = message.contains("Topic authorization failed") && facility == "ADDPARTS";
    let (_, rest) = message.split_once("Failed to add partition \"")?;
    let (topic, _) = rest.split_once('"')?;
    said.then_some(topic)
}

/// With the right that is missing, where that is the reason.
fn explained(code: Code) -> String {
    let lacks = match code {
        Code::TopicAuthorizationFailed => lacks("Write", "the topic"),
        // What makes a producer idempotent comes with the right to write to any topic.
        Code::ClusterAuthorizationFailed => lacks("Write", "every topic"),
        _ => return code.to_string(),
    };
    format!("{lacks} ({code})")
}

/// Why a producer will never send anything again.
fn fatal(producer: &KafkaProducer) -> Option<String> {
    let (code, reason) = producer.client().fatal_error()?;
    Some(format!("{}: {reason}", explained(code)))
}

/// Whether it was deleted, or some of its partitions were.
fn of_a_lost_topic(code: Code) -> bool {
    matches!(
        code,
        Code::UnknownTopic | Code::UnknownPartition | Code::UnknownTopicOrPartition
    )
}

/// Whether the broker refuses a record itself, now and for ever; everything else may pass.
fn refused_for_good(code: Code) -> bool {
    matches!(
        code,
        Code::MessageSizeTooLarge
            | Code::InvalidMessageSize
            | Code::InvalidRecord
            | Code::InvalidTimestamp
            | Code::InvalidTopic
            | Code::PolicyViolation
            | Code::TopicAuthorizationFailed
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Those that mend themselves come all the time, and nobody listens where nothing is under way.
    #[test]
    fn only_what_is_fatal_is_news() {
        let (sender, mut news) = mpsc::unbounded_channel();
        let trouble = Arc::new(watch::Sender::new(None));
        let context = Context {
            news: sender,
            trouble: trouble.clone(),
        };
        for code in [Code::BrokerTransportFailure, Code::AllBrokersDown] {
            context.error(KafkaError::Global(code), "refused");
        }
        assert!(news.try_recv().is_err());
        let known = trouble.borrow().clone();
        assert!(known.is_some_and(|known| known.contains("refused")));
        context.error(KafkaError::Global(Code::Fatal), "fenced");
        assert!(matches!(news.try_recv(), Ok(News::Fatal)));
    }
}
