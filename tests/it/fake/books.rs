//! The books: lease, cursor and parked events in the database, and a ledger that writes them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::anyhow;
use outbox_relay::event::{Event, EventId, EventKey, HeldEntity};
use outbox_relay::ledger::{
    Acquired, Due, Fenced, Ledger, LedgerError, Parked, Pause, Released, Renewed, Resolution,
    Resolved, Tenure,
};
use outbox_relay::position::Position;
use tokio::time::{Instant, sleep, timeout};

use super::{Due as Later, Sabotage, Shared, World};
use crate::oracle::Fact;

/// What the database holds.
pub struct Books {
    pub position: Position,
    pub parked: BTreeMap<i64, ParkedRow>,
    /// Events that were removed on request.
    pub dropped: BTreeSet<i64>,
    pub lease_ttl: Duration,
    /// An operator has paused the pipeline.
    pub paused: Option<Pause>,
    /// Events that an operator wants left out, and why.
    pub skips: BTreeMap<i64, String>,
    /// The committed events behind the position when it was written.
    past: BTreeSet<i64>,
    holder: u32,
    epoch: u64,
    expires_at: Instant,
}

impl Books {
    pub fn new(now: Instant, lease_ttl: Duration) -> Self {
        Self {
            position: Position::beginning(),
            parked: BTreeMap::new(),
            dropped: BTreeSet::new(),
            lease_ttl,
            paused: None,
            skips: BTreeMap::new(),
            past: BTreeSet::new(),
            holder: 0,
            epoch: 0,
            expires_at: now,
        }
    }
}

type Entity = (String, String);

/// A row of the table of parked events.
#[derive(Clone)]
pub struct ParkedRow {
    event: Event,
    pub rejected: bool,
    holds: bool,
    attempts: u32,
    pub wanted: Option<Wanted>,
}

/// What an operator asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    Redrive,
    Drop,
}

impl ParkedRow {
    fn entity(&self) -> Entity {
        let Event {
            aggregate_type,
            aggregate_id,
            ..
        } = &self.event;
        (aggregate_type.to_string(), aggregate_id.to_string())
    }
}

impl Books {
    pub fn is_anything_wanted(&self) -> bool {
        self.parked.values().any(|row| row.wanted.is_some())
    }

    /// The parked events of an entity that hold it, by their ids.
    fn of_entity<'a>(
        &'a self,
        entity: &'a Entity,
    ) -> impl Iterator<Item = (&'a i64, &'a ParkedRow)> {
        let holds = move |(_, row): &(_, &ParkedRow)| row.holds && row.entity() == *entity;
        self.parked.iter().filter(holds)
    }

    fn is_due(&self, id: i64, row: &ParkedRow) -> bool {
        let entity = row.entity();
        if !row.holds || row.wanted == Some(Wanted::Drop) {
            return row.wanted.is_some();
        }
        let mut of_entity = self.of_entity(&entity);
        let blocks = |row: &ParkedRow| match row.wanted {
            Some(wanted) => wanted == Wanted::Drop,
            None => row.rejected,
        };
        self.of_entity(&entity).any(|(_, row)| row.wanted.is_some())
            && !of_entity.any(|(other, row)| *other <= id && blocks(row))
    }
}

#[derive(Clone)]
enum Write {
    Renew,
    Acknowledge(Position),
    Park(Vec<Parked>),
    Resolve(Resolved),
    Release,
}

/// A statement that the server runs although its client has gone.
pub struct LateWrite {
    owner: u32,
    epoch: u64,
    write: Write,
}

enum Fate {
    Fine,
    Fails,
    ReplyLost,
    Late(Duration),
    Hangs(Duration),
}

impl World {
    fn fate(&mut self) -> Fate {
        let (error, lost, late, hangs) = (
            self.faults.ledger_error,
            self.faults.ledger_reply_lost,
            self.faults.ledger_late,
            self.faults.ledger_hangs,
        );
        if self.chance(error) {
            Fate::Fails
        } else if self.chance(lost) {
            Fate::ReplyLost
        } else if self.chance(late) {
            Fate::Late(self.ms(3000))
        } else if self.chance(hangs) {
            Fate::Hangs(self.ms(2000))
        } else {
            Fate::Fine
        }
    }

    fn acquire(&mut self, owner: u32) -> Result<u64, Acquired> {
        let now = Instant::now();
        let books = &mut self.books;
        let held = books.expires_at > now && books.holder != owner;
        if held && self.sabotage != Some(Sabotage::GrantTwice) {
            return Err(Acquired::Held {
                holder: books.holder.to_string(),
                expires_in: books.expires_at - now,
            });
        }
        if let Some(pause) = &books.paused {
            return Err(Acquired::Paused(pause.clone()));
        }
        books.holder = owner;
        books.epoch += 1;
        let epoch = books.epoch;
        self.extend_lease(now, owner);
        Ok(epoch)
    }

    fn extend_lease(&mut self, now: Instant, owner: u32) {
        let until = now + self.books.lease_ttl;
        self.books.expires_at = until;
        let until_ms = self.ms_of(until);
        self.note_at(now, Fact::Leased { owner, until_ms });
    }

    fn tenure(&self) -> Tenure {
        let mut held: BTreeMap<Entity, HeldEntity> = BTreeMap::new();
        let (holding, dead): (Vec<_>, Vec<_>) =
            self.books.parked.iter().partition(|(_, row)| row.holds);
        for (id, row) in holding {
            let (aggregate_type, aggregate_id) = row.entity();
            let entity = held.entry(row.entity()).or_insert(HeldEntity {
                aggregate_type,
                aggregate_id,
                first: EventId(*id),
                last: EventId(*id),
                events: 0,
                is_passed: false,
            });
            entity.last = EventId(*id);
            entity.events += 1;
            entity.is_passed |= self.log.is_past(&self.books.position, *id);
        }
        Tenure {
            position: self.books.position.clone(),
            log: "sim".to_owned(),
            held: held.into_values().collect(),
            dead_letters: dead.into_iter().map(|(_, row)| row.event.key()).collect(),
        }
    }

    fn due(&mut self, at: Instant, rows: usize, bytes: usize) -> Vec<Due> {
        let mut due: Vec<Due> = Vec::new();
        let mut total = 0;
        for (id, row) in &self.books.parked {
            if !self.books.is_due(*id, row) || !self.log.is_past(&self.books.position, *id) {
                continue;
            }
            let size = row.event.payload.bytes().map_or(0, <[u8]>::len);
            if due.len() == rows || (total + size > bytes && !due.is_empty()) {
                break;
            }
            total += size;
            due.push(Due {
                event: row.event.clone(),
                attempts: row.attempts,
                holds: row.holds,
                drop: row.wanted == Some(Wanted::Drop),
            });
        }
        if self.is(Sabotage::NewestDueFirst) {
            due.reverse();
        }
        if self.is(Sabotage::RemoveWhenDue) {
            for due in &due {
                self.remove(at, due.event.id.0);
            }
        }
        due
    }

    fn remove(&mut self, at: Instant, id: i64) -> Option<ParkedRow> {
        let row = self.books.parked.remove(&id)?;
        if row.wanted == Some(Wanted::Drop) {
            self.books.dropped.insert(id);
        }
        self.note_at(at, Fact::Unparked { id });
        Some(row)
    }

    fn resolve(&mut self, at: Instant, resolved: &Resolved) -> Released {
        let Resolved {
            delivered,
            dropped,
            rejected,
        } = resolved;
        let wanted = |event: &&EventKey| {
            let row = self.books.parked.get(&event.id.0);
            row.is_some_and(|row| row.wanted == Some(Wanted::Drop))
        };
        let (dropped, kept): (Vec<EventKey>, Vec<EventKey>) =
            dropped.iter().copied().partition(|id| wanted(&id));
        for (event, _) in rejected {
            if let Some(row) = self.books.parked.get_mut(&event.id.0) {
                row.rejected = true;
                row.attempts += 1;
                row.wanted = None;
            }
        }
        let mut entities = BTreeSet::new();
        for event in delivered.iter().chain(&dropped) {
            let row = self.remove(at, event.id.0).filter(|row| row.holds);
            entities.extend(row.map(|row| row.entity()));
        }
        let mut released = Released {
            free: Vec::new(),
            kept,
        };
        for entity in entities {
            let next = self.books.of_entity(&entity).next().map(|(id, _)| *id);
            if next.is_none() || self.is(Sabotage::FreeEarly) {
                released.free.push(entity);
            }
            let next = next.and_then(|id| self.books.parked.get_mut(&id));
            if let Some(row) = next.filter(|row| !row.rejected && row.wanted.is_none()) {
                row.wanted = Some(Wanted::Redrive);
            }
        }
        released
    }

    /// An operator asks for something.
    pub fn want(&mut self, id: i64, wanted: Wanted) {
        if let Some(row) = self.books.parked.get_mut(&id) {
            row.wanted = Some(wanted);
            let drop = wanted == Wanted::Drop;
            self.note(Fact::Wanted { id, drop });
        }
    }

    /// None when it is fenced; else what a resolution released.
    fn write(&mut self, at: Instant, owner: u32, epoch: u64, write: &Write) -> Option<Released> {
        if epoch != self.books.epoch && !self.is(Sabotage::NoFence) {
            return None;
        }
        match write {
            Write::Renew => self.extend_lease(at, owner),
            Write::Acknowledge(position) => {
                self.books.position = if self.is(Sabotage::PositionAhead) {
                    self.log.end_position()
                } else {
                    position.clone()
                };
                let past = self.log.past(&self.books.position);
                let before = std::mem::replace(&mut self.books.past, past.clone());
                let less = |all: &BTreeSet<i64>, some| all.difference(some).copied().collect();
                let (passed, regained) = (less(&past, &before), less(&before, &past));
                self.note_at(at, Fact::Moved { passed, regained });
            }
            Write::Park(_) if self.is(Sabotage::ParkForgets) => {}
            Write::Park(parked) => {
                for Parked {
                    event,
                    error,
                    holds,
                } in parked
                {
                    let (id, reason) = (event.id.0, error.is_some());
                    self.books.parked.entry(id).or_insert(ParkedRow {
                        event: event.clone(),
                        rejected: reason,
                        holds: *holds,
                        attempts: u32::from(reason),
                        wanted: None,
                    });
                    self.note_at(at, Fact::Parked { owner, id, reason });
                }
            }
            Write::Resolve(resolved) => return Some(self.resolve(at, resolved)),
            Write::Release => {
                self.books.expires_at = at;
                self.note_at(at, Fact::Released { owner });
            }
        }
        Some(Released::default())
    }

    pub(super) fn write_late(&mut self, at: Instant, late: &LateWrite) {
        let LateWrite {
            owner,
            epoch,
            write,
        } = late;
        self.write(at, *owner, *epoch, write);
    }
}

/// The ledger of one life of a process.
pub struct FakeLedger {
    shared: Shared,
    owner: u32,
    epoch: u64,
}

impl FakeLedger {
    pub fn new(shared: &Shared, owner: u32) -> Self {
        Self {
            shared: shared.clone(),
            owner,
            epoch: 0,
        }
    }

    async fn write(&mut self, write: Write) -> Result<Fenced, LedgerError> {
        let written = self.ask(write).await?;
        Ok(written.map_or(Fenced::Lost, |_| Fenced::Written))
    }

    async fn ask(&mut self, write: Write) -> Result<Option<Released>, LedgerError> {
        let limit = self.shared.with(|world| world.books.lease_ttl);
        timeout(limit, self.try_write(write))
            .await
            .unwrap_or_else(|_| Err(LedgerError(anyhow!("no answer"))))
    }

    async fn try_write(&self, write: Write) -> Result<Option<Released>, LedgerError> {
        let Self {
            shared,
            owner,
            epoch,
        } = self;
        let now = || shared.with(|world| world.write(Instant::now(), *owner, *epoch, &write));
        let gone = || LedgerError(anyhow!("the connection was lost"));
        shared.dawdle().await;
        match shared.with(World::fate) {
            Fate::Fine => {
                let fenced = now();
                shared.dawdle().await;
                Ok(fenced)
            }
            Fate::Fails => Err(gone()),
            Fate::ReplyLost => {
                now();
                shared.dawdle().await;
                Err(gone())
            }
            Fate::Late(by) => {
                let late = LateWrite {
                    owner: *owner,
                    epoch: *epoch,
                    write: write.clone(),
                };
                shared.with(|world| world.plan(Instant::now() + by, Later::Write(late)));
                shared.dawdle().await;
                Err(gone())
            }
            Fate::Hangs(by) => {
                sleep(by).await;
                let fenced = now();
                sleep(by).await;
                Ok(fenced)
            }
        }
    }
}

impl Ledger for FakeLedger {
    async fn acquire(&mut self) -> Result<Acquired, LedgerError> {
        let gone = || LedgerError(anyhow!("the connection was lost"));
        let owner = self.owner;
        self.shared.dawdle().await;
        let fate = self.shared.with(World::fate);
        match fate {
            Fate::Fails => return Err(gone()),
            Fate::Hangs(by) => sleep(by).await,
            Fate::Fine | Fate::ReplyLost | Fate::Late(_) => {}
        }
        match self.shared.with(|world| world.acquire(owner)) {
            Ok(epoch) => self.epoch = epoch,
            Err(held) => return Ok(held),
        }
        self.shared.dawdle().await;
        let tenure = self.shared.with(|world| world.tenure());
        match fate {
            Fate::ReplyLost => Err(gone()),
            Fate::Late(by) | Fate::Hangs(by) => {
                sleep(by).await;
                Ok(Acquired::Ours(tenure))
            }
            Fate::Fine | Fate::Fails => Ok(Acquired::Ours(tenure)),
        }
    }

    async fn renew(&mut self) -> Result<Renewed, LedgerError> {
        Ok(match self.write(Write::Renew).await? {
            Fenced::Lost => Renewed::Lost,
            Fenced::Written if self.shared.with(|world| world.books.paused.is_some()) => {
                Renewed::Paused
            }
            Fenced::Written => Renewed::Extended,
        })
    }

    async fn acknowledge(&mut self, position: &Position) -> Result<Fenced, LedgerError> {
        self.write(Write::Acknowledge(position.clone())).await
    }

    async fn park(&mut self, parked: &[Parked]) -> Result<Fenced, LedgerError> {
        self.write(Write::Park(parked.to_vec())).await
    }

    async fn due(&mut self, rows: usize, bytes: usize) -> Result<Vec<Due>, LedgerError> {
        self.shared.dawdle().await;
        let gone = || LedgerError(anyhow!("the connection was lost"));
        match self.shared.with(World::fate) {
            Fate::Fails | Fate::ReplyLost | Fate::Late(_) => return Err(gone()),
            Fate::Hangs(by) => sleep(by).await,
            Fate::Fine => {}
        }
        let due = self
            .shared
            .with(|world| world.due(Instant::now(), rows, bytes));
        self.shared.dawdle().await;
        Ok(due)
    }

    async fn resolve(&mut self, resolved: &Resolved) -> Result<Resolution, LedgerError> {
        let written = self.ask(Write::Resolve(resolved.clone())).await?;
        Ok(written.map_or(Resolution::Lost, Resolution::Written))
    }

    async fn skipped(&mut self, event: EventKey) -> Result<Option<String>, LedgerError> {
        self.shared.dawdle().await;
        Ok(self
            .shared
            .with(|world| world.books.skips.get(&event.id.0).cloned()))
    }

    async fn release(&mut self, _settled: bool) -> Result<(), LedgerError> {
        self.write(Write::Release).await.map(drop)
    }
}
