//! `outbox-relay run`: the daemon.

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::{ConfigArgs, Outcome};
use crate::{logging, supervise};

/// Publish until asked to stop.
#[derive(Debug, Args)]
pub(super) struct Run {
    #[command(flatten)]
    config: ConfigArgs,
}

impl Run {
    pub(super) async fn run(self) -> Result<Outcome, anyhow::Error> {
        let config = self.config.load()?;
        logging::install(&config.log)?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut asked = async move || {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        let (stop, stopping) = tokio::sync::oneshot::channel();
        let stopping = async {
            // A sender that is gone would mean that nobody can ask any more.
            let _ = stopping.await;
        };
        let signals = async {
            asked().await;
            let _ = stop.send(());
            asked().await;
        };
        tokio::select! {
            ended = supervise::run(config, stopping) => ended.map(|()| Outcome::Done),
            () = signals => Err(anyhow::anyhow!("asked a second time to stop: stopped without draining")),
        }
    }
}
