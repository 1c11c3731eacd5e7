//! Judges how long events stay, for both databases. Pure.

use humantime::format_duration;

use super::Finding;
use crate::ledger::view::{Books, LostEvents};
use crate::retention::{Outlived, Settings};

pub(super) fn judge(settings: &Settings, books: &Books) -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Some(Outlived { what, why, mend }) = settings.outlived(books) {
        findings.push(
            Finding::warning(
                "retention",
                format!("{what}: {why}"),
                "what it holds, personal data too, outlives what the configuration promises",
            )
            .advice(mend),
        );
    }
    if !books.retained.foreign_keys.is_empty() && settings.keep.is_some() {
        let keys = &books.retained.foreign_keys;
        let drop: Vec<String> = keys.iter().filter_map(|key| drop_constraint(key)).collect();
        findings.push(
            Finding::warning(
                "foreign_keys",
                format!("foreign keys refer to outbox.events: {}", keys.join(", ")),
                "no partition can go whole, and an event that a row refers to keeps older and newer ones from being removed",
            )
            .sql(drop.join("; ")),
        );
    }
    findings.extend(books.retained.lost.iter().map(lost));
    if let Some(after) = settings.drop_unpublished_after {
        findings.push(Finding::note(
            "drop_unpublished_after",
            format!(
                "events that a pipeline has not published within {} are LOST (retention.drop_unpublished_after)",
                format_duration(after)
            ),
            "an outage of the sink that lasts longer loses events; \"never\" keeps them until they are published",
        ));
    }
    findings
}

fn lost(lost: &LostEvents) -> Finding {
    Finding::warning(
        "lost",
        format!(
            "pipeline {} has lost {} events within the last 7 days, by retention.drop_unpublished_after",
            lost.pipeline, lost.events
        ),
        "they were removed before they were published, and never will be",
    )
    .command("outbox-relay acts")
}

/// From `name of table`.
fn drop_constraint(key: &str) -> Option<String> {
    let (name, table) = key.split_once(" of ")?;
    Some(format!(
        "alter table {table} drop constraint \"{}\"",
        name.replace('"', "\"\"")
    ))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::ledger::view::{LogSize, Retained};

    #[test]
    fn losses_and_foreign_keys_are_named() {
        let settings = Settings {
            keep: Some(Duration::from_secs(10)),
            drop_unpublished_after: Some(Duration::from_secs(12)),
            disk_budget_bytes: None,
            interval: Duration::from_secs(1),
            partition_events: 1,
            partitions_ahead: 1,
            pipelines: Vec::new(),
        };
        let books = Books {
            relays: Vec::new(),
            newest_id: 0,
            pipelines: Vec::new(),
            log: LogSize {
                bytes: 0,
                oldest_seconds: None,
                growth: None,
            },
            retained: Retained {
                foreign_keys: vec!["note_event of public.note".to_owned()],
                lost: vec![LostEvents {
                    pipeline: "main".to_owned(),
                    events: 800,
                    seconds_ago: 5.0,
                }],
                ..Retained::default()
            },
            server: None,
        };
        let found: Vec<_> = judge(&settings, &books)
            .into_iter()
            .map(|finding| (finding.check, finding.what))
            .collect();
        assert_eq!(
            found[0].1,
            "foreign keys refer to outbox.events: note_event of public.note"
        );
        assert!(
            found[1].1.contains("pipeline main has lost 800 events"),
            "{found:?}"
        );
        assert!(found[2].1.contains("within 12s are LOST"), "{found:?}");
    }
}
