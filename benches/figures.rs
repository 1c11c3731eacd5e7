//! The relay's figures on this machine, each beside its naked limit of the same run.
//!
//! `benches/run` brings PostgreSQL and Kafka up and calls this; or give `DATABASE_URL` (superuser) and `KAFKA_BROKERS`
//! yourself and run `cargo bench --bench figures`. `FIGURES_EVENTS` sets the size of the backlog (1,000,000).
//!
//! The naked limit is a loop of `select … where id > $1 order by id limit 5000` into librdkafka, with no order, lease,
//! policy, filter or metric. Both write records of the same value and key; the relay's carry its three headers as well.

#![allow(
    clippy::print_stdout,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::disallowed_methods,
    clippy::duration_suboptimal_units,
    clippy::unchecked_time_subtraction,
    reason = "a benchmark prints"
)]

use std::collections::BTreeMap;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Headers, Message};
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer, ThreadedProducer};
use rdkafka::{Offset, TopicPartitionList};
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Executor, Row};

const PARTITIONS: i32 = 8;
const ROUNDS: usize = 3;

type Anyhow<T> = Result<T, anyhow::Error>;

/// A relay that does not outlive the measurement.
struct Relay(Child);

impl Drop for Relay {
    fn drop(&mut self) {
        // It has ended already when all went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct World {
    brokers: String,
    database: PgConnectOptions,
    database_url: String,
    scratch: tempfile::TempDir,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Anyhow<()> {
    let server: String =
        std::env::var("DATABASE_URL").context("DATABASE_URL is not set (see benches/run)")?;
    let brokers =
        std::env::var("KAFKA_BROKERS").context("KAFKA_BROKERS is not set (see benches/run)")?;
    let events: i64 = std::env::var("FIGURES_EVENTS").map_or(Ok(1_000_000), |n| n.parse())?;
    let name = format!("figures_{}", std::process::id());
    let options: PgConnectOptions = server.parse()?;
    let mut admin = options
        .clone()
        .connect()
        .await
        .context("connect to DATABASE_URL")?;
    admin
        .execute(AssertSqlSafe(format!("create database {name}")))
        .await?;
    let (base, _) = server
        .rsplit_once('/')
        .context("DATABASE_URL names a database")?;
    let world = World {
        brokers,
        database: options.database(&name),
        database_url: format!("{base}/{name}"),
        scratch: tempfile::tempdir()?,
    };
    let measured = measure(&world, events).await;
    admin
        .execute(AssertSqlSafe(format!("drop database {name} with (force)")))
        .await?;
    measured
}

async fn measure(world: &World, events: i64) -> Anyhow<()> {
    let migrated = world.relay("migrate", "unused", "poll").status()?;
    ensure!(migrated.success(), "migrate failed");
    let mut db = world.database.clone().connect().await?;
    fill(&mut db, events).await?;
    println!("drain of {events} events of 233 bytes, 10,000 keys, {PARTITIONS} partitions");
    let mut ratios = Vec::new();
    for round in 0..ROUNDS {
        let naked = naked(world, events, &format!("naked{round}")).await?;
        println!("  naked loop {round}: {naked}");
        let relay = drain(world, events, &format!("relay{round}")).await?;
        println!("  relay      {round}: {relay}");
        ratios.push(relay.rate / naked.rate);
    }
    ratios.sort_by(f64::total_cmp);
    println!(
        "  relay / naked: median {:.2} of {ratios:.2?}",
        ratios[ROUNDS / 2]
    );
    deliveries(world, &mut db, events).await?;
    for mode in ["listen", "poll"] {
        latency(world, &mut db, mode).await?;
    }
    Ok(())
}

/// Fills the log with events whose payload has 233 bytes.
async fn fill(db: &mut PgConnection, events: i64) -> Anyhow<()> {
    db.execute(AssertSqlSafe(format!(
        "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload) \
         select 'event', (n % 10000)::text, 'placed', \
                json_build_object('n', n, 'pad', repeat('x', 233 - 20 - length(n::text)))::text::json \
           from generate_series(1, {events}) n"
    )))
    .await?;
    db.execute("vacuum analyze outbox.events").await?;
    Ok(())
}

struct Drain {
    rate: f64,
    cpu_us: f64,
    peak_mib: f64,
    first_ms: f64,
}

impl std::fmt::Display for Drain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            rate,
            cpu_us,
            peak_mib,
            first_ms,
        } = self;
        write!(
            f,
            "{rate:>9.0} events/s, {cpu_us:.2} us CPU/event, peak {peak_mib:.0} MiB, first record after {first_ms:.0} ms"
        )
    }
}

/// The relay as a process, from its start to the last record.
async fn drain(world: &World, events: i64, topic: &str) -> Anyhow<Drain> {
    world.create_topic(topic).await?;
    let watch = world.consumer()?;
    let began = Instant::now();
    let mut relay = Relay(world.relay("run", topic, "poll").spawn()?);
    let first = wait_for(&watch, topic, 1, &mut relay)?;
    let first_ms = first.duration_since(began).as_secs_f64() * 1e3;
    let done = wait_for(&watch, topic, events, &mut relay)?;
    let (cpu, peak_mib) = usage(relay.0.id())?;
    stop(&mut relay)?;
    Ok(Drain {
        rate: events as f64 / done.duration_since(first).as_secs_f64(),
        cpu_us: cpu.as_secs_f64() * 1e6 / events as f64,
        peak_mib,
        first_ms,
    })
}

/// Exactly-once beside at-least-once, from the first record to a cursor behind the last one: what is visible to a consumer
/// of committed records can't be told from the ends of the partitions.
async fn deliveries(world: &World, db: &mut PgConnection, events: i64) -> Anyhow<()> {
    let mut ratios = Vec::new();
    for round in 0..ROUNDS {
        let mut rates = Vec::new();
        for delivery in ["at-least-once", "exactly-once"] {
            let topic = format!("{}{round}", &delivery[..delivery.find('-').unwrap_or(0)]);
            world.create_topic(&topic).await?;
            let watch = world.consumer()?;
            let mut relay = world.relay("run", &topic, "poll");
            relay
                .env("RELAY_SINK__KAFKA__DELIVERY", delivery)
                .env("RELAY_SINK__KAFKA__TRANSACTIONAL_ID", "figures")
                .env("RELAY_RELAY__ACKNOWLEDGE_INTERVAL", "10ms");
            let mut relay = Relay(relay.spawn()?);
            let first = wait_for(&watch, &topic, 1, &mut relay)?;
            let cursor = "select coalesce(max(last_id), 0) from outbox.cursors where pipeline = $1";
            while sqlx::query_scalar::<_, i64>(cursor)
                .bind(&topic)
                .fetch_one(&mut *db)
                .await?
                < events
            {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let rate = events as f64 / first.elapsed().as_secs_f64();
            let (cpu, peak_mib) = usage(relay.0.id())?;
            let cpu_us = cpu.as_secs_f64() * 1e6 / events as f64;
            println!(
                "  {delivery:<13} {round}: {rate:>9.0} events/s, {cpu_us:.2} us CPU/event, peak {peak_mib:.0} MiB"
            );
            stop(&mut relay)?;
            rates.push(rate);
        }
        ratios.push(rates[1] / rates[0]);
    }
    ratios.sort_by(f64::total_cmp);
    println!(
        "  exactly-once / at-least-once: median {:.2} of {ratios:.2?}",
        ratios[ROUNDS / 2]
    );
    Ok(())
}

/// The limit: in this process, so its CPU is that of the process meanwhile.
async fn naked(world: &World, events: i64, topic: &str) -> Anyhow<Drain> {
    world.create_topic(topic).await?;
    let watch = world.consumer()?;
    let producer: ThreadedProducer<DefaultProducerContext> = world
        .client()
        .set("acks", "all")
        .set("enable.idempotence", "true")
        .set("compression.type", "lz4")
        .set("linger.ms", "0")
        .set("batch.num.messages", "10000")
        .set("queue.buffering.max.messages", "20000")
        .create()?;
    let mut db = world.database.clone().connect().await?;
    let (cpu_before, _) = usage(std::process::id())?;
    let began = Instant::now();
    let mut last = 0_i64;
    loop {
        let rows = sqlx::query("select id, aggregate_id, payload::text from outbox.events where id > $1 order by id limit 5000")
            .bind(last)
            .fetch_all(&mut db)
            .await?;
        let Some(tail) = rows.last() else { break };
        last = tail.try_get(0)?;
        for row in &rows {
            let (key, payload): (&str, &str) = (row.try_get(1)?, row.try_get(2)?);
            let mut record = BaseRecord::to(topic).key(key).payload(payload);
            while let Err((error, refused)) = producer.send(record) {
                ensure!(
                    error.rdkafka_error_code() == Some(rdkafka::types::RDKafkaErrorCode::QueueFull),
                    "produce: {error}"
                );
                std::thread::sleep(Duration::from_millis(1));
                record = refused;
            }
        }
    }
    producer.flush(Duration::from_secs(60))?;
    let took = began.elapsed();
    let (cpu, peak_mib) = usage(std::process::id())?;
    ensure!(
        count(&watch, topic) == events,
        "the naked loop lost records"
    );
    Ok(Drain {
        rate: events as f64 / took.as_secs_f64(),
        cpu_us: (cpu - cpu_before).as_secs_f64() * 1e6 / events as f64,
        peak_mib,
        first_ms: 0.0,
    })
}

/// Single-row transactions at 1,000 a second; from the commit's return to the consumer's hands, without coordinated
/// omission: each event has a due time, and lateness counts.
async fn latency(world: &World, db: &mut PgConnection, mode: &str) -> Anyhow<()> {
    const RATE: u32 = 1000;
    const SECONDS: u32 = 10;
    let topic = format!("latency-{mode}");
    world.create_topic(&topic).await?;
    let consumer = world.consumer()?;
    let mut partitions = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        partitions.add_partition_offset(&topic, partition, Offset::Beginning)?;
    }
    consumer.assign(&partitions)?;
    let mut command = world.relay("run", &topic, mode);
    let mut relay = Relay(command.env("RELAY_PIPELINE__START", "latest").spawn()?);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (cpu_idle_from, _) = usage(relay.0.id())?;
    tokio::time::sleep(Duration::from_secs(10)).await;
    let (cpu_idle_to, _) = usage(relay.0.id())?;
    println!(
        "{mode}: idle {:.2} % of a core over 10 s",
        (cpu_idle_to - cpu_idle_from).as_secs_f64() * 10.0
    );
    let reader = std::thread::spawn(move || collect(&consumer, (RATE * SECONDS) as usize));
    let (cpu_from, _) = usage(relay.0.id())?;
    let mut committed = BTreeMap::new();
    let began = Instant::now();
    for n in 0..RATE * SECONDS {
        let due = began + Duration::from_secs(1) / RATE * n;
        tokio::time::sleep_until(due.into()).await;
        sqlx::query("select outbox.emit('event', $1, 'placed', '{}')")
            .bind(n.to_string())
            .execute(&mut *db)
            .await?;
        // A commit that came late by the writer's own fault is not the relay's delay.
        committed.insert(n.to_string(), Instant::now());
    }
    let (cpu_to, _) = usage(relay.0.id())?;
    let busy = began.elapsed();
    let seen = reader
        .join()
        .map_err(|_| anyhow::anyhow!("the consumer panicked"))??;
    stop(&mut relay)?;
    let mut took: Vec<Duration> = committed
        .iter()
        .map(|(key, at)| {
            seen.get(key)
                .map(|seen| seen.saturating_duration_since(*at))
                .context("an event is missing")
        })
        .collect::<Anyhow<_>>()?;
    took.sort();
    let at = |share: f64| took[((took.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
    println!(
        "{mode}: {RATE} single-row transactions a second: commit to consumer p50 {:.2} ms, p99 {:.2} ms, p99.9 {:.2} ms, \
         relay {:.1} % of a core",
        at(0.5),
        at(0.99),
        at(0.999),
        (cpu_to - cpu_from).as_secs_f64() / busy.as_secs_f64() * 100.0
    );
    Ok(())
}

fn collect(consumer: &BaseConsumer, events: usize) -> Anyhow<BTreeMap<String, Instant>> {
    let mut seen = BTreeMap::new();
    let deadline = Instant::now() + Duration::from_secs(60);
    while seen.len() < events {
        ensure!(
            Instant::now() < deadline,
            "only {} of {events} events arrived",
            seen.len()
        );
        let Some(message) = consumer.poll(Duration::from_millis(100)) else {
            continue;
        };
        let message = message?;
        ensure!(
            message
                .headers()
                .is_some_and(|headers| headers.count() >= 3),
            "a record without headers"
        );
        let key = String::from_utf8(message.key().context("a record without key")?.to_vec())?;
        seen.entry(key).or_insert_with(Instant::now);
    }
    Ok(seen)
}

impl World {
    fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.brokers);
        config
    }

    fn consumer(&self) -> Anyhow<BaseConsumer> {
        Ok(self
            .client()
            .set("group.id", "figures")
            .set("enable.auto.commit", "false")
            .set("fetch.wait.max.ms", "10")
            .create()?)
    }

    async fn create_topic(&self, topic: &str) -> Anyhow<()> {
        let admin: AdminClient<DefaultClientContext> = self.client().create()?;
        let new = NewTopic::new(topic, PARTITIONS, TopicReplication::Fixed(1));
        for created in admin.create_topics([&new], &AdminOptions::new()).await? {
            created.map_err(|(topic, code)| anyhow::anyhow!("create {topic}: {code}"))?;
        }
        Ok(())
    }

    fn relay(&self, command: &str, topic: &str, mode: &str) -> Command {
        let mut relay = Command::new(env!("CARGO_BIN_EXE_outbox-relay"));
        relay
            .arg(command)
            .current_dir(self.scratch.path())
            .env("RELAY_SOURCE__POSTGRES__URL", &self.database_url)
            .env("RELAY_SOURCE__POSTGRES__CAPTURE", mode)
            .env("RELAY_SINK__KAFKA__BROKERS", &self.brokers)
            .env("RELAY_ADMIN__ENABLED", "false")
            .env("RELAY_LOG__LEVEL", "warn")
            // A pipeline of its own for each run: its cursor begins anew.
            .env(format!("RELAY_PIPELINES__{topic}__TOPIC"), topic)
            .stdin(Stdio::null());
        relay
    }
}

fn wait_for(watch: &BaseConsumer, topic: &str, events: i64, relay: &mut Relay) -> Anyhow<Instant> {
    loop {
        if count(watch, topic) >= events {
            return Ok(Instant::now());
        }
        if let Some(status) = relay.0.try_wait()? {
            bail!("the relay ended: {status}");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn count(watch: &BaseConsumer, topic: &str) -> i64 {
    (0..PARTITIONS)
        .map(|partition| {
            // A partition that has no leader yet has no records either.
            watch
                .fetch_watermarks(topic, partition, Duration::from_secs(10))
                .map_or(0, |(_, high)| high)
        })
        .sum()
}

/// CPU time and peak resident memory in MiB of a process.
fn usage(pid: u32) -> Anyhow<(Duration, f64)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, rest) = stat.rsplit_once(')').context("read /proc/PID/stat")?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    // Fields 14 and 15 of the whole line, in ticks of 10 ms.
    let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .context("read VmHWM")?;
    let kib: f64 = peak.trim().trim_end_matches(" kB").parse()?;
    Ok((Duration::from_millis(ticks * 10), kib / 1024.0))
}

fn stop(relay: &mut Relay) -> Anyhow<()> {
    let asked = Command::new("kill")
        .arg(relay.0.id().to_string())
        .status()?;
    ensure!(asked.success(), "could not ask the relay to stop");
    let began = Instant::now();
    let status = relay.0.wait()?;
    println!(
        "    SIGTERM to exit: {:.0} ms, {status}",
        began.elapsed().as_secs_f64() * 1e3
    );
    Ok(())
}
