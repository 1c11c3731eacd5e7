//! How often the log is looked at. Pure: the time is an argument, and nothing waits here.
//!
//! A look costs the database a third of a millisecond or more whether it finds one event or a hundred, and the service
//! shares that machine: what does not improve the latency much is saved.

use std::time::Duration;

use tokio::time::Instant;

/// Behind a look that found something polling looks again this soon, then less and less often.
const POLL_MIN: Duration = Duration::from_millis(20);
/// The same with notifications. Of many open transactions only one notifies: the others' commits come without a hint, soon
/// after or soon before.
const LISTEN_MIN: Duration = Duration::from_millis(1);
/// Up to here. Then the notifications are relied upon.
const LISTEN_HOT: Duration = Duration::from_millis(16);
/// The safety net below notifications.
const LISTEN_IDLE: Duration = Duration::from_secs(1);

/// Where so many events come in a second, one look for each notification would take more of the machine than writing them.
const CROWDED: f64 = 1_200.0;
/// Those of one look count as so many at most: a bulk insert is no crowd, and the end of a backlog is not either.
const CROWD_OF_ONE_LOOK: f64 = 32.0;
/// Looks are this far apart then.
const CROWDED_INTERVAL: Duration = Duration::from_millis(5);
/// The time over which the rate is taken.
const RATE_OVER: Duration = Duration::from_millis(250);

/// What to wait for before the next look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// This time, whatever notifications say.
    Until(Instant),
    /// A notification, or this time.
    ForHintUntil(Instant),
}

/// The pace of the looks at a log that has nothing more.
pub(super) struct Pace {
    /// The longest time between two looks without notifications.
    poll_interval: Duration,
    /// What is waited after a look, unless it finds something.
    interval: Duration,
    looked_at: Instant,
    events_per_second: f64,
}

impl Pace {
    pub(super) fn new(poll_interval: Duration, now: Instant) -> Self {
        Self {
            poll_interval,
            interval: Duration::ZERO,
            looked_at: now,
            events_per_second: 0.0,
        }
    }

    /// A look has ended.
    pub(super) fn looked(&mut self, events: usize, now: Instant) {
        let since = now.duration_since(self.looked_at);
        let faded = (-since.as_secs_f64() / RATE_OVER.as_secs_f64()).exp();
        let came = u16::try_from(events).map_or(CROWD_OF_ONE_LOOK, |events| {
            f64::from(events).min(CROWD_OF_ONE_LOOK)
        });
        self.events_per_second = self.events_per_second * faded + came / RATE_OVER.as_secs_f64();
        self.looked_at = now;
        if events > 0 {
            self.interval = Duration::ZERO;
        }
    }

    /// A notification came.
    pub(super) fn hinted(&mut self) {
        self.interval = Duration::ZERO;
    }

    /// What comes before the next look. Each call is a step towards looking less often.
    pub(super) fn next(&mut self, listens: bool) -> Wait {
        if !listens {
            self.interval = (self.interval * 2).max(POLL_MIN).min(self.poll_interval);
            return Wait::Until(self.looked_at + self.interval);
        }
        if self.events_per_second > CROWDED {
            return Wait::Until(self.looked_at + CROWDED_INTERVAL);
        }
        self.interval = (self.interval * 2).max(LISTEN_MIN);
        if self.interval > LISTEN_HOT {
            self.interval = LISTEN_IDLE;
        }
        Wait::ForHintUntil(self.looked_at + self.interval)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLL_INTERVAL: Duration = Duration::from_millis(200);

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// What is waited between looks that find nothing, the first of them after one that found an event.
    fn idle_steps(listens: bool, steps: usize) -> Vec<Duration> {
        let mut now = Instant::now();
        let mut pace = Pace::new(POLL_INTERVAL, now);
        pace.looked(1, now);
        (0..steps)
            .map(|_| {
                let (Wait::Until(due) | Wait::ForHintUntil(due)) = pace.next(listens);
                let waited = due - now;
                now = due;
                pace.looked(0, now);
                waited
            })
            .collect()
    }

    /// The looks of a second, once it has gone on for one, while an event comes at these intervals, each with a notification.
    fn looks_in_a_second(between: Duration) -> u32 {
        let began = Instant::now();
        let mut pace = Pace::new(POLL_INTERVAL, began);
        let (mut now, mut due, mut looks) = (began, began, 0);
        while now < began + ms(2000) {
            let mut events = 0;
            while due <= now {
                (due, events) = (due + between, events + 1);
            }
            pace.looked(events, now);
            looks += u32::from(now >= began + ms(1000));
            now = match pace.next(true) {
                Wait::ForHintUntil(until) if due < until => {
                    pace.hinted();
                    due
                }
                Wait::Until(until) | Wait::ForHintUntil(until) => until,
            };
        }
        looks
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
    fn a_poll_interval_below_the_least_is_kept_to() {
        let now = Instant::now();
        let mut pace = Pace::new(ms(3), now);
        pace.looked(1, now);
        assert_eq!(pace.next(false), Wait::Until(now + ms(3)));
    }

    #[test]
    fn a_notification_begins_anew() {
        let now = Instant::now();
        let mut pace = Pace::new(POLL_INTERVAL, now);
        for _ in 0..10 {
            pace.next(true);
        }
        pace.hinted();
        assert_eq!(pace.next(true), Wait::ForHintUntil(now + ms(1)));
    }

    #[test]
    fn every_notification_is_followed_at_once_until_there_are_too_many() {
        assert!(looks_in_a_second(ms(1)) >= 1000);
        let crowded = looks_in_a_second(Duration::from_micros(250));
        assert!((199..=201).contains(&crowded), "{crowded}");
    }

    #[test]
    fn after_a_crowd_notifications_count_again() {
        let mut now = Instant::now();
        let mut pace = Pace::new(POLL_INTERVAL, now);
        for _ in 0..20 {
            now += ms(5);
            pace.looked(20, now);
        }
        assert_eq!(pace.next(true), Wait::Until(now + ms(5)));
        now += ms(300);
        pace.looked(0, now);
        assert_eq!(pace.next(true), Wait::ForHintUntil(now + ms(1)));
    }

    #[test]
    fn a_bulk_insert_is_no_crowd() {
        let now = Instant::now();
        let mut pace = Pace::new(POLL_INTERVAL, now);
        pace.looked(2000, now);
        assert_eq!(pace.next(true), Wait::ForHintUntil(now + ms(1)));
    }
}
