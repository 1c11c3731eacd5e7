//! A backlog is drained while events arrive: the lag has to shrink all the time, and the latency to recover.

use std::cell::Cell;
use std::time::{Duration, Instant};

use anyhow::{Error, ensure};

use super::latency::{self, PRODUCE};
use super::{NAKED, add_memory};
use crate::drain::{Memory, Watched, await_records, emitted, to_f64};
use crate::live::{self, Pace};
use crate::process::Process;
use crate::report::{Place, Report, number};
use crate::workload::Workload;
use crate::world::{Bare, Log, Run, Setup, World};

const CASE: &str = "catch-up";
/// Between two looks at the lag: long enough for a batch to be on its way.
const LOOK: Duration = Duration::from_millis(500);
/// Fewer of what was asked would be another case: the lag shrinks when nothing arrives.
const ARRIVED_MIN: f64 = 0.9;
/// In less time there are too few arrivals to tell.
const ARRIVES_FOR_MIN: Duration = Duration::from_secs(2);
const GIVE_UP: Duration = Duration::from_hours(1);

/// How the backlog went.
struct CaughtUp {
    /// From the first record until no more than a look's worth of arrivals was left.
    seconds: f64,
    /// The most that the lag grew from one look to the next, in events.
    growth: i64,
    /// Of those that arrived.
    events_per_second: f64,
    memory: Memory,
}

pub async fn run(world: &World, report: &mut Report) -> Result<(), Error> {
    let variant = format!("{}/s arrive", world.sizes.arrivals);
    if !world.wants(&variant) {
        return Ok(());
    }
    for _ in 0..world.sizes.rounds {
        let log = backlog(world).await?;
        let run = world.run(1, &["event0".to_owned()]).await?;
        let mut process = world.relay(&log, &run, &Setup::default())?;
        let relay = catch_up(world, &log, &run, &mut process).await?;
        let pace = Pace::of(world.sizes.arrivals, world.sizes.seconds);
        let live = latency::flow(world, &log, &run, pace, &mut process).await?;
        process.stop().await?;
        let expected = emitted(&log, 0, false).await?;
        expected.judge(&run.topics.found()?, 1, false)?;
        run.topics.delete().await?;
        world.forget(&log).await?;

        let log = backlog(world).await?;
        let run = world.run(1, &["event0".to_owned()]).await?;
        let mut process = world.naked(&log, &run, &Setup::default(), Bare::of(5000))?;
        let naked = catch_up(world, &log, &run, &mut process).await?;
        process.stop().await?;
        run.topics.delete().await?;
        world.forget(&log).await?;

        let mut place = Place {
            case: CASE,
            variant: &variant,
            limit: NAKED,
        };
        eprintln!(
            "  {CASE}, {variant}: {} s, {NAKED} {} s; the lag grew by {} events at most",
            number(relay.seconds),
            number(naked.seconds),
            relay.growth
        );
        report.add(&place, "seconds", relay.seconds, naked.seconds);
        let (growth, least) = (to_f64(relay.growth), to_f64(naked.growth));
        report.add(&place, "growth of lag, events", growth, least);
        let (arrived, limit) = (relay.events_per_second, naked.events_per_second);
        report.add(&place, "arrivals/s", arrived, limit);
        add_memory(report, &place, &relay.memory, &naked.memory);
        place.limit = PRODUCE;
        latency::add(
            report,
            &place,
            pace,
            (&live, &latency::naked(world, pace).await?),
        );
    }
    Ok(())
}

async fn backlog(world: &World) -> Result<Log, Error> {
    let log = world.log().await?;
    let mut db = log.connect().await?;
    let events = if world.sizes.large {
        world.sizes.events * 10
    } else {
        world.sizes.events
    };
    Workload::of(events).fill(&mut db).await?;
    Ok(log)
}

/// Watches until the backlog is gone and what arrived meanwhile is there.
async fn catch_up(
    world: &World,
    log: &Log,
    run: &Run,
    process: &mut Process,
) -> Result<CaughtUp, Error> {
    let mut watched = Watched::default();
    await_records(run, 1, process, &mut watched).await?;
    let at_hand = f64::from(world.sizes.arrivals) * LOOK.as_secs_f64();
    let (began, enough, mut lags) = (Instant::now(), Cell::new(false), Vec::new());
    let looking = async {
        let mut db = log.connect().await?;
        loop {
            watched.look(process)?;
            let newest: i64 = sqlx::query_scalar("select last_value from outbox.events_id_seq")
                .fetch_one(&mut db)
                .await?;
            let lag = newest - run.topics.records()?;
            lags.push(lag);
            if to_f64(lag) <= at_hand {
                enough.set(true);
                return Ok(began.elapsed());
            }
            ensure!(
                began.elapsed() < GIVE_UP,
                "WRONG: it does not catch up, {lag} events are left"
            );
            tokio::time::sleep(LOOK).await;
        }
    };
    let (took, events_per_second) =
        tokio::try_join!(looking, live::arrive(log, world.sizes.arrivals, &enough))?;
    ensure!(
        took < ARRIVES_FOR_MIN
            || events_per_second >= ARRIVED_MIN * f64::from(world.sizes.arrivals),
        "only {events_per_second:.0} events/s arrived: this machine has no room for more"
    );
    let all = emitted(log, 0, false).await?;
    await_records(run, all.events, process, &mut watched).await?;
    let usage = watched.look(process)?;
    let growth = lags.windows(2).map(|pair| pair[1] - pair[0]).max();
    Ok(CaughtUp {
        seconds: took.as_secs_f64(),
        growth: growth.unwrap_or_default().max(0),
        events_per_second,
        memory: watched.memory(usage),
    })
}
