//! Keeps the ledger while a pipeline runs: renews the lease, moves the cursor, parks events, looks for due ones.
//!
//! The one user of the ledger's connection; its duties come one after the other, each a short transaction.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::error::Elapsed;
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

use super::Changes;
use super::lease::{LeaseEnd, Loss};
use crate::event::EventKey;
use crate::ledger::{
    Due, Fenced, Ledger, LedgerError, Parked, Released, Renewed, Resolution, Resolved,
};
use crate::position::Position;

/// What the loop wants of the books, and where to answer.
pub(super) enum Order {
    /// Set these aside, and say that they are.
    Park(Vec<Parked>, oneshot::Sender<()>),
    /// Say which parked events are due, as soon as there are any.
    Due(oneshot::Sender<Vec<Due>>),
    /// Write what became of them, and say what that released.
    Resolve(Resolved, oneshot::Sender<Released>),
    /// Say why an operator wants this event left out, if one does.
    Skipped(EventKey, oneshot::Sender<Option<String>>),
}

/// The ends of the channels that the books hold.
pub(super) struct Desk {
    /// How far everything is settled.
    pub(super) settled: watch::Receiver<Position>,
    /// How far that is durable.
    pub(super) durable: watch::Sender<Position>,
    pub(super) orders: mpsc::Receiver<Order>,
    /// Until when the lease holds if it is not renewed.
    pub(super) lease_end: watch::Sender<LeaseEnd>,
    /// Cancelled when an operator has paused the pipeline.
    pub(super) paused: CancellationToken,
    /// The wall clock, in microseconds since the Unix epoch.
    pub(super) now_us: fn() -> i64,
}

/// Why the books were closed.
#[derive(Debug)]
pub(super) enum Closed {
    /// The pipeline ended first; the last position is written.
    Done,
    /// The lease ran out or passed to somebody else.
    LeaseLost(Loss),
    /// A write failed, or it is unknown whether it did.
    Trouble(LedgerError),
}

pub(super) struct Pace {
    pub(super) lease_ttl: Duration,
    /// The cursor moves at most this often; what is confirmed meanwhile rides along.
    pub(super) acknowledge_interval: Duration,
    /// So many ids behind, it moves sooner: a crash publishes all of them again.
    pub(super) behind_max: usize,
    /// Due events at once, at most, and their bytes.
    pub(super) page_rows: usize,
    pub(super) due_bytes: usize,
    /// Due events in a second, as long as no other rate is given.
    pub(super) redrive_rate: usize,
    pub(super) changes: watch::Receiver<Option<Arc<Changes>>>,
}

impl Pace {
    fn redrive_rate(&self) -> usize {
        let changes = self.changes.borrow();
        let rate = changes.as_ref().map(|changes| changes.redrive_rate);
        rate.unwrap_or(self.redrive_rate).max(1)
    }

    fn due_rows(&self) -> usize {
        self.page_rows.min(self.redrive_rate())
    }

    fn renew_interval(&self) -> Duration {
        self.lease_ttl / 3
    }

    /// How long after this many due events the next ones are looked for. An idle relay looks as often as it renews.
    fn look_interval(&self, found: usize) -> Duration {
        if found == 0 {
            self.renew_interval()
        } else {
            let found = u32::try_from(found).unwrap_or(u32::MAX);
            Duration::from_secs(1) * found / u32::try_from(self.redrive_rate()).unwrap_or(1)
        }
    }
}

/// Runs until the pipeline drops its ends of the channels, or the lease is lost.
pub(super) async fn keep<L: Ledger>(ledger: &mut L, desk: &mut Desk, pace: &Pace) -> Closed {
    let renew_interval = pace.renew_interval();
    // A third of the lease after it was asked for.
    let mut renew_at = desk
        .lease_end
        .borrow()
        .at
        .checked_sub(2 * renew_interval)
        .unwrap_or_else(Instant::now);
    let mut acknowledge_at = Instant::now();
    let mut look_at = Instant::now();
    let mut asker: Option<oneshot::Sender<Vec<Due>>> = None;
    loop {
        let durable = desk.durable.borrow().clone();
        let deadline = desk.lease_end.borrow().at;
        let is_asked = asker.as_ref().is_some_and(|asker| !asker.is_closed());
        // In this order: without a lease nothing else counts; a parked event holds up its pipeline; what is due was asked
        // for by a person; the cursor can wait.
        let done = tokio::select! {
            biased;
            () = sleep_until(renew_at) => {
                renew_at = Instant::now() + renew_interval;
                let renewed_end = LeaseEnd::asked_now(pace.lease_ttl, (desk.now_us)());
                let renewed = timeout_at(deadline, ledger.renew()).await;
                renewed.map(|renewed| renewed.map(|renewed| match renewed {
                    Renewed::Lost => Fenced::Lost,
                    Renewed::Extended | Renewed::Paused => {
                        desk.lease_end.send_replace(renewed_end);
                        if renewed == Renewed::Paused {
                            desk.paused.cancel();
                        }
                        Fenced::Written
                    }
                }))
            }
            Some(order) = desk.orders.recv() => match fulfil(ledger, order, deadline).await {
                Fulfilled::Asked(new) => {
                    asker = Some(new);
                    continue;
                }
                Fulfilled::Wrote(answer) => answer,
            },
            () = sleep_until(look_at), if is_asked => {
                let due = timeout_at(deadline, ledger.due(pace.due_rows(), pace.due_bytes)).await;
                let found = due.as_ref().map_or(0, |due| due.as_ref().map_or(0, Vec::len));
                look_at = Instant::now() + pace.look_interval(found);
                due.map(|due| due.map(|due| {
                    if let Some(asker) = asker.take_if(|_| !due.is_empty()) {
                        // If the life that asked has ended they are found again.
                        let _ = asker.send(due);
                    }
                    Fenced::Written
                }))
            }
            moved = moved_from(&mut desk.settled, &durable, acknowledge_at, pace.behind_max) => {
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
            Ok(Ok(Fenced::Lost)) => return Closed::LeaseLost(Loss::Taken),
            Err(_) => return Closed::LeaseLost(Loss::Expired),
            Ok(Err(error)) => return Closed::Trouble(error),
        }
    }
}

enum Fulfilled {
    /// Somebody waits for due events.
    Asked(oneshot::Sender<Vec<Due>>),
    Wrote(Result<Result<Fenced, LedgerError>, Elapsed>),
}

/// Does what an order says, before the lease ends. Whoever gave it may have ended its life meanwhile; what is written is
/// written all the same.
async fn fulfil<L: Ledger>(ledger: &mut L, order: Order, deadline: Instant) -> Fulfilled {
    Fulfilled::Wrote(match order {
        Order::Due(asker) => return Fulfilled::Asked(asker),
        Order::Park(parked, done) => {
            let parked = timeout_at(deadline, ledger.park(&parked)).await;
            if matches!(parked, Ok(Ok(Fenced::Written))) {
                let _ = done.send(());
            }
            parked
        }
        Order::Skipped(event, done) => {
            let skipped = timeout_at(deadline, ledger.skipped(event)).await;
            skipped.map(|skipped| {
                skipped.map(|skipped| {
                    let _ = done.send(skipped);
                    Fenced::Written
                })
            })
        }
        Order::Resolve(resolved, done) => {
            let written = timeout_at(deadline, ledger.resolve(&resolved)).await;
            written.map(|written| {
                written.map(|resolution| match resolution {
                    Resolution::Written(released) => {
                        let _ = done.send(released);
                        Fenced::Written
                    }
                    Resolution::Lost => Fenced::Lost,
                })
            })
        }
    })
}

/// The settled position once it is another than the durable one and the time has come, or it is far ahead; none when the pipeline has ended
/// and everything is durable.
///
/// # Cancel safety
/// Safe: only looks.
async fn moved_from(
    settled: &mut watch::Receiver<Position>,
    durable: &Position,
    not_before: Instant,
    behind_max: usize,
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
        let ahead = settled.borrow_and_update().last_id.0 - durable.last_id.0;
        if usize::try_from(ahead).is_ok_and(|ahead| ahead >= behind_max) {
            break;
        }
        tokio::select! {
            biased;
            () = &mut due => break,
            moved = settled.changed() => if moved.is_err() { break },
        }
    }
    Some(settled.borrow().clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::EventId;

    #[tokio::test(start_paused = true)]
    async fn a_cursor_that_is_far_behind_does_not_wait() {
        let at = |last_id| Position {
            last_id: EventId(last_id),
            ..Position::beginning()
        };
        let (settled, mut seen) = watch::channel(at(99));
        let later = Instant::now() + Duration::from_hours(1);
        let durable = at(0);
        let moved = moved_from(&mut seen, &durable, later, 100);
        let waited = tokio::time::timeout(Duration::from_mins(59), moved).await;
        assert!(waited.is_err(), "99 ids can wait");
        settled.send_replace(at(100));
        assert_eq!(
            moved_from(&mut seen, &durable, later, 100).await,
            Some(at(100))
        );
        assert!(Instant::now() < later);
    }
}
