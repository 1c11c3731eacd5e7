//! Starts what a configuration asks for, and stops it: the only place that spawns tasks.
//!
//! Shutdown is an argument, in two phases: capture stops, what is handed over is drained. A panic ends the process: a
//! state that nobody named is not gone on with.

use std::future::Future;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow, ensure};
use sqlx::sqlite::SqliteConnectOptions;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::admin::{self, Shown};
use crate::backlog::{self, Backlogs};
use crate::config::{Config, PipelineConfig, Sink, Source};
use crate::crew::{Crews, ShownRelay};
use crate::event::{PipelineName, Shard};
use crate::ledger::postgres::PostgresLedger;
use crate::ledger::sqlite::SqliteLedger;
use crate::ledger::{self, AnyLedger};
use crate::relay::Relay;
use crate::relay::status::Status;
use crate::relay::turn::Turn;
use crate::reload::{Reload, Reloaded};
use crate::retention;
use crate::sink::AnySink;
use crate::sink::kafka::KafkaSink;
use crate::sink::stdout::StdoutSink;
use crate::source::AnySource;
use crate::source::postgres::{CaptureMode, PostgresSource};
use crate::source::sqlite::SqliteSource;
use crate::telemetry;

/// Runs every pipeline until `stop` completes, or with `until_empty` until everything is published that was committed at the
/// beginning; then drains.
///
/// # Errors
/// When the admin port can't be opened, or a task panicked; with `until_empty` also when events are left.
pub async fn run(
    config: Config,
    until_empty: bool,
    mut reload: Reload,
    mut reloads: mpsc::Receiver<Config>,
    stop: impl Future<Output = ()>,
) -> Result<(), anyhow::Error> {
    let listener = if config.admin.enabled {
        Some(admin::bind(config.admin.listen).await?)
    } else {
        None
    };
    let metrics = telemetry::Exporter::install(wall_clock_us())?;
    let holder = holder();
    let stopping = CancellationToken::new();
    let mut relays = JoinSet::new();
    let mut crews = Crews::new(&config, &reload, &holder, &stopping);
    let mut others = others(&config, listener, &holder, metrics, &crews.shown());
    let mut stop = std::pin::pin!(stop);
    let shown = crews.shown();
    let mut emptied = std::pin::pin!(backlog::emptied(&config.source, shown.clone()));
    let mut is_done = false;
    let ended = loop {
        // Also those that a look which was cut short has begun.
        for relay in crews.begun() {
            relays.spawn(relay);
        }
        tokio::select! {
            () = &mut stop => break Ok(()),
            // One that ends well is of a number of shards that was given up.
            Some(ended) = relays.join_next() => if let Err(error) = ended {
                break Err(anyhow!(error).context("a pipeline panicked"));
            },
            Some(ended) = others.join_next() => if let Err(error) = ended {
                break Err(anyhow!(error).context("a task panicked"));
            },
            emptied = &mut emptied, if until_empty => {
                is_done = emptied.is_ok();
                break emptied;
            }
            () = take_over(&mut reload, &mut reloads) => unreachable!("it never ends"),
            () = crews.look() => {}
        }
    };
    tracing::info!("stopping");
    stopping.cancel();
    while let Some(ended) = relays.join_next().await {
        ended.context("a pipeline ended in a panic")?;
    }
    crews.leave().await;
    others.abort_all();
    let (rest, is_empty) = backlog::rest(&config.source, &shown).await;
    tracing::info!("stopped: {rest}");
    ended?;
    ensure!(
        !until_empty || is_done || is_empty,
        "asked to stop before everything was published: {rest}"
    );
    Ok(())
}

/// Begins what runs beside the relays: retention, and the HTTP interface with what it shows.
fn others(
    config: &Config,
    listener: Option<TcpListener>,
    holder: &str,
    metrics: telemetry::Exporter,
    relays: &watch::Receiver<Vec<ShownRelay>>,
) -> JoinSet<()> {
    let mut others = JoinSet::new();
    let retention = config.retention.clone();
    match &config.source {
        Source::Postgres(settings) => {
            let connector = settings.connector.clone();
            others.spawn(retention::postgres::Upkeep::new(connector, retention).run());
        }
        Source::Sqlite { path, .. } => {
            let options = sqlite_options(path);
            others.spawn(retention::sqlite::Upkeep::new(options, retention, wall_clock_us).run());
        }
    }
    if let Some(listener) = listener {
        tracing::info!(address = %config.admin.listen, "admin interface");
        let (backlogs, seen) = watch::channel(Backlogs::default());
        let (source, owner) = (config.source.clone(), holder.to_owned());
        let asks = backlog::watch(source, owner, relays.clone(), backlogs);
        others.spawn(async move { match asks.await {} });
        let interface = Shown::new(
            holder.to_owned(),
            relays.clone(),
            seen,
            metrics,
            (&config.source, &config.admin),
            wall_clock_us,
        );
        others.spawn(async move { match admin::serve(listener, interface).await {} });
    }
    others
}

/// Puts changed configurations into force, as far as that is possible, for ever.
async fn take_over(reload: &mut Reload, reloads: &mut mpsc::Receiver<Config>) {
    while let Some(new) = reloads.recv().await {
        match reload.apply(&new) {
            Ok(Reloaded { applied, refused }) if applied.is_empty() && refused.is_empty() => {
                tracing::info!(
                    "read the configuration again: nothing has changed; files with secrets are read at each new \
                     connection"
                );
            }
            Ok(Reloaded { applied, refused }) => {
                tracing::info!(applied = applied.join(", "), "reloaded the configuration");
                if !refused.is_empty() {
                    tracing::warn!(
                        keys = refused.join(", "),
                        "changed settings that need a restart: the old ones stay in force"
                    );
                }
            }
            Err(error) => tracing::error!(
                error = %format!("{error:#}"),
                "could not take the configuration over: the old one stays in force"
            ),
        }
    }
    std::future::pending::<()>().await;
}

type Production = Relay<AnySource, AnySink, AnyLedger>;

/// Puts the relay of one shard together; nothing connects before it runs.
pub(crate) fn assemble(
    config: &Config,
    pipeline: &PipelineConfig,
    shard: Shard,
    holder: &str,
) -> (Production, watch::Receiver<Status>) {
    let name = &pipeline.pipeline.name;
    let books = ledger::Settings {
        pipeline: name.clone(),
        shard,
        holder: holder.to_owned(),
        lease_ttl: config.relay.lease_ttl,
        start: pipeline.start,
    };
    let (source, ledger) = match &config.source {
        Source::Postgres(settings) => (
            AnySource::Postgres(Box::new(
                PostgresSource::new((**settings).clone()).of_shard(name.clone(), shard),
            )),
            AnyLedger::Postgres(Box::new(PostgresLedger::new(
                settings.connector.clone(),
                books,
            ))),
        ),
        Source::Sqlite {
            path,
            poll_interval,
        } => (
            AnySource::Sqlite(Box::new(SqliteSource::new(
                sqlite_options(path),
                *poll_interval,
            ))),
            AnyLedger::Sqlite(Box::new(SqliteLedger::new(sqlite_options(path), books))),
        ),
    };
    let (status, seen) = watch::channel(Status::starting());
    let relay = Relay {
        pipeline: pipeline.pipeline.clone(),
        shard,
        turn: Turn::always(),
        settings: config.relay.clone(),
        source,
        sink: sink(&config.sink, Some((name, shard))),
        ledger,
        status,
        changes: watch::channel(None).1,
        now_us: wall_clock_us,
    };
    (relay, seen)
}

/// A source for who only looks on: it reads all events, and writes nothing.
pub(crate) fn onlooker(source: &Source) -> AnySource {
    match source {
        Source::Postgres(settings) => {
            let mut settings = (**settings).clone();
            settings.mode = CaptureMode::Poll;
            AnySource::Postgres(Box::new(PostgresSource::new(settings).looking_on()))
        }
        Source::Sqlite {
            path,
            poll_interval,
        } => AnySource::Sqlite(Box::new(SqliteSource::new(
            sqlite_options(path),
            *poll_interval,
        ))),
    }
}

/// The same for the events of one shard of a pipeline.
pub(crate) fn onlooker_of(source: &Source, pipeline: &PipelineName, shard: Shard) -> AnySource {
    match onlooker(source) {
        AnySource::Postgres(source) => {
            AnySource::Postgres(Box::new(source.of_shard(pipeline.clone(), shard)))
        }
        source @ AnySource::Sqlite(_) => source,
    }
}

/// The end that events of a pipeline go to; connects when it is opened. Without a pipeline for what is published again, which
/// has no part in a pipeline's transactions.
pub(crate) fn sink(sink: &Sink, part: Option<(&PipelineName, Shard)>) -> AnySink {
    match sink {
        Sink::Kafka(settings) => {
            let settings = (**settings).clone();
            AnySink::Kafka(Box::new(KafkaSink::new(match part {
                Some((pipeline, shard)) => settings.of_shard(pipeline, shard),
                None => settings.at_least_once(),
            })))
        }
        Sink::Stdout => AnySink::Stdout(StdoutSink::new()),
    }
}

/// How the relay opens a SQLite outbox. A name that somebody mistyped makes no file: only `migrate` does.
#[must_use]
pub fn sqlite_options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(false)
}

/// The wall clock, in microseconds since the Unix epoch.
#[expect(
    clippy::disallowed_methods,
    reason = "the shell is where the clock is read"
)]
#[must_use]
pub fn wall_clock_us() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|since| i64::try_from(since.as_micros()).ok())
        .unwrap_or(0)
}

/// This process, unlike any other: host, process id and a random part (containers share both).
pub(crate) fn holder() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host: String = host
        .trim()
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || ".-_".contains(*c))
        .collect();
    let random = uuid::Uuid::new_v4().simple().to_string();
    format!("{host}:{}:{}", std::process::id(), &random[..8])
}
