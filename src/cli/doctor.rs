//! `outbox-relay doctor`: what is wrong, why it matters, and what mends it.

use std::io::IsTerminal;

use anstyle::Style;
use anyhow::Error;
use clap::Args;

use super::show::{self, DIM, GREEN, RED, YELLOW, say};
use super::{ConfigArgs, Outcome, check};
use crate::doctor::{self, Finding, Remedy, Severity};
use crate::supervise::wall_clock_us;

/// Look for what keeps the relay from working, or will: connections, rights, tables, topics.
#[derive(Debug, Args)]
pub(super) struct Doctor {
    #[command(flatten)]
    config: ConfigArgs,
    /// Print a JSON array.
    #[arg(long)]
    json: bool,
}

impl Doctor {
    pub(super) async fn run(self) -> Result<Outcome, Error> {
        let config = self.config.load()?;
        if std::io::stderr().is_terminal() {
            anstream::eprintln!("{DIM}asking database, broker and daemon: up to 10 s each{DIM:#}");
        }
        let findings = doctor::examine(&config, wall_clock_us).await;
        if self.json {
            say!("{}", serde_json::to_string_pretty(&findings)?);
        } else {
            say!("from  {}", check::source(&config));
            say!("to    {}", check::sink(&config));
            show_findings(&findings);
        }
        let healthy = findings
            .iter()
            .all(|finding| finding.severity >= Severity::Note);
        Ok(if healthy {
            Outcome::Done
        } else {
            Outcome::Findings
        })
    }
}

fn show_findings(findings: &[Finding]) {
    for finding in findings {
        show_finding(finding);
    }
    let count = |severity| {
        let of = findings.iter().filter(|f| f.severity == severity).count();
        i64::try_from(of).unwrap_or(i64::MAX)
    };
    let (errors, warnings, notes) = (
        count(Severity::Error),
        count(Severity::Warning),
        count(Severity::Note),
    );
    if errors + warnings == 0 {
        say!(
            "{GREEN}nothing is wrong{GREEN:#} ({})",
            show::count(notes, "note")
        );
    } else {
        say!(
            "{}, {}, {}",
            show::count(errors, "error"),
            show::count(warnings, "warning"),
            show::count(notes, "note")
        );
    }
}

fn show_finding(finding: &Finding) {
    let Finding {
        severity,
        check: _,
        what,
        why,
        remedy,
    } = finding;
    let (style, word): (Style, &str) = match severity {
        Severity::Error => (RED, "error  "),
        Severity::Warning => (YELLOW, "warning"),
        Severity::Note => (DIM, "note   "),
        Severity::Ok => {
            say!("{GREEN}ok     {GREEN:#}  {}", show::plain(what));
            return;
        }
    };
    say!("{style}{word}{style:#}  {}", show::plain(what));
    say!("         {DIM}why{DIM:#}   {}", show::plain(why));
    let (word, text) = match remedy {
        Some(Remedy::Sql(sql)) => ("sql", sql),
        Some(Remedy::Command(command)) => ("run", command),
        Some(Remedy::Configuration(setting)) => ("set", setting),
        Some(Remedy::Advice(advice)) => ("do", advice),
        None => return,
    };
    for (n, line) in text.lines().enumerate() {
        let word = if n == 0 { word } else { "" };
        say!("         {DIM}{word:<5}{DIM:#} {}", show::plain(line));
    }
}
