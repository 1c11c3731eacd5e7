//! Says what is wrong with a setting: one line with file, key, value, reason and the nearest valid key.

use figment::error::{Actual, Error, Kind};
use figment::{Figment, Metadata};

use super::environment::ENVIRONMENT;

/// One line for the person who wrote the setting.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

impl ConfigError {
    pub(super) fn new(line: impl Into<String>) -> Self {
        Self(line.into())
    }

    /// `prefix` is the table that was extracted, empty for the whole file.
    pub(super) fn from_figment(error: &Error, prefix: &str, figment: &Figment) -> Self {
        let path = [prefix]
            .into_iter()
            .chain(error.path.iter().map(String::as_str))
            .filter(|part| !part.is_empty())
            .collect::<Vec<_>>()
            .join(".");
        let metadata = error
            .metadata
            .as_ref()
            .or_else(|| figment.get_metadata(figment.find_value(&path).ok()?.tag()));
        let line = describe(&error.kind, &path);
        Self(match metadata.map(|metadata| origin(metadata, &path)) {
            Some(place) => format!("{place}: {line}"),
            None => line,
        })
    }
}

/// Where a setting was written: the file, the variable or the name of the layer.
pub(super) fn place(figment: &Figment, path: &str) -> Option<String> {
    let value = figment.find_value(path).ok()?;
    Some(origin(figment.get_metadata(value.tag())?, path))
}

fn origin(metadata: &Metadata, path: &str) -> String {
    match (&metadata.source, &*metadata.name) {
        (Some(figment::Source::File(file)), _) => file.display().to_string(),
        (_, ENVIRONMENT) => format!("RELAY_{}", path.to_ascii_uppercase().replace('.', "__")),
        (_, name) => name.to_owned(),
    }
}

fn describe(kind: &Kind, path: &str) -> String {
    let inside = |key: &str| match path {
        "" => key.to_owned(),
        path if path.rsplit('.').next() == Some(key) => path.to_owned(),
        path => format!("{path}.{key}"),
    };
    match kind {
        Kind::UnknownField(key, valid) => {
            format!("{}: no such setting{}", inside(key), nearest(key, valid))
        }
        Kind::MissingField(key) => format!("{}: is missing", inside(key)),
        Kind::UnknownVariant(_, valid) if is_secret(path) => {
            format!("{path}: has to be one of {}", valid.join(", "))
        }
        Kind::UnknownVariant(value, valid) => {
            format!(
                "{path} = {value:?}: has to be one of {}{}",
                valid.join(", "),
                nearest(value, valid)
            )
        }
        Kind::InvalidType(actual, expected) | Kind::InvalidValue(actual, expected) => {
            format!(
                "{path} = {}: has to be {}",
                show(actual, path),
                plain(expected)
            )
        }
        // The lines in between repeat a line of the file, which may hold a secret.
        Kind::Message(reason) if path.is_empty() => {
            let told = reason.lines().filter(|line| !line.contains('|'));
            let words = told.flat_map(str::split_whitespace);
            words.collect::<Vec<_>>().join(" ")
        }
        Kind::Message(reason) => format!("{path}: {reason}"),
        other => format!("{path}: {other}"),
    }
}

/// Whether a setting may hold a secret, or is of a table of settings that may.
pub(super) fn is_secret(path: &str) -> bool {
    // A value in place of a whole table may be one that was meant for a secret in it.
    const TABLES: [&str; 7] = [
        "source",
        "source.postgres",
        "sink",
        "sink.kafka",
        "sink.kafka.sasl",
        "sink.kafka.tls",
        "admin",
    ];
    let table = path.trim_end_matches(|c: char| c.is_ascii_digit() || c == '.');
    if TABLES.contains(&table) {
        return true;
    }
    path.split('.').any(|part| {
        ["password", "url", "token", "properties"]
            .iter()
            .any(|secret| part.contains(secret))
    })
}

fn show(actual: &Actual, path: &str) -> String {
    match actual {
        _ if is_secret(path) => "(not shown)".to_owned(),
        Actual::Bool(value) => value.to_string(),
        Actual::Unsigned(value) => value.to_string(),
        Actual::Signed(value) => value.to_string(),
        Actual::Float(value) => value.to_string(),
        Actual::Char(value) => format!("{value:?}"),
        Actual::Str(text) => format!("{text:?}"),
        Actual::Seq => "a list".to_owned(),
        Actual::Map => "a table".to_owned(),
        _ => "this value".to_owned(),
    }
}

/// Says in everyday words what the types behind the settings expect.
fn plain(expected: &str) -> &str {
    match expected {
        "usize" | "u64" | "u32" | "u16" | "i32" => "a whole number",
        "parsable string" => "a size such as \"4MiB\"",
        "a duration" => "a duration such as \"200ms\" or \"10s\"",
        "a boolean" => "true or false",
        "a string" | "string" | "path string" | "any valid UTF-8 string" => "a text in quotes",
        "a sequence" | "sequence" => "a list such as [\"order\", \"customer\"]",
        "a map" | "map" => "a table",
        table if table.starts_with("struct ") => "a table",
        other => other,
    }
}

fn nearest(given: &str, valid: &[&str]) -> String {
    valid
        .iter()
        .map(|candidate| (strsim::jaro_winkler(given, candidate), candidate))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(likeness, _)| *likeness > 0.7)
        .map_or_else(
            || format!("; there is {}", valid.join(", ")),
            |(_, candidate)| format!("; did you mean {candidate:?}?"),
        )
}
