//! What the service pays: its commit rate and its write-ahead log, beside a service whose database has no relay and sends
//! no notifications.

use std::time::{Duration, Instant};

use anyhow::Error;
use futures_util::future::try_join_all;
use sqlx::Executor;
use sqlx::postgres::PgConnection;

use super::in_turn;
use crate::drain::{Watched, await_records, emitted, to_f64};
use crate::live::{self, Pace};
use crate::report::{Place, Report, number};
use crate::world::{Capture, Log, Setup, World};

const CASE: &str = "service";
const LOADS: [Load; 4] = [
    Load::Writers(1),
    Load::Writers(8),
    Load::Writers(32),
    Load::Steady,
];
const WARM_UP: Duration = Duration::from_secs(1);
/// Events per second of the steady load.
const STEADY: u32 = 1000;

#[derive(Clone, Copy)]
enum Load {
    /// So many that commit as fast as they can: how fast is that?
    Writers(usize),
    /// The same number of events in each run: how much is written for them?
    Steady,
}

/// What the writers work beside.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Beside {
    Nothing,
    /// No relay listens, and whoever commits sends notifications all the same.
    Notifications,
    Relay(Capture),
}

/// What the writers got.
struct Paid {
    commits_per_second: f64,
    /// Of the whole server, for each event.
    wal_bytes: f64,
}

pub async fn run(world: &World, report: &mut Report) -> Result<(), Error> {
    for round in 0..world.sizes.rounds {
        for load in LOADS {
            for (name, beside) in [
                ("off", Beside::Notifications),
                ("poll", Beside::Relay(Capture::Poll)),
                ("listen", Beside::Relay(Capture::Listen)),
            ] {
                let variant = match load {
                    Load::Writers(writers) => format!("{writers} writers, {name}"),
                    Load::Steady => format!("{STEADY}/s, {name}"),
                };
                if world.wants(&variant) {
                    let (paid, limit) = in_turn(
                        round,
                        measure(world, load, beside),
                        measure(world, load, Beside::Nothing),
                    )
                    .await?;
                    add(report, &variant, load, (&paid, &limit));
                }
            }
        }
    }
    Ok(())
}

fn add(report: &mut Report, variant: &str, load: Load, (paid, limit): (&Paid, &Paid)) {
    let place = Place {
        case: CASE,
        variant,
        limit: "no relay, no notifications",
    };
    let (figure, value, least) = match load {
        Load::Writers(_) => (
            "commits/s",
            paid.commits_per_second,
            limit.commits_per_second,
        ),
        Load::Steady => ("WAL bytes/event", paid.wal_bytes, limit.wal_bytes),
    };
    report.add(&place, figure, value, least);
    if matches!(load, Load::Steady) {
        report.add(&place, "beyond the limit", value - least, None);
    }
    let (value, least) = (number(value), number(least));
    eprintln!(
        "  {CASE}, {variant}: {value} {figure}, {} {least}",
        place.limit
    );
}

async fn measure(world: &World, load: Load, beside: Beside) -> Result<Paid, Error> {
    let log = world.log().await?;
    let run = world.run(1, &["event0".to_owned()]).await?;
    let mut db = log.connect().await?;
    if beside == Beside::Nothing {
        // For the sessions that begin from now on.
        db.execute(
            "do $$ begin execute format('alter database %I set outbox.notify = off', current_database()); end $$",
        )
        .await?;
    }
    let mut relay = None;
    live::emit_one(&mut db, "warm").await?;
    if let Beside::Relay(capture) = beside {
        let setup = Setup {
            capture,
            ..Setup::default()
        };
        let mut started = world.relay(&log, &run, &setup)?;
        await_records(&run, 1, &mut started, &mut Watched::default()).await?;
        relay = Some(started);
    }
    // Else the first changes of each page are written in full for some and not for others.
    db.execute("checkpoint").await?;
    let (before, known) = (wal(&mut db).await?, emitted(&log, 0, false).await?.events);
    let commits_per_second = match load {
        Load::Writers(writers) => write(world, &log, writers).await?,
        Load::Steady => {
            live::emit(&log, Pace::of(STEADY, world.sizes.seconds)).await?;
            f64::from(STEADY)
        }
    };
    let all = emitted(&log, 0, false).await?;
    if let Some(relay) = &mut relay {
        await_records(&run, all.events, relay, &mut Watched::default()).await?;
    }
    let written = wal(&mut db).await? - before;
    if let Some(relay) = relay {
        relay.stop().await?;
        all.judge(&run.topics.found()?, 1, false)?;
    }
    let paid = Paid {
        commits_per_second,
        wal_bytes: written / to_f64(all.events - known),
    };
    run.topics.delete().await?;
    world.forget(&log).await?;
    Ok(paid)
}

/// Commits as fast as so many writers can, for a second that does not count and the time that does; commits per second.
async fn write(world: &World, log: &Log, writers: usize) -> Result<f64, Error> {
    let connected = (0..writers).map(|_| log.connect());
    let connected = try_join_all(connected).await?;
    let (from, counted) = (Instant::now() + WARM_UP, world.sizes.seconds);
    let until = from + Duration::from_secs(counted.into());
    let writers = (0..).zip(connected).map(async |(n, mut db): (i32, _)| {
        let (key, mut commits) = (n.to_string(), 0);
        while Instant::now() < until {
            live::emit_one(&mut db, &key).await?;
            commits += u32::from((from..until).contains(&Instant::now()));
        }
        Ok::<_, Error>(commits)
    });
    let commits: u32 = try_join_all(writers).await?.into_iter().sum();
    Ok(f64::from(commits) / f64::from(counted))
}

/// Bytes that the server has ever written to its log.
pub async fn wal(db: &mut PgConnection) -> Result<f64, Error> {
    let bytes = "select (pg_current_wal_insert_lsn() - '0/0')::float8";
    Ok(sqlx::query_scalar(bytes).fetch_one(db).await?)
}
