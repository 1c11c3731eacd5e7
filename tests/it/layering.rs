//! Who may use whom: reads the imports of every file in `src` and names the offender.
//!
//! Words know nothing; rules know words; ends know words, and neither each other nor the rules; the loop knows all of
//! these; the shell puts it together; the door opens it. Also the rules of style that a text search can hold.

use std::path::Path;
use std::{fs, io};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Layer {
    Words,
    Rules,
    Ends,
    Telemetry,
    Loop,
    Shell,
    Door,
}

/// The modules below the root of the crate. A new one gets its place here.
const LAYERS: [(&str, Layer); 28] = [
    ("crash", Layer::Words),
    ("event", Layer::Words),
    ("position", Layer::Words),
    ("reason", Layer::Words),
    ("order", Layer::Rules),
    ("route", Layer::Rules),
    ("encode", Layer::Rules),
    ("source", Layer::Ends),
    ("sink", Layer::Ends),
    ("ledger", Layer::Ends),
    ("telemetry", Layer::Telemetry),
    ("relay", Layer::Loop),
    ("config", Layer::Shell),
    ("supervise", Layer::Shell),
    ("crew", Layer::Shell),
    ("admin", Layer::Shell),
    ("backlog", Layer::Shell),
    ("doctor", Layer::Shell),
    ("logging", Layer::Shell),
    ("migrate", Layer::Shell),
    ("demo", Layer::Shell),
    ("reload", Layer::Shell),
    ("replay", Layer::Shell),
    ("retention", Layer::Shell),
    ("database", Layer::Shell),
    ("verify", Layer::Shell),
    ("cli", Layer::Door),
    ("main", Layer::Door),
];

/// Books and log are one database: they reach it in the same way.
const EXCEPTIONS: [(&str, &str); 7] = [
    ("ledger/postgres/mod.rs", "source::postgres"),
    ("ledger/postgres/roster.rs", "source::postgres"),
    ("ledger/sqlite/mod.rs", "source::sqlite"),
    ("ledger/sqlite/pipelines.rs", "source::sqlite"),
    ("ledger/acts/postgres.rs", "source::postgres"),
    ("ledger/view/postgres.rs", "source::postgres"),
    ("ledger/view/sqlite.rs", "source::sqlite"),
];

/// An auditor that used what it audits would find nothing.
const ORACLE: (&str, [&str; 3]) = ("verify", ["config", "event", "reason"]);

const LINES_MAX: usize = 600;

fn layer(module: &str) -> Option<Layer> {
    let (_, layer) = LAYERS.iter().find(|(name, _)| *name == module)?;
    Some(*layer)
}

fn may_use(module: &str, other: &str) -> Option<bool> {
    let (by, of) = (layer(module)?, layer(other)?);
    Some(match (by, of) {
        _ if module == other => true,
        _ if module == ORACLE.0 => ORACLE.1.contains(&other),
        (Layer::Words | Layer::Rules | Layer::Shell | Layer::Door, _) => of <= by,
        (Layer::Ends | Layer::Telemetry, _) => of == Layer::Words,
        (Layer::Loop, _) => of < by,
    })
}

/// The module below the root to which a file belongs: `sink/kafka.rs` to `sink`, `encode_tests.rs` to `encode`.
fn module(path: &str) -> &str {
    let first = path.split('/').next().unwrap_or(path);
    let name = first.trim_end_matches(".rs");
    name.strip_suffix("_tests").unwrap_or(name)
}

/// How many `super` lead from a file to the root of the crate.
fn depth(path: &str) -> usize {
    let folders = path.matches('/').count();
    if path.ends_with("/mod.rs") {
        folders
    } else {
        folders + 1
    }
}

/// The text without comments, each line still in its place.
fn code(text: &str) -> String {
    let lines = text
        .lines()
        .map(|line| line.split_once("//").map_or(line, |(code, _)| code));
    lines.collect::<Vec<_>>().join("\n")
}

fn identifier(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_');
    &text[..end.unwrap_or(text.len())]
}

/// The paths that begin here: one, or each of a group in braces. Two names long at most.
fn paths(text: &str) -> Vec<String> {
    let Some(group) = text.strip_prefix('{') else {
        let first = identifier(text);
        let rest = text[first.len()..].strip_prefix("::").map(identifier);
        let second = rest.filter(|second| !second.is_empty());
        return vec![second.map_or(first.to_owned(), |second| format!("{first}::{second}"))];
    };
    let mut found = Vec::new();
    let (mut nesting, mut begins) = (0, true);
    for (at, c) in group.char_indices() {
        match c {
            '}' if nesting == 0 => break,
            '{' => nesting += 1,
            '}' => nesting -= 1,
            ',' if nesting == 0 => begins = true,
            c if begins && !c.is_whitespace() => {
                found.extend(paths(&group[at..]));
                begins = false;
            }
            _ => {}
        }
    }
    found
}

/// Everything of this crate that a file names from outside its own module, with the line.
fn uses(path: &str, text: &str) -> Vec<(usize, String)> {
    let text = code(text);
    let root = "super::".repeat(depth(path));
    let mut found = Vec::new();
    for prefix in ["crate::", "outbox_relay::", &root] {
        for (at, _) in text.match_indices(prefix) {
            let inside =
                text[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':');
            let line = 1 + text[..at].matches('\n').count();
            let known = |path: &String| {
                let first = path.split("::").next().unwrap_or_default();
                // What `super` leads to may be the file's own; what is not a module is the root's.
                let module = first.starts_with(|c: char| c.is_lowercase());
                module && (prefix != root || layer(first).is_some())
            };
            if !inside {
                let paths = paths(&text[at + prefix.len()..]);
                found.extend(paths.into_iter().filter(known).map(|path| (line, path)));
            }
        }
    }
    found
}

fn layer_offenders(path: &str, text: &str) -> Vec<String> {
    let own = module(path);
    if own == "lib" {
        return Vec::new();
    }
    uses(path, text)
        .into_iter()
        .filter_map(|(line, used)| {
            let excepted = EXCEPTIONS
                .iter()
                .any(|(file, allowed)| *file == path && *allowed == used);
            let other = used.split("::").next().unwrap_or_default();
            match may_use(own, other) {
                _ if excepted => None,
                Some(true) => None,
                Some(false) => Some(format!(
                    "{path}:{line}: {own} ({:?}) uses {used} ({:?})",
                    layer(own)?,
                    layer(other)?
                )),
                None => Some(format!(
                    "{path}:{line}: {own} or {other} has no place in LAYERS"
                )),
            }
        })
        .collect()
}

fn style_offenders(path: &str, text: &str) -> Vec<String> {
    let mut offenders = Vec::new();
    let lines = text.lines().count();
    if lines > LINES_MAX {
        offenders.push(format!("{path}: {lines} lines, {LINES_MAX} at most"));
    }
    let text = code(text);
    let mut only_in = |file: &str, words: &[&str]| {
        for word in words.iter().filter(|_| path != file) {
            if let Some(at) = text.find(word) {
                let line = 1 + text[..at].matches('\n').count();
                offenders.push(format!("{path}:{line}: {word} belongs in {file}"));
            }
        }
    };
    // The second half of `describe_counter!` and the like too.
    only_in("telemetry.rs", &["counter!(", "gauge!("]);
    // The exporter keeps each sample of one until somebody asks: memory grew with the rate.
    only_in("no file, see telemetry/latency.rs", &["histogram!("]);
    let spawns = ["tokio::spawn", "task::spawn(", "spawn_local(", "JoinSet"];
    only_in("supervise.rs", &spawns);
    offenders
}

/// All files below a folder, by their paths in it.
fn files(folder: &Path, prefix: &str, found: &mut Vec<(String, String)>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() {
            files(&path, &format!("{prefix}{name}/"), found)?;
        } else if name.ends_with(".rs") {
            found.push((format!("{prefix}{name}"), fs::read_to_string(&path)?));
        }
    }
    Ok(())
}

fn src() -> Vec<(String, String)> {
    let mut found = Vec::new();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    files(&folder, "", &mut found).unwrap();
    found.sort();
    assert!(found.len() > 20, "these are not all files of the crate");
    found
}

fn demand_none(offenders: impl Fn(&str, &str) -> Vec<String>) {
    let found: Vec<String> = src()
        .iter()
        .flat_map(|(path, text)| offenders(path, text))
        .collect();
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn imports_point_to_the_left() {
    demand_none(layer_offenders);
}

#[test]
fn files_are_short_and_some_words_have_their_place() {
    demand_none(style_offenders);
}

#[test]
fn a_planted_offender_is_named() {
    for (path, text) in [
        (
            "event.rs",
            "use crate::position::Position;\nuse crate::order::InFlight;",
        ),
        ("order/waiting.rs", "let x =\ncrate::sink::kafka::new();"),
        (
            "source/mod.rs",
            "\nuse crate::{event::Event, ledger::{Ledger, Parked}};",
        ),
        ("source/mod.rs", "\nuse super::ledger::Ledger;"),
        ("sink/kafka.rs", "\nuse super::super::encode::encode;"),
        (
            "ledger/sqlite.rs",
            "\nuse crate::source::postgres::connect;",
        ),
        ("relay/books.rs", "mod x;\nuse crate::{\n config::Config};"),
        (
            "config/mod.rs",
            "use crate::relay;\npub use crate::cli::run;",
        ),
        ("telemetry.rs", "\nuse crate::relay::Relay;"),
        ("event.rs", "\nuse crate::unheard_of::Thing;"),
        ("verify/judge.rs", "\nuse crate::encode::encode;"),
        (
            "verify/log/mod.rs",
            "use crate::config::Config;\nuse crate::source::postgres;",
        ),
        (
            "verify/mod.rs",
            "use super::event;\nuse super::position::Window;",
        ),
    ] {
        let found = layer_offenders(path, text);
        assert_eq!(found.len(), 1, "{path}: {found:?}");
        assert!(found[0].starts_with(&format!("{path}:2: ")), "{found:?}");
    }
    for (path, text) in [
        ("relay/mod.rs", "\nmetrics::counter!(\"x\").increment(1);"),
        ("relay/mod.rs", "\ntokio::spawn(async {});"),
        ("telemetry.rs", "\nmetrics::histogram!(\"x\").record(1);"),
    ] {
        let found = style_offenders(path, text);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with(&format!("{path}:2: ")), "{found:?}");
    }
    assert_eq!(
        style_offenders("event.rs", &"\n".repeat(LINES_MAX + 1)).len(),
        1
    );
}

#[test]
fn an_innocent_file_is_not_named() {
    for (path, text) in [
        (
            "source/mod.rs",
            "//! That is the [`crate::ledger`].\nuse crate::event::Event; // crate::sink",
        ),
        (
            "ledger/sqlite/mod.rs",
            "use crate::source::sqlite::connect;\nuse super::postgres;",
        ),
        ("encode_tests.rs", "use crate::route::Route;\nuse super::*;"),
        (
            "relay/mod.rs",
            "use crate::telemetry::PipelineMetrics;\nuse crate::{sink::Sink, source::Source};",
        ),
        ("main.rs", "outbox_relay::cli::run()"),
    ] {
        assert_eq!(layer_offenders(path, text), [""; 0], "{path}");
        assert_eq!(style_offenders(path, text), [""; 0], "{path}");
    }
}
