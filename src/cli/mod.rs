//! The commands. They print; nothing below them does.

mod check;
mod demo;
mod doctor;
mod migrate;
mod parked;
mod pipelines;
mod ready;
mod redrive;
mod replay;
mod run;
mod show;
mod status;
mod tail;
mod time;
mod verify;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::LazyLock;

use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use crate::config::{Config, ConfigError};
use crate::reason::reason;
use crate::sink::kafka;

/// What the exit codes mean; part of the help.
const EXIT_CODES: &str = "\
Exit codes:
  0  done, or nothing wrong
  1  failed: the message says at what
  2  the command line or the configuration is wrong
  3  something was found: `doctor`, `verify` and `demo` say what";

/// The version, the commit where the build was told it, and librdkafka's version.
fn version() -> &'static str {
    static VERSION: LazyLock<String> = LazyLock::new(|| {
        let commit = option_env!("OUTBOX_RELAY_COMMIT").map_or_else(String::new, |commit| {
            format!("{}, ", commit.get(..12).unwrap_or(commit))
        });
        let librdkafka = kafka::version();
        format!(
            "{} ({commit}librdkafka {librdkafka})",
            env!("CARGO_PKG_VERSION")
        )
    });
    &VERSION
}

/// Publishes the committed rows of a transactional outbox to Kafka, in order per entity.
#[derive(Debug, Parser)]
#[command(name = "outbox-relay", version = version(), about, after_help = EXIT_CODES, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// See it work, with nothing installed.
    Demo(demo::Demo),
    /// Publish until asked to stop.
    Run(run::Run),
    /// Make or update the outbox tables.
    Migrate(migrate::Migrate),
    /// Read the configuration, and say what is wrong with it or what it means.
    Check(check::Check),
    /// Look for what keeps the relay from working, or will.
    Doctor(doctor::Doctor),
    /// Ask the daemon whether it is ready: for probes.
    Ready(ready::Ready),
    /// Show where every pipeline stands.
    Status(status::StatusArgs),
    /// Show committed events as they come, and change nothing.
    Tail(tail::Tail),
    /// Look at events that were set aside, publish them after all, or give them up.
    Parked(parked::Parked),
    /// Pause, resume or move whole pipelines, lead one past an event, forget one.
    Pipelines(pipelines::Pipelines),
    /// Show what operators asked for: when, who, of which events, why.
    Acts(redrive::Acts),
    /// Publish retained events again.
    Replay(replay::Replay),
    /// Compare the topics with the log: what is missing, doubled, out of order, altered or unknown?
    Verify(verify::Verify),
    /// Print a completion script.
    Completions {
        /// For this shell.
        shell: Shell,
    },
}

/// Where the configuration is.
#[derive(Debug, Args)]
struct ConfigArgs {
    /// The configuration file, else the one that RELAY_CONFIG names; without one the built-in defaults and the environment
    /// count.
    // Read here and not by clap, for which an empty variable is a file without a name.
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl ConfigArgs {
    fn load(&self) -> Result<Config, ConfigError> {
        Config::load(self.file().as_deref(), std::env::vars())
    }

    fn file(&self) -> Option<PathBuf> {
        let named = || std::env::var_os("RELAY_CONFIG").filter(|name| !name.is_empty());
        self.config.clone().or_else(|| named().map(Into::into))
    }
}

/// How a command ended that did not fail.
enum Outcome {
    Done,
    /// Something was found that a person should look at.
    Findings,
}

/// The command line does not say what is needed; exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

/// Runs the command line; decides the exit code, here and nowhere else.
pub async fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match cli.command {
        Command::Demo(demo) => demo.run().await,
        Command::Run(run) => run.run().await,
        Command::Migrate(migrate) => migrate.run().await,
        Command::Check(check) => check.run(),
        Command::Doctor(doctor) => doctor.run().await,
        Command::Ready(ready) => ready.run().await,
        Command::Status(status) => status.run().await,
        Command::Tail(tail) => tail.run().await,
        Command::Parked(parked) => parked.run().await,
        Command::Pipelines(pipelines) => pipelines.run().await,
        Command::Acts(acts) => acts.run().await,
        Command::Replay(replay) => replay.run().await,
        Command::Verify(verify) => verify.run().await,
        Command::Completions { shell } => {
            clap_complete::generate(
                shell,
                &mut Cli::command(),
                "outbox-relay",
                &mut std::io::stdout(),
            );
            Ok(Outcome::Done)
        }
    };
    match outcome {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Findings) => ExitCode::from(3),
        Err(error) => {
            anstream::eprintln!("outbox-relay: {}", reason(&error));
            let wrong = error.is::<ConfigError>() || error.is::<Usage>();
            ExitCode::from(if wrong { 2 } else { 1 })
        }
    }
}
