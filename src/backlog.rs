//! How much waits to be published: asked of the store, whatever state the relays are in.
//!
//! A relay that is stalled, halted or has just begun does not know it, and those are the times when people ask. Only reads.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::time::Duration;

use anyhow::{Error, bail};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use crate::config::Source;
use crate::crew::ShownRelay;
use crate::database::Database;
use crate::event::{PipelineName, Shard};
use crate::ledger::view::Waiting;
use crate::reason::reason;
use crate::relay::status::State;
use crate::telemetry::BacklogMetrics;

/// Between two questions, at least.
const INTERVAL: Duration = Duration::from_secs(5);
/// The questions take this part of the time at most: a store that answers slowly is asked less often.
const PART: u32 = 20;
/// Between two looks whether nothing waits any more.
const EMPTY_LOOK: Duration = Duration::from_millis(250);
/// For the last look of a process that ends.
const LAST_LOOK_MAX: Duration = Duration::from_secs(1);
/// For connecting and the answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// What waits of one shard.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Backlog {
    /// The newest id that the log handed out.
    pub newest_id: i64,
    /// Ids between the cursor and that.
    pub ids: Option<i64>,
    /// Age of the oldest committed event that is not confirmed.
    pub oldest_seconds: Option<f64>,
}

/// What waits of the shards that this process owns, or that no relay owns; of no other.
#[derive(Clone, Debug, Default)]
pub struct Backlogs(BTreeMap<(String, u32), Backlog>);

impl Backlogs {
    /// Of one shard, if it is known.
    #[must_use]
    pub fn of(&self, pipeline: &PipelineName, shard: Shard) -> Option<&Backlog> {
        self.0.get(&(pipeline.to_string(), shard.index))
    }
}

/// Asks every few seconds, and sets the gauges, for ever. `holder` is this process.
pub async fn watch(
    source: Source,
    holder: String,
    relays: watch::Receiver<Vec<ShownRelay>>,
    seen: watch::Sender<Backlogs>,
) -> Infallible {
    let mut session = None;
    let mut gauges: BTreeMap<(String, u32), BacklogMetrics> = BTreeMap::new();
    loop {
        let began = Instant::now();
        let asks = shards(&relays);
        let found = if asks.is_empty() {
            // The owner asks; a session for a standby would be one too many.
            session = None;
            Backlogs::default()
        } else {
            match timeout(ANSWER_MAX, ask(&source, &mut session)).await {
                Ok(Ok(rows)) => ours(&rows, &asks, &holder),
                // The relays say what is wrong with the database.
                failed => {
                    tracing::debug!(?failed, "could not ask how much waits");
                    session = None;
                    Backlogs::default()
                }
            }
        };
        for shard in found.0.keys() {
            gauges
                .entry(shard.clone())
                .or_insert_with(|| BacklogMetrics::new(&shard.0, shard.1));
        }
        for (shard, gauge) in &gauges {
            gauge.set(
                found
                    .0
                    .get(shard)
                    .map(|backlog| (backlog.ids, backlog.oldest_seconds)),
            );
        }
        seen.send_replace(found);
        sleep(INTERVAL.max(began.elapsed() * PART)).await;
    }
}

/// The shards that this process may own.
fn shards(relays: &watch::Receiver<Vec<ShownRelay>>) -> Vec<(String, u32)> {
    relays
        .borrow()
        .iter()
        .filter(|relay| {
            let status = relay.status.borrow();
            !matches!(status.state, State::Standby { .. } | State::Stopped)
        })
        .map(|relay| (relay.pipeline.to_string(), relay.shard.index))
        .collect()
}

fn ours(rows: &[Waiting], asks: &[(String, u32)], holder: &str) -> Backlogs {
    let mut found = BTreeMap::new();
    for row in rows {
        let shard = (row.pipeline.clone(), u32::try_from(row.shard).unwrap_or(0));
        let others = row.holder.as_ref().is_some_and(|owner| owner != holder);
        if others || !asks.contains(&shard) {
            continue;
        }
        // An age that could not be found out is not known; none that was looked for is no age at all.
        let nothing = row.oldest_unpublished_unknown.is_none() && row.backlog_ids.is_some();
        let backlog = Backlog {
            newest_id: row.newest_id,
            ids: row.backlog_ids,
            oldest_seconds: row
                .oldest_unpublished_seconds
                .map(|age| age.max(0.0))
                .or(nothing.then_some(0.0)),
        };
        found.insert(shard, backlog);
    }
    Backlogs(found)
}

async fn ask(source: &Source, session: &mut Option<Database>) -> Result<Vec<Waiting>, Error> {
    let mut database = match session.take() {
        Some(database) => database,
        None => Database::open(source).await?,
    };
    let rows = database.waiting().await?;
    *session = Some(database);
    Ok(rows)
}

/// What the last line of the log says, and whether nothing waits any more. Of the pipelines of this process only.
pub async fn rest(source: &Source, relays: &watch::Receiver<Vec<ShownRelay>>) -> (String, bool) {
    let names: BTreeSet<String> = relays
        .borrow()
        .iter()
        .map(|relay| relay.pipeline.to_string())
        .collect();
    match timeout(LAST_LOOK_MAX, ask(source, &mut None)).await {
        Ok(Ok(rows)) => said(&rows, &names),
        Ok(Err(error)) => (
            format!("how many events wait is not known: {}", reason(&error)),
            false,
        ),
        Err(_) => {
            let why = "how many events wait is not known: the database does not answer";
            (why.to_owned(), false)
        }
    }
}

fn said(rows: &[Waiting], names: &BTreeSet<String>) -> (String, bool) {
    // The shards of a pipeline count the same ids.
    let mut pipelines: BTreeMap<&str, (i64, f64, Option<&str>)> = BTreeMap::new();
    for row in rows.iter().filter(|row| names.contains(&row.pipeline)) {
        let unknown = row.oldest_unpublished_unknown.is_some();
        if row.oldest_unpublished_seconds.is_none() && !unknown {
            continue;
        }
        let (ids, oldest, holder) = pipelines.entry(&row.pipeline).or_insert((0, 0.0, None));
        // A transaction that was open for long has ids below the cursor.
        *ids = (*ids).max(row.backlog_ids.unwrap_or(0)).max(1);
        *oldest = oldest.max(row.oldest_unpublished_seconds.unwrap_or(0.0));
        *holder = holder.or(row.holder.as_deref());
    }
    if pipelines.is_empty() {
        return ("0 events wait".to_owned(), true);
    }
    let parts = pipelines
        .into_iter()
        .map(|(pipeline, (ids, oldest, holder))| {
            let age = Duration::try_from_secs_f64(oldest).unwrap_or_default();
            let age = humantime::format_duration(Duration::from_secs(age.as_secs()));
            let next = match holder {
                Some(holder) => format!("{holder} publishes them"),
                None => "the next relay publishes them".to_owned(),
            };
            format!("about {ids} events of pipeline {pipeline} wait, the oldest for {age}: {next}")
        });
    (parts.collect::<Vec<_>>().join("; "), false)
}

/// Waits until everything that was committed when this was called is published or set aside, whichever relay does that.
///
/// # Errors
/// When a pipeline of this process has halted: then a person has to act.
pub async fn emptied(
    source: &Source,
    relays: watch::Receiver<Vec<ShownRelay>>,
) -> Result<(), Error> {
    let began = Instant::now();
    let mut session = None;
    let mut told = BTreeSet::new();
    loop {
        let asked = timeout(ANSWER_MAX, ask(source, &mut session)).await;
        // What is younger was committed later.
        let elapsed = began.elapsed().as_secs_f64();
        if !matches!(asked, Ok(Ok(_))) {
            // The relays say what is wrong with the database.
            session = None;
        }
        let rows = asked.unwrap_or_else(|_| Ok(Vec::new())).unwrap_or_default();
        let mut waits = false;
        for relay in &*relays.borrow() {
            let name = &relay.pipeline;
            match &relay.status.borrow().state {
                State::Halted { reason } => bail!("pipeline {name} has halted: {reason}"),
                State::Standby { holder } if told.insert((name.clone(), holder.clone())) => {
                    tracing::info!(pipeline = %name, %holder,
                        "another relay owns it and publishes its events: waiting until none of them waits");
                }
                _ => {}
            }
            let is_its = |row: &&Waiting| {
                row.pipeline == name.as_str()
                    && u32::try_from(row.shard) == Ok(relay.shard.index)
                    && u32::try_from(row.shards) == Ok(relay.shard.count)
            };
            let row = rows.iter().find(is_its);
            waits |= row.is_none_or(|row| waits_since_before(row, elapsed));
        }
        if !waits {
            return Ok(());
        }
        sleep(EMPTY_LOOK).await;
    }
}

/// Whether an event waits that was committed so many seconds ago or earlier, or it is not known whether one does.
fn waits_since_before(row: &Waiting, seconds: f64) -> bool {
    row.backlog_ids.is_none()
        || row.oldest_unpublished_unknown.is_some()
        || row
            .oldest_unpublished_seconds
            .is_some_and(|age| age >= seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(shard: i32, holder: Option<&str>) -> Waiting {
        Waiting {
            pipeline: "main".to_owned(),
            shard,
            shards: 4,
            newest_id: 9,
            backlog_ids: Some(2),
            oldest_unpublished_seconds: None,
            oldest_unpublished_unknown: None,
            holder: holder.map(str::to_owned),
        }
    }

    #[test]
    fn what_another_relay_owns_is_its_affair_and_what_is_not_known_is_not_zero() {
        let unknown = Waiting {
            oldest_unpublished_unknown: Some("no such table".to_owned()),
            ..row(2, Some("me"))
        };
        let never_ran = Waiting {
            backlog_ids: None,
            ..row(3, None)
        };
        let rows = [
            row(0, Some("me")),
            row(1, Some("other")),
            unknown,
            never_ran,
        ];
        let asks: Vec<(String, u32)> = (0..4).map(|shard| ("main".to_owned(), shard)).collect();
        let found = ours(&rows, &asks, "me");
        let shown: Vec<_> = found
            .0
            .iter()
            .map(|((_, shard), backlog)| (*shard, backlog.ids, backlog.oldest_seconds))
            .collect();
        assert_eq!(
            shown,
            [(0, Some(2), Some(0.0)), (2, Some(2), None), (3, None, None)]
        );
        assert!(
            ours(&rows, &[], "me").0.is_empty(),
            "a standby does not ask"
        );
    }
    #[test]
    fn the_last_line_counts_the_ids_of_a_pipeline_once() {
        let names = BTreeSet::from(["main".to_owned()]);
        let waiting = |shard, holder| Waiting {
            oldest_unpublished_seconds: Some(f64::from(shard) + 3.5),
            ..row(shard, holder)
        };
        let nothing = [row(0, None), row(1, None)];
        assert_eq!(said(&nothing, &names), ("0 events wait".to_owned(), true));
        let some = "about 2 events of pipeline main wait, the oldest for 4s: the next relay publishes them";
        let rows = [waiting(0, None), waiting(1, None), row(2, None)];
        assert_eq!(said(&rows, &names), (some.to_owned(), false));
        let (taken, _) = said(&[waiting(0, Some("other"))], &names);
        assert!(taken.ends_with(": other publishes them"), "{taken}");
        assert!(said(&rows, &BTreeSet::new()).1, "of other processes");
    }

    #[test]
    fn what_was_committed_after_the_beginning_is_not_waited_for() {
        let waiting = |age| Waiting {
            oldest_unpublished_seconds: Some(age),
            ..row(0, None)
        };
        assert!(waits_since_before(&waiting(2.0), 1.0));
        assert!(!waits_since_before(&waiting(0.5), 1.0));
        assert!(!waits_since_before(&row(0, None), 1.0));
        let never_ran = Waiting {
            backlog_ids: None,
            ..row(0, None)
        };
        assert!(waits_since_before(&never_ran, 1.0));
    }
}
