//! The bench (`benches/figures`), on services of its own because it freezes the broker and holds transactions open: every
//! case measures something and finds it right. What it measures here are no figures.

use std::process::Command;

use super::services::Own;

/// Every case, in variants that have little in common: all of them take more than ten minutes.
const RUNS: [&[&str]; 6] = [
    &["drain", "memory", "start-stop", "--only=exactly-once"],
    &["latency", "service", "--only=1000/s, listen"],
    &["service", "--only=8 writers, poll"],
    &["idle", "takeover", "--only=listen"],
    &["adverse", "catch-up", "retention", "--events=5000"],
    // 100 MiB, so that there is something left when the broker freezes.
    &["stall", "--only=1 MiB", "--events=400000"],
];
/// As short as everything may be.
const SHORT: [&str; 7] = [
    "--quick",
    "--rounds=1",
    "--seconds=1",
    "--idle-seconds=1",
    "--stall-seconds=1",
    "--lease-seconds=1",
    "--retention-seconds=5",
];

/// Side by side: they wait for most of the time.
#[test]
fn the_bench_measures_and_finds_everything_right() {
    let test = "the_bench_measures_and_finds_everything_right";
    let (Some(database), Some(kafka)) = (Own::postgres(test), Own::kafka(test)) else {
        return;
    };
    std::thread::scope(|side| {
        for run in RUNS {
            side.spawn(|| measure(run, &database, &kafka));
        }
    });
}

/// A case that is in no run would not be tested.
#[test]
fn the_runs_contain_every_case() {
    let help = bench(&["-h"]).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    let (_, values) = help.split_once("[possible values: ").unwrap();
    let (values, _) = values.split_once(']').unwrap();
    let ran = RUNS.concat();
    for case in values.split(", ") {
        assert!(ran.contains(&case), "{case} of {values}");
    }
}

fn measure(run: &[&str], database: &Own, kafka: &Own) {
    let output = bench(&SHORT)
        .args(["--broker-pid", kafka.variable("KAFKA_PID")])
        .args(run)
        .env("DATABASE_URL", database.variable("DATABASE_URL"))
        .env("KAFKA_BROKERS", kafka.variable("KAFKA_BROKERS"))
        .output()
        .unwrap();
    let [said, shown] = [output.stderr, output.stdout].map(|it| String::from_utf8(it).unwrap());
    let skipped = shown.contains("SKIPPED");
    assert!(output.status.success() && !skipped, "{said}\n{shown}");
}

fn bench(arguments: &[&str]) -> Command {
    let profile = if cfg!(debug_assertions) {
        "dev"
    } else {
        "release"
    };
    let mut bench = crate::examples::cargo();
    bench
        .args(["bench", "--quiet", "--locked", "--profile", profile])
        .args(["--bench", "figures", "--"])
        .args(arguments);
    bench
}
