//! Reads a page at each cursor as a relay would, without writing anything: a row that can't be read and a right that is lacking
//! show here, and the topics that the waiting events want.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::timeout;

use super::Finding;
use crate::config::{Config, PipelineConfig};
use crate::database::{Database, Place};
use crate::encode::{Texts, encode};
use crate::event::{Event, Rejection};
use crate::reason::reason;
use crate::relay::Policy;
use crate::source::{PageLimits, Source};
use crate::supervise;

/// Enough to see what comes next.
const PAGE: PageLimits = PageLimits {
    rows: 200,
    bytes: 4 << 20,
};
/// For one page.
const READ_MAX: Duration = Duration::from_secs(5);
/// Of many shards the first ones tell enough.
const PLACES_MAX: usize = 8;

/// What was found, and the topics that waiting events want, with their pipelines.
#[derive(Default)]
pub(super) struct Read {
    pub(super) findings: Vec<Finding>,
    pub(super) topics: BTreeSet<(String, String)>,
}

pub(super) async fn examine(config: &Config, database: &mut Database) -> Read {
    let mut read = Read::default();
    for pipeline in &config.pipelines {
        let name = &pipeline.pipeline.name;
        let places = match database.places(name, pipeline.start).await {
            Ok(places) => places,
            Err(error) => {
                read.findings.push(Finding::unknown("reading", &error));
                continue;
            }
        };
        for place in places.into_iter().take(PLACES_MAX) {
            at(config, pipeline, place, &mut read).await;
        }
    }
    read
}

async fn at(config: &Config, pipeline: &PipelineConfig, place: Place, read: &mut Read) {
    let Place { shard, position } = place;
    let name = &pipeline.pipeline.name;
    let mut source = supervise::onlooker_of(&config.source, name, shard);
    let beginning = position.clone();
    source.seek(position);
    let page = match timeout(READ_MAX, source.capture(PAGE, &beginning)).await {
        Ok(Ok(page)) => page,
        Ok(Err(error)) => {
            read.findings.push(
                Finding::error(
                    "reading",
                    format!("the log can't be read where pipeline {name} stands: {}", reason(&error.into())),
                    "the relay reads in the same way, and publishes nothing of the pipeline until it can",
                )
                .advice("mend what the message says"),
            );
            return;
        }
        // Where nothing of the pipeline is among many events.
        Err(_) => return,
    };
    let mut rejected: Vec<(&Event, Rejection)> = Vec::new();
    for event in &page.events {
        match topic(pipeline, event) {
            Ok(Some(topic)) => {
                read.topics.insert((name.to_string(), topic));
            }
            Ok(None) => {}
            Err(rejection) => rejected.push((event, rejection)),
        }
    }
    read.findings.extend(judge(pipeline, &rejected));
}

/// None where the event is not for the pipeline.
fn topic(pipeline: &PipelineConfig, event: &Event) -> Result<Option<String>, Rejection> {
    let pipeline = &pipeline.pipeline;
    if !pipeline.filter.admits(event)? {
        return Ok(None);
    }
    let texts = Texts::of(event);
    let record = encode(event, &texts, &pipeline.route, &pipeline.encoding)?;
    Ok(Some(record.topic.into_owned()))
}

/// What is rejected where it stands is what the relay does with it: an error only where it stops there.
fn judge(pipeline: &PipelineConfig, rejected: &[(&Event, Rejection)]) -> Option<Finding> {
    let (event, rejection) = rejected.first()?;
    let name = &pipeline.pipeline.name;
    let more = match rejected.len() - 1 {
        0 => String::new(),
        more => format!(" (and {more} more of the next events)"),
    };
    let what = format!(
        "pipeline {name} can't publish event {} of type {:?}: {rejection}{more}",
        event.id,
        &event.aggregate_type[..]
    );
    Some(match pipeline.pipeline.on_rejected {
        Policy::Halt => Finding::error(
            "rejected",
            what,
            "the pipeline halts there (on_rejected = \"halt\"): nothing after it is published",
        )
        .command(format!(
            "outbox-relay pipelines skip {name} {} --reason …",
            event.event_id
        )),
        Policy::Park => Finding::warning(
            "rejected",
            what,
            "it will be parked, and its entity waits (on_rejected = \"park\")",
        )
        .advice("mend the cause before a relay comes to it, or see `outbox-relay parked list` afterwards"),
        Policy::DeadLetter => Finding::warning(
            "rejected",
            what,
            "it will be a dead letter (on_rejected = \"dead_letter\")",
        )
        .advice("mend the cause before a relay comes to it, or see `outbox-relay parked list` afterwards"),
        Policy::Drop => Finding::warning(
            "rejected",
            what,
            "it will be dropped (on_rejected = \"drop\")",
        )
        .advice("mend the cause before a relay comes to it"),
    })
}
