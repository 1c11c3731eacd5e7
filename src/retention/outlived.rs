//! Whether events stay for longer than `retention.keep` says, and why. Pure.

use std::time::Duration;

use humantime::format_duration;

use super::Settings;
use crate::ledger::view::{Books, FirstRetained, Retained};

/// Events that stay for too long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outlived {
    /// Which, and for how long.
    pub what: String,
    /// What keeps them.
    pub why: String,
    /// What to do.
    pub mend: String,
}

impl Settings {
    /// While a relay runs, a published event is gone when it is this old; none: it stays for ever.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        let keep = self.keep?;
        Some(keep.saturating_add((keep / 10).max(self.interval.saturating_mul(2))))
    }

    /// Whether the oldest event should have gone, and why it has not.
    #[must_use]
    pub fn outlived(&self, books: &Books) -> Option<Outlived> {
        let (keep, deadline) = (self.keep?, self.deadline()?);
        let retained = &books.retained;
        let first = retained.first.as_ref()?;
        // Where no relay has ever looked, only the writer's word is there.
        let seconds = match retained.sampled_seconds_ago {
            Some(_) => first.at_least_seconds?,
            None => books.log.oldest_seconds?,
        };
        if seconds < deadline.as_secs_f64() {
            return None;
        }
        let (why, mend) = self.cause(first, books);
        Some(Outlived {
            what: format!(
                "event {} is in the log for {} (retention.keep = {})",
                first.id,
                in_words(seconds),
                format_duration(keep)
            ),
            why,
            mend,
        })
    }

    fn cause(&self, first: &FirstRetained, books: &Books) -> (String, String) {
        self.held(first, books)
            .or_else(|| self.no_relay(&books.retained))
            .unwrap_or_else(|| self.refused(first, &books.retained))
    }

    /// What still needs the event.
    fn held(&self, first: &FirstRetained, books: &Books) -> Option<(String, String)> {
        let mut held_by = first.held_by.clone();
        let begun = |name: &str| {
            let mut rows = books.pipelines.iter();
            rows.any(|row| row.pipeline == name && row.last_id.is_some())
        };
        let waits = self.pipelines.iter().map(ToString::to_string);
        held_by.extend(waits.filter(|name| !begun(name)));
        held_by.sort();
        held_by.dedup();
        if !held_by.is_empty() {
            return Some(said(
                format!("pipeline {} has not published it", held_by.join(", ")),
                "its state and the relay's log say why it stands; where it was given up, delete its cursor",
            ));
        }
        if let Some(row) = books.pipelines.iter().find(|row| row.moved.is_some()) {
            return Some(said(
                format!(
                    "the cursor of pipeline {} belongs to another server or timeline, and does not tell what is published",
                    row.name()
                ),
                "the relay makes it fit when it takes the lease; where the pipeline was given up, delete its cursor",
            ));
        }
        if first.parked {
            return Some(said(
                "it is parked, and its content is only in the log",
                "drop it: outbox-relay parked drop",
            ));
        }
        let replay = first.replays.first()?;
        Some(said(
            format!("replay {replay} has still to read it"),
            format!("resume or cancel it: outbox-relay replay cancel {replay}"),
        ))
    }

    fn no_relay(&self, retained: &Retained) -> Option<(String, String)> {
        let pause = self.spacing() * 2 + self.interval * 2;
        let why = match retained.sampled_seconds_ago {
            Some(ago) if ago < pause.as_secs_f64() => return None,
            Some(ago) => format!("no relay has looked after the log for {}", in_words(ago)),
            None => "no relay has ever looked after the log".to_owned(),
        };
        Some(said(why, "start one: outbox-relay run"))
    }

    /// A relay looks after the log, and the event is there all the same.
    fn refused(&self, first: &FirstRetained, retained: &Retained) -> (String, String) {
        let keys = retained.foreign_keys.join(", ");
        let deadline = self.deadline().unwrap_or_default().as_secs_f64();
        let (why, mend) = match first.counted_seconds {
            _ if !keys.is_empty() => (
                format!("foreign keys refer to outbox.events: {keys}"),
                "drop the constraint",
            ),
            Some(counted) if counted < deadline => (
                format!(
                    "relays ran for {} of that time, and only that counts",
                    in_words(counted)
                ),
                "it goes by itself while a relay runs",
            ),
            _ => (
                "the relay could not remove it".to_owned(),
                "its log says why (could not look after the log), `outbox-relay doctor` which rights it lacks",
            ),
        };
        (why, mend.to_owned())
    }
}

fn said(why: impl Into<String>, mend: impl Into<String>) -> (String, String) {
    (why.into(), mend.into())
}

fn in_words(seconds: f64) -> String {
    let whole = Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX);
    format_duration(Duration::from_secs(whole.as_secs())).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::view::LogSize;

    fn settings() -> Settings {
        Settings {
            keep: Some(Duration::from_secs(1000)),
            drop_unpublished_after: None,
            disk_budget_bytes: None,
            interval: Duration::from_secs(10),
            partition_events: 1,
            partitions_ahead: 1,
            pipelines: Vec::new(),
        }
    }

    fn books(first: FirstRetained, sampled_seconds_ago: Option<f64>) -> Books {
        Books {
            relays: Vec::new(),
            newest_id: 9,
            pipelines: Vec::new(),
            log: LogSize {
                bytes: 0,
                oldest_seconds: Some(5000.0),
                growth: None,
            },
            retained: Retained {
                first: Some(first),
                sampled_seconds_ago,
                ..Retained::default()
            },
            server: None,
        }
    }

    #[test]
    fn what_stays_for_too_long_has_a_cause() {
        let first = FirstRetained {
            id: 7,
            at_least_seconds: Some(1101.0),
            counted_seconds: Some(1101.0),
            ..FirstRetained::default()
        };
        let why = |first: &FirstRetained, ago| {
            let outlived = settings().outlived(&books(first.clone(), ago));
            outlived.map(|outlived| outlived.why)
        };
        let now = Some(1.0);
        assert_eq!(why(&first, now).unwrap(), "the relay could not remove it");
        let young = FirstRetained {
            at_least_seconds: Some(1099.0),
            ..first.clone()
        };
        assert_eq!(why(&young, now), None);
        let unknown = FirstRetained {
            at_least_seconds: None,
            ..first.clone()
        };
        assert_eq!(why(&unknown, now), None, "younger than any sample");
        assert_eq!(
            why(&unknown, None).unwrap(),
            "no relay has ever looked after the log"
        );
        assert_eq!(
            why(&first, Some(90.0)).unwrap(),
            "no relay has looked after the log for 1m 30s"
        );
        let held = FirstRetained {
            held_by: vec!["slow".to_owned()],
            ..first.clone()
        };
        assert_eq!(
            why(&held, now).unwrap(),
            "pipeline slow has not published it"
        );
        let parked = FirstRetained {
            parked: true,
            ..first.clone()
        };
        assert_eq!(
            why(&parked, now).unwrap(),
            "it is parked, and its content is only in the log"
        );
        let replayed = FirstRetained {
            replays: vec![3],
            ..first.clone()
        };
        assert_eq!(
            why(&replayed, now).unwrap(),
            "replay 3 has still to read it"
        );
        let away = FirstRetained {
            counted_seconds: Some(500.0),
            ..first
        };
        assert_eq!(
            why(&away, now).unwrap(),
            "relays ran for 8m 20s of that time, and only that counts"
        );
    }
}
