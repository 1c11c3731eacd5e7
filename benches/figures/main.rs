//! The relay's figures on a PostgreSQL and a Kafka of the user's, each beside its limit in the same run.
//!
//! `docs/performance.md` says how to run it and how to read it. [`cases`] are what is measured, [`drain`] and [`live`] how,
//! [`world`] where, [`naked`] the limit, [`judge`] whether it is right, [`report`] what comes of it.

#![allow(
    unreachable_pub,
    missing_docs,
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::similar_names,
    reason = "a program for people, which measures time; nobody is outside; a place has a pace"
)]

mod cases;
mod cursors;
mod drain;
mod judge;
mod live;
mod machine;
mod naked;
mod options;
mod plots;
mod process;
mod recorder;
mod report;
mod topics;
mod workload;
mod world;

use std::process::ExitCode;

use anyhow::Error;
use clap::{Parser, ValueEnum};

use machine::Stolen;
use options::{Action, Case, Cli, Options};
use report::Report;
use world::World;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match act(Cli::parse()).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn act(cli: Cli) -> Result<ExitCode, Error> {
    match cli.action {
        None => measure(cli.options).await,
        Some(Action::Naked(naked)) => naked::run(naked).await.map(|()| ExitCode::SUCCESS),
        Some(Action::Plot { file, folder }) => {
            for path in plots::draw(&Report::read(&file)?, &folder)? {
                println!("{}", path.display());
            }
            Ok(ExitCode::SUCCESS)
        }
        Some(Action::Show { file, markdown }) => {
            print!("{}", Report::read(&file)?.show(markdown));
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn measure(options: Options) -> Result<ExitCode, Error> {
    let world = World::new(&options)?;
    let mut report = Report::new(machine::header(&world, &options).await?);
    for line in report.header.lines() {
        eprintln!("{line}");
    }
    let before = Stolen::until_now();
    let interrupted = tokio::select! {
        () = all(&options, &world, &mut report) => false,
        asked = tokio::signal::ctrl_c() => { asked?; true }
    };
    report.header.stolen_percent = Some(Stolen::until_now().percent_since(&before));
    let cleaned = world.clean().await;
    if interrupted {
        report.failed.push("interrupted".to_owned());
    }
    if let Some(file) = &options.json {
        report.write(file)?;
    }
    println!("{}", report.show(options.markdown));
    cleaned?;
    Ok(if report.failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// A case that fails leaves the others their turn.
async fn all(options: &Options, world: &World, report: &mut Report) {
    if let Err(error) = cases::warm_up(world).await {
        let failure = format!("warm-up: {error:#}");
        eprintln!("FAILED {failure}");
        report.failed.push(failure);
        return;
    }
    for case in options.wanted() {
        let name = name(case);
        eprintln!("{name}");
        if let Err(error) = cases::run(case, world, report).await {
            let failure = format!("{name}: {error:#}");
            eprintln!("FAILED {failure}");
            report.failed.push(failure);
        }
    }
    if report.rows.is_empty() && report.skipped.is_empty() && report.failed.is_empty() {
        let only = &options.only;
        let failure = format!("nothing was measured: no variant's name contains {only:?}");
        report.failed.push(failure);
    }
}

fn name(case: Case) -> String {
    let value = case.to_possible_value();
    value.map_or_else(String::new, |value| value.get_name().to_owned())
}
