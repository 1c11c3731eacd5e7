//! What a person has to know about a configuration that is right: how safe the connections are, what flows in from elsewhere,
//! and which pipelines overlap.

use std::collections::BTreeMap;
use std::net::IpAddr;

use figment::Figment;
use figment::value::Value;
use sqlx::postgres::{PgConnectOptions, PgSslMode};

use super::error::{is_secret, place};
use super::{CONTENT, Config, PipelineConfig, Sink, Source};

/// One setting that is in force.
#[derive(Clone, Debug)]
pub(crate) struct InForce {
    pub(crate) key: String,
    /// As TOML or JSON have it; secrets are not shown.
    pub(crate) value: String,
    /// File, variable or built-in default.
    pub(crate) origin: String,
}

/// The way to a PostgreSQL server in a few words. As the client does it: `require` and `prefer` verify nothing.
pub(crate) fn postgres_security(options: &PgConnectOptions) -> &'static str {
    if options.get_socket().is_some() {
        return "by a socket of this machine";
    }
    match options.get_ssl_mode() {
        PgSslMode::Disable | PgSslMode::Allow => "not encrypted",
        PgSslMode::Prefer => "TLS if the server offers it, server not verified",
        PgSslMode::Require => "TLS, server not verified",
        PgSslMode::VerifyCa => "TLS, server verified except for its name",
        PgSslMode::VerifyFull => "TLS, server verified",
    }
}

/// What is weak about it; nothing is where no other machine is on the way.
pub(crate) fn postgres_weakness(options: &PgConnectOptions) -> Option<&'static str> {
    let host = options.get_host();
    let loopback = |address: IpAddr| address.is_loopback();
    let here = options.get_socket().is_some()
        || host == "localhost"
        || host.trim_matches(['[', ']']).parse().is_ok_and(loopback);
    if here {
        return None;
    }
    match options.get_ssl_mode() {
        PgSslMode::Disable | PgSslMode::Allow => Some(
            "nothing is encrypted on the way to PostgreSQL: write sslmode=verify-full into the URL",
        ),
        PgSslMode::Prefer => Some(
            "the connection to PostgreSQL falls back to plain text without a word where the server offers no TLS, and the \
             server is not verified (sslmode=prefer, the default): write sslmode=verify-full into the URL",
        ),
        PgSslMode::Require => Some(
            "the connection to PostgreSQL is encrypted, but another server can take its place, for its certificate is not \
             verified (sslmode=require): write sslmode=verify-full into the URL",
        ),
        PgSslMode::VerifyCa | PgSslMode::VerifyFull => None,
    }
}

impl Config {
    /// What is weak about the connections, although it is allowed: for the beginning of the log as well.
    #[must_use]
    pub fn weaknesses(&self) -> Vec<String> {
        let mut weaknesses = Vec::new();
        if let Source::Postgres(settings) = &self.source {
            let ends = [&settings.connector, &settings.direct_connector];
            let mut found = ends.map(|end| postgres_weakness(end.known())).into_iter();
            weaknesses.extend(found.find_map(|weakness| weakness).map(str::to_owned));
        }
        if let Sink::Kafka(settings) = &self.sink {
            weaknesses.extend(settings.weaknesses());
        }
        weaknesses
    }

    /// Everything else that a person may not expect.
    pub(crate) fn notes(&self) -> Vec<String> {
        let mut notes = self.from_elsewhere.clone();
        for (at, one) in self.pipelines.iter().enumerate() {
            let others = &self.pipelines[at + 1..];
            notes.extend(others.iter().filter_map(|other| overlap(one, other)));
        }
        notes.extend(self.pipelines.iter().filter_map(shared_keys));
        notes
    }
}

/// Two entities of different types with the same id have the same key in a topic for both.
fn shared_keys(config: &PipelineConfig) -> Option<String> {
    let pipeline = &config.pipeline;
    let (topic, key) = (&pipeline.route.topic, &pipeline.route.key);
    let shares = !topic.names_the_type()
        && !key.names_the_type()
        && pipeline.filter.aggregate_types.len() != 1;
    shares.then(|| {
        format!(
            "pipeline {} writes several aggregate types to topic {topic} with key {key}: entities of different types with \
             the same id have the same key, and with cleanup.policy=compact one deletes the other; \
             key = \"{{aggregate_type}}/{key}\" tells them apart",
            pipeline.name
        )
    })
}

fn overlap(one: &PipelineConfig, other: &PipelineConfig) -> Option<String> {
    let (one, other) = (&one.pipeline, &other.pipeline);
    let both = one.route.topic == other.route.topic && one.filter.overlaps(&other.filter);
    both.then(|| {
        format!(
            "the pipelines {} and {} write to the same topic ({}), and some events match the filters of both: those are \
             published twice",
            one.name, other.name, one.route.topic
        )
    })
}

/// Every setting by its key, with its value and where that was written.
pub(super) fn in_force(figment: &Figment, given: &BTreeMap<String, Value>) -> Vec<InForce> {
    given
        .iter()
        .filter(|(key, _)| !key.ends_with(CONTENT))
        .map(|(key, value)| InForce {
            key: key.clone(),
            value: if is_hidden(key, value) {
                "(not shown)".to_owned()
            } else {
                serde_json::to_string(value).unwrap_or_default()
            },
            origin: place(figment, key).unwrap_or_default(),
        })
        .collect()
}

fn is_hidden(key: &str, value: &Value) -> bool {
    match key.strip_prefix("sink.kafka.properties.") {
        // Settings of OAUTHBEARER are one text.
        Some(name) => ["password", "secret", "passphrase", "pem", "config"]
            .iter()
            .any(|part| name.contains(part)),
        // The name of a file is none, unless the secret stands in its place.
        None if key.ends_with("_file") => {
            let begins = |text: &str| text.starts_with(['/', '.']);
            !value.as_str().is_some_and(begins)
        }
        None => is_secret(key),
    }
}
