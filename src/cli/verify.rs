//! `outbox-relay verify`: is everything in the topics that should be, and nothing else? Never prints payloads or keys.

use std::io::{IsTerminal, Write, stderr};
use std::sync::Arc;

use anstyle::Style;
use anyhow::Error;
use clap::Args;

use super::show::{self, BOLD, DIM, GREEN, RED, YELLOW, say};
use super::time::time;
use super::{ConfigArgs, Outcome};
use crate::database::with_next_step;
use crate::event::PipelineName;
use crate::verify::{
    self, Doubled, Example, Finding, Lost, LostEvents, NotJudged, Options, PipelineReport,
    Progress, Side, Watcher,
};

/// Compare the topics with the log: what is missing, doubled, out of order, altered or unknown?
#[derive(Debug, Args)]
#[command(after_help = VERIFY_HELP)]
pub(super) struct Verify {
    #[command(flatten)]
    config: ConfigArgs,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
    /// Of this pipeline only.
    #[arg(long, value_name = "NAME")]
    pipeline: Option<PipelineName>,
    /// Only from the first event at or after this time: 2026-01-31T00:00:00Z, 2026-01-31, or 1h for an hour ago.
    #[arg(long, value_name = "TIME", value_parser = time)]
    since: Option<i64>,
    /// Only from the event with this sequence on.
    #[arg(long, value_name = "ID")]
    from_id: Option<i64>,
    /// Take every duplicate for a broken promise.
    #[arg(long)]
    no_duplicates: bool,
    /// Say on the standard error how far it is, also where that is no terminal.
    #[arg(long)]
    progress: bool,
}

const VERIFY_HELP: &str = "\
Reads the whole retained log and the topics, and changes nothing. It may run beside the relay. \
An event takes about 50 bytes of memory: 10 million take some 520 MB. Needs the rights of the role \
outbox_relay, and to read and describe the topics.

Exit codes: 0 every promise holds as far as can be judged, 3 something was found, 1 one side could not be read.";

impl Verify {
    pub(super) async fn run(self) -> Result<Outcome, Error> {
        let config = self.config.load()?;
        let options = Options {
            pipeline: self.pipeline,
            since_us: self.since,
            from_id: self.from_id,
            no_duplicates: self.no_duplicates,
        };
        let terminal = stderr().is_terminal();
        let watcher: Watcher = match (terminal, self.progress) {
            (true, _) => Arc::new(show_progress),
            (false, true) => Arc::new(log_progress),
            (false, false) => Arc::new(|_, _| {}),
        };
        let report = verify::audit(&config, &options, &watcher).await;
        if terminal {
            // Wipes the line of the progress away.
            anstream::eprint!("\r\u{1b}[K");
        }
        let report = report.map_err(with_next_step)?;
        if self.json {
            say!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            report.pipelines.iter().for_each(show_pipeline);
        }
        Ok(if report.holds() {
            Outcome::Done
        } else {
            Outcome::Findings
        })
    }
}

fn progress(pipeline: &PipelineName, progress: Progress) -> String {
    let Progress {
        side, read, all, ..
    } = progress;
    let what = match side {
        Side::Events => "events of the log",
        Side::Records => "records of the topics",
    };
    let all = all.map_or(String::new(), |all| format!(" of {all}"));
    format!("{pipeline}: {read}{all} {what} read")
}

fn show_progress(pipeline: &PipelineName, now: Progress) {
    anstream::eprint!("\r{}\u{1b}[K", progress(pipeline, now));
    // What can't be shown is of no interest.
    let _ = stderr().flush();
}

/// Where nothing can be written over, a line each hundred thousand is enough.
fn log_progress(pipeline: &PipelineName, now: Progress) {
    if now.done || now.read.is_multiple_of(100_000) {
        anstream::eprintln!("{}", progress(pipeline, now));
    }
}

fn show_pipeline(report: &PipelineReport) {
    let PipelineReport {
        pipeline,
        holds,
        events,
        records,
        topics,
        found,
        waiting,
        parked,
        dropped,
        lost,
        not_judged,
        missing,
        out_of_order,
        altered,
        unknown,
        doubled,
        duplicates_allowed,
        notes,
    } = report;
    say!(
        "{BOLD}pipeline {pipeline}{BOLD:#}: {} in the log, {} in {}",
        many(*events, "event"),
        many(*records, "record"),
        many(topics.len() as u64, "topic")
    );
    line("found", *found, DIM, "in their topics");
    more("waiting", *waiting, "not passed by the cursor yet");
    more("parked", *parked, "set aside: `outbox-relay parked list`");
    more(
        "dropped",
        *dropped,
        "given up by an operator: `outbox-relay acts`",
    );
    show_not_judged(not_judged);
    show_lost(lost);
    show_finding("missing", missing, "passed by the cursor, and in no topic");
    if let Some(uuid) = missing
        .examples
        .first()
        .and_then(|example| example.event_id.as_ref())
    {
        say!(
            "                publish one again: `outbox-relay replay start --pipeline {pipeline} --event-id {uuid}`"
        );
    }
    show_finding(
        "out of order",
        out_of_order,
        "after a later event of their entity; without a common lock of its writers an entity has no order",
    );
    show_finding("altered", altered, "not as the log has them");
    show_finding("unknown", unknown, "in a topic, and never committed");
    show_doubled(doubled, *duplicates_allowed);
    for note in notes {
        say!("  {YELLOW}note{YELLOW:#}          {}", show::plain(note));
    }
    if *holds {
        say!("  {GREEN}every promise holds, as far as can be judged{GREEN:#}");
    } else {
        say!("  {RED}a promise is broken{RED:#}");
    }
}

fn many(number: u64, word: &str) -> String {
    show::count(i64::try_from(number).unwrap_or(i64::MAX), word)
}

fn line(word: &str, count: u64, style: Style, text: &str) {
    let text = show::plain(text);
    say!("  {style}{word:<13}{style:#} {count:<8} {DIM}{text}{DIM:#}");
}

/// What is worth a line only when there is some.
fn more(word: &str, count: u64, text: &str) {
    if count > 0 {
        line(word, count, YELLOW, text);
    }
}

fn show_not_judged(not_judged: &NotJudged) {
    let NotJudged {
        records_beyond_the_log,
        events_beyond_the_topic,
        events_compacted,
        events_before_the_start,
        records_of_other_pipelines,
    } = *not_judged;
    for (count, text) in [
        (
            records_beyond_the_log,
            "records of events that the log no longer retains",
        ),
        (
            events_beyond_the_topic,
            "events that their topic may no longer retain",
        ),
        (events_compacted, "events that compaction may have removed"),
        (
            events_before_the_start,
            "events from before the pipeline's first record: it does not start at \"earliest\"",
        ),
        (
            records_of_other_pipelines,
            "records that another pipeline writes to the same topic",
        ),
    ] {
        more("not judged", count, text);
    }
}

fn show_lost(lost: &Lost) {
    let Lost { count, removals } = lost;
    if *count == 0 {
        return;
    }
    line(
        "lost",
        *count,
        RED,
        "removed before they were published, by retention.drop_unpublished_after",
    );
    for LostEvents { ids, events, at } in removals {
        let words = format!("{events} events, {ids}, removed at {at}");
        anstream::println!("                {}", show::plain(&words));
    }
    let shown: u64 = removals.iter().map(|removal| removal.events).sum();
    if shown < *count {
        anstream::println!("                ...");
    }
}

fn show_finding(word: &str, finding: &Finding, text: &str) {
    if finding.count == 0 {
        line(word, 0, DIM, "none");
        return;
    }
    line(word, finding.count, RED, text);
    show_examples(&finding.examples, finding.count);
}

fn show_doubled(doubled: &Doubled, allowed: bool) {
    let Doubled {
        count,
        runs,
        longest_run,
        beyond_reach,
        examples,
    } = doubled;
    if *count == 0 {
        line("doubled", 0, DIM, "none");
        return;
    }
    let runs = format!("in {runs} runs, the longest of {longest_run}");
    let text = match beyond_reach {
        _ if !allowed => runs,
        0 => format!(
            "{runs}: what a crash or a replay leaves (a replayed record has the header \"replay\"); consumers deduplicate by id"
        ),
        _ => format!(
            "{runs}; {beyond_reach} of them go back further than relay.in_flight_events: a replay?"
        ),
    };
    line("doubled", *count, if allowed { YELLOW } else { RED }, &text);
    if !allowed || *beyond_reach > 0 {
        show_examples(examples, *count);
    }
}

fn show_examples(examples: &[Example], count: u64) {
    for example in examples {
        let Example {
            event_id,
            sequence,
            topic,
            partition,
            offset,
            what,
        } = example;
        let mut words = Vec::new();
        words.extend(sequence.map(|sequence| format!("sequence {sequence}")));
        words.extend(event_id.clone());
        words.extend(topic.as_ref().map(|topic| format!("topic {topic}")));
        words.extend(partition.map(|partition| format!("partition {partition}")));
        words.extend(offset.map(|offset| format!("offset {offset}")));
        let what = what.map_or(String::new(), |what| format!(": {what}"));
        say!("                {}{what}", show::plain(&words.join(", ")));
    }
    if count > examples.len() as u64 {
        say!("                ...");
    }
}
