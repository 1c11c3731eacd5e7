//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Measures outbox-relay against a PostgreSQL and a Kafka of yours, each figure beside its limit in the same run.
///
/// Without a case all of them run, which takes hours: try --quick first. `benches/run` brings both services up and
/// passes its arguments on.
#[derive(Debug, Parser)]
#[command(
    name = "figures",
    bin_name = "cargo bench --bench figures --",
    args_conflicts_with_subcommands = true
)]
pub struct Cli {
    #[command(flatten)]
    pub options: Options,
    #[command(subcommand)]
    pub action: Option<Action>,
    /// What cargo adds.
    #[arg(long, hide = true, global = true)]
    bench: bool,
}

#[derive(Debug, Subcommand)]
pub enum Action {
    /// Draw what a run has measured: FOLDER/drain-*.svg.
    Plot {
        /// What --json wrote.
        file: PathBuf,
        folder: PathBuf,
    },
    /// Print what a run has measured once more.
    Show {
        /// What --json wrote.
        file: PathBuf,
        /// As tables of Markdown.
        #[arg(long)]
        markdown: bool,
    },
    /// The bare loop that the relay is measured against; the bench starts it.
    #[command(hide = true)]
    Naked(Naked),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Case {
    /// A backlog is drained, in many shapes.
    Drain,
    /// From commit to consumer at steady rates.
    Latency,
    /// What the service pays: its commit rate and its write-ahead log.
    Service,
    /// A backlog is drained under adverse conditions.
    Adverse,
    /// The broker is frozen for a while (needs --broker-pid).
    Stall,
    /// A backlog is drained while events arrive.
    CatchUp,
    /// What the log takes on the disk under a steady flow with retention.
    Retention,
    /// Memory with large payloads.
    Memory,
    /// CPU while nothing happens.
    Idle,
    /// Start to first record, and SIGTERM to exit, with a backlog.
    StartStop,
    /// A kill -9 to the next record from another relay.
    Takeover,
}

#[derive(Clone, Debug, Args)]
pub struct Options {
    /// What to measure [default: everything].
    #[arg(value_enum)]
    pub cases: Vec<Case>,
    /// Only variants whose name contains this text, or one of several.
    #[arg(long, value_name = "TEXT")]
    pub only: Vec<String>,
    /// Small sizes and two rounds: shows that everything works. These are not figures.
    #[arg(long)]
    pub quick: bool,
    /// How often each measurement is repeated, relay and limit in turn [default: 3; quick: 2].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: Option<u32>,
    /// Events of a backlog; large payloads take fewer [default: 1000000; quick: 20000].
    #[arg(long, value_parser = clap::value_parser!(i64).range(1000..))]
    pub events: Option<i64>,
    /// A backlog of ten times --events too.
    #[arg(long)]
    pub large: bool,
    /// How long steady load lasts, in seconds, behind up to 3 that do not count [default: 30; quick: 3].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub seconds: Option<u32>,
    /// How long an idle relay is watched, in seconds [default: 60; quick: 5].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub idle_seconds: Option<u32>,
    /// How long the broker is frozen, in seconds [default: 30; quick: 3].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub stall_seconds: Option<u32>,
    /// The relay's lease_ttl where one takes over from another, in seconds [default: 10; quick: 3].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub lease_seconds: Option<u32>,
    /// Events per second that arrive while something else goes on [default: 5000; quick: 500].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub arrivals: Option<u32>,
    /// How long events flow while what was published is dropped, in seconds [default: 3600; quick: 15].
    #[arg(long, value_parser = clap::value_parser!(u32).range(5..))]
    pub retention_seconds: Option<u32>,
    /// Partitions of each topic.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(i32).range(1..))]
    pub partitions: i32,
    /// Write everything that was measured to this file.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Print tables of Markdown.
    #[arg(long)]
    pub markdown: bool,
    /// A superuser's URL; the bench creates databases on that server, and drops them at the end.
    #[arg(long, value_name = "URL", env = "DATABASE_URL", hide_env_values = true)]
    pub database_url: Option<String>,
    /// Where Kafka is; the bench creates topics, and deletes them.
    #[arg(long, value_name = "HOST:PORT,…", env = "KAFKA_BROKERS")]
    pub kafka_brokers: Option<String>,
    /// Properties of librdkafka, a NAME=VALUE a line: encryption and login, for the bench and for the relay.
    #[arg(long, value_name = "FILE")]
    pub kafka_config: Option<PathBuf>,
    /// Which Kafka that is, for the header: brokers do not tell.
    #[arg(long, value_name = "VERSION", env = "KAFKA_VERSION")]
    pub kafka_version: Option<String>,
    /// The only broker's process on this machine: allows the cases that freeze it, and tells what drains cost it.
    #[arg(long, value_name = "PID")]
    pub broker_pid: Option<u32>,
}

/// What was asked for, or the default of a full or a quick run.
#[derive(Clone, Debug)]
pub struct Sizes {
    pub rounds: u32,
    pub events: i64,
    pub large: bool,
    pub seconds: u32,
    pub idle: Duration,
    pub stall: Duration,
    pub lease: Duration,
    pub arrivals: u32,
    pub retention: Duration,
}

impl Options {
    pub fn sizes(&self) -> Sizes {
        let or = |asked: Option<u32>, quick, full| {
            asked.unwrap_or(if self.quick { quick } else { full })
        };
        let seconds = |asked, quick, full| Duration::from_secs(or(asked, quick, full).into());
        let events = if self.quick { 20_000 } else { 1_000_000 };
        Sizes {
            rounds: or(self.rounds, 2, 3),
            events: self.events.unwrap_or(events),
            large: self.large,
            seconds: or(self.seconds, 3, 30),
            idle: seconds(self.idle_seconds, 5, 60),
            stall: seconds(self.stall_seconds, 3, 30),
            lease: seconds(self.lease_seconds, 3, 10),
            arrivals: or(self.arrivals, 500, 5000),
            retention: seconds(self.retention_seconds, 15, 3600),
        }
    }

    /// The cases that were asked for, in their own order.
    pub fn wanted(&self) -> Vec<Case> {
        let all = Case::value_variants().iter().copied();
        all.filter(|case| self.cases.is_empty() || self.cases.contains(case))
            .collect()
    }
}

/// What the bare loop is to do.
#[derive(Clone, Debug, Args)]
pub struct Naked {
    #[arg(long)]
    pub url: String,
    #[arg(long)]
    pub brokers: String,
    #[arg(long)]
    pub kafka_config: Option<PathBuf>,
    #[arg(long)]
    pub compression: String,
    /// Topics are PREFIX.LOOP.AGGREGATE_TYPE.
    #[arg(long)]
    pub prefix: String,
    /// So many loops side by side, each over all events.
    #[arg(long)]
    pub loops: usize,
    /// Rows of a select.
    #[arg(long)]
    pub page: i64,
    /// Begin behind this id.
    #[arg(long)]
    pub after: i64,
    /// Publish only events of this type.
    #[arg(long)]
    pub event_type: Option<String>,
    /// Publish records with the headers that the relay's have.
    #[arg(long)]
    pub headers: bool,
    /// Look when a notification comes, and not every 200 ms.
    #[arg(long)]
    pub listen: bool,
}
