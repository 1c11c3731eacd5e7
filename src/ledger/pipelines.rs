//! What operators ask of a whole pipeline: to pause it, to move its cursor, to leave one event out, to forget it.
//!
//! Each act is noted in the transaction that does it: when, who, why. Who moves or removes a cursor holds the row of the
//! pipeline, which every relay needs that takes a lease, and is refused while a lease is in force: what a relay has read is
//! never pulled away from under it. A pause and a skip are only written down; the owner of the pipeline does them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::event::EventId;

/// Who asks, and why.
#[derive(Clone, Debug)]
pub struct Act {
    /// OS user and host.
    pub who: String,
    /// Kept with the act.
    pub reason: String,
}

/// An event as operators name it: the id is its place in the log, and may come again after the sequence was reset; the uuid
/// is its identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventName {
    /// Its place in the log.
    Id(EventId),
    /// Its identity.
    Uuid(Uuid),
}

impl FromStr for EventName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Ok(id) = text.parse() {
            return Ok(Self::Id(EventId(id)));
        }
        Uuid::try_parse(text).map(Self::Uuid).map_err(|_| {
            format!("{text:?} is no event: an id, as in 17, or the uuid of its header id")
        })
    }
}

impl fmt::Display for EventName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::Uuid(uuid) => uuid.fmt(f),
        }
    }
}

/// Why something is not done, and what to do instead.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

/// Where a cursor is moved to, and what that means.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seek {
    /// The pipeline.
    pub pipeline: String,
    /// The position of each shard before; none where a shard has not begun.
    pub from: Vec<Option<i64>>,
    /// The position of all of them afterwards.
    pub to: i64,
    /// The oldest event that is retained.
    pub oldest_id: Option<i64>,
    /// The newest id that the log has handed out.
    pub newest_id: i64,
    /// Events that lie behind the cursor and are published again; none where counting takes too long.
    pub again: Option<i64>,
    /// Events that wait and are never published; none where counting takes too long.
    pub left_out: Option<i64>,
}

/// An event that is to be left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skip {
    /// The pipeline.
    pub pipeline: String,
    /// Its place in the log.
    pub id: i64,
    /// Its identity.
    pub event_id: String,
    /// The kind of its entity.
    pub aggregate_type: String,
    /// Its entity.
    pub aggregate_id: String,
    /// Whether somebody asked for it before.
    pub known: bool,
}

/// What a pipeline leaves behind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remains {
    /// The pipeline.
    pub pipeline: String,
    /// Its cursors.
    pub cursors: i64,
    /// Events of the log that its cursors have not passed; none where counting takes too long.
    pub waiting: Option<i64>,
    /// Events that are set aside.
    pub parked: i64,
}

pub(super) fn owned(pipeline: &str, holder: &str, seconds: f64) -> Refused {
    Refused(format!(
        "pipeline {pipeline} is owned by {holder} (for {seconds:.0} s unless it renews the lease): pause it first, with \
         `outbox-relay pipelines pause {pipeline} --wait --reason …`"
    ))
}

pub(super) fn never_ran(pipeline: &str) -> Refused {
    Refused(format!(
        "pipeline {pipeline} has no cursor: the setting pipeline.start says where it begins"
    ))
}

pub(super) fn beyond(event: EventId, newest: i64) -> Refused {
    Refused(format!(
        "there is no event {event} yet: the newest id is {newest}; `latest` begins with what comes"
    ))
}

pub(super) fn not_retained(event: EventName) -> Refused {
    Refused(format!(
        "event {event} is not in the log: retention has removed it, or it never was there"
    ))
}

pub(super) fn passed(pipeline: &str, id: i64) -> Refused {
    Refused(format!(
        "pipeline {pipeline} is past event {id}: it was published or set aside (`outbox-relay parked show {id}`)"
    ))
}

pub(super) fn parked_already(id: i64) -> Refused {
    Refused(format!(
        "event {id} is parked: `outbox-relay parked drop {id} --reason …` gives it up"
    ))
}
