//! Keeps the log readable where one cause rejects thousands of events: ten of a kind are named, the others counted. Pure.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::reason::kind;

/// So many events of one reason are named.
const NAMED_MAX: u64 = 10;
/// How many there are besides is said this often at most.
const TOLD_EVERY: Duration = Duration::from_secs(10);
/// After a reason has not come for this long its events are named again.
const FORGOTTEN_AFTER: Duration = Duration::from_mins(10);
/// Reasons that are told apart; the events of further ones are all named.
const REASONS_MAX: usize = 100;

/// What was said of rejected events, by reason.
#[derive(Debug, Default)]
pub(super) struct Rejections {
    reasons: HashMap<String, Count>,
}

#[derive(Debug)]
struct Count {
    named: u64,
    /// Since it was last said how many there are.
    unnamed: u64,
    told_at: Instant,
    came_at: Instant,
}

impl Rejections {
    /// Whether an event that is rejected for this reason is to be named.
    pub(super) fn names(&mut self, reason: &str, now: Instant) -> bool {
        let kind = kind(reason);
        if self.reasons.len() >= REASONS_MAX && !self.reasons.contains_key(&kind) {
            return true;
        }
        let told = self.reasons.entry(kind).or_insert(Count {
            named: 0,
            unnamed: 0,
            told_at: now,
            came_at: now,
        });
        told.came_at = now;
        if told.named < NAMED_MAX {
            told.named += 1;
            return true;
        }
        told.unnamed += 1;
        false
    }

    /// How many events of which reason were not named since the last time.
    pub(super) fn rest(&mut self, now: Instant) -> Vec<(String, u64)> {
        let mut rest = Vec::new();
        for (reason, told) in &mut self.reasons {
            if told.unnamed > 0 && now.duration_since(told.told_at) >= TOLD_EVERY {
                rest.push((reason.clone(), std::mem::take(&mut told.unnamed)));
                told.told_at = now;
            }
        }
        self.reasons.retain(|_, told| {
            told.unnamed > 0 || now.duration_since(told.came_at) < FORGOTTEN_AFTER
        });
        rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn ten_of_a_kind_are_named_and_the_others_counted() {
        let mut rejections = Rejections::default();
        let now = Instant::now();
        let mut named = 0;
        for bytes in 0..500 {
            let reason = format!("too large: the record has {bytes} bytes");
            named += u64::from(rejections.names(&reason, now));
        }
        assert_eq!(named, 10);
        assert!(rejections.names("another reason", now));
        assert_eq!(rejections.rest(now), []);
        let later = now + TOLD_EVERY;
        let kind = "too large: the record has N bytes".to_owned();
        assert_eq!(rejections.rest(later), [(kind, 490)]);
        assert_eq!(rejections.rest(later + TOLD_EVERY), []);
        assert!(!rejections.names("too large: the record has 1 bytes", later));
        rejections.rest(later + TOLD_EVERY);
        rejections.rest(later + FORGOTTEN_AFTER);
        assert!(rejections.names("too large: the record has 1 bytes", later + FORGOTTEN_AFTER));
    }
}
