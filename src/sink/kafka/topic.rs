//! Topics: whether they exist, what they take, and making them.

use std::thread::sleep;
use std::time::Duration;

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::metadata::MetadataBroker;
use tokio::runtime::Handle;
use tokio::task::spawn_blocking;

use super::{NotPrepared, Settings, SinkError, Topics, log_librdkafka};
use crate::event::Rejection;

/// What a topic takes when it does not say: the broker's default `message.max.bytes`.
pub(super) const MESSAGE_BYTES_DEFAULT: usize = 1_048_588;
/// For one question to a broker about a topic.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// Brokers hear of a topic one after the other: how often they are asked before "unknown" is believed, and how soon again.
const ASKS_MAX: u32 = 40;
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// What is known about a topic.
#[derive(Clone, Copy, Debug)]
pub(super) struct Topic {
    pub(super) message_bytes_max: usize,
}

/// Makes sure that a topic exists, and says what it takes.
pub(super) async fn find_or_create(settings: &Settings, name: &str) -> Result<Topic, NotPrepared> {
    let (settings, name) = (settings.clone(), name.to_owned());
    let runtime = Handle::current();
    // librdkafka waits in its calls. The client does not outlive them: nobody would collect what it has to say.
    let asked = spawn_blocking(move || {
        let client = settings
            .client()
            .create_with_context(AdminContext)
            .map_err(|error: KafkaError| unknown(format!("set up the Kafka client: {error}")))?;
        let admin = Admin { client, runtime };
        let topic = admin.find_or_create(&settings.topics, &name)?;
        Ok((topic, admin))
    });
    let (topic, admin) = asked.await.map_err(|error| unknown(error.to_string()))??;
    // Waits for its thread, which looks up ten times a second.
    spawn_blocking(move || drop(admin));
    Ok(topic)
}

struct Admin {
    client: AdminClient<AdminContext>,
    runtime: Handle,
}

impl Admin {
    fn find_or_create(&self, topics: &Topics, name: &str) -> Result<Topic, NotPrepared> {
        for asked in 0..ASKS_MAX {
            if let Some(broker) = self.find(name)? {
                let message_bytes_max = self.message_bytes_max(name, broker)?;
                return Ok(Topic { message_bytes_max });
            }
            if topics.create && asked == 0 {
                self.create(topics, name)?;
            }
            sleep(ASK_AGAIN);
        }
        Err(if topics.create {
            unknown(format!("topic {name} was created and does not appear"))
        } else {
            rejected(format!(
                "topic {name} does not exist and sink.kafka.topics.create is false"
            ))
        })
    }

    /// A broker that knows the topic, if it exists.
    fn find(&self, name: &str) -> Result<Option<i32>, NotPrepared> {
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
            Some(code @ (Code::InvalidTopic | Code::TopicAuthorizationFailed)) => {
                return Err(rejected(format!("topic {name}: {code}")));
            }
            Some(code) => return Err(unknown(ask(code.to_string()))),
        }
        let answered = metadata.orig_broker_id();
        let others = metadata.brokers().iter().map(MetadataBroker::id);
        let broker = std::iter::once(answered).chain(others).find(|id| *id >= 0);
        broker
            .map(Some)
            .ok_or_else(|| unknown(ask("no broker".to_owned())))
    }

    fn message_bytes_max(&self, name: &str, broker: i32) -> Result<usize, NotPrepared> {
        let options = AdminOptions::new()
            .request_timeout(Some(ASK_TIMEOUT))
            .broker_id(broker);
        let resource = ResourceSpecifier::Topic(name);
        let described = self
            .runtime
            .block_on(self.client.describe_configs([&resource], &options));
        let entries = match &described {
            Ok(resources) => resources.first(),
            // A broker without this question, such as librdkafka's own mock.
            Err(KafkaError::AdminOp(Code::UnsupportedFeature | Code::UnsupportedVersion)) => None,
            Err(error) => return Err(unknown(format!("ask about topic {name}: {error}"))),
        };
        // A broker that may not be asked answers with nothing: the binding leaves its error out.
        Ok(entries
            .and_then(|resource| resource.as_ref().ok()?.get("max.message.bytes"))
            .and_then(|entry| entry.value.as_ref()?.parse().ok())
            .unwrap_or(MESSAGE_BYTES_DEFAULT))
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
