//! What can be known of the settings without a network: whether librdkafka takes them, whether they are of use, and whether
//! they keep the promises.
//!
//! Never connects, and never repeats the value of a property: it may be a secret.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use rdkafka::client::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::error::KafkaError;
use rdkafka::producer::{BaseProducer, ProducerContext};
use secrecy::ExposeSecret;

use super::properties::PROPERTIES;
use super::settings::{Delivery, Settings};

/// Two names for the same property, the second is the one that the relay uses. Without this the order of a hash map would
/// decide which of the two counts.
const ALIASES: [(&str, &str); 8] = [
    ("metadata.broker.list", "bootstrap.servers"),
    ("max.in.flight", "max.in.flight.requests.per.connection"),
    ("queue.buffering.max.ms", "linger.ms"),
    ("retries", "message.send.max.retries"),
    ("compression.codec", "compression.type"),
    ("request.required.acks", "acks"),
    ("delivery.timeout.ms", "message.timeout.ms"),
    ("sasl.mechanisms", "sasl.mechanism"),
];

const COMPRESSIONS: [&str; 5] = ["none", "lz4", "zstd", "snappy", "gzip"];
const MECHANISMS: [&str; 3] = ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"];

/// Fewer attempts than this end within an outage that lasts minutes.
const RETRIES_MIN: u64 = 10_000;

/// The name that librdkafka knows, where this is another spelling of it: an alias, or with underscores for the dots, as in the
/// name of an environment variable.
pub(super) fn canonical(name: &str) -> String {
    let known = |name: &str| PROPERTIES.iter().any(|(known, _)| *known == name);
    let dotted = name.replace('_', ".");
    let name = if !known(name) && known(&dotted) {
        dotted
    } else {
        name.to_owned()
    };
    let alias = ALIASES.iter().find(|(alias, _)| *alias == name);
    alias.map_or(name, |(_, canonical)| (*canonical).to_owned())
}

impl Settings {
    /// Whether the settings are right as far as they alone tell; else says what is wrong and what to write instead.
    pub(crate) fn check(&self) -> Result<(), String> {
        check_brokers(&self.brokers)?;
        one_of("compression", &self.compression, &COMPRESSIONS)?;
        self.check_numbers()?;
        self.check_delivery()?;
        self.check_properties()?;
        self.check_login()?;
        self.check_tls()
    }

    /// Reads the files and makes a client as the relay would, without a broker to connect to.
    ///
    /// # Errors
    /// The reason, with the file or what librdkafka says.
    pub(crate) fn try_out(&self) -> Result<(), String> {
        self.check_files()?;
        let mut config = self.default_producer();
        config.remove("bootstrap.servers");
        // It has nothing to say that the error does not.
        config.set_log_level(RDKafkaLogLevel::Emerg);
        match config.create_with_context::<_, BaseProducer<Quiet>>(Quiet) {
            Ok(_) => Ok(()),
            Err(KafkaError::ClientConfig(_, _, name, _)) => Err(self.value_refused(&name)),
            Err(KafkaError::ClientCreation(why)) => Err(format!(
                "sink.kafka: librdkafka refuses these settings: {}",
                self.without_secrets(why.trim_end_matches('.'))
            )),
            Err(error) => Err(format!("sink.kafka: {error}")),
        }
    }

    fn value_refused(&self, name: &str) -> String {
        let of_properties = self.properties.keys().any(|given| canonical(given) == name);
        let place = if of_properties {
            format!("sink.kafka.properties.{name:?}")
        } else {
            format!("sink.kafka (librdkafka's {name})")
        };
        let values = PROPERTIES.iter().find(|(known, _)| *known == name);
        match values.map_or("", |(_, values)| *values) {
            "" => format!("{place}: librdkafka does not take this value"),
            values => format!("{place}: librdkafka does not take this value; it takes {values}"),
        }
    }

    /// librdkafka does not repeat secrets, as far as its source tells; nothing rests on that.
    fn without_secrets(&self, text: &str) -> String {
        let secret = |name: &&String| {
            ["password", "secret", "passphrase", "pem", "config"]
                .iter()
                .any(|part| name.contains(part))
        };
        let properties = self.properties.iter();
        let given = [&self.sasl.password, &self.tls.key_password]
            .into_iter()
            .flatten()
            .map(|secret| secret.expose_secret().to_owned());
        properties
            .filter(|(name, _)| secret(name))
            .map(|(_, value)| value.clone())
            .chain(given)
            .filter(|value| !value.is_empty())
            .fold(text.to_owned(), |text, value| {
                text.replace(&value, "(not shown)")
            })
    }

    fn check_numbers(&self) -> Result<(), String> {
        let topics = &self.topics;
        let of_topics = [
            ("partitions", topics.partitions),
            ("replication_factor", topics.replication_factor),
        ];
        for (key, value) in of_topics {
            if value < 1 && value != -1 {
                return Err(format!(
                    "sink.kafka.topics.{key} = {value}: has to be at least 1, or -1 for the broker's default"
                ));
            }
        }
        if self.queue_records == 0 {
            return Err("sink.kafka.queue_records = 0: has to be at least 1".to_owned());
        }
        if self.queue_bytes.as_u64() < 1024 {
            return Err("sink.kafka.queue_bytes: has to be at least 1KiB".to_owned());
        }
        Ok(())
    }

    fn check_properties(&self) -> Result<(), String> {
        let mut seen: BTreeMap<String, &String> = BTreeMap::new();
        for (given, value) in &self.properties {
            let name = canonical(given);
            if !PROPERTIES.iter().any(|(known, _)| *known == name) {
                return Err(unknown_property(given));
            }
            if let Some(other) = seen.insert(name.clone(), given) {
                return Err(format!(
                    "sink.kafka.properties has {other:?} and {given:?}, which are one property: keep one of them"
                ));
            }
            if let Some(why) = self.breaks(&name, value) {
                return Err(format!("sink.kafka.properties.{given:?}: {why}"));
            }
        }
        let mut config = ClientConfig::new();
        for (name, value) in &self.properties {
            config.set(canonical(name), value);
        }
        match config.create_native_config() {
            Ok(_) => Ok(()),
            Err(KafkaError::ClientConfig(_, _, name, _)) => Err(self.value_refused(&name)),
            Err(error) => Err(format!("sink.kafka.properties: {error}")),
        }
    }

    /// Why a property can't have this value, where that would take a promise away or change nothing.
    fn breaks(&self, name: &str, value: &str) -> Option<String> {
        let number = || value.trim().parse::<u64>().ok();
        let only = |wanted: &str, reason: &str| Some(format!("has to be {wanted:?}: {reason}"));
        match name {
            "acks" if !["all", "-1"].contains(&value) => only(
                "all",
                "an event would count as published that a broker may still lose (promise I3)",
            ),
            "enable.idempotence" if value != "true" => only(
                "true",
                "what is sent again would be doubled and out of order (promise I2)",
            ),
            "enable.gapless.guarantee" if value != "true" => only(
                "true",
                "a later record of an entity could be appended before one that failed (promise I2)",
            ),
            "max.in.flight.requests.per.connection" if number().is_none_or(|n| n > 5) => Some(
                "has to be 1 to 5: with more a broker does not keep the order of what is sent again (promise I2)"
                    .to_owned(),
            ),
            "queuing.strategy" if value != "fifo" => {
                only("fifo", "newer records would overtake older ones (promise I2)")
            }
            "delivery.report.only.error" if value != "false" => only(
                "false",
                "the relay would never learn that an event is published (promise I3)",
            ),
            "message.send.max.retries" if number().is_none_or(|n| n < RETRIES_MIN) => {
                Some(format!(
                    "has to be at least {RETRIES_MIN}: an outage must not use them up (promise I6)"
                ))
            }
            "message.timeout.ms" if self.delivery == Delivery::AtLeastOnce && value != "0" => only(
                "0",
                "an outage that is longer would fail what is in flight, again and again (promise I6)",
            ),
            "queue.buffering.max.messages" => Some(
                "set sink.kafka.queue_records, which the bounds on memory rest on (promise I5)".to_owned(),
            ),
            "queue.buffering.max.kbytes" => Some(
                "set sink.kafka.queue_bytes, which the bounds on memory rest on (promise I5)".to_owned(),
            ),
            "allow.auto.create.topics" if value != "false" => only(
                "false",
                "a broker would choose the number of partitions; set sink.kafka.topics.create",
            ),
            "bootstrap.servers" => Some("set sink.kafka.brokers instead".to_owned()),
            "group.id" | "enable.auto.commit" | "auto.offset.reset" | "isolation.level"
            | "enable.partition.eof" | "fetch.wait.max.ms" => {
                Some("the relay sets this itself, so that it would have no effect".to_owned())
            }
            _ => None,
        }
    }

    fn check_login(&self) -> Result<(), String> {
        let sasl = &self.sasl;
        let config = self.client();
        let uses_sasl = self.protocol().starts_with("sasl");
        let given = [
            ("mechanism", sasl.mechanism.is_some()),
            ("username", sasl.username.is_some()),
            ("password", sasl.password.is_some()),
            ("password_file", sasl.password_file.is_some()),
        ];
        if !uses_sasl {
            return match given.iter().find(|(_, is_given)| *is_given) {
                None => Ok(()),
                Some((key, _)) if sasl.mechanism.is_none() => Err(format!(
                    "sink.kafka.sasl.{key} is set and sink.kafka.sasl.mechanism is not: the relay would not log in; set it \
                     to {}",
                    MECHANISMS.join(", ")
                )),
                Some((key, _)) => Err(format!(
                    "sink.kafka.sasl.{key} is set and has no effect: security.protocol in sink.kafka.properties is \
                     without SASL; take one of them away"
                )),
            };
        }
        if let Some(mechanism) = &sasl.mechanism {
            one_of("sasl.mechanism", mechanism, &MECHANISMS)?;
        }
        let mechanism = config.get("sasl.mechanism").unwrap_or("GSSAPI");
        if mechanism == "OAUTHBEARER" {
            let unsecured = config.get("enable.sasl.oauthbearer.unsecure.jwt") == Some("true");
            return if unsecured {
                Ok(())
            } else {
                Err(not_built_in("OAUTHBEARER"))
            };
        }
        if !MECHANISMS.contains(&mechanism) {
            return Err(not_built_in(mechanism));
        }
        let has = |name: &str| config.get(name).is_some_and(|value| !value.is_empty());
        if !has("sasl.username") {
            return Err(format!(
                "sink.kafka.sasl.username is missing: {mechanism} logs in with a name and a password"
            ));
        }
        if !has("sasl.password") && sasl.password_file.is_none() {
            return Err(format!(
                "sink.kafka.sasl.password is missing: {mechanism} logs in with a name and a password; name a file \
                 with sink.kafka.sasl.password_file, or set RELAY_SINK__KAFKA__SASL__PASSWORD"
            ));
        }
        Ok(())
    }

    fn check_tls(&self) -> Result<(), String> {
        let tls = &self.tls;
        let given = [
            ("ca_file", tls.ca_file.is_some()),
            ("certificate_file", tls.certificate_file.is_some()),
            ("key_file", tls.key_file.is_some()),
            ("key_password", tls.key_password.is_some()),
        ];
        if !self.encrypts() {
            if let Some((key, _)) = given.iter().find(|(_, is_given)| *is_given) {
                return Err(format!(
                    "sink.kafka.tls.{key} is set and has no effect, for nothing is encrypted: set sink.kafka.tls.enabled = \
                     true, or take it away"
                ));
            }
            let of_tls = |name: &&String| {
                let name = canonical(name);
                name.starts_with("ssl.") || name == "enable.ssl.certificate.verification"
            };
            if let Some(name) = self.properties.keys().find(of_tls) {
                return Err(format!(
                    "sink.kafka.properties.{name:?} has no effect, for nothing is encrypted: set sink.kafka.tls.enabled = \
                     true, or take it away"
                ));
            }
            return Ok(());
        }
        let has = |name: &str| self.properties.keys().any(|given| canonical(given) == name);
        let certificate = tls.certificate_file.is_some()
            || has("ssl.certificate.location")
            || has("ssl.certificate.pem");
        let key = tls.key_file.is_some() || has("ssl.key.location") || has("ssl.key.pem");
        if tls.key_password.is_some() && !key {
            return Err(
                "sink.kafka.tls.key_password is set and has no effect without sink.kafka.tls.key_file: name the file, or take the password away"
                    .to_owned(),
            );
        }
        match (certificate, key) {
            (true, false) => Err(
                "sink.kafka.tls.key_file is missing: a certificate of this client is of use only with its key"
                    .to_owned(),
            ),
            (false, true) => Err(
                "sink.kafka.tls.certificate_file is missing: a key of this client is of use only with its certificate"
                    .to_owned(),
            ),
            _ => Ok(()),
        }
    }

    /// Whether the files are there and hold what they should.
    fn check_files(&self) -> Result<(), String> {
        for (place, path, holds) in self.files() {
            let Some(marks) = holds else { continue };
            let shown = path.display().to_string();
            // OpenSSL takes a folder of authorities as well.
            if path.is_dir() && marks == "CERTIFICATE" {
                continue;
            }
            let text = fs::read(&path).map_err(|error| format!("{place} = {shown:?}: {error}"))?;
            let text = String::from_utf8_lossy(&text);
            let begins = |line: &str| line.starts_with("-----BEGIN ") && line.contains(marks);
            if !text.lines().any(begins) {
                return Err(format!(
                    "{place} = {shown:?}: holds no {} in PEM form (a line \"-----BEGIN …{marks}-----\")",
                    marks.to_lowercase()
                ));
            }
        }
        Ok(())
    }

    /// What a person has to know about the way to the brokers, although it is allowed.
    #[must_use]
    pub fn weaknesses(&self) -> Vec<String> {
        let config = self.client();
        let mut weaknesses = Vec::new();
        let mechanism = config.get("sasl.mechanism").unwrap_or_default();
        if self.protocol() == "sasl_plaintext" {
            weaknesses.push(if mechanism == "PLAIN" {
                "the password goes to Kafka as plain text, where anybody on the way can read it: set \
                 sink.kafka.tls.enabled = true"
                    .to_owned()
            } else {
                "the login and all events go to Kafka unencrypted: set sink.kafka.tls.enabled = true".to_owned()
            });
        }
        if self.encrypts() {
            if config.get("enable.ssl.certificate.verification") == Some("false") {
                weaknesses.push(
                    "the certificates of the brokers are not verified, so that another server can take their place \
                     (enable.ssl.certificate.verification)"
                        .to_owned(),
                );
            } else if config.get("ssl.endpoint.identification.algorithm") == Some("none") {
                weaknesses.push(
                    "the certificates of the brokers are verified, but not whether they belong to the hosts \
                     (ssl.endpoint.identification.algorithm)"
                        .to_owned(),
                );
            }
        }
        weaknesses
    }

    /// The way to the brokers in a few words.
    #[must_use]
    pub fn security(&self) -> String {
        let config = self.client();
        let tls = if !self.encrypts() {
            "not encrypted"
        } else if config.get("enable.ssl.certificate.verification") == Some("false") {
            "TLS, brokers not verified"
        } else if config.get("ssl.endpoint.identification.algorithm") == Some("none") {
            "TLS, brokers verified except for their names"
        } else {
            "TLS, brokers verified"
        };
        let login = if self.protocol().starts_with("sasl") {
            let mechanism = config.get("sasl.mechanism").unwrap_or("GSSAPI");
            format!("login by {mechanism}")
        } else if config.get("ssl.certificate.location").is_some() {
            "login by certificate".to_owned()
        } else {
            "no login".to_owned()
        };
        format!("{tls}, {login}")
    }

    fn protocol(&self) -> String {
        let config = self.client();
        config
            .get("security.protocol")
            .unwrap_or("plaintext")
            .to_ascii_lowercase()
    }

    fn encrypts(&self) -> bool {
        self.protocol().ends_with("ssl")
    }
}

fn not_built_in(mechanism: &str) -> String {
    format!(
        "the SASL mechanism {mechanism} is not built in: sink.kafka.sasl.mechanism has to be one of {}",
        MECHANISMS.join(", ")
    )
}

fn one_of(key: &str, given: &str, valid: &[&str]) -> Result<(), String> {
    if valid.contains(&given) {
        return Ok(());
    }
    let nearest = nearest(given, valid.iter().copied());
    Err(format!(
        "sink.kafka.{key} = {given:?}: has to be one of {}{nearest}",
        valid.join(", ")
    ))
}

fn unknown_property(given: &str) -> String {
    let nearest = nearest(given, PROPERTIES.iter().map(|(name, _)| *name));
    // What is like no property at all may be a value that stands in the wrong place.
    let shown = if nearest.is_empty() {
        "(not shown)".to_owned()
    } else {
        format!("{given:?}")
    };
    format!("sink.kafka.properties: librdkafka has no property {shown}{nearest}")
}

fn nearest<'a>(given: &str, valid: impl Iterator<Item = &'a str>) -> String {
    let given = given.to_lowercase();
    valid
        .map(|known| (strsim::jaro_winkler(&given, &known.to_lowercase()), known))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(likeness, _)| *likeness > 0.8)
        .map_or_else(String::new, |(_, known)| {
            format!("; did you mean {known:?}?")
        })
}

/// `host:port`, separated by commas. Whatever librdkafka does not understand it would leave out with a line in the log.
fn check_brokers(brokers: &str) -> Result<(), String> {
    const EXAMPLE: &str = "such as \"kafka-1:9092,kafka-2:9092\"";
    let refused = |broker: &str, why: &str| {
        Err(format!(
            "sink.kafka.brokers: {broker:?} {why}; it has to be host:port, several separated by commas, {EXAMPLE}"
        ))
    };
    for broker in brokers.split(',').map(str::trim) {
        if broker.is_empty() {
            return refused(brokers, "has an empty part");
        }
        if broker.contains("://") {
            return refused(broker, "has a scheme");
        }
        if broker.contains('@') {
            // A password stands before it.
            return Err(format!(
                "sink.kafka.brokers has a user in it: set sink.kafka.sasl; brokers are host:port, {EXAMPLE}"
            ));
        }
        let (host, port) = match broker.strip_prefix('[').and_then(|b| b.split_once(']')) {
            Some((_, "")) => (broker, None),
            Some((address, rest)) if address.parse::<std::net::Ipv6Addr>().is_ok() => {
                match rest.strip_prefix(':') {
                    Some(port) => ("", Some(port)),
                    None => return refused(broker, "is no address"),
                }
            }
            _ => match broker.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (broker, None),
            },
        };
        let legal = |c: char| c.is_alphanumeric() || "._-".contains(c);
        let is_address = broker.starts_with('[');
        if !is_address && (host.is_empty() || !host.chars().all(legal)) {
            return refused(broker, "has no legal host");
        }
        if port.is_some_and(|port| !matches!(port.parse::<u16>(), Ok(1..))) {
            return refused(broker, "has no legal port (1 to 65535)");
        }
    }
    Ok(())
}

/// Says nothing.
struct Quiet;

impl ClientContext for Quiet {
    fn log(&self, _: RDKafkaLogLevel, _: &str, _: &str) {}

    fn error(&self, _: KafkaError, _: &str) {}
}

impl ProducerContext for Quiet {
    type DeliveryOpaque = ();

    fn delivery(&self, _: &rdkafka::message::DeliveryResult<'_>, (): ()) {}
}

/// What a file of such a property holds, as its first line calls it. Files that OpenSSL alone can read are left to it.
pub(super) fn marks(property: &str) -> Option<&'static str> {
    match property {
        "ssl.ca.location" | "ssl.certificate.location" => Some("CERTIFICATE"),
        "ssl.key.location" => Some("PRIVATE KEY"),
        _ => None,
    }
}

/// Whether the value of this property is the path of a file that is read when a client is made.
pub(super) fn is_file(property: &str, value: &str) -> bool {
    let named = [
        "ssl.ca.location",
        "ssl.certificate.location",
        "ssl.key.location",
        "ssl.keystore.location",
        "ssl.crl.location",
    ];
    named.contains(&property) && value != "probe" && !Path::new(value).as_os_str().is_empty()
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
