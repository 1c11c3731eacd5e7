//! Until when a lease holds.

use std::fmt;
use std::time::Duration;

use tokio::time::Instant;

/// How a lease was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loss {
    /// It ran out before it was renewed.
    Expired,
    /// Another relay has it.
    Taken,
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Expired => {
                "it ran out before it was renewed: the database was slow to answer, or this relay did not get to ask"
            }
            Self::Taken => "another relay took it after it had run out",
        })
    }
}

/// The end of a lease that is not renewed, by two clocks: the monotonic one stands still while a machine is suspended, and
/// the wall clock may be set. Whichever comes first counts; when the wall clock is set forward, or back to before the
/// question, it says nothing of the time that went by, and the lease is taken again.
#[derive(Clone, Copy, Debug)]
pub(super) struct LeaseEnd {
    /// By the monotonic clock.
    pub(super) at: Instant,
    asked_us: i64,
    wall_us: i64,
}

impl LeaseEnd {
    /// Of a lease that is asked for now: the answer may be long on its way, and the lease begins at the earliest with the
    /// question. `now_us` is the wall clock, in microseconds since the Unix epoch.
    pub(super) fn asked_now(ttl: Duration, now_us: i64) -> Self {
        let ttl_us = i64::try_from(ttl.as_micros()).unwrap_or(i64::MAX);
        Self {
            at: Instant::now() + ttl,
            asked_us: now_us,
            wall_us: now_us.saturating_add(ttl_us),
        }
    }

    /// Whether nothing new may be published.
    pub(super) fn is_over(&self, now_us: i64) -> bool {
        Instant::now() >= self.at || !(self.asked_us..self.wall_us).contains(&now_us)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND_US: i64 = 1_000_000;
    const ASKED_US: i64 = 1_800_000_000 * SECOND_US;

    fn asked() -> LeaseEnd {
        LeaseEnd::asked_now(Duration::from_secs(10), ASKED_US)
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_ends_by_whichever_clock_comes_first() {
        let lease = asked();
        assert!(!lease.is_over(ASKED_US));
        assert!(!lease.is_over(ASKED_US + 10 * SECOND_US - 1));
        // The machine was asleep.
        assert!(lease.is_over(ASKED_US + 10 * SECOND_US));
        // The wall clock was set back by as much as went by.
        tokio::time::advance(Duration::from_secs(10)).await;
        assert!(lease.is_over(ASKED_US));
    }

    #[tokio::test(start_paused = true)]
    async fn a_machine_that_slept_and_whose_clock_was_set_back_owns_nothing() {
        // Ten minutes of sleep, which the monotonic clock does not see, and an hour back.
        let woken_us = ASKED_US + 600 * SECOND_US - 3_600 * SECOND_US;
        assert!(asked().is_over(woken_us));
    }
}
