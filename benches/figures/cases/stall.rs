//! The broker is frozen in the middle of a drain, and goes on after a while: nothing may be lost, memory may not grow.

use std::time::Instant;

use anyhow::{Error, ensure};

use super::{NAKED, add_memory, in_turn};
use crate::drain::{Memory, Watched, await_records, emitted, now_ms, to_f64};
use crate::process::Broker;
use crate::report::{Place, Report, number};
use crate::workload::Workload;
use crate::world::{Bare, Setup, World};

const CASE: &str = "stall";

/// What a process did around the time in which its broker was frozen.
struct Stalled {
    /// From the broker's return to the end of the drain, for what came then.
    rate: f64,
    memory: Memory,
}

pub async fn run(world: &World, report: &mut Report) -> Result<(), Error> {
    let Some(broker) = world.broker else {
        report.skip(format!(
            "{CASE}: the bench does not know which process to freeze, see --broker-pid"
        ));
        return Ok(());
    };
    let seconds = world.sizes.stall.as_secs();
    let large = Workload {
        payload_bytes: super::memory::PAYLOAD_BYTES,
        ..Workload::of(super::memory::events(world))
    };
    let variants = [
        ("233 B", Workload::of(world.sizes.events)),
        ("1 MiB", large),
    ];
    for round in 0..world.sizes.rounds {
        for (payload, workload) in variants {
            let variant = format!("{payload}, {seconds} s");
            if !world.wants(&variant) {
                continue;
            }
            let (relay, naked) = in_turn(
                round,
                measure(world, workload, broker, Who::Relay),
                // A client that is told of a cluster without brokers may never come back (see `Sink::is_cut_off`), and nobody
                // opens this one again: that is no fault of the relay's.
                async { Ok(measure(world, workload, broker, Who::Naked).await) },
            )
            .await?;
            let naked = match naked {
                Ok(naked) => naked,
                Err(error) => {
                    report.skip(format!(
                        "{CASE}, {variant}: the {NAKED} ended with {error:#}; the relay's peak was {} MiB",
                        number(relay.memory.peak_mib)
                    ));
                    continue;
                }
            };
            let place = Place {
                case: CASE,
                variant: &variant,
                limit: NAKED,
            };
            eprintln!(
                "  {CASE}, {variant}: peak {} MiB, {NAKED} {}",
                number(relay.memory.peak_mib),
                number(naked.memory.peak_mib)
            );
            report.add(&place, "events/s after it", relay.rate, naked.rate);
            add_memory(report, &place, &relay.memory, &naked.memory);
        }
    }
    world.forget_backlogs().await
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    Relay,
    Naked,
}

async fn measure(
    world: &World,
    workload: Workload,
    broker: Broker,
    who: Who,
) -> Result<Stalled, Error> {
    let log = world.backlog(workload).await?;
    let run = world.run(1, &workload.aggregate_types()).await?;
    let setup = Setup::default();
    let expected = emitted(&log, 0, false).await?;
    let mut watched = Watched::default();
    let mut process = match who {
        Who::Relay => world.relay(&log, &run, &setup)?,
        Who::Naked => world.naked(&log, &run, &setup, Bare::of(workload.page()))?,
    };
    await_records(&run, expected.events / 4, &mut process, &mut watched).await?;
    let there = run.topics.records()?;
    let frozen = broker.freeze()?;
    let began = Instant::now();
    while began.elapsed() < world.sizes.stall {
        watched.look(&mut process)?;
        tokio::time::sleep(crate::drain::LOOK).await;
    }
    let thawed_ms = now_ms()?;
    drop(frozen);
    await_records(&run, expected.events, &mut process, &mut watched).await?;
    let usage = watched.look(&mut process)?;
    process.stop().await?;
    let found = match who {
        Who::Relay => {
            let found = run.topics.found()?;
            expected.judge(&found, 1, false)?;
            found
        }
        Who::Naked => run.topics.counted()?,
    };
    ensure!(
        found.records == expected.events,
        "WRONG: {} of {} records are in Kafka",
        found.records,
        expected.events
    );
    let last_ms = found.last_ms()?;
    ensure!(
        last_ms > thawed_ms,
        "everything was there before the broker was frozen: use more --events"
    );
    let took = to_f64(last_ms - thawed_ms) / 1e3;
    let stalled = Stalled {
        rate: to_f64(expected.events - there) / took,
        memory: watched.memory(usage),
    };
    run.topics.delete().await?;
    Ok(stalled)
}
