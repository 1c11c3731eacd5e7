//! `outbox-relay check`: is the configuration right, and what does it mean?

use clap::Args;
use humantime::format_duration;

use super::show::say;
use super::{ConfigArgs, Outcome};
use crate::config::{Config, InForce, PipelineConfig, Sink, Source, postgres_security};
use crate::relay::Policy;
use crate::retention;
use crate::sink::kafka::Delivery;
use crate::source::postgres::CaptureMode;

/// Read the configuration, and say what is wrong with it or what it means.
#[derive(Debug, Args)]
pub(super) struct Check {
    #[command(flatten)]
    config: ConfigArgs,

    /// Show every setting that is in force, and where it was written; secrets are not shown.
    #[arg(long)]
    all: bool,
}

impl Check {
    pub(super) fn run(self) -> Result<Outcome, anyhow::Error> {
        let config = self.config.load()?;
        config.try_out()?;
        say!("the configuration is right");
        say!("  from      {}", source(&config));
        say!("  to        {}", sink(&config));
        for pipeline in &config.pipelines {
            say!("  pipeline  {}", describe(pipeline));
        }
        say!("  retention {}", retention(&config.retention));
        for weakness in config.weaknesses() {
            say!("  warning   {weakness}");
        }
        for note in config.notes() {
            say!("  note      {note}");
        }
        if self.all {
            say!("");
            for InForce { key, value, origin } in &config.in_force {
                say!("{key} = {value}   # {origin}");
            }
        }
        say!("whether both ends answer is told by `outbox-relay doctor`");
        Ok(Outcome::Done)
    }
}

/// Host and database, never the password.
pub(super) fn source(config: &Config) -> String {
    match &config.source {
        Source::Postgres(settings) => {
            let options = settings.connector.known();
            let user = options.get_username();
            format!(
                "PostgreSQL at {}:{}, database {:?}, as {user:?}, {}, {}",
                options.get_host(),
                options.get_port(),
                options.get_database().unwrap_or(user),
                postgres_security(options),
                match settings.mode {
                    CaptureMode::Listen => "woken by notifications",
                    CaptureMode::Poll => "polling",
                }
            )
        }
        Source::Sqlite { path, .. } => format!("the SQLite file {}", path.display()),
    }
}

/// How long events stay, and when they are lost.
fn retention(settings: &retention::Settings) -> String {
    let keep = settings.keep.map_or("for ever".to_owned(), |keep| {
        format!("for {}", format_duration(keep))
    });
    let unpublished = match (settings.keep, settings.drop_unpublished_after) {
        (Some(_), Some(after)) => format!(
            "events that a pipeline has not published within {} are LOST (retention.drop_unpublished_after)",
            format_duration(after)
        ),
        _ => "what is not published stays until it is".to_owned(),
    };
    format!("published events stay {keep}; {unpublished}")
}

pub(super) fn sink(config: &Config) -> String {
    match &config.sink {
        Sink::Kafka(settings) => {
            let topics = if settings.topics.create {
                "topics are created"
            } else {
                "topics have to be there"
            };
            let delivery = match (settings.delivery, &settings.transactional_id) {
                (Delivery::ExactlyOnce, Some(id)) => {
                    format!("exactly once, with transactional ids {id}.PIPELINE.SHARD")
                }
                _ => "at least once".to_owned(),
            };
            format!(
                "Kafka at {}, {}, {topics}, {delivery}",
                settings.brokers,
                settings.security()
            )
        }
        Sink::Stdout => "the standard output".to_owned(),
    }
}

fn describe(config: &PipelineConfig) -> String {
    let pipeline = &config.pipeline;
    let filter = &pipeline.filter;
    let mut takes = Vec::new();
    if !filter.aggregate_types.is_empty() {
        takes.push(filter.aggregate_types.join(", "));
    }
    if !filter.event_types.is_empty() {
        takes.push(format!("events {}", filter.event_types.join(", ")));
    }
    for (name, value) in &filter.headers {
        takes.push(format!("header {name} = {value}"));
    }
    let takes = if takes.is_empty() {
        "everything".to_owned()
    } else {
        takes.join("; ")
    };
    let shards = match config.shards {
        1 => String::new(),
        shards => format!(", in {shards} shards"),
    };
    let rejected = match pipeline.on_rejected {
        Policy::Park => "parked".to_owned(),
        Policy::DeadLetter => match &pipeline.dead_letter_topic {
            Some(topic) => format!("a dead letter, copied to topic {topic}"),
            None => "a dead letter".to_owned(),
        },
        Policy::Drop => "DROPPED".to_owned(),
        Policy::Halt => "a reason to stop".to_owned(),
    };
    format!(
        "{}: {takes} to topic {}, key {}{shards}; what is rejected is {rejected}",
        pipeline.name, pipeline.route.topic, pipeline.route.key
    )
}
