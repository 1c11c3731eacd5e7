//! The settings of pipelines: each over those that hold for all.

use std::str::FromStr;
use std::time::UNIX_EPOCH;

use figment::Figment;
use serde::Deserialize;

use super::{ConfigError, PipelineConfig};
use crate::encode::{self, Encoding};
use crate::event::{PipelineName, Shard, Start};
use crate::relay::{Pipeline, Policy};
use crate::route::{Filter, Route, Template, illegal_topic};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawPipeline {
    start: StartText,
    shards: u32,
    topic: Template,
    key: Template,
    format: encode::Format,
    cloudevents_source: String,
    on_rejected: Policy,
    dead_letter_topic: Option<TopicName>,
    parked_max: usize,
    parked_max_per_entity: usize,
    filter: Filter,
}

#[derive(Deserialize)]
#[serde(try_from = "String")]
struct TopicName(String);

impl TryFrom<String> for TopicName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        match illegal_topic(&name).or_else(|| of_kafka(&name)) {
            Some(reason) => Err(reason),
            None => Ok(Self(name)),
        }
    }
}

/// Names that the sink refuses, whatever the brokers say.
fn of_kafka(name: &str) -> Option<String> {
    name.starts_with("__")
        .then(|| "topic names that begin with \"__\" belong to Kafka itself".to_owned())
}

#[derive(Deserialize)]
#[serde(try_from = "String")]
struct StartText(Start);

impl TryFrom<String> for StartText {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let start = match &text[..] {
            "earliest" => Start::Earliest,
            "latest" => Start::Latest,
            time => {
                let time = humantime::parse_rfc3339_weak(time).map_err(|_| {
                    format!("{time:?} is neither \"earliest\" nor \"latest\" nor a time such as \"2026-01-31T00:00:00Z\"")
                })?;
                let since = time
                    .duration_since(UNIX_EPOCH)
                    .map_err(|_| "the time is before 1970".to_owned())?;
                Start::Time(
                    i64::try_from(since.as_micros())
                        .map_err(|_| "the time is too late".to_owned())?,
                )
            }
        };
        Ok(Self(start))
    }
}

pub(super) fn resolve_pipelines(
    figment: &Figment,
    mut names: Vec<String>,
) -> Result<Vec<PipelineConfig>, ConfigError> {
    if names.is_empty() {
        names.push("main".to_owned());
    }
    names
        .into_iter()
        .map(|name| resolve_pipeline(figment, &name))
        .collect()
}

fn check_topic(key: &str, topic: &Template) -> Result<(), ConfigError> {
    let illegal = topic.illegal_as_topic();
    illegal
        .or_else(|| of_kafka(&topic.to_string()))
        .map_or(Ok(()), |reason| {
            Err(ConfigError::new(format!(
                "{key}.topic = {:?}: {reason}: every event would be rejected",
                topic.to_string()
            )))
        })
}

fn resolve_pipeline(figment: &Figment, name: &str) -> Result<PipelineConfig, ConfigError> {
    let key = format!("pipelines.{name}");
    let pipeline_name = PipelineName::from_str(name)
        .map_err(|reason| ConfigError::new(format!("{key}: {reason}")))?;
    let layered = figment.focus("pipeline").merge(figment.focus(&key));
    let raw: RawPipeline = layered
        .extract()
        .map_err(|error| ConfigError::from_figment(&error, &key, figment))?;
    let RawPipeline {
        start,
        shards,
        topic,
        key: key_template,
        format,
        cloudevents_source,
        on_rejected,
        dead_letter_topic,
        parked_max,
        parked_max_per_entity,
        filter,
    } = raw;
    if !(1..=Shard::COUNT_MAX).contains(&shards) {
        return Err(ConfigError::new(format!(
            "{key}.shards = {shards}: has to be 1 to {}",
            Shard::COUNT_MAX
        )));
    }
    check_topic(&key, &topic)?;
    for (setting, value) in [
        ("parked_max", parked_max),
        ("parked_max_per_entity", parked_max_per_entity),
    ] {
        if value == 0 {
            return Err(ConfigError::new(format!(
                "{key}.{setting} = 0: has to be at least 1; to set nothing aside say on_rejected = \"halt\" or \"drop\""
            )));
        }
    }
    let says = |setting: &str| figment.find_value(&format!("{key}.{setting}")).is_ok();
    // A pipeline with a policy of its own need not take back the topic that is for the others.
    let for_others = says("on_rejected") && !says("dead_letter_topic");
    let dead_letter_topic =
        dead_letter_topic.filter(|_| on_rejected == Policy::DeadLetter || !for_others);
    if dead_letter_topic.is_some() && on_rejected != Policy::DeadLetter {
        return Err(ConfigError::new(format!(
            "{key}.dead_letter_topic is set and on_rejected is not \"dead_letter\": nothing would go there"
        )));
    }
    Ok(PipelineConfig {
        pipeline: Pipeline {
            name: pipeline_name,
            filter,
            route: Route {
                topic,
                key: key_template,
            },
            encoding: Encoding {
                format,
                cloudevents_source,
            },
            on_rejected,
            dead_letter_topic: dead_letter_topic.map(|TopicName(name)| name),
            parked_max,
            parked_max_per_entity,
        },
        start: start.0,
        shards,
    })
}
