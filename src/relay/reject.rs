//! Events that can't be published: the policies, and their limits.

use tokio::time::Instant;

use super::books::Order;
use super::publish::{Ended, Life, Pause, Publisher};
use super::redrive::Try;
use super::topics::Topics;
use super::{Pipeline, Policy};
use crate::encode::{Texts, dead_letter};
use crate::event::{Event, EventId, EventKey, PipelineName, Rejection};
use crate::ledger::Parked;
use crate::sink::{Refused, Sink};

/// Why nothing more can be set aside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Full {
    /// Aggregate type and id, where it is the entity that has too many.
    pub(super) entity: Option<(String, String)>,
    /// Events that may be set aside beyond the limits.
    margin: usize,
    /// With what to type.
    pub(super) reason: String,
}

/// An event at which the pipeline stops.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Halt {
    pub(super) event: EventKey,
    /// Type and id of its entity.
    entity: String,
    pub(super) rejection: Rejection,
}

impl Halt {
    pub(super) fn of(event: &Event, rejection: Rejection) -> Self {
        Self {
            event: event.key(),
            entity: format!("{}/{}", event.aggregate_type, event.aggregate_id),
            rejection,
        }
    }

    /// With what to type. Before the first colon nothing names the entity: see [`super::status::State::without_names`].
    pub(super) fn reason(&self, pipeline: &PipelineName) -> String {
        let Self {
            event: EventKey { id, event_id },
            entity,
            rejection,
        } = self;
        format!(
            "event {id}: it is of {entity:?} and can't be published: {rejection}. The pipeline stops here (on_rejected = \"halt\"): mend the cause \
             and restart the relay, or leave this event out with `outbox-relay pipelines skip {pipeline} {event_id} --reason …`"
        )
    }
}

impl<K: Sink> Publisher<'_, K> {
    /// Does with a rejected event what the policy says; none when it is done.
    pub(super) fn reject(
        &mut self,
        life: &mut Life,
        event: &Event,
        bytes: usize,
        rejection: Rejection,
    ) -> Result<Option<Pause>, Ended> {
        match self.pipeline.on_rejected {
            Policy::Park => self.set_aside(life, event, bytes, Some(rejection)),
            Policy::DeadLetter => self.dead_letter(life, event, bytes, rejection),
            Policy::Drop => {
                tracing::error!(
                    pipeline = %self.pipeline.name,
                    event = event.id.0,
                    aggregate_type = &event.aggregate_type[..],
                    aggregate_id = &event.aggregate_id[..],
                    reason = %rejection,
                    "dropped an event that can't be published"
                );
                self.metrics.dropped(1);
                self.suspects.acquit(event.key());
                let seq = life.place(event, 0, Topics::NONE);
                life.in_flight.settle(seq);
                Ok(None)
            }
            Policy::Halt => {
                // What is in flight would be published again after the halt.
                if let Some(pause) = self.pause_for_flight(life) {
                    return Ok(Some(pause));
                }
                Err(Ended::Halted(Halt::of(event, rejection)))
            }
        }
    }

    /// Stores an event that an operator wants left out as a dead letter: its entity goes on.
    pub(super) fn skip(&mut self, life: &mut Life, event: &Event, bytes: usize, reason: String) {
        tracing::warn!(
            pipeline = %self.pipeline.name,
            event = event.id.0,
            reason,
            "left an event out and keeps it as a dead letter; later events of its entity go on"
        );
        self.dead_letters.insert(event.key());
        self.suspects.acquit(event.key());
        let seq = life.place(event, bytes, Topics::NONE);
        life.parking_seqs.push(seq);
        life.parking.push(Parked {
            event: event.clone(),
            error: Some(reason),
            holds: false,
        });
    }

    /// Parks an event; its entity waits from now on.
    pub(super) fn set_aside(
        &mut self,
        life: &mut Life,
        event: &Event,
        bytes: usize,
        rejection: Option<Rejection>,
    ) -> Result<Option<Pause>, Ended> {
        if !self.waiting.has(event)
            && let Some(full) = self.full(event, true)
        {
            return self.fill(life, full);
        }
        if let Some(rejection) = &rejection
            && self.rejections.names(&rejection.0, Instant::now())
        {
            tracing::error!(
                pipeline = %self.pipeline.name,
                event = event.id.0,
                aggregate_type = &event.aggregate_type[..],
                reason = %rejection,
                "parked an event; later events of its entity wait"
            );
        }
        self.waiting.park(event);
        self.suspects.acquit(event.key());
        let seq = life.place(event, bytes, Topics::NONE);
        life.parking_seqs.push(seq);
        life.parking.push(Parked {
            event: event.clone(),
            error: rejection.map(|Rejection(reason)| reason),
            holds: true,
        });
        Ok(None)
    }

    /// Stores the event, hands a copy over to the topic of the dead letters where there is one, and goes on.
    fn dead_letter(
        &mut self,
        life: &mut Life,
        event: &Event,
        bytes: usize,
        rejection: Rejection,
    ) -> Result<Option<Pause>, Ended> {
        // One that was stored before and is read again takes no further room.
        if !self.dead_letters.contains(&event.key())
            && let Some(full) = self.full(event, false)
        {
            return self.fill(life, full);
        }
        let copy = match self.copy(life, event, &rejection) {
            Ok(copied) => copied,
            Err(stop) => return stop,
        };
        if self.rejections.names(&rejection.0, Instant::now()) {
            tracing::error!(
                pipeline = %self.pipeline.name,
                event = event.id.0,
                aggregate_type = &event.aggregate_type[..],
                reason = %rejection,
                "made a dead letter of an event; later events of its entity go on"
            );
        }
        self.dead_letters.insert(event.key());
        let tag = copy.unwrap_or(Topics::NONE);
        let seq = life.place(event, bytes, tag);
        if copy.is_some() {
            // Settled when the copy is delivered, which nobody looks for before the event is stored.
            life.copies.insert(seq);
        } else {
            self.suspects.acquit(event.key());
            life.parking_seqs.push(seq);
        }
        life.parking.push(Parked {
            event: event.clone(),
            error: Some(rejection.0),
            holds: false,
        });
        Ok(None)
    }

    /// The topic's number when a copy is on its way, none when there is to be none.
    fn copy(
        &mut self,
        life: &mut Life,
        event: &Event,
        rejection: &Rejection,
    ) -> Result<Option<u32>, Result<Option<Pause>, Ended>> {
        let Pipeline {
            name,
            route,
            encoding,
            dead_letter_topic,
            ..
        } = self.pipeline;
        let Some(topic) = dead_letter_topic else {
            return Ok(None);
        };
        let refused = self.condemned.get(&(event.key(), Try::DeadLetter)).cloned();
        let refused = refused.or_else(|| life.topics.refusal(topic));
        let refusal = match refused {
            Some(refusal) => refusal,
            None => {
                let texts = Texts::of(event);
                let record = dead_letter(event, &texts, (route, encoding), (topic, rejection));
                match self.sink.hand_over(life.seq_at_hand(), &record) {
                    Ok(()) => {
                        life.batch.begin();
                        return Ok(Some(life.topics.index_of(topic, self.metrics)));
                    }
                    Err(Refused::Later(reason)) => return Err(Ok(Some(Pause::Later(reason)))),
                    Err(Refused::Full) => return Err(Ok(Some(Pause::Full))),
                    Err(Refused::Unprepared) => {
                        return Err(Ok(Some(Pause::Topic(topic.clone()))));
                    }
                    Err(Refused::Broken(error)) => return Err(Err(Ended::Sink(error))),
                    Err(Refused::Rejected(refusal)) => refusal,
                }
            }
        };
        tracing::error!(pipeline = %name, event = event.id.0, topic, reason = %refusal,
            "a dead letter is refused by its topic too: it is stored only");
        self.metrics.dead_letter_refused();
        Ok(None)
    }

    /// Which limit keeps the event from being set aside.
    fn full(&self, event: &Event, holds: bool) -> Option<Full> {
        let Pipeline {
            name,
            parked_max,
            parked_max_per_entity,
            ..
        } = self.pipeline;
        let advice = |which: &str| {
            format!(
                "`outbox-relay parked list {which}` says why; then `parked redrive` or `parked drop` makes room and the \
                 pipeline goes on"
            )
        };
        // What the broker refused after its hand-over, or is read again after a crash, comes before events that were set
        // aside meanwhile, and those can't make room: the cursor has not passed them. They are no more than were in flight.
        let newest = self.dead_letters.last().map_or(EventId(0), |dead| dead.id);
        let precedes = event.id < newest.max(self.waiting.newest());
        let margin = if precedes || self.condemned.contains_key(&(event.key(), Try::First)) {
            self.settings.in_flight_rows
        } else {
            0
        };
        let all = self.set_aside_events();
        if all >= parked_max + margin {
            return Some(Full {
                entity: None,
                margin,
                reason: format!(
                    "event {} can't be set aside: {all} events of the pipeline are, and parked_max is {parked_max}. {}",
                    event.id,
                    advice(&format!("--pipeline {name}"))
                ),
            });
        }
        let (kind, entity) = (&event.aggregate_type[..], &event.aggregate_id[..]);
        let of_entity = self.waiting.events_of(kind, entity);
        if holds && of_entity >= parked_max_per_entity + margin {
            return Some(Full {
                entity: Some((kind.to_owned(), entity.to_owned())),
                margin,
                reason: format!(
                    "event {} can't be set aside: {of_entity} events of its entity are, and parked_max_per_entity is \
                     {parked_max_per_entity}. {}",
                    event.id,
                    advice(&format!(
                        "--pipeline {name} --entity {:?}",
                        format!("{kind}/{entity}")
                    ))
                ),
            });
        }
        None
    }

    /// Whether there is room again.
    pub(super) fn has_room(&self, full: &Full) -> bool {
        let of_entity = |(kind, entity): &(String, String)| {
            self.waiting.events_of(kind, entity) < self.pipeline.parked_max_per_entity + full.margin
        };
        self.set_aside_events() < self.pipeline.parked_max + full.margin
            && full.entity.as_ref().is_none_or(of_entity)
    }

    /// Parked events and dead letters.
    pub(super) fn set_aside_events(&self) -> usize {
        self.waiting.events() + self.dead_letters.len()
    }

    /// Ends the life once nothing is in flight, so that nothing is published twice for it.
    fn fill(&mut self, life: &mut Life, full: Full) -> Result<Option<Pause>, Ended> {
        match self.pause_for_flight(life) {
            Some(pause) => Ok(Some(pause)),
            None => Err(Ended::Full(full)),
        }
    }

    /// As long as something is in flight or about to be stored.
    fn pause_for_flight(&mut self, life: &mut Life) -> Option<Pause> {
        if !life.parking.is_empty() {
            return Some(Pause::Turn);
        }
        self.advance(life);
        // The cursor has to pass what was set aside before, or no operator could make room.
        let waits = life.awaited() > 0 || life.lookups.holds_before(life.seq_at_hand());
        waits.then_some(Pause::Blocked)
    }

    /// Waits until what was set aside is durable; only then is it settled.
    pub(super) async fn park(&mut self, life: &mut Life) {
        if life.parking.is_empty() {
            return;
        }
        let parked = std::mem::take(&mut life.parking);
        self.metrics.parked(parked.len());
        self.tell_books(|done| Order::Park(parked, done)).await;
        for seq in life.parking_seqs.drain(..) {
            life.in_flight.settle(seq);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::status::State;
    use super::*;

    #[test]
    fn without_the_token_a_halt_names_no_entity() {
        let halt = Halt {
            event: EventKey {
                id: EventId(7),
                event_id: uuid::Uuid::nil(),
            },
            entity: "customer/secret".to_owned(),
            rejection: Rejection::new("the topic name has the character ' '"),
        };
        let reason = halt.reason(&"main".parse().unwrap());
        assert!(reason.contains("customer/secret"), "{reason}");
        let State::Halted { reason } = (State::Halted { reason }).without_names() else {
            unreachable!("it stays halted");
        };
        assert!(
            reason.starts_with("event 7: ") && !reason.contains("secret"),
            "{reason}"
        );
    }
}
