//! Looks at the Kafka end: is it there, does it let us in, are the brokers where they say, are the topics there.
//!
//! Not looked at: the version of the brokers, which librdkafka finds out by itself, and their clocks, which no cheap
//! request tells.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::anyhow;
use rdkafka::client::ClientContext;
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::metadata::MetadataBroker;
use rdkafka::producer::{BaseProducer, Producer, ProducerContext};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout};

use super::{Finding, answered, kafka_rights, transactions};
use crate::config::PipelineConfig;
use crate::route::illegal_topic;
use crate::sink::kafka::Settings;

/// Long enough for TLS and SASL on a slow line, short enough for a person who waits.
const ANSWER_MAX: Duration = Duration::from_secs(8);
/// For one broker's port.
const CONNECT_MAX: Duration = Duration::from_secs(3);
/// Of a large cluster the first ones tell enough.
const BROKERS_MAX: usize = 20;

/// What a cluster says about itself.
#[derive(Clone, Debug, Default)]
struct Cluster {
    /// Host and port, as clients are told to use them.
    brokers: Vec<(String, i32)>,
    topics: BTreeSet<String>,
    /// One of its brokers.
    broker: Option<i32>,
}

/// What librdkafka said on the way.
#[derive(Clone, Debug)]
struct Trouble {
    code: Option<Code>,
    reason: String,
}

struct Context(mpsc::UnboundedSender<Trouble>);

impl ClientContext for Context {
    fn log(&self, _: RDKafkaLogLevel, facility: &str, message: &str) {
        // A broker that hangs up is told of in the log alone.
        if facility == "FAIL" {
            let reason = message
                .split_once("]: ")
                .map_or(message, |(_, reason)| reason);
            let _ = self.0.send(Trouble {
                code: None,
                reason: reason.to_owned(),
            });
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        // The receiver lives as long as the client.
        let _ = self.0.send(Trouble {
            code: error.rdkafka_error_code(),
            reason: reason.to_owned(),
        });
    }
}

impl ProducerContext for Context {
    type DeliveryOpaque = ();

    fn delivery(&self, _: &rdkafka::message::DeliveryResult<'_>, (): ()) {}
}

/// `wanted` are the topics of waiting events, with their pipelines.
pub(super) async fn examine(
    settings: &Settings,
    pipelines: &[PipelineConfig],
    wanted: BTreeSet<(String, String)>,
) -> Vec<Finding> {
    let mut topics = known_topics(pipelines);
    let mut findings = illegal(&topics);
    if let Err(why) = settings.try_out() {
        findings.push(
            Finding::error(
                "kafka_settings",
                why,
                "there is no Kafka client with these settings, so that the relay does not start",
            )
            .advice("mend the setting and run `outbox-relay check`"),
        );
        return findings;
    }
    // A name that Kafka refuses is told where the log is read.
    let legal = |(_, topic): &(String, String)| illegal_topic(topic).is_none();
    topics.extend(wanted.into_iter().filter(legal));
    topics.sort();
    topics.dedup();
    let asked_at = Instant::now();
    match cluster(settings).await {
        Ok(cluster) => {
            findings.push(reached(settings, cluster.brokers.len(), asked_at.elapsed()));
            findings.extend(settings.weaknesses().into_iter().map(|weakness| {
                Finding::warning(
                    "kafka_security",
                    weakness,
                    "who is on the way can read it, or stand in for a broker",
                )
                .configuration("[sink.kafka.tls]\nenabled = true\nca_file = \"...\"")
            }));
            findings.extend(unreachable_brokers(settings, &cluster.brokers).await);
            findings.extend(judge_topics(settings, &topics, &cluster));
            let transactions =
                transactions::examine(settings, pipelines, &cluster.topics, cluster.broker).await;
            findings.extend(answered("transactions", transactions));
            let rights = kafka_rights::examine(settings, pipelines, &topics, &cluster.topics).await;
            findings.extend(answered("kafka_rights", rights));
        }
        Err(Unreached { said, troubles }) => {
            findings.push(judge_trouble(settings, &said, &troubles));
        }
    }
    findings
}

fn reached(settings: &Settings, brokers: usize, took: Duration) -> Finding {
    let brokers = match brokers {
        1 => "1 broker".to_owned(),
        brokers => format!("{brokers} brokers"),
    };
    let what = format!(
        "Kafka at {}: {brokers}, {} ms",
        settings.brokers,
        took.as_millis()
    );
    Finding::ok("kafka", what)
}

/// Pipeline and topic, where the topic does not depend on what is emitted.
fn known_topics(pipelines: &[PipelineConfig]) -> Vec<(String, String)> {
    let mut topics = Vec::new();
    for config in pipelines {
        let pipeline = &config.pipeline;
        let template = &pipeline.route.topic;
        let types = &pipeline.filter.aggregate_types;
        let rendered: Vec<String> = if template.is_fixed() {
            template.render_for_type("").into_iter().collect()
        } else {
            types
                .iter()
                .filter_map(|aggregate_type| template.render_for_type(aggregate_type))
                .collect()
        };
        topics.extend(
            rendered
                .into_iter()
                .chain(pipeline.dead_letter_topic.clone())
                .map(|topic| (pipeline.name.to_string(), topic)),
        );
    }
    topics
}

fn illegal(topics: &[(String, String)]) -> Vec<Finding> {
    topics
        .iter()
        .filter_map(|(pipeline, topic)| {
            let reason = illegal_topic(topic)?;
            Some(
                Finding::error(
                    "topic_name",
                    format!("pipeline {pipeline}, topic {topic:?}: {reason}"),
                    "every event of this topic is rejected",
                )
                .configuration(format!(
                    "[pipelines.{pipeline}]\ntopic = \"...\"   # a template whose result Kafka accepts"
                )),
            )
        })
        .collect()
}

struct Unreached {
    said: String,
    troubles: Vec<Trouble>,
}

async fn cluster(settings: &Settings) -> Result<Cluster, Unreached> {
    let (sender, mut receiver) = mpsc::unbounded_channel();
    let settings = settings.clone();
    // librdkafka waits in the call.
    let asked = spawn_blocking(move || {
        let mut config = settings.client();
        config
            // Why a broker hung up is what is wanted here: TLS on one side only is known by that.
            .set("log.connection.close", "true")
            .set("reconnect.backoff.ms", "1000");
        let producer: BaseProducer<Context> =
            BaseProducer::from_config_and_context(&config, Context(sender))?;
        let metadata = producer.client().fetch_metadata(None, ANSWER_MAX);
        // What it has to say meanwhile is handed over by polling, a few events at a time.
        for _ in 0..20 {
            producer.poll(Duration::from_millis(5));
        }
        let metadata = metadata?;
        Ok::<_, KafkaError>(Cluster {
            brokers: metadata
                .brokers()
                .iter()
                .map(|broker| (broker.host().to_owned(), broker.port()))
                .collect(),
            topics: metadata
                .topics()
                .iter()
                .map(|topic| topic.name().to_owned())
                .collect(),
            broker: metadata.brokers().first().map(MetadataBroker::id),
        })
    })
    .await;
    let mut troubles = Vec::new();
    while let Ok(trouble) = receiver.try_recv() {
        troubles.push(trouble);
    }
    match asked {
        Ok(Ok(cluster)) => Ok(cluster),
        // Without the value of the property, which may be a secret.
        Ok(Err(KafkaError::ClientConfig(_, reason, name, _))) => Err(Unreached {
            said: format!("{reason} ({name})"),
            troubles,
        }),
        Ok(Err(error)) => Err(Unreached {
            said: error.to_string(),
            troubles,
        }),
        Err(error) => Err(Unreached {
            said: anyhow!(error).to_string(),
            troubles,
        }),
    }
}

/// The most telling trouble: who was refused is reached, who fails TLS is reached too.
fn judge_trouble(settings: &Settings, said: &str, troubles: &[Trouble]) -> Finding {
    let with = |codes: &[Code]| {
        troubles
            .iter()
            .find(|trouble| trouble.code.is_some_and(|code| codes.contains(&code)))
    };
    let brokers = &settings.brokers;
    let error = |check, what: String| {
        Finding::error(
            check,
            what,
            "nothing is published until a broker answers; no event is rejected meanwhile",
        )
    };
    if let Some(refused) = with(&[Code::Authentication, Code::SaslAuthenticationFailed]) {
        return error(
            "kafka_sasl",
            format!("Kafka at {brokers} refuses the login: {}", refused.reason),
        )
        .configuration(
            "[sink.kafka.sasl]\nmechanism = \"...\"\nusername = \"...\"\npassword_file = \"...\"   # as the brokers have them",
        );
    }
    if let Some(failed) = with(&[Code::SSL]) {
        let finding = error(
            "kafka_tls",
            format!("TLS with Kafka at {brokers} fails: {}", failed.reason),
        );
        return if settings.tls.enabled {
            finding.configuration(
                "[sink.kafka.tls]\nca_file = \"...\"   # the authority that signed the brokers' certificates",
            )
        } else {
            finding.configuration("[sink.kafka.tls]\nenabled = true")
        };
    }
    if let Some(unresolved) = with(&[Code::Resolve]) {
        return error("kafka", format!("{brokers}: {}", unresolved.reason)).configuration(
            "[sink.kafka]\nbrokers = \"host:9092\"   # a name that this machine can resolve",
        );
    }
    let hung_up = || troubles.iter().find(|trouble| trouble.code.is_none());
    let reason = with(&[Code::BrokerTransportFailure])
        .or_else(hung_up)
        .or(troubles.last())
        .map_or(said, |trouble| &trouble.reason);
    let finding = error(
        "kafka",
        format!("no answer from Kafka at {brokers}: {reason}"),
    );
    // A broker that hangs up at the first word speaks another protocol on this port.
    let other_protocol = if settings.tls.enabled {
        reason.contains("Disconnected") && reason.contains("SSL_HANDSHAKE")
    } else {
        reason.contains("APIVERSION_QUERY")
    };
    if other_protocol {
        return finding.configuration(format!(
            "[sink.kafka.tls]\nenabled = {}   # or use the port of another listener",
            !settings.tls.enabled
        ));
    }
    let first = brokers.split(',').next().unwrap_or_default().trim();
    let (host, port) = first.rsplit_once(':').unwrap_or((first, "9092"));
    finding.command(format!("nc -vz {host} {port}"))
}

/// The first broker answered, but a record goes to the leader of its partition, at the address that the cluster names.
async fn unreachable_brokers(settings: &Settings, brokers: &[(String, i32)]) -> Vec<Finding> {
    let tried = brokers.iter().take(BROKERS_MAX).map(async |(host, port)| {
        let address = format!("{host}:{port}");
        let reason = match timeout(CONNECT_MAX, TcpStream::connect(&address)).await {
            Ok(Ok(_)) => return None,
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} s", CONNECT_MAX.as_secs()),
        };
        Some(
            Finding::error(
                "kafka_advertised",
                format!(
                    "Kafka answers at {}, but names a broker at {address}, which can't be reached: {reason}",
                    settings.brokers
                ),
                "records for the partitions of this broker are not published",
            )
            .advice(
                "set advertised.listeners of the broker to an address that this machine reaches, or open the way to it",
            ),
        )
    });
    futures_util::future::join_all(tried)
        .await
        .into_iter()
        .flatten()
        .collect()
}

fn judge_topics(
    settings: &Settings,
    topics: &[(String, String)],
    cluster: &Cluster,
) -> Vec<Finding> {
    let create = &settings.topics;
    let mut findings = Vec::new();
    let brokers = cluster.brokers.len();
    if create.create && usize::try_from(create.replication_factor).is_ok_and(|n| n > brokers) {
        findings.push(
            Finding::error(
                "replication_factor",
                format!(
                    "sink.kafka.topics.replication_factor is {}, and there {}",
                    create.replication_factor,
                    match brokers {
                        1 => "is 1 broker".to_owned(),
                        brokers => format!("are {brokers} brokers"),
                    }
                ),
                "topics can't be created, so events for new ones are not published",
            )
            .configuration(format!(
                "[sink.kafka.topics]\nreplication_factor = {brokers}"
            )),
        );
    }
    if create.create {
        return findings;
    }
    let missing = topics
        .iter()
        .filter(|(_, topic)| illegal_topic(topic).is_none() && !cluster.topics.contains(topic));
    findings.extend(missing.map(|(pipeline, topic)| {
        let replication = match create.replication_factor {
            ..1 => String::new(),
            factor => format!(" --replication-factor {factor}"),
        };
        Finding::error(
            "topic",
            format!("topic {topic} of pipeline {pipeline} does not exist (or may not be seen), and sink.kafka.topics.create is false"),
            "every event of this topic is rejected",
        )
        .command(format!(
            "kafka-topics.sh --bootstrap-server {} --create --topic {topic} --partitions {}{replication}",
            settings.brokers, create.partitions
        ))
    }));
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Sink};
    use crate::doctor::Remedy;

    fn settings(toml: &[(&str, &str)]) -> (Settings, Vec<PipelineConfig>) {
        let env = toml
            .iter()
            .chain(&[("RELAY_SOURCE__POSTGRES__URL", "postgres://db/app")])
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let config = Config::load(None, env).unwrap();
        match config.sink {
            Sink::Kafka(settings) => (*settings, config.pipelines),
            Sink::Stdout => panic!("the default sink is Kafka"),
        }
    }

    #[test]
    fn topics_are_known_where_types_are() {
        let (settings, pipelines) = settings(&[
            ("RELAY_SINK__KAFKA__TOPICS__CREATE", "false"),
            ("RELAY_PIPELINES__SHOP__TOPIC", "shop.{aggregate_type}"),
            (
                "RELAY_PIPELINES__SHOP__FILTER__AGGREGATE_TYPES",
                r#"["order", "cart", "a b"]"#,
            ),
            ("RELAY_PIPELINES__ALL__TOPIC", "everything"),
            ("RELAY_PIPELINES__ANY__TOPIC", "{event_type}"),
        ]);
        let topics = known_topics(&pipelines);
        let names: Vec<&str> = topics.iter().map(|(_, topic)| &topic[..]).collect();
        assert_eq!(names, ["everything", "shop.order", "shop.cart", "shop.a b"]);
        assert_eq!(illegal(&topics).len(), 1);
        let cluster = Cluster {
            brokers: vec![("kafka".to_owned(), 9092)],
            topics: ["shop.order".to_owned()].into(),
            broker: Some(1),
        };
        let missing = judge_topics(&settings, &topics, &cluster);
        assert_eq!(missing.len(), 2);
        assert_eq!(
            missing[1].remedy,
            Some(Remedy::Command(
                "kafka-topics.sh --bootstrap-server 127.0.0.1:9092 --create --topic shop.cart --partitions 8"
                    .to_owned()
            ))
        );
    }

    #[test]
    fn the_most_telling_trouble_is_shown() {
        let (settings, _) = settings(&[]);
        let trouble = |code, reason: &str| Trouble {
            code: Some(code),
            reason: reason.to_owned(),
        };
        let found = judge_trouble(
            &settings,
            "timed out",
            &[
                trouble(Code::AllBrokersDown, "1/1 brokers are down"),
                trouble(Code::Authentication, "SASL authentication error"),
            ],
        );
        assert_eq!(found.check, "kafka_sasl");
        assert_eq!(judge_trouble(&settings, "timed out", &[]).check, "kafka");
        let hung_up = Trouble {
            code: None,
            reason: "Disconnected: receive 0 after POLLIN (after 0ms in state APIVERSION_QUERY)"
                .to_owned(),
        };
        let found = judge_trouble(
            &settings,
            "timed out",
            &[
                trouble(Code::AllBrokersDown, "1/1 brokers are down"),
                hung_up,
            ],
        );
        assert_eq!(
            found.remedy,
            Some(Remedy::Configuration(
                "[sink.kafka.tls]\nenabled = true   # or use the port of another listener"
                    .to_owned()
            ))
        );
    }
}
