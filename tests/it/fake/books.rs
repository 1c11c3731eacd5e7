//! The books: lease, cursor and parked events in the database, and a ledger that writes them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::anyhow;
use outbox_relay::event::EventId;
use outbox_relay::ledger::{Acquired, Fenced, Ledger, LedgerError, Parked, Tenure};
use outbox_relay::position::Position;
use tokio::time::{Instant, sleep, timeout};

use super::{Due, Sabotage, Shared, World};
use crate::oracle::Fact;

/// What the database holds.
pub struct Books {
    pub position: Position,
    pub parked: BTreeMap<i64, (String, String)>,
    pub lease_ttl: Duration,
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
            lease_ttl,
            past: BTreeSet::new(),
            holder: 0,
            epoch: 0,
            expires_at: now,
        }
    }
}

#[derive(Clone)]
enum Write {
    Renew,
    Acknowledge(Position),
    Park(Vec<Parked>),
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
        let mut first = BTreeMap::new();
        for (id, entity) in self.books.parked.iter().rev() {
            first.insert(entity.clone(), EventId(*id));
        }
        Tenure {
            position: self.books.position.clone(),
            log: "sim".to_owned(),
            parked: first
                .into_iter()
                .map(|((kind, id), first)| (kind, id, first))
                .collect(),
        }
    }

    fn write(&mut self, at: Instant, owner: u32, epoch: u64, write: &Write) -> Fenced {
        if epoch != self.books.epoch && !self.is(Sabotage::NoFence) {
            return Fenced::Lost;
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
                for Parked { event, error } in parked {
                    let (id, reason) = (event.id.0, error.is_some());
                    let entity = (
                        event.aggregate_type.to_string(),
                        event.aggregate_id.to_string(),
                    );
                    self.books.parked.entry(id).or_insert(entity);
                    self.note_at(at, Fact::Parked { owner, id, reason });
                }
            }
            Write::Release => {
                self.books.expires_at = at;
                self.note_at(at, Fact::Released { owner });
            }
        }
        Fenced::Written
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
        let limit = self.shared.with(|world| world.books.lease_ttl);
        timeout(limit, self.try_write(write))
            .await
            .unwrap_or_else(|_| Err(LedgerError(anyhow!("no answer"))))
    }

    async fn try_write(&self, write: Write) -> Result<Fenced, LedgerError> {
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
                shared.with(|world| world.plan(Instant::now() + by, Due::Write(late)));
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

    async fn renew(&mut self) -> Result<Fenced, LedgerError> {
        self.write(Write::Renew).await
    }

    async fn acknowledge(&mut self, position: &Position) -> Result<Fenced, LedgerError> {
        self.write(Write::Acknowledge(position.clone())).await
    }

    async fn park(&mut self, parked: &[Parked]) -> Result<Fenced, LedgerError> {
        self.write(Write::Park(parked.to_vec())).await
    }

    async fn release(&mut self) -> Result<(), LedgerError> {
        self.write(Write::Release).await.map(drop)
    }
}
