//! A backlog is drained while something is wrong with the database, beside the bare loop in the same trouble and beside a
//! relay without any.

use anyhow::{Error, ensure};
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Executor};

use super::{NAKED, add};
use crate::drain::{self, Backlog, Drain, Watched, await_records, emitted, now_ms};
use crate::report::{Place, Report};
use crate::workload::Workload;
use crate::world::{Log, Setup, World};

const CASE: &str = "adverse";
const NONE: &str = "no trouble";

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
    (NONE, Trouble::None),
    ("open transaction", Trouble::OpenTransaction),
    ("open, other database", Trouble::OpenElsewhere),
    ("repeatable read", Trouble::RepeatableRead),
    ("dead rows", Trouble::DeadRows),
    ("published retained", Trouble::Retained),
    ("stale statistics", Trouble::StaleStatistics),
];
const LATE: &str = "late bulk transaction";

/// A log in trouble, and the sessions that make it.
struct Troubled {
    log: Log,
    trouble: Trouble,
    sessions: Vec<PgConnection>,
}

pub async fn run(world: &World, report: &mut Report) -> Result<(), Error> {
    let mut logs = Vec::new();
    for (name, trouble) in TROUBLES {
        // The others are measured beside the first.
        if trouble == Trouble::None || world.wants(name) {
            logs.push((name, Troubled::new(world, trouble).await?));
        }
    }
    for _ in 0..world.sizes.rounds {
        let mut untroubled = None;
        for (variant, troubled) in &mut logs {
            let (relay, naked) = troubled.drain(world).await?;
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
    for (_, troubled) in logs {
        drop(troubled.sessions);
        world.forget(&troubled.log).await?;
    }
    Ok(())
}

impl Troubled {
    async fn new(world: &World, trouble: Trouble) -> Result<Self, Error> {
        eprintln!("  making ready");
        let log = world.log().await?;
        let workload = Workload::of(world.sizes.events);
        let mut db = log.connect().await?;
        let mut sessions = Vec::new();
        match trouble {
            Trouble::DeadRows => {
                let mut reader = log.connect().await?;
                workload.fill(&mut db).await?;
                keep_a_snapshot(&mut reader).await?;
                db.execute("delete from outbox.events").await?;
                sessions.push(reader);
            }
            Trouble::Retained => {
                let published = if world.sizes.large { 10 } else { 1 };
                Workload::of(world.sizes.events * published)
                    .fill(&mut db)
                    .await?;
            }
            Trouble::StaleStatistics => {
                without_autovacuum(&mut db).await?;
                db.execute("analyze outbox.events").await?;
            }
            _ => {}
        }
        if trouble != Trouble::Retained {
            workload.fill(&mut db).await?;
        }
        if trouble != Trouble::StaleStatistics {
            db.execute("vacuum analyze outbox.events").await?;
        }
        match trouble {
            Trouble::OpenTransaction => {
                db.execute("begin; select outbox.emit('event0', 'open', 'placed', '{}')")
                    .await?;
                sessions.push(db);
            }
            Trouble::OpenElsewhere => {
                let mut elsewhere = world.admin().await?;
                elsewhere
                    .execute("begin; select pg_current_xact_id()")
                    .await?;
                sessions.push(elsewhere);
            }
            Trouble::RepeatableRead => {
                keep_a_snapshot(&mut db).await?;
                sessions.push(db);
            }
            _ => {}
        }
        Ok(Self {
            log,
            trouble,
            sessions,
        })
    }

    async fn drain(&self, world: &World) -> Result<(Drain, Drain), Error> {
        let workload = Workload::of(world.sizes.events);
        let aggregate_types = workload.aggregate_types();
        let mut backlog = Backlog {
            log: &self.log,
            aggregate_types: &aggregate_types,
            after: 0,
            page: workload.page(),
        };
        let setup = Setup::default();
        let run = world.run(1, &aggregate_types).await?;
        if self.trouble == Trouble::Retained {
            // A cursor behind all that was published, then what is to be drained.
            let mut db = self.log.connect().await?;
            let latest = Setup {
                latest: true,
                ..setup
            };
            let mut relay = world.relay(&self.log, &run, &latest)?;
            drain::await_cursor(&self.log, &run, 0, &mut relay).await?;
            relay.stop().await?;
            backlog.after = emitted(&self.log, 0, false).await?.last;
            workload.fill(&mut db).await?;
            db.execute("vacuum analyze outbox.events").await?;
        }
        let relay = drain::relay_as(world, &backlog, &setup, run).await?;
        let naked = drain::naked(world, &backlog, &setup).await?;
        Ok((relay, naked))
    }
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

/// A transaction of many events commits after as many others, with higher ids, have been published; counted from its
/// commit. The bare loop would lose all of them: its limit is a drain of both, one behind the other.
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
    let (before, committed_ms) = (watched.look(&mut relay)?, now_ms()?);
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
    let took_ms = found.last_ms()? - committed_ms;
    let relay = Drain::of(workload.events, took_ms, usage, &watched);
    run.topics.delete().await?;
    let backlog = Backlog {
        log: &log,
        aggregate_types: &aggregate_types,
        after: 0,
        page: workload.page(),
    };
    let naked = drain::naked(world, &backlog, &setup).await?;
    world.forget(&log).await?;
    Ok((relay, naked))
}
