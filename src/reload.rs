//! Takes a changed configuration over while the relay runs, as far as that can be done without losing its place.
//!
//! Filters, the rate of redrives and the log level change at once; what files with secrets say counts for each new connection,
//! with or without a reload. Everything else waits for a restart, and that is said, key by key.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use figment::value::Value;
use tokio::sync::watch;

use crate::config::{CONTENT, Config};
use crate::event::PipelineName;
use crate::logging::SetLevel;
use crate::relay::Changes;

/// What a running relay can take over.
pub struct Reload {
    /// The settings that are in force, by key.
    running: BTreeMap<String, Value>,
    pipelines: HashMap<PipelineName, watch::Sender<Option<Arc<Changes>>>>,
    set_log_level: SetLevel,
}

/// What became of a changed configuration.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Reloaded {
    /// Keys whose new values are in force.
    pub applied: Vec<String>,
    /// Keys whose new values need a restart.
    pub refused: Vec<String>,
}

impl Reload {
    /// For a relay that runs with this configuration.
    #[must_use]
    pub fn new(config: &Config, set_log_level: SetLevel) -> Self {
        let pipelines = config
            .pipelines
            .iter()
            .map(|p| (p.pipeline.name.clone(), watch::Sender::new(None)))
            .collect();
        Self {
            running: config.given.0.clone(),
            pipelines,
            set_log_level,
        }
    }

    /// Where a pipeline hears of changes.
    #[must_use]
    pub(crate) fn changes(&self, pipeline: &PipelineName) -> watch::Receiver<Option<Arc<Changes>>> {
        self.pipelines
            .get(pipeline)
            .map_or_else(|| watch::channel(None).1, watch::Sender::subscribe)
    }

    /// Puts what can be changed into force.
    ///
    /// # Errors
    /// When the log level is none; nothing has changed then.
    pub fn apply(&mut self, new: &Config) -> Result<Reloaded, anyhow::Error> {
        let mut reloaded = Reloaded::default();
        for key in changed_keys(&self.running, &new.given.0) {
            if !self.can_change(&key) {
                reloaded.refused.push(key);
                continue;
            }
            if key == LOG_LEVEL {
                (self.set_log_level)(&new.log.level)?;
            }
            match new.given.0.get(&key) {
                Some(value) => self.running.insert(key.clone(), value.clone()),
                None => self.running.remove(&key),
            };
            reloaded.applied.push(key);
        }
        if reloaded.applied.iter().any(|key| key != LOG_LEVEL) {
            for pipeline in &new.pipelines {
                if let Some(changes) = self.pipelines.get(&pipeline.pipeline.name) {
                    changes.send_replace(Some(Arc::new(Changes {
                        filter: pipeline.pipeline.filter.clone(),
                        redrive_rate: new.relay.redrive_rate,
                    })));
                }
            }
        }
        Ok(reloaded)
    }

    fn can_change(&self, key: &str) -> bool {
        let of_known_pipeline = |key: &str| {
            self.pipelines.keys().any(|name| {
                key.strip_prefix(name.as_str())
                    .is_some_and(|rest| rest.starts_with(".filter."))
            })
        };
        // Connections that are made from now on use it, whatever is done here.
        key.ends_with(CONTENT)
            || key == LOG_LEVEL
            || key == REDRIVE_RATE
            || key.starts_with("pipeline.filter.")
            || key
                .strip_prefix("pipelines.")
                .is_some_and(of_known_pipeline)
    }
}

const LOG_LEVEL: &str = "log.level";
const REDRIVE_RATE: &str = "relay.redrive_rate";

fn changed_keys(old: &BTreeMap<String, Value>, new: &BTreeMap<String, Value>) -> Vec<String> {
    let mut keys: Vec<&String> = old.keys().chain(new.keys()).collect();
    keys.sort_unstable();
    keys.dedup();
    keys.into_iter()
        .filter(|key| old.get(*key) != new.get(*key))
        .cloned()
        .collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Mutex;

    use super::*;

    fn config(toml: &str) -> Config {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(toml.as_bytes()).unwrap();
        let url = "postgres://relay@db/app".to_owned();
        let env = [("RELAY_SOURCE__POSTGRES__URL".to_owned(), url)];
        Config::load(Some(file.path()), env).unwrap()
    }

    #[test]
    fn filters_and_the_log_level_change_and_the_rest_needs_a_restart() {
        let levels = Arc::new(Mutex::new(Vec::new()));
        let heard = levels.clone();
        let mut reload = Reload::new(
            &config("[pipelines.a]\n[pipelines.b]"),
            Box::new(move |level| {
                heard.lock().unwrap().push(level.to_owned());
                Ok(())
            }),
        );
        let [a, b] = ["a", "b"].map(|name| reload.changes(&name.parse().unwrap()));
        let new = config(
            "[log]\nlevel = \"debug\"\nformat = \"json\"\n\
             [relay]\nredrive_rate = 7\n\
             [pipelines.a.filter]\naggregate_types = [\"order\"]\n\
             [pipelines.b]\ntopic = \"other\"\n\
             [pipelines.c.filter]\naggregate_types = [\"order\"]",
        );
        let expected = Reloaded {
            applied: [
                "log.level",
                "pipelines.a.filter.aggregate_types",
                "relay.redrive_rate",
            ]
            .map(str::to_owned)
            .into(),
            refused: [
                "log.format",
                "pipelines.b.topic",
                "pipelines.c.filter.aggregate_types",
            ]
            .map(str::to_owned)
            .into(),
        };
        assert_eq!(reload.apply(&new).unwrap(), expected);
        assert_eq!(*levels.lock().unwrap(), ["debug"]);
        let types = |seen: &watch::Receiver<Option<Arc<Changes>>>| {
            let seen = seen.borrow();
            let Changes {
                filter,
                redrive_rate,
            } = &**seen.as_ref().unwrap();
            assert_eq!(*redrive_rate, 7);
            filter.aggregate_types.clone()
        };
        assert_eq!(types(&a), ["order"]);
        assert_eq!(types(&b), [""; 0]);
        // What is in force is not applied again; what needs a restart still does.
        let again = Reloaded {
            applied: Vec::new(),
            ..expected
        };
        assert_eq!(reload.apply(&new).unwrap(), again);
    }

    #[test]
    fn what_all_pipelines_share_reaches_those_that_say_nothing() {
        let mut reload = Reload::new(
            &config("[pipelines.a]\n[pipelines.b.filter]\naggregate_types = [\"b\"]"),
            Box::new(|_| Ok(())),
        );
        let [a, b] = ["a", "b"].map(|name| reload.changes(&name.parse().unwrap()));
        let new = config(
            "[pipeline.filter]\naggregate_types = [\"all\"]\n[pipelines.a]\n\
             [pipelines.b.filter]\naggregate_types = [\"b\"]",
        );
        reload.apply(&new).unwrap();
        let types = |seen: &watch::Receiver<Option<Arc<Changes>>>| {
            seen.borrow()
                .as_ref()
                .unwrap()
                .filter
                .aggregate_types
                .clone()
        };
        assert_eq!(types(&a), ["all"]);
        assert_eq!(types(&b), ["b"]);
    }
}
