//! Sets up the log: text for people, JSON for machines, to the standard error.

use std::io::{self, Write};
use std::sync::mpsc;

use anyhow::Context;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, reload};

use crate::config::{Log, LogFormat};

/// Changes the level of an installed log; takes what `log.level` takes.
pub type SetLevel = Box<dyn Fn(&str) -> Result<(), anyhow::Error> + Send>;

/// Installs the log for the whole process; what it returns changes the level later.
///
/// # Errors
/// When the level is not a directive, or a log is installed already.
pub fn install(settings: &Log) -> Result<SetLevel, anyhow::Error> {
    install_into(settings, io::stderr)
}

/// Installs a log that is kept while something else has the terminal.
///
/// # Errors
/// As [`install`].
pub fn install_for_later(settings: &Log) -> Result<Later, anyhow::Error> {
    let (lines, later) = mpsc::channel();
    drop(install_into(settings, move || Line(lines.clone()))?);
    Ok(Later(later))
}

/// What was logged meanwhile.
pub struct Later(mpsc::Receiver<String>);

impl Later {
    /// All of it so far.
    #[must_use]
    pub fn text(&self) -> String {
        self.0.try_iter().collect()
    }
}

struct Line(mpsc::Sender<String>);

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Nobody reads it any more when the process is about to end.
        let _ = self.0.send(String::from_utf8_lossy(bytes).into_owned());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn install_into(
    settings: &Log,
    writer: impl for<'w> MakeWriter<'w> + Send + Sync + 'static,
) -> Result<SetLevel, anyhow::Error> {
    let (filter_now, handle) = reload::Layer::new(filter(&settings.level)?);
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    let registry = tracing_subscriber::registry().with(filter_now);
    let installed = match settings.format {
        LogFormat::Text => {
            let colours = io::IsTerminal::is_terminal(&io::stderr());
            registry
                .with(lines.with_ansi(colours).with_target(false))
                .try_init()
        }
        LogFormat::Json => registry.with(lines.json().flatten_event(true)).try_init(),
    };
    installed.map_err(|error| anyhow::anyhow!("install the log: {error}"))?;
    Ok(Box::new(move |level| {
        let filter = filter(level)?;
        handle.reload(filter).context("change the log level")
    }))
}

fn filter(level: &str) -> Result<EnvFilter, anyhow::Error> {
    EnvFilter::try_new(level)
        .with_context(|| format!("log.level = {level:?} is not a level or a list of directives"))
}
