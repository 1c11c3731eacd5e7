//! The shop's clients at work: several transactions at once, at a steady pace.

use std::time::Duration;

use anyhow::Result;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::shop::{Shop, Transaction};
use super::store::{Client, Done};
use super::{Happening, Progress};

/// Committed events that the consumer has not seen, at most: the embedded broker keeps the newest 5 MiB of a partition
/// and forgets the rest.
const AHEAD_MAX: usize = 10_000;

/// Who fell behind by more than this does not hurry to catch up.
const LATE_MAX: Duration = Duration::from_millis(100);

/// How much is sold, and how fast.
pub(super) struct Plan {
    pub(super) events: u64,
    /// Events per second; none for as fast as it goes.
    pub(super) rate: Option<f64>,
}

/// Sells until about as many events are committed as planned, or `closing`; every transaction that was begun is ended.
///
/// Returns how many events were committed.
pub(super) async fn trade(
    mut shop: Shop,
    clients: Vec<Client>,
    plan: Plan,
    happenings: mpsc::Sender<Happening>,
    mut progress: watch::Receiver<Progress>,
    closing: CancellationToken,
) -> Result<usize> {
    let mut idle = clients;
    let mut running = FuturesUnordered::new();
    let mut due = Instant::now();
    let mut planned = 0;
    let mut committed = 0;
    loop {
        let open = planned < plan.events && !closing.is_cancelled();
        if !open && running.is_empty() {
            return Ok(committed);
        }
        let ahead = progress.borrow_and_update().outstanding >= AHEAD_MAX;
        // In this order: an end makes room for a beginning; a request to stop waits for nobody.
        tokio::select! {
            biased;
            Some((client, transaction, done)) = running.next() => {
                let done: Done = done?;
                let transaction: Transaction = transaction;
                if transaction.refusal.is_none() {
                    committed += done.events.len();
                }
                shop.end(transaction.clone(), transaction.refusal.is_none());
                idle.push(client);
                if happenings.send(Happening::Ended(transaction, done)).await.is_err() {
                    return Ok(committed);
                }
            }
            () = closing.cancelled(), if open => {}
            () = sleep_until(due), if open && !ahead && !idle.is_empty() => {
                let Some(mut client) = idle.pop() else { continue };
                let transaction = shop.begin();
                let events = transaction.changes.len();
                if transaction.refusal.is_none() {
                    planned += events as u64;
                }
                due = next(due, plan.rate, events);
                running.push(async move {
                    let done = client.execute(&transaction).await;
                    (client, transaction, done)
                });
            }
            changed = progress.changed(), if open && ahead => if changed.is_err() {
                return Ok(committed);
            }
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a handful of events")]
fn next(due: Instant, rate: Option<f64>, events: usize) -> Instant {
    let now = Instant::now();
    match rate {
        None => now,
        Some(rate) => {
            let late = now.saturating_duration_since(due);
            let due = if late > LATE_MAX { now } else { due };
            due + Duration::from_secs_f64(events as f64 / rate)
        }
    }
}
