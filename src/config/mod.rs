//! Reads the configuration: the shipped `relay.toml`, then a file, then the environment.
//!
//! Parses, does not validate afterwards: a [`Config`] that exists can be run. Knows no database and no broker.

mod admin;
mod database_url;
mod environment;
mod error;
mod level;
mod notes;
mod pipeline;
mod retention;
mod source;

use std::collections::BTreeMap;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use figment::providers::{Format, Toml};
use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};
use secrecy::SecretString;
use serde::Deserialize;

use self::admin::RawAdmin;
pub use self::admin::{Admin, Token};
use self::environment::Environment;
pub use self::error::ConfigError;
use self::error::place;
pub(crate) use self::notes::{InForce, postgres_security, postgres_weakness};
use self::pipeline::{RawPipeline, resolve_pipelines};
use self::retention::RawRetention;
use self::source::RawSource;
pub use self::source::postgres_options;
pub use crate::encode::Format as RecordFormat;
use crate::event::Start;
use crate::relay::Pipeline;
pub use crate::relay::Policy;
use crate::sink::kafka;
pub use crate::sink::kafka::Delivery;
use crate::source::PageLimits;

/// The shipped file: the lowest layer, and the reference documentation.
pub const DEFAULTS: &str = include_str!("../../relay.toml");

/// Everything that can be set.
#[derive(Debug)]
pub struct Config {
    /// Where events come from.
    pub source: Source,
    /// Where they go.
    pub sink: Sink,
    /// At least one.
    pub pipelines: Vec<PipelineConfig>,
    /// Bounds and times.
    pub relay: RelayConfig,
    /// How long events are kept.
    pub retention: crate::retention::Settings,
    /// The HTTP interface.
    pub admin: Admin,
    /// Logging.
    pub log: Log,
    /// What was given, for telling what changed.
    pub(crate) given: Given,
    /// Every setting with its origin.
    pub(crate) in_force: Vec<InForce>,
    /// How many variables of the environment set something.
    pub(crate) variables: usize,
    /// What flows in from variables that are not the relay's, as notes.
    from_elsewhere: Vec<String>,
}

/// Every setting by its key with dots, as in `sink.kafka.brokers`.
#[derive(Clone)]
pub(crate) struct Given(pub(crate) BTreeMap<String, Value>);

impl fmt::Debug for Given {
    // Secrets are among them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Given(…)")
    }
}

/// Where events come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// PostgreSQL.
    Postgres(Box<crate::source::postgres::Settings>),
    /// A SQLite file.
    Sqlite {
        /// The file.
        path: PathBuf,
        /// The longest time without a look at an idle log.
        poll_interval: Duration,
    },
}

/// Where events go.
#[derive(Clone, Debug)]
pub enum Sink {
    /// Kafka.
    Kafka(Box<kafka::Settings>),
    /// The standard output.
    Stdout,
}

/// One pipeline.
#[derive(Clone, Debug)]
pub struct PipelineConfig {
    /// Its rules.
    pub pipeline: Pipeline,
    /// Where it begins.
    pub start: Start,
    /// How many shards its entities are spread over, at least 1.
    pub shards: u32,
}

/// Bounds and times; see the comments in `relay.toml`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRelay {
    page_events: usize,
    page_bytes: ByteSize,
    in_flight_events: usize,
    in_flight_bytes: ByteSize,
    #[serde(with = "humantime_serde")]
    lease_ttl: Duration,
    #[serde(with = "humantime_serde")]
    acknowledge_interval: Duration,
    #[serde(with = "humantime_serde")]
    drain_timeout: Duration,
    redrive_rate: usize,
}

/// The bounds of each pipeline.
pub type RelayConfig = crate::relay::Settings;

/// Logging.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    /// Directives of `tracing_subscriber::EnvFilter`.
    #[serde(deserialize_with = "level::deserialize")]
    pub level: String,
    /// Text for people or JSON for machines.
    pub format: LogFormat,
}

/// What a line of the log looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object a line.
    Json,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    source: RawSource,
    sink: RawSink,
    /// Extracted key by key, over `pipeline`.
    #[serde(default)]
    pipelines: BTreeMap<String, Dict>,
    #[serde(rename = "pipeline")]
    _pipeline: RawPipeline,
    relay: RawRelay,
    retention: RawRetention,
    admin: RawAdmin,
    log: Log,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum SinkKind {
    Kafka,
    Stdout,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSink {
    kind: SinkKind,
    kafka: kafka::Settings,
}

impl Config {
    /// Tries out what only the machine that runs the relay can tell: whether the files of the Kafka client are there, and
    /// whether it can be made. Connects to nothing.
    ///
    /// # Errors
    /// [`ConfigError`] with the reason.
    pub fn try_out(&self) -> Result<(), ConfigError> {
        match &self.sink {
            Sink::Kafka(settings) => settings.try_out().map_err(ConfigError::new),
            Sink::Stdout => Ok(()),
        }
    }

    /// Reads the configuration. `env` is the environment as data: pairs of name and value.
    ///
    /// # Errors
    /// [`ConfigError`], one line that names file, key, value and reason.
    pub fn load(
        path: Option<&Path>,
        env: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ConfigError> {
        let mut figment = Figment::from(Named("built-in relay.toml", Toml::string(DEFAULTS)));
        if let Some(path) = path {
            if !path.is_file() {
                return Err(ConfigError::new(format!(
                    "{}: no such file",
                    path.display()
                )));
            }
            figment = figment.merge(Toml::file_exact(path));
        }
        let env: Vec<(String, String)> = env.into_iter().collect();
        let environment = Environment::new(&figment, DEFAULTS, env.iter().cloned())?;
        let variables = environment.len();
        let figment = figment.merge(environment);
        let raw: Raw = figment
            .extract()
            .map_err(|error| ConfigError::from_figment(&error, "", &figment))?;
        let Raw {
            source,
            sink,
            pipelines,
            _pipeline,
            relay,
            retention,
            admin,
            log,
        } = raw;
        let given = with_contents(flat(&figment));
        let pipelines = resolve_pipelines(&figment, pipelines.into_keys().collect())?;
        let (source, from_elsewhere) = source.resolve(&figment, &env)?;
        if let Source::Sqlite { .. } = source
            && let Some(pipeline) = pipelines.iter().find(|pipeline| pipeline.shards > 1)
        {
            return Err(ConfigError::new(format!(
                "pipelines.{}.shards = {}: a SQLite outbox has one writer and one relay; shards are for PostgreSQL",
                pipeline.pipeline.name, pipeline.shards
            )));
        }
        Ok(Self {
            source,
            sink: sink.resolve(&figment)?,
            relay: relay.resolve()?,
            retention: retention.resolve(&pipelines)?,
            pipelines,
            admin: admin.resolve()?,
            log,
            in_force: notes::in_force(&figment, &given),
            given: Given(given),
            variables,
            from_elsewhere,
        })
    }
}

/// What a key of a file with a secret is followed by, where its content is meant.
pub(crate) const CONTENT: &str = " (its content)";

/// With a hash of what the files with secrets say, so that a change of one of them is told.
fn with_contents(mut settings: BTreeMap<String, Value>) -> BTreeMap<String, Value> {
    for key in [
        "source.postgres.url_file",
        "source.postgres.direct_url_file",
        "sink.kafka.sasl.password_file",
        "sink.kafka.tls.ca_file",
        "sink.kafka.tls.certificate_file",
        "sink.kafka.tls.key_file",
        "admin.token_file",
    ] {
        let content = settings
            .get(key)
            .and_then(Value::as_str)
            .and_then(|path| std::fs::read(path).ok());
        if let Some(content) = content {
            let mut hasher = DefaultHasher::new();
            content.hash(&mut hasher);
            settings.insert(format!("{key}{CONTENT}"), hasher.finish().into());
        }
    }
    settings
}

fn flat(figment: &Figment) -> BTreeMap<String, Value> {
    fn add(path: &str, dict: Dict, into: &mut BTreeMap<String, Value>) {
        for (key, value) in dict {
            let path = format!("{path}{key}");
            match value {
                Value::Dict(_, inner) => add(&format!("{path}."), inner, into),
                value => {
                    into.insert(path, value);
                }
            }
        }
    }
    let mut settings = BTreeMap::new();
    // It was extracted as a whole before, so it can be now.
    if let Ok(dict) = figment.extract::<Dict>() {
        add("", dict, &mut settings);
    }
    settings
}

impl RawSink {
    fn resolve(self, figment: &Figment) -> Result<Sink, ConfigError> {
        match self.kind {
            SinkKind::Stdout => Ok(Sink::Stdout),
            SinkKind::Kafka => {
                let mut kafka = self.kafka;
                // The name of the file stays: it is read again for each client.
                if let Some(file) = &kafka.sasl.password_file {
                    if kafka.sasl.password.is_some() {
                        let key = "sink.kafka.sasl.password";
                        return Err(both_set(key, "sink.kafka.sasl.password_file", figment));
                    }
                    kafka.sasl.password = Some(read_secret("sink.kafka.sasl.password_file", file)?);
                }
                kafka.check().map_err(ConfigError::new)?;
                Ok(Sink::Kafka(Box::new(kafka)))
            }
        }
    }
}

impl RawRelay {
    fn resolve(self) -> Result<RelayConfig, ConfigError> {
        let Self {
            page_events,
            page_bytes,
            in_flight_events,
            in_flight_bytes,
            lease_ttl,
            acknowledge_interval,
            drain_timeout,
            redrive_rate,
        } = self;
        for (key, value) in [
            ("page_events", page_events),
            ("in_flight_events", in_flight_events),
            ("redrive_rate", redrive_rate),
        ] {
            if value == 0 {
                return Err(ConfigError::new(format!(
                    "relay.{key} = 0: has to be at least 1"
                )));
            }
        }
        if lease_ttl < Duration::from_secs(1) {
            return Err(ConfigError::new(format!(
                "relay.lease_ttl = {}: has to be at least 1s",
                humantime::format_duration(lease_ttl)
            )));
        }
        Ok(RelayConfig {
            page: PageLimits {
                rows: page_events,
                bytes: bytes(page_bytes),
            },
            in_flight_rows: in_flight_events,
            in_flight_bytes: bytes(in_flight_bytes),
            lease_ttl,
            drain_timeout,
            acknowledge_interval,
            redrive_rate,
        })
    }
}

/// With the places, for of a variable and a file the reader sees one only.
fn both_set(key: &str, other: &str, figment: &Figment) -> ConfigError {
    let place = |key: &str| match place(figment, key) {
        Some(place) => format!("{key} ({place})"),
        None => key.to_owned(),
    };
    ConfigError::new(format!(
        "{} and {} are both set: take one of them away",
        place(key),
        place(other)
    ))
}

fn bytes(size: ByteSize) -> usize {
    usize::try_from(size.as_u64()).unwrap_or(usize::MAX)
}

/// The name of a file with a secret; what does not look like one may be the secret itself, put into the wrong setting.
fn shown_path(path: &Path) -> String {
    let text = path.display().to_string();
    if text.starts_with('/') || text.starts_with("./") || text.starts_with("../") {
        format!("{text:?}")
    } else {
        "(not shown, for it does not begin with \"/\" or \"./\")".to_owned()
    }
}

fn read_secret(key: &str, path: &Path) -> Result<SecretString, ConfigError> {
    match std::fs::read_to_string(path) {
        Ok(text) => match text.trim_end_matches(['\r', '\n']) {
            "" => Err(ConfigError::new(format!(
                "{key} = {}: the file is empty",
                shown_path(path)
            ))),
            text => Ok(text.to_owned().into()),
        },
        Err(error) => Err(ConfigError::new(format!(
            "{key} = {}: {error}",
            shown_path(path)
        ))),
    }
}

/// Gives a layer the name that errors show.
struct Named<P>(&'static str, P);

impl<P: Provider> Provider for Named<P> {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.0)
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        self.1.data()
    }
}

#[cfg(test)]
mod tests;
