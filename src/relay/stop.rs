//! A request to stop, and what is still published after it.
//!
//! A relay whose process ends reads on up to what was committed when the request came, publishes that and waits for the
//! confirmations, all of it within `relay.drain_timeout`: for a job or the last relay of a service there is no next one soon.
//! A relay that leaves its shard to another one waits for the confirmations only.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::publish::Life;
use super::turn::Turn;
use crate::position::Window;
use crate::source::Page;

/// The request, as the parts of a tenure see it.
pub(super) struct Stop {
    asked: CancellationToken,
    /// An operator has paused the pipeline, which is a request as well.
    paused: CancellationToken,
    turn: watch::Receiver<Turn>,
    drain_timeout: Duration,
    /// When everything ends, whatever is left.
    until: OnceLock<Instant>,
}

impl Stop {
    pub(super) fn new(
        asked: CancellationToken,
        paused: CancellationToken,
        turn: watch::Receiver<Turn>,
        drain_timeout: Duration,
    ) -> Self {
        Self {
            asked,
            paused,
            turn,
            drain_timeout,
            until: OnceLock::new(),
        }
    }

    pub(super) fn is_asked(&self) -> bool {
        self.asked.is_cancelled() || self.paused.is_cancelled()
    }

    /// Waits for the request.
    ///
    /// # Cancel safety
    /// Safe: only looks.
    pub(super) async fn asked(&self) {
        tokio::select! {
            () = self.asked.cancelled() => {}
            () = self.paused.cancelled() => {}
        }
    }

    /// Whether what was committed when the request came is read and published: not where another relay goes on at once, nor
    /// in a pause, which is to take effect soon.
    pub(super) fn covers(&self) -> bool {
        !self.paused.is_cancelled() && *self.turn.borrow() == Turn::Ours
    }

    /// When the drain is over; counted from the first question after the request.
    pub(super) fn until(&self) -> Instant {
        *self
            .until
            .get_or_init(|| Instant::now() + self.drain_timeout)
    }

    /// Whether nothing more is to be done.
    pub(super) fn is_over(&self) -> bool {
        self.is_asked() && (!self.covers() || Instant::now() >= self.until())
    }

    /// Waits until nothing more is to be done. Where nothing moves it does not wait for better times.
    ///
    /// # Cancel safety
    /// Safe: only looks.
    pub(super) async fn over(&self, moves: bool) {
        self.asked().await;
        if self.covers() && moves {
            sleep_until(self.until()).await;
        }
    }
}

/// Finds out when everything is read that was committed when the request came.
pub(super) struct Coverage {
    /// Of the last page.
    window: Arc<Window>,
    /// Windows that were opened after the request.
    opened: u32,
}

/// What becomes of a page that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// More is to be read after it.
    On,
    /// It is the last one.
    Last,
    /// All that counts came before it.
    Beyond,
}

impl Coverage {
    /// Beginning in this window.
    pub(super) fn new(window: Arc<Window>) -> Self {
        Self { window, opened: 0 }
    }

    /// Takes note of a page; `after` says that its reading began after the request.
    ///
    /// A window that was opened after the request holds all that was committed when it came, and ends although writers go on.
    pub(super) fn note(&mut self, page: &Page, after: bool) -> Read {
        let opens = page.end.window != self.window;
        self.window = page.end.window.clone();
        if !after {
            return Read::On;
        }
        self.opened += u32::from(opens);
        match self.opened {
            2.. => Read::Beyond,
            _ if page.more => Read::On,
            _ => Read::Last,
        }
    }
}

/// The drain of one life.
#[derive(Default)]
pub(super) struct Drain {
    /// When it is over; none before the request.
    pub(super) until: Option<Instant>,
    /// What is at hand and not handed over is left to the next relay.
    leaves: bool,
    /// No page comes any more.
    pages_ended: bool,
}

impl Drain {
    /// Whether nothing is taken up any more.
    pub(super) fn leaves(&self) -> bool {
        self.leaves
    }

    /// Whether pages are taken.
    pub(super) fn takes_pages(&self) -> bool {
        !self.leaves && !self.pages_ended
    }
}

impl Life {
    /// The request to stop has come. `is_full`: no page is read in this life.
    pub(super) fn begin_drain(&mut self, stop: &Stop, is_full: bool) {
        self.drain.until = Some(stop.until());
        self.drain.pages_ended |= is_full;
        if !stop.covers() {
            self.drain.leaves = true;
            self.more = false;
            self.pending.clear();
            self.lookups.clear();
            self.redrive.cut();
        }
    }

    /// The reader has nothing more.
    pub(super) fn end_pages(&mut self) {
        self.drain.pages_ended = true;
        self.more = false;
    }

    /// Whether everything that counts after the request is settled.
    pub(super) fn is_drained(&self) -> bool {
        let handed_over = self.pending.is_empty() && self.lookups.held() == 0;
        self.drain.until.is_some()
            && self.awaited() == 0
            && (self.drain.leaves || (self.drain.pages_ended && handed_over))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::EventId;
    use crate::position::Position;

    fn page(ceiling: i64, more: bool) -> Page {
        let window = Window {
            ceiling: EventId(ceiling),
            ..Window::beginning()
        };
        Page {
            events: Vec::new(),
            end: Position {
                window: Arc::new(window),
                last_id: EventId(0),
            },
            more,
        }
    }

    #[test]
    fn the_window_that_was_opened_after_the_request_is_the_last_one() {
        let mut coverage = Coverage::new(page(0, true).end.window);
        assert_eq!(coverage.note(&page(10, true), false), Read::On);
        // What was opened before may lack the newest commits.
        assert_eq!(coverage.note(&page(10, true), true), Read::On);
        assert_eq!(coverage.note(&page(20, true), true), Read::On);
        assert_eq!(coverage.note(&page(20, true), true), Read::On);
        assert_eq!(coverage.note(&page(30, true), true), Read::Beyond);
    }

    #[test]
    fn nothing_more_is_the_end_only_where_it_was_looked_for_after_the_request() {
        let mut coverage = Coverage::new(page(0, true).end.window);
        assert_eq!(coverage.note(&page(10, false), false), Read::On);
        assert_eq!(coverage.note(&page(20, false), true), Read::Last);
    }
}
