//! Hears of everything that happens, shows it, and remembers it for the checker.

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval};
use uuid::Uuid;

use super::checker::{Seen, Written, judge};
use super::screen::{Numbers, Screen};
use super::{Happening, Latency, Progress, Report, Settings, Stop};
use crate::relay::status::{State, Status};

const FRAME: Duration = Duration::from_millis(80);
/// Rates and latencies change this often, so that they can be read.
const SLOW: Duration = Duration::from_millis(500);
/// The latest latencies count for what is shown while it runs.
const RECENT: usize = 1000;

pub(super) struct Director {
    screen: Screen,
    stop: Stop,
    progress: watch::Sender<Progress>,
    status: watch::Receiver<Status>,
    committed: Vec<Written>,
    rolled_back: Vec<Uuid>,
    seen: Vec<Seen>,
    /// When the commits of events were asked for that have not been seen.
    waiting: HashMap<Uuid, Instant>,
    /// When events were seen whose transactions are not known to have ended.
    early: HashMap<Uuid, Instant>,
    latencies_us: Vec<u32>,
    numbers: Numbers,
    began: Instant,
    finished: Instant,
    slow: (Instant, u64),
}

impl Director {
    pub(super) fn new(
        settings: &Settings,
        path: String,
        stop: Stop,
        progress: watch::Sender<Progress>,
        status: watch::Receiver<Status>,
    ) -> Result<Self> {
        let now = Instant::now();
        Ok(Self {
            screen: Screen::open(settings.plain, path).context("open the screen")?,
            stop,
            progress,
            status,
            committed: Vec::new(),
            rolled_back: Vec::new(),
            seen: Vec::new(),
            waiting: HashMap::new(),
            early: HashMap::new(),
            latencies_us: Vec::new(),
            numbers: Numbers {
                wanted: settings.events,
                ..Numbers::default()
            },
            began: now,
            finished: now,
            slow: (now, 0),
        })
    }

    /// Until nobody is left who could tell of anything.
    ///
    /// # Errors
    /// When nothing can be shown any more.
    pub(super) async fn direct(&mut self, mut happened: mpsc::Receiver<Happening>) -> Result<()> {
        const AT_ONCE: usize = 256;
        let mut frames = interval(FRAME);
        frames.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Vec::with_capacity(AT_ONCE);
        loop {
            // In this order: a flood of news does not freeze the picture.
            tokio::select! {
                biased;
                _ = frames.tick() => self.frame().context("draw the screen")?,
                count = happened.recv_many(&mut heard, AT_ONCE) => {
                    if count == 0 {
                        return self.frame().context("draw the screen");
                    }
                    for happening in heard.drain(..) {
                        self.take(happening).context("write to the screen")?;
                    }
                    self.progress.send_replace(Progress {
                        committed: self.committed.len(),
                        outstanding: self.waiting.len(),
                    });
                }
            }
        }
    }

    /// The check, and the end of the screen.
    pub(super) fn report(self) -> Report {
        Report {
            verdict: judge(&self.committed, &self.rolled_back, &self.seen),
            transactions: self.numbers.transactions,
            rolled_back_transactions: self.numbers.rolled_back,
            latency: percentiles(&mut self.latencies_us.clone()),
            took: self.finished.saturating_duration_since(self.began),
            trouble: self.numbers.trouble,
        }
    }

    fn take(&mut self, happening: Happening) -> io::Result<()> {
        match happening {
            Happening::Ended(transaction, done) => {
                self.screen.ended(&transaction)?;
                if self.numbers.transactions + self.numbers.rolled_back == 0 {
                    self.began = done.ended_at;
                }
                if transaction.refusal.is_some() {
                    self.numbers.rolled_back += 1;
                    self.rolled_back.extend(done.events.iter().map(|e| e.id));
                    return Ok(());
                }
                self.numbers.transactions += 1;
                for event in done.events {
                    match self.early.remove(&event.id) {
                        Some(seen_at) => self.arrived(done.ended_at, seen_at),
                        None => drop(self.waiting.insert(event.id, done.ended_at)),
                    }
                    self.committed.push(event);
                }
            }
            Happening::Seen(seen, at) => {
                self.screen.seen(&seen)?;
                if let Some(id) = seen.id {
                    match self.waiting.remove(&id) {
                        Some(ended_at) => self.arrived(ended_at, at),
                        // The consumer may hear of it before the client that has asked for the commit.
                        None => drop(self.early.insert(id, at)),
                    }
                }
                self.seen.push(seen);
            }
        }
        Ok(())
    }

    fn arrived(&mut self, ended_at: Instant, seen_at: Instant) {
        let latency = seen_at.saturating_duration_since(ended_at);
        self.latencies_us
            .push(u32::try_from(latency.as_micros()).unwrap_or(u32::MAX));
        self.finished = self.finished.max(seen_at);
    }

    fn frame(&mut self) -> io::Result<()> {
        let now = Instant::now();
        let consumed = self.seen.len() as u64;
        let status = self.status.borrow();
        self.numbers.committed = self.committed.len() as u64;
        self.numbers.consumed = consumed;
        // The relay counts once a second; what was consumed was published.
        self.numbers.published = status.delivered_events.max(consumed);
        self.numbers.trouble = match &status.state {
            State::Stalled { reason } | State::Halted { reason } => Some(reason.clone()),
            _ => None,
        };
        drop(status);
        self.numbers.elapsed = now.saturating_duration_since(self.began);
        let (since, consumed_then) = self.slow;
        if now - since >= SLOW {
            self.numbers.per_second = per_second(consumed - consumed_then, now - since);
            let recent = self.latencies_us.len().saturating_sub(RECENT);
            self.numbers.latency = percentiles(&mut self.latencies_us[recent..].to_vec());
            self.slow = (now, consumed);
        }
        self.numbers.closing =
            self.stop.closing.is_cancelled() || self.numbers.committed >= self.numbers.wanted;
        self.screen.draw(&self.numbers)?;
        for _ in 0..self.screen.interrupts()? {
            self.stop.ask();
        }
        Ok(())
    }
}

#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rate for people"
)]
fn per_second(events: u64, time: Duration) -> u64 {
    (events as f64 / time.as_secs_f64()).round() as u64
}

fn percentiles(latencies_us: &mut [u32]) -> Option<Latency> {
    if latencies_us.is_empty() {
        return None;
    }
    latencies_us.sort_unstable();
    // The smallest that at least so many per cent do not exceed.
    let rank = |per_cent: usize| (latencies_us.len() * per_cent).div_ceil(100) - 1;
    let at = |per_cent| Duration::from_micros(latencies_us[rank(per_cent)].into());
    Some(Latency {
        p50: at(50),
        p99: at(99),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let mut latencies: Vec<u32> = (1..=200).rev().collect();
        let us = Duration::from_micros;
        let expected = Latency {
            p50: us(100),
            p99: us(198),
        };
        assert_eq!(percentiles(&mut latencies), Some(expected));
        assert_eq!(percentiles(&mut [7]).map(|l| l.p99), Some(us(7)));
        assert_eq!(percentiles(&mut []), None);
    }
}
