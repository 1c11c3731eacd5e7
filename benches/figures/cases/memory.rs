//! Memory with payloads of 1 MiB. Every drain of the other cases says what it took as well.

use anyhow::Error;

use super::{NAKED, add, in_turn};
use crate::drain::{self, Backlog};
use crate::report::{Place, Report};
use crate::workload::Workload;
use crate::world::{Setup, World};

const CASE: &str = "memory";
pub const PAYLOAD_BYTES: u32 = 1024 * 1024;

/// How many events of that size a backlog has.
pub fn events(world: &World) -> i64 {
    (world.sizes.events / 4000).max(50)
}

pub async fn run(world: &World, report: &mut Report) -> Result<(), Error> {
    let workload = Workload {
        payload_bytes: PAYLOAD_BYTES,
        ..Workload::of(events(world))
    };
    let once = Setup {
        exactly_once: true,
        ..Setup::default()
    };
    let eight = Setup {
        pipelines: 8,
        ..Setup::default()
    };
    let variants = [
        ("1 MiB", Setup::default()),
        ("1 MiB, exactly-once", once),
        ("1 MiB, 8 pipelines", eight),
    ];
    for round in 0..world.sizes.rounds {
        for (variant, setup) in &variants {
            if !world.wants(variant) {
                continue;
            }
            let log = world.backlog(workload).await?;
            let backlog = Backlog::all(&log, workload);
            let (relay, naked) = in_turn(
                round,
                drain::relay(world, &backlog, setup),
                drain::naked(world, &backlog, setup),
            )
            .await?;
            let place = Place {
                case: CASE,
                variant,
                limit: NAKED,
            };
            add(report, &place, &relay, &naked);
        }
    }
    world.forget_backlogs().await
}
