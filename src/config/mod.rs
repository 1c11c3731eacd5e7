//! Reads the configuration: the shipped `relay.toml`, then a file, then the environment.
//!
//! Parses, does not validate afterwards: a [`Config`] that exists can be run. Knows no database and no broker.

mod database_url;
mod environment;
mod error;
mod level;
mod pipeline;
mod retention;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use figment::providers::{Format, Toml};
use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use sqlx::postgres::PgConnectOptions;

use self::environment::Environment;
pub use self::error::ConfigError;
use self::pipeline::{RawPipeline, resolve_pipelines};
use self::retention::RawRetention;
pub use crate::encode::Format as RecordFormat;
use crate::event::Start;
use crate::relay::Pipeline;
pub use crate::relay::Policy;
use crate::sink::kafka;
pub use crate::sink::kafka::Delivery;
use crate::source::PageLimits;
use crate::source::postgres::CaptureMode;

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

/// The HTTP interface.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Admin {
    /// Whether there is one.
    pub enabled: bool,
    /// Where it listens.
    pub listen: SocketAddr,
    /// Names besides `localhost` and IP addresses by which it may be asked.
    pub hosts: Vec<String>,
    /// What whoever changes something or sees entities has to know; without it nothing of that is possible there.
    pub token: Option<SecretString>,
    token_file: Option<PathBuf>,
}

impl Admin {
    fn resolve(mut self) -> Result<Self, ConfigError> {
        const CHARACTERS_MIN: usize = 16;
        if let Some(file) = self.token_file.take() {
            if self.token.is_some() {
                return Err(ConfigError::new(
                    "admin.token and admin.token_file are both set",
                ));
            }
            self.token = Some(read_secret("admin.token_file", &file)?);
        }
        let short = |token: &SecretString| token.expose_secret().len() < CHARACTERS_MIN;
        if self.token.as_ref().is_some_and(short) {
            return Err(ConfigError::new(format!(
                "admin.token is too easy to guess: it has to have at least {CHARACTERS_MIN} characters"
            )));
        }
        Ok(self)
    }
}

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
    admin: Admin,
    log: Log,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum SourceKind {
    Postgres,
    Sqlite,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSource {
    kind: SourceKind,
    postgres: RawPostgres,
    sqlite: RawSqlite,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPostgres {
    url: Option<SecretString>,
    url_file: Option<PathBuf>,
    direct_url: Option<SecretString>,
    capture: CaptureMode,
    #[serde(with = "humantime_serde")]
    poll_interval: Duration,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSqlite {
    path: Option<PathBuf>,
    #[serde(with = "humantime_serde")]
    poll_interval: Duration,
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
        let environment = Environment::new(&figment, DEFAULTS, env)?;
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
        let pipelines = resolve_pipelines(&figment, pipelines.into_keys().collect())?;
        let source = source.resolve()?;
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
            sink: sink.resolve()?,
            relay: relay.resolve()?,
            retention: retention.resolve(&pipelines)?,
            pipelines,
            admin: admin.resolve()?,
            log,
            given: Given(flat(&figment)),
        })
    }
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

impl RawSource {
    fn resolve(self) -> Result<Source, ConfigError> {
        match self.kind {
            SourceKind::Postgres => self.postgres.resolve(),
            SourceKind::Sqlite => {
                let RawSqlite {
                    path,
                    poll_interval,
                } = self.sqlite;
                let path = path.ok_or_else(|| {
                    ConfigError::new(
                        "source.sqlite.path is missing: the file that holds the outbox",
                    )
                })?;
                Ok(Source::Sqlite {
                    path,
                    poll_interval,
                })
            }
        }
    }
}

impl RawPostgres {
    fn resolve(self) -> Result<Source, ConfigError> {
        let Self {
            url,
            url_file,
            direct_url,
            capture,
            poll_interval,
        } = self;
        let url = match (url, url_file) {
            (Some(url), None) => url,
            (None, Some(file)) => read_secret("source.postgres.url_file", &file)?,
            (Some(_), Some(_)) => {
                return Err(ConfigError::new(
                    "source.postgres.url and source.postgres.url_file are both set",
                ));
            }
            (None, None) => {
                return Err(ConfigError::new(
                    "source.postgres.url is missing: set it in the file, in RELAY_SOURCE__POSTGRES__URL, or name a \
                     file with source.postgres.url_file",
                ));
            }
        };
        let options = postgres_options("source.postgres.url", &url)?;
        let direct_options = match &direct_url {
            Some(direct) => postgres_options("source.postgres.direct_url", direct)?,
            None => options.clone(),
        };
        Ok(Source::Postgres(Box::new(
            crate::source::postgres::Settings {
                options,
                direct_options,
                mode: capture,
                poll_interval,
            },
        )))
    }
}

/// What the relay's connections have in common.
///
/// # Errors
/// When the text is no PostgreSQL URL; the error does not repeat it, for it may hold a password.
pub fn postgres_options(key: &str, url: &SecretString) -> Result<PgConnectOptions, ConfigError> {
    database_url::check(url.expose_secret())
        .map_err(|why| ConfigError::new(format!("{key} {why}")))?;
    let options = PgConnectOptions::from_str(url.expose_secret()).map_err(|_| {
        ConfigError::new(format!(
            "{key} is not a URL such as postgres://user:password@host:5432/database"
        ))
    })?;
    // Poolers refuse start-up parameters that they do not know.
    Ok(options
        .extra_float_digits(None)
        .application_name("outbox-relay"))
}

impl RawSink {
    fn resolve(self) -> Result<Sink, ConfigError> {
        match self.kind {
            SinkKind::Stdout => Ok(Sink::Stdout),
            SinkKind::Kafka => {
                let mut kafka = self.kafka;
                if let Some(file) = kafka.sasl.password_file.take() {
                    if kafka.sasl.password.is_some() {
                        return Err(ConfigError::new(
                            "sink.kafka.sasl.password and password_file are both set",
                        ));
                    }
                    kafka.sasl.password =
                        Some(read_secret("sink.kafka.sasl.password_file", &file)?);
                }
                kafka.check_delivery().map_err(ConfigError::new)?;
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

fn bytes(size: ByteSize) -> usize {
    usize::try_from(size.as_u64()).unwrap_or(usize::MAX)
}

fn read_secret(key: &str, path: &Path) -> Result<SecretString, ConfigError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text.trim_end_matches(['\r', '\n']).to_owned().into()),
        Err(error) => Err(ConfigError::new(format!(
            "{key} = {:?}: {error}",
            path.display().to_string()
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
