//! From commit to consumer at steady rates, beside produce and consume without a relay at the same rate.

use std::time::Instant;

use anyhow::{Context, Error};
use sqlx::{AssertSqlSafe, Executor};

use super::in_turn;
use crate::drain::{Watched, await_records, emitted};
use crate::live::{self, Committed, Listener, Pace};
use crate::process::Process;
use crate::recorder::{PERCENTILES, Recorder};
use crate::report::{Place, Report, number};
use crate::topics;
use crate::workload::make_partitions;
use crate::world::{Bare, Capture, Log, Run, Setup, World};

const CASE: &str = "latency";
const RATES: [u32; 4] = [10, 500, 1_000, 10_000];
/// At this rate six days of events are 100 partitions.
const RETAINING_RATE: u32 = 1_000;
const RETAINED_PARTITIONS: i32 = 100;
/// Rows of the bare listener's selects.
const PAGE: i64 = 5000;
/// What the limit is.
pub const PRODUCE: &str = "produce and consume";
/// What the limit of the CPU is: a bare loop that looks when a notification comes.
const BARE_LISTENER: &str = "bare listener";

/// Times of one measurement.
pub struct Live {
    /// From when a transaction was due to when its events were consumed.
    due: Recorder,
    /// From the return of its commit.
    commit: Recorder,
    /// From when it was due to the return of its commit: the service's own part.
    writer: Recorder,
    /// Events per second that were really committed.
    rate: f64,
    /// Of a core.
    cpu: f64,
    peak_mib: f64,
}

pub async fn run(world: &World, report: &mut Report) -> Result<(), Error> {
    for round in 0..world.sizes.rounds {
        for rate in RATES {
            let pace = Pace::of(rate, world.sizes.seconds);
            let mut variants = Vec::from([Capture::Listen, Capture::Poll].map(|capture| {
                let variant = format!("{rate}/s, {}", capture.name());
                (variant, capture, 0)
            }));
            if rate == RETAINING_RATE {
                let variant =
                    format!("{rate}/s, listen, {RETAINED_PARTITIONS} partitions retained");
                variants.push((variant, Capture::Listen, RETAINED_PARTITIONS));
            }
            for (variant, capture, retained) in variants {
                if world.wants(&variant) {
                    let (live, naked) = in_turn(
                        round,
                        relay(world, capture, pace, retained),
                        naked(world, pace),
                    )
                    .await?;
                    let mut place = Place {
                        case: CASE,
                        variant: &variant,
                        limit: PRODUCE,
                    };
                    add(report, &place, pace, (&live, &naked));
                    if capture == Capture::Listen {
                        place.limit = BARE_LISTENER;
                        let least = bare_listener(world, pace).await?;
                        report.add(&place, "% of a core", live.cpu * 100.0, least * 100.0);
                    }
                }
            }
        }
    }
    Ok(())
}

/// Adds the times, as far as there were enough events for them.
pub fn add(report: &mut Report, place: &Place<'_>, pace: Pace, of: (&Live, &Recorder)) {
    let (live, naked) = of;
    let limits = naked.milliseconds();
    for (name, times, has_limit) in [
        ("from due", &live.due, true),
        ("from commit", &live.commit, true),
        ("to commit", &live.writer, false),
    ] {
        let times = times.milliseconds();
        for (n, (percentile, percent)) in PERCENTILES.into_iter().enumerate() {
            if f64::from(pace.counted_events()) * (100.0 - percent) >= 100.0 {
                let figure = format!("{name} {percentile} ms");
                report.add(place, &figure, times[n], has_limit.then_some(limits[n]));
            }
        }
    }
    report.add(place, "% of a core", live.cpu * 100.0, None);
    report.add(place, "peak MiB", live.peak_mib, None);
    let asked = f64::from(pace.events_per_second);
    report.add(place, "events/s, asked", live.rate, asked);
    let Place {
        case,
        variant,
        limit,
    } = place;
    let [p50, p99, _] = live.commit.milliseconds();
    eprintln!(
        "  {case}, {variant}: commit to consumer p50 {} p99 {} ms, {limit} p50 {} p99 {} ms",
        number(p50),
        number(p99),
        number(limits[0]),
        number(limits[1])
    );
}

async fn relay(world: &World, capture: Capture, pace: Pace, retained: i32) -> Result<Live, Error> {
    let log = world.log().await?;
    if retained > 0 {
        retain(&log, retained).await?;
    }
    let run = world.run(1, &["event0".to_owned()]).await?;
    let setup = Setup {
        capture,
        ..Setup::default()
    };
    let mut relay = world.relay(&log, &run, &setup)?;
    let live = flow(world, &log, &run, pace, &mut relay).await?;
    relay.stop().await?;
    let expected = emitted(&log, 0, false).await?;
    expected.judge(&run.topics.found()?, 1, false)?;
    run.topics.delete().await?;
    world.forget(&log).await?;
    Ok(live)
}

/// Puts so many partitions before the events to come. They are empty: it is their number that a statement meets.
async fn retain(log: &Log, partitions: i32) -> Result<(), Error> {
    const ROWS: i64 = 1_000_000;
    let mut db = log.connect().await?;
    make_partitions(&mut db, partitions, ROWS).await?;
    let skip = format!(
        "select setval('outbox.events_id_seq', {})",
        i64::from(partitions) * ROWS
    );
    db.execute(AssertSqlSafe(skip)).await?;
    Ok(())
}

/// Emits at the pace, and follows each event to a consumer.
pub async fn flow(
    world: &World,
    log: &Log,
    run: &Run,
    pace: Pace,
    relay: &mut Process,
) -> Result<Live, Error> {
    let topic = &run.topics.names[0];
    let listener = Listener::start(&world.cluster, topic, pace.events(), async || {
        live::emit_one(&mut log.connect().await?, "warm").await
    })
    .await?;
    let (committed, cpu) = emit(log, pace, relay).await?;
    let seen = listener.seen(pace.events())?;
    // With those that found out whether everything runs.
    let all = emitted(log, 0, false).await?;
    await_records(run, all.events, relay, &mut Watched::default()).await?;
    let mut live = Live {
        due: Recorder::new()?,
        commit: Recorder::new()?,
        writer: Recorder::new()?,
        rate: rate(pace, &committed)?,
        cpu,
        peak_mib: relay.usage()?.peak_mib,
    };
    for (event, Committed { due, at }) in events(pace, &committed) {
        live.due.record(due, seen[event])?;
        live.commit.record(at, seen[event])?;
        live.writer.record(due, at)?;
    }
    Ok(live)
}

/// Emits at the pace; the transactions, and what part of a core the process takes behind the warm-up.
async fn emit(
    log: &Log,
    pace: Pace,
    process: &mut Process,
) -> Result<(Vec<Committed>, f64), Error> {
    let warm = async {
        tokio::time::sleep(pace.warm_up()).await;
        Ok((process.usage()?, Instant::now()))
    };
    let (committed, (before, began)) = tokio::try_join!(live::emit(log, pace), warm)?;
    let (after, took) = (process.usage()?, began.elapsed());
    let cpu = after.cpu.saturating_sub(before.cpu);
    Ok((committed, cpu.as_secs_f64() / took.as_secs_f64()))
}

/// What part of a core a bare loop takes that is notified. It loses events of transactions that commit late.
async fn bare_listener(world: &World, pace: Pace) -> Result<f64, Error> {
    let log = world.log().await?;
    let run = world.run(1, &["event0".to_owned()]).await?;
    let setup = Setup {
        capture: Capture::Listen,
        ..Setup::default()
    };
    let bare = Bare {
        headers: true,
        ..Bare::of(PAGE)
    };
    let mut process = world.naked(&log, &run, &setup, bare)?;
    let topic = &run.topics.names[0];
    // Somebody consumes, as beside the relay.
    let listener = Listener::start(&world.cluster, topic, pace.events(), async || {
        live::emit_one(&mut log.connect().await?, "warm").await
    })
    .await?;
    let (_, cpu) = emit(&log, pace, &mut process).await?;
    listener.leave()?;
    process.stop().await?;
    run.topics.delete().await?;
    world.forget(&log).await?;
    Ok(cpu)
}

/// Events per second behind the warm-up.
fn rate(pace: Pace, committed: &[Committed]) -> Result<f64, Error> {
    let (_, first) = events(pace, committed).next().context("no event counts")?;
    let last = committed.iter().map(|times| times.at).max();
    let took = last.context("nothing was committed")? - first.due;
    Ok(f64::from(pace.counted_events()) / took.as_secs_f64())
}

/// Produces at the pace, and follows each record to a consumer.
pub async fn naked(world: &World, pace: Pace) -> Result<Recorder, Error> {
    let run = world.run(1, &["event0".to_owned()]).await?;
    let topic = &run.topics.names[0];
    let listener = Listener::start(&world.cluster, topic, pace.events(), async || {
        topics::produce_one(&world.cluster, topic, "warm")
    })
    .await?;
    let produced = live::produce(&world.cluster, topic.clone(), pace)?;
    let seen = listener.seen(pace.events())?;
    let mut recorder = Recorder::new()?;
    for (event, Committed { due, .. }) in events(pace, &produced) {
        recorder.record(due, seen[event])?;
    }
    run.topics.delete().await?;
    Ok(recorder)
}

/// The number of every event behind the warm-up, with the times of its transaction.
fn events(pace: Pace, transactions: &[Committed]) -> impl Iterator<Item = (usize, Committed)> {
    let repeated = transactions
        .iter()
        .flat_map(move |times| std::iter::repeat_n(*times, pace.per_transaction as usize));
    repeated.enumerate().skip(pace.warm_up_events() as usize)
}
