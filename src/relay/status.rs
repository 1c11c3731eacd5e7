//! What a pipeline says about itself: read by readiness, `/status` and metrics.

use std::mem::discriminant;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

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
        /// The event by its id, a colon, and why. What comes before the colon names no entity.
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

    /// The same without what an event or its entity is called, for people who may not know that.
    #[must_use]
    pub fn without_names(self) -> Self {
        match self {
            Self::Halted { reason } => {
                let (event, _) = reason.split_once(": ").unwrap_or(("an event", ""));
                let reason = format!(
                    "{event}: the log says why, and this answer does where it is asked for with the token of admin.token"
                );
                Self::Halted { reason }
            }
            state => state,
        }
    }

    /// Whether both are the same state, whatever the reason.
    fn is_same_kind(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
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
    /// Confirmed by the sink since the process started.
    pub delivered_events: u64,
    /// Entities that wait behind a parked event.
    pub waiting_entities: usize,
    /// When it came into this state; of another process that is not known here.
    #[serde(skip)]
    since: Option<Instant>,
    /// When the log last said that it is in this state.
    #[serde(skip)]
    told_at: Option<Instant>,
}

/// A stall or a halt is told again after so long.
const TELL_AGAIN: Duration = Duration::from_mins(5);

impl Status {
    /// For how long it has been in this state.
    #[must_use]
    pub fn lasts(&self) -> Option<Duration> {
        self.since.map(|since| since.elapsed())
    }

    /// Changes the state, and logs the change: once, where it becomes known. A stall or a halt that lasts is told again every
    /// five minutes.
    pub(crate) fn set_state(&mut self, pipeline: &PipelineName, state: State, now_us: i64) {
        if self.state == state {
            self.tell_again(pipeline);
            return;
        }
        let lasted = humantime::format_duration(Duration::from_secs(
            self.lasts().unwrap_or_default().as_secs(),
        ));
        if discriminant(&self.state) != discriminant(&state) {
            self.state_since_us = now_us;
        }
        match &state {
            State::Stalled { reason } if self.state.is_same_kind(&state) => {
                tracing::warn!(%pipeline, %reason, "stalled for {lasted}, trying again");
            }
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
            State::Running
                if matches!(self.state, State::Stalled { .. } | State::Halted { .. }) =>
            {
                tracing::info!(%pipeline, "moving again after {lasted}");
            }
            State::Running => match &self.state {
                State::Standby { holder } => {
                    tracing::info!(%pipeline, from = %holder, "running: took over");
                }
                _ => tracing::info!(%pipeline, "running"),
            },
            State::Starting | State::Stopped => tracing::info!(%pipeline, "stopped"),
        }
        if !self.state.is_same_kind(&state) {
            self.since = Some(Instant::now());
        }
        self.told_at = Some(Instant::now());
        self.state = state;
    }

    fn tell_again(&mut self, pipeline: &PipelineName) {
        if self.told_at.is_some_and(|at| at.elapsed() < TELL_AGAIN) {
            return;
        }
        self.told_at = Some(Instant::now());
        let lasts = self.lasts().unwrap_or_default().as_secs();
        let lasts = humantime::format_duration(Duration::from_secs(lasts));
        match &self.state {
            State::Stalled { reason } => {
                tracing::warn!(%pipeline, %reason, "still stalled, for {lasts} now: trying again");
            }
            State::Halted { reason } => {
                tracing::error!(%pipeline, %reason, "still halted, for {lasts} now");
            }
            _ => {}
        }
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
            delivered_events: 0,
            waiting_entities: 0,
            since: Some(Instant::now()),
            told_at: None,
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

    fn stalled(reason: &str) -> State {
        let reason = reason.to_owned();
        State::Stalled { reason }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stall_lasts_from_its_beginning_whatever_its_reasons_and_is_told_again() {
        let pipeline: PipelineName = "main".parse().unwrap();
        let mut status = Status::starting();
        status.set_state(&pipeline, stalled("the broker is away"), 0);
        tokio::time::advance(Duration::from_mins(4)).await;
        status.set_state(&pipeline, stalled("the broker refuses"), 0);
        assert_eq!(status.lasts(), Some(Duration::from_mins(4)));
        let told_at = status.told_at;
        tokio::time::advance(Duration::from_mins(4)).await;
        status.set_state(&pipeline, stalled("the broker refuses"), 0);
        assert_eq!(status.told_at, told_at, "told four minutes ago");
        tokio::time::advance(Duration::from_mins(1)).await;
        status.set_state(&pipeline, stalled("the broker refuses"), 0);
        assert_eq!(status.told_at, Some(Instant::now()));
        assert_eq!(status.lasts(), Some(Duration::from_mins(9)));
        status.set_state(&pipeline, State::Running, 0);
        assert_eq!(status.lasts(), Some(Duration::ZERO));
    }

    #[test]
    fn without_names_a_halt_says_which_event_and_no_more() {
        let reason = "event 7: no legal topic: \"order 17\"".to_owned();
        let State::Halted { reason } = (State::Halted { reason }).without_names() else {
            unreachable!("it stays halted");
        };
        assert!(
            reason.starts_with("event 7: ") && !reason.contains("order"),
            "{reason}"
        );
        let kept = stalled("connect: refused");
        assert_eq!(kept.clone().without_names(), kept);
    }
}
