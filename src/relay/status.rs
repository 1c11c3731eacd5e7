//! What a pipeline says about itself: read by readiness, `/status` and metrics.

use std::mem::discriminant;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::event::PipelineName;
use crate::ledger::Pause;

/// What a pipeline is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum State {
    /// Not yet connected.
    Starting,
    /// Another relay owns the pipeline; this one takes over when its lease ends.
    Standby {
        /// The owner.
        holder: String,
    },
    /// Publishing, or waiting for something to publish.
    Running,
    /// Nothing moves, and it is tried again until it does.
    Stalled {
        /// What is in the way.
        reason: String,
    },
    /// An event was rejected and the policy is to stop. A restart tries again.
    Halted {
        /// The event and why.
        reason: String,
    },
    /// An operator has paused the pipeline: no relay owns it, and its position stands.
    Paused {
        /// Since when, by whom, why.
        #[serde(flatten)]
        pause: Pause,
    },
    /// Stopped on request.
    Stopped,
}

impl State {
    /// Whether a load balancer or an operator may take the pipeline for healthy. One that is paused does what it was told.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        matches!(
            self,
            Self::Running | Self::Standby { .. } | Self::Paused { .. }
        )
    }
}

/// A pipeline at a glance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// What it is doing, and why if it is not moving.
    #[serde(flatten)]
    pub state: State,
    /// Since when, in microseconds since the Unix epoch; another reason for the same state is no new beginning.
    #[serde(default)]
    pub state_since_us: i64,
    /// The last id up to which everything is delivered, parked or left out, but for transactions that were in progress when
    /// the log was read: theirs come behind it all the same.
    pub last_id: i64,
    /// The newest id that the log had handed out when it was last read.
    pub newest_id: i64,
    /// Events handed over and not confirmed.
    pub in_flight_events: usize,
    /// Their bytes.
    pub in_flight_bytes: usize,
    /// When the oldest event that was read and is not confirmed was emitted, in microseconds since the Unix epoch.
    pub oldest_unpublished_us: Option<i64>,
    /// Confirmed by the sink since the process started.
    pub delivered_events: u64,
    /// Entities that wait behind a parked event.
    pub waiting_entities: usize,
}

impl Status {
    /// Changes the state, and logs the change: once, where it becomes known.
    pub(crate) fn set_state(&mut self, pipeline: &PipelineName, state: State, now_us: i64) {
        if self.state == state {
            return;
        }
        let lasted_seconds = now_us.saturating_sub(self.state_since_us) / 1_000_000;
        if discriminant(&self.state) != discriminant(&state) {
            self.state_since_us = now_us;
        }
        match &state {
            State::Stalled { reason } => {
                tracing::warn!(%pipeline, %reason, "stalled, trying again");
            }
            State::Halted { reason } => tracing::error!(%pipeline, %reason, "halted"),
            State::Standby { holder } => tracing::info!(%pipeline, %holder, "standing by"),
            State::Paused { pause } => {
                let Pause { since, by, reason } = pause;
                tracing::warn!(%pipeline, since, by, reason,
                    "paused: `outbox-relay pipelines resume {pipeline}` lets it go on");
            }
            State::Running if matches!(self.state, State::Stalled { .. }) => {
                tracing::info!(%pipeline, lasted_seconds, "moving again");
            }
            State::Running => tracing::info!(%pipeline, "running"),
            State::Starting | State::Stopped => tracing::info!(%pipeline, "stopped"),
        }
        self.state = state;
    }

    /// Of a pipeline that has not begun.
    #[must_use]
    pub fn starting() -> Self {
        Self {
            state: State::Starting,
            state_since_us: 0,
            last_id: 0,
            newest_id: 0,
            in_flight_events: 0,
            in_flight_bytes: 0,
            oldest_unpublished_us: None,
            delivered_events: 0,
            waiting_entities: 0,
        }
    }
}

/// The longest of `least`, which has seconds, and its doubles that a silence has lasted. Told when that changes, an hour is
/// eleven lines of log.
pub(super) fn told(silent: Duration, least: Duration) -> Duration {
    let times = (silent.as_secs() / least.as_secs()).max(1);
    least * 2_u32.saturating_pow(times.ilog2())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_silence_of_an_hour_is_told_eleven_times() {
        let told = |ms| told(Duration::from_millis(ms), Duration::from_secs(3)).as_secs();
        assert_eq!([5999, 6000, 47_000].map(told), [3, 6, 24]);
        let lines: BTreeSet<u64> = (3..=3600).map(|s| told(s * 1000)).collect();
        assert_eq!(lines.len(), 11);
    }
}
