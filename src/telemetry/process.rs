//! What the process takes of the machine, under the names that all Prometheus clients use. Linux only; read when asked for.

use std::fmt::Write as _;
use std::fs;

/// Of a second, in which the kernel tells processor time: 100 on every architecture that the relay is built for.
const TICKS_A_SECOND: f64 = 100.0;

/// Writes what is known in Prometheus' text format, with the time when the process began in microseconds since the Unix
/// epoch. What can't be read is left out.
#[expect(
    clippy::cast_precision_loss,
    reason = "Prometheus counts in floating point"
)]
pub(super) fn write(text: &mut String, began_us: i64) {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let files = fs::read_dir("/proc/self/fd").map(|files| files.count() as f64);
    for (name, kind, meaning, value) in [
        (
            "process_resident_memory_bytes",
            "gauge",
            "resident memory of the process",
            kibibytes(&status, "VmRSS:"),
        ),
        (
            "process_virtual_memory_bytes",
            "gauge",
            "virtual memory of the process",
            kibibytes(&status, "VmSize:"),
        ),
        (
            "process_cpu_seconds_total",
            "counter",
            "processor time that the process has used, its own and the system's for it",
            cpu_seconds(&stat),
        ),
        (
            "process_open_fds",
            "gauge",
            "open file descriptors",
            files.ok(),
        ),
        (
            "process_max_fds",
            "gauge",
            "open file descriptors that the process may have",
            files_max(&limits),
        ),
        (
            "process_threads",
            "gauge",
            "threads of the process",
            number(&status, "Threads:"),
        ),
        (
            "process_start_time_seconds",
            "gauge",
            "when the process began, in seconds since the Unix epoch",
            Some(began_us as f64 / 1e6),
        ),
    ] {
        if let Some(value) = value {
            // A text takes what is written to it.
            let _ = write!(
                text,
                "# HELP {name} {meaning}\n# TYPE {name} {kind}\n{name} {value}\n\n"
            );
        }
    }
}

/// The number behind a name at the beginning of a line.
fn number(text: &str, name: &str) -> Option<f64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

fn kibibytes(status: &str, name: &str) -> Option<f64> {
    Some(number(status, name)? * 1024.0)
}

/// Of `/proc/self/stat`: the name of the program, in brackets, may contain anything.
fn cpu_seconds(stat: &str) -> Option<f64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user + system) / TICKS_A_SECOND)
}

/// The soft limit.
fn files_max(limits: &str) -> Option<f64> {
    number(limits, "Max open files")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_understood() {
        let stat =
            "42 (out) box (x) S 1 42 42 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 5 0 123456 1000 200";
        assert_eq!(cpu_seconds(stat), Some(3.0));
        let status = "Name:\tx\nVmRSS:\t   12 kB\nThreads:\t5\n";
        assert_eq!(kibibytes(status, "VmRSS:"), Some(12_288.0));
        assert_eq!(number(status, "Threads:"), Some(5.0));
        assert_eq!(kibibytes(status, "VmSize:"), None);
        let limits = "Limit     Soft Limit  Hard Limit  Units\nMax open files            1024                 524288               files\n";
        assert_eq!(files_max(limits), Some(1024.0));
    }

    #[test]
    fn this_process_is_told() {
        let mut text = String::new();
        write(&mut text, 1_800_000_000_500_000);
        for line in [
            "process_resident_memory_bytes ",
            "process_cpu_seconds_total ",
            "process_open_fds ",
            "process_start_time_seconds 1800000000.5",
        ] {
            assert!(text.contains(&format!("\n{line}")), "{line}: {text}");
        }
    }
}
