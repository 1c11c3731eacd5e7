//! Crash runs: relays, broker, database and network are struck in a random order under load, and an auditor that shares
//! no code with the relay judges what is left. A run prints its seed; `RELAY_SOAK_SEED` runs it again.
//!
//! The short run is a test like any other. The long one is `tests/run --soak`.

mod world;
mod writers;

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use fastrand::Rng;
use serde_json::Value;
use tokio::time::{Instant, sleep};

use self::world::{Blow, IN_FLIGHT_EVENTS, SHARDS_MAX, Struck, World};
use self::writers::Writers;
use super::verify::{counts, settled, verify};
use super::{Line, eventually, number, run};

/// Everything is down at once now and then.
const PATIENCE: Duration = Duration::from_secs(90);

/// What became of a run.
#[derive(Default)]
struct Tally {
    kills: u64,
    blows: BTreeMap<Blow, u64>,
    takeovers: Vec<Duration>,
    seconds: u64,
}

impl Tally {
    fn add(&mut self, blow: Blow, struck: Struck) {
        self.kills += struck.kills;
        self.takeovers.extend(struck.takeover);
        *self.blows.entry(blow).or_default() += 1;
    }

    /// Whatever may have made a pipeline begin again from its cursor.
    fn blows(&self) -> u64 {
        self.blows.values().sum()
    }

    fn summary(&mut self, report: &Value) -> String {
        self.takeovers.sort_unstable();
        let takeovers = &self.takeovers;
        let at = |place: usize| {
            takeovers
                .get(place)
                .copied()
                .unwrap_or_default()
                .as_secs_f64()
        };
        let pipeline = &report["pipelines"][0];
        let doubled = &pipeline["doubled"];
        let duplicates = doubled["count"].as_u64().unwrap();
        #[expect(clippy::cast_precision_loss, reason = "for people")]
        let each = duplicates as f64 / self.kills.max(1) as f64;
        format!(
            "{} events, {} kills among {} blows in {} s: {duplicates} duplicates ({each:.1} per kill, the longest run of {}, \
             {} beyond reach), takeover p50 {:.2} s, max {:.2} s of {}; blows: {:?}",
            pipeline["events"],
            self.kills,
            self.blows(),
            self.seconds,
            doubled["longest_run"],
            doubled["beyond_reach"],
            at(takeovers.len() / 2),
            at(takeovers.len().saturating_sub(1)),
            takeovers.len(),
            self.blows,
        )
    }
}

/// A seed, and how a run is run again with it.
struct Seed(u64);

impl fmt::Display for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed {0} (RELAY_SOAK_SEED={0})", self.0)
    }
}

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn seed() -> Seed {
    let seed = Seed(variable("RELAY_SOAK_SEED").unwrap_or_else(|| fastrand::u64(..1_000_000)));
    eprintln!("crash run with {seed}");
    seed
}

/// Waits until the cursor has passed everything that was committed, and has it judged.
async fn judged(world: &World) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (_, report) = verify(&world.direct, &[]).await;
        let waiting = report["pipelines"][0]["waiting"].as_u64();
        if waiting == Some(0) {
            return report;
        }
        assert!(Instant::now() < deadline, "{waiting:?} events still wait");
        sleep(Duration::from_millis(100)).await;
    }
}

/// # Panics
/// When a promise is broken.
fn hold(report: &Value, tally: &Tally, seed: &Seed) {
    let [missing, out_of_order, altered, unknown, doubled] = counts(report);
    assert_eq!(
        [missing, out_of_order, altered, unknown],
        [0; 4],
        "missing, out of order, altered, unknown with {seed}: {report}"
    );
    // Exactly-once begins at the database's cursor after a crash of the database, and only then again.
    let begun_again = match tally.blows.get(&Blow::KillDatabase) {
        databases if world::exactly_once() => databases.copied().unwrap_or_default(),
        _ => tally.blows(),
    };
    // Of every shard that a relay had.
    let in_flight = match tally.blows.get(&Blow::Reshard) {
        Some(_) => IN_FLIGHT_EVENTS * u64::from(SHARDS_MAX),
        None => IN_FLIGHT_EVENTS,
    };
    let bound = begun_again * in_flight;
    assert!(
        doubled <= bound,
        "{doubled} duplicates of {bound} with {seed}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_blow_is_survived() {
    let Some(mut world) = World::create("every_blow_is_survived", 2).await else {
        return;
    };
    let seed = seed();
    let mut random = Rng::with_seed(seed.0);
    let mut blows: Vec<Blow> = Blow::each().collect();
    random.shuffle(&mut blows);
    let (mut tally, began) = (Tally::default(), Instant::now());
    let writers = Writers::start(&world.options, seed.0);
    for blow in blows {
        writers.commits(random.u64(10..60)).await;
        tally.add(blow, world.strike(blow, &mut random).await);
        let kill = world.strike(Blow::KillOwner, &mut random).await;
        tally.add(Blow::KillOwner, kill);
    }
    world.heal().await;
    writers.commits(50).await;
    writers.stop().await;
    let report = judged(&world).await;
    tally.seconds = began.elapsed().as_secs();
    eprintln!("{}", tally.summary(&report));
    hold(&report, &tally, &seed);
    world.stop().await;

    // Would it have been seen? An event that is no longer committed, and one that nobody published.
    world
        .run("delete from outbox.events where id = (select id from outbox.events order by id offset 40 limit 1)")
        .await;
    let (code, report) = verify(&world.direct, &[]).await;
    assert_eq!((code, counts(&report)[3] > 0), (3, true), "{report}");
    world
        .run(
            "update outbox.cursors
                set (last_id, ceiling) = (select max(ceiling) + 1, max(ceiling) + 1 from outbox.cursors);
             insert into outbox.events (xid, id, aggregate_type, aggregate_id, event_type)
             select e.xid, c.last_id, e.aggregate_type, e.aggregate_id, 'lost'
               from (select max(last_id) as last_id from outbox.cursors) c
              cross join (select * from outbox.events order by id limit 1) e",
        )
        .await;
    let (code, report) = verify(&world.direct, &[]).await;
    assert_eq!((code, counts(&report)[0]), (3, 1), "{report}");
}

/// `tests/run --soak`: until there were RELAY_SOAK_KILLS, or RELAY_SOAK_MINUTES are over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes as long as it is told to: tests/run --soak"]
async fn soak() {
    let Some(mut world) = World::create("soak", 3).await else {
        return;
    };
    let seed = seed();
    let kills = variable("RELAY_SOAK_KILLS").unwrap_or(1_000);
    let minutes = variable("RELAY_SOAK_MINUTES").unwrap_or(60);
    let mut random = Rng::with_seed(seed.0);
    let (mut tally, began) = (Tally::default(), Instant::now());
    let writers = Writers::start(&world.options, seed.0);
    let mut told = 0;
    while tally.kills < kills && began.elapsed().as_secs() < minutes * 60 {
        let blow = Blow::any(&mut random);
        tally.add(blow, world.strike(blow, &mut random).await);
        sleep(Duration::from_millis(random.u64(..400))).await;
        if tally.kills / 50 > told {
            told = tally.kills / 50;
            let (_, report) = verify(&world.direct, &[]).await;
            tally.seconds = began.elapsed().as_secs();
            eprintln!("so far: {}", tally.summary(&report));
            hold(&report, &tally, &seed);
        }
    }
    world.heal().await;
    writers.commits(50).await;
    writers.stop().await;
    let report = judged(&world).await;
    tally.seconds = began.elapsed().as_secs();
    eprintln!("{seed}: {}", tally.summary(&report));
    hold(&report, &tally, &seed);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backlog_is_drained_through_kills() {
    const EVENTS: u64 = 20_000;
    const KILLS: u64 = 4;
    let Some(mut line) = Line::create("a_backlog_is_drained_through_kills").await else {
        return;
    };
    line.kafka.create(&["order"]).await;
    line.setup.set("RELAY__LEASE_TTL", "1s");
    line.setup
        .set("RELAY__IN_FLIGHT_EVENTS", &IN_FLIGHT_EVENTS.to_string());
    let pool = &line.database.pool;
    run(
        pool,
        format!("select outbox.emit('order', (n % 500)::text, 'changed', '1') from generate_series(1, {EVENTS}) n"),
    )
    .await;
    for _ in 0..KILLS {
        let relay = line.setup.start();
        let passed = "select coalesce(max(last_id), 0) from outbox.cursors";
        let before = number(pool, passed).await;
        // All of it may be out when the machine holds this test up, and not the relay.
        eventually("progress", PATIENCE, async || {
            let now = number(pool, passed).await;
            (now > before || now == EVENTS.cast_signed()).then_some(())
        })
        .await;
        relay.kill().await;
    }
    let relay = line.setup.start();
    let report = settled(&line.setup).await;
    relay.stop().await;
    let [missing, out_of_order, altered, unknown, doubled] = counts(&report);
    eprintln!("{doubled} duplicates of {EVENTS} events after {KILLS} kills");
    // What was in flight, and about as much again that was confirmed and not written down.
    assert!(doubled <= KILLS * 2 * IN_FLIGHT_EVENTS, "{doubled}");
    assert_eq!(
        [missing, out_of_order, altered, unknown],
        [0; 4],
        "{report}"
    );
}
