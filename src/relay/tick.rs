//! Once a second: is anything in the way of a life, and what is there to report?

use std::time::Duration;

use tokio::time::Instant;

use super::publish::{Ended, Life, Publisher};
use super::status::{State, told};
use crate::sink::{Sink, SinkError};
use crate::telemetry::Levels;

/// Without a word of the sink for this long, and with records in flight, the pipeline counts as stalled.
const STALL: Duration = Duration::from_secs(3);
/// After so long a silence the sink is asked whether it will end, and again when it has lasted twice as long as it had when the
/// answer came, or this much longer: a question makes a client try to connect all the time.
const ASK: Duration = Duration::from_secs(5);
const ASK_AGAIN_MAX: Duration = Duration::from_secs(10);

/// How long the sink has to be silent before it is asked.
fn ask_after(life: &Life) -> Duration {
    let asked_at = life.asked_at.duration_since(life.heard_at);
    if asked_at.is_zero() {
        ASK
    } else {
        asked_at + asked_at.min(ASK_AGAIN_MAX)
    }
}

impl<K: Sink> Publisher<'_, K> {
    /// Says why the life has to end. With `asks` it may take some ten seconds, where the sink does not answer.
    pub(super) async fn tick(&mut self, life: &mut Life, asks: bool) -> Option<Ended> {
        if self.full.is_some_and(|full| self.has_room(full)) && life.is_idle() {
            return Some(Ended::Room);
        }
        let in_flight = life.awaited() > 0;
        // Nothing is under way that would show whether the trouble is over.
        let in_doubt = !in_flight && self.sink.trouble().is_some();
        let state = self.state(life, in_doubt);
        self.report(life, state);
        for warning in self.sink.warnings(false) {
            tracing::warn!(pipeline = %self.pipeline.name, "{warning}");
        }
        if self.sink.trouble().is_some()
            && let Some(reason) = self.sink.outdated()
        {
            return Some(Ended::Sink(SinkError(reason)));
        }
        if !asks {
            return None;
        }
        if in_doubt {
            let answer = self.sink.check().await;
            let state = match &answer {
                Ok(()) => self.state(life, false),
                Err(error) => Some(State::Stalled {
                    reason: error.to_string(),
                }),
            };
            self.report(life, state);
            if answer.is_ok() {
                return None;
            }
        }
        if (in_doubt || in_flight) && life.heard_at.elapsed() >= ask_after(life) {
            let cut_off = self.sink.is_cut_off().await;
            // Behind the answer, which takes some seconds: they are not to be followed by the next question.
            life.asked_at = Instant::now();
            if cut_off {
                let reason = "the sink answers others, but this client no longer: it begins again";
                return Some(Ended::Sink(SinkError(reason.to_owned())));
            }
        }
        None
    }

    /// None where the last one stands.
    fn state(&self, life: &Life, in_doubt: bool) -> Option<State> {
        let silent = life.heard_at.elapsed();
        if in_doubt {
            None
        } else if life.awaited() > 0 && silent >= STALL {
            let unknown = || {
                format!(
                    "the sink has confirmed nothing for {} s and more",
                    told(silent, STALL).as_secs()
                )
            };
            Some(State::Stalled {
                reason: self.sink.trouble().unwrap_or_else(unknown),
            })
        } else if let Some(full) = self.full {
            Some(State::Halted {
                reason: full.reason.clone(),
            })
        } else if let Some(reason) = life.lookups.trouble() {
            Some(State::Stalled { reason })
        } else {
            // A source that has not answered yet may be what is in the way.
            self.answered.borrow().then_some(State::Running)
        }
    }

    /// Metrics and status; without a state the last one stands.
    pub(super) fn report(&mut self, life: &mut Life, state: Option<State>) {
        for (reason, events) in self.rejections.rest(Instant::now()) {
            tracing::error!(pipeline = %self.pipeline.name, events, reason,
                "and so many more events were rejected with this reason: `outbox-relay parked list --by error`");
        }
        let delivered = life.topics.flush();
        self.metrics.filtered(std::mem::take(&mut life.filtered));
        self.metrics.latencies(&mut life.latencies);
        let last_id = self.settled.borrow().last_id.0;
        self.status.send_modify(|status| {
            if let Some(state) = state {
                status.set_state(&self.pipeline.name, state, (self.now_us)());
            }
            status.last_id = last_id;
            status.in_flight_events = life.in_flight.rows();
            status.in_flight_bytes = life.in_flight.bytes();
            status.delivered_events += delivered;
            status.waiting_entities = self.waiting.len();
        });
        let status = self.status.borrow();
        self.metrics.levels(Levels {
            in_flight_events: status.in_flight_events,
            in_flight_bytes: status.in_flight_bytes,
            waiting_entities: status.waiting_entities,
            set_aside_events: self.set_aside_events(),
        });
    }
}
