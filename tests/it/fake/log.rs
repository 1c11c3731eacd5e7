//! The log: transactions that take ids and commit later, and a source that reads it by snapshots.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::anyhow;
use outbox_relay::event::{Event, EventId, Payload};
use outbox_relay::position::{Position, Snapshot, Window};
use outbox_relay::source::{Page, PageLimits, Source, SourceError};
use tokio::time::timeout;

use super::{Sabotage, Shared, World};
use crate::oracle::{Committed, Fact};

/// What is wrong with an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Poison {
    /// It can't be encoded.
    Malformed,
    /// The sink refuses to take it over.
    Refused,
    /// The broker refuses it after its hand-over.
    Rejected,
    /// Its topic can't be created.
    Forbidden,
}

/// Entities of this type are not for the pipeline.
pub const UNWANTED: &str = "audit";
/// What happens to all others.
pub const CHANGED: &str = "changed";
/// Entities of this type have a topic that can't be created.
pub const FORBIDDEN: &str = "secret";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Open,
    Committed,
    Aborted,
}

struct Row {
    event: Event,
    xid: u64,
    poison: Option<Poison>,
}

/// All transactions and their rows.
#[derive(Default)]
pub struct Log {
    rows: BTreeMap<i64, Row>,
    fates: BTreeMap<u64, Fate>,
    last_xid: u64,
    last_id: i64,
    /// Transactions from here on have not ended.
    xmax: u64,
    /// Whether the pipeline says which types it takes. Then it prepares their topics beforehand and stands still without
    /// them; else [`FORBIDDEN`] is among the types, and found out when the first of its events comes.
    pub names_types: bool,
}

impl Log {
    pub fn new(names_types: bool) -> Self {
        Self {
            names_types,
            ..Self::default()
        }
    }

    pub fn begin(&mut self) -> u64 {
        // 3 is the first ordinary one.
        self.last_xid = self.last_xid.max(2) + 1;
        self.fates.insert(self.last_xid, Fate::Open);
        self.last_xid
    }

    /// Writes a row, which takes its id now and becomes visible when its transaction commits.
    pub fn emit(
        &mut self,
        xid: u64,
        aggregate_type: &str,
        aggregate_id: &str,
        payload_bytes: usize,
        poison: Option<Poison>,
    ) {
        self.last_id += 1;
        let id = self.last_id;
        let malformed = poison == Some(Poison::Malformed);
        let event = Event {
            id: EventId(id),
            event_id: uuid::Uuid::from_u128(u128::try_from(id).unwrap()),
            aggregate_type: aggregate_type.into(),
            aggregate_id: aggregate_id.into(),
            event_type: if aggregate_type == UNWANTED {
                "looked_at".into()
            } else {
                CHANGED.into()
            },
            payload: match payload_bytes {
                0 => Payload::Tombstone,
                bytes => Payload::Encoded(vec![b'x'; bytes].into()),
            },
            content_type: None,
            headers: malformed.then(|| "[]".into()),
            occurred_at_us: 0,
        };
        let poison = poison.or((aggregate_type == FORBIDDEN).then_some(Poison::Forbidden));
        self.rows.insert(id, Row { event, xid, poison });
    }

    fn end(&mut self, xid: u64, fate: Fate) {
        self.fates.insert(xid, fate);
        self.xmax = self.xmax.max(xid + 1);
    }

    pub fn abort(&mut self, xid: u64) {
        self.end(xid, Fate::Aborted);
    }

    /// As `pg_current_snapshot()`: `xmax` follows the latest transaction that has *ended*.
    fn snapshot(&self) -> Snapshot {
        let xmax = self.xmax.max(3);
        let open = self.fates.iter().filter(|(_, fate)| **fate == Fate::Open);
        let in_progress: Vec<u64> = open
            .map(|(xid, _)| *xid)
            .filter(|xid| *xid < xmax)
            .collect();
        Snapshot {
            xmin: in_progress.first().copied().unwrap_or(xmax),
            xmax,
            in_progress,
        }
    }

    /// Whether the pipeline takes events of this type.
    fn admits(&self, aggregate_type: &str) -> bool {
        aggregate_type != UNWANTED && !(self.names_types && aggregate_type == FORBIDDEN)
    }

    fn is_committed(&self, row: &Row) -> bool {
        self.fates[&row.xid] == Fate::Committed
    }

    pub fn poison(&self, id: i64) -> Option<Poison> {
        self.rows.get(&id)?.poison
    }

    /// Mends what is wrong with an event, if anybody but its writer can.
    pub fn mend(&mut self, id: i64) -> bool {
        let row = self.rows.get_mut(&id).expect("it was written");
        let mends = matches!(row.poison, Some(Poison::Refused | Poison::Rejected))
            && row.event.aggregate_type != FORBIDDEN;
        if mends {
            row.poison = None;
        }
        mends
    }

    pub fn event(&self, id: i64) -> Option<&Event> {
        self.rows.get(&id).map(|row| &row.event)
    }

    /// Committed events that the pipeline admits.
    pub fn wanted(&self) -> impl DoubleEndedIterator<Item = i64> {
        let wanted = |row: &&Row| self.is_committed(row) && self.admits(&row.event.aggregate_type);
        self.rows.values().filter(wanted).map(|row| row.event.id.0)
    }

    /// Whether a committed event is behind a position.
    pub fn is_past(&self, position: &Position, id: i64) -> bool {
        let Window { prev, cur, .. } = &*position.window;
        let row = &self.rows[&id];
        prev.sees(row.xid) || (cur.sees(row.xid) && id <= position.last_id.0)
    }

    /// All committed events behind a position.
    pub fn past(&self, position: &Position) -> BTreeSet<i64> {
        let past = |row: &&Row| self.is_committed(row) && self.is_past(position, row.event.id.0);
        self.rows
            .values()
            .filter(past)
            .map(|row| row.event.id.0)
            .collect()
    }

    /// The position behind everything.
    pub fn end_position(&self) -> Position {
        let cur = self.snapshot();
        Position {
            window: Arc::new(self.window(cur.clone(), cur)),
            last_id: EventId(self.last_id),
        }
    }

    fn window(&self, prev: Snapshot, cur: Snapshot) -> Window {
        Window {
            prev,
            cur,
            floor: EventId(0),
            ceiling: EventId(self.last_id),
            next_floor: EventId(0),
        }
    }

    fn page(&self, at: &Position, limits: PageLimits, above: Option<i64>, open: bool) -> Page {
        let (window, after) = if at.at_end_of_window() {
            let window = self.window(at.window.cur.clone(), self.snapshot());
            (Arc::new(window), 0)
        } else {
            (at.window.clone(), at.last_id.0)
        };
        let visible = |row: &Row| {
            let new = !window.prev.sees(row.xid);
            let committed = self.is_committed(row) && window.cur.sees(row.xid);
            new && (committed || (open && self.fates[&row.xid] == Fate::Open))
        };
        let mut events = Vec::new();
        let (mut bytes, mut full) = (0, false);
        for (id, row) in self.rows.range(after + 1..=window.ceiling.0) {
            if visible(row) && above.is_none_or(|above| *id > above) {
                bytes += row.event.size_bytes();
                events.push(row.event.clone());
                full = events.len() >= limits.rows || bytes >= limits.bytes;
                if full {
                    break;
                }
            }
        }
        let last_id = match events.last() {
            Some(event) if full => event.id,
            _ => window.ceiling,
        };
        Page {
            events,
            end: Position { window, last_id },
            more: full,
        }
    }
}

impl World {
    /// Commits, and says whether anybody is told.
    fn commit(&mut self, xid: u64) -> bool {
        let lost = self.faults.hint_lost;
        let hinted = !self.chance(lost);
        self.log.end(xid, Fate::Committed);
        let facts: Vec<Fact> = self
            .log
            .rows
            .values()
            .filter(|row| row.xid == xid)
            .map(|row| {
                Fact::Committed(Committed {
                    id: row.event.id.0,
                    entity: format!("{} {}", row.event.aggregate_type, row.event.aggregate_id),
                    wanted: self.log.admits(&row.event.aggregate_type),
                    poison: row.poison.is_some(),
                    bytes: row.event.payload.bytes().map_or(0, <[u8]>::len),
                    hinted,
                })
            })
            .collect();
        for fact in facts {
            self.note(fact);
        }
        hinted
    }
}

impl Shared {
    pub fn commit(&self, xid: u64) {
        if self.with(|world| world.commit(xid)) {
            self.0.hint.notify_waiters();
        }
    }
}

/// Reads the log for one life of a process.
pub struct FakeSource {
    shared: Shared,
    owner: u32,
    at: Position,
    highest: i64,
}

impl FakeSource {
    pub fn new(shared: &Shared, owner: u32) -> Self {
        Self {
            shared: shared.clone(),
            owner,
            at: Position::beginning(),
            highest: 0,
        }
    }

    fn fails(&self) -> Result<(), SourceError> {
        let fails = self.shared.with(|world| {
            let often = world.faults.source_error;
            world.chance(often)
        });
        if fails {
            Err(SourceError::Transient(anyhow!("the connection was lost")))
        } else {
            Ok(())
        }
    }
}

impl Source for FakeSource {
    fn seek(&mut self, position: Position) {
        self.at = position;
        let owner = self.owner;
        self.shared.with(|world| world.note(Fact::Sought { owner }));
    }

    async fn capture(&mut self, limits: PageLimits, _: &Position) -> Result<Page, SourceError> {
        self.shared.dawdle().await;
        self.fails()?;
        let page = self.shared.with(|world| {
            let above = world.is(Sabotage::SkipLateRows).then_some(self.highest);
            let open = world.is(Sabotage::ShowUncommitted);
            world.log.page(&self.at, limits, above, open)
        });
        self.shared.dawdle().await;
        self.fails()?;
        self.at = page.end.clone();
        let ids: Vec<i64> = page.events.iter().map(|event| event.id.0).collect();
        self.highest = ids.last().copied().unwrap_or(0).max(self.highest);
        if !ids.is_empty() {
            let owner = self.owner;
            self.shared
                .with(|world| world.note(Fact::Captured { owner, ids }));
        }
        Ok(page)
    }

    async fn wake(&mut self) {
        let hint = self.shared.0.hint.notified();
        let (interval, blind) = self.shared.with(|world| {
            let interval = world.poll_interval.min(world.ms(600));
            (interval, world.is(Sabotage::HintsOnly))
        });
        if blind {
            hint.await;
        } else {
            timeout(interval, hint).await.unwrap_or(());
        }
    }
}
