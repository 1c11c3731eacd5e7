//! The environment as a layer of the configuration.

use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};

use super::error::ConfigError;

/// The name of this layer in errors.
pub(super) const ENVIRONMENT: &str = "environment";

/// The variables `RELAY_…__…`. A value is taken as text where the file has text or nothing, so that a password of
/// digits stays a password, and is read as TOML would read it elsewhere.
pub(super) struct Environment(Vec<(Vec<String>, Value)>);

/// What stands behind `RELAY_` in variables that are no settings: of the program itself, of its tests, and of Kubernetes, which
/// sets such for a service that is called "relay".
fn is_another(path: &str) -> bool {
    path == "CONFIG"
        || path == "CRASH_AT"
        || path == "PORT"
        || ["TEST_", "SIM_", "SOAK_", "PORT_", "SERVICE_"]
            .iter()
            .any(|prefix| path.starts_with(prefix))
}

/// Tables whose keys have dots themselves.
const DOTTED: [&[&str]; 2] = [
    &["sink", "kafka", "properties"],
    &["sink", "kafka", "topics", "config"],
];

/// The key as it is nested: everything behind a table of keys with dots is one.
fn segments(path: &str) -> Vec<String> {
    let path = path.to_ascii_lowercase();
    let mut segments: Vec<String> = path.split("__").map(str::to_owned).collect();
    let table = DOTTED.iter().find(|table| {
        segments.len() > table.len() && segments.iter().zip(**table).all(|(a, b)| a == b)
    });
    if let Some(table) = table {
        let key = segments.split_off(table.len()).join("_");
        // No topic setting has an underscore, and no variable of a shell has a dot. Some properties have underscores.
        let key = if table.contains(&"config") {
            key.replace('_', ".")
        } else {
            key
        };
        segments.push(key);
    }
    segments
}

impl Environment {
    /// How many settings come from variables.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// `shipped` is the text of the shipped file, whose comments name the settings that have no default.
    ///
    /// # Errors
    /// When a variable is no setting; one underscore where two would make it one is the usual mistake.
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
            if !is_another(path) {
                return Err(unknown(path, &names));
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
            // Of one or several names, as other programs take them.
            Ok(Value::Array(..)) if !text.trim_start().starts_with('[') => {
                let names = text.split(',').map(str::trim);
                names
                    .filter(|name| !name.is_empty())
                    .collect::<Vec<_>>()
                    .into()
            }
            Ok(_) => text.parse().unwrap_or_else(|never| match never {}),
        };
        Ok(Self(
            env.into_iter()
                .filter_map(|(name, text)| {
                    let path = name.strip_prefix("RELAY_")?;
                    // Every setting is in a table; a name without a table is another program's.
                    path.contains("__").then(|| {
                        let segments = segments(path);
                        let value = value(&segments.join("."), text);
                        (segments, value)
                    })
                })
                .collect(),
        ))
    }
}

fn unknown(path: &str, names: &[String]) -> ConfigError {
    let likeness = |known: &str| strsim::jaro_winkler(path, &known.replace("__", "_"));
    // The tables in front are what people leave out.
    let end = format!("_{path}");
    let ends_alike = names
        .iter()
        .find(|known| known.replace("__", "_").ends_with(&end));
    let nearest = ends_alike.or_else(|| {
        names
            .iter()
            .max_by(|a, b| likeness(a).total_cmp(&likeness(b)))
            .filter(|known| likeness(known) > 0.8)
    });
    ConfigError::new(match nearest {
        Some(nearest) => {
            format!("RELAY_{path}: no such setting; did you mean RELAY_{nearest}?")
        }
        None => format!(
            "RELAY_{path}: no such setting; a variable is named after the path of a key, as RELAY_SINK__KAFKA__BROKERS"
        ),
    })
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
        for (segments, value) in &self.0 {
            let nested = segments.iter().rev().fold(value.clone(), |inner, key| {
                Value::from(Dict::from([(key.clone(), inner)]))
            });
            if let Some(dict) = nested.into_dict() {
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
