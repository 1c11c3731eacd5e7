//! A database, a broker and relays of one run's own, with a network in between that does as it is told.

use std::time::Duration;

use fastrand::Rng;
use sqlx::ConnectOptions;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use tokio::time::{Instant, sleep};

use super::super::clock::Clock;
use super::super::kafka::Kafka;
use super::super::load::KINDS;
use super::super::process::{Process, Setup};
use super::super::proxy::{Proxy, Weather};
use super::super::services::Own;
use super::super::{eventually, number, run};
use super::writers;

/// Of every relay; the shortest that there is.
const LEASE: Duration = Duration::from_secs(1);
/// Small, so that a duplicate too many is seen.
pub(super) const IN_FLIGHT_EVENTS: u64 = 500;
/// By so much a clock is set.
const HOUR_SECONDS: i64 = 3_600;

/// The pipeline is spread over so many at most.
pub(super) const SHARDS_MAX: u32 = 4;

/// A place for a relay, with its own way to the database.
struct Seat {
    /// Ends before its folder and its services do.
    relay: Option<Process>,
    setup: Setup,
    way: Proxy,
    /// That of its relays.
    clock: Clock,
}

pub(super) struct World {
    seats: Vec<Seat>,
    to_broker: Proxy,
    database: Own,
    broker: Own,
    pub(super) pool: PgPool,
    pub(super) options: PgConnectOptions,
    /// The way of an auditor: without a network in between.
    pub(super) direct: Setup,
}

/// What happens to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Blow {
    KillOwner,
    KillAny,
    KillAll,
    KillBroker,
    KillDatabase,
    Freeze,
    ClockForward,
    ClockBack,
    Stop,
    Reshard,
    Cut,
    Reset,
    Slow,
    Silence,
    CutBroker,
    ResetBroker,
    SlowBroker,
    SilenceBroker,
}

impl Blow {
    /// With how often each comes in a hundred.
    const WEIGHTS: [(Self, u32); 18] = [
        (Self::KillOwner, 54),
        (Self::KillAny, 8),
        (Self::KillAll, 6),
        (Self::KillBroker, 1),
        (Self::KillDatabase, 2),
        (Self::Freeze, 5),
        (Self::ClockForward, 2),
        (Self::ClockBack, 2),
        (Self::Stop, 2),
        (Self::Reshard, 2),
        (Self::Cut, 3),
        (Self::Reset, 3),
        (Self::Slow, 2),
        (Self::Silence, 2),
        (Self::CutBroker, 2),
        (Self::ResetBroker, 2),
        (Self::SlowBroker, 1),
        (Self::SilenceBroker, 1),
    ];

    pub(super) fn any(random: &mut Rng) -> Self {
        let mut n = random.u32(..100);
        for (blow, weight) in Self::WEIGHTS {
            match n.checked_sub(weight) {
                Some(rest) => n = rest,
                None => return blow,
            }
        }
        Self::KillOwner
    }

    pub(super) fn each() -> impl Iterator<Item = Self> {
        Self::WEIGHTS.into_iter().map(|(blow, _)| blow)
    }
}

/// What a blow did.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Struck {
    pub(super) kills: u64,
    /// Until another relay owned the pipeline, where one relay was killed or frozen and others were left.
    pub(super) takeover: Option<Duration>,
}

impl World {
    /// None where a service is missing, which is then said.
    pub(super) async fn create(test: &str, relays: usize) -> Option<Self> {
        let (broker, database) = (Own::kafka(test)?, Own::postgres(test)?);
        let options: PgConnectOptions = database.variable("DATABASE_URL").parse().unwrap();
        let options = options.disable_statement_logging();
        outbox_relay::migrate::postgres(options.clone())
            .await
            .unwrap();
        let pool = PgPoolOptions::new()
            .max_connections(3)
            .connect_lazy_with(options.clone());
        writers::prepare(&pool).await;
        let kafka = Kafka::new(broker.variable("KAFKA_BROKERS").to_owned());
        kafka.create(&KINDS).await;
        let listen = broker.variable("KAFKA_PROXY_LISTEN").to_owned();
        let to_broker = Proxy::start(&listen, broker.variable("KAFKA_PROXY_UPSTREAM")).await;
        let mut seats = Vec::new();
        for _ in 0..relays {
            let port = database.variable("PG_PORT");
            let way = Proxy::start("127.0.0.1:0", &format!("127.0.0.1:{port}")).await;
            let url = format!("postgres://postgres@{}/postgres", way.address);
            let mut setup = setup(&url, &kafka);
            setup.set("SINK__KAFKA__BROKERS", &listen);
            let clock = Clock::new();
            setup.clock(&clock);
            seats.push(Seat {
                relay: None,
                setup,
                way,
                clock,
            });
        }
        let direct = setup(database.variable("DATABASE_URL"), &kafka);
        let mut world = Self {
            seats,
            to_broker,
            database,
            broker,
            pool,
            options,
            direct,
        };
        world.fill();
        world.owner().await;
        Some(world)
    }

    /// Starts a relay on every empty seat.
    fn fill(&mut self) {
        for seat in &mut self.seats {
            if seat.relay.is_none() {
                seat.relay = Some(seat.setup.start());
            }
        }
    }

    /// Who holds the lease of the first shard by the database's own books; waits until one of the relays does.
    async fn owner(&self) -> usize {
        self.owner_but(None).await
    }

    /// The same, not this one.
    async fn owner_but(&self, not: Option<u32>) -> usize {
        eventually("an owner", super::PATIENCE, async || {
            let holder: Option<String> = sqlx::query_scalar(
                "select holder from outbox.leases where shard = 0 and expires_at > clock_timestamp()",
            )
            .fetch_optional(&self.pool)
            .await
            .ok()?;
            let pid = holder?.split(':').nth(1)?.parse().ok()?;
            let held = |seat: &Seat| seat.relay.as_ref().is_some_and(|relay| relay.pid() == pid);
            (not != Some(pid)).then(|| self.seats.iter().position(held))?
        })
        .await
    }

    fn pid(&self, seat: usize) -> Option<u32> {
        self.seats[seat].relay.as_ref().map(Process::pid)
    }

    async fn kill(&mut self, seat: usize) {
        if let Some(relay) = self.seats[seat].relay.take() {
            relay.kill().await;
        }
    }

    /// Strikes once, and waits until the relays have recovered enough for the next blow.
    pub(super) async fn strike(&mut self, blow: Blow, random: &mut Rng) -> Struck {
        let owner = self.owner().await;
        let way = &self.seats[owner].way;
        let long = LEASE * 2 + Duration::from_millis(random.u64(..1_000));
        let slow = Weather::Slow(Duration::from_millis(random.u64(5..50)));
        let mut struck = Struck::default();
        match blow {
            Blow::KillOwner => struck = self.kill_owner(owner).await,
            Blow::KillAny => {
                self.kill(random.usize(..self.seats.len())).await;
                struck.kills = 1;
            }
            Blow::KillAll => {
                for seat in 0..self.seats.len() {
                    self.kill(seat).await;
                }
                struck.kills = self.seats.len() as u64;
            }
            Blow::KillBroker => {
                self.broker.signal("KILL");
                sleep(Duration::from_millis(random.u64(..1_500))).await;
                self.broker.start();
                struck.kills = 1;
            }
            Blow::KillDatabase => {
                self.database.signal("KILL");
                sleep(Duration::from_millis(random.u64(..500))).await;
                self.database.start();
                struck.kills = 1;
            }
            Blow::Freeze => struck = self.freeze(owner, random.bool()).await,
            Blow::ClockForward => self.set_clock(HOUR_SECONDS).await,
            Blow::ClockBack => self.set_clock(-HOUR_SECONDS).await,
            Blow::Stop => {
                let relay = self.seats[owner].relay.take();
                relay.expect("the owner runs").stop().await;
            }
            Blow::Reshard => self.reshard(random.u32(1..=SHARDS_MAX)).await,
            Blow::Cut => way.cut(false),
            Blow::Reset => way.cut(true),
            Blow::Slow => spell(way, slow, long, None).await,
            Blow::Silence => spell(way, Weather::Silent, long, ending(random)).await,
            Blow::CutBroker => self.to_broker.cut(false),
            Blow::ResetBroker => self.to_broker.cut(true),
            Blow::SlowBroker => spell(&self.to_broker, slow, long, None).await,
            Blow::SilenceBroker => {
                spell(&self.to_broker, Weather::Silent, long, ending(random)).await;
            }
        }
        self.fill();
        self.owner().await;
        struck
    }

    /// A rolling update to another number of shards.
    async fn reshard(&mut self, shards: u32) {
        for seat in 0..self.seats.len() {
            let seat = &mut self.seats[seat];
            seat.setup.set("PIPELINE__SHARDS", &shards.to_string());
            if let Some(relay) = seat.relay.take() {
                relay.stop().await;
            }
            self.fill();
        }
        eventually("the new number of shards", super::PATIENCE, async || {
            let there: i32 = sqlx::query_scalar("select shards from outbox.pipelines")
                .fetch_one(&self.pool)
                .await
                .ok()?;
            (u32::try_from(there) == Ok(shards)).then_some(())
        })
        .await;
    }

    async fn kill_owner(&mut self, owner: usize) -> Struck {
        let (pid, since) = (self.pid(owner), Instant::now());
        self.kill(owner).await;
        let mut takeover = None;
        if self.seats.len() > 1 {
            self.owner_but(pid).await;
            takeover = Some(since.elapsed());
        }
        Struck { kills: 1, takeover }
    }

    /// The clock of the owner is set while it publishes. What it knows of its lease is void by then, whichever way the
    /// clock went, so it takes the lease again or another does. One that is waiting for something else just then does not
    /// look at the clock before the lease is renewed: it is struck again.
    async fn set_clock(&self, seconds: i64) {
        let before = self.epoch().await;
        eventually("a lease that is taken anew", super::PATIENCE, async || {
            let owner = self.owner().await;
            self.seats[owner].clock.step(seconds);
            sleep(LEASE / 2).await;
            (self.epoch().await > before).then_some(())
        })
        .await;
    }

    /// How often the lease of the first shard was taken.
    async fn epoch(&self) -> i64 {
        number(
            &self.pool,
            "select epoch from outbox.leases where shard = 0",
        )
        .await
    }

    /// The owner stands still for longer than its lease, and goes on where it was, perhaps by a clock that was set back
    /// meanwhile.
    async fn freeze(&mut self, owner: usize, set_back: bool) -> Struck {
        let (pid, since) = (self.pid(owner), Instant::now());
        let relay = self.seats[owner].relay.as_ref();
        let relay = relay.expect("the owner runs");
        relay.signal("STOP");
        let mut takeover = None;
        if self.seats.len() > 1 {
            self.owner_but(pid).await;
            takeover = Some(since.elapsed());
        } else {
            sleep(LEASE * 2).await;
        }
        sleep(Duration::from_millis(100)).await;
        if set_back {
            self.seats[owner].clock.step(-HOUR_SECONDS);
        }
        relay.signal("CONT");
        Struck { kills: 0, takeover }
    }

    /// Everybody goes on undisturbed; what runs by now stays.
    pub(super) async fn heal(&mut self) {
        for proxy in self
            .seats
            .iter()
            .map(|seat| &seat.way)
            .chain([&self.to_broker])
        {
            proxy.weather(Weather::Clear);
        }
        self.fill();
        self.owner().await;
    }

    /// Every relay is asked to stop and does so in good order.
    pub(super) async fn stop(&mut self) {
        for seat in &mut self.seats {
            if let Some(relay) = seat.relay.take() {
                relay.stop().await;
            }
        }
    }

    pub(super) async fn run(&self, statement: &str) {
        run(&self.pool, statement).await;
    }
}

/// What `tests/run --soak --exactly-once` asks for.
pub(super) fn exactly_once() -> bool {
    std::env::var("RELAY_SOAK_EXACTLY_ONCE").is_ok_and(|set| set == "1")
}

/// How a silence ends: as if nothing had been, or with the connections cut, politely or not.
fn ending(random: &mut Rng) -> Option<bool> {
    match random.u32(..3) {
        0 => None,
        1 => Some(false),
        _ => Some(true),
    }
}

async fn spell(way: &Proxy, weather: Weather, long: Duration, cut: Option<bool>) {
    way.weather(weather);
    sleep(long).await;
    if let Some(reset) = cut {
        way.cut(reset);
    }
    way.weather(Weather::Clear);
}

fn setup(database: &str, kafka: &Kafka) -> Setup {
    let mut setup = Setup::new(database);
    setup.kafka(kafka);
    setup.set("RELAY__LEASE_TTL", &format!("{}s", LEASE.as_secs()));
    setup.set("RELAY__IN_FLIGHT_EVENTS", &IN_FLIGHT_EVENTS.to_string());
    setup.set("RELAY__PAGE_EVENTS", "200");
    if exactly_once() {
        setup.set("SINK__KAFKA__DELIVERY", "exactly-once");
        setup.set("SINK__KAFKA__TRANSACTIONAL_ID", "soak");
    }
    setup.set("RELAY__DRAIN_TIMEOUT", "2s");
    // A broker that is silent is noticed within a run.
    setup.config("[sink.kafka.properties]\n\"socket.timeout.ms\" = \"4000\"\n\"request.timeout.ms\" = \"3000\"\n");
    setup
}
