//! What the brokers would refuse the relay for want of a right: asked, never tried on a user's topic.
//!
//! Whether one topic may be written to shows only when somebody writes to it, which is not done here.

use std::collections::BTreeSet;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Error};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::metadata::MetadataTopic;
use rdkafka::producer::{BaseProducer, Producer};
use tokio::runtime::Handle;
use tokio::task::spawn_blocking;
use tokio::time::Instant;

use super::{Finding, transactions};
use crate::config::PipelineConfig;
use crate::sink::kafka::{Delivery, Settings};

/// For one question to a broker.
const ANSWER_MAX: Duration = Duration::from_secs(8);
/// A producer that is given no number within this time has at least not been refused one.
const REFUSAL_MAX: Duration = Duration::from_millis(1500);

/// A right that is missing, and on what.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Lacks {
    Describe(String),
    Create(String),
    /// On every topic there is.
    Write,
    /// Describe or Write.
    TransactionalId(String),
}

/// `topics` are those that are known beforehand, with their pipelines; `existing` those that may be seen.
pub(super) async fn examine(
    settings: &Settings,
    pipelines: &[PipelineConfig],
    topics: &[(String, String)],
    existing: &BTreeSet<String>,
) -> Result<Vec<Finding>, Error> {
    let Some(user) = user(settings) else {
        // Nobody in particular has no rights of their own.
        return Ok(Vec::new());
    };
    let mut names: BTreeSet<String> = topics.iter().map(|(_, topic)| topic.clone()).collect();
    names.extend(transactions::positions_topics(settings, pipelines));
    let unseen: Vec<String> = names.difference(existing).cloned().collect();
    let (asked, runtime) = (settings.clone(), Handle::current());
    // librdkafka waits in its calls.
    let lacks = spawn_blocking(move || ask(&asked, &unseen, &runtime)).await??;
    Ok(lacks
        .iter()
        .map(|lacks| lacks.judge(settings, &user))
        .collect())
}

/// As whom the relay logs in, as far as that is known.
fn user(settings: &Settings) -> Option<String> {
    let by_certificate = settings.tls.certificate_file.as_ref();
    let by_certificate = by_certificate.map(|_| "...".to_owned());
    settings
        .sasl
        .mechanism
        .as_ref()
        .map_or(by_certificate, |_| {
            Some(settings.sasl.username.clone().unwrap_or_default())
        })
}

fn ask(settings: &Settings, unseen: &[String], runtime: &Handle) -> Result<Vec<Lacks>, Error> {
    let admin: AdminClient<DefaultClientContext> = settings
        .client()
        .create()
        .context("set up the Kafka client")?;
    let mut lacks = Vec::new();
    for topic in unseen {
        let metadata = admin.inner().fetch_metadata(Some(topic), ANSWER_MAX);
        let metadata = metadata.with_context(|| format!("ask about topic {topic}"))?;
        let error = metadata.topics().first().and_then(MetadataTopic::error);
        match error.map(Code::from) {
            Some(Code::TopicAuthorizationFailed) => lacks.push(Lacks::Describe(topic.clone())),
            Some(Code::UnknownTopicOrPartition) if settings.topics.create => {
                if !runtime.block_on(may_create(&admin, topic))? {
                    lacks.push(Lacks::Create(topic.clone()));
                }
            }
            _ => {}
        }
    }
    let refused = match (settings.delivery, &settings.transactional_id) {
        (Delivery::ExactlyOnce, Some(id)) => may_not_use(settings, &format!("{id}.doctor")),
        _ => may_not_write(settings),
    };
    lacks.extend(refused.context("ask for the rights of a producer")?);
    Ok(lacks)
}

async fn may_create(admin: &AdminClient<DefaultClientContext>, topic: &str) -> Result<bool, Error> {
    let new = NewTopic::new(topic, 1, TopicReplication::Fixed(1));
    let options = AdminOptions::new()
        .request_timeout(Some(ANSWER_MAX))
        .validate_only(true);
    let answers = admin.create_topics([&new], &options).await;
    let answers = answers.with_context(|| format!("ask whether topic {topic} may be made"))?;
    let refused = [
        Code::TopicAuthorizationFailed,
        Code::ClusterAuthorizationFailed,
    ];
    Ok(!answers
        .iter()
        .any(|answer| matches!(answer, Err((_, code)) if refused.contains(code))))
}

/// Whoever may write to any topic may have a number for an idempotent producer.
fn may_not_write(settings: &Settings) -> Result<Option<Lacks>, KafkaError> {
    let mut config = settings.client();
    let producer: BaseProducer = config.set("enable.idempotence", "true").create()?;
    let until = Instant::now() + REFUSAL_MAX;
    while Instant::now() < until {
        match producer.client().fatal_error() {
            Some((Code::ClusterAuthorizationFailed, _)) => return Ok(Some(Lacks::Write)),
            Some(_) => return Ok(None),
            None => sleep(Duration::from_millis(20)),
        }
    }
    Ok(None)
}

/// With an id that begins like those of the pipelines. To use one of theirs would shut its owner out.
fn may_not_use(settings: &Settings, id: &str) -> Result<Option<Lacks>, KafkaError> {
    let mut config = settings.client();
    let producer: BaseProducer = config.set("transactional.id", id).create()?;
    match producer.init_transactions(ANSWER_MAX) {
        Err(KafkaError::Transaction(error))
            if error.code() == Code::TransactionalIdAuthorizationFailed =>
        {
            Ok(Some(Lacks::TransactionalId(id.to_owned())))
        }
        // Other trouble is for other checks.
        _ => Ok(None),
    }
}

impl Lacks {
    fn judge(&self, settings: &Settings, user: &str) -> Finding {
        let of_topic = |right: &str, topic: &str| {
            (
                format!("the right {right} on topic {topic}"),
                "events of this topic are rejected; if it holds positions, nothing is published",
                format!(
                    "--topic {topic} --operation Describe --operation DescribeConfigs --operation Write"
                ),
            )
        };
        let (right, why, grant) = match self {
            Self::Describe(topic) => of_topic("Describe", topic),
            Self::Create(topic) => {
                let (right, why, grant) = of_topic("Create", topic);
                (right, why, format!("{grant} --operation Create"))
            }
            Self::Write => (
                "the right Write on every topic".to_owned(),
                "nothing can be published",
                "--resource-pattern-type prefixed --topic ... --operation Describe --operation DescribeConfigs \
                 --operation Write"
                    .to_owned(),
            ),
            Self::TransactionalId(id) => {
                let prefix = id.strip_suffix("doctor").unwrap_or(id);
                (
                    format!("the right Describe or Write on transactional ids that begin with {prefix}"),
                    "exactly-once delivery can't begin, so nothing is published",
                    format!(
                        "--resource-pattern-type prefixed --transactional-id {prefix} --operation Describe \
                         --operation Write"
                    ),
                )
            }
        };
        Finding::error("kafka_rights", format!("{user} lacks {right}"), why).command(format!(
            "kafka-acls.sh --bootstrap-server {} --add --allow-principal User:{user} {grant}",
            settings.brokers
        ))
    }
}
