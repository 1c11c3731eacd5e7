//! Parked events on their way out again: batches of them pass through a life like a page that moves no position.
//!
//! What is due lies behind the durable cursor, and so does all of its entity that precedes it: nothing of it comes out of
//! the log again. One batch at a time; when its slots are released the books remove its rows, and an entity is free when
//! they say that none is left. What a crash leaves behind is a row of an event that is delivered: a duplicate, never a loss
//! and never another order.

use std::collections::HashSet;

use bytestring::ByteString;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::books::Order;
use super::publish::{Ended, Life, Offered, Pause, Publisher};
use super::topics::Topics;
use crate::event::{Event, EventKey, Rejection, Seq};
use crate::ledger::{Due, Released, Resolved};
use crate::sink::Sink;

/// Which try of an event: what the broker said about one says nothing about the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Try {
    /// As it comes out of the log.
    First,
    /// After it was rejected so many times.
    Redriven(u32),
    /// Its copy, to the topic of the dead letters.
    DeadLetter,
}

/// Where the redriving of one life stands.
#[derive(Default)]
pub(super) struct Redrive {
    asked: Option<oneshot::Receiver<Vec<Due>>>,
    batch: Option<Batch>,
}

/// Due events that are being handed over, or wait for their receipts.
struct Batch {
    rows: Vec<Row>,
    /// How many of them have a slot.
    taken: usize,
    /// The slot of the first.
    first: Seq,
    /// Entities of which an event was rejected again: what follows of them stays where it is.
    stopped: HashSet<(ByteString, ByteString)>,
}

struct Row {
    event: EventKey,
    entity: (ByteString, ByteString),
    attempts: u32,
    holds: bool,
    fate: Fate,
}

/// What became of a row, as far as its slot is released.
enum Fate {
    Publish,
    Drop,
    Stay,
    Rejected(Rejection),
}

impl Redrive {
    /// The answer of the books; only while one is awaited.
    ///
    /// # Cancel safety
    /// Safe: an answer stays until it is taken.
    pub(super) async fn due(&mut self) -> Vec<Due> {
        let Some(asked) = &mut self.asked else {
            return std::future::pending().await;
        };
        let answer = asked.await;
        self.asked = None;
        match answer {
            Ok(due) => due,
            // The books are closed, which ends this tenure from outside.
            Err(_) => std::future::pending().await,
        }
    }

    /// Whether the next event at hand is one of a batch.
    pub(super) fn is_handing_over(&self) -> bool {
        self.batch
            .as_ref()
            .is_some_and(|batch| batch.taken < batch.rows.len())
    }

    /// Leaves out what has not been handed over.
    pub(super) fn cut(&mut self) {
        if let Some(batch) = &mut self.batch {
            batch.rows.truncate(batch.taken);
        }
        self.batch.take_if(|batch| batch.rows.is_empty());
    }

    /// Which try of its event has this number.
    pub(super) fn try_of(&self, seq: Seq) -> Option<Try> {
        let batch = self.batch.as_ref()?;
        let index = usize::try_from(seq.0.checked_sub(batch.first.0)?).ok()?;
        let row = batch.rows[..batch.taken].get(index)?;
        Some(Try::Redriven(row.attempts))
    }
}

impl Life {
    /// Which try of its event has this number.
    pub(super) fn try_of(&self, seq: Seq) -> Try {
        if self.copies.contains(&seq) {
            Try::DeadLetter
        } else {
            self.redrive.try_of(seq).unwrap_or(Try::First)
        }
    }

    /// Takes a batch as the next page.
    pub(super) fn begin_batch(&mut self, due: Vec<Due>) {
        // Who asks for another try has perhaps just made the topic.
        self.topics.forget_refusals();
        self.begin_interlude(due.len());
        let rows = due.iter().map(|due| Row {
            event: due.event.key(),
            entity: (
                due.event.aggregate_type.clone(),
                due.event.aggregate_id.clone(),
            ),
            attempts: due.attempts,
            holds: due.holds,
            fate: if due.drop { Fate::Drop } else { Fate::Publish },
        });
        self.redrive.batch = Some(Batch {
            rows: rows.collect(),
            taken: 0,
            first: self.in_flight.next_seq(),
            stopped: HashSet::new(),
        });
        self.pending = due.into_iter().map(|due| due.event).collect();
    }
}

impl<K: Sink> Publisher<'_, K> {
    /// Lets the books say when parked events are due.
    pub(super) fn ask_for_due(&mut self, life: &mut Life) {
        if life.redrive.batch.is_some() || life.redrive.asked.is_some() {
            return;
        }
        let (answer, awaited) = oneshot::channel();
        // When the books are busy with another order they are asked in the next turn.
        if self.orders.try_send(Order::Due(answer)).is_ok() {
            life.redrive.asked = Some(awaited);
        }
    }

    /// Takes up the next event of a batch; says why the hand-over has to pause with the event still at hand.
    pub(super) fn redrive(
        &mut self,
        life: &mut Life,
        event: &Event,
        bytes: usize,
    ) -> Result<Option<Pause>, Ended> {
        let Some(batch) = &mut life.redrive.batch else {
            return Ok(None);
        };
        let row = &mut batch.rows[batch.taken];
        let publish = matches!(row.fate, Fate::Publish);
        if publish && row.holds && batch.stopped.contains(&row.entity) {
            row.fate = Fate::Stay;
        } else if publish {
            let this = Try::Redriven(row.attempts);
            let now_us = (self.now_us)();
            match self.offer_again(life, event, this) {
                Offered::HandedOver(topic) => {
                    // Its latency is the operator's, not the relay's.
                    life.in_flight.push_again(event.key(), bytes, now_us, topic);
                    life.redrive.took();
                    return Ok(None);
                }
                Offered::Paused(pause) => return Ok(Some(pause)),
                Offered::Broken(error) => return Err(Ended::Sink(error)),
                Offered::Rejected(rejection) => life.redrive.reject(rejection),
            }
        }
        let seq = life
            .in_flight
            .push_again(event.key(), 0, event.occurred_at_us, Topics::NONE);
        life.in_flight.settle(seq);
        life.redrive.took();
        Ok(None)
    }

    /// Without the filter, which it has passed before, and without the order, which its entity waits to keep.
    fn offer_again(&mut self, life: &mut Life, event: &Event, this: Try) -> Offered {
        match self.condemned.get(&(event.key(), this)) {
            Some(rejection) => Offered::Rejected(rejection.clone()),
            None => match self.offer(life, event) {
                // It has its place among the parked events: it need not hold up others until its topic is ready.
                Offered::Paused(Pause::Topic(topic)) => match life.lookups.trouble_of(&topic) {
                    Some(reason) => Offered::Rejected(Rejection::new(reason)),
                    None => Offered::Paused(Pause::Topic(topic)),
                },
                offered => offered,
            },
        }
    }

    /// Once everything of a batch is released: waits until the books say so too.
    pub(super) async fn finish_batch(&mut self, life: &mut Life) {
        let finished = life.redrive.batch.take_if(|batch| {
            let last = Seq(batch.first.0 + batch.rows.len() as u64 - 1);
            batch.taken == batch.rows.len() && life.in_flight.is_released(last)
        });
        let Some(Batch { mut rows, .. }) = finished else {
            return;
        };
        let mut resolved = Resolved::default();
        for row in &rows {
            match &row.fate {
                Fate::Publish => resolved.delivered.push(row.event),
                Fate::Drop => resolved.dropped.push(row.event),
                Fate::Rejected(Rejection(reason)) => {
                    resolved.rejected.push((row.event, reason.clone()));
                }
                Fate::Stay => {}
            }
        }
        let order = |done| Order::Resolve(resolved, done);
        let Released { free, kept } = self.tell_books(order).await;
        for row in rows.iter_mut().filter(|row| kept.contains(&row.event)) {
            row.fate = Fate::Stay;
        }
        self.resolved(&rows);
        for (aggregate_type, aggregate_id) in free {
            self.waiting.release(&aggregate_type, &aggregate_id);
        }
    }

    fn resolved(&mut self, rows: &[Row]) {
        let (mut redriven, mut dropped, mut rejected) = (0, 0, 0);
        for row in rows {
            self.condemned
                .remove(&(row.event, Try::Redriven(row.attempts)));
            // Whatever became of it, it is not tried again now.
            self.suspects.acquit(row.event);
            match row.fate {
                Fate::Publish => redriven += 1,
                Fate::Drop => dropped += 1,
                Fate::Rejected(ref reason) => {
                    rejected += 1;
                    if self.rejections.names(&reason.0, Instant::now()) {
                        tracing::warn!(pipeline = %self.pipeline.name, event = row.event.id.0, reason = %reason,
                            "rejected a parked event again");
                    }
                }
                Fate::Stay => {}
            }
            if !matches!(row.fate, Fate::Publish | Fate::Drop) {
                continue;
            }
            if row.holds {
                let (aggregate_type, aggregate_id) = &row.entity;
                self.waiting.remove(aggregate_type, aggregate_id, 1);
            } else {
                self.dead_letters.remove(&row.event);
            }
        }
        self.metrics.redriven(redriven);
        self.metrics.dropped(dropped);
        let pipeline = &self.pipeline.name;
        if redriven > 0 {
            tracing::info!(%pipeline, events = redriven, "published parked events");
        }
        if dropped > 0 {
            tracing::info!(%pipeline, events = dropped, "dropped parked events as an operator asked");
        }
        if rejected > 0 {
            tracing::warn!(%pipeline, events = rejected, "parked events were rejected again and stay parked");
        }
    }
}

impl Redrive {
    fn took(&mut self) {
        if let Some(batch) = &mut self.batch {
            batch.taken += 1;
        }
    }

    /// Of the event at hand.
    fn reject(&mut self, rejection: Rejection) {
        if let Some(Batch {
            rows,
            taken,
            stopped,
            ..
        }) = &mut self.batch
        {
            let row = &mut rows[*taken];
            if row.holds {
                stopped.insert(row.entity.clone());
            }
            row.fate = Fate::Rejected(rejection);
        }
    }
}
