//! The cases. Each repeats its measurements in rounds, with relay and limit one behind the other.

mod adverse;
mod catch_up;
mod drain;
mod idle;
mod latency;
mod memory;
mod retention;
mod service;
mod stall;
mod start_stop;
mod takeover;

use std::future::Future;

use anyhow::Error;
use futures_util::future::LocalBoxFuture;

use crate::drain::{Backlog, Drain, Memory, naked, relay};
use crate::live::Pace;
use crate::options::Case;
use crate::report::{Place, Report, number};
use crate::workload::Workload;
use crate::world::{Setup, World};

/// The usual limit.
pub const NAKED: &str = "bare loop";
/// The same with records that have the headers of the relay's.
pub const NAKED_WITH_HEADERS: &str = "bare loop with headers";

/// At most so long, behind the warm-up that every steady load has.
const BROKER_WARM_UP_SECONDS: u32 = 12;
/// At most so many, by a bare loop and by a relay.
const BROKER_WARM_UP_EVENTS: i64 = 200_000;

/// A broker that has just been started compiles itself, and does so again when it is given a backlog for the first time: the
/// first measurement would be a different one.
pub async fn warm_up(world: &World) -> Result<(), Error> {
    eprintln!("warm-up of the broker");
    let seconds = world.sizes.seconds.min(BROKER_WARM_UP_SECONDS);
    latency::naked(world, Pace::of(1_000, seconds)).await?;
    let workload = Workload::of(world.sizes.events.min(BROKER_WARM_UP_EVENTS));
    let log = world.backlog(workload).await?;
    let backlog = Backlog::all(&log, workload);
    naked(world, &backlog, &Setup::default()).await?;
    relay(world, &backlog, &Setup::default()).await?;
    world.forget_backlogs().await
}

/// A relay and its limit, of one round. Who comes second finds a warmer machine: they take turns at that.
fn in_turn<'a, R: 'a, L: 'a>(
    round: u32,
    relay: impl Future<Output = Result<R, Error>> + 'a,
    limit: impl Future<Output = Result<L, Error>> + 'a,
) -> LocalBoxFuture<'a, Result<(R, L), Error>> {
    Box::pin(async move {
        if round.is_multiple_of(2) {
            let relay = relay.await?;
            Ok((relay, limit.await?))
        } else {
            let limit = limit.await?;
            Ok((relay.await?, limit))
        }
    })
}

/// Runs one case.
pub async fn run(case: Case, world: &World, report: &mut Report) -> Result<(), Error> {
    match case {
        Case::Drain => drain::run(world, report).await,
        Case::Latency => latency::run(world, report).await,
        Case::Service => service::run(world, report).await,
        Case::Adverse => adverse::run(world, report).await,
        Case::Stall => stall::run(world, report).await,
        Case::CatchUp => catch_up::run(world, report).await,
        Case::Retention => retention::run(world, report).await,
        Case::Memory => memory::run(world, report).await,
        Case::Idle => idle::run(world, report).await,
        Case::StartStop => start_stop::run(world, report).await,
        Case::Takeover => takeover::run(world, report).await,
    }
}

/// Adds what a drain says about a process: all of it, beside the same of another one.
pub fn add(report: &mut Report, place: &Place<'_>, relay: &Drain, limit: &Drain) {
    let Place {
        case,
        variant,
        limit: name,
    } = place;
    eprintln!(
        "  {case}, {variant}: {} events/s, {name} {}",
        number(relay.rate),
        number(limit.rate)
    );
    report.add(place, "events/s", relay.rate, limit.rate);
    report.add(place, "CPU us/event", relay.cpu_us, limit.cpu_us);
    add_memory(report, place, &relay.memory, &limit.memory);
    if let (Some(relay), Some(limit)) = (relay.broker, limit.broker) {
        report.add(place, "broker's CPU us/event", relay.cpu_us, limit.cpu_us);
        report.add(place, "broker's bytes/event", relay.written, limit.written);
    }
}

pub fn add_memory(report: &mut Report, place: &Place<'_>, relay: &Memory, limit: &Memory) {
    report.add(place, "peak MiB", relay.peak_mib, limit.peak_mib);
    report.add(place, "steady MiB", relay.steady_mib, limit.steady_mib);
}
