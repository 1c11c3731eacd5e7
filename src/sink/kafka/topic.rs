//! Topics: whether they exist, what they take, and making them.

use std::thread::sleep;
use std::time::{Duration, UNIX_EPOCH};

use backon::{BackoffBuilder, ExponentialBuilder};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::metadata::MetadataBroker;
use tokio::runtime::Handle;
use tokio::task::spawn_blocking;

use super::{NotPrepared, Settings, SinkError, Topics, lacks, log_librdkafka, not_set_up};
use crate::event::{Record, Rejection};

/// What a topic takes when it does not say: the broker's default `message.max.bytes`.
pub(super) const MESSAGE_BYTES_DEFAULT: usize = 1_048_588;
/// For one question to a broker about a topic.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// Brokers hear of a topic one after the other: how often they are asked before "unknown" is believed, and how soon again,
/// at first and then. This is about two seconds.
pub(super) const ASKS_MAX: usize = 40;
/// The same for one that was not there before and is not made: everybody waits for the answer, half a second with this many.
pub(super) const ASKS_OF_ABSENT_MAX: usize = 12;
const ASK_AGAIN_MIN: Duration = Duration::from_millis(5);
const ASK_AGAIN_MAX: Duration = Duration::from_millis(50);

/// The broker judges times by its own clock: only what is this far beyond its limits is refused here.
const CLOCKS_DIFFER_MS: i64 = 24 * 3_600_000;

/// What a topic takes.
#[derive(Clone, Debug)]
pub(super) struct Topic {
    pub(super) partitions: usize,
    pub(super) message_bytes_max: usize,
    /// How old a record may be, and how far ahead.
    before_max_ms: i64,
    after_max_ms: i64,
    /// A time up to which nothing is too far ahead, so that the clock is seldom read.
    not_ahead_ms: i64,
}

impl Topic {
    /// The limits that the broker tells, or what they are unless set.
    fn new(partitions: usize, limit: impl Fn(&str) -> Option<i64>) -> Self {
        let bytes = limit("max.message.bytes").and_then(|bytes| usize::try_from(bytes).ok());
        Self {
            partitions,
            message_bytes_max: bytes.unwrap_or(MESSAGE_BYTES_DEFAULT),
            before_max_ms: limit("message.timestamp.before.max.ms").unwrap_or(i64::MAX),
            after_max_ms: limit("message.timestamp.after.max.ms").unwrap_or(i64::MAX),
            not_ahead_ms: 0,
        }
    }

    /// Refuses what the broker would refuse. It must not get that far: later records of the key may have been appended
    /// when the answer comes.
    pub(super) fn admit(&mut self, record: &Record<'_>, bytes: usize) -> Result<(), Rejection> {
        if bytes > self.message_bytes_max {
            return Err(Rejection::new(format!(
                "the record has {bytes} bytes, topic {} takes {} (max.message.bytes)",
                record.topic, self.message_bytes_max
            )));
        }
        let at_ms = record.timestamp_ms;
        if at_ms > self.not_ahead_ms || self.before_max_ms != i64::MAX {
            let now_ms = now_ms();
            let late_ms = self.after_max_ms.saturating_add(CLOCKS_DIFFER_MS);
            let early_ms = self.before_max_ms.saturating_add(CLOCKS_DIFFER_MS);
            self.not_ahead_ms = now_ms.saturating_add(late_ms);
            let limit = if at_ms > self.not_ahead_ms {
                "after"
            } else if at_ms < now_ms.saturating_sub(early_ms) {
                "before"
            } else {
                return Ok(());
            };
            return Err(Rejection::new(format!(
                "topic {} takes no record of this time (message.timestamp.{limit}.max.ms)",
                record.topic
            )));
        }
        Ok(())
    }
}

/// The wall clock, because the broker judges by it.
fn now_ms() -> i64 {
    let since = UNIX_EPOCH.elapsed().unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// Makes sure that a topic exists, and says what it takes. A topic that is unknown is asked about so many times.
pub(super) async fn find_or_create(
    settings: &Settings,
    name: &str,
    asks_max: usize,
) -> Result<Topic, NotPrepared> {
    let (settings, name) = (settings.clone(), name.to_owned());
    let runtime = Handle::current();
    // librdkafka waits in its calls. The client does not outlive them: nobody would collect what it has to say.
    let asked = spawn_blocking(move || {
        let client = settings
            .client()
            .create_with_context(AdminContext)
            .map_err(|error| NotPrepared::Unknown(not_set_up(error)))?;
        let admin = Admin { client, runtime };
        let topic = admin.find_or_create(&settings.topics, &name, asks_max)?;
        Ok((topic, admin))
    });
    let (topic, admin) = asked.await.map_err(|error| unknown(error.to_string()))??;
    // Waits for its thread, which looks up ten times a second.
    spawn_blocking(move || drop(admin));
    Ok(topic)
}

/// Of a topic that exists.
struct Found {
    /// Knows it.
    broker: i32,
    partitions: usize,
}

struct Admin {
    client: AdminClient<AdminContext>,
    runtime: Handle,
}

impl Admin {
    fn find_or_create(
        &self,
        topics: &Topics,
        name: &str,
        asks_max: usize,
    ) -> Result<Topic, NotPrepared> {
        let pauses = ExponentialBuilder::default()
            .with_min_delay(ASK_AGAIN_MIN)
            .with_max_delay(ASK_AGAIN_MAX)
            .with_max_times(asks_max)
            .build();
        for (asked, pause) in pauses.enumerate() {
            if let Some(found) = self.find(name)? {
                return self.describe(name, &found);
            }
            if topics.create && asked == 0 {
                self.create(topics, name)?;
            }
            sleep(pause);
        }
        Err(if topics.create {
            unknown(format!("topic {name} was created and does not appear"))
        } else {
            rejected(format!(
                "topic {name} does not exist and sink.kafka.topics.create is false"
            ))
        })
    }

    /// What a broker knows of the topic, if it exists.
    fn find(&self, name: &str) -> Result<Option<Found>, NotPrepared> {
        let ask = |what: String| format!("ask about topic {name}: {what}");
        let metadata = self
            .client
            .inner()
            .fetch_metadata(Some(name), ASK_TIMEOUT)
            .map_err(|error| unknown(ask(error.to_string())))?;
        let [topic] = metadata.topics() else {
            return Err(unknown(ask("no answer".to_owned())));
        };
        match topic.error().map(Code::from) {
            None | Some(Code::LeaderNotAvailable) => {}
            Some(Code::UnknownTopicOrPartition) => return Ok(None),
            Some(code @ Code::InvalidTopic) => {
                return Err(rejected(format!("topic {name}: {code}")));
            }
            Some(code @ Code::TopicAuthorizationFailed) => {
                let lacks = lacks("Describe", "it");
                return Err(rejected(format!(
                    "topic {name} may not be seen: {lacks} ({code})"
                )));
            }
            Some(code) => return Err(unknown(ask(code.to_string()))),
        }
        let answered = metadata.orig_broker_id();
        let others = metadata.brokers().iter().map(MetadataBroker::id);
        let broker = std::iter::once(answered).chain(others).find(|id| *id >= 0);
        let found = broker.map(|broker| Found {
            broker,
            partitions: topic.partitions().len(),
        });
        found
            .map(Some)
            .ok_or_else(|| unknown(ask("no broker".to_owned())))
    }

    fn describe(&self, name: &str, found: &Found) -> Result<Topic, NotPrepared> {
        let options = AdminOptions::new()
            .request_timeout(Some(ASK_TIMEOUT))
            .broker_id(found.broker);
        let resource = ResourceSpecifier::Topic(name);
        let described = self
            .runtime
            .block_on(self.client.describe_configs([&resource], &options));
        let described = match described {
            Ok(resources) => resources.into_iter().next().and_then(Result::ok),
            // A broker without this question, such as librdkafka's own mock.
            Err(KafkaError::AdminOp(Code::UnsupportedFeature | Code::UnsupportedVersion)) => None,
            Err(error) => return Err(unknown(format!("ask about topic {name}: {error}"))),
        };
        // A broker that we may not ask answers with nothing: the binding leaves its error out.
        let told = |name: &str| described.as_ref()?.get(name)?.value.as_deref();
        let own_time = told("message.timestamp.type") == Some("LogAppendTime");
        Ok(Topic::new(found.partitions, |limit| {
            // The broker puts in its own time and does not care for ours.
            let applies = !(own_time && limit.starts_with("message.timestamp."));
            told(limit).filter(|_| applies)?.parse().ok()
        }))
    }

    fn create(&self, topics: &Topics, name: &str) -> Result<(), NotPrepared> {
        let Topics {
            create: _,
            partitions,
            replication_factor,
            config,
        } = topics;
        let replication = TopicReplication::Fixed(*replication_factor);
        let mut new = NewTopic::new(name, *partitions, replication);
        for (name, value) in config {
            new = new.set(name, value);
        }
        let options = AdminOptions::new()
            .request_timeout(Some(ASK_TIMEOUT))
            .operation_timeout(Some(ASK_TIMEOUT));
        let failed = |what: String| unknown(format!("create topic {name}: {what}"));
        let created = self
            .runtime
            .block_on(self.client.create_topics([&new], &options))
            .map_err(|error| failed(error.to_string()))?;
        match created.into_iter().next() {
            Some(Ok(_)) => {
                tracing::info!(topic = name, partitions, "created the topic");
                Ok(())
            }
            Some(Err((_, Code::TopicAlreadyExists))) => Ok(()),
            Some(Err((_, code @ (Code::InvalidTopic | Code::PolicyViolation)))) => {
                Err(rejected(format!("topic {name} can't be created: {code}")))
            }
            Some(Err((
                _,
                code @ (Code::TopicAuthorizationFailed | Code::ClusterAuthorizationFailed),
            ))) => {
                let lacks = lacks("Create", "it");
                Err(rejected(format!(
                    "topic {name} does not exist: {lacks} ({code})"
                )))
            }
            Some(Err((_, code))) => Err(failed(code.to_string())),
            None => Err(failed("no answer".to_owned())),
        }
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

fn unknown(reason: String) -> NotPrepared {
    NotPrepared::Unknown(SinkError(reason))
}

fn rejected(reason: String) -> NotPrepared {
    NotPrepared::Rejected(Rejection(reason))
}
