//! Transactions of the fake broker: everything or nothing becomes visible, with the position; whoever initialises fences the
//! owner before.

use outbox_relay::event::Rejection;
use outbox_relay::position::Position;
use outbox_relay::sink::{Receipt, Refused, SinkError};
use tokio::time::Instant;

use super::broker::Carried;
use super::log::Poison;
use super::{Due, Sabotage, World};
use crate::oracle::Fact;

/// The transaction of one producer.
#[derive(Default)]
pub(super) struct Transaction {
    initialised: bool,
    records: Vec<Carried>,
    /// Asked for, and not answered.
    closing: Option<Position>,
}

impl Transaction {
    /// Takes a record if there is room.
    pub(super) fn take(&mut self, carried: Carried, most: usize) -> Result<bool, Refused> {
        if !self.initialised {
            let why = "the transactional id is not initialised".to_owned();
            return Err(Refused::Broken(SinkError(why)));
        }
        let room = self.closing.is_none() && self.records.len() < most;
        if room {
            self.records.push(carried);
        }
        Ok(room)
    }

    pub(super) fn is_under_way(&self) -> bool {
        !self.records.is_empty()
    }

    /// Nobody will ask for the commit of what is open.
    pub(super) fn abandon(&mut self) {
        if self.closing.is_none() {
            self.records.clear();
        }
    }
}

impl World {
    pub(super) fn resume(&mut self, life: u32) -> Result<Option<Position>, SinkError> {
        if !self.broker.transactional {
            return Ok(None);
        }
        if self.is_down(Instant::now()) {
            return Err(SinkError("no answer from the broker".to_owned()));
        }
        self.broker.initialised = life;
        let producer = self.broker.producers.get_mut(&life).expect("it was opened");
        producer.transaction.initialised = true;
        if self.is(Sabotage::ForgetPosition) {
            return Ok(None);
        }
        let committed = self.broker.committed.clone();
        if let Some(position) = &committed {
            // The relay hears this way what a lost answer would have told.
            let past = self.log.past(position);
            let there: Vec<i64> = past.intersection(&self.broker.appended).copied().collect();
            for id in there {
                self.note(Fact::Confirmed { life, id });
            }
        }
        Ok(committed)
    }

    pub(super) fn close_transaction(&mut self, life: u32, position: &Position) {
        let first = self.is(Sabotage::PositionFirst);
        let broker = &mut self.broker;
        if !broker.transactional {
            return;
        }
        let producer = broker.producers.get_mut(&life).expect("it was opened");
        if producer.transaction.closing.is_none() {
            producer.transaction.closing = Some(position.clone());
            if first {
                broker.committed = Some(position.clone());
            }
            let most = self.broker.latency_ms;
            let at = Instant::now() + self.ms(most);
            self.plan(at, Due::Commit(life));
        }
    }

    pub(super) fn commit_transaction(&mut self, at: Instant, life: u32) {
        let (often, fencing) = (self.faults.sink_dies, !self.is(Sabotage::NoFencing));
        let reply_lost = self.chance(often * 10);
        let never_sent = self.rng.u32(0..3) == 0;
        let broker = &self.broker;
        let producer = &broker.producers[&life];
        let stalled = self
            .stalled
            .get(&producer.process)
            .filter(|until| at < **until);
        let late = producer.lands_from.filter(|from| at < *from);
        let down = broker.down_until.filter(|until| at < *until);
        if let Some(later) = late.or(down).or(stalled.copied()) {
            return self.plan(later, Due::Commit(life));
        }
        let fenced = fencing && broker.initialised != life;
        let gone = producer.lands_from.is_some() || producer.dead.is_some();
        let producer = self.broker.producers.get_mut(&life).expect("it was opened");
        let records = std::mem::take(&mut producer.transaction.records);
        let position = producer.transaction.closing.take();
        if fenced {
            producer.dead = Some("fenced by a newer producer".to_owned());
        }
        if fenced || (gone && never_sent) {
            return;
        }
        let bad = |record: &&Carried| self.log.poison(record.id) == Some(Poison::Rejected);
        if let Some(bad) = records.iter().find(bad) {
            let partition = bad.partition.clone();
            return self.refuse_transaction(at, life, records, &partition);
        }
        self.broker.committed = position;
        self.broker.commits += 1;
        for Carried { id, intact, .. } in &records {
            let (id, intact) = (*id, *intact);
            self.broker.appended.insert(id);
            self.note_at(at, Fact::Appended { id, intact });
        }
        if reply_lost {
            return self.kill_producer(life);
        }
        for Carried { seq, partition, .. } in records {
            self.answer(at, life, &partition, Receipt::Delivered(seq));
        }
    }

    /// A batch shares its fate, and with it the transaction.
    fn refuse_transaction(
        &mut self,
        at: Instant,
        life: u32,
        records: Vec<Carried>,
        partition: &super::broker::Partition,
    ) {
        let producer = self.broker.producers.get_mut(&life).expect("it was opened");
        producer.dead = Some("a record of this transaction was rejected".to_owned());
        for record in records {
            if record.partition == *partition {
                let receipt = Receipt::Rejected(record.seq, Rejection::new("invalid record"));
                self.answer(at, life, partition, receipt);
            }
        }
    }
}
