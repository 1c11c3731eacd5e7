//! Until when a lease holds.

use std::time::Duration;

use tokio::time::Instant;

/// The end of a lease that is not renewed, by two clocks: the monotonic one stands still while a machine is suspended, and
/// the wall clock may be set back. Whichever comes first counts; when the wall clock is set forward, the lease is taken again.
#[derive(Clone, Copy, Debug)]
pub(super) struct LeaseEnd {
    /// By the monotonic clock.
    pub(super) at: Instant,
    wall_us: i64,
}

impl LeaseEnd {
    /// Of a lease that is asked for now: the answer may be long on its way, and the lease begins at the earliest with the
    /// question. `now_us` is the wall clock, in microseconds since the Unix epoch.
    pub(super) fn asked_now(ttl: Duration, now_us: i64) -> Self {
        let ttl_us = i64::try_from(ttl.as_micros()).unwrap_or(i64::MAX);
        Self {
            at: Instant::now() + ttl,
            wall_us: now_us.saturating_add(ttl_us),
        }
    }

    /// Whether nothing new may be published.
    pub(super) fn is_over(&self, now_us: i64) -> bool {
        Instant::now() >= self.at || now_us >= self.wall_us
    }
}
