//! `outbox-relay status`: where every pipeline stands.
//!
//! From the database's books, so it works while no daemon runs; and from the daemon itself, where one answers.

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::Error;
use bytesize::ByteSize;
use clap::Args;
use comfy_table::Cell;
use serde::Serialize;
use tokio::time::sleep;

use super::show::{self, BOLD, GREEN, RED, YELLOW};
use super::{ConfigArgs, Outcome};
use crate::admin::{self, Overview, PipelineView};
use crate::config::Config;
use crate::database::Database;
use crate::ledger::view::{Books, LogSize, PipelineBooks, Server};
use crate::reason::reason;
use crate::relay::status::State;

const REFRESH: Duration = Duration::from_secs(2);

/// Show where every pipeline stands: position, backlog, owner, parked events.
#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Print JSON: one document, or one a line with --watch.
    #[arg(long)]
    json: bool,
    /// Look again every 2 seconds, until ctrl-c.
    #[arg(long, short)]
    watch: bool,
}

/// What there is to know at one moment.
#[derive(Serialize)]
struct Seen {
    /// Pipelines of the configuration.
    configured: Vec<String>,
    /// What the database knows.
    books: Option<Books>,
    /// Why it could not be asked.
    books_trouble: Option<String>,
    /// What the daemon at `admin.listen` says.
    daemon: Option<Overview>,
    /// Why it could not be asked.
    daemon_trouble: Option<String>,
}

impl StatusArgs {
    pub(super) async fn run(self) -> Result<Outcome, Error> {
        let config = self.config.load()?;
        let mut database = None;
        if !self.watch {
            let (seen, failed) = look(&config, &mut database).await;
            self.show(&config, &seen);
            return match failed {
                None => Ok(Outcome::Done),
                Some(error) => Err(error),
            };
        }
        let watching = async {
            loop {
                let (seen, failed) = look(&config, &mut database).await;
                if !self.json && std::io::stdout().is_terminal() {
                    anstream::print!("\x1b[2J\x1b[H");
                }
                self.show(&config, &seen);
                if let Some(error) = failed {
                    anstream::println!("{RED}{}{RED:#}", reason(&error));
                }
                sleep(REFRESH).await;
            }
        };
        tokio::select! {
            () = watching => {}
            interrupted = tokio::signal::ctrl_c() => interrupted?,
        }
        Ok(Outcome::Done)
    }

    fn show(&self, config: &Config, seen: &Seen) {
        if self.json {
            let text = if self.watch {
                serde_json::to_string(seen)
            } else {
                serde_json::to_string_pretty(seen)
            };
            anstream::println!("{}", text.expect("no map has keys other than texts"));
            return;
        }
        if let Some(books) = &seen.books {
            pipelines(seen, books);
        }
        troubles(seen);
        daemon(config, seen);
        if let Some(books) = &seen.books {
            show_log(&books.log, config.retention.disk_budget_bytes);
        }
        if let Some(server) = seen.books.as_ref().and_then(|books| books.server.as_ref()) {
            show_server(server);
        }
    }
}

/// Asks both; a database that fails does not hide what the daemon says, and is asked anew the next time.
async fn look(config: &Config, database: &mut Option<Database>) -> (Seen, Option<Error>) {
    let books = async {
        let mut open = match database.take() {
            Some(open) => open,
            None => Database::open(&config.source).await?,
        };
        let books = open.books().await?;
        *database = Some(open);
        Ok::<_, Error>(books)
    };
    let daemon = async {
        if config.admin.enabled {
            Some(admin::ask_as(config.admin.listen, config.admin.token.as_ref()).await)
        } else {
            None
        }
    };
    let (books, daemon) = tokio::join!(books, daemon);
    let (books, failed) = match books {
        Ok(books) => (Some(books), None),
        Err(error) => (None, Some(error)),
    };
    let (daemon, daemon_trouble) = match daemon {
        Some(Ok(daemon)) => (Some(daemon), None),
        Some(Err(error)) => (None, Some(reason(&error))),
        None => (None, Some("admin.enabled is false".to_owned())),
    };
    let seen = Seen {
        configured: config
            .pipelines
            .iter()
            .map(|p| p.pipeline.name.to_string())
            .collect(),
        books,
        books_trouble: failed.as_ref().map(reason),
        daemon,
        daemon_trouble,
    };
    (seen, failed)
}

impl Seen {
    /// What the daemon says about a shard.
    fn state(&self, row: &PipelineBooks) -> Option<&State> {
        let views = &self.daemon.as_ref()?.pipelines;
        let is_of = |view: &&PipelineView| {
            view.pipeline == row.pipeline && i32::try_from(view.shard) == Ok(row.shard)
        };
        let view = views.iter().find(is_of)?;
        Some(&view.status.state)
    }
}

fn pipelines(seen: &Seen, books: &Books) {
    let mut table = show::table(&[
        "PIPELINE",
        "STATE",
        ">POSITION",
        ">NEWEST",
        ">BACKLOG",
        "OLDEST WAITING",
        "CURSOR MOVED",
        "PARKED",
        "LEASE",
        "OWNER",
    ]);
    for row in &books.pipelines {
        table.add_row(vec![
            Cell::new(row.name()),
            state(seen, row),
            show::number(row.last_id),
            show::number(Some(books.newest_id)),
            show::number(row.backlog_ids),
            Cell::new(oldest(row)),
            Cell::new(
                row.cursor_age_seconds
                    .filter(|_| row.last_id.is_some())
                    .map_or("never".to_owned(), |age| format!("{} ago", show::age(age))),
            ),
            parked(row),
            Cell::new(
                row.owner
                    .as_ref()
                    .map_or("-".to_owned(), |o| show::age(o.lease_ends_in_seconds)),
            ),
            Cell::new(
                row.owner
                    .as_ref()
                    .map_or("nobody".to_owned(), |o| show::plain(&o.holder)),
            ),
        ]);
    }
    let known = |name: &String| books.pipelines.iter().any(|row| row.pipeline == *name);
    for name in seen.configured.iter().filter(|name| !known(name)) {
        table.add_row(vec![
            Cell::new(name),
            Cell::new("never ran"),
            show::number(None),
            show::number(Some(books.newest_id)),
        ]);
    }
    show::print_table(&mut table);
}

fn state(seen: &Seen, row: &PipelineBooks) -> Cell {
    use comfy_table::Color::{Green, Red, Yellow};
    // Of a relay elsewhere nothing is known but that it renews its lease.
    let elsewhere = match &row.owner {
        Some(_) => ("owned", Some(Green)),
        None => ("nobody's", Some(Red)),
    };
    let (text, colour) = match seen.state(row) {
        Some(State::Running) => ("running", Some(Green)),
        Some(State::Standby { .. }) => ("standby here", Some(Green)),
        Some(State::Starting) => ("starting", Some(Yellow)),
        Some(State::Stalled { .. }) => ("STALLED", Some(Red)),
        Some(State::Halted { .. }) => ("HALTED", Some(Red)),
        Some(State::Stopped) => ("stopped", Some(Yellow)),
        None => elsewhere,
    };
    let cell = Cell::new(text);
    match colour {
        Some(colour) => cell.fg(colour),
        None => cell,
    }
}

fn oldest(row: &PipelineBooks) -> String {
    match (
        row.oldest_unpublished_seconds,
        &row.oldest_unpublished_unknown,
    ) {
        (_, Some(_)) => "unknown".to_owned(),
        (Some(seconds), None) => show::age(seconds),
        (None, None) => "-".to_owned(),
    }
}

fn parked(row: &PipelineBooks) -> Cell {
    match row.parked_events {
        0 => Cell::new("-"),
        events => Cell::new(format!("{events} of {} entities", row.parked_entities))
            .fg(comfy_table::Color::Yellow),
    }
}

/// The pipeline, with its shard where there are several.
fn view_name(seen: &Seen, view: &PipelineView) -> String {
    let views = seen.daemon.iter().flat_map(|daemon| &daemon.pipelines);
    let shards = views
        .filter(|other| other.pipeline == view.pipeline)
        .count();
    match shards {
        ..=1 => view.pipeline.clone(),
        _ => format!("{}/{}", view.pipeline, view.shard),
    }
}

/// The lines that a person acts upon.
fn troubles(seen: &Seen) {
    for view in seen.daemon.iter().flat_map(|daemon| &daemon.pipelines) {
        if let State::Stalled { reason } | State::Halted { reason } = &view.status.state {
            let reason = show::plain(reason);
            let name = view_name(seen, view);
            anstream::println!("{RED}{name}{RED:#}: {reason}");
        }
    }
    let Some(books) = &seen.books else { return };
    for row in &books.pipelines {
        if row.moved.is_some() {
            anstream::println!(
                "{YELLOW}{}{YELLOW:#}: its cursor was written on another server or timeline (restored, failed over): the \
                 relay makes it fit when it takes the lease",
                row.name()
            );
        } else if let Some(unknown) = &row.oldest_unpublished_unknown {
            anstream::println!("{}: age of the oldest event: {unknown}", row.name());
        }
        if row.parked_events > 0 {
            anstream::println!(
                "{YELLOW}{}{YELLOW:#}: {} events are parked: see `outbox-relay parked list`",
                row.name(),
                row.parked_events
            );
        }
        if row.owner.is_none() && seen.configured.contains(&row.pipeline) {
            anstream::println!(
                "{RED}{}{RED:#}: no relay owns it, nothing is published",
                row.name()
            );
        }
    }
}

fn daemon(config: &Config, seen: &Seen) {
    match (&seen.daemon, &seen.daemon_trouble) {
        (Some(daemon), _) => {
            let (style, ready) = if daemon.ready {
                (GREEN, "ready")
            } else {
                (RED, "not ready")
            };
            anstream::println!(
                "{BOLD}daemon{BOLD:#} at {}: {style}{ready}{style:#}, version {}, {}",
                config.admin.listen,
                show::plain(&daemon.version),
                show::plain(&daemon.holder)
            );
        }
        (None, trouble) => anstream::println!(
            "{BOLD}daemon{BOLD:#}: {}",
            trouble.as_deref().unwrap_or_default()
        ),
    }
}

fn show_log(log: &LogSize, budget_bytes: Option<u64>) {
    anstream::println!("{BOLD}log{BOLD:#}: {}", forecast(log, budget_bytes));
}

/// How large the log is, and when it will be too large.
#[expect(clippy::cast_precision_loss, reason = "a forecast is for people")]
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rate of bytes is positive"
)]
fn forecast(log: &LogSize, budget_bytes: Option<u64>) -> String {
    let size = |bytes: u64| ByteSize::b(bytes).display().iec().to_string();
    let budget = budget_bytes.map_or(String::new(), |budget| format!(" of {}", size(budget)));
    let oldest = log.oldest_seconds.map_or(String::new(), |oldest| {
        format!(", the oldest event is {} old", show::age(oldest))
    });
    let now = format!("{}{budget}{oldest}", size(log.bytes));
    let Some(rate) = log.bytes_per_second.filter(|rate| *rate > 0.0) else {
        return now;
    };
    let end = match budget_bytes.map(|budget| budget.saturating_sub(log.bytes)) {
        None => String::new(),
        Some(0) => ": FULL (retention.disk_budget)".to_owned(),
        Some(left) => format!(
            ": full in {} if nothing is retired",
            show::age(left as f64 / rate)
        ),
    };
    let a_day = size((rate * 86_400.0) as u64);
    format!("{now}, {a_day} a day come in{end}")
}

fn show_server(server: &Server) {
    let Server {
        version,
        in_recovery,
        sees_all_transactions,
        oldest_transaction,
        prepared_transactions,
        oldest_prepared_seconds,
    } = server;
    let standby = if *in_recovery { ", a standby" } else { "" };
    anstream::println!("{BOLD}server{BOLD:#}: PostgreSQL {version}{standby}");
    match oldest_transaction {
        Some(open) => anstream::println!(
            "  oldest transaction in progress: {}, process {} of {} in {} ({}{}{})",
            show::age(open.seconds),
            open.pid,
            show::plain(open.user.as_deref().unwrap_or("?")),
            show::plain(open.database.as_deref().unwrap_or("?")),
            open.state.as_deref().unwrap_or("?"),
            if open.application.as_deref().unwrap_or_default().is_empty() {
                ""
            } else {
                ", "
            },
            show::plain(open.application.as_deref().unwrap_or_default()),
        ),
        None if *sees_all_transactions => anstream::println!("  no other transaction in progress"),
        None => anstream::println!(
            "  transactions of other roles are hidden from this one (grant pg_read_all_stats)"
        ),
    }
    if let Some(seconds) = oldest_prepared_seconds {
        anstream::println!(
            "  prepared transactions: {prepared_transactions}, the oldest for {}",
            show::age(*seconds)
        );
    }
    if oldest_transaction.is_some() || *prepared_transactions > 0 {
        anstream::println!(
            "  (an open transaction holds up its own events only: everybody else's are published past it)"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_forecast_says_when_the_disk_is_full() {
        let log = |bytes, bytes_per_second| LogSize {
            bytes,
            oldest_seconds: Some(7200.0),
            bytes_per_second,
        };
        let mib_a_second = Some(f64::from(1 << 20));
        for (log, budget, expected) in [
            (log(GIB, None), None, "1.0 GiB, the oldest event is 2 h old"),
            (
                log(GIB, mib_a_second),
                None,
                "1.0 GiB, the oldest event is 2 h old, 84.4 GiB a day come in",
            ),
            (
                log(GIB, mib_a_second),
                Some(10 * GIB),
                "1.0 GiB of 10.0 GiB, the oldest event is 2 h old, 84.4 GiB a day come in: full in 3 h if nothing is retired",
            ),
            (
                log(GIB, mib_a_second),
                Some(GIB),
                "1.0 GiB of 1.0 GiB, the oldest event is 2 h old, 84.4 GiB a day come in: FULL (retention.disk_budget)",
            ),
        ] {
            assert_eq!(forecast(&log, budget), expected);
        }
    }
}
