//! Start to first record with a backlog, and SIGTERM to exit in the middle of it: nothing may come twice.

use std::time::{Duration, Instant};

use anyhow::{Error, ensure};

use super::NAKED;
use crate::cursors;
use crate::drain::{Watched, await_cursor, await_records, emitted};
use crate::judge::Expected;
use crate::process::Process;
use crate::report::{Place, Report, number};
use crate::workload::Workload;
use crate::world::{Bare, Log, Run, Setup, World};

const CASE: &str = "start-stop";
const FIRST_MAX: Duration = Duration::from_mins(1);

pub async fn run(world: &World, report: &mut Report) -> Result<(), Error> {
    let workload = Workload::of(world.sizes.events);
    let once = Setup {
        exactly_once: true,
        ..Setup::default()
    };
    let variants = [("at-least-once", Setup::default()), ("exactly-once", once)];
    for _ in 0..world.sizes.rounds {
        for (variant, setup) in &variants {
            if !world.wants(variant) {
                continue;
            }
            let log = world.backlog(workload).await?;
            let run = world.run(1, &workload.aggregate_types()).await?;
            let relay = measure(&run, world.relay(&log, &run, setup)?).await?;
            let expected = emitted(&log, 0, false).await?;
            let again = finish(world, &log, &run, setup, &expected).await?;
            expected.judge(&run.topics.found()?, 1, false)?;
            run.topics.delete().await?;
            let run = world.run(1, &workload.aggregate_types()).await?;
            let naked = world.naked(&log, &run, setup, Bare::of(workload.page()))?;
            let naked = measure(&run, naked).await?;
            run.topics.delete().await?;
            let place = Place {
                case: CASE,
                variant,
                limit: NAKED,
            };
            let [first, stop] = relay;
            eprintln!(
                "  {CASE}, {variant}: first record after {} ms, end after {} ms",
                number(first),
                number(stop)
            );
            report.add(&place, "start to first record ms", first, naked[0]);
            if let Some(again) = again {
                report.add(&place, "start again to next record ms", again, None);
            }
            report.add(&place, "SIGTERM to exit ms", stop, naked[1]);
        }
    }
    world.forget_backlogs().await
}

/// Lets another relay go on where the first one stopped, unless that was at the end: whoever is asked to stop as soon as
/// it begins does not listen yet. Milliseconds from its start to its first record; what the first one had to make is there.
async fn finish(
    world: &World,
    log: &Log,
    run: &Run,
    setup: &Setup,
    expected: &Expected,
) -> Result<Option<f64>, Error> {
    if cursors::behind(&mut log.connect().await?, &run.name, 1, expected.last).await? == 0 {
        return Ok(None);
    }
    let there = run.topics.records()?;
    let mut rest = world.relay(log, run, setup)?;
    let next = first_record(run, &mut rest, there).await?;
    let mut watched = Watched::default();
    await_records(run, expected.events, &mut rest, &mut watched).await?;
    if setup.exactly_once {
        await_cursor(log, run, expected.last, &mut rest).await?;
    }
    rest.stop().await?;
    Ok(Some(next))
}

/// Milliseconds from the start to the first record, and from SIGTERM right then to the exit.
async fn measure(run: &Run, mut process: Process) -> Result<[f64; 2], Error> {
    let first = first_record(run, &mut process, 0).await?;
    let stopped = process.stop().await?;
    Ok([first, stopped.as_secs_f64() * 1e3])
}

/// Milliseconds from the start of a process until there are more records than before.
async fn first_record(run: &Run, process: &mut Process, before: i64) -> Result<f64, Error> {
    let watch_began = Instant::now();
    while run.topics.records()? <= before {
        process.usage()?;
        ensure!(watch_began.elapsed() < FIRST_MAX, "WRONG: nothing comes");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(process.began.elapsed().as_secs_f64() * 1e3)
}
