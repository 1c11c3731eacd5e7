//! Looks for what keeps a relay from working, or will: connections, rights, table shape, topics.
//!
//! Asking and judging are separate: a probe reads facts, a pure function turns them into findings. A probe that fails is
//! a finding itself and the others go on. Changes nothing. Prints nothing: that is the command's.

mod kafka;
mod kafka_rights;
mod postgres;
mod retention;
mod sqlite;
mod transactions;

use anyhow::Error;
use serde::Serialize;

use crate::config::{Config, Sink, Source};
use crate::reason::reason;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Nothing is published, or a promise does not hold.
    Error,
    /// It works, and something will go wrong or is slower than it could be.
    Warning,
    /// Good to know.
    Note,
}

/// What mends it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Remedy {
    /// To be run by an administrator of the database.
    Sql(String),
    /// To be run in a shell.
    Command(String),
    /// To be put into the configuration file.
    Configuration(String),
    /// What no single line does.
    Advice(String),
}

/// One thing that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// A stable name, for machines.
    pub check: &'static str,
    /// What was found.
    pub what: String,
    /// Why it matters.
    pub why: String,
    /// What mends it, where something has to be mended.
    pub remedy: Option<Remedy>,
}

impl Finding {
    fn new(
        severity: Severity,
        check: &'static str,
        what: impl Into<String>,
        why: impl Into<String>,
    ) -> Self {
        Self {
            severity,
            check,
            what: what.into(),
            why: why.into(),
            remedy: None,
        }
    }

    fn error(check: &'static str, what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::new(Severity::Error, check, what, why)
    }

    fn warning(check: &'static str, what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::new(Severity::Warning, check, what, why)
    }

    fn note(check: &'static str, what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::new(Severity::Note, check, what, why)
    }

    /// A probe that got no answer, which is not the same as a probe that found nothing.
    fn unknown(check: &'static str, error: &Error) -> Self {
        Self::warning(
            check,
            format!("could not be looked at: {}", reason(error)),
            "whether something is wrong here is not known",
        )
        .advice("mend what the message says and run `outbox-relay doctor` again")
    }

    fn sql(mut self, sql: impl Into<String>) -> Self {
        self.remedy = Some(Remedy::Sql(sql.into()));
        self
    }

    fn command(mut self, command: impl Into<String>) -> Self {
        self.remedy = Some(Remedy::Command(command.into()));
        self
    }

    fn configuration(mut self, setting: impl Into<String>) -> Self {
        self.remedy = Some(Remedy::Configuration(setting.into()));
        self
    }

    fn advice(mut self, advice: impl Into<String>) -> Self {
        self.remedy = Some(Remedy::Advice(advice.into()));
        self
    }
}

/// Looks at both ends of the configuration at once; the worst first. `now_us` is the wall clock, in microseconds since
/// the Unix epoch.
pub async fn examine(config: &Config, now_us: fn() -> i64) -> Vec<Finding> {
    let source = async {
        match &config.source {
            Source::Postgres(settings) => {
                postgres::examine(settings, (&config.pipelines, &config.retention), now_us).await
            }
            Source::Sqlite { path, .. } => sqlite::examine(path, &config.retention).await,
        }
    };
    let sink = async {
        match &config.sink {
            Sink::Kafka(settings) => kafka::examine(settings, &config.pipelines).await,
            Sink::Stdout => Vec::new(),
        }
    };
    let (mut findings, of_sink) = tokio::join!(source, sink);
    findings.extend(of_sink);
    // Stable: within a severity the order of the probes, which is the order to mend things in.
    findings.sort_by_key(|finding| finding.severity);
    findings
}

/// Makes one finding of a probe that got no answer.
fn answered(
    check: &'static str,
    findings: Result<Vec<Finding>, Error>,
) -> impl IntoIterator<Item = Finding> {
    findings.unwrap_or_else(|error| vec![Finding::unknown(check, &error)])
}

/// Parked events want a person, whatever the database.
fn parked(events: i64) -> Option<Finding> {
    (events > 0).then(|| {
        Finding::warning(
            "parked",
            format!("{events} events are parked"),
            "they were rejected, or wait behind one of their entity that was; nothing of these entities is published",
        )
        .command("outbox-relay parked list")
    })
}
