//! The demo: a small shop with an outbox, a broker, the real loop between them, and a consumer that checks it all.
//!
//! Everything is one future: dropping it ends the demo at any point, and what it created on a server is removed
//! afterwards, whatever happened.

mod broker;
mod checker;
mod director;
mod screen;
mod shop;
mod store;
mod trade;

use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::broker::Broker;
use self::checker::Seen;
pub(crate) use self::checker::Verdict;
use self::director::Director;
pub(crate) use self::screen::{grouped, milliseconds};
use self::shop::{Kind, Shop, Transaction};
use self::store::{Done, Store};
use self::trade::Plan;
use crate::config::{Config, Sink, Source, postgres_options};
use crate::event::Shard;
use crate::relay::status::{State, Status};
use crate::sink::kafka;
use crate::source::postgres::Connector;
use crate::supervise;

/// Transactions that run at once.
const CLIENTS: usize = 8;
/// Happenings on their way to the screen.
const HAPPENINGS: usize = 1024;
/// Nothing has arrived for this long although something should: the check goes on without it.
const SILENCE_MAX: Duration = Duration::from_secs(15);
/// Cleaning up on a server that does not answer.
const REMOVE_MAX: Duration = Duration::from_secs(20);

/// What the demo does.
#[derive(Debug)]
pub(crate) struct Settings {
    /// Events to commit, about.
    pub(crate) events: u64,
    /// Events per second; 0 for as fast as it goes.
    pub(crate) rate: u32,
    /// Chooses the story.
    pub(crate) seed: u64,
    /// A PostgreSQL server; a SQLite file when absent.
    pub(crate) database_url: Option<SecretString>,
    /// A Kafka cluster; an embedded broker when absent.
    pub(crate) brokers: Option<String>,
    /// The environment, of which the settings of the Kafka sink (encryption, authentication) hold for `brokers`.
    pub(crate) env: Vec<(String, String)>,
    /// Lines instead of a screen.
    pub(crate) plain: bool,
}

/// How it went.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) verdict: Verdict,
    pub(crate) transactions: u64,
    pub(crate) rolled_back_transactions: u64,
    /// From asking for the commit to the consumer.
    pub(crate) latency: Option<Latency>,
    /// From the first transaction to the last event consumed.
    pub(crate) took: Duration,
    /// What the relay complains about; none when it runs.
    pub(crate) trouble: Option<String>,
}

/// Percentiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Latency {
    pub(crate) p50: Duration,
    pub(crate) p99: Duration,
}

/// A person's wish to end early: once for a summary, twice for the way out.
#[derive(Clone, Default)]
pub(crate) struct Stop {
    closing: CancellationToken,
    leaving: CancellationToken,
}

impl Stop {
    /// Asks once more.
    pub(crate) fn ask(&self) {
        if self.closing.is_cancelled() {
            self.leaving.cancel();
        }
        self.closing.cancel();
    }
}

/// Something to show and to remember.
enum Happening {
    Ended(Transaction, Done),
    Seen(Seen, Instant),
}

/// How far it has come.
#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    /// Events committed.
    committed: usize,
    /// Of these not seen yet.
    outstanding: usize,
}

/// Where it happens.
struct Place {
    /// Part of every name on a server, so that no two demos meet.
    random: String,
    store: Store,
    broker: Broker,
}

impl Place {
    /// On a server nothing is there yet.
    async fn choose(settings: &Settings) -> Result<Self> {
        let random = Uuid::new_v4().simple().to_string()[..8].to_owned();
        let store = match &settings.database_url {
            Some(url) => Store::postgres(postgres_options("--database-url", url)?, &random),
            None => Store::sqlite().await?,
        };
        let broker = match settings.brokers {
            Some(_) => Broker::real(&random),
            None => Broker::embedded()?,
        };
        Ok(Self {
            random,
            store,
            broker,
        })
    }

    /// From where to where the events go, by the names of what is created for it.
    fn path(&self) -> String {
        format!("{} → relay → {}", self.store, self.broker)
    }

    async fn remove(self, kafka: &kafka::Settings) -> Result<()> {
        let (store, broker) = tokio::join!(self.store.remove(), self.broker.remove(kafka));
        store.and(broker)
    }
}

/// Runs the demo and removes what it created.
///
/// # Errors
/// When database or broker can't be reached or refuse.
pub(crate) async fn run(settings: Settings, stop: &Stop) -> Result<Report> {
    let mut place = Place::choose(&settings).await?;
    let config = config(&settings, &place)?;
    let Sink::Kafka(kafka) = &config.sink else {
        unreachable!("the demo's own configuration says kafka");
    };
    let shown = Box::pin(show(&settings, &config, kafka, &mut place, stop));
    let shown = tokio::select! {
        biased;
        () = stop.leaving.cancelled() => {
            Err(anyhow!("asked a second time to stop: ended without a check"))
        }
        shown = shown => shown,
    };
    let removed = timeout(REMOVE_MAX, place.remove(kafka)).await;
    let removed = removed.context("clean up: no answer").flatten();
    // The first thing that went wrong is the one to tell.
    let report = shown?;
    removed?;
    Ok(report)
}

/// The configuration that a user would write, over the shipped defaults.
fn config(settings: &Settings, place: &Place) -> Result<Config> {
    let Place { store, broker, .. } = place;
    let mut env: Vec<(String, String)> = Vec::new();
    let mut set = |name: &str, value: String| env.push((format!("RELAY_{name}"), value));
    match (store, &settings.database_url) {
        (Store::Sqlite { path, .. }, _) => {
            set("SOURCE__KIND", "sqlite".to_owned());
            set("SOURCE__SQLITE__PATH", path.to_string_lossy().into_owned());
        }
        (Store::Postgres { .. }, url) => {
            let url = url.as_ref().map(ExposeSecret::expose_secret);
            set("SOURCE__POSTGRES__URL", url.unwrap_or_default().to_owned());
        }
    }
    set("PIPELINE__TOPIC", broker.topics().template());
    // The relay prepares topics that it knows of before anything is published.
    let types = Kind::ALL.map(Kind::name);
    set("PIPELINE__FILTER__AGGREGATE_TYPES", format!("{types:?}"));
    let brokers = broker.address().or_else(|| settings.brokers.clone());
    set("SINK__KAFKA__BROKERS", brokers.unwrap_or_default());
    if settings.brokers.is_some() {
        let of_sink = |(name, _): &&(String, String)| {
            name.starts_with("RELAY_SINK__KAFKA__") && name != "RELAY_SINK__KAFKA__BROKERS"
        };
        env.extend(settings.env.iter().filter(of_sink).cloned());
    }
    let mut config = Config::load(None, env)?;
    if let (Source::Postgres(source), Some(options)) =
        (&mut config.source, store.postgres_options())
    {
        source.connector = Connector::from(options);
        source.direct_connector = source.connector.clone();
    }
    Ok(config)
}

async fn show(
    settings: &Settings,
    config: &Config,
    kafka: &kafka::Settings,
    place: &mut Place,
    stop: &Stop,
) -> Result<Report> {
    let path = place.path();
    let Place {
        random,
        store,
        broker,
    } = place;
    tokio::try_join!(store.create(), broker.create(kafka))?;
    let mut clients = Vec::with_capacity(CLIENTS);
    for _ in 0..CLIENTS {
        clients.push(store.client().await?);
    }
    let reader = broker.consumer(kafka, random)?;
    let (relay, status) = supervise::assemble(config, &config.pipelines[0], Shard::whole(), "demo");

    let (happenings, happened) = mpsc::channel(HAPPENINGS);
    let (progress, seen_progress) = watch::channel(Progress::default());
    let (ready, reading) = watch::channel(false);
    let (ends, ends_seen) = watch::channel(None);
    let stopping = CancellationToken::new();
    let relay = Box::pin(relay.run(stopping.clone()));
    let mut director = Director::new(settings, path, stop.clone(), progress, status.clone())?;
    let plan = Plan {
        events: settings.events,
        rate: (settings.rate > 0).then_some(settings.rate.into()),
    };
    let trade = trade::trade(
        Shop::new(settings.seed),
        clients,
        plan,
        happenings.clone(),
        seen_progress.clone(),
        stop.closing.clone(),
    );
    let told = async {
        // The last thing that is sold, then the last thing that is published, then the last thing that is read.
        let publishing = async {
            running(status, reading).await;
            let sold = trade.await;
            if let Ok(committed) = sold {
                settled(committed, seen_progress).await;
            }
            stopping.cancel();
            sold
        };
        let (sold, ()) = tokio::join!(publishing, relay);
        sold?;
        ends.send_replace(Some(reader.ends().await?));
        Ok(())
    };
    let read = reader.clone().read(happenings, ready, ends_seen);
    tokio::try_join!(Box::pin(told), Box::pin(read), director.direct(happened))?;
    Ok(director.report())
}

/// Waits until everything that was committed has been seen, or nothing comes any more.
async fn settled(committed: usize, mut progress: watch::Receiver<Progress>) {
    loop {
        let now = *progress.borrow_and_update();
        if now.committed == committed && now.outstanding == 0 {
            return;
        }
        if !matches!(timeout(SILENCE_MAX, progress.changed()).await, Ok(Ok(()))) {
            return;
        }
    }
}

/// Waits until the relay is in its loop and the consumer has looked into every partition, so that their start is not
/// taken for latency; not for long, whatever they do.
async fn running(mut status: watch::Receiver<Status>, mut reading: watch::Receiver<bool>) {
    const START_MAX: Duration = Duration::from_secs(5);
    // Each lets go of what it saw at once: a value still borrowed would stop whoever sets the next one, for ever.
    let is_running = |status: &Status| status.state == State::Running;
    let relay = async { drop(status.wait_for(is_running).await) };
    let consumer = async { drop(reading.wait_for(|reading| *reading).await) };
    let both = async { tokio::join!(relay, consumer) };
    // The demo goes on without them, and shows what the relay complains about.
    let _gave_up = timeout(START_MAX, both).await.is_err();
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// The relay tells its state from the very task that waits here: a wait that keeps what it saw borrowed stops it.
    #[tokio::test]
    async fn a_wait_for_both_lets_the_first_go_on() {
        let (status, seen) = watch::channel(Status::starting());
        let (_reading, never) = watch::channel(false);
        status.send_modify(|status| status.state = State::Running);
        let mut waiting = std::pin::pin!(running(seen, never));
        tokio::select! {
            biased;
            () = &mut waiting => unreachable!("the consumer never says that it reads"),
            () = std::future::ready(()) => {}
        }
        let (done, told) = std::sync::mpsc::channel();
        thread::spawn(move || {
            status.send_modify(|status| status.in_flight_events = 1);
            let _ = done.send(());
        });
        let told = told.recv_timeout(Duration::from_secs(10));
        assert_eq!(told, Ok(()), "the relay could not tell its state");
    }
}
