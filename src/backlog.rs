//! How much waits to be published: asked of the store, whatever state the relays are in.
//!
//! A relay that is stalled, halted or has just begun does not know it, and those are the times when people ask. Only reads.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::time::Duration;

use anyhow::{Context, Error};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use crate::config::Source;
use crate::crew::ShownRelay;
use crate::database::Database;
use crate::event::{PipelineName, Shard};
use crate::ledger::view::Waiting;
use crate::relay::status::State;
use crate::telemetry::BacklogMetrics;

/// Between two questions, at least.
const INTERVAL: Duration = Duration::from_secs(5);
/// The questions take this part of the time at most: a store that answers slowly is asked less often.
const PART: u32 = 20;
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

/// Asks once, with a session of its own.
///
/// # Errors
/// When the store can't be asked within 10 s.
pub async fn look(source: &Source) -> Result<Vec<Waiting>, Error> {
    timeout(ANSWER_MAX, ask(source, &mut None))
        .await
        .context("the database does not answer")?
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
}
