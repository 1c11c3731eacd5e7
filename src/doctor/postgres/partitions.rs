//! Judges the partitions of `outbox.events`: is one there for the next events, and does a default one catch the rest?

use serde::Deserialize;

use super::super::Finding;
use crate::retention;

#[derive(Clone, Debug, Deserialize)]
pub(super) struct Partition {
    lower: Option<i64>,
    upper: Option<i64>,
    is_default: bool,
    unlogged: bool,
    name: String,
    bytes: i64,
}

pub(super) fn none() -> Finding {
    Finding::note(
        "partitions",
        "outbox.events is not partitioned",
        "published events can't be dropped by partition, only deleted",
    )
}

pub(super) fn judge(
    partitions: &[Partition],
    newest_id: Option<i64>,
    retention: &retention::Settings,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let unlogged: Vec<&str> = partitions
        .iter()
        .filter(|partition| partition.unlogged)
        .map(|partition| &partition.name[..])
        .collect();
    if !unlogged.is_empty() {
        let logged: Vec<String> = unlogged
            .iter()
            .map(|name| format!("alter table {name} set logged"))
            .collect();
        findings.push(
            Finding::error(
                "unlogged",
                format!("unlogged: {}", unlogged.join(", ")),
                "after a crash of the server these are empty: events are lost",
            )
            .sql(logged.join("; ")),
        );
    }
    if !partitions.iter().any(|partition| partition.is_default) {
        findings.push(
            Finding::error(
                "partitions",
                "outbox.events has no default partition",
                "when the partitions run out, every emit fails, and with it the service's transaction",
            )
            .sql("create table outbox.events_default partition of outbox.events default"),
        );
    }
    findings.extend(ahead(partitions, newest_id, retention));
    findings.extend(another_size(partitions, newest_id, retention));
    findings.extend(rows_in_default(partitions));
    findings
}

fn ahead(
    partitions: &[Partition],
    newest_id: Option<i64>,
    retention: &retention::Settings,
) -> Option<Finding> {
    let newest = newest_id?;
    let covers_next = |partition: &&Partition| {
        partition
            .lower
            .zip(partition.upper)
            .is_some_and(|(lower, upper)| lower <= newest + 1 && newest + 1 < upper)
    };
    let next = partitions.iter().find(covers_next);
    let beyond = partitions
        .iter()
        .filter(|partition| partition.lower.is_some_and(|lower| lower > newest + 1))
        .count();
    let what = match (next, beyond) {
        (Some(_), 1..) => return None,
        (Some(_), 0) => "no partition is left ahead of the one in use",
        (None, _) => "no partition takes the next event: it goes to the default one",
    };
    Some(
        Finding::warning(
            "partitions",
            what,
            "events in the default partition are published like all others, but are removed one by one later \
             (the daemon makes partitions: has it been away?)",
        )
        .sql(format!(
            "select outbox.make_partitions({}, {})",
            retention.partitions_ahead, retention.partition_events
        )),
    )
}

/// The partitions that lie ahead were made with another setting.
fn another_size(
    partitions: &[Partition],
    newest_id: Option<i64>,
    retention: &retention::Settings,
) -> Option<Finding> {
    let newest = newest_id?;
    let last = partitions
        .iter()
        .filter_map(|partition| partition.lower.zip(partition.upper))
        .filter(|(lower, _)| *lower > newest + 1)
        .max()?;
    let size = last.1.saturating_sub(last.0);
    (u64::try_from(size) != Ok(retention.partition_events)).then(|| {
        Finding::note(
            "partition_size",
            format!(
                "the partitions ahead have {size} ids each, retention.partition_events is {}",
                retention.partition_events
            ),
            format!(
                "the setting counts from id {} on; old events are removed on time all the same, one by one where a \
                 partition can't go whole",
                last.1
            ),
        )
    })
}

fn rows_in_default(partitions: &[Partition]) -> Option<Finding> {
    let default = partitions
        .iter()
        .find(|partition| partition.is_default && partition.bytes > 0)?;
    let name = &default.name;
    Some(
        Finding::note(
            "default_partition",
            format!(
                "the default partition {name} has {} kB",
                default.bytes / 1024
            ),
            "its events are published like all others, and the relay removes them one by one when they are old enough, \
             which costs more than dropping a partition",
        )
        .advice("nothing to do while a relay runs; vacuum makes its space free for new events"),
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn partitions_have_to_be_ahead() {
        let partition = |lower, upper| Partition {
            lower,
            upper,
            is_default: lower.is_none(),
            unlogged: false,
            name: "outbox.p".to_owned(),
            bytes: 0,
        };
        let retention = retention::Settings {
            keep: None,
            drop_unpublished_after: None,
            disk_budget_bytes: None,
            interval: Duration::from_secs(1),
            partition_events: 10,
            partitions_ahead: 1,
            pipelines: Vec::new(),
        };
        let found = |newest_id, bounds: &[(i64, i64)]| {
            let mut partitions: Vec<Partition> = bounds
                .iter()
                .map(|(lower, upper)| partition(Some(*lower), Some(*upper)))
                .collect();
            partitions.push(partition(None, None));
            judge(&partitions, Some(newest_id), &retention)
                .into_iter()
                .map(|finding| finding.what)
                .collect::<Vec<_>>()
        };
        assert!(found(0, &[(1, 10), (10, 20)]).is_empty());
        assert_eq!(
            found(0, &[(1, 10), (10, 30)]),
            ["the partitions ahead have 20 ids each, retention.partition_events is 10"]
        );
        assert_eq!(
            found(0, &[(1, 10)]),
            ["no partition is left ahead of the one in use"]
        );
        // 9 is the last id of the partition: the next event needs the following one.
        assert_eq!(
            found(9, &[(1, 10), (10, 20)]),
            ["no partition is left ahead of the one in use"]
        );
        assert_eq!(
            found(19, &[(1, 10), (10, 20)]),
            ["no partition takes the next event: it goes to the default one"]
        );
    }
}
