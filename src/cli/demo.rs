//! `outbox-relay demo`: a shop, a broker and the relay between them, on this machine alone.

use std::convert::Infallible;
use std::io::IsTerminal;

use anstyle::{AnsiColor, Style};
use clap::Args;
use secrecy::SecretString;
use tokio::signal::unix::{SignalKind, signal};

use super::Outcome;
use super::show::say;
use crate::config::{Log, LogFormat};
use crate::demo::{self, Report, Stop, grouped, milliseconds};
use crate::logging;

/// See it work: a small shop, an outbox, a broker and a consumer that checks everything; needs no service.
#[derive(Debug, Args)]
pub(super) struct Demo {
    /// About how many events the shop commits.
    #[arg(long, value_name = "N", default_value_t = 2000)]
    events: u64,
    /// Events per second; 0: as fast as it goes.
    #[arg(long, value_name = "R", default_value_t = 200)]
    rate: u32,
    /// A PostgreSQL server; the demo creates a database on it and drops it at the end. Without it: a SQLite file.
    #[arg(long, value_name = "URL", value_parser = secret)]
    database_url: Option<SecretString>,
    /// A Kafka cluster; the demo creates topics on it and deletes them at the end. RELAY_SINK__KAFKA__… settings hold for
    /// encryption and authentication. Without it: a broker inside this process.
    #[arg(long, value_name = "HOSTS")]
    brokers: Option<String>,
    /// Chooses what happens in the shop; random when absent.
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Lines instead of a screen; so it is anyway when the output is no terminal.
    #[arg(long)]
    plain: bool,
}

#[expect(clippy::unnecessary_wraps, reason = "what clap expects of a parser")]
fn secret(text: &str) -> Result<SecretString, Infallible> {
    Ok(text.into())
}

impl Demo {
    pub(super) async fn run(self) -> Result<Outcome, anyhow::Error> {
        let plain = self.plain || !std::io::stdout().is_terminal();
        let warnings = Log {
            level: "warn".to_owned(),
            format: LogFormat::Text,
        };
        // Not in the middle of the picture.
        let later = if plain || !std::io::stderr().is_terminal() {
            drop(logging::install(&warnings)?);
            None
        } else {
            Some(logging::install_for_later(&warnings)?)
        };
        let seed = self.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
        let settings = demo::Settings {
            events: self.events,
            rate: self.rate,
            seed,
            database_url: self.database_url,
            brokers: self.brokers,
            env: std::env::vars().collect(),
            plain,
        };
        let stop = Stop::default();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let signals = async {
            loop {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
                stop.ask();
            }
        };
        let report = tokio::select! {
            report = demo::run(settings, &stop) => report,
            () = signals => unreachable!("signals never end"),
        };
        if let Some(later) = later {
            anstream::eprint!("{}", later.text());
        }
        let report = report?;
        tell(&report, seed);
        Ok(if report.verdict.holds() {
            Outcome::Done
        } else {
            Outcome::Findings
        })
    }
}

/// The summary, and what comes next.
fn tell(report: &Report, seed: u64) {
    let Report {
        verdict,
        transactions,
        rolled_back_transactions,
        latency,
        took,
        trouble,
    } = report;
    say!(
        "\nA consumer that shares no code with the relay read every topic from its first\n\
         record to its last, and compared it with what the shop knows it committed.\n"
    );
    let transactions = format!("events, in {} transactions", grouped(*transactions));
    row("committed", verdict.committed, Style::new(), &transactions);
    row("consumed", verdict.consumed, Style::new(), "");
    finding("lost", verdict.lost, "");
    finding("duplicated", verdict.duplicated, "");
    finding(
        "out of order",
        verdict.out_of_order,
        "per customer, product and order",
    );
    finding("altered", verdict.altered, "topic, key, type or payload");
    if verdict.unknown > 0 {
        finding("unknown", verdict.unknown, "nobody wrote them");
    }
    let rolled_back = format!(
        "of {} events, in {} transactions",
        grouped(verdict.rolled_back as u64),
        grouped(*rolled_back_transactions)
    );
    finding(
        "rolled back, yet seen",
        verdict.rolled_back_seen,
        &rolled_back,
    );
    if let Some(latency) = latency {
        say!(
            "\n  commit to consume: p50 {}, p99 {}   ({:.1} s in all, --seed {seed})",
            milliseconds(latency.p50),
            milliseconds(latency.p99),
            took.as_secs_f64()
        );
    }
    say!("  [3]@6 beside an event: it is in partition 3 of its topic, at offset 6");
    if let Some(trouble) = trouble {
        say!("\n  {BAD}the relay says:{BAD:#} {trouble}");
    }
    if verdict.committed == 0 && verdict.holds() {
        say!("\n  Nothing was committed, so nothing could be checked.");
    } else if verdict.holds() {
        say!("\n  {GOOD}Everything that was committed arrived, once and in order.{GOOD:#}");
    } else {
        say!("\n  {BAD}A promise is broken.{BAD:#}");
    }
    say!("{NEXT}");
}

const NEXT: &str = r#"
With your own database and broker:

  export RELAY_SOURCE__POSTGRES__URL=postgres://user@host/database
  export RELAY_SINK__KAFKA__BROKERS=host:9092
  outbox-relay migrate     makes the outbox tables
  grant outbox_writer to my_service             the service may emit, and nothing else
  create role relay login password '...' in role outbox_relay
  select outbox.emit('order', '17', 'paid', '{"id": 17}')   in the transaction that changes the order
  outbox-relay doctor      says what is missing
  outbox-relay run         publishes what is committed to them

This demo on them:  outbox-relay demo --database-url URL --brokers HOSTS
All the rest:       README.md"#;

const GOOD: Style = AnsiColor::Green.on_default().bold();
const BAD: Style = AnsiColor::Red.on_default().bold();

/// Something that should not have happened.
fn finding(name: &str, found: usize, note: &str) {
    row(name, found, if found == 0 { GOOD } else { BAD }, note);
}

fn row(name: &str, count: usize, style: Style, note: &str) {
    let count = grouped(count as u64);
    let note = if note.is_empty() {
        String::new()
    } else {
        format!("   {note}")
    };
    say!("  {name:<22}{style}{count:>10}{style:#}{note}");
}
