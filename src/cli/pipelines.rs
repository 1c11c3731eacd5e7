//! `outbox-relay pipelines`: a whole pipeline is paused, moved, led past one event, or forgotten.

use std::str::FromStr;
use std::time::Duration;

use anyhow::{Error, bail};
use clap::{Args, Subcommand};
use comfy_table::Cell;
use serde::Serialize;
use tokio::time::sleep;

use super::redrive::who;
use super::show::{self, YELLOW, count, say};
use super::time::time;
use super::{ConfigArgs, Outcome, Usage};
use crate::config::Config;
use crate::database::Database;
use crate::event::{EventId, PipelineName, Start};
use crate::ledger::pipelines::{Act, EventName, Remains, Seek, Skip};
use crate::ledger::view::{Books, PipelineBooks};

/// Pause, resume or move whole pipelines, lead one past an event, forget one.
#[derive(Debug, Args)]
pub(super) struct Pipelines {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List pipelines: those of the configuration and those that the database knows.
    List(List),
    /// Stop publishing; the position stands.
    ///
    /// The relay that owns the pipeline learns of it within a third of relay.lease_ttl, waits for what is in flight and gives
    /// the lease back. No relay takes it until `resume`, also after restarts. A paused pipeline is no error: the relay stays
    /// ready. The log grows meanwhile.
    Pause(Pause),
    /// Go on where the pipeline was paused.
    Resume(Resume),
    /// Move the position: publish events again, or leave events out.
    ///
    /// The pipeline has to be paused, or no relay may own it. All of its shards go to the same position. Transactions that are
    /// open at that moment are published in any case. In exactly-once mode what Kafka remembers of the position is void.
    Seek(SeekArgs),
    /// Leave out one event at which the pipeline halts.
    ///
    /// The relay that halts at it, or will, sets the event aside as a dead letter and goes on within seconds; `parked redrive`
    /// publishes it later, `parked drop` gives it up.
    Skip(SkipArgs),
    /// Forget a pipeline that the configuration does not name any more.
    ///
    /// Its cursors, leases and parked events are deleted in one transaction. What it had not published is never published.
    Remove(Remove),
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
struct Pause {
    /// The pipeline.
    pipeline: PipelineName,
    #[command(flatten)]
    config: ConfigArgs,
    /// Why; kept with the act.
    #[arg(long, value_name = "TEXT")]
    reason: String,
    /// Wait until no relay owns it any more.
    #[arg(long)]
    wait: bool,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Resume {
    /// The pipeline.
    pipeline: PipelineName,
    #[command(flatten)]
    config: ConfigArgs,
    /// Kept with the act.
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct SeekArgs {
    /// The pipeline.
    pipeline: PipelineName,
    /// Where to: earliest, latest, a time (2026-01-31T10:00:00Z, 2026-01-31, 1h ago as 1h), the id of an event, or its uuid.
    #[arg(value_name = "POSITION")]
    to: Whereto,
    #[command(flatten)]
    config: ConfigArgs,
    /// Why; kept with the act.
    #[arg(
        long,
        value_name = "TEXT",
        required_unless_present = "dry_run",
        default_value = ""
    )]
    reason: String,
    /// Only say what would be published again or left out.
    #[arg(long)]
    dry_run: bool,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct SkipArgs {
    /// The pipeline.
    pipeline: PipelineName,
    /// The event: its id, or its uuid.
    event: EventName,
    #[command(flatten)]
    config: ConfigArgs,
    /// Why; kept with the act and with the event.
    #[arg(
        long,
        value_name = "TEXT",
        required_unless_present = "dry_run",
        default_value = ""
    )]
    reason: String,
    /// Only say which event it would be.
    #[arg(long)]
    dry_run: bool,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Remove {
    /// The pipeline.
    pipeline: PipelineName,
    #[command(flatten)]
    config: ConfigArgs,
    /// Why; kept with the act.
    #[arg(
        long,
        value_name = "TEXT",
        required_unless_present = "dry_run",
        default_value = ""
    )]
    reason: String,
    /// Do it: without, the command says what would go and ends with code 2.
    #[arg(long)]
    yes: bool,
    /// Only say what would go.
    #[arg(long)]
    dry_run: bool,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
}

/// A place in the log as people name it.
#[derive(Clone, Debug)]
pub(super) enum Whereto {
    Start(Start),
    Event(EventName),
}

impl FromStr for Whereto {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "earliest" => return Ok(Self::Start(Start::Earliest)),
            "latest" => return Ok(Self::Start(Start::Latest)),
            _ => {}
        }
        if let Ok(event) = text.parse() {
            return Ok(Self::Event(event));
        }
        time(text)
            .map(|us| Self::Start(Start::Time(us)))
            .map_err(|expected| {
                format!(
                    "{text:?} is neither earliest nor latest nor an event (id or uuid); {expected}"
                )
            })
    }
}

impl Whereto {
    /// Looks an event up that is named by its uuid.
    pub(super) async fn resolve(&self, database: &mut Database) -> Result<Start, Error> {
        Ok(match self {
            Self::Start(start) => *start,
            Self::Event(EventName::Id(EventId(id))) if *id < 1 => Start::Earliest,
            Self::Event(event) => Start::Event(database.id_of(*event).await?),
        })
    }
}

impl Pipelines {
    pub(super) async fn run(self) -> Result<Outcome, Error> {
        match self.command {
            Command::List(list) => list.run().await,
            Command::Pause(pause) => pause.run().await,
            Command::Resume(resume) => resume.run().await,
            Command::Seek(seek) => seek.run().await,
            Command::Skip(skip) => skip.run().await,
            Command::Remove(remove) => remove.run().await,
        }
    }
}

fn act(reason: String) -> Act {
    Act { who: who(), reason }
}

fn is_configured(config: &Config, name: &PipelineName) -> bool {
    config.pipelines.iter().any(|p| p.pipeline.name == *name)
}

/// Opens the database, for a pipeline that the configuration names or the database knows.
async fn open(config: &Config, name: &PipelineName) -> Result<(Database, Books), Error> {
    let mut database = Database::open(&config.source).await?;
    let books = database.books().await?;
    let is_known = books
        .pipelines
        .iter()
        .any(|row| row.pipeline == name.as_str());
    if !is_known && !is_configured(config, name) {
        let mut names: Vec<String> = config
            .pipelines
            .iter()
            .map(|p| p.pipeline.name.to_string())
            .chain(books.pipelines.iter().map(|row| row.pipeline.clone()))
            .collect();
        names.sort();
        names.dedup();
        return Err(Usage(format!(
            "neither the configuration nor the database knows a pipeline {name}: there is {}",
            names.join(", ")
        ))
        .into());
    }
    Ok((database, books))
}

fn json(document: &impl Serialize) -> Result<Outcome, Error> {
    say!("{}", serde_json::to_string_pretty(document)?);
    Ok(Outcome::Done)
}

/// Of one shard, or of a pipeline that has none yet.
#[derive(Serialize)]
struct Row<'a> {
    pipeline: &'a str,
    /// Whether the configuration names it.
    configured: bool,
    #[serde(flatten)]
    books: Option<&'a PipelineBooks>,
}

impl List {
    async fn run(self) -> Result<Outcome, Error> {
        let config = self.config.load()?;
        let mut database = Database::open(&config.source).await?;
        let books = database.books().await?;
        let mut rows: Vec<Row<'_>> = Vec::new();
        for row in &books.pipelines {
            let named =
                |p: &crate::config::PipelineConfig| p.pipeline.name.as_str() == row.pipeline;
            rows.push(Row {
                pipeline: &row.pipeline,
                configured: config.pipelines.iter().any(named),
                books: Some(row),
            });
        }
        for configured in &config.pipelines {
            let name = configured.pipeline.name.as_str();
            if !books.pipelines.iter().any(|row| row.pipeline == name) {
                rows.push(Row {
                    pipeline: name,
                    configured: true,
                    books: None,
                });
            }
        }
        if self.json {
            return json(&rows);
        }
        let mut table = show::table(&[
            "PIPELINE",
            "STATE",
            ">POSITION",
            ">BACKLOG",
            "PARKED",
            "OWNER",
        ]);
        for row in &rows {
            let books = row.books;
            table.add_row(vec![
                Cell::new(books.map_or(row.pipeline.to_owned(), PipelineBooks::name)),
                Cell::new(state(row)),
                show::number(books.and_then(|books| books.last_id)),
                show::number(books.and_then(|books| books.backlog_ids)),
                Cell::new(books.map_or("-".to_owned(), show::parked)),
                Cell::new(
                    books
                        .and_then(|books| books.owner.as_ref())
                        .map_or("-".to_owned(), |owner| show::plain(&owner.holder)),
                ),
            ]);
        }
        show::print_table(&mut table);
        for row in &rows {
            if let Some(pause) = row.books.and_then(|books| books.paused.as_ref()) {
                let name = row.books.map(PipelineBooks::name).unwrap_or_default();
                say!(
                    "{YELLOW}{name}{YELLOW:#}: paused {}",
                    show::plain(&pause.to_string())
                );
            }
        }
        Ok(Outcome::Done)
    }
}

fn state(row: &Row<'_>) -> &'static str {
    let Some(books) = row
        .books
        .filter(|books| books.last_id.is_some() || books.paused.is_some())
    else {
        return "never ran";
    };
    match (&books.paused, &books.owner, row.configured) {
        (Some(_), Some(_), _) => "pausing",
        (Some(_), None, _) => "PAUSED",
        (None, Some(_), _) => "owned",
        (None, None, true) => "no owner",
        (None, None, false) => "not configured",
    }
}

impl Pause {
    /// Between two looks whether a relay still owns the pipeline.
    const LOOK: Duration = Duration::from_millis(200);

    async fn run(self) -> Result<Outcome, Error> {
        let config = self.config.load()?;
        let name = &self.pipeline;
        let (mut database, books) = open(&config, name).await?;
        let before = database.pause(name, &act(self.reason)).await?;
        let mut owners = owners(&books, name);
        while self.wait && !owners.is_empty() {
            sleep(Self::LOOK).await;
            owners = self::owners(&database.books().await?, name);
        }
        if self.json {
            return json(&serde_json::json!({
                "pipeline": name.as_str(),
                "paused": true,
                "was_paused": before,
                "owners": owners,
            }));
        }
        match before {
            Some(pause) => say!(
                "pipeline {name} is paused already, {}",
                show::plain(&pause.to_string())
            ),
            None => say!("paused pipeline {name}"),
        }
        for owner in owners {
            say!(
                "{} publishes what is in flight and gives the lease back within seconds",
                show::plain(&owner)
            );
        }
        say!("`outbox-relay pipelines resume {name}` lets it go on");
        Ok(Outcome::Done)
    }
}

fn owners(books: &Books, name: &PipelineName) -> Vec<String> {
    let rows = books.pipelines.iter();
    let mut owners: Vec<String> = rows
        .filter(|row| row.pipeline == name.as_str())
        .filter_map(|row| row.owner.as_ref())
        .map(|owner| owner.holder.clone())
        .collect();
    owners.dedup();
    owners
}

impl Resume {
    async fn run(self) -> Result<Outcome, Error> {
        let config = self.config.load()?;
        let name = &self.pipeline;
        let (mut database, _) = open(&config, name).await?;
        let ended = database.resume(name, &act(self.reason)).await?;
        if self.json {
            return json(&serde_json::json!({
                "pipeline": name.as_str(),
                "paused": false,
                "was_paused": ended,
            }));
        }
        match ended {
            Some(pause) => say!(
                "pipeline {name} goes on; it was paused {}",
                show::plain(&pause.to_string())
            ),
            None => say!("pipeline {name} is not paused"),
        }
        Ok(Outcome::Done)
    }
}

impl SeekArgs {
    async fn run(self) -> Result<Outcome, Error> {
        let config = self.config.load()?;
        let name = &self.pipeline;
        let (mut database, _) = open(&config, name).await?;
        let to = self.to.resolve(&mut database).await?;
        let mut configured = config.pipelines.iter().map(|p| &p.pipeline);
        let types = configured
            .find(|pipeline| pipeline.name == *name)
            .map_or(&[][..], |pipeline| &pipeline.filter.aggregate_types);
        let act = (!self.dry_run).then(|| act(self.reason));
        let seek = database.seek(name, to, types, act.as_ref()).await?;
        if self.json {
            return json(&seek);
        }
        show_seek(&seek, self.dry_run);
        Ok(Outcome::Done)
    }
}

fn show_seek(seek: &Seek, dry_run: bool) {
    let Seek {
        pipeline,
        from,
        to,
        oldest_id,
        newest_id,
        again,
        left_out,
    } = seek;
    let from: Vec<String> = from
        .iter()
        .map(|at| at.map_or("the beginning".to_owned(), |at| at.to_string()))
        .collect();
    let would = if dry_run {
        "dry run: would move"
    } else {
        "moved"
    };
    say!(
        "{would} pipeline {pipeline} from {} to {to}",
        from.join(", ")
    );
    let tell = |events: &Option<i64>, what: &str| match events {
        Some(0) => {}
        Some(events) => say!("  {} {what}", count(*events, "event")),
        None => say!("  more events than can be counted in 10 s: {what}"),
    };
    tell(again, "behind the old position: published again");
    tell(
        left_out,
        "between the old position and the new one: left out, never published",
    );
    match oldest_id {
        Some(oldest) => say!("  the log has the events {oldest} to {newest_id}"),
        None => say!("  the log has no event"),
    }
    if !dry_run {
        say!("`outbox-relay pipelines resume {pipeline}` lets it go on, if it is paused");
    }
}

impl SkipArgs {
    async fn run(self) -> Result<Outcome, Error> {
        let config = self.config.load()?;
        let name = &self.pipeline;
        let (mut database, books) = open(&config, name).await?;
        let act = (!self.dry_run).then(|| act(self.reason));
        let skip = database.skip(name, self.event, act.as_ref()).await?;
        if self.json {
            return json(&skip);
        }
        let Skip {
            pipeline,
            id,
            event_id,
            aggregate_type,
            aggregate_id,
            known,
        } = &skip;
        let event = format!(
            "event {id} ({event_id}) of {}",
            show::plain(&format!("{aggregate_type}/{aggregate_id}"))
        );
        if *known {
            say!("{event} is to be left out already");
        } else if self.dry_run {
            say!("dry run: pipeline {pipeline} would leave {event} out");
        } else {
            say!("pipeline {pipeline} leaves {event} out when it halts there");
        }
        match owners(&books, name).first() {
            Some(owner) => say!("{} does it within seconds", show::plain(owner)),
            None => {
                say!("no relay owns the pipeline now: the next one that runs does it");
            }
        }
        Ok(Outcome::Done)
    }
}

impl Remove {
    async fn run(self) -> Result<Outcome, Error> {
        let config = self.config.load()?;
        let name = &self.pipeline;
        if is_configured(&config, name) {
            bail!(
                "the configuration names pipeline {name}, which would begin anew: take it out of the configuration first"
            );
        }
        let (mut database, _) = open(&config, name).await?;
        let does = self.yes && !self.dry_run;
        let act = does.then(|| act(self.reason));
        let remains = database.remove(name, act.as_ref()).await?;
        if self.json {
            json(&remains)?;
        } else {
            show_remains(&remains, does);
        }
        if does || self.dry_run {
            return Ok(Outcome::Done);
        }
        Err(Usage("nothing is removed: add --yes if that is what you want".to_owned()).into())
    }
}

fn show_remains(remains: &Remains, done: bool) {
    let Remains {
        pipeline,
        cursors,
        waiting,
        parked,
    } = remains;
    let verb = if done { "removed" } else { "would remove" };
    say!("{verb} pipeline {pipeline}: {}", count(*cursors, "cursor"));
    match waiting {
        Some(events) => say!(
            "  {} of the log that it has not published (before its filter): never published by it",
            count(*events, "event")
        ),
        None => {
            say!("  more events of the log than can be counted in 10 s that it has not published");
        }
    }
    say!("  {}: given up", count(*parked, "parked event"));
}
