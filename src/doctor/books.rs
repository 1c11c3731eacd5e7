//! Looks at the relay's tables, whatever the database: who owns what, what waits, whose cursor is left over, what is parked.

use super::Finding;
use crate::config::PipelineConfig;
use crate::event::Start;
use crate::ledger::view::{Books, Moved, PipelineBooks};

/// Of a pipeline whose relay can't be asked it is a sign of trouble when an event has waited for so long.
const WAITS_LONG_SECONDS: f64 = 60.0;
/// A log that takes this part of its budget is worth a word.
const BUDGET_PERCENT: u64 = 80;

/// What the tables say, and what is known besides.
pub(super) struct Seen<'a> {
    pub(super) books: &'a Books,
    pub(super) pipelines: &'a [PipelineConfig],
    /// Events that are retained, as far as they were counted.
    pub(super) retained: &'a str,
    pub(super) budget_bytes: Option<u64>,
    /// Whether the daemon of this configuration answers.
    pub(super) daemon_answers: bool,
}

pub(super) fn judge(seen: &Seen<'_>) -> Vec<Finding> {
    let Seen {
        books, pipelines, ..
    } = seen;
    let mut findings: Vec<Finding> = books.pipelines.iter().filter_map(elsewhere).collect();
    findings.extend(parked(books));
    for config in *pipelines {
        let name = config.pipeline.name.as_str();
        let rows = || books.pipelines.iter().filter(|row| row.pipeline == name);
        if rows().all(|row| row.last_id.is_none()) {
            findings.push(new(config, seen));
        }
        findings.extend(rows().map(|row| owner(row, seen)));
    }
    findings.extend(strangers(seen));
    findings.extend(budget(books.log.bytes, seen.budget_bytes));
    findings
}

/// A pipeline that has not begun.
fn new(config: &PipelineConfig, seen: &Seen<'_>) -> Finding {
    let name = &config.pipeline.name;
    let (newest, retained) = (seen.books.newest_id, seen.retained);
    let begins = match config.start {
        Start::Earliest if newest == 0 => "at the first event".to_owned(),
        Start::Earliest => format!("at the earliest of {retained} retained events"),
        Start::Latest => format!("after the newest of {retained} retained events"),
        Start::Time(_) | Start::Event(_) => format!("at a time among {retained} retained events"),
    };
    Finding::note(
        "new_pipeline",
        format!("pipeline {name} has no cursor: it begins {begins} (pipeline.start)"),
        "where it begins is decided once, when a relay first owns it",
    )
}

fn owner(row: &PipelineBooks, seen: &Seen<'_>) -> Finding {
    let name = row.name();
    let waits = row.oldest_unpublished_seconds;
    if let Some(pause) = &row.paused {
        let what = match waits {
            Some(seconds) => format!("; its oldest event has waited for {}", age(seconds)),
            None => String::new(),
        };
        return Finding::note(
            "paused",
            format!("pipeline {name} is paused {pause}{what}"),
            "an operator wants it so; the log grows, and retention keeps what the pipeline has not published",
        )
        .command(format!("outbox-relay pipelines resume {}", row.pipeline));
    }
    let Some(owner) = &row.owner else {
        let Some(seconds) = waits else {
            return Finding::note(
                "lease",
                format!("no relay owns pipeline {name}"),
                "nothing is published until a relay runs; nothing waits now",
            )
            .command("outbox-relay run");
        };
        let backlog = row.backlog_ids.unwrap_or(0);
        return Finding::error(
            "lease",
            format!(
                "no relay owns pipeline {name}, and {} {}: the oldest event has waited for {}",
                ids(backlog),
                if backlog == 1 { "waits" } else { "wait" },
                age(seconds)
            ),
            "nothing is published until a relay runs",
        )
        .command("outbox-relay run");
    };
    if let Some(seconds) = waits.filter(|s| *s >= WAITS_LONG_SECONDS && !seen.daemon_answers) {
        return Finding::warning(
            "waiting",
            format!(
                "pipeline {name} is owned by {}, and its oldest event has waited for {}",
                owner.holder,
                age(seconds)
            ),
            "that relay can't be asked from here, and may be stalled or halted",
        )
        .advice("ask it where it runs: GET /readyz of its admin.listen, or `outbox-relay doctor` beside it");
    }
    let others: Vec<&str> = seen
        .books
        .relays
        .iter()
        .filter(|relay| relay.pipelines.contains(&row.pipeline) && relay.holder != owner.holder)
        .map(|relay| &relay.holder[..])
        .collect();
    let why = if others.is_empty() {
        "no other relay stands by for it".to_owned()
    } else {
        format!("{} stand by for it", others.join(", "))
    };
    Finding::note(
        "lease",
        format!(
            "pipeline {name} is owned by {} (for {:.0} s unless renewed)",
            owner.holder, owner.lease_ends_in_seconds
        ),
        why,
    )
}

/// Cursors of pipelines that the configuration does not name and no relay owns.
fn strangers(seen: &Seen<'_>) -> Vec<Finding> {
    let rows = &seen.books.pipelines;
    let configured = |name: &str| {
        let mut names = seen.pipelines.iter();
        names.any(|config| config.pipeline.name.as_str() == name)
    };
    let owned = |name: &str| {
        rows.iter()
            .any(|row| row.pipeline == name && row.owner.is_some())
    };
    let mut names: Vec<&str> = rows.iter().map(|row| &row.pipeline[..]).collect();
    names.dedup();
    names.retain(|name| !configured(name) && !owned(name));
    names
        .into_iter()
        .map(|name| {
            let of = || rows.iter().filter(|row| row.pipeline == name);
            let backlog = of().filter_map(|row| row.backlog_ids).max().unwrap_or(0);
            let waits = of()
                .filter_map(|row| row.oldest_unpublished_seconds)
                .reduce(f64::max);
            let give_up = format!("outbox-relay pipelines remove {name} --reason … --yes");
            match waits {
                Some(seconds) => Finding::warning(
                    "strange_cursor",
                    format!(
                        "pipeline {name} has a cursor and {} waiting, the oldest event for {}, and the configuration does not \
                         name it",
                        ids(backlog),
                        age(seconds)
                    ),
                    "no relay publishes these events, and retention keeps them",
                )
                .advice(format!(
                    "add [pipelines.{name}] to the configuration, or give it up: {give_up}"
                )),
                None => Finding::note(
                    "strange_cursor",
                    format!("pipeline {name} has a cursor, and the configuration does not name it"),
                    "if it was given up, its cursor only stands in the way of dropping what was published",
                )
                .command(give_up),
            }
        })
        .collect()
}

/// Parked events want a person.
fn parked(books: &Books) -> Vec<Finding> {
    let sum = |of: fn(&PipelineBooks) -> i64| books.pipelines.iter().map(of).sum::<i64>();
    let dead = sum(|row| row.dead_letters);
    let waiting = sum(|row| row.parked_events) - dead;
    let mut findings = Vec::new();
    if waiting > 0 {
        findings.push(
            Finding::warning(
                "parked",
                match waiting {
                    1 => "1 event is parked".to_owned(),
                    events => format!("{events} events are parked"),
                },
                "they were rejected, or wait behind one of their entity that was; nothing of these entities is published",
            )
            .command("outbox-relay parked list"),
        );
    }
    if dead > 0 {
        findings.push(
            Finding::warning(
                "dead_letters",
                match dead {
                    1 => "there is 1 dead letter".to_owned(),
                    events => format!("there are {events} dead letters"),
                },
                "they were rejected or skipped and are not published; later events of their entities are",
            )
            .command("outbox-relay parked list"),
        );
    }
    findings
}

fn budget(bytes: u64, budget_bytes: Option<u64>) -> Option<Finding> {
    let budget = budget_bytes.filter(|budget| bytes >= budget / 100 * BUDGET_PERCENT)?;
    let size = |bytes| bytesize::ByteSize::b(bytes).display().iec().to_string();
    let what = format!(
        "the log takes {} of {} (retention.disk_budget)",
        size(bytes),
        size(budget)
    );
    let why =
        "it grows until the disk is full, unless events are published and retention removes them";
    let finding = if bytes >= budget {
        Finding::error("disk_budget", what, why)
    } else {
        Finding::warning("disk_budget", what, why)
    };
    Some(finding.advice(
        "`outbox-relay status` names the pipeline that is behind; keep less (retention.keep), or raise retention.disk_budget",
    ))
}

/// As many ids as may be events.
fn ids(number: i64) -> String {
    match number {
        1 => "1 id".to_owned(),
        number => format!("{number} ids"),
    }
}

pub(super) fn age(seconds: f64) -> String {
    if seconds < 120.0 {
        format!("{seconds:.0} s")
    } else if seconds < 7200.0 {
        format!("{:.0} min", seconds / 60.0)
    } else {
        format!("{:.0} h", seconds / 3600.0)
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
    use crate::config::Config;
    use crate::doctor::Severity;
    use crate::ledger::Pause;
    use crate::ledger::view::{LogSize, Owner};

    fn row(name: &str, owned: bool, waits: Option<f64>) -> PipelineBooks {
        PipelineBooks {
            pipeline: name.to_owned(),
            shard: 0,
            shards: 1,
            last_id: Some(1),
            backlog_ids: Some(7),
            owner: owned.then(|| Owner {
                holder: "host:1:abc".to_owned(),
                lease_ends_in_seconds: 9.0,
            }),
            cursor_age_seconds: None,
            oldest_unpublished_seconds: waits,
            oldest_unpublished_unknown: None,
            parked_events: 0,
            parked_entities: 0,
            dead_letters: 0,
            paused: None,
            moved: None,
        }
    }

    fn found(rows: Vec<PipelineBooks>, names: &[&str]) -> Vec<(Severity, &'static str, String)> {
        let env = names
            .iter()
            .map(|name| {
                let variable = format!("RELAY_PIPELINES__{}__TOPIC", name.to_uppercase());
                (variable, "x".to_owned())
            })
            .chain([(
                "RELAY_SOURCE__POSTGRES__URL".to_owned(),
                "postgres://db/app".to_owned(),
            )]);
        let config = Config::load(None, env).unwrap();
        let books = Books {
            retained: crate::ledger::view::Retained::default(),
            newest_id: 8,
            log: LogSize {
                bytes: 90,
                oldest_seconds: None,
                growth: None,
            },
            pipelines: rows,
            relays: Vec::new(),
            server: None,
        };
        let seen = Seen {
            books: &books,
            pipelines: &config.pipelines,
            retained: "944",
            budget_bytes: None,
            daemon_answers: false,
        };
        judge(&seen)
            .into_iter()
            .map(|finding| (finding.severity, finding.check, finding.what))
            .collect()
    }

    #[test]
    fn who_owns_what_and_what_waits_decides_how_bad_it_is() {
        let mut restored = row("restored", false, None);
        restored.moved = Some(Moved::Cluster);
        let mut paused = row("paused", false, Some(600.0));
        paused.paused = Some(Pause {
            since: "2026-01-31T10:00:00Z".to_owned(),
            by: "ann@shop".to_owned(),
            reason: "the broker moves".to_owned(),
        });
        let rows = vec![
            row("idle", false, None),
            row("left", false, Some(1200.0)),
            row("main", true, Some(1.0)),
            row("old", false, None),
            paused,
            restored,
            row("slow", true, Some(90.0)),
            row("waits", false, Some(30.0)),
        ];
        let names = ["idle", "main", "new", "paused", "restored", "slow", "waits"];
        let found = found(rows, &names);
        let of = |severity| {
            found
                .iter()
                .filter(|(found, ..)| *found == severity)
                .map(|(_, _, what)| &what[..])
                .collect::<Vec<_>>()
        };
        assert_eq!(
            of(Severity::Error),
            ["no relay owns pipeline waits, and 7 ids wait: the oldest event has waited for 30 s"]
        );
        assert_eq!(
            of(Severity::Warning),
            [
                "pipeline slow is owned by host:1:abc, and its oldest event has waited for 90 s",
                "pipeline left has a cursor and 7 ids waiting, the oldest event for 20 min, and the configuration does not name it",
            ]
        );
        assert_eq!(
            of(Severity::Note)[1..],
            [
                "no relay owns pipeline idle",
                "pipeline main is owned by host:1:abc (for 9 s unless renewed)",
                "pipeline new has no cursor: it begins at the earliest of 944 retained events (pipeline.start)",
                "pipeline paused is paused since 2026-01-31T10:00:00Z by ann@shop: the broker moves; its oldest event has waited \
                 for 10 min",
                "no relay owns pipeline restored",
                "pipeline old has a cursor, and the configuration does not name it",
            ]
        );
    }

    #[test]
    fn dead_letters_hold_no_entity_and_a_budget_warns_before_it_is_full() {
        let mut main = row("main", true, None);
        (main.parked_events, main.dead_letters) = (3, 2);
        let found = found(vec![main], &["main"]);
        assert_eq!(found[0].2, "1 event is parked");
        assert_eq!(found[1].2, "there are 2 dead letters");
        let severity = |bytes| budget(bytes, Some(1000)).map(|finding| finding.severity);
        assert_eq!(
            [799, 800, 999, 1000].map(severity),
            [
                None,
                Some(Severity::Warning),
                Some(Severity::Warning),
                Some(Severity::Error)
            ]
        );
    }
}
