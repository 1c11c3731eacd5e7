//! Waits until it is worth looking at the log again: by the clock, or woken by NOTIFY.
//!
//! Hints change latency only (I7): whatever is lost here, the next poll finds the rows. Nothing that goes wrong with them
//! keeps a poll waiting either.

use std::time::Duration;

use futures_util::FutureExt;
use tokio::time::{Instant, sleep_until};

use super::Connector;
use super::listener::{Heard, Listener};
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

pub(super) struct Hints {
    mode: CaptureMode,
    connector: Connector,
    ear: Listener,
    /// Whether it is known that nobody listens.
    told: bool,
    unhinted: Unhinted,
    /// Whether all notifications were taken since the last look.
    waited: bool,
    pace: Pace,
}

/// Events that were found without a notification since the last one.
#[derive(Default)]
struct Unhinted {
    looks: u32,
    since: Option<Instant>,
    /// Whether notifications are not relied upon any more.
    deaf: bool,
}

impl Unhinted {
    /// So many looks in a row find events without any notification, over this time, before it counts: one long transaction keeps
    /// others from notifying for a moment.
    const LOOKS: u32 = 5;
    const OVER: Duration = Duration::from_secs(10);

    /// Whether it is known from now on that notifications do not come.
    fn found(&mut self, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        self.looks += 1;
        let shows = self.looks >= Self::LOOKS && now.duration_since(since) >= Self::OVER;
        shows && !std::mem::replace(&mut self.deaf, true)
    }

    /// One came. Whether that is news.
    fn hinted(&mut self) -> bool {
        std::mem::take(self).deaf
    }
}

impl Hints {
    pub(super) fn new(mode: CaptureMode, connector: Connector, poll_interval: Duration) -> Self {
        let now = Instant::now();
        Self {
            mode,
            connector,
            ear: Listener::Closed(now),
            told: false,
            unhinted: Unhinted::default(),
            waited: false,
            pace: Pace::new(mode, poll_interval, now),
        }
    }

    /// A look has found these events, when `ceiling` was the newest id that had been handed out.
    pub(super) fn looked(
        &mut self,
        ceiling: EventId,
        found: impl ExactSizeIterator<Item = EventId>,
    ) {
        let now = Instant::now();
        // Behind a look that nothing was waited for, notifications may lie unread.
        let waited = std::mem::take(&mut self.waited);
        if found.len() > 0 && waited && self.ear.is_open() && self.unhinted.found(now) {
            tracing::warn!(
                "events come and no notification of them: the trigger of outbox.events is disabled, outbox.notify is off, a \
                 pooler stands between, or a transaction that has emitted stays open and keeps others from notifying; polling \
                 until a notification comes"
            );
        }
        self.pace.looked(ceiling, found, now);
    }

    /// What comes next is at another place of the log.
    pub(super) fn sought(&mut self) {
        self.pace.sought(Instant::now());
    }

    /// Nobody waits for a while.
    pub(super) fn rest(&mut self) {
        // A pause after an attempt that failed goes on.
        if !matches!(self.ear, Listener::Closed(_)) {
            self.ear = Listener::Closed(Instant::now());
        }
        // What was found without one meanwhile tells nothing.
        if !self.unhinted.deaf {
            self.unhinted = Unhinted::default();
        }
    }

    /// # Cancel safety
    /// Safe: a connection that is being made is gone on with, and a lost hint costs latency only.
    pub(super) async fn wait(&mut self) {
        if self.pace.is_crowded() {
            // Nobody has to be told, and the server need not tell.
            self.rest();
        } else if self.mode == CaptureMode::Listen
            && matches!(self.ear, Listener::Closed(until) if Instant::now() >= until)
        {
            self.ear = Listener::opening(self.connector.clone());
        }
        let relies = self.ear.is_open() && !self.unhinted.deaf;
        let due = self.pace.next(relies);
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
        self.waited = true;
    }

    /// Whether there is a reason to look now.
    fn note(&mut self, heard: Result<Heard, anyhow::Error>) -> bool {
        match heard {
            Ok(Heard::Alive) => false,
            Ok(heard) => {
                if matches!(heard, Heard::Notification) && self.unhinted.hinted() {
                    tracing::info!("notifications come again");
                }
                if matches!(heard, Heard::Begun) && std::mem::take(&mut self.told) {
                    tracing::info!("listening for notifications again");
                }
                self.pace.hinted();
                true
            }
            Err(error) => {
                self.ear = Listener::Closed(Instant::now() + RECONNECT);
                if !std::mem::replace(&mut self.told, true) {
                    let error = reason(&error);
                    tracing::warn!(%error, "cannot listen for notifications, polling until that works again");
                }
                false
            }
        }
    }
}
