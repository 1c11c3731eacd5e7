//! A backlog is drained while something is wrong with the database, beside the bare loop in the same trouble and beside a
//! relay without any.

use anyhow::{Error, ensure};
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Executor};

use super::{NAKED, add, in_turn};
use crate::drain::{self, Backlog, Drain, Watched, await_records, emitted};
use crate::report::{Place, Report};
use crate::workload::Workload;
use crate::world::{Log, Run, Setup, World};

const CASE: &str = "adverse";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Trouble {
    None,
    /// A transaction that has emitted and does not end.
    OpenTransaction,
    /// One in another database of the server.
    OpenElsewhere,
    /// A snapshot that is kept.
    RepeatableRead,
    /// Deleted rows before the backlog that nobody may remove yet.
    DeadRows,
    /// Many events that were published before and are still there.
    Retained,
    /// The planner believes that the log is empty.
    StaleStatistics,
}

const TROUBLES: [(&str, Trouble); 7] = [
    ("no trouble", Trouble::None),
    ("open transaction", Trouble::OpenTransaction),
    ("open, other database", Trouble::OpenElsewhere),
    ("repeatable read", Trouble::RepeatableRead),
    ("dead rows", Trouble::DeadRows),
    ("published retained", Trouble::Retained),
    ("stale statistics", Trouble::StaleStatistics),
];
const LATE: &str = "late bulk transaction";

pub async fn run(world: &World, report: &mut Report) -> Result<(), Error> {
    for round in 0..world.sizes.rounds {
        let mut untroubled = None;
        for (variant, trouble) in TROUBLES {
            // The others are measured beside the first.
            if trouble != Trouble::None && !world.wants(variant) {
                continue;
            }
            let (relay, naked) = trouble.drain(world, round).await?;
            let mut place = Place {
                case: CASE,
                variant,
                limit: NAKED,
            };
            add(report, &place, &relay, &naked);
            if let Some(untroubled) = &untroubled {
                place.limit = "relay, no trouble";
                add(report, &place, &relay, untroubled);
            }
            untroubled.get_or_insert(relay);
        }
        if world.wants(LATE) {
            let (relay, naked) = late_bulk(world).await?;
            let place = Place {
                case: CASE,
                variant: LATE,
                limit: NAKED,
            };
            add(report, &place, &relay, &naked);
        }
    }
    Ok(())
}

impl Trouble {
    /// Makes it, drains in it, and ends it: an open transaction would be in everybody's snapshots.
    async fn drain(self, world: &World, round: u32) -> Result<(Drain, Drain), Error> {
        let log = world.log().await?;
        let workload = Workload::of(world.sizes.events);
        let run = world.run(1, &workload.aggregate_types()).await?;
        let mut db = log.connect().await?;
        let session = self.begin(world, &log).await?;
        let mut after = 0;
        if self == Self::Retained {
            after = publish_all(world, &log, &run).await?;
        }
        workload.fill(&mut db).await?;
        if self != Self::StaleStatistics {
            db.execute("vacuum analyze outbox.events").await?;
        }
        // Whoever reads a row first writes down that it is committed: that is to be over, and on the disk.
        db.execute("select count(*) from outbox.events").await?;
        db.execute("checkpoint").await?;
        let backlog = Backlog {
            after,
            ..Backlog::all(&log, workload)
        };
        let setup = Setup::default();
        let measured = in_turn(
            round,
            drain::relay_as(world, &backlog, &setup, run),
            drain::naked(world, &backlog, &setup),
        )
        .await?;
        drop(session);
        world.forget(&log).await?;
        Ok(measured)
    }

    /// What was there before the backlog; the trouble lasts as long as the session.
    async fn begin(self, world: &World, log: &Log) -> Result<PgConnection, Error> {
        let mut session = log.connect().await?;
        match self {
            Self::None => {}
            Self::OpenTransaction => {
                session
                    .execute("begin; select outbox.emit('event0', 'open', 'placed', '{}')")
                    .await?;
            }
            Self::OpenElsewhere => {
                session = world.admin().await?;
                session
                    .execute("begin; select pg_current_xact_id()")
                    .await?;
            }
            Self::RepeatableRead => keep_a_snapshot(&mut session).await?,
            Self::DeadRows => {
                let mut db = log.connect().await?;
                Workload::of(world.sizes.events).fill(&mut db).await?;
                keep_a_snapshot(&mut session).await?;
                db.execute("delete from outbox.events").await?;
            }
            Self::Retained => {
                let times = if world.sizes.large { 10 } else { 1 };
                let published = Workload::of(world.sizes.events * times);
                published.fill(&mut session).await?;
            }
            Self::StaleStatistics => {
                without_autovacuum(&mut session).await?;
                session.execute("analyze outbox.events").await?;
            }
        }
        Ok(session)
    }
}

/// Puts the cursor behind everything that is there; returns the last id of that.
async fn publish_all(world: &World, log: &Log, run: &Run) -> Result<i64, Error> {
    let latest = Setup {
        latest: true,
        ..Setup::default()
    };
    let mut relay = world.relay(log, run, &latest)?;
    drain::await_cursor(log, run, 0, &mut relay).await?;
    relay.stop().await?;
    Ok(emitted(log, 0, false).await?.last)
}

async fn keep_a_snapshot(db: &mut PgConnection) -> Result<(), Error> {
    db.execute("begin isolation level repeatable read; select count(*) from outbox.cursors")
        .await?;
    Ok(())
}

async fn without_autovacuum(db: &mut PgConnection) -> Result<(), Error> {
    let partitions: Vec<String> = sqlx::query_scalar(
        "select inhrelid::regclass::text from pg_inherits where inhparent = 'outbox.events'::regclass",
    )
    .fetch_all(&mut *db)
    .await?;
    for partition in partitions {
        let off = format!("alter table {partition} set (autovacuum_enabled = off)");
        db.execute(AssertSqlSafe(off)).await?;
    }
    Ok(())
}

/// A transaction of many events commits after as many others, with higher ids, have been published. The bare loop would lose
/// all of them: its limit is a drain of both, one behind the other.
async fn late_bulk(world: &World) -> Result<(Drain, Drain), Error> {
    let log = world.log().await?;
    let workload = Workload::of(world.sizes.events);
    let aggregate_types = ["event0".to_owned(), "late".to_owned()];
    let run = world.run(1, &aggregate_types).await?;
    let setup = Setup::default();
    let mut bulk = log.connect().await?;
    bulk.execute("set outbox.notify = off; begin").await?;
    let rows = workload.row_of("'late'");
    bulk.execute(AssertSqlSafe(format!(
        "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload) \
         {rows} from generate_series(1, {}) n",
        workload.events
    )))
    .await?;
    let mut db = log.connect().await?;
    workload.fill(&mut db).await?;
    let mut watched = Watched::default();
    let mut relay = world.relay(&log, &run, &setup)?;
    await_records(&run, workload.events, &mut relay, &mut watched).await?;
    let before = watched.look(&mut relay)?;
    bulk.execute("commit").await?;
    await_records(&run, workload.events * 2, &mut relay, &mut watched).await?;
    let mut usage = watched.look(&mut relay)?;
    usage.cpu = usage.cpu.saturating_sub(before.cpu);
    relay.stop().await?;
    let all = emitted(&log, 0, false).await?;
    all.judge(&run.topics.found()?, 1, false)?;
    let found = run.topics.only("late")?.found()?;
    ensure!(
        found.records == workload.events,
        "WRONG: {} of {} late events are in Kafka",
        found.records,
        workload.events
    );
    let usage = (usage, None);
    let relay = Drain::of(workload.events, found.milliseconds()?, usage, &watched);
    run.topics.delete().await?;
    // What the relay, the first to read the late ones, has written down about them.
    db.execute("checkpoint").await?;
    let backlog = Backlog {
        aggregate_types: aggregate_types.into(),
        ..Backlog::all(&log, workload)
    };
    let naked = drain::naked(world, &backlog, &setup).await?;
    world.forget(&log).await?;
    Ok((relay, naked))
}
