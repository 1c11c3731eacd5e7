//! What the figures were measured on: without it they mean nothing.

use std::process::Command;

use anyhow::Error;
use sqlx::Row;

use crate::options::Options;
use crate::report::Header;
use crate::world::World;

/// Finds out what this is.
pub async fn header(world: &World, options: &Options) -> Result<Header, Error> {
    let mut caveats = Vec::new();
    if cfg!(debug_assertions) {
        caveats.push("a debug build".to_owned());
    }
    if options.quick {
        caveats.push("--quick".to_owned());
    }
    let sizes = &world.sizes;
    Ok(Header {
        relay: env!("CARGO_PKG_VERSION").to_owned(),
        commit: commit(),
        machine: machine(),
        kernel: first_line("/proc/sys/kernel/osrelease"),
        load_average: first_line("/proc/loadavg")
            .split(' ')
            .next()
            .and_then(|load| load.parse().ok())
            .unwrap_or_default(),
        postgres: postgres(world).await?,
        kafka: options
            .kafka_version
            .clone()
            .unwrap_or_else(|| "of unknown version (--kafka-version)".to_owned()),
        sizes: format!(
            "{} rounds, backlogs of {} events, steady load for {} s, {} partitions per topic",
            sizes.rounds, sizes.events, sizes.seconds, options.partitions
        ),
        stolen_percent: None,
        caveats,
    })
}

fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git")
            .args(["-C", env!("CARGO_MANIFEST_DIR")])
            .args(arguments)
            .output()
            .ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else {
        return String::new();
    };
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]);
    match changed.as_deref() {
        None | Some("") => commit,
        Some(_) => commit + " with changes",
    }
}

fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let value = |file: &str, key: &str| {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        line.map(|line| line.trim_start_matches([':', '\t', ' ']).to_owned())
    };
    let model =
        value("/proc/cpuinfo", "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let kib = value("/proc/meminfo", "MemTotal")
        .and_then(|text| text.trim_end_matches(" kB").parse::<u64>().ok());
    let gib = kib.unwrap_or_default() / 1024 / 1024;
    format!("{cores} cores of {model}, {gib} GiB")
}

/// Its version, and the settings that decide what a commit costs.
async fn postgres(world: &World) -> Result<String, Error> {
    let row = sqlx::query(
        "select current_setting('server_version'), current_setting('fsync'), \
                current_setting('synchronous_commit'), current_setting('shared_buffers'), current_setting('wal_level')",
    )
    .fetch_one(&mut world.admin().await?)
    .await?;
    let cell = |n: usize| row.try_get::<String, _>(n);
    Ok(format!(
        "{} (fsync {}, synchronous_commit {}, shared_buffers {}, wal_level {})",
        cell(0)?,
        cell(1)?,
        cell(2)?,
        cell(3)?,
        cell(4)?
    ))
}

/// What the host has taken of the processors so far, and all that there was of them.
pub struct Stolen {
    stolen: f64,
    all: f64,
}

impl Stolen {
    /// Zero where the system does not tell.
    pub fn until_now() -> Self {
        let line = first_line("/proc/stat");
        let times: Vec<f64> = line
            .split_whitespace()
            .skip(1)
            .filter_map(|time| time.parse().ok())
            .collect();
        Self {
            stolen: times.get(7).copied().unwrap_or_default(),
            all: times.iter().take(8).sum(),
        }
    }

    /// In percent.
    pub fn percent_since(&self, before: &Self) -> f64 {
        100.0 * (self.stolen - before.stolen) / (self.all - before.all).max(1.0)
    }
}

fn first_line(file: &str) -> String {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.lines().next().unwrap_or_default().to_owned()
}
