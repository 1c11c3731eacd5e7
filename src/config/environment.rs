//! The environment as a layer of the configuration.

use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};

/// The name of this layer in errors.
pub(super) const ENVIRONMENT: &str = "environment";

/// The variables `RELAY_…__…`. A value is taken as text where the file has text or nothing, so that a password of
/// digits stays a password, and is read as TOML would read it elsewhere.
pub(super) struct Environment(Vec<(String, Value)>);

impl Environment {
    pub(super) fn new(defaults: &Figment, env: impl IntoIterator<Item = (String, String)>) -> Self {
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
        Self(
            env.into_iter()
                .filter_map(|(name, text)| {
                    let path = name.strip_prefix("RELAY_")?;
                    // Every setting is in a table; a name without a table belongs to somebody else.
                    path.contains("__").then(|| {
                        let key = path.to_ascii_lowercase().replace("__", ".");
                        let value = value(&key, text);
                        (key, value)
                    })
                })
                .collect(),
        )
    }
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
