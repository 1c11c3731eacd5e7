//! `outbox-relay doctor`: what is wrong, why it matters, and what mends it.

use anstyle::Style;
use anyhow::Error;
use clap::Args;

use super::show::{self, DIM, GREEN, RED, YELLOW};
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
        let findings = doctor::examine(&config, wall_clock_us).await;
        if self.json {
            anstream::println!("{}", serde_json::to_string_pretty(&findings)?);
        } else {
            anstream::println!("from  {}", check::source(&config));
            anstream::println!("to    {}", check::sink(&config));
            show_findings(&findings);
        }
        let healthy = findings
            .iter()
            .all(|finding| finding.severity == Severity::Note);
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
    let count = |severity| findings.iter().filter(|f| f.severity == severity).count();
    let (errors, warnings, notes) = (
        count(Severity::Error),
        count(Severity::Warning),
        count(Severity::Note),
    );
    if errors + warnings == 0 {
        anstream::println!("{GREEN}nothing is wrong{GREEN:#} ({notes} notes)");
    } else {
        anstream::println!("{errors} errors, {warnings} warnings, {notes} notes");
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
    };
    anstream::println!("{style}{word}{style:#}  {}", show::plain(what));
    anstream::println!("         {DIM}why{DIM:#}   {}", show::plain(why));
    let (word, text) = match remedy {
        Some(Remedy::Sql(sql)) => ("sql", sql),
        Some(Remedy::Command(command)) => ("run", command),
        Some(Remedy::Configuration(setting)) => ("set", setting),
        Some(Remedy::Advice(advice)) => ("do", advice),
        None => return,
    };
    for (n, line) in text.lines().enumerate() {
        let word = if n == 0 { word } else { "" };
        anstream::println!("         {DIM}{word:<5}{DIM:#} {}", show::plain(line));
    }
}
