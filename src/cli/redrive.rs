//! `outbox-relay parked redrive` and `parked drop`: what operators ask of the owner of a pipeline; and `outbox-relay acts`.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use anyhow::Error;
use clap::Args;
use comfy_table::Cell;
use tokio::time::sleep;

use super::parked::{Filter, show_table};
use super::show::{self, count, say};
use super::{ConfigArgs, Outcome, Usage};
use crate::database::Database;
use crate::ledger::acts::{Action, Extent, Marked, Paging, ParkedEvents, Selector, Wish};
use crate::ledger::pipelines::EventName;

/// Between two looks whether it is done.
const LOOK: Duration = Duration::from_millis(300);
/// Events that are watched by who waits.
const CHOSEN_MAX: u32 = 10_000;

/// Publish rejected events after all, and then what waits behind them, in order.
///
/// The owner of the pipeline does it within seconds, at most relay.redrive_rate events a second: the events of an entity
/// from its oldest on, until all are published or one is rejected again. New events of the entity wait meanwhile. Whatever
/// stops the relay, it goes on where it was. A dead letter is published after what its entity published since.
#[derive(Debug, Args)]
pub(super) struct Redrive {
    /// This event, which has to be the oldest of its entity that waits, or a dead letter.
    #[arg(conflicts_with_all = ["entity", "error", "older_than", "all"])]
    event: Option<EventName>,
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    filter: Filter,
    #[command(flatten)]
    how: How,
    /// Kept with the act.
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// Wait until it is done, and end with code 3 where an event was rejected again.
    #[arg(long, conflicts_with_all = ["dry_run", "json"])]
    wait: bool,
}

/// Give rejected events up, and publish what waits behind them, in order.
///
/// The owner of the pipeline does it within seconds. What is dropped is gone from here; the outbox still has it until
/// retention removes it.
#[derive(Debug, Args)]
pub(super) struct Drop {
    /// This event, rejected or waiting.
    #[arg(conflicts_with_all = ["entity", "error", "older_than", "all"])]
    event: Option<EventName>,
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    filter: Filter,
    #[command(flatten)]
    how: How,
    /// Drop what waits behind them too.
    #[arg(long)]
    with_waiting: bool,
    /// Why; kept with the act.
    #[arg(long, value_name = "TEXT")]
    reason: String,
}

#[derive(Debug, Args)]
struct How {
    /// Everything that is parked.
    #[arg(long)]
    all: bool,
    /// Only say which events it would be.
    #[arg(long)]
    dry_run: bool,
    /// Print a JSON array: pipelines and how many of their events.
    #[arg(long)]
    json: bool,
}

impl Redrive {
    pub(super) async fn run(self) -> Result<Outcome, Error> {
        let wish = Wish {
            action: Action::Redrive,
            selector: self.filter.selector(self.event),
            with_waiting: false,
            who: who(),
            reason: self.reason,
        };
        ask(&self.config, wish, &self.how, self.wait).await
    }
}

impl Drop {
    pub(super) async fn run(self) -> Result<Outcome, Error> {
        let wish = Wish {
            action: Action::Drop,
            selector: self.filter.selector(self.event),
            with_waiting: self.with_waiting,
            who: who(),
            reason: Some(self.reason),
        };
        ask(&self.config, wish, &self.how, false).await
    }
}

async fn ask(config: &ConfigArgs, wish: Wish, how: &How, wait: bool) -> Result<Outcome, Error> {
    if !how.all && wish.selector.is_everything() {
        let which = "say which events: an id or uuid, --entity, --error, --older-than, or --all";
        return Err(Usage(which.to_owned()).into());
    }
    let config = config.load()?;
    let mut database = Database::open(&config.source).await?;
    if how.dry_run {
        return would(&mut database, &wish).await;
    }
    let chosen: HashSet<String> = if wait {
        let chosen = database
            .parked(&wish.selector, &Paging::first(CHOSEN_MAX))
            .await?
            .events;
        chosen.into_iter().map(|event| event.event_id).collect()
    } else {
        HashSet::new()
    };
    let marked = database.mark(&wish).await?;
    if how.json {
        say!("{}", serde_json::to_string_pretty(&marked)?);
        return Ok(Outcome::Done);
    }
    if marked.is_empty() {
        say!("nothing that is parked matches");
        return Ok(Outcome::Done);
    }
    let books = database.books().await?;
    for Marked { pipeline, events } in &marked {
        let owner = books
            .pipelines
            .iter()
            .find(|books| books.pipeline == *pipeline)
            .and_then(|books| books.owner.as_ref());
        let who = match owner {
            Some(owner) => format!("its owner {} does it within seconds", owner.holder),
            None => "no relay owns it now: the next one that runs does it".to_owned(),
        };
        say!(
            "{} of pipeline {pipeline} {}: {who}",
            count(*events, "event"),
            verb(wish.action)
        );
    }
    if wait {
        return outcome(&mut database, &chosen).await;
    }
    say!("`outbox-relay parked list` shows what is left");
    Ok(Outcome::Done)
}

async fn would(database: &mut Database, wish: &Wish) -> Result<Outcome, Error> {
    if let Some(refusal) = database.refusal(wish).await? {
        return Err(refusal.into());
    }
    let parked = database.parked(&wish.selector, &Paging::first(100)).await?;
    show_table(&parked);
    let Extent { chosen, behind } = database.extent(wish).await?;
    if chosen == 0 {
        return Ok(Outcome::Done);
    }
    let behind_them = match (wish.action, wish.with_waiting, behind) {
        (_, _, 0) => String::new(),
        (Action::Drop, true, behind) => format!(", and {} behind them too", count(behind, "event")),
        (_, _, behind) => format!(
            ", and {} behind them published, in order",
            count(behind, "event")
        ),
    };
    say!(
        "dry run: {} would be {}{behind_them}",
        count(chosen, "event"),
        match wish.action {
            Action::Redrive => "redriven",
            Action::Drop => "dropped",
        }
    );
    Ok(Outcome::Done)
}

/// Waits until what was chosen is done, and says what became of it.
async fn outcome(database: &mut Database, chosen: &HashSet<String>) -> Result<Outcome, Error> {
    let rejected = loop {
        sleep(LOOK).await;
        let everything = Selector {
            waiting: true,
            ..Selector::default()
        };
        let mut left = database
            .parked(&everything, &Paging::first(CHOSEN_MAX))
            .await?
            .events;
        left.retain(|event| chosen.contains(&event.event_id));
        if left.iter().all(|event| event.wanted.is_none()) {
            break left;
        }
    };
    let done = chosen.len() - rejected.len();
    say!("{} done", count(i64::try_from(done)?, "event"));
    if rejected.is_empty() {
        return Ok(Outcome::Done);
    }
    let total = i64::try_from(rejected.len())?;
    say!("{} rejected again:", count(total, "event"));
    show_table(&ParkedEvents {
        events: rejected,
        total,
        next: None,
    });
    Ok(Outcome::Findings)
}

fn verb(action: Action) -> &'static str {
    match action {
        Action::Redrive => "to be redriven",
        Action::Drop => "to be dropped",
    }
}

/// The user and host of this process. For people who read the acts: who has the database's password can say anything.
pub(super) fn who() -> String {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let uid = fs::metadata("/proc/self").map(|process| process.uid().to_string());
    let uid = uid.unwrap_or_default();
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let user = users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then(|| name.to_owned())
    });
    format!("{}@{}", user.unwrap_or(uid), host.trim())
}

/// Show what operators asked for: when, who, of which events, why.
#[derive(Debug, Args)]
pub(super) struct Acts {
    #[command(flatten)]
    config: ConfigArgs,
    /// Print a JSON array.
    #[arg(long)]
    json: bool,
    /// At most so many, the newest first.
    #[arg(long, value_name = "N", default_value_t = 50)]
    limit: u32,
}

impl Acts {
    pub(super) async fn run(self) -> Result<Outcome, Error> {
        let config = self.config.load()?;
        let mut database = Database::open(&config.source).await?;
        let acts = database.acts(self.limit, None).await?;
        if self.json {
            say!("{}", serde_json::to_string_pretty(&acts)?);
            return Ok(Outcome::Done);
        }
        if acts.is_empty() {
            say!("no operator has asked for anything");
            return Ok(Outcome::Done);
        }
        let mut table = show::table(&[
            "AT", "WHO", "AS", "ACTION", "PIPELINE", ">EVENTS", "WHICH", "REASON",
        ]);
        for act in &acts {
            table.add_row(vec![
                Cell::new(&act.at),
                Cell::new(show::plain(&act.who)),
                Cell::new(show::plain(&act.database_user)),
                Cell::new(show::plain(&act.action)),
                Cell::new(act.pipeline.as_deref().unwrap_or("-")),
                show::number(Some(act.events)),
                Cell::new(show::plain(&act.selector)),
                Cell::new(show::plain(act.reason.as_deref().unwrap_or("-"))),
            ]);
        }
        show::print_table(&mut table);
        Ok(Outcome::Done)
    }
}
