//! What the service pays: its commit rate and its write-ahead log, beside a service whose database has no relay and sends
//! no notifications.

use std::time::{Duration, Instant};

use anyhow::Error;
use futures_util::future::try_join_all;
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Executor};

use crate::drain::{Watched, await_records, emitted, to_f64};
use crate::live;
use crate::report::{Place, Report, number};
use crate::world::{Capture, Setup, World};

const CASE: &str = "service";
const WRITERS: [usize; 3] = [1, 8, 32];

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
    for _ in 0..world.sizes.rounds {
        for writers in WRITERS {
            for (name, beside) in [
                ("off", Beside::Notifications),
                ("poll", Beside::Relay(Capture::Poll)),
                ("listen", Beside::Relay(Capture::Listen)),
            ] {
                let variant = format!("{writers} writers, {name}");
                if !world.wants(&variant) {
                    continue;
                }
                let paid = measure(world, writers, beside).await?;
                let limit = measure(world, writers, Beside::Nothing).await?;
                let place = Place {
                    case: CASE,
                    variant: &variant,
                    limit: "no relay, no notifications",
                };
                let (rate, most) = (paid.commits_per_second, limit.commits_per_second);
                report.add(&place, "commits/s", rate, most);
                report.add(&place, "WAL bytes/event", paid.wal_bytes, limit.wal_bytes);
                let more = paid.wal_bytes - limit.wal_bytes;
                report.add(&place, "WAL bytes more", more, None);
                let (rate, most) = (number(rate), number(most));
                eprintln!(
                    "  {CASE}, {variant}: {rate} commits/s, {} {most}",
                    place.limit
                );
            }
        }
    }
    Ok(())
}

async fn measure(world: &World, writers: usize, beside: Beside) -> Result<Paid, Error> {
    let log = world.log().await?;
    let run = world.run(1, &["event0".to_owned()]).await?;
    let mut db = log.connect().await?;
    let mut relay = None;
    if let Beside::Relay(capture) = beside {
        let setup = Setup {
            capture,
            ..Setup::default()
        };
        live::emit_one(&mut db, "warm").await?;
        let mut started = world.relay(&log, &run, &setup)?;
        await_records(&run, 1, &mut started, &mut Watched::default()).await?;
        relay = Some(started);
    }
    // Else the first changes of each page are written in full for some and not for others.
    db.execute("checkpoint").await?;
    let (before, known) = (wal(&mut db).await?, emitted(&log, 0, false).await?.events);
    let began = Instant::now();
    let until = began + Duration::from_secs(world.sizes.seconds.into());
    let connected = (0..writers).map(|_| log.connect());
    let written = try_join_all(connected).await?.into_iter().enumerate();
    try_join_all(written.map(|(n, db)| write(db, n, beside, until))).await?;
    let took = began.elapsed();
    let all = emitted(&log, 0, false).await?;
    if let Some(mut relay) = relay {
        await_records(&run, all.events, &mut relay, &mut Watched::default()).await?;
        relay.stop().await?;
        all.judge(&run.topics.found()?, 1, false)?;
    }
    let committed = to_f64(all.events - known);
    let paid = Paid {
        commits_per_second: committed / took.as_secs_f64(),
        wal_bytes: (wal(&mut db).await? - before) / committed,
    };
    run.topics.delete().await?;
    world.forget(&log).await?;
    Ok(paid)
}

/// Commits as fast as it can.
async fn write(
    mut db: PgConnection,
    writer: usize,
    beside: Beside,
    until: Instant,
) -> Result<(), Error> {
    let notify = if beside == Beside::Nothing {
        "off"
    } else {
        "on"
    };
    db.execute(AssertSqlSafe(format!("set outbox.notify = {notify}")))
        .await?;
    let key = writer.to_string();
    while Instant::now() < until {
        live::emit_one(&mut db, &key).await?;
    }
    Ok(())
}

/// Bytes that the server has ever written to its log.
pub async fn wal(db: &mut PgConnection) -> Result<f64, Error> {
    let bytes = "select (pg_current_wal_insert_lsn() - '0/0')::float8";
    Ok(sqlx::query_scalar(bytes).fetch_one(db).await?)
}
