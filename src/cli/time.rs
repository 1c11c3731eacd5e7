//! Points in time as people type them.

use std::time::{Duration, UNIX_EPOCH};

use crate::supervise::wall_clock_us;

/// In microseconds since the Unix epoch: `2026-01-31`, `2026-01-31T10:00:00Z`, or an age such as `1h`, which counts from now
/// back.
pub(super) fn time(text: &str) -> Result<i64, String> {
    time_before(text, wall_clock_us())
}

fn time_before(text: &str, now_us: i64) -> Result<i64, String> {
    let us = |time: Duration| i64::try_from(time.as_micros()).ok();
    let age = humantime::parse_duration(text).ok();
    if let Some(age) = age.and_then(us).and_then(|age| now_us.checked_sub(age)) {
        return Ok(age);
    }
    [text, &format!("{text}T00:00:00Z")]
        .into_iter()
        .find_map(|text| humantime::parse_rfc3339_weak(text).ok())
        .and_then(|time| time.duration_since(UNIX_EPOCH).ok())
        .and_then(us)
        .ok_or_else(|| {
            "expected a time as in 2026-01-31T00:00:00Z or 2026-01-31, or an age as in 90s, 1h, 2d"
                .to_owned()
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_a_day_a_moment_or_an_age() {
        const HOUR_US: i64 = 3_600_000_000;
        for (text, hours) in [
            ("1970-01-02", 24),
            ("1970-01-02T01:00:00Z", 25),
            ("1970-01-02 01:00:00", 25),
            ("1h", 99),
            ("2d", 52),
        ] {
            assert_eq!(
                time_before(text, 100 * HOUR_US),
                Ok(hours * HOUR_US),
                "{text}"
            );
        }
        for wrong in ["yesterday", "17", "", "1960-01-01", "2026-13-01"] {
            assert!(time_before(wrong, 0).is_err(), "{wrong}");
        }
    }
}
