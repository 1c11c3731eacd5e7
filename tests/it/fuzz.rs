//! Whatever comes from outside: texts of people and writers. Anything may be refused, in one line; nothing may panic, and
//! what is accepted keeps its rules.
//!
//! `PROPTEST_CASES=1000000 cargo test --test it fuzz` looks longer; a failure prints the smallest input that shows it.

use std::io::Write;
use std::str::FromStr;

use bytestring::ByteString;
use outbox_relay::config::{Config, DEFAULTS};
use outbox_relay::encode::{Encoding, Format, Texts, encode};
use outbox_relay::event::{Event, EventId, Payload, PipelineName};
use outbox_relay::position::Snapshot;
use outbox_relay::route::{Route, Template, illegal_topic};
use proptest::prelude::*;
use uuid::Uuid;

const URL: &str = "postgres://relay:planted-secret@db/app";

fn load(toml: &str, env: Vec<(String, String)>) -> Result<Config, String> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(toml.as_bytes()).unwrap();
    let url = ("RELAY_SOURCE__POSTGRES__URL".to_owned(), URL.to_owned());
    Config::load(Some(file.path()), std::iter::once(url).chain(env))
        .map_err(|error| error.to_string())
}

/// A refusal is one line without a secret.
fn is_fit_to_print(loaded: Result<Config, String>) -> Result<(), TestCaseError> {
    let shown = match loaded {
        Ok(config) => format!("{config:?}"),
        Err(error) => {
            prop_assert_eq!(error.lines().count(), 1, "{}", error);
            error
        }
    };
    prop_assert!(!shown.contains("planted-secret"), "{}", shown);
    Ok(())
}

/// Values as people might mistype them.
fn value() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<i64>().prop_map(|n| n.to_string()),
        any::<f64>().prop_map(|x| format!("{x:?}")),
        any::<bool>().prop_map(|b| b.to_string()),
        "[a-z0-9]{0,12}".prop_map(|text| format!("{text:?}")),
        "\\PC{0,20}".prop_map(|text| format!("{text:?}")),
        Just("[]".to_owned()),
        Just("{ a = 1 }".to_owned()),
        Just("[[1], [2]]".to_owned()),
        Just("2026-01-31T00:00:00Z".to_owned()),
        "\\PC{0,20}",
    ]
}

/// The shipped file with one value replaced.
fn edited() -> impl Strategy<Value = String> {
    let settings: Vec<usize> = DEFAULTS
        .lines()
        .enumerate()
        .filter(|(_, line)| line.trim_start_matches("# ").contains(" = "))
        .map(|(number, _)| number)
        .collect();
    (prop::sample::select(settings), value()).prop_map(|(number, value)| {
        let mut lines: Vec<String> = DEFAULTS.lines().map(str::to_owned).collect();
        let line = lines[number].trim_start_matches("# ").to_owned();
        let key = line.split(" = ").next().unwrap_or_default();
        lines[number] = format!("{key} = {value}");
        lines.join("\n")
    })
}

fn event() -> impl Strategy<Value = Event> {
    let text = || "\\PC{0,300}".prop_map(ByteString::from);
    let payload = prop_oneof![
        Just(Payload::Tombstone),
        "\\PC{0,40}".prop_map(|text| Payload::Json(text.into())),
        prop::collection::vec(any::<u8>(), 0..40).prop_map(|bytes| Payload::Encoded(bytes.into())),
        Just(Payload::Ambiguous("1".into(), "2".into())),
    ];
    let headers = prop::option::of(prop_oneof![
        "\\PC{0,60}",
        prop::collection::btree_map("\\PC{0,10}", "\\PC{0,10}", 0..4)
            .prop_map(|map| serde_json::to_string(&map).unwrap()),
    ]);
    (
        any::<i64>(),
        (text(), text(), text()),
        payload,
        prop::option::of(text()),
        headers,
        any::<i64>(),
    )
        .prop_map(
            |(
                id,
                (aggregate_type, aggregate_id, event_type),
                payload,
                content_type,
                headers,
                occurred_at_us,
            )| Event {
                id: EventId(id),
                event_id: Uuid::from_u128(id.cast_unsigned().into()),
                aggregate_type,
                aggregate_id,
                event_type,
                payload,
                content_type,
                headers: headers.map(ByteString::from),
                occurred_at_us,
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_configuration_is_read_or_refused(toml in "\\PC{0,200}") {
        is_fit_to_print(load(&toml, Vec::new()))?;
    }

    #[test]
    fn any_value_of_any_setting_is_read_or_refused(toml in edited()) {
        is_fit_to_print(load(&toml, Vec::new()))?;
    }

    #[test]
    fn any_environment_is_read_or_refused(
        names in prop::collection::vec("[A-Z_]{0,10}", 1..4),
        text in "\\PC{0,20}",
    ) {
        let name = format!("RELAY_{}", names.join("__"));
        is_fit_to_print(load("", vec![(name, text)]))?;
    }

    #[test]
    fn any_template_is_read_or_refused_and_makes_legal_topics(text in "[a-z{}_.]{0,40}|\\PC{0,40}", event in event()) {
        let Ok(template) = Template::from_str(&text) else { return Ok(()) };
        prop_assert_eq!(Template::from_str(&template.to_string()), Ok(template.clone()));
        let route = Route { topic: template.clone(), key: template };
        if let Ok(topic) = route.topic(&event) {
            prop_assert_eq!(illegal_topic(&topic), None);
            prop_assert!((1..=249).contains(&topic.len()));
        }
    }

    #[test]
    fn any_event_is_encoded_or_rejected(event in event()) {
        let template = |text: &str| Template::from_str(text).unwrap();
        let route = Route { topic: template("all"), key: template("{aggregate_id}") };
        for format in [Format::Plain, Format::CloudeventsBinary, Format::CloudeventsJson] {
            let encoding = Encoding { format, cloudevents_source: "/shop".to_owned() };
            let texts = Texts::of(&event);
            let Ok(record) = encode(&event, &texts, &route, &encoding) else { continue };
            prop_assert!(record.timestamp_ms >= 0);
            prop_assert!(record.size_bytes() >= record.value.as_ref().map_or(0, |value| value.len()));
            let ids = record.headers.iter().filter(|(name, _)| name == "id" || name == "ce_id");
            prop_assert!(ids.count() <= 1, "nobody can forge the id");
        }
    }

    #[test]
    fn any_snapshot_is_read_or_refused(text in "[0-9:,]{0,30}|\\PC{0,30}") {
        if let Ok(snapshot) = Snapshot::from_str(&text) {
            let again = Snapshot::from_str(&snapshot.to_string());
            prop_assert_eq!(again, Ok(snapshot.clone()));
            prop_assert!(!snapshot.sees(snapshot.xmax));
        }
    }

    #[test]
    fn any_name_of_a_pipeline_is_taken_or_refused(text in "[a-z0-9_-]{0,70}|\\PC{0,20}") {
        if let Ok(name) = PipelineName::from_str(&text) {
            prop_assert!(!name.as_str().contains(['\'', '"', '\\', ' ', '/']));
        }
    }
}
