//! Judges the partitions of `outbox.events`: is one there for the next events, and does a default one catch the rest?

use serde::Deserialize;

use super::super::Finding;

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

pub(super) fn judge(partitions: &[Partition], newest_id: Option<i64>) -> Vec<Finding> {
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
    findings.extend(ahead(partitions, newest_id));
    findings.extend(rows_in_default(partitions));
    findings
}

fn ahead(partitions: &[Partition], newest_id: Option<i64>) -> Option<Finding> {
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
            "events in the default partition are published like all others, but it can't be dropped once they are \
             (the daemon makes partitions: has it been away?)",
        )
        .sql("select outbox.make_partitions()"),
    )
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
            "its events are published like all others, but it can't be dropped once they are",
        )
        // What the start of a window had seen is published; what commits late is not among it.
        .sql(format!(
            "delete from {name} e where not exists (select from outbox.cursors c \
             where c.prev is null or not pg_visible_in_snapshot(e.xid, c.prev)); vacuum {name}"
        )),
    )
}

#[cfg(test)]
mod tests {
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
        let found = |newest_id, bounds: &[(i64, i64)]| {
            let mut partitions: Vec<Partition> = bounds
                .iter()
                .map(|(lower, upper)| partition(Some(*lower), Some(*upper)))
                .collect();
            partitions.push(partition(None, None));
            judge(&partitions, Some(newest_id))
                .into_iter()
                .map(|finding| finding.what)
                .collect::<Vec<_>>()
        };
        assert!(found(0, &[(1, 10), (10, 20)]).is_empty());
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
