//! What the log takes on the disk while events flow and what was published is dropped, beside the rows that have to stay.
//! One round only: it takes an hour.

use std::cell::Cell;
use std::time::{Duration, Instant};

use anyhow::Error;
use sqlx::AssertSqlSafe;
use sqlx::postgres::PgConnection;

use crate::drain::{Watched, await_records};
use crate::judge::Expected;
use crate::live;
use crate::process::Process;
use crate::report::{Place, Report, number};
use crate::workload::make_partitions;
use crate::world::{Log, Setup, World};

const CASE: &str = "retention";
/// Events stay for this part of the whole time.
const KEEP: u32 = 12;
const LOOKS: u32 = 100;
const MIB: f64 = 1024.0 * 1024.0;

/// Sizes in MiB, with indexes.
struct Sizes {
    highest: f64,
    end: f64,
    /// Of these at the end.
    indexes: f64,
    /// Cursors, leases and what else the relay writes.
    books: f64,
}

pub async fn run(world: &World, report: &mut Report) -> Result<(), Error> {
    let (rate, keep) = (world.sizes.arrivals, world.sizes.retention / KEEP);
    let variant = format!("{rate} events/s, kept for {} s", number(keep.as_secs_f64()));
    if !world.wants(&variant) {
        return Ok(());
    }
    let log = world.log().await?;
    let run = world.run(1, &["event0".to_owned()]).await?;
    // A partition is as long as events are kept.
    let events = i64::try_from(u128::from(rate) * keep.as_millis() / 1000)?.max(100);
    let mut db = log.connect().await?;
    make_partitions(&mut db, 8, events).await?;
    let setup = Setup {
        retention: Some((keep, events)),
        ..Setup::default()
    };
    let mut relay = world.relay(&log, &run, &setup)?;
    let enough = Cell::new(false);
    let looking = look(world, &log, &mut relay, &enough);
    let (sizes, arrived) = tokio::try_join!(looking, live::arrive(&log, rate, &enough))?;
    let row_bytes: f64 = sqlx::query_scalar(
        "select avg(pg_column_size(e))::float8 from (select * from outbox.events order by id desc limit 1000) e",
    )
    .fetch_one(&mut db)
    .await?;
    let last: i64 = sqlx::query_scalar("select last_value from outbox.events_id_seq")
        .fetch_one(&mut db)
        .await?;
    await_records(&run, last, &mut relay, &mut Watched::default()).await?;
    relay.stop().await?;
    Expected::all(last).judge(&run.topics.found()?, 1, false)?;
    run.topics.delete().await?;
    world.forget(&log).await?;

    let rows = f64::from(rate) * keep.as_secs_f64() * row_bytes / MIB;
    let place = Place {
        case: CASE,
        variant: &variant,
        limit: "rows to be kept",
    };
    report.add(&place, "arrivals/s", arrived, f64::from(rate));
    report.add(&place, "highest MiB", sizes.highest, rows);
    report.add(&place, "MiB at the end", sizes.end, rows);
    report.add(&place, "of these indexes", sizes.indexes, None);
    report.add(&place, "books MiB at the end", sizes.books, None);
    let (highest, rows) = (number(sizes.highest), number(rows));
    eprintln!(
        "  {CASE}, {variant}: at most {highest} MiB, {} {rows}",
        place.limit
    );
    Ok(())
}

/// Looks at the sizes until the time is over.
async fn look(
    world: &World,
    log: &Log,
    relay: &mut Process,
    enough: &Cell<bool>,
) -> Result<Sizes, Error> {
    let mut db = log.connect().await?;
    let (began, every): (Instant, Duration) = (Instant::now(), world.sizes.retention / LOOKS);
    let of_log =
        |size| format!("select sum({size}(relid)) from pg_partition_tree('outbox.events')");
    let mut highest = 0.0;
    loop {
        let end = mib(&mut db, &of_log("pg_total_relation_size")).await?;
        highest = f64::max(highest, end);
        relay.usage()?;
        if began.elapsed() >= world.sizes.retention {
            enough.set(true);
            let books = "select sum(pg_total_relation_size(oid)) from pg_class \
                          where relnamespace = 'outbox'::regnamespace and relkind = 'r' and not relispartition";
            return Ok(Sizes {
                highest,
                end,
                indexes: mib(&mut db, &of_log("pg_indexes_size")).await?,
                books: mib(&mut db, books).await?,
            });
        }
        tokio::time::sleep(every).await;
    }
}

async fn mib(db: &mut PgConnection, bytes: &str) -> Result<f64, Error> {
    let select = format!("select ({bytes})::float8");
    let bytes: f64 = sqlx::query_scalar(AssertSqlSafe(select))
        .fetch_one(db)
        .await?;
    Ok(bytes / MIB)
}
