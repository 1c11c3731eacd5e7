//! What exactly-once delivery needs of the brokers.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Error};
use rdkafka::admin::{AdminClient, AdminOptions, ResourceSpecifier};
use rdkafka::client::DefaultClientContext;

use super::Finding;
use crate::config::PipelineConfig;
use crate::event::Shard;
use crate::sink::kafka::{Delivery, Settings, positions_topic};

/// For one question to a broker.
const ANSWER_MAX: Duration = Duration::from_secs(8);
/// What librdkafka asks for unless told otherwise.
const TIMEOUT_MS: i64 = 60_000;

/// What the brokers say.
#[derive(Clone, Debug, Default)]
struct Facts {
    /// The longest transaction that they allow.
    timeout_max_ms: Option<i64>,
    /// The cleanup policies of the topics that hold positions, as far as these exist.
    policies: BTreeMap<String, String>,
}

/// `existing` are the topics that are known to be there; `broker` is any of the brokers.
pub(super) async fn examine(
    settings: &Settings,
    pipelines: &[PipelineConfig],
    existing: &BTreeSet<String>,
    broker: Option<i32>,
) -> Result<Vec<Finding>, Error> {
    if settings.delivery != Delivery::ExactlyOnce {
        return Ok(Vec::new());
    }
    let topics = positions_topics(settings, pipelines);
    let there: Vec<&str> = topics
        .iter()
        .filter(|topic| existing.contains(*topic))
        .map(String::as_str)
        .collect();
    let facts = ask(settings, &there, broker).await?;
    Ok(judge(settings, &topics, &facts))
}

/// The topics that hold positions; none without exactly-once.
pub(super) fn positions_topics(settings: &Settings, pipelines: &[PipelineConfig]) -> Vec<String> {
    if settings.delivery != Delivery::ExactlyOnce {
        return Vec::new();
    }
    pipelines
        .iter()
        .flat_map(|config| {
            (0..config.shards).map(|index| (&config.pipeline.name, index, config.shards))
        })
        .filter_map(|(pipeline, index, count)| {
            let settings = settings.clone().of_shard(pipeline, Shard { index, count });
            settings.transactional_id.as_deref().map(positions_topic)
        })
        .collect()
}

async fn ask(settings: &Settings, topics: &[&str], broker: Option<i32>) -> Result<Facts, Error> {
    let admin: AdminClient<DefaultClientContext> = settings
        .client()
        .create()
        .context("set up the Kafka client")?;
    let resources: Vec<ResourceSpecifier<'_>> = topics
        .iter()
        .map(|topic| ResourceSpecifier::Topic(topic))
        .chain(broker.map(ResourceSpecifier::Broker))
        .collect();
    let options = AdminOptions::new().request_timeout(Some(ANSWER_MAX));
    let mut facts = Facts::default();
    for resource in resources {
        let described = admin
            .describe_configs([&resource], &options)
            .await
            .context("ask for settings of brokers and topics")?;
        let Some(Ok(described)) = described.into_iter().next() else {
            continue;
        };
        let told = |name: &str| described.get(name)?.value.clone();
        match resource {
            ResourceSpecifier::Topic(topic) => {
                if let Some(policy) = told("cleanup.policy") {
                    facts.policies.insert(topic.to_owned(), policy);
                }
            }
            _ => {
                facts.timeout_max_ms =
                    told("transaction.max.timeout.ms").and_then(|text| text.parse().ok());
            }
        }
    }
    Ok(facts)
}

fn judge(settings: &Settings, topics: &[String], facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let asked = settings.properties.get("transaction.timeout.ms");
    let timeout_ms = asked
        .and_then(|text| text.parse().ok())
        .unwrap_or(TIMEOUT_MS);
    if let Some(max) = facts.timeout_max_ms.filter(|max| *max < timeout_ms) {
        findings.push(
            Finding::error(
                "transaction_timeout",
                format!("transactions of {timeout_ms} ms are asked for, and the brokers allow {max} (transaction.max.timeout.ms)"),
                "exactly-once delivery can't begin, so nothing is published",
            )
            .configuration(format!(
                "[sink.kafka.properties]\n\"transaction.timeout.ms\" = \"{max}\""
            )),
        );
    }
    for topic in topics {
        match facts.policies.get(topic) {
            Some(policy) if policy != "compact" => findings.push(
                Finding::warning(
                    "positions_topic",
                    format!("topic {topic} holds the committed position and has cleanup.policy={policy}"),
                    "the position may be deleted; after a crash events could be published twice then",
                )
                .command(format!(
                    "kafka-configs.sh --bootstrap-server {} --alter --topic {topic} --add-config cleanup.policy=compact",
                    settings.brokers
                )),
            ),
            None if !settings.topics.create => findings.push(
                Finding::error(
                    "positions_topic",
                    format!("topic {topic} does not exist (or may not be seen), and sink.kafka.topics.create is false"),
                    "exactly-once delivery keeps its position there, so nothing is published",
                )
                .command(format!(
                    "kafka-topics.sh --bootstrap-server {} --create --topic {topic} --partitions 1 --config cleanup.policy=compact",
                    settings.brokers
                )),
            ),
            _ => {}
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Sink};

    fn settings(more: &[(&str, &str)]) -> Settings {
        let env = [
            ("SOURCE__POSTGRES__URL", "postgres://db/app"),
            ("SINK__KAFKA__DELIVERY", "exactly-once"),
            ("SINK__KAFKA__TRANSACTIONAL_ID", "shop"),
        ];
        let env = env.iter().chain(more);
        let env = env.map(|(name, value)| (format!("RELAY_{name}"), (*value).to_owned()));
        match Config::load(None, env).unwrap().sink {
            Sink::Kafka(settings) => *settings,
            Sink::Stdout => panic!("the default sink is Kafka"),
        }
    }

    #[test]
    fn what_stands_in_the_way_is_found() {
        let topics = ["shop.a.0.positions", "shop.b.0.positions"].map(str::to_owned);
        let mut facts = Facts {
            timeout_max_ms: Some(900_000),
            policies: [(topics[0].clone(), "compact".to_owned())].into(),
        };
        assert_eq!(judge(&settings(&[]), &topics, &facts), []);
        let own = settings(&[("SINK__KAFKA__TOPICS__CREATE", "false")]);
        facts.timeout_max_ms = Some(30_000);
        facts
            .policies
            .insert(topics[0].clone(), "delete".to_owned());
        let found = judge(&own, &topics, &facts);
        let checks: Vec<&str> = found.iter().map(|finding| finding.check).collect();
        assert_eq!(
            checks,
            ["transaction_timeout", "positions_topic", "positions_topic"]
        );
    }
}
