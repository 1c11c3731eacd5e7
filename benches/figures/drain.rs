//! One drain: from the start of a relay, or of a bare loop, until everything is in Kafka. And whether it really is.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Error, ensure};
use sqlx::Row;

use crate::cursors;
use crate::judge::Expected;
use crate::process::{Broker, BrokerUsage, Process, Usage};
use crate::report::median;
use crate::workload::{EVENT_TYPE, Workload};
use crate::world::{Bare, Log, Run, Setup, World};

pub const LOOK: Duration = Duration::from_millis(20);
/// A drain in which nothing comes for so long has failed.
const SILENCE_MAX: Duration = Duration::from_mins(2);

/// What is to be drained.
pub struct Backlog<'a> {
    pub log: &'a Log,
    pub aggregate_types: Vec<String>,
    /// Behind this id.
    pub after: i64,
    /// Rows of the bare loop's selects.
    pub page: i64,
}

impl<'a> Backlog<'a> {
    /// All events of a log that has no others.
    pub fn all(log: &'a Log, workload: Workload) -> Self {
        Self {
            log,
            aggregate_types: workload.aggregate_types(),
            after: 0,
            page: workload.page(),
        }
    }
}

/// What was measured of it.
#[derive(Clone, Copy, Debug)]
pub struct Drain {
    /// Events per second and pipeline, those that a filter drops included, from the first record in Kafka to the last.
    pub rate: f64,
    /// Of the process, from its start to the last record, for each such event.
    pub cpu_us: f64,
    pub memory: Memory,
    /// None where the broker's process is not known.
    pub broker: Option<BrokerCost>,
}

/// What the broker paid for each such event.
#[derive(Clone, Copy, Debug)]
pub struct BrokerCost {
    /// From the start of the process that drains to the last record.
    pub cpu_us: f64,
    /// Bytes of files, indexes and the broker's own topics included.
    pub written: f64,
}

/// What was resident of a process.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    pub peak_mib: f64,
    /// The median while it worked.
    pub steady_mib: f64,
}

/// What a relay has to publish of a log behind an id.
pub async fn emitted(log: &Log, after: i64, filtered: bool) -> Result<Expected, Error> {
    let row = sqlx::query(
        "select count(*), coalesce(max(id), 0), coalesce(sum(id), 0)::bigint, coalesce(bit_xor(id), 0) \
         from outbox.events where id > $1 and ($2::text is null or event_type = $2)",
    )
    .bind(after)
    .bind(filtered.then_some(EVENT_TYPE))
    .fetch_one(&mut log.connect().await?)
    .await?;
    Ok(Expected {
        events: row.try_get(0)?,
        last: row.try_get(1)?,
        sum: row.try_get(2)?,
        xor: row.try_get(3)?,
    })
}

/// Memory of a process while it works.
#[derive(Default)]
pub struct Watched {
    resident: Vec<f64>,
}

impl Watched {
    pub fn look(&mut self, process: &mut Process) -> Result<Usage, Error> {
        let usage = process.usage()?;
        self.resident.push(usage.resident_mib);
        Ok(usage)
    }

    /// With the peak of the last look.
    pub fn memory(&self, last: Usage) -> Memory {
        Memory {
            peak_mib: last.peak_mib,
            steady_mib: median(&self.resident),
        }
    }
}

/// What the broker uses meanwhile, if its process is known.
struct BrokerWatch(Option<(Broker, BrokerUsage)>);

impl BrokerWatch {
    fn begin(broker: Option<Broker>) -> Result<Self, Error> {
        let with_usage = |broker: Broker| anyhow::Ok((broker, broker.usage()?));
        Ok(Self(broker.map(with_usage).transpose()?))
    }

    fn used(self) -> Result<Option<BrokerUsage>, Error> {
        let Some((broker, before)) = self.0 else {
            return Ok(None);
        };
        let now = broker.usage()?;
        Ok(Some(BrokerUsage {
            cpu: now.cpu.saturating_sub(before.cpu),
            written: now.written - before.written,
        }))
    }
}

/// Waits until so many records are there.
pub async fn await_records(
    run: &Run,
    records: i64,
    process: &mut Process,
    watched: &mut Watched,
) -> Result<(), Error> {
    let (mut seen, mut heard) = (0, Instant::now());
    loop {
        watched.look(process)?;
        // A broker that comes back may refuse for a while; whoever stays away is silent.
        let now = run.topics.records().unwrap_or(seen);
        if now >= records {
            return Ok(());
        }
        if now > seen {
            (seen, heard) = (now, Instant::now());
        }
        ensure!(
            heard.elapsed() < SILENCE_MAX,
            "WRONG: nothing comes any more, at {now} of {records} records"
        );
        tokio::time::sleep(LOOK).await;
    }
}

/// Drains with a relay, and judges what it has published.
pub async fn relay(world: &World, backlog: &Backlog<'_>, setup: &Setup) -> Result<Drain, Error> {
    let run = world.run(setup.pipelines, &backlog.aggregate_types).await?;
    relay_as(world, backlog, setup, run).await
}

/// The same under a name that may have been there before.
pub async fn relay_as(
    world: &World,
    backlog: &Backlog<'_>,
    setup: &Setup,
    run: Run,
) -> Result<Drain, Error> {
    let expected = emitted(backlog.log, backlog.after, setup.filtered).await?;
    let pipelines = i64::try_from(setup.pipelines)?;
    let mut watched = Watched::default();
    let broker = BrokerWatch::begin(world.broker)?;
    let mut relay = world.relay(backlog.log, &run, setup)?;
    await_records(&run, expected.events * pipelines, &mut relay, &mut watched).await?;
    if setup.exactly_once {
        // Marks of transactions count as records there.
        await_cursor(backlog.log, &run, expected.last, &mut relay).await?;
    }
    let usage = watched.look(&mut relay)?;
    let broker = broker.used()?;
    relay.stop().await?;
    let found = run.topics.found()?;
    expected.judge(&found, setup.pipelines, false)?;
    let drain = Drain::of(
        handled(backlog, setup).await?,
        found.milliseconds()?,
        (usage, broker),
        &watched,
    );
    run.topics.delete().await?;
    Ok(drain)
}

/// Drains with the bare loop.
pub async fn naked(world: &World, backlog: &Backlog<'_>, setup: &Setup) -> Result<Drain, Error> {
    bare(world, backlog, setup, false).await
}

/// Drains with a bare loop, whose records have headers or not.
pub async fn bare(
    world: &World,
    backlog: &Backlog<'_>,
    setup: &Setup,
    headers: bool,
) -> Result<Drain, Error> {
    let expected = emitted(backlog.log, backlog.after, setup.filtered).await?;
    let run = world.run(setup.pipelines, &backlog.aggregate_types).await?;
    let mut watched = Watched::default();
    let broker = BrokerWatch::begin(world.broker)?;
    let bare = Bare {
        after: backlog.after,
        headers,
        ..Bare::of(backlog.page)
    };
    let mut naked = world.naked(backlog.log, &run, setup, bare)?;
    let records = expected.events * i64::try_from(setup.pipelines)?;
    await_records(&run, records, &mut naked, &mut watched).await?;
    let usage = watched.look(&mut naked)?;
    let broker = broker.used()?;
    naked.stop().await?;
    let found = if headers {
        let found = run.topics.found()?;
        expected.judge(&found, setup.pipelines, false)?;
        found
    } else {
        run.topics.counted()?
    };
    ensure!(
        found.records == records,
        "WRONG: the bare loop left {} of {records} records",
        found.records
    );
    let drain = Drain::of(
        handled(backlog, setup).await?,
        found.milliseconds()?,
        (usage, broker),
        &watched,
    );
    run.topics.delete().await?;
    Ok(drain)
}

/// Events that were looked at, whether or not a filter dropped them, once for each pipeline.
async fn handled(backlog: &Backlog<'_>, setup: &Setup) -> Result<i64, Error> {
    let events = emitted(backlog.log, backlog.after, false).await?.events;
    Ok(events * i64::try_from(setup.pipelines)?)
}

impl Drain {
    pub fn of(
        events: i64,
        took_ms: i64,
        (usage, broker): (Usage, Option<BrokerUsage>),
        watched: &Watched,
    ) -> Self {
        let events = to_f64(events);
        Self {
            rate: events * 1e3 / to_f64(took_ms.max(1)),
            cpu_us: usage.cpu.as_secs_f64() * 1e6 / events,
            memory: watched.memory(usage),
            broker: broker.map(|broker| BrokerCost {
                cpu_us: broker.cpu.as_secs_f64() * 1e6 / events,
                written: broker.written / events,
            }),
        }
    }
}

/// Counts and milliseconds as figures.
#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
pub fn to_f64(count: i64) -> f64 {
    count as f64
}

/// Waits until every pipeline has written down that it is done.
pub async fn await_cursor(
    log: &Log,
    run: &Run,
    last: i64,
    relay: &mut Process,
) -> Result<(), Error> {
    let mut db = log.connect().await?;
    let pipelines = i64::try_from(run.pipelines)?;
    let began = Instant::now();
    loop {
        if cursors::behind(&mut db, &run.name, pipelines, last).await? == 0 {
            return Ok(());
        }
        relay.usage()?;
        ensure!(
            began.elapsed() < SILENCE_MAX,
            "WRONG: the cursor stands still"
        );
        tokio::time::sleep(LOOK).await;
    }
}

pub fn now_ms() -> Result<i64, Error> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    Ok(i64::try_from(now.as_millis())?)
}
