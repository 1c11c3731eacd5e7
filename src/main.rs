//! The door: see [`outbox_relay`] for the map.

use std::process::ExitCode;

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => runtime.block_on(outbox_relay::cli::main()),
        Err(error) => {
            eprintln!("outbox-relay: start the runtime: {error}");
            ExitCode::FAILURE
        }
    }
}
