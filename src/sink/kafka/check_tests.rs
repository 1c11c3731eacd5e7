use super::*;
use crate::sink::kafka::{Sasl, Tls, Topics};

fn settings() -> Settings {
    Settings {
        brokers: "kafka:9092".to_owned(),
        client_id: "relay".to_owned(),
        delivery: Delivery::AtLeastOnce,
        transactional_id: None,
        outbox_id: None,
        compression: "lz4".to_owned(),
        linger: std::time::Duration::ZERO,
        queue_records: 1000,
        queue_bytes: bytesize::ByteSize::mib(1),
        topics: Topics {
            create: true,
            partitions: 1,
            replication_factor: -1,
            max: 10,
            config: BTreeMap::new(),
        },
        tls: Tls {
            enabled: false,
            ca_file: None,
            certificate_file: None,
            key_file: None,
            key_password: None,
        },
        sasl: Sasl {
            mechanism: None,
            username: None,
            password: None,
            password_file: None,
        },
        properties: BTreeMap::new(),
    }
}

fn with(properties: &[(&str, &str)]) -> Settings {
    let mut settings = settings();
    settings.properties = properties
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
    settings
}

/// In full: what the settings alone tell, and the client that is made of them.
fn refused(settings: &Settings) -> String {
    settings
        .check()
        .and_then(|()| settings.try_out())
        .expect_err("refused")
}

#[test]
fn the_defaults_make_a_client() {
    settings().check().unwrap();
    settings().try_out().unwrap();
    let mut exactly_once = settings();
    exactly_once.delivery = Delivery::ExactlyOnce;
    exactly_once.transactional_id = Some("shop".to_owned());
    exactly_once.check().unwrap();
    exactly_once.try_out().unwrap();
}

#[test]
fn every_property_of_the_list_is_one_of_librdkafka() {
    for (name, _) in PROPERTIES {
        let mut config = ClientConfig::new();
        config.set(*name, "");
        if let Err(KafkaError::ClientConfig(_, why, _, _)) = config.create_native_config() {
            assert!(!why.contains("No such"), "{name}: {why}");
        }
    }
    let defaults = settings().default_producer();
    for name in defaults.config_map().keys() {
        assert!(
            PROPERTIES.iter().any(|(known, _)| known == name),
            "{name} is missing"
        );
    }
}

#[test]
fn brokers_are_hosts_and_ports() {
    for brokers in [
        "kafka:9092",
        "a:9092,b:9092",
        "a:9092, b:9092",
        "kafka",
        "127.0.0.1:1",
        "[::1]:9092",
        "my_kafka.svc:65535",
    ] {
        assert_eq!(check_brokers(brokers), Ok(()), "{brokers}");
    }
    for (brokers, why) in [
        ("", "empty part"),
        ("a:9092,,b:9092", "empty part"),
        ("a:9092,", "empty part"),
        ("kafka:9o92", "no legal port"),
        ("kafka:0", "no legal port"),
        ("kafka:", "no legal port"),
        ("kafka:65536", "no legal port"),
        (":9092", "no legal host"),
        ("\"kafka:9092\"", "no legal host"),
        ("'a'", "no legal host"),
        ("a b:9092", "no legal host"),
        ("PLAINTEXT://kafka:9092", "a scheme"),
        ("http://kafka:9092", "a scheme"),
        ("relay:hunter2@kafka:9092", "has a user"),
        ("::1:9092", "no legal host"),
        ("[::1]9092", "is no address"),
    ] {
        let refused = check_brokers(brokers).unwrap_err();
        assert!(refused.contains(why), "{brokers}: {refused}");
        assert!(!refused.contains("hunter2"), "{refused}");
    }
}

#[test]
fn properties_that_do_not_exist_are_named_with_the_nearest() {
    for (given, nearest) in [
        ("socket.keepalive.enabl", "\"socket.keepalive.enable\""),
        ("sasl.pasword", "\"sasl.password\""),
        ("linger", "\"linger.ms\""),
    ] {
        let refused = refused(&with(&[(given, "hunter2")]));
        assert!(refused.contains(given), "{refused}");
        assert!(
            refused.ends_with(&format!("did you mean {nearest}?")),
            "{refused}"
        );
        assert!(!refused.contains("hunter2"), "{refused}");
    }
    let refused = refused(&with(&[("hunter2", "true")]));
    assert!(!refused.contains("hunter2"), "{refused}");
}

#[test]
fn values_that_librdkafka_refuses_are_told_with_those_that_it_takes() {
    for (name, value, takes) in [
        ("socket.keepalive.enable", "hunter2", "true, false"),
        ("statistics.interval.ms", "hunter2", "0 to 86400000"),
        ("batch.num.messages", "0", "1 to 1000000"),
        ("security.protocol", "hunter2", "sasl_ssl"),
        ("debug", "hunter2", "broker"),
    ] {
        let refused = refused(&with(&[(name, value)]));
        assert!(
            refused.contains(name) && refused.contains(takes),
            "{refused}"
        );
        assert!(!refused.contains("hunter2"), "{refused}");
    }
}

#[test]
fn properties_keep_the_promises() {
    for (name, value, why) in [
        ("acks", "0", "promise I3"),
        ("acks", "1", "promise I3"),
        ("request.required.acks", "1", "promise I3"),
        ("enable.idempotence", "false", "promise I2"),
        ("enable.gapless.guarantee", "false", "promise I2"),
        ("max.in.flight.requests.per.connection", "6", "promise I2"),
        ("max.in.flight", "1000000", "promise I2"),
        ("queuing.strategy", "lifo", "promise I2"),
        ("delivery.report.only.error", "true", "promise I3"),
        ("retries", "3", "promise I6"),
        ("message.send.max.retries", "0", "promise I6"),
        ("delivery.timeout.ms", "30000", "promise I6"),
        (
            "queue.buffering.max.messages",
            "0",
            "sink.kafka.queue_records",
        ),
        (
            "queue.buffering.max.kbytes",
            "1048576",
            "sink.kafka.queue_bytes",
        ),
        ("bootstrap.servers", "b:9092", "sink.kafka.brokers"),
        ("metadata.broker.list", "b:9092", "sink.kafka.brokers"),
        ("transactional.id", "x", "sink.kafka.transactional_id"),
        (
            "allow.auto.create.topics",
            "true",
            "sink.kafka.topics.create",
        ),
        ("isolation.level", "read_uncommitted", "no effect"),
    ] {
        let said = refused(&with(&[(name, value)]));
        assert!(said.contains(why) && said.contains(name), "{said}");
    }
    for (name, value) in [
        ("acks", "all"),
        ("acks", "-1"),
        ("max.in.flight", "5"),
        ("enable.idempotence", "true"),
        ("socket_keepalive_enable", "true"),
    ] {
        let settings = with(&[(name, value)]);
        settings.check().unwrap();
        settings.try_out().unwrap();
    }
    let twice = refused(&with(&[("acks", "all"), ("request.required.acks", "all")]));
    assert!(twice.contains("one property"), "{twice}");
}

#[test]
fn batches_keep_to_what_the_smallest_topic_takes() {
    let size = |settings: &Settings| settings.producer(1000).get("batch.size").map(str::to_owned);
    assert_eq!(size(&with(&[("batch.size", "900000")])).unwrap(), "1000");
    assert_eq!(size(&with(&[("batch.size", "500")])).unwrap(), "500");
}

#[test]
fn a_login_that_can_not_work_is_refused() {
    let sasl = |mechanism: Option<&str>, username: Option<&str>, password: Option<&str>| {
        let mut settings = settings();
        settings.sasl.mechanism = mechanism.map(str::to_owned);
        settings.sasl.username = username.map(str::to_owned);
        settings.sasl.password = password.map(|password| password.to_owned().into());
        settings
    };
    for (given, why) in [
        (sasl(Some("PLAIN"), None, None), "username is missing"),
        (sasl(Some("PLAIN"), Some("u"), None), "password is missing"),
        (
            sasl(Some("PLAIN"), Some(""), Some("x")),
            "username is missing",
        ),
        (sasl(Some("GSSAPI"), Some("u"), Some("x")), "one of PLAIN"),
        (
            sasl(Some("plain"), Some("u"), Some("x")),
            "did you mean \"PLAIN\"?",
        ),
        (sasl(None, Some("u"), None), "sasl.mechanism is not"),
        (sasl(None, None, Some("x")), "sasl.mechanism is not"),
        (
            with(&[("security.protocol", "sasl_ssl")]),
            "GSSAPI is not built in",
        ),
        (
            with(&[
                ("security.protocol", "sasl_ssl"),
                ("sasl.mechanism", "OAUTHBEARER"),
            ]),
            "OAUTHBEARER is not built in",
        ),
    ] {
        let said = refused(&given);
        assert!(said.contains(why), "{why}: {said}");
    }
    let mut overruled = sasl(Some("PLAIN"), Some("u"), Some("x"));
    let plaintext = ("security.protocol".to_owned(), "plaintext".to_owned());
    overruled.properties = [plaintext].into();
    assert!(refused(&overruled).contains("has no effect"));
}

#[test]
fn files_are_read_beforehand() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| Some(folder.path().join(name));
    std::fs::write(folder.path().join("text"), "hunter2\n").unwrap();
    let broken = "-----BEGIN CERTIFICATE-----\nhunter2\n-----END CERTIFICATE-----\n";
    std::fs::write(folder.path().join("broken"), broken).unwrap();
    let tls = |change: &dyn Fn(&mut Tls)| {
        let mut settings = settings();
        settings.tls.enabled = true;
        change(&mut settings.tls);
        settings
    };
    for (given, why) in [
        (tls(&|tls| tls.ca_file = path("none")), "No such file"),
        (
            tls(&|tls| tls.ca_file = path("text")),
            "holds no certificate",
        ),
        (tls(&|tls| tls.ca_file = path("broken")), "ssl.ca.location"),
        (
            tls(&|tls| {
                tls.certificate_file = path("text");
                tls.key_file = path("text");
            }),
            "holds no certificate",
        ),
        (
            tls(&|tls| tls.key_file = path("text")),
            "certificate_file is missing",
        ),
        (
            tls(&|tls| tls.key_password = Some("hunter2".to_owned().into())),
            "without sink.kafka.tls.key_file",
        ),
        (
            tls(&|tls| tls.certificate_file = path("broken")),
            "key_file is missing",
        ),
        (
            tls(&|tls| {
                tls.enabled = false;
                tls.ca_file = path("text");
            }),
            "has no effect",
        ),
        (with(&[("ssl.ca.location", "/none")]), "has no effect"),
        (
            with(&[("security.protocol", "ssl"), ("ssl.ca.location", "/none")]),
            "No such file",
        ),
    ] {
        let said = refused(&given);
        assert!(said.contains(why), "{why}: {said}");
        assert!(!said.contains("hunter2"), "{said}");
    }
}

#[test]
fn numbers_are_in_their_ranges() {
    let mut none = settings();
    none.topics.partitions = 0;
    assert!(refused(&none).contains("partitions = 0"));
    none = settings();
    none.compression = "gzipp".to_owned();
    assert!(refused(&none).ends_with("did you mean \"gzip\"?"));
    none = settings();
    none.queue_records = 0;
    assert!(refused(&none).contains("queue_records"));
    none = settings();
    none.linger = std::time::Duration::from_hours(1);
    assert!(refused(&none).contains("linger.ms"));
}

#[test]
fn weak_connections_are_told() {
    let mut plain = settings();
    plain.sasl.mechanism = Some("PLAIN".to_owned());
    assert!(plain.weaknesses()[0].contains("plain text"));
    assert_eq!(plain.security(), "not encrypted, login by PLAIN");
    let unverified = with(&[
        ("security.protocol", "SSL"),
        ("enable.ssl.certificate.verification", "false"),
    ]);
    assert!(unverified.weaknesses()[0].contains("not verified"));
    assert_eq!(unverified.security(), "TLS, brokers not verified, no login");
    let mut verified = settings();
    verified.tls.enabled = true;
    assert!(verified.weaknesses().is_empty());
    assert_eq!(verified.security(), "TLS, brokers verified, no login");
}
