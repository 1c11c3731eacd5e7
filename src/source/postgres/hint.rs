//! Waits until it is worth looking at the log again: by the clock, or woken by NOTIFY.
//!
//! Hints change latency only (I7): whatever is lost here, the next poll finds the rows. Nothing that goes wrong with them
//! keeps a poll waiting either.

use std::future::{Future, pending};
use std::pin::Pin;
use std::time::Duration;

use anyhow::anyhow;
use futures_util::FutureExt;
use sqlx::postgres::{PgListener, PgPoolOptions};
use tokio::time::{Instant, sleep_until, timeout};

use super::Connector;
use super::pace::Pace;
use crate::event::EventId;
use crate::reason::reason;

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
/// An attempt may take this long.
const CONNECT_MAX: Duration = Duration::from_secs(5);

pub(super) struct Hints {
    mode: CaptureMode,
    connector: Connector,
    ear: Ear,
    /// Whether it is known that nobody listens.
    told: bool,
    pace: Pace,
}

/// The connection that is notified.
enum Ear {
    /// There is none, and none is made before this time.
    Closed(Instant),
    /// It is being made, beside the polls.
    Opening(Pin<Box<dyn Future<Output = Result<PgListener, anyhow::Error>> + Send>>),
    /// What comes has to be taken: the server keeps it for who listens and does not read, until no transaction of anybody
    /// can notify any more.
    Open(PgListener),
}

impl Hints {
    pub(super) fn new(mode: CaptureMode, connector: Connector, poll_interval: Duration) -> Self {
        let now = Instant::now();
        Self {
            mode,
            connector,
            ear: Ear::Closed(now),
            told: false,
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

    /// Nobody waits for a while.
    pub(super) fn rest(&mut self) {
        // A pause after an attempt that failed goes on.
        if !matches!(self.ear, Ear::Closed(_)) {
            self.ear = Ear::Closed(Instant::now());
        }
    }

    /// # Cancel safety
    /// Safe: a connection that is being made is gone on with, and a lost hint costs latency only.
    pub(super) async fn wait(&mut self) {
        if self.pace.is_crowded() {
            // Nobody has to be told, and the server need not tell.
            self.rest();
        } else if self.mode == CaptureMode::Listen
            && matches!(self.ear, Ear::Closed(until) if Instant::now() >= until)
        {
            self.ear = Ear::Opening(Box::pin(listen(self.connector.clone())));
        }
        let due = self.pace.next(matches!(self.ear, Ear::Open(_)));
        // What was heard may be due already.
        tokio::select! {
            biased;
            heard = self.ear.hear() => if self.note(heard) {
                sleep_until(self.pace.after_hint()).await;
            },
            () = sleep_until(due) => {}
        }
        // One look answers all the notifications that came before it. What is not at hand wakes the next wait.
        while let Some(heard) = self.ear.hear().now_or_never() {
            self.note(heard);
        }
    }

    /// Whether there is a reason to look now.
    fn note(&mut self, heard: Result<Heard, anyhow::Error>) -> bool {
        match heard {
            Ok(heard) => {
                if matches!(heard, Heard::Begun) && std::mem::take(&mut self.told) {
                    tracing::info!("listening for notifications again");
                }
                self.pace.hinted();
                true
            }
            Err(error) => {
                self.ear = Ear::Closed(Instant::now() + RECONNECT);
                if !std::mem::replace(&mut self.told, true) {
                    let error = reason(&error);
                    tracing::warn!(%error, "cannot listen for notifications, polling until that works again");
                }
                false
            }
        }
    }
}

/// What wakes.
enum Heard {
    /// What was committed before did not notify this connection.
    Begun,
    Notification,
}

impl Ear {
    /// # Cancel safety
    /// Safe, as [`Hints::wait`].
    async fn hear(&mut self) -> Result<Heard, anyhow::Error> {
        match self {
            Self::Closed(_) => pending().await,
            Self::Opening(opening) => {
                *self = Self::Open(opening.await?);
                Ok(Heard::Begun)
            }
            Self::Open(listener) => match listener.try_recv().await? {
                Some(_) => Ok(Heard::Notification),
                None => Err(anyhow!("the connection was lost")),
            },
        }
    }
}

async fn listen(connector: Connector) -> Result<PgListener, anyhow::Error> {
    // Says why it fails: a pool asks again and again, and in the end only that there was no time left.
    drop(connector.connect().await?);
    let options = connector.current()?;
    let listening = async {
        let pool = PgPoolOptions::new()
            .max_connections(1)
            .connect_with(options)
            .await?;
        let mut listener = PgListener::connect_with(&pool).await?;
        // Else it would connect again by itself, for half a minute, and without a word.
        listener.eager_reconnect(false);
        listener.listen("outbox_events").await?;
        Ok(listener)
    };
    match timeout(CONNECT_MAX, listening).await {
        Ok(listening) => listening,
        Err(_) => Err(anyhow!("no answer within {} s", CONNECT_MAX.as_secs())),
    }
}
