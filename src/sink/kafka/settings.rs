//! What can be set about Kafka, and what librdkafka is told.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::time::Duration;
use std::{fmt, fs};

use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use secrecy::{ExposeSecret, SecretString};
use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::SinkError;
use super::check::{canonical, is_file, marks};
use super::topic::MESSAGE_BYTES_DEFAULT;
use crate::event::{PipelineName, Shard};

/// The widest that librdkafka can be set to; the topic's own limit is checked before.
const MESSAGE_BYTES_MAX: usize = 1_000_000_000;

/// How the sink reaches Kafka and what its topics look like.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// `host:port`, separated by commas; a list is taken as well.
    #[serde(deserialize_with = "brokers")]
    pub brokers: String,
    /// How this client names itself to the brokers.
    pub client_id: String,
    /// How often a record may arrive.
    pub delivery: Delivery,
    /// What the transactional ids of this outbox begin with; needed for exactly-once.
    pub transactional_id: Option<String>,
    /// The same before the names of pipeline and shard were appended.
    #[serde(skip)]
    pub outbox_id: Option<String>,
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

/// How often a record may arrive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Delivery {
    /// Once, and after a crash perhaps again.
    #[default]
    AtLeastOnce,
    /// Once, for consumers that read what is committed.
    ExactlyOnce,
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
    /// How many a pipeline may create while its relay runs.
    pub max: usize,
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
    /// `PLAIN`, `SCRAM-SHA-256` or `SCRAM-SHA-512`; none when absent.
    pub mechanism: Option<String>,
    /// The user.
    pub username: Option<String>,
    /// Its password.
    pub password: Option<SecretString>,
    /// A file with the password, instead of `password`.
    pub password_file: Option<PathBuf>,
}

/// One text, or a list of them.
fn brokers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    struct Brokers;

    impl<'de> Visitor<'de> for Brokers {
        type Value = String;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a text or a list such as [\"kafka-1:9092\", \"kafka-2:9092\"]")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<String, E> {
            Ok(text.to_owned())
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<String, A::Error> {
            let mut all: Vec<String> = Vec::new();
            while let Some(broker) = list.next_element()? {
                all.push(broker);
            }
            Ok(all.join(","))
        }
    }

    deserializer.deserialize_any(Brokers)
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            brokers,
            client_id,
            delivery,
            transactional_id,
            outbox_id: _,
            compression,
            linger,
            queue_records,
            queue_bytes,
            topics,
            tls,
            sasl,
            properties,
        } = self;
        f.debug_struct("Settings")
            .field("brokers", brokers)
            .field("client_id", client_id)
            .field("delivery", delivery)
            .field("transactional_id", transactional_id)
            .field("compression", compression)
            .field("linger", linger)
            .field("queue_records", queue_records)
            .field("queue_bytes", queue_bytes)
            .field("topics", topics)
            .field("tls", tls)
            .field("sasl", sasl)
            // Some of the values are secrets, such as sasl.password.
            .field("properties", &properties.keys().collect::<Vec<_>>())
            .finish()
    }
}

impl Settings {
    /// The settings of one shard of a pipeline: its transactional id is its own.
    #[must_use]
    pub fn of_shard(mut self, pipeline: &PipelineName, shard: Shard) -> Self {
        if let Some(id) = &mut self.transactional_id {
            self.outbox_id = Some(id.clone());
            *id = format!("{id}.{pipeline}.{}", shard.index);
        }
        self
    }

    /// The same without transactions.
    #[must_use]
    pub fn at_least_once(mut self) -> Self {
        self.delivery = Delivery::AtLeastOnce;
        self
    }

    /// Whether delivery can be what it is set to; else says what to do.
    pub(crate) fn check_delivery(&self) -> Result<(), String> {
        /// What is appended must still fit the name of a topic, which has 249 characters at most.
        const LENGTH_MAX: usize = 150;
        let given = |name: &String| canonical(name) == "transactional.id";
        if self.properties.keys().any(given) {
            return Err(
                "sink.kafka.properties has \"transactional.id\": set sink.kafka.delivery = \"exactly-once\" and \
                 sink.kafka.transactional_id instead"
                    .to_owned(),
            );
        }
        let Some(id) = &self.transactional_id else {
            return match self.delivery {
                Delivery::AtLeastOnce => Ok(()),
                Delivery::ExactlyOnce => Err(
                    "sink.kafka.transactional_id is missing: sink.kafka.delivery = \"exactly-once\" needs a name that \
                     no other outbox on the Kafka cluster uses, such as \"shop-relay\"; two outboxes with the same one \
                     would shut each other out"
                        .to_owned(),
                ),
            };
        };
        let legal = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if id.is_empty() || id.len() > LENGTH_MAX || !id.chars().all(legal) {
            return Err(format!(
                "sink.kafka.transactional_id = {id:?}: 1 to {LENGTH_MAX} of A-Z, a-z, 0-9, \".\", \"_\" and \"-\", for \
                 a topic is named after it"
            ));
        }
        Ok(())
    }

    /// The transactional id, where records are delivered exactly once.
    pub(super) fn exactly_once(&self) -> Option<&str> {
        match self.delivery {
            Delivery::AtLeastOnce => None,
            Delivery::ExactlyOnce => self.transactional_id.as_deref(),
        }
    }

    /// Why no event may go to a topic of this name, whatever the brokers say of it.
    pub(super) fn refuses_topic(&self, name: &str) -> Option<String> {
        if name.starts_with("__") {
            return Some(format!(
                "topic {name} is refused: names that begin with \"__\" belong to Kafka itself"
            ));
        }
        self.is_own_topic(name).then(|| {
            format!("topic {name} is refused: the relay itself keeps its positions in topics of such names")
        })
    }

    /// Whether a pipeline of this outbox has its positions there: `ID.PIPELINE.SHARD.positions`. Kafka takes `.` and `_` for
    /// the same in names.
    fn is_own_topic(&self, name: &str) -> bool {
        let Some(id) = &self.transactional_id else {
            return false;
        };
        let (id, name) = (id.replace('.', "_"), name.replace('.', "_"));
        let of = |id: &str| {
            name.strip_prefix(id)
                .and_then(|rest| rest.strip_suffix("_positions"))
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
        };
        // The id of a shard, or the name before those of pipeline and shard.
        of(&id)
            || self
                .outbox_id
                .as_ref()
                .is_some_and(|id| of(&id.replace('.', "_")))
    }

    /// For reading what was committed.
    pub(super) fn reader(&self, group: &str) -> ClientConfig {
        // The way to the brokers may be among the properties; what makes it a reader is not theirs to say.
        let mut config = self.client();
        config
            // Never joined, but there has to be one.
            .set("group.id", group)
            .set("enable.auto.commit", "false")
            .set("auto.offset.reset", "earliest")
            .set("isolation.level", "read_committed")
            .set("enable.partition.eof", "true")
            .set("fetch.wait.max.ms", "10");
        config
    }

    /// For questions.
    pub(crate) fn client(&self) -> ClientConfig {
        self.with_properties(self.connection())
    }

    fn connection(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &self.brokers)
            .set("client.id", &self.client_id)
            // A lost broker is looked for often at first, and never less than once a second.
            .set("reconnect.backoff.ms", "100")
            .set("reconnect.backoff.max.ms", "1000")
            .set("log.connection.close", "false")
            // A broker would choose the number of partitions: topics are created on purpose or not at all.
            .set("allow.auto.create.topics", "false")
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
        if tls.enabled {
            let ca_file = path(&tls.ca_file);
            // The built-in OpenSSL does not know where this system keeps its authorities.
            set("ssl.ca.location", ca_file.as_deref().or(Some("probe")));
        }
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

    /// The files that a client is made of: where they are named, and what they hold where that is known. A client reads
    /// them when it is made, and never again.
    pub(super) fn files(&self) -> Vec<(String, PathBuf, Option<&'static str>)> {
        let Tls {
            enabled: _,
            ca_file,
            certificate_file,
            key_file,
            key_password: _,
        } = &self.tls;
        let own = [
            ("tls.ca_file", ca_file, Some("CERTIFICATE")),
            (
                "tls.certificate_file",
                certificate_file,
                Some("CERTIFICATE"),
            ),
            ("tls.key_file", key_file, Some("PRIVATE KEY")),
            ("sasl.password_file", &self.sasl.password_file, None),
        ];
        let mut files: Vec<_> = own
            .into_iter()
            .filter_map(|(key, path, holds)| {
                Some((format!("sink.kafka.{key}"), path.clone()?, holds))
            })
            .collect();
        for (name, value) in &self.properties {
            let name = canonical(name);
            if is_file(&name, value) {
                let holds = marks(&name);
                files.push((
                    format!("sink.kafka.properties.{name:?}"),
                    value.into(),
                    holds,
                ));
            }
        }
        files
    }

    /// A hash of what those files say now.
    pub(super) fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for (_, path, _) in self.files() {
            // One that can't be read is another one than before.
            fs::read(&path).ok().hash(&mut hasher);
        }
        hasher.finish()
    }

    /// The same with the password that the file says now.
    ///
    /// # Errors
    /// When the file can't be read, or is empty.
    pub(super) fn current(&self) -> Result<Self, SinkError> {
        let mut settings = self.clone();
        if let Some(path) = &self.sasl.password_file {
            let unread = |why: &dyn fmt::Display| {
                SinkError(format!(
                    "read the password for Kafka from {:?} (sink.kafka.sasl.password_file): {why}",
                    path.display().to_string()
                ))
            };
            let text = fs::read_to_string(path).map_err(|error| unread(&error))?;
            let password = text.trim_end_matches(['\r', '\n']);
            if password.is_empty() {
                return Err(unread(&"the file is empty"));
            }
            settings.sasl.password = Some(password.to_owned().into());
        }
        Ok(settings)
    }

    /// As a producer begins. Public for the bench, whose bare loop has the same one.
    #[doc(hidden)]
    #[must_use]
    pub fn default_producer(&self) -> ClientConfig {
        self.producer(MESSAGE_BYTES_DEFAULT)
    }

    /// For records, in batches of at most so many bytes.
    pub(super) fn producer(&self, batch_bytes: usize) -> ClientConfig {
        let mut config = self.connection();
        config
            .set("acks", "all")
            .set("enable.idempotence", "true")
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
            // A topic is used only once its existence is known, so that a missing one has been deleted.
            .set("topic.metadata.propagation.max.ms", "2000")
            .set("topic.metadata.refresh.interval.ms", "30000");
        match self.exactly_once() {
            // librdkafka gives up what is older than its transaction may be, and the life ends with that.
            Some(id) => config.set("transactional.id", id),
            None => config
                // A record that fails for good must not be followed by later ones of its partition.
                .set("enable.gapless.guarantee", "true")
                // An outage never rejects an event: no limit.
                .set("message.timeout.ms", "0"),
        };
        // The sink knows murmur2 only: with another choice it can't tell which records are the first of a partition.
        let partitioner = self.properties.get("partitioner");
        if partitioner.is_some_and(|name| !name.starts_with("murmur2")) {
            config.set("max.in.flight.requests.per.connection", "1");
        }
        let mut config = self.with_properties(config);
        // A broker refuses a batch as a whole: it has to fit the smallest topic, whatever was asked for.
        let asked = config.get("batch.size").and_then(|size| size.parse().ok());
        if asked.is_some_and(|asked: usize| asked > batch_bytes) {
            config.set("batch.size", batch_bytes.to_string());
        }
        config
    }

    fn with_properties(&self, mut config: ClientConfig) -> ClientConfig {
        for (name, value) in &self.properties {
            config.set(canonical(name), value);
        }
        if self.properties.contains_key("debug") {
            // Else librdkafka would keep to itself what it was asked to tell.
            config.set_log_level(RDKafkaLogLevel::Debug);
        }
        config
    }
}
