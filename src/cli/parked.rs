//! `outbox-relay parked`: events that were set aside. Never prints payloads.

use anyhow::Error;
use clap::{Args, Subcommand};
use comfy_table::Cell;

use super::books::Database;
use super::show;
use super::{ConfigArgs, Outcome};
use crate::event::PipelineName;
use crate::ledger::view::ParkedEntities;

/// Look at events that were rejected, and those that wait behind them.
#[derive(Debug, Args)]
pub(super) struct Parked {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List the entities with parked events, longest parked first.
    List(List),
}

#[derive(Debug, Args)]
struct List {
    #[command(flatten)]
    config: ConfigArgs,
    /// Print a JSON array.
    #[arg(long)]
    json: bool,
    /// Of this pipeline only.
    #[arg(long, value_name = "NAME")]
    pipeline: Option<PipelineName>,
    /// At most so many entities.
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: u32,
}

impl Parked {
    pub(super) async fn run(self) -> Result<Outcome, Error> {
        match self.command {
            Command::List(list) => list.run().await,
        }
    }
}

impl List {
    async fn run(self) -> Result<Outcome, Error> {
        let config = self.config.load()?;
        let mut database = Database::open(&config.source).await?;
        let parked = database.parked(self.pipeline.as_ref(), self.limit).await?;
        if self.json {
            anstream::println!("{}", serde_json::to_string_pretty(&parked.entities)?);
        } else {
            show_table(&parked);
        }
        Ok(Outcome::Done)
    }
}

fn show_table(parked: &ParkedEntities) {
    let ParkedEntities { entities, total } = parked;
    if entities.is_empty() {
        anstream::println!("nothing is parked");
        return;
    }
    let mut table = show::table(&[
        "PIPELINE",
        "ENTITY",
        ">FIRST",
        "EVENT",
        "SINCE",
        ">WAITING BEHIND",
        "ERROR",
    ]);
    for entity in entities {
        table.add_row(vec![
            Cell::new(&entity.pipeline),
            Cell::new(show::plain(&format!(
                "{} {}",
                entity.aggregate_type, entity.aggregate_id
            ))),
            show::number(Some(entity.first_id)),
            Cell::new(show::plain(&entity.event_type)),
            Cell::new(show::age(entity.parked_seconds)),
            show::number(Some(entity.waiting_events)),
            Cell::new(show::plain(entity.error.as_deref().unwrap_or("-"))),
        ]);
    }
    show::print_table(&mut table);
    let shown = i64::try_from(entities.len()).unwrap_or(i64::MAX);
    if shown < *total {
        anstream::println!("{shown} of {total} entities; --limit {total} shows all");
    }
}
