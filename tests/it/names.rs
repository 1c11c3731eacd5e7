//! The names of metrics: what dashboards, alerts and the README speak of exists, and the README speaks of everything.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use outbox_relay::telemetry::{Kind, METRICS};

/// Tables, roles and channels that begin in the same way.
const OTHERS: [&str; 13] = [
    "outbox_cursors",
    "outbox_dropped",
    "outbox_events",
    "outbox_events_ids_ascend",
    "outbox_leases",
    "outbox_migrations",
    "outbox_parked",
    "outbox_parked_entity",
    "outbox_parked_wanted",
    "outbox_acts",
    "outbox_relay",
    "outbox_replays",
    "outbox_writer",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every word that looks like the name of a metric.
fn names(text: &str) -> BTreeSet<&str> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.split(|c: char| !word(c))
        .filter(|word| word.starts_with("outbox_") && word.len() > "outbox_".len())
        .filter(|word| !OTHERS.contains(word))
        .collect()
}

fn exists(name: &str) -> bool {
    METRICS.iter().any(|metric| {
        let part = match metric.kind {
            Kind::Histogram => name.strip_prefix(metric.name).unwrap_or("no"),
            Kind::Counter | Kind::Gauge => "no",
        };
        name == metric.name || ["_bucket", "_sum", "_count"].contains(&part)
    })
}

fn unknown(text: &str) -> Vec<&str> {
    names(text)
        .into_iter()
        .filter(|name| !exists(name))
        .collect()
}

fn files_below(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files_below(&path, found);
        } else {
            found.push(path);
        }
    }
}

/// The README's table, exactly.
fn table() -> String {
    let mut table = String::from("| metric | kind | meaning |\n|---|---|---|\n");
    for metric in METRICS {
        let kind = match metric.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        writeln!(table, "| `{}` | {kind} | {} |", metric.name, metric.meaning).unwrap();
    }
    table
}

#[test]
fn what_is_deployed_speaks_of_metrics_that_exist() {
    let mut files = Vec::new();
    files_below(&root().join("deploy"), &mut files);
    for file in ["deploy/alerts.yaml", "deploy/grafana/outbox-relay.json"] {
        let path = root().join(file);
        assert!(files.contains(&path), "{file} is missing");
        assert!(
            !names(&fs::read_to_string(path).unwrap()).is_empty(),
            "{file} names no metric"
        );
    }
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let unknown = unknown(&text);
        assert!(
            unknown.is_empty(),
            "{}: there are no metrics {unknown:?}",
            file.display()
        );
    }
}

/// Whoever is woken up finds a page.
#[test]
fn every_alert_has_its_runbook() {
    let read = |name: &str| fs::read_to_string(root().join(name)).unwrap();
    let (alerts, pages) = (read("deploy/alerts.yaml"), read("docs/alerts.md"));
    let names: Vec<&str> = alerts
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "))
        .collect();
    assert!(names.len() > 15, "{names:?}");
    for name in names {
        let anchor = format!("runbook: docs/alerts.md#{}\n", name.to_lowercase());
        assert!(alerts.contains(&anchor), "{name}: {anchor}");
        assert!(pages.contains(&format!("\n## {name}\n")), "{name}");
        let fires = format!("alertname=\"{name}\"");
        assert!(
            read("deploy/tests/alerts.yaml").contains(&fires),
            "{name} has no test"
        );
    }
}

#[test]
fn the_readme_has_the_table_of_all_metrics() {
    // Not there yet in a young repository.
    let Ok(readme) = fs::read_to_string(root().join("README.md")) else {
        return;
    };
    let unknown = unknown(&readme);
    assert!(
        unknown.is_empty(),
        "README.md: there are no metrics {unknown:?}"
    );
    assert!(
        readme.contains(&table()),
        "README.md has to contain this table:\n\n{}",
        table()
    );
}

#[test]
fn the_dashboard_is_json_and_its_panels_do_not_overlap() {
    let text = fs::read_to_string(root().join("deploy/grafana/outbox-relay.json")).unwrap();
    let dashboard: serde_json::Value = serde_json::from_str(&text).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let mut taken = BTreeSet::new();
    let mut ids = BTreeSet::new();
    for panel in panels {
        assert!(
            ids.insert(panel["id"].as_u64().unwrap()),
            "two panels have id {}",
            panel["id"]
        );
        let place = |key: &str| panel["gridPos"][key].as_u64().unwrap();
        assert!(
            place("x") + place("w") <= 24,
            "{} is too wide",
            panel["title"]
        );
        for x in place("x")..place("x") + place("w") {
            for y in place("y")..place("y") + place("h") {
                assert!(
                    taken.insert((x, y)),
                    "{} lies over another panel",
                    panel["title"]
                );
            }
        }
    }
}

#[test]
fn unknown_names_are_found() {
    assert_eq!(
        unknown("rate(outbox_restarts_total[5m]) > 0 or outbox_redy == 0"),
        ["outbox_redy"]
    );
    assert_eq!(
        unknown("outbox_publish_latency_seconds_bucket{le=\"1\"}"),
        [""; 0]
    );
    assert_eq!(unknown("outbox_ready_count"), ["outbox_ready_count"]);
    assert_eq!(
        unknown("create role outbox_writer; outbox-relay run"),
        [""; 0]
    );
}

/// Tests that the documentation names are there.
#[test]
fn the_tests_that_are_promised_exist() {
    let mut files = Vec::new();
    files_below(&root().join("tests/it"), &mut files);
    files_below(&root().join("src"), &mut files);
    let code: String = files
        .iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    let promises = fs::read_to_string(root().join("docs/promises.md")).unwrap();
    let cells = promises
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| |"))
        .filter_map(|line| line.trim_end_matches([' ', '|']).rsplit('|').next());
    let named: BTreeSet<&str> = cells
        .flat_map(|cell| cell.split('`').skip(1).step_by(2))
        .collect();
    assert!(named.len() > 40, "{named:?}");
    let missing: Vec<&&str> = named
        .iter()
        // As a function, or as the name that a macro makes one of.
        .filter(|name| !code.contains(**name))
        .collect();
    assert!(missing.is_empty(), "no such test: {missing:?}");
}
