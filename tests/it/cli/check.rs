//! `check` and `run` know what can be known without a network.

use super::{NOBODY, PLANTED, Ran, relay};

/// Each is refused by both, with exit code 2 and these words.
#[tokio::test]
async fn what_can_not_work_is_refused_before_it_starts() {
    for (name, value, words) in [
        ("SINK__KAFKA__BROKERS", "kafka:9o92", "no legal port"),
        ("SINK__KAFKA__BROKERS", "\"kafka:9092\"", "no legal host"),
        ("SINK__KAFKA__BROKERS", "SSL://kafka:9092", "a scheme"),
        (
            "SINK__KAFKA__COMPRESSION",
            "gzipp",
            "did you mean \"gzip\"?",
        ),
        ("SINK__KAFKA__TOPICS__PARTITIONS", "0", "at least 1"),
        ("SINK__KAFKA__SASL__MECHANISM", "GSSAPI", "SCRAM-SHA-512"),
        (
            "SINK__KAFKA__SASL__MECHANISM",
            "PLAIN",
            "username is missing",
        ),
        ("SINK__KAFKA__TLS__CA_FILE", "/none", "has no effect"),
        (
            "SINK__KAFKA__PROPERTIES__SOCKET_KEEPALIVE_ENABL",
            "true",
            "did you mean \"socket.keepalive.enable\"?",
        ),
        ("SINK__KAFKA__PROPERTIES__ACKS", "1", "promise I3"),
        (
            "SINK__KAFKA__PROPERTIES__BOOTSTRAP_SERVERS",
            "b:1",
            "sink.kafka.brokers",
        ),
        (
            "PIPELINE__TOPIC",
            "shop orders/{aggregate_type}",
            "every event would be rejected",
        ),
        ("ADMIN__LISTEN", ":9187", "127.0.0.1:9187"),
        ("SINK_KAFKA_BROKERS", "kafka:9092", "two underscores"),
    ] {
        let name = format!("RELAY_{name}");
        let env = [("RELAY_SOURCE__POSTGRES__URL", NOBODY), (&name[..], value)];
        for command in ["check", "run"] {
            let ran = relay(&[command], &env).await.ends_with(2);
            assert!(ran.err.contains(words), "{name}: {}", ran.err);
            assert_eq!(ran.err.lines().count(), 1, "{}", ran.err);
        }
    }
}

#[tokio::test]
async fn a_certificate_that_is_not_there_is_named_with_its_key() {
    let env = [
        ("RELAY_SOURCE__POSTGRES__URL", NOBODY),
        ("RELAY_SINK__KAFKA__TLS__ENABLED", "true"),
        ("RELAY_SINK__KAFKA__TLS__CA_FILE", "/none"),
    ];
    for command in ["check", "run"] {
        let ran = relay(&[command], &env).await.ends_with(2);
        let words = "sink.kafka.tls.ca_file = \"/none\": No such file";
        assert!(ran.err.contains(words), "{}", ran.err);
    }
}

#[tokio::test]
async fn weak_connections_and_values_from_elsewhere_are_told() {
    let env = [
        (
            "RELAY_SOURCE__POSTGRES__URL",
            "postgres://relay@db/shop?sslmode=require",
        ),
        ("PGPORT", "25432"),
        ("PGPASSWORD", PLANTED),
        ("RELAY_CONFIG", ""),
        ("RELAY_SINK__KAFKA__SASL__MECHANISM", "PLAIN"),
        ("RELAY_SINK__KAFKA__SASL__USERNAME", "relay"),
        ("RELAY_SINK__KAFKA__SASL__PASSWORD", PLANTED),
        ("RELAY_PIPELINES__ALL__TOPIC", "events"),
        ("RELAY_PIPELINES__ORDERS__TOPIC", "events"),
        ("RELAY_PIPELINES__ORDERS__FILTER__AGGREGATE_TYPES", "order"),
    ];
    let Ran { out, .. } = relay(&["check"], &env).await.ends_with(0);
    for words in [
        "PostgreSQL at db:25432",
        "TLS, server not verified",
        "another server can take its place",
        "the port is taken from PGPORT",
        "the password is taken from PGPASSWORD",
        "not encrypted, login by PLAIN",
        "the password goes to Kafka as plain text",
        "those are published twice",
        "`outbox-relay doctor`",
    ] {
        assert!(out.contains(words), "{words}: {out}");
    }
    let allow = [(
        "RELAY_SOURCE__POSTGRES__URL",
        "postgres://relay@db/shop?sslmode=allow",
    )];
    let ran = relay(&["check"], &allow).await.ends_with(2);
    assert!(ran.err.contains("never encrypts"), "{}", ran.err);
}

#[tokio::test]
async fn every_setting_in_force_is_shown_with_its_origin() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("relay.toml");
    std::fs::write(&file, "[relay]\nlease_ttl = \"7s\"\n").unwrap();
    let path = file.to_str().unwrap();
    let env = [
        ("RELAY_SOURCE__POSTGRES__URL", NOBODY),
        ("RELAY_LOG__LEVEL", "warn"),
        ("RELAY_ADMIN__TOKEN", "planted-secret-of-the-interface"),
    ];
    let args = ["check", "--all", "--config", path];
    let Ran { out, .. } = relay(&args, &env).await.ends_with(0);
    for line in [
        format!("relay.lease_ttl = \"7s\"   # {path}"),
        "log.level = \"warn\"   # RELAY_LOG__LEVEL".to_owned(),
        "admin.token = (not shown)   # RELAY_ADMIN__TOKEN".to_owned(),
        "source.postgres.url = (not shown)   # RELAY_SOURCE__POSTGRES__URL".to_owned(),
        "sink.kafka.compression = \"lz4\"   # built-in relay.toml".to_owned(),
    ] {
        assert!(out.lines().any(|told| told == line), "{line}: {out}");
    }
}

#[tokio::test]
async fn the_version_names_what_is_running() {
    let Ran { out, .. } = relay(&["--version"], &[]).await.ends_with(0);
    let version = env!("CARGO_PKG_VERSION");
    assert!(
        out.starts_with(&format!("outbox-relay {version} (")),
        "{out}"
    );
    assert!(out.contains("librdkafka 2."), "{out}");
}
