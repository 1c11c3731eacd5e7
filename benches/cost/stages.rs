//! Runs one stage so many times over a recorded page: what callgrind looks at.

use std::future::Future;

use anyhow::{Context, Error, bail};
use outbox_relay::config::{Config, RecordFormat, Sink as SinkConfig};
use outbox_relay::event::Event;
use outbox_relay::sink::kafka::KafkaSink;
use rdkafka::mocking::MockCluster;

use crate::bounds::Stage;
use crate::drain::{Prompt, drain};
use crate::recording::{AGGREGATE_TYPE, EVENT_TYPE, HEADERS, events, rows};
use crate::rules;

/// Events of the page.
pub const PAGE: usize = 2_000;

/// Of the topic, as they are created by default.
const PARTITIONS: i32 = 8;

/// Runs a stage, with the settings that are shipped.
///
/// # Errors
/// When it does not come to the right end.
pub fn run(stage: Stage, rounds: usize) -> Result<(), Error> {
    let Config {
        mut pipelines,
        relay: settings,
        sink,
        ..
    } = defaults()?;
    let mut pipeline = pipelines.remove(0).pipeline;
    let mut events = events(PAGE);
    match stage {
        Stage::Decode => return rules::decode_all(&rows(&events), rounds),
        Stage::Order => return rules::order(&events, &settings, rounds),
        Stage::Route => return rules::route(&events, &pipeline, rounds),
        Stage::Encode => return rules::encode_all(&events, &pipeline, rounds),
        Stage::EncodeHeaders => {
            give_headers(&mut events);
            return rules::encode_all(&events, &pipeline, rounds);
        }
        Stage::EncodeCloudevents => {
            pipeline.encoding.format = RecordFormat::CloudeventsJson;
            return rules::encode_all(&events, &pipeline, rounds);
        }
        Stage::Drain | Stage::DrainKafka => {}
        Stage::DrainFiltered => pipeline.filter.event_types = vec![EVENT_TYPE.to_owned()],
    }
    let relay = (pipeline, settings);
    let page = rows(&events);
    if stage == Stage::DrainKafka {
        let cluster = MockCluster::new(1).context("start a broker in this process")?;
        cluster
            .create_topic(AGGREGATE_TYPE, PARTITIONS, 1)
            .context("create its topic")?;
        let sink = kafka(sink, &cluster.bootstrap_servers())?;
        block_on(drain(page, relay, sink, rounds))
    } else {
        block_on(drain(page, relay, Prompt::default(), rounds))
    }
}

fn defaults() -> Result<Config, Error> {
    let url = (
        "RELAY_SOURCE__POSTGRES__URL",
        "postgres://nobody@localhost/none",
    );
    let env = [(url.0.to_owned(), url.1.to_owned())];
    Ok(Config::load(None, env)?)
}

fn give_headers(events: &mut [Event]) {
    for event in events {
        event.headers = Some(HEADERS.into());
    }
}

fn kafka(sink: SinkConfig, brokers: &str) -> Result<KafkaSink, Error> {
    let SinkConfig::Kafka(mut settings) = sink else {
        bail!("the shipped sink is Kafka");
    };
    brokers.clone_into(&mut settings.brokers);
    Ok(KafkaSink::new(*settings))
}

fn block_on(drain: impl Future<Output = Result<(), Error>>) -> Result<(), Error> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(drain)
}
