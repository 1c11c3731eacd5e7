//! An auditor: reads the retained log and the topics, and says what is missing, doubled, out of order, altered or unknown.
//!
//! An oracle of its own: it shares no code with the loop. What it knows of filters, templates, formats and windows is
//! written a second time here, and a test of the layers holds it to that. Changes nothing; prints nothing.
//!
//! # What is read when
//!
//! Nothing has to stand still meanwhile. First the books: what they call settled is in the topics by now. Then the ends
//! of the topics, then the log in one snapshot: what is below those ends was committed before it.

mod expect;
mod judge;
mod log;
mod record;
mod report;
mod set_aside;
mod topics;

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::{Context, Error, anyhow, bail, ensure};
use rdkafka::config::ClientConfig;
use tokio::task::spawn_blocking;

use self::expect::Rules;
use self::judge::{Judge, Terms, Topic};
use self::log::{Books, Log};
pub use self::report::{
    Doubled, Example, Finding, Lost, LostEvents, NotJudged, PipelineReport, Report,
};
use self::set_aside::SetAside;
use self::topics::Cluster;
use crate::config::{Config, Delivery, PipelineConfig, Policy, Sink};
use crate::event::{PipelineName, Start};
use crate::reason::reason;

/// Records that are younger than this, in microseconds, are read too: the broker's clock may be another one.
const CLOCKS_US: i64 = 60_000_000;

/// Events between two signs of life.
const STEP: u64 = 10_000;

/// What is to be looked at.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Only this one.
    pub pipeline: Option<PipelineName>,
    /// Only from the first event that occurred at or after this time, in microseconds since the Unix epoch.
    pub since_us: Option<i64>,
    /// Only from this id on.
    pub from_id: Option<i64>,
    /// A duplicate breaks a promise.
    pub no_duplicates: bool,
}

/// How far an audit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Of what.
    pub side: Side,
    /// So many are read.
    pub read: u64,
    /// Of about so many, where that is known.
    pub all: Option<u64>,
    /// Whether that was the last.
    pub done: bool,
}

/// What an audit reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Events of the log.
    Events,
    /// Records of the topics.
    Records,
}

/// Is told how far an audit is.
pub type Watcher = Arc<dyn Fn(&PipelineName, Progress) + Send + Sync>;

/// Looks at every pipeline, one after the other.
///
/// # Errors
/// When the database or the brokers can't be read: then nothing is known. What they hold is a finding, never an error.
pub async fn audit(config: &Config, options: &Options, watcher: &Watcher) -> Result<Report, Error> {
    let Sink::Kafka(kafka) = &config.sink else {
        bail!("verify reads topics, and sink.kind is not \"kafka\"");
    };
    let client = kafka.client();
    let mut log = Log::open(&config.source).await?;
    let mut report = Report::default();
    let named = |pipeline: &&PipelineConfig| {
        let name = &pipeline.pipeline.name;
        options
            .pipeline
            .as_ref()
            .is_none_or(|wanted| wanted == name)
    };
    for pipeline in config.pipelines.iter().filter(named) {
        let audit = Audit {
            config,
            options,
            pipeline,
            watcher,
        };
        let name = &pipeline.pipeline.name;
        let found = audit.run(&mut log, &client).await;
        report
            .pipelines
            .push(found.with_context(|| format!("pipeline {name}"))?);
    }
    ensure!(
        !report.pipelines.is_empty(),
        "there is no such pipeline in the configuration"
    );
    Ok(report)
}

struct Audit<'a> {
    config: &'a Config,
    options: &'a Options,
    pipeline: &'a PipelineConfig,
    watcher: &'a Watcher,
}

impl Audit<'_> {
    async fn run(&self, log: &mut Log, client: &ClientConfig) -> Result<PipelineReport, Error> {
        let name = &self.pipeline.pipeline.name;
        let rules = Rules::new(self.pipeline);
        let mut notes = Vec::new();
        let books = log.books(name).await?;
        note_books(&books, &mut notes);
        note_policy(self.pipeline.pipeline.on_rejected, &mut notes);
        let (from_id, since_us) = self.scope(log).await?;
        let wanted = self.topics(log, &rules).await?;
        let (cluster, mut topics) = ends(client.clone(), wanted, since_us).await?;
        if let Err(error) = topics::mark_compacted(client, &mut topics).await {
            notes.push(format!(
                "whether topics are compacted is not known, so what compaction removed counts as missing: {}",
                reason(&error)
            ));
        }
        let Books {
            settled,
            parked,
            dropped,
            lost,
            moved: _,
        } = books;
        let parked = parked
            .into_iter()
            .filter(|(id, _)| *id >= from_id)
            .collect();
        let set_aside = SetAside::new(parked, dropped);
        let mut judge = Judge::new(
            self.terms(from_id),
            rules,
            self.others(),
            set_aside,
            &topics,
        );
        let mut events = 0;
        let say = |read, done| {
            let (side, all) = (Side::Events, None);
            let progress = Progress {
                side,
                read,
                all,
                done,
            };
            (self.watcher)(name, progress);
        };
        let retained = log
            .read(from_id, settled.as_ref(), |event| {
                judge.event(event);
                events += 1;
                if events % STEP == 0 {
                    say(events, false);
                }
            })
            .await?;
        say(events, true);
        judge.retained(retained);
        let judge = read(cluster, topics, judge, (name.clone(), self.watcher.clone())).await?;
        let mut report = judge.verdict();
        for finding in [&mut report.missing, &mut report.out_of_order] {
            for example in &mut finding.examples {
                example.event_id = log.event_id(example.sequence.unwrap_or_default()).await?;
            }
        }
        report.pipeline = name.to_string();
        report.lost = Lost::of(lost, from_id);
        report.holds &= report.lost.count == 0;
        report.notes = notes;
        Ok(report)
    }

    fn terms(&self, from_id: i64) -> Terms {
        let exactly_once = match &self.config.sink {
            Sink::Kafka(kafka) => kafka.delivery == Delivery::ExactlyOnce,
            Sink::Stdout => false,
        };
        Terms {
            in_flight_events: self.config.relay.in_flight_rows as u64,
            from_earliest: self.pipeline.start == Start::Earliest,
            duplicates_allowed: !exactly_once && !self.options.no_duplicates,
            from_id,
        }
    }

    fn others(&self) -> Vec<Rules> {
        let name = &self.pipeline.pipeline.name;
        let others = self.config.pipelines.iter();
        others
            .filter(|other| other.pipeline.name != *name)
            .map(Rules::new)
            .collect()
    }

    /// The first id that is looked at, and the earliest time of what is; none when it is everything.
    async fn scope(&self, log: &mut Log) -> Result<(i64, Option<i64>), Error> {
        let Options {
            since_us, from_id, ..
        } = self.options;
        let since = match since_us {
            // Nothing is that young: the id after the last.
            Some(us) => Some(log.first_since(*us).await?.unwrap_or(i64::MAX)),
            None => None,
        };
        let Some(from_id) = since.max(*from_id) else {
            return Ok((i64::MIN, None));
        };
        let earliest = log.earliest_from(from_id).await?;
        let now_or_never = i64::MAX / 2;
        Ok((
            from_id,
            Some(earliest.unwrap_or(now_or_never).saturating_sub(CLOCKS_US)),
        ))
    }

    /// Every topic that the pipeline may have written to, by what is retained and by its filter.
    async fn topics(&self, log: &mut Log, rules: &Rules) -> Result<BTreeSet<String>, Error> {
        let kinds = log.kinds(rules.topic_needs_the_id()).await?;
        let mut topics: BTreeSet<String> = kinds
            .iter()
            .filter(|kind| rules.may_take(kind))
            .map(|kind| rules.topic(kind))
            .collect();
        topics.extend(rules.known_topics());
        Ok(topics)
    }
}

fn note_books(books: &Books, notes: &mut Vec<String>) {
    if books.moved {
        notes.push(
            "the cursor belongs to another cluster or timeline: nothing counts as settled; see \"Restored\" in the README"
                .to_owned(),
        );
    } else if books.settled.is_none() {
        notes.push("there is no cursor yet: nothing counts as settled".to_owned());
    }
}

fn note_policy(policy: Policy, notes: &mut Vec<String>) {
    let note = match policy {
        Policy::Park | Policy::Halt => return,
        Policy::DeadLetter => {
            "on_rejected is \"dead_letter\": one that was redriven comes after later events of its entity"
        }
        Policy::Drop => {
            "on_rejected is \"drop\": what was dropped counts as missing, the log of the relay names it"
        }
    };
    notes.push(note.to_owned());
}

/// The topics that exist and their ends, now.
async fn ends(
    client: ClientConfig,
    wanted: BTreeSet<String>,
    since_us: Option<i64>,
) -> Result<(Cluster, Vec<Topic>), Error> {
    spawn_blocking(move || {
        let cluster = Cluster::new(client)?;
        let topics = cluster.topics(&wanted, since_us.map(|us| us.div_euclid(1000).max(0)))?;
        Ok((cluster, topics))
    })
    .await
    .map_err(|error| anyhow!(error))?
}

async fn read(
    cluster: Cluster,
    topics: Vec<Topic>,
    mut judge: Judge,
    (name, watcher): (PipelineName, Watcher),
) -> Result<Judge, Error> {
    spawn_blocking(move || {
        let all = topics.iter().flat_map(|topic| &topic.partitions);
        let all: i64 = all.map(|partition| partition.end - partition.start).sum();
        let all = u64::try_from(all).unwrap_or_default();
        cluster.read(&topics, &mut judge, |read, done| {
            let (side, all) = (Side::Records, Some(all));
            let progress = Progress {
                side,
                read,
                all,
                done,
            };
            watcher(&name, progress);
        })?;
        Ok(judge)
    })
    .await
    .map_err(|error| anyhow!(error))?
}
