//! `outbox-relay parked`: events that were set aside. Payloads are printed by `show` alone.

use std::time::Duration;

use anyhow::{Error, bail};
use clap::{Args, Subcommand};
use comfy_table::Cell;

use super::redrive::{Drop, Redrive};
use super::show::{self, BOLD, DIM, say};
use super::{ConfigArgs, Outcome};
use crate::config::Config;
use crate::database::Database;
use crate::event::PipelineName;
use crate::ledger::acts::{
    Action, Cause, EntityName, Paging, ParkedDetail, ParkedEvent, ParkedEvents, Selector,
};
use crate::ledger::pipelines::EventName;

/// Look at events that were set aside, publish them after all, or give them up.
#[derive(Debug, Args)]
pub(super) struct Parked {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List rejected events, longest parked first, and how many events wait behind each.
    List(List),
    /// Show one event: error, history, headers, payload.
    Show(Show),
    /// Publish rejected events after all, and then what waits behind them, in order.
    Redrive(Redrive),
    /// Give rejected events up, and publish what waits behind them, in order.
    Drop(Drop),
}

/// Which events are meant: those that match all of these.
#[derive(Debug, Args)]
pub(super) struct Filter {
    /// Of this pipeline.
    #[arg(long, value_name = "NAME")]
    pub(super) pipeline: Option<PipelineName>,
    /// Of this entity.
    #[arg(long, value_name = "TYPE/ID")]
    entity: Option<EntityName>,
    /// With this text in the error.
    #[arg(long, value_name = "TEXT")]
    error: Option<String>,
    /// Set aside at least this long ago: 90s, 1h, 2d.
    #[arg(long, value_name = "AGE", value_parser = humantime::parse_duration)]
    older_than: Option<Duration>,
}

impl Filter {
    pub(super) fn selector(self, event: Option<EventName>) -> Selector {
        let Self {
            pipeline,
            entity,
            error,
            older_than,
        } = self;
        let selector = Selector {
            pipeline,
            entity,
            error,
            older_than,
            ..Selector::default()
        };
        named(event, selector)
    }
}

/// Narrowed to one event, where one is named.
fn named(event: Option<EventName>, selector: Selector) -> Selector {
    match event {
        None => selector,
        Some(EventName::Id(id)) => Selector {
            id: Some(id),
            ..selector
        },
        Some(EventName::Uuid(uuid)) => Selector {
            event_id: Some(uuid),
            ..selector
        },
    }
}

/// What `parked list` groups by.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum By {
    /// The reason, whatever numbers are in it.
    Error,
}

#[derive(Debug, Args)]
struct List {
    #[command(flatten)]
    config: ConfigArgs,
    /// Print a JSON object, as GET /parked answers.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    filter: Filter,
    /// Count the events of each reason instead of listing them.
    #[arg(long, value_name = "WHAT", conflicts_with = "waiting")]
    by: Option<By>,
    /// List the events that wait behind rejected ones too.
    #[arg(long)]
    waiting: bool,
    /// At most so many events.
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: u32,
}

#[derive(Debug, Args)]
struct Show {
    /// The event: its id, as `parked list` has it, or its uuid.
    event: EventName,
    #[command(flatten)]
    config: ConfigArgs,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
    /// Of this pipeline, where several have parked the event.
    #[arg(long, value_name = "NAME")]
    pipeline: Option<PipelineName>,
    /// The whole payload, whatever its size.
    #[arg(long)]
    payload: bool,
}

impl Parked {
    pub(super) async fn run(self) -> Result<Outcome, Error> {
        match self.command {
            Command::List(list) => list.run().await,
            Command::Show(show) => show.run().await,
            Command::Redrive(redrive) => redrive.run().await,
            Command::Drop(drop) => drop.run().await,
        }
    }
}

impl List {
    async fn run(self) -> Result<Outcome, Error> {
        let config = self.config.load()?;
        let mut database = Database::open(&config.source).await?;
        let selector = Selector {
            waiting: self.waiting,
            ..self.filter.selector(None)
        };
        if let Some(By::Error) = self.by {
            let causes = database.causes(&selector).await?;
            if self.json {
                say!("{}", serde_json::to_string_pretty(&causes)?);
            } else {
                show_causes(&causes);
            }
            return Ok(Outcome::Done);
        }
        let parked = database
            .parked(&selector, &Paging::first(self.limit))
            .await?;
        if self.json {
            say!("{}", serde_json::to_string_pretty(&parked)?);
        } else {
            show_table(&parked);
        }
        Ok(Outcome::Done)
    }
}

/// What an operator has to know besides the error.
fn state(event: &ParkedEvent) -> &'static str {
    match (event.wanted, event.holds, &event.error) {
        (Some(Action::Redrive), ..) => "being redriven",
        (Some(Action::Drop), ..) => "being dropped",
        (None, true, Some(_)) => "entity waits",
        (None, true, None) => "waits",
        (None, false, _) => "dead letter",
    }
}

fn show_causes(causes: &[Cause]) {
    if causes.is_empty() {
        say!("nothing is parked");
        return;
    }
    let mut table = show::table(&[
        "PIPELINE",
        ">EVENTS",
        ">ENTITIES",
        "OLDEST",
        ">EXAMPLE",
        "ERROR",
    ]);
    for cause in causes {
        table.add_row(vec![
            Cell::new(&cause.pipeline),
            show::number(Some(cause.events)),
            show::number(Some(cause.entities)),
            Cell::new(show::age(cause.oldest_seconds)),
            show::number(Some(cause.example_id)),
            Cell::new(show::plain(&cause.error)),
        ]);
    }
    show::print_table(&mut table);
}

pub(super) fn show_table(parked: &ParkedEvents) {
    let ParkedEvents {
        events,
        total,
        next: _,
    } = parked;
    if events.is_empty() {
        say!("nothing is parked");
        return;
    }
    let mut table = show::table(&[
        "PIPELINE",
        ">ID",
        "ENTITY",
        "EVENT",
        "SINCE",
        "STATE",
        ">WAITING BEHIND",
        ">ATTEMPTS",
        "ERROR",
    ]);
    for event in events {
        table.add_row(vec![
            Cell::new(&event.pipeline),
            show::number(Some(event.id)),
            Cell::new(entity(event)),
            Cell::new(show::plain(&event.event_type)),
            Cell::new(show::age(event.parked_seconds)),
            Cell::new(state(event)),
            show::number(Some(event.waiting_events)),
            show::number(Some(event.attempts)),
            Cell::new(show::plain(event.error.as_deref().unwrap_or("-"))),
        ]);
    }
    show::print_table(&mut table);
    let shown = i64::try_from(events.len()).unwrap_or(i64::MAX);
    if shown < *total {
        say!("{shown} of {total} events; --limit {total} shows all");
    }
}

/// As `--entity` takes it.
fn entity(event: &ParkedEvent) -> String {
    show::plain(&format!("{}/{}", event.aggregate_type, event.aggregate_id))
}

impl Show {
    /// Enough to see what it is.
    const PAYLOAD_BYTES: u32 = 2000;
    /// As much as a database takes for one value.
    const WHOLE: u32 = 1 << 30;

    async fn run(self) -> Result<Outcome, Error> {
        let config: Config = self.config.load()?;
        let mut database = Database::open(&config.source).await?;
        let of = Selector {
            pipeline: self.pipeline,
            ..Selector::default()
        };
        let selector = named(Some(self.event), of);
        let most = if self.payload {
            Self::WHOLE
        } else {
            Self::PAYLOAD_BYTES
        };
        let found = database.show(&selector, most).await?;
        if found.is_empty() {
            bail!(
                "event {} is not parked: see `outbox-relay parked list`",
                self.event
            );
        }
        for detail in &found {
            if self.json {
                say!("{}", serde_json::to_string_pretty(detail)?);
            } else {
                show_detail(detail);
            }
        }
        Ok(Outcome::Done)
    }
}

fn show_detail(detail: &ParkedDetail) {
    let ParkedDetail {
        event,
        occurred_at,
        behind,
        history,
        content_type,
        headers,
        payload,
        payload_hex,
        payload_bytes,
    } = detail;
    let line = |name: &str, value: &str| say!("{DIM}{name:<13}{DIM:#}{value}");
    say!("{BOLD}event {} of {}{BOLD:#}", event.id, entity(event));
    line("pipeline", &event.pipeline);
    line("event id", &event.event_id);
    line("event type", &show::plain(&event.event_type));
    line("emitted", occurred_at);
    line(
        "set aside",
        &format!("{} ago", show::age(event.parked_seconds)),
    );
    line("state", state(event));
    line("error", &show::plain(event.error.as_deref().unwrap_or("-")));
    if let Some(oldest) = behind {
        line("waits behind", &format!("event {oldest}"));
    }
    line("behind it", &show::count(event.waiting_events, "event"));
    line("attempts", &event.attempts.to_string());
    for rejected in history {
        line(
            "",
            &format!("{} {}", rejected.at, show::plain(&rejected.error)),
        );
    }
    line(
        "content type",
        &show::plain(content_type.as_deref().unwrap_or("-")),
    );
    line("headers", &show::plain(headers.as_deref().unwrap_or("-")));
    let shown = payload.as_deref().map(show::plain).or(payload_hex.clone());
    line("payload", shown.as_deref().unwrap_or("none: a tombstone"));
    let shown_bytes = payload.as_ref().map_or(0, String::len)
        + payload_hex.as_ref().map_or(0, |hex| hex.len() / 2);
    if i64::try_from(shown_bytes).unwrap_or(i64::MAX) < *payload_bytes {
        say!("({shown_bytes} of {payload_bytes} bytes; --payload shows all)");
    }
}
