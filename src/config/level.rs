//! The level of the log, as it is written: a level, or directives such as `info,outbox_relay::source=debug`.
//!
//! `EnvFilter` takes a word that is no level for the name of a target and then logs nothing else, so that a misspelt level
//! would switch the log off without a word. Pure.

use serde::{Deserialize, Deserializer, de};

const LEVELS: [&str; 6] = ["error", "warn", "info", "debug", "trace", "off"];

/// Refuses what is no level.
pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let level = String::deserialize(deserializer)?;
    check(&level).map_err(de::Error::custom)?;
    Ok(level)
}

/// Why this is no level and no list of directives.
fn check(level: &str) -> Result<(), String> {
    for directive in level.split(',').map(str::trim) {
        let (target, level) = match directive.rsplit_once('=') {
            Some((target, level)) => (target, level.trim()),
            None => ("", directive),
        };
        // A name of a target alone, or with the fields of a span, says nothing about a level that could be misspelt.
        let names_a_target = target.is_empty() && (level.contains("::") || level.ends_with(']'));
        let known = LEVELS.iter().any(|known| known.eq_ignore_ascii_case(level));
        if !known && !names_a_target {
            let nearest = LEVELS
                .iter()
                .max_by(|a, b| likeness(level, a).total_cmp(&likeness(level, b)))
                .filter(|known| likeness(level, known) > 0.7)
                .map_or_else(String::new, |known| format!("; did you mean {known:?}?"));
            return Err(format!(
                "{level:?} is no level: it has to be error, warn, info, debug, trace or off, or directives such as \
                 \"info,outbox_relay::source=debug\"{nearest}"
            ));
        }
    }
    Ok(())
}

fn likeness(given: &str, known: &str) -> f64 {
    strsim::jaro_winkler(&given.to_ascii_lowercase(), known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_directives_are_taken() {
        for level in [
            "warn",
            "INFO",
            "Off",
            "info,outbox_relay::source=debug",
            "outbox_relay::source",
            "warn, librdkafka=error",
        ] {
            assert_eq!(check(level), Ok(()), "{level}");
        }
    }

    #[test]
    fn other_words_are_refused_with_the_nearest_level() {
        for (level, nearest) in [
            ("warning", "\"warn\""),
            ("infoo", "\"info\""),
            ("info,outbox_relay::source=debgu", "\"debug\""),
        ] {
            let why = check(level).unwrap_err();
            assert!(why.ends_with(&format!("did you mean {nearest}?")), "{why}");
        }
        for level in ["verbose", "", "notice"] {
            assert!(check(level).is_err(), "{level}");
        }
    }
}
