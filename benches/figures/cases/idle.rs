//! CPU and write-ahead log while nothing happens, beside a bare loop that looks every 200 ms.

use std::time::Instant;

use anyhow::Error;

use super::NAKED;
use super::service::wal;
use crate::drain::{Watched, await_records};
use crate::live;
use crate::process::Process;
use crate::report::{Place, Report, number};
use crate::world::{Bare, Capture, Log, Run, Setup, World};

const CASE: &str = "idle";

/// What a process takes without work.
struct Idle {
    cpu_percent: f64,
    wal_bytes_per_second: f64,
    resident_mib: f64,
}

pub async fn run(world: &World, report: &mut Report) -> Result<(), Error> {
    let log = world.log().await?;
    live::emit_one(&mut log.connect().await?, "warm").await?;
    for _ in 0..world.sizes.rounds {
        for capture in [Capture::Listen, Capture::Poll] {
            let variant = capture.name();
            if !world.wants(variant) {
                continue;
            }
            let setup = Setup {
                capture,
                ..Setup::default()
            };
            let run = world.run(1, &["event0".to_owned()]).await?;
            let relay = measure(world, &log, &run, world.relay(&log, &run, &setup)?).await?;
            run.topics.delete().await?;
            let run = world.run(1, &["event0".to_owned()]).await?;
            let naked = world.naked(&log, &run, &setup, Bare::of(5000))?;
            let naked = measure(world, &log, &run, naked).await?;
            run.topics.delete().await?;
            let place = Place {
                case: CASE,
                variant,
                limit: NAKED,
            };
            let (cpu, least) = (relay.cpu_percent, naked.cpu_percent);
            eprintln!(
                "  {CASE}, {variant}: {} % of a core, {NAKED} {}",
                number(cpu),
                number(least)
            );
            report.add(&place, "% of a core", cpu, least);
            let (wal, least) = (relay.wal_bytes_per_second, naked.wal_bytes_per_second);
            report.add(&place, "WAL bytes/s", wal, least);
            report.add(
                &place,
                "resident MiB",
                relay.resident_mib,
                naked.resident_mib,
            );
        }
    }
    world.forget(&log).await
}

/// Begins when the process has published the only event.
async fn measure(world: &World, log: &Log, run: &Run, mut process: Process) -> Result<Idle, Error> {
    await_records(run, 1, &mut process, &mut Watched::default()).await?;
    // What it still does about that event is over.
    tokio::time::sleep(world.sizes.idle / 10).await;
    let mut db = log.connect().await?;
    let (wal_before, before, began) = (wal(&mut db).await?, process.usage()?, Instant::now());
    tokio::time::sleep(world.sizes.idle).await;
    let (after, seconds) = (process.usage()?, began.elapsed().as_secs_f64());
    let written = wal(&mut db).await? - wal_before;
    process.stop().await?;
    Ok(Idle {
        cpu_percent: after.cpu.saturating_sub(before.cpu).as_secs_f64() / seconds * 100.0,
        wal_bytes_per_second: written / seconds,
        resident_mib: after.resident_mib,
    })
}
