//! Guards what an event costs: instructions and allocations, counted by callgrind, each with a bound.
//!
//! A count is the same on a busy machine as on an idle one, which time is not. Each stage runs twice, over few events and over
//! many, and the difference is what the events cost: what comes before and after them falls out.
//!
//! [`stages`] are what is counted, [`recording`] is what they are given, [`rules`] and [`drain`] are the stages themselves,
//! [`callgrind`] reads the counts and [`bounds`] judges them.

#![allow(
    unreachable_pub,
    missing_docs,
    clippy::print_stdout,
    reason = "a program for people; nobody is outside"
)]

mod bounds;
mod callgrind;
mod drain;
mod recording;
mod rules;
mod stages;

use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Error, bail};
use clap::{Parser, Subcommand};

use bounds::{BOUNDS, Cost, Stage, Verdict};
use callgrind::Count;
use stages::PAGE;

/// Counts what an event costs, stage by stage, and fails when it is more than allowed.
///
/// Needs valgrind. `docs/performance.md` tells what the stages do and how a bound is changed.
#[derive(Debug, Parser)]
#[command(name = "cost", args_conflicts_with_subcommands = true)]
struct Cli {
    /// What to count [default: everything].
    #[arg(value_enum)]
    stages: Vec<Stage>,
    #[command(subcommand)]
    action: Option<Action>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Run a stage so many times over a page, which is what callgrind looks at.
    #[command(hide = true)]
    Stage { stage: Stage, rounds: usize },
}

/// How often a stage goes over the page in the small run and in the large one.
const ROUNDS: (usize, usize) = (1, 6);

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.action {
        Some(Action::Stage { stage, rounds }) => stages::run(stage, rounds).map(|()| true),
        None => guard(&cli.stages),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Counts and judges; `tests/run` reads the last line. False when something is dearer than allowed.
fn guard(wanted: &[Stage]) -> Result<bool, Error> {
    let program = std::env::current_exe().context("find this program")?;
    let folder = folder(&program)?;
    let (mut rows, mut remarks, mut above) = (Vec::new(), Vec::new(), 0);
    for bound in BOUNDS {
        if !wanted.is_empty() && !wanted.contains(&bound.stage) {
            continue;
        }
        let name = bounds::name(bound.stage);
        eprintln!("{name}");
        let profile = folder.join(&name);
        let cost = measure(&program, &name, &profile).with_context(|| format!("count {name}"))?;
        above += usize::from(bound.judge(cost) == Verdict::Above);
        remarks.extend(bound.remark(cost, &profile.display().to_string()));
        rows.push((bound, cost));
    }
    println!("{}", bounds::table(&rows));
    for remark in remarks {
        println!("{remark}");
    }
    println!("{} within their bounds, {above} above", rows.len() - above);
    Ok(above == 0)
}

/// Where the profiles stay, for a closer look: beside what cargo has built.
fn folder(program: &Path) -> Result<PathBuf, Error> {
    let target = program.parent().and_then(Path::parent);
    let folder = target
        .context("this program has no folder")?
        .join("callgrind");
    std::fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    Ok(folder)
}

/// What one event of a stage costs. The profile of the large run stays.
#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
fn measure(program: &Path, stage: &str, profile: &Path) -> Result<Cost, Error> {
    let (few, many) = ROUNDS;
    let before = count(program, stage, few, profile)?;
    let more = count(program, stage, many, profile)? - before;
    let events = (PAGE * (many - few)) as f64;
    Ok(Cost {
        instructions: more.instructions as f64 / events,
        allocations: more.allocations as f64 / events,
    })
}

fn count(program: &Path, stage: &str, rounds: usize, profile: &Path) -> Result<Count, Error> {
    let mut out_file = OsString::from("--callgrind-out-file=");
    out_file.push(profile);
    let run = Command::new("valgrind")
        .args(["--tool=callgrind", "--quiet"])
        .arg(out_file)
        .arg(program)
        .args(["stage", stage, &rounds.to_string()])
        .stdin(Stdio::null())
        .output();
    let run = match run {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            bail!("valgrind is missing: install the package of that name")
        }
        run => run.context("run valgrind")?,
    };
    if !run.status.success() {
        bail!(
            "{}: {}",
            run.status,
            String::from_utf8_lossy(&run.stderr).trim()
        );
    }
    let text = std::fs::read_to_string(profile).context("read what callgrind wrote")?;
    Count::parse(&text)
}
