//! A relay is killed with -9 while another one stands by: until an event that is emitted after the kill is consumed.
//! The limit is the lease: before it ends the other one must not publish.

use anyhow::{Context, Error};

use crate::drain::{Watched, await_records, emitted};
use crate::live::{self, Listener};
use crate::report::{Place, Report, number};
use crate::world::{Capture, Setup, World};

const CASE: &str = "takeover";
const IN_FLIGHT: i64 = 1000;

pub async fn run(world: &World, report: &mut Report) -> Result<(), Error> {
    for _ in 0..world.sizes.rounds {
        for capture in [Capture::Listen, Capture::Poll] {
            let variant = capture.name();
            if !world.wants(variant) {
                continue;
            }
            let took = measure(world, capture).await?;
            let place = Place {
                case: CASE,
                variant,
                limit: "relay.lease_ttl",
            };
            eprintln!("  {CASE}, {variant}: {} ms after the kill", number(took));
            let lease = world.sizes.lease.as_secs_f64() * 1e3;
            report.add(&place, "kill -9 to next event ms", took, lease);
        }
    }
    Ok(())
}

async fn measure(world: &World, capture: Capture) -> Result<f64, Error> {
    let log = world.log().await?;
    let run = world.run(1, &["event0".to_owned()]).await?;
    let setup = Setup {
        capture,
        lease: world.sizes.lease,
        ..Setup::default()
    };
    let mut owner = world.relay(&log, &run, &setup)?;
    let mut db = log.connect().await?;
    let listener = Listener::start(&world.cluster, &run.topics.names[0], 1, async || {
        live::emit_one(&mut log.connect().await?, "warm").await
    })
    .await?;
    owner.usage()?;
    let mut successor = world.relay(&log, &run, &setup)?;
    for _ in 0..IN_FLIGHT {
        live::emit_one(&mut db, "before").await?;
    }
    successor.usage()?;
    let killed = owner.kill().await?;
    live::emit_one(&mut db, "e0").await?;
    let seen = listener.seen(1)?;
    let expected = emitted(&log, 0, false).await?;
    await_records(
        &run,
        expected.events,
        &mut successor,
        &mut Watched::default(),
    )
    .await?;
    successor.stop().await?;
    // What was in flight may have come twice.
    expected.judge(&run.topics.found()?, 1, true)?;
    run.topics.delete().await?;
    world.forget(&log).await?;
    let seen = seen.first().context("the event after the kill")?;
    Ok(seen.saturating_duration_since(killed).as_secs_f64() * 1e3)
}
