//! Waits until it is worth looking at the log again: by the clock, or woken by NOTIFY.
//!
//! Hints change latency only (I7): whatever is lost here, the next poll finds the rows.

use std::time::Duration;

use futures_util::FutureExt;
use sqlx::postgres::{PgConnectOptions, PgListener};
use tokio::time::{Instant, sleep_until, timeout};

use super::pace::Pace;
use crate::event::EventId;

/// How the source learns of new events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CaptureMode {
    /// Looks at intervals that grow while nothing comes.
    Poll,
    /// Is woken by a NOTIFY on a direct connection, and polls slowly beside it.
    Listen,
}

/// Between attempts to listen again.
const RECONNECT: Duration = Duration::from_secs(5);

pub(super) struct Hints {
    mode: CaptureMode,
    options: PgConnectOptions,
    listener: Option<PgListener>,
    reconnect_at: Instant,
    pace: Pace,
}

impl Hints {
    pub(super) fn new(
        mode: CaptureMode,
        options: PgConnectOptions,
        poll_interval: Duration,
    ) -> Self {
        let now = Instant::now();
        Self {
            mode,
            options,
            listener: None,
            reconnect_at: now,
            pace: Pace::new(mode, poll_interval, now),
        }
    }

    /// A look has found these events, when `ceiling` was the newest id that had been handed out.
    pub(super) fn looked(
        &mut self,
        ceiling: EventId,
        found: impl ExactSizeIterator<Item = EventId>,
    ) {
        self.pace.looked(ceiling, found, Instant::now());
    }

    /// What comes next is at another place of the log.
    pub(super) fn sought(&mut self) {
        self.pace.sought(Instant::now());
    }

    pub(super) async fn wait(&mut self) {
        if self.pace.is_crowded() {
            // Nobody has to be told, and the server need not tell.
            self.listener = None;
            self.reconnect_at = Instant::now();
        } else if self.mode == CaptureMode::Listen
            && self.listener.is_none()
            && Instant::now() >= self.reconnect_at
        {
            self.listen().await;
        }
        let due = self.pace.next(self.listener.is_some());
        match &mut self.listener {
            Some(listener) => tokio::select! {
                notified = listener.recv() => match notified {
                    Ok(_) => {
                        self.pace.hinted();
                        sleep_until(self.pace.after_hint()).await;
                    }
                    Err(error) => self.stop_listening(&error),
                },
                () = sleep_until(due) => {}
            },
            None => sleep_until(due).await,
        }
        self.take_what_came();
    }

    /// One look answers all the notifications that came before it.
    fn take_what_came(&mut self) {
        while let Some(listener) = &mut self.listener {
            match listener.recv().now_or_never() {
                Some(Ok(_)) => self.pace.hinted(),
                Some(Err(error)) => self.stop_listening(&error),
                None => return,
            }
        }
    }

    fn stop_listening(&mut self, error: &sqlx::Error) {
        tracing::warn!(%error, "stopped listening for notifications, polling instead");
        self.listener = None;
        self.reconnect_at = Instant::now() + RECONNECT;
    }

    async fn listen(&mut self) {
        self.reconnect_at = Instant::now() + RECONNECT;
        let connecting = async {
            let pool = sqlx::postgres::PgPoolOptions::new()
                .max_connections(1)
                .connect_with(self.options.clone())
                .await?;
            let mut listener = PgListener::connect_with(&pool).await?;
            listener.listen("outbox_events").await?;
            Ok::<_, sqlx::Error>(listener)
        };
        match timeout(Duration::from_secs(5), connecting).await {
            Ok(Ok(listener)) => {
                self.listener = Some(listener);
                // What was committed before that did not notify it.
                self.pace.hinted();
            }
            Ok(Err(error)) => {
                tracing::warn!(error = %error, "could not listen for notifications, polling instead");
            }
            Err(_) => tracing::warn!("no answer when starting to listen, polling instead"),
        }
    }
}
