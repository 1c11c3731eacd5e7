//! The door: see [`outbox_relay`] for the map.

use std::process::ExitCode;
use std::time::Duration;

/// For calls that wait elsewhere, such as a write to a pipe that nobody reads.
const LEFT_BEHIND_MAX: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    // One thread: events pass through one future in any case, and what wakes another thread for each page costs more than
    // it brings. What waits or compresses has threads of its own.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => {
            let code = runtime.block_on(outbox_relay::cli::main());
            runtime.shutdown_timeout(LEFT_BEHIND_MAX);
            code
        }
        Err(error) => {
            eprintln!("outbox-relay: start the runtime: {error}");
            ExitCode::FAILURE
        }
    }
}
