//! Sets up the log: text for people, JSON for machines, to the standard error.

use anyhow::Context;
use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};

/// Installs the log for the whole process.
///
/// # Errors
/// When the level is not a directive, or a log is installed already.
pub fn install(settings: &Log) -> Result<(), anyhow::Error> {
    let filter = EnvFilter::try_new(&settings.level).with_context(|| {
        format!(
            "log.level = {:?} is not a level or a list of directives",
            settings.level
        )
    })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let installed = match settings.format {
        LogFormat::Text => {
            let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
            builder.with_ansi(colours).with_target(false).try_init()
        }
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    installed.map_err(|error| anyhow::anyhow!("install the log: {error}"))
}
