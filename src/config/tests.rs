use std::io::Write;

use expect_test::expect;

use secrecy::ExposeSecret;

use super::*;
use crate::encode;

fn load(toml: &str, env: &[(&str, &str)]) -> Result<Config, String> {
    let mut file = tempfile::Builder::new()
        .prefix("relay")
        .suffix(".toml")
        .tempfile()
        .unwrap();
    file.write_all(toml.as_bytes()).unwrap();
    let env = env
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Config::load(Some(file.path()), env).map_err(|error| {
        error
            .to_string()
            .replace(&file.path().display().to_string(), "relay.toml")
    })
}

const URL: (&str, &str) = (
    "RELAY_SOURCE__POSTGRES__URL",
    "postgres://relay:planted-secret@db/app",
);

#[test]
fn the_shipped_file_and_a_url_are_enough() {
    let token = ("RELAY_ADMIN__TOKEN", "planted-secret-of-the-admin");
    let config = load("", &[URL, token]).unwrap();
    assert_eq!(config.pipelines.len(), 1);
    assert_eq!(config.pipelines[0].pipeline.name.as_str(), "main");
    assert!(!format!("{config:?}").contains("planted-secret"));
}

#[test]
fn the_defaults_are_pinned() {
    let Config {
        pipelines,
        relay,
        admin,
        log,
        ..
    } = load("", &[URL]).unwrap();
    expect![[r#"
        PipelineConfig { pipeline: Pipeline { name: PipelineName("main"), filter: Filter { aggregate_types: [], event_types: [], headers: {} }, route: Route { topic: Template { parts: [Field(AggregateType)] }, key: Template { parts: [Field(AggregateId)] } }, encoding: Encoding { format: Plain, cloudevents_source: "/outbox-relay" }, on_rejected: Park, dead_letter_topic: None, parked_max: 10000, parked_max_per_entity: 1000 }, start: Earliest, shards: 1 }
        Settings { page: PageLimits { rows: 2000, bytes: 2097152 }, in_flight_rows: 60000, in_flight_bytes: 33554432, lease_ttl: 10s, drain_timeout: 5s, acknowledge_interval: 100ms, redrive_rate: 500 }
        Admin { enabled: true, listen: 127.0.0.1:9187, hosts: [], token: Token(none) }
        Log { level: "info", format: Text }
    "#]]
    .assert_eq(&format!("{:?}\n{relay:?}\n{admin:?}\n{log:?}\n", pipelines[0]));
}

#[test]
fn the_environment_wins_over_the_file() {
    let config = load(
        "[log]\nlevel = \"warn\"",
        &[URL, ("RELAY_LOG__LEVEL", "debug")],
    )
    .unwrap();
    assert_eq!(config.log.level, "debug");
    let config = load(
        "",
        &[
            URL,
            ("RELAY_RELAY__PAGE_EVENTS", "7"),
            ("RELAY_TEST_REQUIRE", "1"),
        ],
    )
    .unwrap();
    assert_eq!(config.relay.page.rows, 7);
}

#[test]
fn one_pipeline_is_set_in_the_environment_like_all_of_them() {
    let config = load(
        "",
        &[
            URL,
            (
                "RELAY_PIPELINES__ORDERS__FILTER__AGGREGATE_TYPES",
                r#"["order", "cart"]"#,
            ),
            ("RELAY_PIPELINES__ORDERS__TOPIC", "2026"),
        ],
    )
    .unwrap();
    let orders = &config.pipelines[0].pipeline;
    assert_eq!(orders.filter.aggregate_types, ["order", "cart"]);
    assert!(orders.route.topic.is_fixed());
}

#[test]
fn a_password_of_digits_stays_text() {
    let config = load(
        "[sink.kafka.sasl]\nmechanism = \"PLAIN\"\nusername = \"relay\"",
        &[URL, ("RELAY_SINK__KAFKA__SASL__PASSWORD", "12345")],
    )
    .unwrap();
    let Sink::Kafka(kafka) = config.sink else {
        panic!("the default sink is Kafka")
    };
    assert_eq!(kafka.sasl.password.unwrap().expose_secret(), "12345");
}

#[test]
fn pipelines_inherit_what_they_do_not_say() {
    let config = load(
        "[pipeline]\nformat = \"cloudevents_json\"\n[pipelines.orders]\ntopic = \"shop.{aggregate_type}\"\n\
         filter.aggregate_types = [\"order\"]\n[pipelines.all]\nformat = \"plain\"\nstart = \"2026-01-31T00:00:00Z\"",
        &[URL],
    )
    .unwrap();
    let [all, orders] = &config.pipelines[..] else {
        panic!("two pipelines")
    };
    assert_eq!(all.start, Start::Time(1_769_817_600_000_000));
    assert_eq!(all.pipeline.encoding.format, encode::Format::Plain);
    assert_eq!(
        orders.pipeline.encoding.format,
        encode::Format::CloudeventsJson
    );
    assert_eq!(orders.pipeline.filter.aggregate_types, ["order"]);
    assert_eq!(
        orders
            .pipeline
            .route
            .topic
            .render_for_type("order")
            .as_deref(),
        Some("shop.order")
    );
}

#[test]
fn a_pipeline_that_parks_does_not_mind_the_topic_of_dead_letters() {
    let all = "[pipeline]\non_rejected = \"dead_letter\"\ndead_letter_topic = \"dead\"\n\
               [pipelines.letters]\n[pipelines.parks]\non_rejected = \"park\"\n";
    let config = load(all, &[URL]).unwrap();
    let topics = config
        .pipelines
        .iter()
        .map(|p| p.pipeline.dead_letter_topic.as_deref());
    assert_eq!(topics.collect::<Vec<_>>(), [Some("dead"), None]);
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table of cases")]
fn a_wrong_setting_is_one_line_that_tells_where_what_and_why() {
    let cases: &[(&str, &[(&str, &str)])] = &[
        ("[sink.kafka]\nbroker = \"x\"", &[]),
        ("[snik]\nkind = \"x\"", &[]),
        ("[source.postgres]\ncapture = \"lisen\"", &[]),
        ("[relay]\nlease_ttl = \"ten\"", &[]),
        ("[relay]\nlease_ttl = \"10ms\"", &[]),
        ("[relay]\npage_events = \"many\"", &[]),
        ("[relay]\npage_events = 0", &[]),
        ("[relay]\npage_bytes = \"2 potatoes\"", &[]),
        ("[pipelines.Orders]\n", &[]),
        ("[pipelines.orders]\ntopik = \"x\"", &[]),
        ("[pipelines.orders]\ntopic = \"{customer}\"", &[]),
        ("[pipelines.orders]\nstart = \"yesterday\"", &[]),
        ("[admin]\nlisten = \"here\"", &[]),
        ("[log\n", &[]),
        ("", &[("RELAY_LOG__FORMAT", "xml")]),
        ("", &[("RELAY_LOG__COLOUR", "red")]),
        ("[source.postgres]\nurl_file = \"/none\"", &[]),
        ("[sink.kafka.sasl]\npassword_file = \"/none\"", &[]),
        ("[sink.kafka]\ndelivery = \"exactly-twice\"", &[]),
        ("[sink.kafka]\ndelivery = \"exactly-once\"", &[]),
        ("[sink.kafka]\ntransactional_id = \"a b\"", &[]),
        ("[sink.kafka.properties]\n\"transactional.id\" = \"x\"", &[]),
        ("[admin]\ntoken = \"short\"", &[]),
        (
            "[admin]\ntoken_file = \"/none\"",
            &[("RELAY_ADMIN__TOKEN", "a-token-that-is-long-enough")],
        ),
        ("[pipelines.orders]\nshards = 0", &[]),
        ("[pipelines.orders]\nshards = 65", &[]),
        ("[pipelines.orders]\nparked_max = 0", &[]),
        ("[pipelines.orders]\ndead_letter_topic = \"dead\"", &[]),
        (
            "[pipelines.orders]\ndead_letter_topic = \"dead letters\"",
            &[],
        ),
        (
            "[pipelines.orders]\non_rejected = \"dead_letter\"\ndead_letter_topic = \"__dead\"",
            &[],
        ),
        ("[pipelines.orders]\ntopic = \"__{aggregate_type}\"", &[]),
        ("[pipelines.orders]\ntopic = \"a b/{aggregate_type}\"", &[]),
        ("[pipelines.orders]\non_rejected = \"ignore\"", &[]),
        ("[relay]\nredrive_rate = 0", &[]),
    ];
    let mut lines = String::new();
    for (toml, env) in cases {
        let mut all = vec![URL];
        all.extend_from_slice(env);
        lines += &load(toml, &all).expect_err(toml);
        lines += "\n";
    }
    expect![[r#"
        relay.toml: sink.kafka.broker: no such setting; did you mean "brokers"?
        relay.toml: snik: no such setting; did you mean "sink"?
        relay.toml: source.postgres.capture = "lisen": has to be one of poll, listen; did you mean "listen"?
        relay.toml: relay.lease_ttl = "ten": has to be a duration such as "200ms" or "10s"
        relay.lease_ttl = 10ms: has to be at least 1s
        relay.toml: relay.page_events = "many": has to be a whole number
        relay.page_events = 0: has to be at least 1
        relay.toml: relay.page_bytes = "2 potatoes": has to be a size such as "4MiB"
        pipelines.Orders: "Orders" is not a pipeline name: 1 to 63 of a-z, 0-9, _ and -, starting with a letter
        relay.toml: pipelines.orders.topik: no such setting; did you mean "topic"?
        relay.toml: pipelines.orders.topic: {customer} is not known; a template may use {aggregate_type}, {aggregate_id} and {event_type}
        relay.toml: pipelines.orders.start: "yesterday" is neither "earliest" nor "latest" nor a time such as "2026-01-31T00:00:00Z"
        relay.toml: admin.listen: "here" has to be an address and a port, such as "127.0.0.1:9187", or "0.0.0.0:9187" for every address of this machine
        relay.toml: TOML parse error at line 1, column 5 invalid table header expected `.`, `]`
        RELAY_LOG__FORMAT: log.format = "xml": has to be one of text, json; there is text, json
        RELAY_LOG__COLOUR: log.colour: no such setting; there is level, format
        source.postgres.url (RELAY_SOURCE__POSTGRES__URL) and source.postgres.url_file (relay.toml) are both set: take one of them away
        sink.kafka.sasl.password_file = "/none": No such file or directory (os error 2)
        relay.toml: sink.kafka.delivery = "exactly-twice": has to be one of at-least-once, exactly-once; did you mean "exactly-once"?
        sink.kafka.transactional_id is missing: sink.kafka.delivery = "exactly-once" needs a name that no other outbox on the Kafka cluster uses, such as "shop-relay"; two outboxes with the same one would shut each other out
        sink.kafka.transactional_id = "a b": 1 to 150 of A-Z, a-z, 0-9, ".", "_" and "-", for a topic is named after it
        sink.kafka.properties has "transactional.id": set sink.kafka.delivery = "exactly-once" and sink.kafka.transactional_id instead
        admin.token: the token is too easy to guess: it has to have at least 16 characters
        admin.token and admin.token_file are both set: take one of them away
        pipelines.orders.shards = 0: has to be 1 to 64
        pipelines.orders.shards = 65: has to be 1 to 64
        pipelines.orders.parked_max = 0: has to be at least 1; to set nothing aside say on_rejected = "halt" or "drop"
        pipelines.orders.dead_letter_topic is set and on_rejected is not "dead_letter": nothing would go there
        relay.toml: pipelines.orders.dead_letter_topic: the topic name has the character ' ', Kafka allows a-z, A-Z, 0-9, '.', '_' and '-'
        relay.toml: pipelines.orders.dead_letter_topic: topic names that begin with "__" belong to Kafka itself
        pipelines.orders.topic = "__{aggregate_type}": topic names that begin with "__" belong to Kafka itself: every event would be rejected
        pipelines.orders.topic = "a b/{aggregate_type}": the topic name has the character ' ', Kafka allows a-z, A-Z, 0-9, '.', '_' and '-': every event would be rejected
        relay.toml: pipelines.orders.on_rejected = "ignore": has to be one of park, dead_letter, drop, halt; there is park, dead_letter, drop, halt
        relay.redrive_rate = 0: has to be at least 1
    "#]].assert_eq(&lines);
}

#[test]
fn a_wrong_url_is_refused_without_repeating_it() {
    for url in [
        "mysql://u:planted-secret@h/d",
        "planted-secret",
        "postgres://u:planted-secret@h:notaport/d",
    ] {
        let error = load("", &[("RELAY_SOURCE__POSTGRES__URL", url)]).unwrap_err();
        assert!(
            error.starts_with("source.postgres.url is not a URL"),
            "{error}"
        );
        assert!(!error.contains("planted-secret"), "{error}");
    }
}

#[test]
fn an_empty_variable_is_not_set() {
    let level = ("RELAY_LOG__LEVEL", "");
    let types = ("RELAY_PIPELINE__FILTER__AGGREGATE_TYPES", "");
    let config = load("", &[URL, level, types]).unwrap();
    assert_eq!(config.log.level, "info");
    let refused = load("", &[("RELAY_SOURCE__POSTGRES__URL", "")]).unwrap_err();
    assert!(refused.contains("source.postgres.url"), "{refused}");
}

#[test]
fn one_underscore_too_few_is_refused() {
    for (given, meant) in [
        ("RELAY_SINK_KAFKA_BROKERS", "RELAY_SINK__KAFKA__BROKERS"),
        ("RELAY_SOURCE_POSTGRES_URL", "RELAY_SOURCE__POSTGRES__URL"),
        (
            "RELAY_PIPELINE_FILTER_AGGREGATE_TYPES",
            "RELAY_PIPELINE__FILTER__AGGREGATE_TYPES",
        ),
        ("RELAY_ADMIN_TOKEN_FILE", "RELAY_ADMIN__TOKEN_FILE"),
    ] {
        let refused = load("", &[URL, (given, "planted-secret")]).unwrap_err();
        assert_eq!(
            refused,
            format!("{given}: no such setting; did you mean {meant} (two underscores)?")
        );
    }
    // Of Kubernetes, for a service that is called "relay".
    for name in [
        "RELAY_SERVICE_HOST",
        "RELAY_PORT",
        "RELAY_PORT_9187_TCP_ADDR",
    ] {
        load("", &[URL, (name, "10.0.0.1")]).unwrap();
    }
}

#[test]
fn a_variable_that_is_no_setting_is_refused_with_the_nearest() {
    for (given, meant) in [
        ("RELAY_BROKERS", "RELAY_SINK__KAFKA__BROKERS?"),
        ("RELAY_KAFKA_BROKERS", "RELAY_SINK__KAFKA__BROKERS?"),
        ("RELAY_POSTGRES_URL", "RELAY_SOURCE__POSTGRES__URL?"),
        ("RELAY_LOG_LEVL", "RELAY_LOG__LEVEL?"),
        ("RELAY_FOO", "a variable is named after"),
        ("RELAY_LOG__LEVL", "did you mean \"level\"?"),
    ] {
        let refused = load("", &[URL, (given, "planted-secret")]).unwrap_err();
        assert!(refused.starts_with(&format!("{given}: ")), "{refused}");
        assert!(refused.contains(meant), "{refused}");
        assert!(!refused.contains("planted-secret"), "{refused}");
    }
}

#[test]
fn lists_and_properties_can_be_variables() {
    let types = |text: &str| {
        let types = ("RELAY_PIPELINES__ORDERS__FILTER__AGGREGATE_TYPES", text);
        let config = load("", &[URL, types]).unwrap();
        config.pipelines[0].pipeline.filter.aggregate_types.clone()
    };
    assert_eq!(types("order"), ["order"]);
    assert_eq!(types("order, cart,"), ["order", "cart"]);
    assert_eq!(types("[\"order\", \"cart\"]"), ["order", "cart"]);
    let kafka = |env: &[(&str, &str)]| {
        let mut all = vec![URL];
        all.extend_from_slice(env);
        match load("", &all).unwrap().sink {
            Sink::Kafka(kafka) => kafka,
            Sink::Stdout => panic!("the default sink is Kafka"),
        }
    };
    for name in [
        "RELAY_SINK__KAFKA__PROPERTIES__SOCKET_KEEPALIVE_ENABLE",
        "RELAY_SINK__KAFKA__PROPERTIES__SOCKET.KEEPALIVE.ENABLE",
    ] {
        let client = kafka(&[(name, "true")]).default_producer();
        assert_eq!(
            client.get("socket.keepalive.enable"),
            Some("true"),
            "{name}"
        );
    }
    let policy = "RELAY_SINK__KAFKA__TOPICS__CONFIG__CLEANUP_POLICY";
    let topics = kafka(&[(policy, "compact")]).topics.config;
    assert_eq!(topics["cleanup.policy"], "compact");
    let brokers = load("[sink.kafka]\nbrokers = [\"a:9092\", \"b:9092\"]", &[URL]).unwrap();
    let Sink::Kafka(brokers) = brokers.sink else {
        panic!("the default sink is Kafka")
    };
    assert_eq!(brokers.brokers, "a:9092,b:9092");
}

#[test]
fn wrong_types_are_told_in_plain_words() {
    let mut lines = String::new();
    for toml in [
        "[pipeline.filter]\naggregate_types = \"order\"",
        "[sink.kafka]\nbrokers = 10",
        "[sink.kafka]\nbrokers = { a = 1 }",
        "[sink.kafka]\nclient_id = [\"a\"]",
        "[relay]\npage_events = true",
        "[relay]\npage_events = -1",
        "[admin]\nenabled = 1",
        "[retention]\nkeep = 7",
        "log = 1",
    ] {
        lines += &load(toml, &[URL]).expect_err(toml);
        lines += "\n";
    }
    expect![[r#"
        relay.toml: pipeline.filter.aggregate_types = "order": has to be a list such as ["order", "customer"]
        relay.toml: sink.kafka.brokers = 10: has to be a text or a list such as ["kafka-1:9092", "kafka-2:9092"]
        relay.toml: sink.kafka.brokers = a table: has to be a text or a list such as ["kafka-1:9092", "kafka-2:9092"]
        relay.toml: sink.kafka.client_id = a list: has to be a text in quotes
        relay.toml: relay.page_events = true: has to be a whole number
        relay.toml: relay.page_events = -1: has to be a whole number
        relay.toml: admin.enabled = 1: has to be true or false
        relay.toml: retention.keep = 7: has to be a text in quotes
        relay.toml: log = 1: has to be a table
    "#]].assert_eq(&lines);
}

#[test]
fn a_secret_is_in_no_message() {
    let planted = "planted-secret";
    let secrets = [
        "[source.postgres]\nurl = {}",
        "[source.postgres]\ndirect_url = {}",
        "[sink.kafka.sasl]\npassword = {}",
        "[sink.kafka.tls]\nkey_password = {}",
        "[sink.kafka.properties]\n\"sasl.password\" = {}",
        "[admin]\ntoken = {}",
        "[sink.kafka]\nsasl = {}",
        "[sink.kafka]\ntls = {}",
        "[source]\npostgres = {}",
    ];
    for secret in secrets {
        let quoted = format!("\"{planted}\"");
        for value in [
            quoted.clone(),
            format!("[{quoted}]"),
            format!("{{ a = {quoted} }}"),
        ] {
            if let Err(refused) = load(&secret.replace("{}", &value), &[URL]) {
                assert!(!refused.contains(planted), "{secret} {value}: {refused}");
            }
        }
        // A syntax error, which quotes the line where the parser shows it.
        let broken = secret.replace("{}", &format!("{quoted} x"));
        let refused = load(&broken, &[URL]).unwrap_err();
        assert!(!refused.contains(planted), "{refused}");
        assert!(refused.contains("line 2"), "{refused}");
    }
}
