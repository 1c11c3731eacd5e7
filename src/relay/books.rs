//! Keeps the ledger while a pipeline runs: renews the lease, moves the cursor, parks events.
//!
//! The one user of the ledger's connection; its three duties come one after the other, each a single short statement.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::ledger::{Fenced, Ledger, LedgerError, Parked};
use crate::position::Position;

/// Events to park, and where to say that they are.
pub(super) struct ParkOrder {
    pub(super) parked: Vec<Parked>,
    pub(super) done: oneshot::Sender<()>,
}

/// The ends of the channels that the books hold.
pub(super) struct Desk {
    /// How far everything is settled.
    pub(super) settled: watch::Receiver<Position>,
    /// How far that is durable.
    pub(super) durable: watch::Sender<Position>,
    pub(super) orders: mpsc::Receiver<ParkOrder>,
    /// Until when the lease holds if it is not renewed.
    pub(super) lease_until: watch::Sender<Instant>,
}

/// Why the books were closed.
#[derive(Debug)]
pub(super) enum Closed {
    /// The pipeline ended first; the last position is written.
    Done,
    /// The lease ran out or passed to somebody else.
    LeaseLost,
    /// A write failed, or it is unknown whether it did.
    Trouble(LedgerError),
}

pub(super) struct Pace {
    pub(super) lease_ttl: Duration,
    /// The cursor moves at most this often; what is confirmed meanwhile rides along.
    pub(super) acknowledge_interval: Duration,
}

/// Runs until the pipeline drops its ends of the channels, or the lease is lost.
pub(super) async fn keep<L: Ledger>(ledger: &mut L, desk: &mut Desk, pace: &Pace) -> Closed {
    let renew_interval = pace.lease_ttl / 3;
    // A third of the lease after it was asked for.
    let mut renew_at = desk
        .lease_until
        .borrow()
        .checked_sub(2 * renew_interval)
        .unwrap_or_else(Instant::now);
    let mut acknowledge_at = Instant::now();
    loop {
        let durable = desk.durable.borrow().clone();
        let deadline = *desk.lease_until.borrow();
        // In this order: without a lease nothing else counts; a parked event holds up its pipeline; the cursor can wait.
        let done = tokio::select! {
            biased;
            () = sleep_until(renew_at) => {
                renew_at = Instant::now() + renew_interval;
                let asked_at = Instant::now();
                let renewed = timeout_at(deadline, ledger.renew()).await;
                if matches!(renewed, Ok(Ok(Fenced::Written))) {
                    desk.lease_until.send_replace(asked_at + pace.lease_ttl);
                }
                renewed
            }
            Some(order) = desk.orders.recv() => {
                let parked = timeout_at(deadline, ledger.park(&order.parked)).await;
                if matches!(parked, Ok(Ok(Fenced::Written))) {
                    // Whoever asked may have ended its life meanwhile; the event is parked all the same.
                    let _ = order.done.send(());
                }
                parked
            }
            moved = moved_from(&mut desk.settled, &durable, acknowledge_at) => {
                let Some(position) = moved else {
                    return Closed::Done;
                };
                acknowledge_at = Instant::now() + pace.acknowledge_interval;
                let moved = timeout_at(deadline, ledger.acknowledge(&position)).await;
                if matches!(moved, Ok(Ok(Fenced::Written))) {
                    desk.durable.send_replace(position);
                }
                moved
            }
        };
        match done {
            Ok(Ok(Fenced::Written)) => {}
            Ok(Ok(Fenced::Lost)) | Err(_) => return Closed::LeaseLost,
            Ok(Err(error)) => return Closed::Trouble(error),
        }
    }
}

/// The settled position once it is another than the durable one and the time has come; none when the pipeline has ended
/// and everything is durable.
///
/// # Cancel safety
/// Safe: only looks.
async fn moved_from(
    settled: &mut watch::Receiver<Position>,
    durable: &Position,
    not_before: Instant,
) -> Option<Position> {
    if settled
        .wait_for(|settled| settled != durable)
        .await
        .is_err()
    {
        return None;
    }
    // The last position of a pipeline that has ended is written at once.
    let due = sleep_until(not_before);
    tokio::pin!(due);
    loop {
        tokio::select! {
            biased;
            () = &mut due => break,
            moved = settled.changed() => if moved.is_err() { break },
        }
    }
    Some(settled.borrow().clone())
}
