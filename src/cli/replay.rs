//! `outbox-relay replay`: retained events are published again.

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::{Context, Error, bail};
use clap::{Args, Subcommand};
use comfy_table::Cell;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;
use uuid::Uuid;

use super::redrive::who;
use super::show::{self, say};
use super::time::time;
use super::{ConfigArgs, Outcome, Usage};
use crate::config::{Config, Sink as SinkConfig, Source};
use crate::database::{Database, with_next_step};
use crate::event::{EventId, PipelineName};
use crate::logging;
use crate::relay::Pipeline;
use crate::replay::books::{Books, Job, Listed};
use crate::replay::{self, End};
use crate::sink::Sink as _;
use crate::source::{AnyHistory, Selection, postgres, sqlite};
use crate::supervise;

/// Publish retained events again, beside the live flow; each record carries the header `replay`.
#[derive(Debug, Args)]
pub(super) struct Replay {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Publish what matches, and show how far it has come; ctrl-c pauses it.
    Start(Start),
    /// Go on with a replay that was paused or broke off.
    Resume(Resume),
    /// List replays, newest first.
    List(List),
    /// End a replay for good, wherever it runs.
    Cancel(Cancel),
}

#[derive(Debug, Args)]
struct Start {
    #[command(flatten)]
    config: ConfigArgs,
    /// By the filter, route and format of this pipeline; needed when there are several.
    #[arg(long, value_name = "NAME")]
    pipeline: Option<PipelineName>,
    /// Events of this entity; may be repeated.
    #[arg(long, value_name = "TYPE/ID", value_parser = entity)]
    entity: Vec<(String, String)>,
    /// Events of this aggregate type; may be repeated.
    #[arg(long, value_name = "TYPE")]
    aggregate_type: Vec<String>,
    /// Events of this type; may be repeated.
    #[arg(long, value_name = "TYPE")]
    event_type: Vec<String>,
    /// The event with this uuid; may be repeated.
    #[arg(long, value_name = "UUID")]
    event_id: Vec<Uuid>,
    /// Events that occurred at this time or later, as in 2026-01-31T00:00:00Z.
    #[arg(long, value_name = "TIME", value_parser = time)]
    from: Option<i64>,
    /// Events that occurred before this time.
    #[arg(long, value_name = "TIME", value_parser = time)]
    until: Option<i64>,
    /// Everything that is retained: what has to be said when no condition is given.
    #[arg(long)]
    all: bool,
    /// Kept with the act.
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// To this topic, instead of those that the pipeline's template says.
    #[arg(long, value_name = "TOPIC")]
    topic: Option<String>,
    /// Events per second.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: u32,
    /// Say how many events would be published, and publish nothing.
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Args)]
struct Resume {
    #[command(flatten)]
    config: ConfigArgs,
    /// Its number.
    id: i64,
    /// Events per second, instead of what it was started with.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: Option<u32>,
}

#[derive(Debug, Args)]
struct List {
    #[command(flatten)]
    config: ConfigArgs,
    /// Print a JSON array.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Cancel {
    #[command(flatten)]
    config: ConfigArgs,
    /// Its number.
    id: i64,
}

fn entity(text: &str) -> Result<(String, String), String> {
    text.split_once('/')
        .map(|(name, id)| (name.to_owned(), id.to_owned()))
        .ok_or_else(|| "expected an aggregate type and an id, as in order/4711".to_owned())
}

impl Replay {
    pub(super) async fn run(self) -> Result<Outcome, Error> {
        match self.command {
            Command::Start(start) => start.run().await,
            Command::Resume(resume) => resume.run().await,
            Command::List(list) => list.run().await,
            Command::Cancel(cancel) => cancel.run().await,
        }
    }
}

impl Start {
    async fn run(self) -> Result<Outcome, Error> {
        let config = self.config.load()?;
        drop(logging::install(&config.log)?);
        let selection = Selection {
            entities: self.entity,
            aggregate_types: self.aggregate_type,
            event_types: self.event_type,
            event_ids: self.event_id,
            from_us: self.from,
            until_us: self.until,
        };
        if selection == Selection::default() && !self.all {
            let which = "say which events, or --all for everything that is retained";
            return Err(Usage(which.to_owned()).into());
        }
        let pipeline = choose(&config, self.pipeline.as_ref())?;
        let mut books = open(&config).await?;
        let range = books.range(pipeline.name.as_str()).await;
        let (from, until) = range.map_err(with_next_step)?;
        let mut job = Job {
            id: 0,
            pipeline: pipeline.name.to_string(),
            selection,
            topic: self.topic,
            rate: self.rate,
            from,
            until,
            last_id: from,
            published: 0,
            skipped: 0,
        };
        if self.dry_run {
            let mut history = history(&config.source);
            let (events, entities) = replay::count(&job, pipeline, &mut history).await?;
            let whereto = job.topic.as_deref().unwrap_or("their own topics");
            say!(
                "would publish {} of {} to {whereto}, in about {} (ids {} to {})",
                show::count(i64::try_from(events).unwrap_or(i64::MAX), "event"),
                show::count(i64::try_from(entities).unwrap_or(i64::MAX), "entity"),
                show::age(estimate(events, job.rate)),
                EventId(from.0 + 1),
                until
            );
            return Ok(Outcome::Done);
        }
        books.create(&mut job, self.reason.as_deref()).await?;
        work(&config, pipeline, job, books).await
    }
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn estimate(events: u64, rate: u32) -> f64 {
    events as f64 / f64::from(rate)
}

impl Resume {
    async fn run(self) -> Result<Outcome, Error> {
        let config = self.config.load()?;
        drop(logging::install(&config.log)?);
        let mut books = open(&config).await?;
        let job = books.resume(self.id, self.rate).await;
        let job = job.map_err(with_next_step)?;
        let name = job.pipeline.parse().map_err(Error::msg)?;
        let pipeline = choose(&config, Some(&name))?;
        work(&config, pipeline, job, books).await
    }
}

impl List {
    async fn run(self) -> Result<Outcome, Error> {
        let config = self.config.load()?;
        let listed = open(&config).await?.list().await.map_err(with_next_step)?;
        if self.json {
            say!("{}", serde_json::to_string_pretty(&listed)?);
        } else {
            show_table(&listed);
        }
        Ok(Outcome::Done)
    }
}

impl Cancel {
    async fn run(self) -> Result<Outcome, Error> {
        let config = self.config.load()?;
        let cancelled = open(&config).await?.cancel(self.id).await;
        if !cancelled.map_err(with_next_step)? {
            bail!("there is no open replay {}", self.id);
        }
        say!("cancelled replay {}", self.id);
        Ok(Outcome::Done)
    }
}

fn choose<'a>(config: &'a Config, name: Option<&PipelineName>) -> Result<&'a Pipeline, Error> {
    let mut pipelines = config.pipelines.iter().map(|p| &p.pipeline);
    match (name, config.pipelines.len()) {
        (None, 1) => pipelines.next().context("there is no pipeline"),
        (None, _) => {
            let which = "there are several pipelines: say which with --pipeline";
            Err(Usage(which.to_owned()).into())
        }
        (Some(name), _) => pipelines
            .find(|pipeline| pipeline.name == *name)
            .ok_or_else(|| Usage(format!("the configuration has no pipeline {name}")).into()),
    }
}

async fn open(config: &Config) -> Result<Books, Error> {
    let database = Database::open(&config.source).await?;
    Ok(Books::new(database, supervise::holder(), who()))
}

fn history(source: &Source) -> AnyHistory {
    match source {
        Source::Postgres(settings) => {
            AnyHistory::Postgres(postgres::History::new(settings.connector.clone()))
        }
        Source::Sqlite { path, .. } => {
            AnyHistory::Sqlite(sqlite::History::new(supervise::sqlite_options(path)))
        }
    }
}

/// Publishes, shows how far it has come, and lets go of the replay in good order when it is interrupted.
async fn work(
    config: &Config,
    pipeline: &Pipeline,
    mut job: Job,
    mut books: Books,
) -> Result<Outcome, Error> {
    if !matches!(config.sink, SinkConfig::Kafka(_)) {
        tracing::info!("the records go to the standard output");
    }
    let mut sink = supervise::sink(&config.sink, None);
    let mut history = history(&config.source);
    let mut shown = Progress::new(&job);
    let mut terminate = signal(SignalKind::terminate())?;
    let interrupted = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
    };
    let ended = tokio::select! {
        ended = replay::run(&mut job, pipeline, &mut sink, (&mut history, &mut books), |job| shown.tell(job)) => Some(ended),
        () = interrupted => None,
    };
    shown.end();
    for warning in sink.warnings(true) {
        anstream::eprintln!("warning: {warning}");
    }
    let id = job.id;
    match ended {
        Some(Ok(End::Done)) => {
            say!(
                "replay {id} is done: published {}, left out {}",
                job.published,
                job.skipped
            );
            Ok(Outcome::Done)
        }
        Some(Ok(End::TakenAway)) => {
            bail!("replay {id} was cancelled or resumed elsewhere: stopped")
        }
        ended => {
            // What was under way is published again by whoever resumes it.
            let released = books.release(&job).await;
            let resume = format!("go on with `outbox-relay replay resume {id}`");
            match ended {
                Some(Err(error)) => Err(error.context(resume)),
                _ => {
                    released?;
                    bail!("paused replay {id}: {resume}")
                }
            }
        }
    }
}

/// One line that is written over on a terminal, and a line now and then elsewhere.
struct Progress {
    began: Instant,
    began_at: f64,
    told: Option<Instant>,
    terminal: bool,
}

impl Progress {
    fn new(job: &Job) -> Self {
        Self {
            began: Instant::now(),
            began_at: job.share(),
            told: None,
            terminal: std::io::stderr().is_terminal(),
        }
    }

    fn tell(&mut self, job: &Job) {
        let every = Duration::from_secs(if self.terminal { 1 } else { 10 });
        if self.told.is_some_and(|told| told.elapsed() < every) {
            return;
        }
        self.told = Some(Instant::now());
        let (share, done) = (job.share(), job.share() - self.began_at);
        let left = self.began.elapsed().as_secs_f64() * (1.0 - share) / done.max(1e-9);
        let line = format!(
            "replay {}: {:.0} % of the log, {} published, about {} left",
            job.id,
            share * 100.0,
            job.published,
            show::age(left)
        );
        if self.terminal {
            anstream::eprint!("\r\x1b[2K{line}");
        } else {
            anstream::eprintln!("{line}");
        }
    }

    fn end(&self) {
        if self.terminal && self.told.is_some() {
            anstream::eprintln!();
        }
    }
}

fn show_table(listed: &[Listed]) {
    if listed.is_empty() {
        say!("nothing was replayed");
        return;
    }
    let mut table = show::table(&[
        ">ID",
        "PIPELINE",
        "STATE",
        ">DONE",
        ">PUBLISHED",
        ">LEFT OUT",
        "STARTED",
        "BY",
        ">A SECOND",
        "TOPIC",
        "SELECTION",
    ]);
    for replay in listed {
        let state = match (&replay.state[..], &replay.holder) {
            ("open", Some(_)) => "running",
            ("open", None) => "paused",
            (state, _) => state,
        };
        let all = (replay.until_id - replay.from_id).max(1);
        let percent = if replay.state == "done" {
            100
        } else {
            (replay.last_id - replay.from_id) * 100 / all
        };
        table.add_row(vec![
            show::number(Some(replay.id)),
            Cell::new(&replay.pipeline),
            Cell::new(state),
            Cell::new(format!("{percent} %")),
            show::number(Some(replay.published)),
            show::number(Some(replay.skipped)),
            Cell::new(format!("{} ago", show::age(replay.age_seconds))),
            Cell::new(show::plain(&replay.created_by)),
            show::number(Some(replay.rate.into())),
            Cell::new(show::plain(replay.topic.as_deref().unwrap_or("-"))),
            Cell::new(show::plain(&replay.selection.to_string())),
        ]);
    }
    show::print_table(&mut table);
}
