//! The environment as a layer of the configuration.

use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};

use super::error::ConfigError;

/// The name of this layer in errors.
pub(super) const ENVIRONMENT: &str = "environment";

/// The variables `RELAY_…__…`. A value is taken as text where the file has text or nothing, so that a password of
/// digits stays a password, and is read as TOML would read it elsewhere.
pub(super) struct Environment(Vec<(String, Value)>);

impl Environment {
    /// How many settings come from variables.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// `shipped` is the text of the shipped file, whose comments name the settings that have no default.
    ///
    /// # Errors
    /// When a variable has one underscore where two would make it the name of a setting.
    pub(super) fn new(
        defaults: &Figment,
        shipped: &str,
        env: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ConfigError> {
        // Compose files and charts make an empty value of one that is not set.
        let env: Vec<(String, String)> = env
            .into_iter()
            .filter(|(_, text)| !text.is_empty())
            .collect();
        let names = variables(shipped);
        for (name, _) in &env {
            let Some(path) = name
                .strip_prefix("RELAY_")
                .filter(|path| !path.contains("__"))
            else {
                continue;
            };
            if let Some(meant) = names.iter().find(|known| known.replace("__", "_") == path) {
                return Err(ConfigError::new(format!(
                    "RELAY_{path}: no such setting; did you mean RELAY_{meant} (two underscores)?"
                )));
            }
        }
        // The settings of one pipeline have the types of those for all.
        let like = |key: &str| match key
            .strip_prefix("pipelines.")
            .and_then(|key| key.split_once('.'))
        {
            Some((_, setting)) => format!("pipeline.{setting}"),
            None => key.to_owned(),
        };
        let value = |key: &str, text: String| match defaults.find_value(&like(key)) {
            Ok(Value::String(..)) | Err(_) => Value::from(text),
            Ok(_) => text.parse().unwrap_or_else(|never| match never {}),
        };
        Ok(Self(
            env.into_iter()
                .filter_map(|(name, text)| {
                    let path = name.strip_prefix("RELAY_")?;
                    // Every setting is in a table; a name without a table is another program's.
                    path.contains("__").then(|| {
                        let key = path.to_ascii_lowercase().replace("__", ".");
                        let value = value(&key, text);
                        (key, value)
                    })
                })
                .collect(),
        ))
    }
}

/// The names of the settings in the shipped file, those in comments too, as variables without `RELAY_`.
fn variables(shipped: &str) -> Vec<String> {
    let mut table = String::new();
    let mut names = Vec::new();
    for line in shipped.lines() {
        let line = line.strip_prefix("# ").unwrap_or(line);
        if let Some(name) = line
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
        {
            name.clone_into(&mut table);
        } else if let Some((key, _)) = line.split_once(" = ")
            && key
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte == b'_')
        {
            names.push(
                format!("{table}.{key}")
                    .to_ascii_uppercase()
                    .replace('.', "__"),
            );
        }
    }
    names
}

impl Provider for Environment {
    fn metadata(&self) -> Metadata {
        Metadata::named(ENVIRONMENT)
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        let mut settings = Dict::new();
        for (key, value) in &self.0 {
            if let Some(dict) = figment::util::nest(key, value.clone()).into_dict() {
                lay_over(&mut settings, dict);
            }
        }
        Ok(Profile::Default.collect(settings))
    }
}

fn lay_over(settings: &mut Dict, upper: Dict) {
    for (key, value) in upper {
        match (settings.get_mut(&key), value) {
            (Some(Value::Dict(_, below)), Value::Dict(_, above)) => lay_over(below, above),
            (_, value) => {
                settings.insert(key, value);
            }
        }
    }
}
