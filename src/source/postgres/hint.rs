//! Decides when to look at the log again: by the clock, or woken by NOTIFY.
//!
//! Hints change latency only (I7): whatever is lost here, the next poll finds the rows.

use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgListener};
use tokio::time::{Instant, sleep_until, timeout};

/// How the source learns of new events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CaptureMode {
    /// Looks at intervals that grow while nothing comes.
    Poll,
    /// Is woken by a NOTIFY on a direct connection, and polls slowly beside it.
    Listen,
}

/// After events came, more are expected: look again this soon, then less and less often.
const INTERVAL_MIN: Duration = Duration::from_millis(1);
/// For this long after a wake-up or an event the log is polled hot: of many open transactions only one notifies, so the
/// others' commits come without a hint.
const HOT: Duration = Duration::from_millis(20);
/// The safety net below notifications.
const LISTEN_POLL: Duration = Duration::from_secs(1);
/// Between attempts to listen again.
const RECONNECT: Duration = Duration::from_secs(5);

pub(super) struct Hints {
    mode: CaptureMode,
    options: PgConnectOptions,
    poll_interval: Duration,
    listener: Option<PgListener>,
    reconnect_at: Instant,
    interval: Duration,
    hot_until: Instant,
    looked_at: Instant,
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
            poll_interval,
            listener: None,
            reconnect_at: now,
            interval: INTERVAL_MIN,
            hot_until: now,
            looked_at: now,
        }
    }

    pub(super) fn looked(&mut self) {
        self.looked_at = Instant::now();
    }

    pub(super) fn found(&mut self, events: usize) {
        if events > 0 {
            self.interval = INTERVAL_MIN;
            self.hot_until = Instant::now() + HOT;
        }
    }

    pub(super) async fn wait(&mut self) {
        match self.mode {
            CaptureMode::Poll => self.wait_for_clock().await,
            CaptureMode::Listen => self.wait_for_notify().await,
        }
    }

    async fn wait_for_clock(&mut self) {
        sleep_until(self.looked_at + self.interval.min(self.poll_interval)).await;
        self.interval = (self.interval * 2).min(self.poll_interval);
    }

    async fn wait_for_notify(&mut self) {
        if self.listener.is_none() && Instant::now() >= self.reconnect_at {
            self.listen().await;
        }
        let due = self.looked_at + self.next_poll();
        let Some(listener) = &mut self.listener else {
            sleep_until(due).await;
            self.interval = (self.interval * 2).min(self.poll_interval);
            return;
        };
        tokio::select! {
            notified = listener.recv() => match notified {
                Ok(_) => {
                    self.hot_until = Instant::now() + HOT;
                    self.interval = INTERVAL_MIN;
                }
                Err(error) => {
                    tracing::warn!(error = %error, "stopped listening for notifications, polling instead");
                    self.listener = None;
                    self.reconnect_at = Instant::now() + RECONNECT;
                }
            },
            () = sleep_until(due) => {}
        }
    }

    fn next_poll(&mut self) -> Duration {
        if Instant::now() < self.hot_until {
            INTERVAL_MIN
        } else if self.listener.is_some() {
            LISTEN_POLL
        } else {
            self.interval.min(self.poll_interval)
        }
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
            Ok(Ok(listener)) => self.listener = Some(listener),
            Ok(Err(error)) => {
                tracing::warn!(error = %error, "could not listen for notifications, polling instead");
            }
            Err(_) => tracing::warn!("no answer when starting to listen, polling instead"),
        }
    }
}
