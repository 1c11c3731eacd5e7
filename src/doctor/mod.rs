//! Looks for what keeps a relay from working, or will: connections, rights, table shape, topics.
//!
//! Asking and judging are separate: a probe reads facts, a pure function turns them into findings. A probe that fails is
//! a finding itself and the others go on. Changes nothing. Prints nothing: that is the command's.

mod books;
mod daemon;
mod kafka;
mod kafka_rights;
mod postgres;
mod reading;
mod retention;
mod sqlite;
mod transactions;

use std::collections::BTreeSet;

use anyhow::Error;
use serde::Serialize;

use crate::config::{Config, Sink, Source};
use crate::database::{Database, SequencePlace};
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
    /// Looked at and in order.
    Ok,
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

    fn ok(check: &'static str, what: impl Into<String>) -> Self {
        Self::new(Severity::Ok, check, what, "looked at, and in order")
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

/// Looks at both ends of the configuration and asks its daemon; the worst first. `now_us` is the wall clock, in microseconds
/// since the Unix epoch.
pub async fn examine(config: &Config, now_us: fn() -> i64) -> Vec<Finding> {
    let source = async {
        let mut findings = match &config.source {
            Source::Postgres(settings) => {
                postgres::examine(settings, &config.retention, now_us).await
            }
            Source::Sqlite { path, .. } => sqlite::examine(path).await,
        };
        let mut topics = BTreeSet::new();
        let sound = findings
            .all
            .iter()
            .all(|finding| finding.severity != Severity::Error);
        if findings.tables {
            let (daemon, of_daemon) = daemon::examine(config, now_us()).await;
            findings.all.extend(of_daemon);
            let of_tables = tables(config, daemon.is_some(), sound, &mut topics).await;
            findings.all.extend(answered("books", of_tables));
        } else {
            // A relay that runs says what it lacks all the same.
            findings
                .all
                .extend(daemon::examine(config, now_us()).await.1);
        }
        (findings.all, topics)
    };
    let (mut findings, wanted) = source.await;
    if let Sink::Kafka(settings) = &config.sink {
        findings.extend(kafka::examine(settings, &config.pipelines, wanted).await);
    }
    // Stable: within a severity the order of the probes, which is the order to mend things in.
    findings.sort_by_key(|finding| finding.severity);
    findings
}

/// What was found of the database, and whether its tables can be asked.
struct Probed {
    all: Vec<Finding>,
    tables: bool,
}

/// What the relay's tables and the log say; the log is read where it is `sound` as far as one knows.
async fn tables(
    config: &Config,
    daemon_answers: bool,
    sound: bool,
    topics: &mut BTreeSet<(String, String)>,
) -> Result<Vec<Finding>, Error> {
    let mut database = Database::open(&config.source).await?;
    let books = database.books().await?;
    let retained = database.retained().await?;
    let seen = books::Seen {
        books: &books,
        pipelines: &config.pipelines,
        retained: &retained,
        budget_bytes: config.retention.disk_budget_bytes,
        daemon_answers,
    };
    let mut findings = books::judge(&seen);
    findings.extend(retention::judge(&config.retention, &books));
    findings.extend(sequence(database.sequence().await?));
    // Rows of another cluster mean something once a relay has adopted them, and what is wrong with the table is known.
    if sound && books.pipelines.iter().all(|row| row.moved.is_none()) {
        let read = reading::examine(config, &mut database).await;
        findings.extend(read.findings);
        topics.extend(read.topics);
    }
    Ok(findings)
}

/// The sequence of the ids has to be ahead of everything that it has handed out.
fn sequence(place: Option<SequencePlace>) -> Option<Finding> {
    let SequencePlace { stands, used } = place?;
    (stands < used).then(|| {
        Finding::error(
            "sequence_behind",
            format!("the sequence outbox.events_id_seq stands at {stands}, and ids up to {used} are used"),
            "it hands out ids a second time: inserts fail with a duplicate key, and a relay has to look at the whole log",
        )
        .sql("select outbox.repair_sequence()")
    })
}

/// Makes one finding of a probe that got no answer.
fn answered(
    check: &'static str,
    findings: Result<Vec<Finding>, Error>,
) -> impl IntoIterator<Item = Finding> {
    findings.unwrap_or_else(|error| vec![Finding::unknown(check, &error)])
}
