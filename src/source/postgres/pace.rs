//! How often the log is looked at. Pure: the time is an argument, and nothing waits here.
//!
//! A look costs the database a quarter of a millisecond or more whether it finds one event or a hundred, and the service
//! shares that machine: what does not improve the latency much is saved.

use std::time::Duration;

use tokio::time::Instant;

use super::hint::CaptureMode;
use super::unseen::Unseen;
use crate::event::EventId;

/// Behind a look that found something polling looks again this soon, then less and less often.
const POLL_MIN: Duration = Duration::from_millis(20);
/// The same in a crowd, where the larger batches of a longer wait leave the service what it needs itself. Who listens asked
/// for low latency, and keeps to [`POLL_MIN`].
const CROWDED_POLL_MIN: Duration = Duration::from_millis(100);
/// With notifications. Those that come close behind a look are answered together, this long after it: at a thousand commits a
/// second most looks would find one event otherwise, and cost the database what ten do. The first after some quiet is
/// answered at once.
const LISTEN_MIN: Duration = Duration::from_millis(1);
/// Of many open transactions only one notifies: the others' commits come without a hint, soon after or soon before. They are
/// looked for up to here. Then the notifications are relied upon, and at once where no id is unseen.
const LISTEN_HOT: Duration = Duration::from_millis(16);
/// The safety net below notifications.
const LISTEN_IDLE: Duration = Duration::from_secs(1);

/// Where so many events come in a second, a notification and a look for each of them take more of the machine than writing
/// them does: it is polled then, until so few come.
const CROWDED_FROM: f64 = 1_300.0;
/// Close below: what comes steadily must not stay a crowd because of a burst.
const CROWDED_UNTIL: f64 = 1_150.0;
/// Those of one look make no more of a crowd than so many: a bulk insert is none, and the end of a backlog is not either.
const CROWD_OF_ONE_LOOK: f64 = 32.0;
/// No crowd counts as a larger one: when it is over, that shows within half a second.
const CROWD_MAX: f64 = 2.0 * CROWDED_FROM;
/// The time over which the rate is taken.
const RATE_OVER: Duration = Duration::from_millis(500);

/// The pace of the looks at a log that has nothing more.
pub(super) struct Pace {
    mode: CaptureMode,
    /// The longest time between two looks without notifications.
    poll_interval: Duration,
    /// What is waited after a look, unless it finds something.
    interval: Duration,
    looked_at: Instant,
    events_per_second: f64,
    crowded: bool,
    unseen: Unseen,
    /// Since the last look.
    hinted: bool,
}

impl Pace {
    pub(super) fn new(mode: CaptureMode, poll_interval: Duration, now: Instant) -> Self {
        Self {
            mode,
            poll_interval,
            interval: Duration::ZERO,
            looked_at: now,
            events_per_second: 0.0,
            crowded: false,
            unseen: Unseen::new(now),
            hinted: false,
        }
    }

    /// What comes next is at another place of the log.
    pub(super) fn sought(&mut self, now: Instant) {
        self.unseen = Unseen::new(now);
    }

    /// A look has found these events, when `ceiling` was the newest id that had been handed out.
    pub(super) fn looked(
        &mut self,
        ceiling: EventId,
        found: impl ExactSizeIterator<Item = EventId>,
        now: Instant,
    ) {
        let events = found.len();
        self.hinted = false;
        self.unseen.looked(ceiling, found, now);
        let since = now.duration_since(self.looked_at);
        let faded = (-since.as_secs_f64() / RATE_OVER.as_secs_f64()).exp();
        let (counted, most) = if self.crowded {
            (CROWD_MAX, CROWDED_UNTIL)
        } else {
            (CROWD_OF_ONE_LOOK, CROWDED_FROM)
        };
        let came = u16::try_from(events).map_or(counted, |events| f64::from(events).min(counted));
        let rate = self.events_per_second * faded + came / RATE_OVER.as_secs_f64();
        self.events_per_second = rate.min(CROWD_MAX);
        self.crowded = self.events_per_second > most;
        self.looked_at = now;
        if events > 0 {
            self.interval = Duration::ZERO;
        }
    }

    /// Whether there is so much to do that notifications are a burden.
    pub(super) fn is_crowded(&self) -> bool {
        self.crowded
    }

    /// A notification came, or they are listened to from now on.
    pub(super) fn hinted(&mut self) {
        self.hinted = true;
        self.interval = Duration::ZERO;
    }

    /// When to look next, if no notification comes before. Each call is a step towards looking less often.
    pub(super) fn next(&mut self, listens: bool) -> Instant {
        let doubled = self.interval * 2;
        self.interval = match listens {
            false => doubled.max(self.poll_min()).min(self.poll_interval),
            true if doubled > LISTEN_HOT || !(self.hinted || self.unseen.any()) => LISTEN_IDLE,
            true => doubled.max(LISTEN_MIN),
        };
        self.looked_at + self.interval
    }

    /// When to look after a notification.
    pub(super) fn after_hint(&self) -> Instant {
        self.looked_at + LISTEN_MIN
    }

    fn poll_min(&self) -> Duration {
        match self.mode {
            CaptureMode::Poll if self.crowded => CROWDED_POLL_MIN,
            CaptureMode::Poll | CaptureMode::Listen => POLL_MIN,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLL_INTERVAL: Duration = Duration::from_millis(200);

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// A look that finds so many events, with one id that is not seen.
    fn saw(pace: &mut Pace, events: usize, now: Instant) {
        let end = i32::try_from(events).unwrap();
        pace.looked(
            EventId(1_000_000),
            (0..end).map(|id| EventId(id.into())),
            now,
        );
    }

    /// What is waited between looks that find nothing, the first of them after one that found an event.
    fn idle_steps(listens: bool, steps: usize) -> Vec<Duration> {
        let mut now = Instant::now();
        let mode = if listens {
            CaptureMode::Listen
        } else {
            CaptureMode::Poll
        };
        let mut pace = Pace::new(mode, POLL_INTERVAL, now);
        saw(&mut pace, 1, now);
        (0..steps)
            .map(|_| {
                let due = pace.next(listens);
                let waited = due - now;
                now = due;
                saw(&mut pace, 0, now);
                waited
            })
            .collect()
    }

    /// Some seconds of looks that find so many events each.
    fn look(pace: &mut Pace, now: &mut Instant, between: Duration, events: usize) {
        let until = *now + ms(3000);
        while *now < until {
            *now += between;
            saw(pace, events, *now);
        }
    }

    #[test]
    fn polling_looks_less_and_less_often() {
        let steps = [20, 40, 80, 160, 200, 200].map(ms);
        assert_eq!(idle_steps(false, 6), steps);
    }

    #[test]
    fn listening_looks_for_what_came_without_a_hint_and_then_relies_on_them() {
        let steps = [1, 2, 4, 8, 16, 1000, 1000].map(ms);
        assert_eq!(idle_steps(true, 7), steps);
    }

    #[test]
    fn where_no_id_is_unseen_notifications_are_relied_upon_at_once() {
        let now = Instant::now();
        let mut pace = Pace::new(CaptureMode::Listen, POLL_INTERVAL, now);
        pace.looked(EventId(1), std::iter::once(EventId(1)), now);
        assert_eq!(pace.next(true), now + LISTEN_IDLE);
        pace.looked(EventId(3), std::iter::once(EventId(3)), now);
        assert_eq!(pace.next(true), now + LISTEN_MIN);
        pace.looked(EventId(3), std::iter::once(EventId(2)), now);
        assert_eq!(pace.next(true), now + LISTEN_IDLE);
        pace.hinted();
        assert_eq!(pace.next(true), now + LISTEN_MIN);
        pace.sought(now);
        pace.looked(EventId(3), std::iter::once(EventId(3)), now);
        assert_eq!(pace.next(true), now + LISTEN_MIN);
    }

    #[test]
    fn a_poll_interval_below_the_least_is_kept_to() {
        let now = Instant::now();
        let mut pace = Pace::new(CaptureMode::Poll, ms(3), now);
        saw(&mut pace, 1, now);
        assert_eq!(pace.next(false), now + ms(3));
    }

    #[test]
    fn a_notification_begins_anew() {
        let now = Instant::now();
        let mut pace = Pace::new(CaptureMode::Listen, POLL_INTERVAL, now);
        for _ in 0..10 {
            pace.next(true);
        }
        pace.hinted();
        assert_eq!(pace.next(true), now + LISTEN_MIN);
    }

    #[test]
    fn notifications_close_behind_a_look_are_answered_together() {
        let now = Instant::now();
        let mut pace = Pace::new(CaptureMode::Listen, POLL_INTERVAL, now);
        saw(&mut pace, 1, now + ms(100));
        pace.hinted();
        assert_eq!(pace.after_hint(), now + ms(100) + LISTEN_MIN);
        // A wait that was given up, and begins again, ends no earlier and no later.
        assert_eq!(pace.next(true), pace.after_hint());
    }

    #[test]
    fn a_crowd_begins_above_where_it_ends() {
        let mut now = Instant::now();
        let mut pace = Pace::new(CaptureMode::Listen, POLL_INTERVAL, now);
        for (between, events, crowded) in [
            (ms(1), 1, false),
            (ms(10), 12, false),
            (ms(1), 2, true),
            (ms(20), 40, true),
            (ms(10), 12, true),
            (ms(10), 11, false),
            (ms(10), 12, false),
        ] {
            look(&mut pace, &mut now, between, events);
            assert_eq!(pace.is_crowded(), crowded, "{events} every {between:?}");
        }
    }

    /// Some seconds of looks that find what came since the one before; the last wait before one.
    fn poll(pace: &mut Pace, now: &mut Instant, events_per_second: u128) -> Duration {
        let until = *now + ms(3000);
        loop {
            let due = pace.next(false);
            let waited = due - *now;
            *now = due;
            let came = waited.as_millis() * events_per_second / 1000;
            saw(pace, came.try_into().unwrap(), *now);
            if *now >= until {
                return waited;
            }
        }
    }

    #[test]
    fn who_polls_looks_less_often_in_a_crowd_as_long_as_it_lasts() {
        for (mode, in_crowd) in [(CaptureMode::Poll, ms(100)), (CaptureMode::Listen, ms(20))] {
            let mut now = Instant::now();
            let mut pace = Pace::new(mode, POLL_INTERVAL, now);
            for (events_per_second, expected) in [
                (1_000, ms(20)),
                (1_600, in_crowd),
                (20_000, in_crowd),
                (1_250, in_crowd),
                (900, ms(20)),
            ] {
                let waited = poll(&mut pace, &mut now, events_per_second);
                assert_eq!(waited, expected, "{mode:?}, {events_per_second} events/s");
            }
        }
    }

    #[test]
    fn a_burst_does_not_last() {
        let mut now = Instant::now();
        let mut pace = Pace::new(CaptureMode::Listen, POLL_INTERVAL, now);
        look(&mut pace, &mut now, ms(20), 60);
        assert!(pace.is_crowded());
        look(&mut pace, &mut now, ms(20), 20);
        assert!(!pace.is_crowded());
    }

    #[test]
    fn a_backlog_is_forgotten_within_half_a_second() {
        let mut now = Instant::now();
        let mut pace = Pace::new(CaptureMode::Poll, POLL_INTERVAL, now);
        look(&mut pace, &mut now, ms(3), 500);
        assert!(pace.is_crowded());
        saw(&mut pace, 0, now + ms(500));
        assert!(!pace.is_crowded());
    }

    #[test]
    fn a_bulk_insert_is_no_crowd() {
        let now = Instant::now();
        let mut pace = Pace::new(CaptureMode::Listen, POLL_INTERVAL, now);
        saw(&mut pace, 2000, now);
        assert!(!pace.is_crowded());
    }
}
