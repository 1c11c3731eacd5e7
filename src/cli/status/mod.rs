//! `outbox-relay status`: where every pipeline stands.
//!
//! From the database's books, so it works while no daemon runs; and from the daemon itself, where one answers.

mod rates;
mod table;

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::Error;
use bytesize::ByteSize;
use clap::Args;
use serde::Serialize;
use tokio::time::{Instant, sleep};

use self::rates::Rates;
use super::show::{self, BOLD, GREEN, RED, YELLOW, count, say};
use super::{ConfigArgs, Outcome};
use crate::admin::{self, Overview, PipelineView};
use crate::config::Config;
use crate::database::Database;
use crate::ledger::view::{Books, LogSize, PipelineBooks, Server};
use crate::reason::reason;
use crate::relay::status::State;
use crate::retention::{self, Outlived};
use crate::supervise::wall_clock_us;

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
        let mut rates = Rates::default();
        let watching = async {
            loop {
                let (seen, failed) = look(&config, &mut database).await;
                if !self.json && std::io::stdout().is_terminal() {
                    anstream::print!("\x1b[2J\x1b[H");
                }
                self.show(&config, &seen);
                if let Some(books) = seen.books.as_ref().filter(|_| !self.json) {
                    for line in rates.look(Instant::now(), books) {
                        say!("{BOLD}rate{BOLD:#}: {line}");
                    }
                    say!("{}", show::moment(wall_clock_us() / 1_000_000 * 1_000_000));
                }
                if let Some(error) = failed {
                    say!("{RED}{}{RED:#}", reason(&error));
                }
                sleep(REFRESH).await;
            }
        };
        tokio::select! {
            () = watching => {}
            () = show::closed() => {}
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
            say!("{}", text.expect("no map has keys other than texts"));
            return;
        }
        if let Some(books) = &seen.books {
            let mut table = table::pipelines(seen, books, show::width());
            show::print_table(&mut table);
        }
        troubles(seen);
        daemon(config, seen);
        if let Some(books) = &seen.books {
            relays(books);
            show_log(&books.log, config.retention.disk_budget_bytes);
            show_retained(books, &config.retention);
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
            // Without it the answer says less.
            let token = config.admin.token.current().ok().flatten();
            Some(admin::ask_as(config.admin.listen, token.as_ref()).await)
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

/// The lines that a person acts upon, each with what to type.
fn troubles(seen: &Seen) {
    for view in seen.daemon.iter().flat_map(|daemon| &daemon.pipelines) {
        let name = view_name(seen, view);
        match &view.status.state {
            State::Stalled { reason } => {
                say!(
                    "{RED}{name}{RED:#}: stalled: {}; it is tried again: see `outbox-relay doctor`",
                    show::plain(reason)
                );
            }
            State::Halted { reason } => say!("{RED}{name}{RED:#}: halted: {}", show::plain(reason)),
            _ => {}
        }
    }
    let Some(books) = &seen.books else { return };
    for row in &books.pipelines {
        let name = row.name();
        if row.moved.is_some() {
            say!(
                "{YELLOW}{name}{YELLOW:#}: its cursor was written on another server or timeline (restored, failed over): the \
                 relay makes it fit when it takes the lease"
            );
        } else if let Some(unknown) = &row.oldest_unpublished_unknown {
            say!("{name}: age of the oldest event: {unknown}");
        }
        let dead = row.dead_letters;
        let waiting = row.parked_events - dead;
        if waiting > 0 {
            let are = if waiting == 1 { "is" } else { "are" };
            say!(
                "{YELLOW}{name}{YELLOW:#}: {} {are} parked, and later events of these entities wait: see `outbox-relay parked list`",
                count(waiting, "event")
            );
        }
        if dead > 0 {
            say!(
                "{YELLOW}{name}{YELLOW:#}: {}: see `outbox-relay parked list`",
                count(dead, "dead letter")
            );
        }
        if let Some(pause) = &row.paused {
            say!(
                "{YELLOW}{name}{YELLOW:#}: PAUSED {}; `outbox-relay pipelines resume {}` lets it go on",
                show::plain(&pause.to_string()),
                row.pipeline
            );
        } else if row.owner.is_none() && seen.configured.contains(&row.pipeline) {
            say!(
                "{RED}{name}{RED:#}: no relay owns it, nothing is published: start one with `outbox-relay run`, or see \
                 `outbox-relay doctor`"
            );
        } else if row.owner.is_none() && row.oldest_unpublished_seconds.is_some() {
            say!(
                "{YELLOW}{name}{YELLOW:#}: events wait, and the configuration does not name it: see `outbox-relay doctor`"
            );
        }
    }
}

/// The relays that are there, and what each owns.
fn relays(books: &Books) {
    let mut shown: Vec<String> = Vec::new();
    for relay in &books.relays {
        let rows = books.pipelines.iter();
        let owned: Vec<String> = rows
            .filter(|row| {
                row.owner
                    .as_ref()
                    .is_some_and(|owner| owner.holder == relay.holder)
            })
            .map(PipelineBooks::name)
            .collect();
        let does = if owned.is_empty() {
            "stands by".to_owned()
        } else {
            format!("owner of {}", owned.join(", "))
        };
        shown.push(format!("{} ({does})", show::plain(&relay.holder)));
    }
    if !shown.is_empty() {
        say!("{BOLD}relays{BOLD:#}: {}", shown.join(", "));
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
            say!(
                "{BOLD}daemon{BOLD:#} at {}: {style}{ready}{style:#}, version {}, {}",
                config.admin.listen,
                show::plain(&daemon.version),
                show::plain(&daemon.holder)
            );
        }
        (None, trouble) => say!(
            "{BOLD}daemon{BOLD:#}: {}",
            trouble.as_deref().unwrap_or_default()
        ),
    }
}

fn show_log(log: &LogSize, budget_bytes: Option<u64>) {
    say!("{BOLD}log{BOLD:#}: {}", forecast(log, budget_bytes));
}

/// Says when events stay for longer than they should, and which were lost.
fn show_retained(books: &Books, retention: &retention::Settings) {
    if let Some(Outlived { what, why, mend }) = retention.outlived(books) {
        anstream::println!(
            "  {RED}{}{RED:#}: {}; {mend}",
            show::plain(&what),
            show::plain(&why)
        );
    }
    for lost in &books.retained.lost {
        anstream::println!(
            "  {RED}{}{RED:#}: {} events were LOST by retention.drop_unpublished_after, the last {} ago: see `outbox-relay acts`",
            show::plain(&lost.pipeline),
            lost.events,
            show::age(lost.seconds_ago)
        );
    }
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
    let left = budget_bytes.map(|budget| budget.saturating_sub(log.bytes));
    let full = match left {
        Some(0) => ": FULL (retention.disk_budget)",
        _ => "",
    };
    let Some(growth) = log.growth.filter(|growth| growth.bytes_per_second() > 0.0) else {
        return format!("{now}{full}");
    };
    let rate = growth.bytes_per_second();
    let end = left.filter(|left| *left > 0).map_or(String::new(), |left| {
        format!(
            ": full in {} if nothing is removed",
            show::age(left as f64 / rate)
        )
    });
    let a_day = size((rate * 86_400.0) as u64);
    let made_of = format!(
        "{} ids in {}, {} each",
        growth.ids,
        show::age(growth.observed_seconds),
        size(growth.bytes_per_event as u64)
    );
    format!("{now}, {a_day} a day come in ({made_of}){full}{end}")
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
    say!("{BOLD}server{BOLD:#}: PostgreSQL {version}{standby}");
    match oldest_transaction {
        Some(open) => say!(
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
        None if *sees_all_transactions => say!("  no other transaction in progress"),
        None => {
            say!(
                "  transactions of other roles are hidden from this one (grant pg_read_all_stats)"
            );
        }
    }
    if let Some(seconds) = oldest_prepared_seconds {
        say!(
            "  prepared transactions: {prepared_transactions}, the oldest for {}",
            show::age(*seconds)
        );
    }
    if oldest_transaction.is_some() || *prepared_transactions > 0 {
        say!(
            "  (an open transaction holds up its own events only: everybody else's are published past it)"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::ledger::view::Growth;

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_forecast_says_when_the_disk_is_full() {
        let log = |bytes, growth| LogSize {
            bytes,
            oldest_seconds: Some(7200.0),
            growth,
        };
        let mib_a_second = Some(Growth {
            observed_seconds: 7200.0,
            ids: 7_372_800,
            bytes_per_event: 1024.0,
        });
        for (log, budget, expected) in [
            (log(GIB, None), None, "1.0 GiB, the oldest event is 2 h old"),
            (
                log(GIB, None),
                Some(GIB),
                "1.0 GiB of 1.0 GiB, the oldest event is 2 h old: FULL (retention.disk_budget)",
            ),
            (
                log(GIB, mib_a_second),
                None,
                "1.0 GiB, the oldest event is 2 h old, 84.4 GiB a day come in (7372800 ids in 2 h, 1.0 KiB each)",
            ),
            (
                log(GIB, mib_a_second),
                Some(10 * GIB),
                "1.0 GiB of 10.0 GiB, the oldest event is 2 h old, 84.4 GiB a day come in (7372800 ids in 2 h, 1.0 KiB each): full in 3 h if nothing is removed",
            ),
            (
                log(GIB, mib_a_second),
                Some(GIB),
                "1.0 GiB of 1.0 GiB, the oldest event is 2 h old, 84.4 GiB a day come in (7372800 ids in 2 h, 1.0 KiB each): FULL (retention.disk_budget)",
            ),
        ] {
            assert_eq!(forecast(&log, budget), expected);
        }
    }
}
