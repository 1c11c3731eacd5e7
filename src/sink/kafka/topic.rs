//! Topics: whether they exist, what they take, and making them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::thread::sleep;
use std::time::{Duration, UNIX_EPOCH};

use backon::{BackoffBuilder, ExponentialBuilder};
use rdkafka::admin::{
    AdminClient, AdminOptions, ConfigResource, NewTopic, OwnedResourceSpecifier, ResourceSpecifier,
    TopicReplication, TopicResult,
};
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::metadata::{Metadata, MetadataBroker, MetadataTopic};
use tokio::runtime::Handle;
use tokio::task::spawn_blocking;
use tokio::time::Instant;

use super::{NotPrepared, Settings, SinkError, Topics, lacks, log_librdkafka, not_set_up, trouble};
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

/// An operator may have raised a limit: before a record is refused by one that is older than this, the broker is asked again.
const ASK_FOR_LIMITS_AGAIN: Duration = Duration::from_secs(3);
/// More topics than this are looked up with one question for all that the cluster has.
const ONE_BY_ONE: usize = 4;
/// Topics whose settings one question asks for.
const DESCRIBED_AT_ONCE: usize = 500;

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
    /// Records of before this time are deleted soon, as of the time when the topic was looked up.
    kept_from_ms: i64,
    asked_at: Instant,
    doubted: bool,
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
            kept_from_ms: limit("retention.ms")
                .filter(|kept_ms| *kept_ms >= 0)
                .map_or(i64::MIN, |kept_ms| now_ms().saturating_sub(kept_ms)),
            asked_at: Instant::now(),
            doubted: false,
        }
    }

    /// Whether the broker deletes such a record soon after it has taken it.
    pub(super) fn forgets(&self, record: &Record<'_>) -> bool {
        record.timestamp_ms < self.kept_from_ms
    }

    /// From now on a refusal is worth another question.
    pub(super) fn doubt(&mut self) {
        self.doubted = true;
    }

    /// Whether the broker may have other limits by now: before a record is refused it is asked again, if that is not just
    /// done.
    pub(super) fn is_out_of_date(&self) -> bool {
        self.doubted || self.asked_at.elapsed() >= ASK_FOR_LIMITS_AGAIN
    }

    /// Refuses what the broker would refuse. It must not get that far: later records of the key may have been appended
    /// when the answer comes.
    pub(super) fn admit(&mut self, record: &Record<'_>, bytes: usize) -> Result<(), Rejection> {
        if bytes > self.message_bytes_max {
            return Err(Rejection::new(format!(
                "too large: the record has {bytes} bytes before compression, topic {} takes {} (max.message.bytes)",
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

/// A topic that exists now.
#[derive(Clone, Debug)]
pub struct Found {
    pub(super) topic: Topic,
    /// Whether this look-up has made it.
    pub(super) created: bool,
}

type Answers<T> = Vec<(String, Result<T, NotPrepared>)>;

/// Makes sure that a topic exists, and says what it takes.
pub(super) async fn find_or_create(settings: &Settings, name: &str) -> Result<Topic, NotPrepared> {
    let answers = look_up(settings, vec![name.to_owned()], ASKS_MAX, 1).await;
    let answer = answers.into_iter().next();
    let (_, found) = answer.ok_or_else(|| unknown(format!("ask about topic {name}: no answer")))?;
    found.map(|found| found.topic)
}

/// Makes sure that topics exist, and says what each takes. Those that are unknown are asked about so many times; at most
/// `room` are made.
pub(super) async fn look_up(
    settings: &Settings,
    names: Vec<String>,
    asks_max: usize,
    room: usize,
) -> Answers<Found> {
    let (settings, asked_for) = (settings.clone(), names.clone());
    let runtime = Handle::current();
    // librdkafka waits in its calls. The client does not outlive them: nobody would collect what it has to say.
    let asked = spawn_blocking(move || {
        let client = settings
            .client()
            .create_with_context(AdminContext)
            .map_err(not_set_up)?;
        let admin = Admin { client, runtime };
        let answers = admin.look_up(&settings.topics, asked_for, asks_max, room);
        Ok((answers, admin))
    });
    let asked = asked
        .await
        .unwrap_or_else(|error| Err(SinkError(error.to_string())));
    match asked {
        Ok((answers, admin)) => {
            // Waits for its thread, which looks up ten times a second.
            spawn_blocking(move || drop(admin));
            answers
        }
        Err(error) => {
            let answer = |name| (name, Err(NotPrepared::Unknown(error.clone())));
            names.into_iter().map(answer).collect()
        }
    }
}

/// Where a topic is.
#[derive(Clone, Copy)]
struct Place {
    /// Knows it.
    broker: i32,
    partitions: usize,
}

struct Admin {
    client: AdminClient<AdminContext>,
    runtime: Handle,
}

impl Admin {
    fn look_up(
        &self,
        topics: &Topics,
        mut names: Vec<String>,
        asks_max: usize,
        room: usize,
    ) -> Answers<Found> {
        let pauses = ExponentialBuilder::default()
            .with_min_delay(ASK_AGAIN_MIN)
            .with_max_delay(ASK_AGAIN_MAX)
            .with_max_times(asks_max)
            .build();
        let mut answers = Vec::new();
        let mut places = Vec::new();
        let mut created = BTreeSet::new();
        for (asked, pause) in pauses.enumerate() {
            names = self.find_all(names, &mut places, &mut answers);
            if names.is_empty() {
                break;
            }
            if topics.create && asked == 0 {
                names = self.create_all(topics, names, room, &mut answers);
                created.extend(names.iter().cloned());
            }
            sleep(pause);
        }
        for name in names {
            // All topics together are those that may be seen.
            let answer = match self.find(&name) {
                Ok(Some(place)) => {
                    places.push((name, place));
                    continue;
                }
                Ok(None) if topics.create => {
                    unknown(format!("topic {name} was created and does not appear"))
                }
                Ok(None) => rejected(format!(
                    "topic {name} does not exist and sink.kafka.topics.create is false"
                )),
                Err(error) => error,
            };
            answers.push((name, Err(answer)));
        }
        for places in places.chunks(DESCRIBED_AT_ONCE) {
            for (name, described) in self.describe(places) {
                let found = described.map(|topic| Found {
                    topic,
                    created: created.contains(&name),
                });
                answers.push((name, found));
            }
        }
        answers
    }

    /// Returns those that are not there.
    fn find_all(
        &self,
        names: Vec<String>,
        places: &mut Vec<(String, Place)>,
        answers: &mut Answers<Found>,
    ) -> Vec<String> {
        let mut absent = Vec::new();
        let all = if names.len() > ONE_BY_ONE {
            self.all()
        } else {
            None
        };
        for name in names {
            let found = match &all {
                Some(all) => Ok(all.get(&name).copied()),
                None => self.find(&name),
            };
            match found {
                Ok(Some(place)) => places.push((name, place)),
                Ok(None) => absent.push(name),
                Err(error) => answers.push((name, Err(error))),
            }
        }
        absent
    }

    /// All topics that the cluster has; none where it does not say.
    fn all(&self) -> Option<HashMap<String, Place>> {
        let metadata = self.client.inner().fetch_metadata(None, ASK_TIMEOUT).ok()?;
        let broker = Self::broker_of(&metadata)?;
        let usable = |topic: &&MetadataTopic| {
            matches!(
                topic.error().map(Code::from),
                None | Some(Code::LeaderNotAvailable)
            )
        };
        let place = |topic: &MetadataTopic| {
            let partitions = topic.partitions().len();
            (topic.name().to_owned(), Place { broker, partitions })
        };
        Some(metadata.topics().iter().filter(usable).map(place).collect())
    }

    fn broker_of(metadata: &Metadata) -> Option<i32> {
        let answered = metadata.orig_broker_id();
        let others = metadata.brokers().iter().map(MetadataBroker::id);
        std::iter::once(answered).chain(others).find(|id| *id >= 0)
    }

    /// What a broker knows of the topic, if it exists.
    fn find(&self, name: &str) -> Result<Option<Place>, NotPrepared> {
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
        let broker = Self::broker_of(&metadata).ok_or_else(|| unknown(ask("no broker".to_owned())));
        let partitions = topic.partitions().len();
        Ok(Some(Place {
            broker: broker?,
            partitions,
        }))
    }

    fn describe(&self, places: &[(String, Place)]) -> Answers<Topic> {
        let Some((_, Place { broker, .. })) = places.first() else {
            return Vec::new();
        };
        let options = AdminOptions::new()
            .request_timeout(Some(ASK_TIMEOUT))
            .broker_id(*broker);
        let resources: Vec<_> = places
            .iter()
            .map(|(name, _)| ResourceSpecifier::Topic(name))
            .collect();
        let described = self
            .runtime
            .block_on(self.client.describe_configs(&resources, &options));
        let described = match described {
            Ok(resources) => resources.into_iter().filter_map(Result::ok).collect(),
            // A broker without this question, such as librdkafka's own mock.
            Err(KafkaError::AdminOp(Code::UnsupportedFeature | Code::UnsupportedVersion)) => {
                Vec::new()
            }
            Err(error) => {
                let answer = |(name, _): &(String, Place)| {
                    let error = unknown(format!(
                        "ask about topic {name}: {}",
                        trouble::answer(&error)
                    ));
                    (name.clone(), Err(error))
                };
                return places.iter().map(answer).collect();
            }
        };
        // A broker that we may not ask answers with nothing: the binding leaves its error out.
        let of_topic: HashMap<&str, &ConfigResource> = described
            .iter()
            .filter_map(|resource| match &resource.specifier {
                OwnedResourceSpecifier::Topic(name) => Some((&name[..], resource)),
                _ => None,
            })
            .collect();
        let topic = |(name, place): &(String, Place)| {
            let described = of_topic.get(&name[..]);
            let told = |name: &str| described?.get(name)?.value.as_deref();
            let own_time = told("message.timestamp.type") == Some("LogAppendTime");
            let topic = Topic::new(place.partitions, |limit| {
                // The broker puts in its own time and does not care for ours. Compaction alone deletes no record by its age.
                let applies = match limit {
                    "retention.ms" => {
                        !own_time && told("cleanup.policy").is_none_or(|how| how.contains("delete"))
                    }
                    limit => !(own_time && limit.starts_with("message.timestamp.")),
                };
                told(limit).filter(|_| applies)?.parse().ok()
            });
            (name.clone(), Ok(topic))
        };
        places.iter().map(topic).collect()
    }

    /// Returns those that were made, or are there by now.
    fn create_all(
        &self,
        topics: &Topics,
        mut names: Vec<String>,
        room: usize,
        answers: &mut Answers<Found>,
    ) -> Vec<String> {
        for name in names.split_off(room.min(names.len())) {
            let reason = format!(
                "topic {name} is not made: this pipeline has made {} topics since the relay started, and \
                 sink.kafka.topics.max is {}; make the topic yourself or raise the limit, then redrive",
                topics.max, topics.max
            );
            answers.push((name, Err(rejected(reason))));
        }
        let new: Vec<_> = names
            .iter()
            .map(|name| new_topic(topics, name, &topics.config))
            .collect();
        if new.is_empty() {
            return names;
        }
        let created = self
            .runtime
            .block_on(self.client.create_topics(&new, &options()));
        let created = match created {
            Ok(created) => created,
            Err(error) => {
                let failed = |name| {
                    let error =
                        unknown(format!("create topic {name}: {}", trouble::answer(&error)));
                    (name, Err(error))
                };
                answers.extend(names.into_iter().map(failed));
                return Vec::new();
            }
        };
        let mut made = Vec::new();
        for answer in created {
            match answer {
                Ok(name) => {
                    tracing::info!(topic = name, topics.partitions, "created the topic");
                    made.push(name);
                }
                Err((name, Code::TopicAlreadyExists)) => made.push(name),
                Err((name, code)) => {
                    let error = self.not_created(topics, &name, code);
                    answers.push((name, Err(error)));
                }
            }
        }
        made
    }

    /// Why a topic was not made, with the name of the setting that has to be changed.
    fn not_created(&self, topics: &Topics, name: &str, code: Code) -> NotPrepared {
        let setting = match code {
            Code::InvalidTopic => {
                return rejected(match self.collides_with(name) {
                    Some(other) => format!(
                        "topic {name} can't be created: its name collides with topic {other}, because Kafka takes \".\" \
                         and \"_\" for the same in names ({code})"
                    ),
                    None => format!("topic {name} can't be created: {code}"),
                });
            }
            Code::PolicyViolation => {
                return rejected(format!("topic {name} can't be created: {code}"));
            }
            Code::TopicAuthorizationFailed | Code::ClusterAuthorizationFailed => {
                let lacks = lacks("Create", "it");
                return rejected(format!("topic {name} does not exist: {lacks} ({code})"));
            }
            Code::InvalidReplicationFactor => format!(
                "sink.kafka.topics.replication_factor is {}, and there are not so many brokers",
                topics.replication_factor
            ),
            Code::InvalidPartitions => {
                format!("sink.kafka.topics.partitions is {}", topics.partitions)
            }
            Code::InvalidConfig => match self.refused_setting(topics, name) {
                Some((setting, value)) => {
                    format!("sink.kafka.topics.config has {setting:?} = {value:?}")
                }
                None => "sink.kafka.topics.config".to_owned(),
            },
            code => return unknown(format!("create topic {name}: {code}")),
        };
        unknown(format!("create topic {name}: {setting} ({code})"))
    }

    /// The setting that the broker would refuse alone.
    fn refused_setting<'a>(
        &self,
        topics: &'a Topics,
        name: &str,
    ) -> Option<(&'a String, &'a String)> {
        topics.config.iter().find(|(setting, value)| {
            let alone = [((*setting).clone(), (*value).clone())].into();
            let new = new_topic(topics, name, &alone);
            let options = options().validate_only(true);
            let asked = self.client.create_topics([&new], &options);
            let answers = self.runtime.block_on(asked).unwrap_or_default();
            let refused = |answer: &TopicResult| matches!(answer, Err((_, Code::InvalidConfig)));
            answers.iter().any(refused)
        })
    }

    fn collides_with(&self, name: &str) -> Option<String> {
        let same =
            |other: &String| other != name && other.replace('.', "_") == name.replace('.', "_");
        self.all()?.into_keys().find(same)
    }
}

fn options() -> AdminOptions {
    AdminOptions::new()
        .request_timeout(Some(ASK_TIMEOUT))
        .operation_timeout(Some(ASK_TIMEOUT))
}

fn new_topic<'a>(
    topics: &Topics,
    name: &'a str,
    config: &'a BTreeMap<String, String>,
) -> NewTopic<'a> {
    let replication = TopicReplication::Fixed(topics.replication_factor);
    let new = NewTopic::new(name, topics.partitions, replication);
    config
        .iter()
        .fold(new, |new, (name, value)| new.set(name, value))
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
