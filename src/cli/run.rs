//! `outbox-relay run`: the daemon.

use std::future::Future;
use std::time::{Duration, SystemTime};

use anyhow::Error;
use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;

use super::{ConfigArgs, Outcome, check, version};
use crate::config::{Config, Sink};
use crate::reload::Reload;
use crate::{logging, supervise};

/// The configuration file is looked at this often; notifications of the file system miss mounted volumes.
const LOOK: Duration = Duration::from_secs(2);

/// Publish until asked to stop.
///
/// SIGTERM or SIGINT: publish what is committed by then, within relay.drain_timeout, and stop; a second one stops at once. SIGHUP, or a changed file: take the new configuration over,
/// as far as that needs no restart.
#[derive(Debug, Args)]
pub(super) struct Run {
    #[command(flatten)]
    config: ConfigArgs,
    /// End as soon as everything is published that was committed at the beginning, whichever relay does that.
    ///
    /// For jobs. Ends with 1 when a pipeline halts, or when a signal comes before that and events are left. Parked events
    /// and dead letters are not waited for.
    #[arg(long)]
    until_empty: bool,
}

impl Run {
    pub(super) async fn run(self) -> Result<Outcome, Error> {
        // Before anything is read: what changes from here on is seen.
        let hang_up = signal(SignalKind::hangup())?;
        let changed_at = self.config.changed_at();
        let config = self.config.load()?;
        config.try_out()?;
        let set_log_level = logging::install(&config.log)?;
        self.config.announce(&config);
        if matches!(config.sink, Sink::Stdout) {
            tracing::warn!(
                "sink.kind is \"stdout\": what is printed counts as published, and Kafka will not get it; `outbox-relay tail` \
                 shows events without that"
            );
        }
        let (stop, stopping) = oneshot::channel();
        let stopping = async {
            // A sender that is gone would mean that nobody can ask any more.
            let _ = stopping.await;
        };
        let (reloads, new_configs) = mpsc::channel(1);
        let reload = Reload::new(&config, set_log_level);
        let signals = signals(stop)?;
        tokio::select! {
            ended = supervise::run(config, self.until_empty, reload, new_configs, stopping) => ended.map(|()| Outcome::Done),
            error = signals => Err(error),
            () = self.config.watch(hang_up, changed_at, reloads) => unreachable!("it never ends"),
        }
    }
}

/// Asks to stop at the first signal; the second one is the end.
fn signals(stop: oneshot::Sender<()>) -> Result<impl Future<Output = Error>, Error> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut asked = async move || {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    Ok(async move {
        asked().await;
        // Whoever would stop may be gone already.
        let _ = stop.send(());
        asked().await;
        anyhow::anyhow!("asked a second time to stop: stopped without draining")
    })
}

impl ConfigArgs {
    /// The first words of the log: what is running, between which ends, with which settings.
    fn announce(&self, config: &Config) {
        let file = self
            .file()
            .map_or_else(|| "no file".to_owned(), |file| file.display().to_string());
        let pipelines: Vec<&str> = config
            .pipelines
            .iter()
            .map(|pipeline| pipeline.pipeline.name.as_str())
            .collect();
        tracing::info!(
            from = check::source(config),
            to = check::sink(config),
            pipelines = pipelines.join(", "),
            configuration = format!("{file} and {} variables", config.variables),
            "outbox-relay {}",
            version()
        );
        for weakness in config.weaknesses() {
            tracing::warn!("{weakness}");
        }
    }

    /// When the file was written; none without a file.
    fn changed_at(&self) -> Option<SystemTime> {
        std::fs::metadata(self.file()?)
            .and_then(|file| file.modified())
            .ok()
    }

    /// Reads the configuration again at every SIGHUP and whenever the file has changed, for ever.
    async fn watch(
        &self,
        mut hang_up: Signal,
        mut seen: Option<SystemTime>,
        reloads: mpsc::Sender<Config>,
    ) {
        loop {
            let asked = tokio::select! {
                _ = hang_up.recv() => true,
                () = sleep(LOOK) => false,
            };
            let changed_at = self.changed_at();
            // A file that is gone for a moment is being replaced.
            if !asked && (changed_at == seen || changed_at.is_none()) {
                continue;
            }
            seen = changed_at;
            match self.load() {
                // Nobody takes it when everything ends.
                Ok(config) => drop(reloads.send(config).await),
                Err(error) => {
                    tracing::error!(%error, "the changed configuration is wrong: the old one stays in force");
                }
            }
        }
    }
}
