//! Looks at the relay's own books: who owns what, whose cursor is left over, what is parked.

use anyhow::Context;
use sqlx::postgres::PgConnection;

use super::super::{Finding, parked};
use crate::config::PipelineConfig;
use crate::ledger::view::{self, Books, Moved, Owner, PipelineBooks};
use crate::retention;
use crate::source::postgres::ask;

pub(super) async fn examine(
    connection: &mut PgConnection,
    pipelines: &[PipelineConfig],
    retention: &retention::Settings,
) -> Result<Vec<Finding>, anyhow::Error> {
    let books = view::postgres::read(connection)
        .await
        .context("read the books")?;
    let configured: Vec<&str> = pipelines.iter().map(|p| p.pipeline.name.as_str()).collect();
    let mut findings = judge(&books, &configured);
    findings.extend(super::super::retention::judge(retention, &books));
    Ok(findings)
}

fn judge(books: &Books, configured: &[&str]) -> Vec<Finding> {
    let mut findings: Vec<Finding> = books.pipelines.iter().filter_map(elsewhere).collect();
    findings.extend(parked(
        books
            .pipelines
            .iter()
            .map(|pipeline| pipeline.parked_events)
            .sum(),
    ));
    for name in configured {
        let rows = books.pipelines.iter().filter(|row| row.pipeline == *name);
        let owners: Vec<_> = rows.map(|row| (row.name(), row.owner.as_ref())).collect();
        if owners.is_empty() {
            findings.push(lease(name, None));
        }
        findings.extend(owners.iter().map(|(name, owner)| lease(name, *owner)));
    }
    let owned = |name: &str| {
        let mut rows = books.pipelines.iter();
        rows.any(|row| row.pipeline == name && row.owner.is_some())
    };
    let mut strangers: Vec<&str> = books
        .pipelines
        .iter()
        .map(|row| &row.pipeline[..])
        .collect();
    strangers.dedup();
    strangers.retain(|name| !configured.contains(name) && !owned(name));
    findings.extend(strangers.into_iter().map(|pipeline| {
        let literal = ask::literal(pipeline);
        Finding::note(
            "strange_cursor",
            format!("there is a cursor of pipeline {pipeline}, which the configuration does not name and nobody owns"),
            "if it was given up, its cursor only stands in the way of dropping what was published",
        )
        .sql(format!(
            "delete from outbox.cursors where pipeline = {literal}; delete from outbox.leases where pipeline = {literal}"
        ))
    }));
    findings
}

fn lease(name: &str, owner: Option<&Owner>) -> Finding {
    match owner {
        Some(owner) => Finding::note(
            "lease",
            format!(
                "pipeline {name} is owned by {} (for {:.0} s unless renewed)",
                owner.holder, owner.lease_ends_in_seconds
            ),
            "other relays stand by for it",
        ),
        None => Finding::note(
            "lease",
            format!("nobody owns pipeline {name}"),
            "nothing is published until a relay runs",
        )
        .command("outbox-relay run"),
    }
}

fn elsewhere(books: &PipelineBooks) -> Option<Finding> {
    let moved = books.moved?;
    let (what, then) = match moved {
        Moved::Cluster => (
            "cluster (dumped and restored?)",
            "the relay adopts the log when it takes the lease: it publishes again what is not known to be published by \
             every pipeline",
        ),
        Moved::Timeline => (
            "timeline (failed over, or restored to a point in time?)",
            "the relay goes on from it; what it published and the database then lost stays published",
        ),
    };
    Some(Finding::note(
        "moved",
        format!(
            "the cursor of pipeline {} was written on another {what}",
            books.pipeline
        ),
        then,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Severity;
    use crate::ledger::view::{LogSize, Retained};

    #[test]
    fn owners_strangers_and_restores_are_told_apart() {
        let pipeline = |name: &str, owned: bool, moved| PipelineBooks {
            pipeline: name.to_owned(),
            shard: 0,
            shards: 1,
            last_id: Some(1),
            backlog_ids: Some(0),
            owner: owned.then(|| Owner {
                holder: "host:1:abc".to_owned(),
                lease_ends_in_seconds: 9.0,
            }),
            cursor_age_seconds: None,
            oldest_unpublished_seconds: None,
            oldest_unpublished_unknown: None,
            parked_events: 0,
            parked_entities: 0,
            moved,
        };
        let books = Books {
            newest_id: 1,
            log: LogSize {
                bytes: 0,
                oldest_seconds: None,
                growth: None,
            },
            retained: Retained::default(),
            pipelines: vec![
                pipeline("main", true, None),
                pipeline("old", false, None),
                pipeline("restored", false, Some(Moved::Cluster)),
            ],
            server: None,
        };
        let found: Vec<_> = judge(&books, &["main", "restored", "new"])
            .into_iter()
            .map(|finding| (finding.severity, finding.check, finding.what))
            .collect();
        assert_eq!(found[0].0, Severity::Note);
        assert!(found[0].2.contains("restored"));
        let notes: Vec<&str> = found[1..].iter().map(|found| &found.2[..]).collect();
        assert_eq!(
            notes,
            [
                "pipeline main is owned by host:1:abc (for 9 s unless renewed)",
                "nobody owns pipeline restored",
                "nobody owns pipeline new",
                "there is a cursor of pipeline old, which the configuration does not name and nobody owns",
            ]
        );
    }
}
