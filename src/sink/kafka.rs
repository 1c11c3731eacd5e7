//! Publishes to Apache Kafka through librdkafka. (source → order → route → encode → *sink*)
//!
//! Never retries a record behind the loop's back, never waits in the hand-over, and never turns an outage into a
//! rejection: with no message timeout librdkafka itself retries for ever, in order.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::client::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::message::{DeliveryResult, Header, OwnedHeaders};
use rdkafka::producer::{
    BaseRecord, NoCustomPartitioner, Producer, ProducerContext, PurgeConfig, ThreadedProducer,
};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use tokio::sync::{mpsc, watch};
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use super::{NotPrepared, Receipt, Refused, Sink, SinkError};
use crate::event::{Record, Rejection, Seq};

/// What a topic takes when it does not say: the broker's default `message.max.bytes`.
const MESSAGE_BYTES_DEFAULT: usize = 1_048_588;
/// The widest that librdkafka can be set to; the topic's own limit is checked before.
const MESSAGE_BYTES_MAX: usize = 1_000_000_000;
/// For one question to the broker about a topic.
const ADMIN_TIMEOUT: Duration = Duration::from_secs(10);

/// For the question whether anybody answers.
const CHECK_TIMEOUT: Duration = Duration::from_secs(3);

/// How the sink reaches Kafka and what its topics look like.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// `host:port`, separated by commas.
    pub brokers: String,
    /// How this client names itself to the brokers.
    pub client_id: String,
    /// `none`, `lz4`, `zstd`, `snappy` or `gzip`.
    pub compression: String,
    /// How long a record waits for others to share its batch.
    #[serde(with = "humantime_serde")]
    pub linger: Duration,
    /// Records that librdkafka queues at most.
    pub queue_records: usize,
    /// Bytes that librdkafka queues at most.
    pub queue_bytes: bytesize::ByteSize,
    /// Topics that do not exist.
    pub topics: Topics,
    /// Encryption of the connection.
    pub tls: Tls,
    /// Authentication.
    pub sasl: Sasl,
    /// Any librdkafka property; wins over everything above.
    pub properties: BTreeMap<String, String>,
}

/// What happens to topics that do not exist.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Topics {
    /// Whether they are created.
    pub create: bool,
    /// With how many partitions.
    pub partitions: i32,
    /// On how many brokers each.
    pub replication_factor: i32,
    /// Topic settings such as `cleanup.policy`.
    pub config: BTreeMap<String, String>,
}

/// TLS to the brokers; the brokers' certificates are always verified.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// Whether to use it.
    pub enabled: bool,
    /// PEM file with the authorities to trust; the system's when absent.
    pub ca_file: Option<PathBuf>,
    /// PEM file with this client's certificate.
    pub certificate_file: Option<PathBuf>,
    /// PEM file with this client's key.
    pub key_file: Option<PathBuf>,
    /// The password of the key.
    pub key_password: Option<SecretString>,
}

/// SASL authentication.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sasl {
    /// `PLAIN`, `SCRAM-SHA-256`, `SCRAM-SHA-512` or `OAUTHBEARER`; none when absent.
    pub mechanism: Option<String>,
    /// The user.
    pub username: Option<String>,
    /// Its password.
    pub password: Option<SecretString>,
    /// A file with the password, instead of `password`.
    pub password_file: Option<PathBuf>,
}

impl Settings {
    fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &self.brokers)
            .set("client.id", &self.client_id)
            // A lost broker is looked for often at first, and never less than once a second.
            .set("reconnect.backoff.ms", "100")
            .set("reconnect.backoff.max.ms", "1000")
            .set("log.connection.close", "false")
            .set_log_level(RDKafkaLogLevel::Info);
        let (tls, sasl) = (&self.tls, &self.sasl);
        let protocol = match (tls.enabled, sasl.mechanism.is_some()) {
            (false, false) => "plaintext",
            (true, false) => "ssl",
            (false, true) => "sasl_plaintext",
            (true, true) => "sasl_ssl",
        };
        config.set("security.protocol", protocol);
        let mut set = |name: &str, value: Option<&str>| {
            if let Some(value) = value {
                config.set(name, value);
            }
        };
        let path = |path: &Option<PathBuf>| path.as_ref().map(|p| p.to_string_lossy().into_owned());
        set("ssl.ca.location", path(&tls.ca_file).as_deref());
        set(
            "ssl.certificate.location",
            path(&tls.certificate_file).as_deref(),
        );
        set("ssl.key.location", path(&tls.key_file).as_deref());
        set(
            "ssl.key.password",
            tls.key_password.as_ref().map(ExposeSecret::expose_secret),
        );
        set("sasl.mechanism", sasl.mechanism.as_deref());
        set("sasl.username", sasl.username.as_deref());
        set(
            "sasl.password",
            sasl.password.as_ref().map(ExposeSecret::expose_secret),
        );
        config
    }

    fn producer(&self, batch_bytes: usize) -> ClientConfig {
        let mut config = self.client();
        config
            .set("acks", "all")
            .set("enable.idempotence", "true")
            // A record that fails for good must not be followed by later ones of its partition.
            .set("enable.gapless.guarantee", "true")
            // The partition that a Java producer picks for the same key; librdkafka's own default is another.
            .set("partitioner", "murmur2_random")
            .set("compression.type", &self.compression)
            .set(
                "linger.ms",
                (self.linger.as_secs_f64() * 1000.0).to_string(),
            )
            .set(
                "queue.buffering.max.messages",
                self.queue_records.to_string(),
            )
            .set(
                "queue.buffering.max.kbytes",
                self.queue_bytes.as_u64().div_ceil(1024).to_string(),
            )
            .set("message.max.bytes", MESSAGE_BYTES_MAX.to_string())
            .set("batch.size", batch_bytes.to_string())
            .set("batch.num.messages", "10000")
            // An outage never rejects an event: no limit.
            .set("message.timeout.ms", "0")
            // A topic is used only once its existence is known, so that a missing one has been deleted.
            .set("topic.metadata.propagation.max.ms", "2000")
            .set("topic.metadata.refresh.interval.ms", "30000");
        for (name, value) in &self.properties {
            config.set(name, value);
        }
        config
    }

    /// What every client of ours has in common: addresses, TLS, SASL, and the properties of the operator.
    pub(crate) fn client_config(&self) -> ClientConfig {
        let mut config = self.client();
        for (name, value) in &self.properties {
            config.set(name, value);
        }
        config
    }
}

/// What is known about a topic.
#[derive(Clone, Copy, Debug)]
struct Topic {
    message_bytes_max: usize,
}

/// What librdkafka says about one record.
struct Delivery {
    seq: Seq,
    failure: Option<Code>,
}

/// Runs on librdkafka's polling thread; only passes on what happened.
struct Context {
    deliveries: mpsc::UnboundedSender<Delivery>,
    trouble: Arc<watch::Sender<Option<String>>>,
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log_librdkafka(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.trouble
            .send_replace(Some(trouble_text(&error, reason)));
    }
}

impl ProducerContext for Context {
    /// A sequence number, carried as a pointer's bits: nothing is allocated per record.
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, opaque: usize) {
        let failure = match result {
            Ok(_) => None,
            Err((KafkaError::MessageProduction(code), _)) => Some(*code),
            Err(_) => Some(Code::Unknown),
        };
        // The receiver is gone when a life has ended: nobody waits for these receipts.
        let _ = self.deliveries.send(Delivery {
            seq: Seq(opaque as u64),
            failure,
        });
    }
}

struct AdminContext;

impl ClientContext for AdminContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log_librdkafka(level, facility, message);
    }

    // The producer has the same trouble and reports it.
    fn error(&self, _: KafkaError, _: &str) {}
}

fn log_librdkafka(level: RDKafkaLogLevel, facility: &str, message: &str) {
    match level {
        // What librdkafka calls an error, such as a refused connection, mends itself: the pipeline's state is what counts.
        RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical => {
            tracing::warn!(facility, "librdkafka: {message}");
        }
        RDKafkaLogLevel::Error | RDKafkaLogLevel::Warning => {
            tracing::info!(facility, "librdkafka: {message}")
        }
        _ => tracing::debug!(facility, "librdkafka: {message}"),
    }
}

fn trouble_text(error: &KafkaError, reason: &str) -> String {
    match error.rdkafka_error_code() {
        Some(code) => format!("{code}: {reason}"),
        None => reason.to_owned(),
    }
}

type KafkaProducer = ThreadedProducer<Context, NoCustomPartitioner>;

/// A Kafka cluster.
pub struct KafkaSink {
    settings: Settings,
    producer: Option<KafkaProducer>,
    deliveries: mpsc::UnboundedReceiver<Delivery>,
    trouble: Arc<watch::Sender<Option<String>>>,
    admin: Option<AdminClient<AdminContext>>,
    topics: HashMap<String, Topic>,
    /// Batches must fit the smallest topic: a broker refuses a batch as a whole.
    batch_bytes: usize,
    received: Vec<Delivery>,
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
        let (_, deliveries) = mpsc::unbounded_channel();
        Self {
            settings,
            producer: None,
            deliveries,
            trouble: Arc::new(watch::Sender::new(None)),
            admin: None,
            topics: HashMap::new(),
            batch_bytes: MESSAGE_BYTES_DEFAULT,
            received: Vec::new(),
        }
    }

    fn close(&mut self) {
        if let Some(producer) = self.producer.take() {
            producer.purge(PurgeConfig::default().queue().inflight());
        }
    }

    /// The topic as the broker describes it; none when it does not exist.
    async fn describe(
        admin: &AdminClient<AdminContext>,
        topic: &str,
    ) -> Result<Option<Topic>, SinkError> {
        let options = AdminOptions::new().request_timeout(Some(ADMIN_TIMEOUT));
        let described = admin
            .describe_configs([&ResourceSpecifier::Topic(topic)], &options)
            .await
            .map_err(|error| SinkError(format!("ask about topic {topic}: {error}")))?;
        let unknown_limit = Ok(Some(Topic {
            message_bytes_max: MESSAGE_BYTES_DEFAULT,
        }));
        match described.into_iter().next() {
            Some(Ok(resource)) => Ok(Some(Topic {
                message_bytes_max: resource
                    .get("max.message.bytes")
                    .and_then(|entry| entry.value.as_ref()?.parse().ok())
                    .unwrap_or(MESSAGE_BYTES_DEFAULT),
            })),
            Some(Err(Code::UnknownTopicOrPartition | Code::UnknownTopic)) => Ok(None),
            // May not ask, or the broker can't answer: the topic shows itself when it is used.
            Some(Err(
                Code::TopicAuthorizationFailed
                | Code::UnsupportedVersion
                | Code::UnsupportedFeature,
            )) => unknown_limit,
            Some(Err(code)) => Err(SinkError(format!("ask about topic {topic}: {code}"))),
            None => unknown_limit,
        }
    }

    async fn create(
        &self,
        admin: &AdminClient<AdminContext>,
        topic: &str,
    ) -> Result<(), NotPrepared> {
        let Topics {
            create: _,
            partitions,
            replication_factor,
            config,
        } = &self.settings.topics;
        let mut new = NewTopic::new(
            topic,
            *partitions,
            TopicReplication::Fixed(*replication_factor),
        );
        for (name, value) in config {
            new = new.set(name, value);
        }
        let options = AdminOptions::new()
            .request_timeout(Some(ADMIN_TIMEOUT))
            .operation_timeout(Some(ADMIN_TIMEOUT));
        let unknown =
            |what: String| NotPrepared::Unknown(SinkError(format!("create topic {topic}: {what}")));
        let created = admin
            .create_topics([&new], &options)
            .await
            .map_err(|e| unknown(e.to_string()))?;
        match created.into_iter().next() {
            Some(Ok(_)) => {
                tracing::info!(topic, partitions, "created the topic");
                Ok(())
            }
            Some(Err((_, Code::TopicAlreadyExists))) => Ok(()),
            Some(Err((_, code @ (Code::InvalidTopic | Code::PolicyViolation)))) => {
                Err(NotPrepared::Rejected(Rejection::new(format!(
                    "topic {topic} can't be created: {code}"
                ))))
            }
            Some(Err((_, code))) => Err(unknown(code.to_string())),
            None => Err(unknown("no answer".to_owned())),
        }
    }

    fn admin(&mut self) -> Result<AdminClient<AdminContext>, SinkError> {
        match self.admin.take() {
            Some(admin) => Ok(admin),
            None => rdkafka::config::FromClientConfigAndContext::from_config_and_context(
                &self.settings.client_config(),
                AdminContext,
            )
            .map_err(|error: KafkaError| {
                SinkError(format!("set up the Kafka admin client: {error}"))
            }),
        }
    }

    async fn find_or_create(
        &self,
        admin: &AdminClient<AdminContext>,
        name: &str,
    ) -> Result<Topic, NotPrepared> {
        if let Some(topic) = Self::describe(admin, name)
            .await
            .map_err(NotPrepared::Unknown)?
        {
            return Ok(topic);
        }
        if !self.settings.topics.create {
            return Err(NotPrepared::Rejected(Rejection::new(format!(
                "topic {name} does not exist and sink.kafka.topics.create is false"
            ))));
        }
        self.create(admin, name).await?;
        // The broker answers before every broker has heard of the topic.
        for _ in 0..100 {
            if let Some(topic) = Self::describe(admin, name)
                .await
                .map_err(NotPrepared::Unknown)?
            {
                return Ok(topic);
            }
            sleep(Duration::from_millis(50)).await;
        }
        Err(NotPrepared::Unknown(SinkError(format!(
            "topic {name} was created and does not appear"
        ))))
    }
}

impl Sink for KafkaSink {
    async fn open(&mut self) -> Result<(), SinkError> {
        self.close();
        self.topics.clear();
        let (sender, receiver) = mpsc::unbounded_channel();
        let context = Context {
            deliveries: sender,
            trouble: self.trouble.clone(),
        };
        let producer = self
            .settings
            .producer(self.batch_bytes)
            .create_with_context(context)
            .map_err(|error| SinkError(format!("set up the Kafka producer: {error}")))?;
        self.producer = Some(producer);
        self.deliveries = receiver;
        Ok(())
    }

    async fn check(&mut self) -> Result<(), SinkError> {
        let not_open = || SinkError("the Kafka producer is not open".to_owned());
        let producer = self.producer.clone().ok_or_else(not_open)?;
        // librdkafka waits in the call; the answer comes from any broker that it reaches.
        let asked = spawn_blocking(move || {
            producer
                .client()
                .fetch_metadata(None, CHECK_TIMEOUT)
                .map(drop)
        });
        match asked.await {
            Ok(Err(error)) => {
                let trouble = self
                    .trouble()
                    .map_or(String::new(), |trouble| format!(" ({trouble})"));
                Err(SinkError(format!(
                    "no answer from Kafka at {}: {error}{trouble}",
                    self.settings.brokers
                )))
            }
            Ok(Ok(())) => {
                self.trouble.send_replace(None);
                Ok(())
            }
            Err(_) => Err(not_open()),
        }
    }

    async fn prepare(&mut self, name: &str) -> Result<(), NotPrepared> {
        let admin = self.admin().map_err(NotPrepared::Unknown)?;
        let topic = self.find_or_create(&admin, name).await;
        self.admin = Some(admin);
        let topic = topic?;
        self.trouble.send_replace(None);
        if topic.message_bytes_max < self.batch_bytes {
            self.batch_bytes = topic.message_bytes_max;
            let smaller = format!(
                "topic {name} takes {} bytes at most",
                topic.message_bytes_max
            );
            return Err(NotPrepared::Unknown(SinkError(format!(
                "{smaller}: starting again with smaller batches"
            ))));
        }
        self.topics.insert(name.to_owned(), topic);
        Ok(())
    }

    fn hand_over(&mut self, seq: Seq, record: &Record<'_>) -> Result<(), Refused> {
        let Some(topic) = self.topics.get(&*record.topic) else {
            return Err(Refused::Unprepared);
        };
        let bytes = record.size_bytes();
        if bytes > topic.message_bytes_max {
            return Err(Refused::Rejected(Rejection::new(format!(
                "the record has {bytes} bytes, topic {} takes {} (max.message.bytes)",
                record.topic, topic.message_bytes_max
            ))));
        }
        let Some(producer) = &self.producer else {
            return Err(Refused::Broken(SinkError(
                "the Kafka producer is not open".to_owned(),
            )));
        };
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
            timestamp: Some(record.timestamp_ms),
            headers: Some(headers),
            delivery_opaque: usize::try_from(seq.0).expect("64-bit platforms only"),
        };
        match producer.send(message) {
            Ok(()) => Ok(()),
            Err((KafkaError::MessageProduction(Code::QueueFull), _)) => Err(Refused::Full),
            Err((KafkaError::MessageProduction(code), _)) if rejects(code) => Err(
                Refused::Rejected(Rejection::new(format!("topic {}: {code}", record.topic))),
            ),
            Err((error, _)) => Err(Refused::Broken(SinkError(error.to_string()))),
        }
    }

    async fn receipts(&mut self, into: &mut Vec<Receipt>) -> Result<(), SinkError> {
        const AT_ONCE: usize = 8192;
        self.received.clear();
        if self.deliveries.recv_many(&mut self.received, AT_ONCE).await == 0 {
            return Err(SinkError("the Kafka producer is not open".to_owned()));
        }
        for Delivery { seq, failure } in &self.received {
            match failure {
                None => into.push(Receipt::Delivered(*seq)),
                Some(code) if rejects(*code) => {
                    into.push(Receipt::Rejected(*seq, Rejection::new(code.to_string())));
                }
                Some(code) => {
                    return Err(SinkError(match self.trouble() {
                        Some(trouble) => format!("{code} ({trouble})"),
                        None => code.to_string(),
                    }));
                }
            }
        }
        self.trouble
            .send_if_modified(|trouble| trouble.take().is_some());
        Ok(())
    }

    fn trouble(&self) -> Option<String> {
        self.trouble.borrow().clone()
    }
}

impl Drop for KafkaSink {
    fn drop(&mut self) {
        self.close();
    }
}

/// Whether the broker refuses the record itself, now and for ever; everything else may pass.
fn rejects(code: Code) -> bool {
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
