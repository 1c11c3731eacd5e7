//! `CloudEvents`, judged by somebody else: the SDK of that project for Python.

use std::env;
use std::io::Write;
use std::process::{Command, Stdio};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use outbox_relay::encode::{Encoding, Format, Texts, encode};
use outbox_relay::event::{Event, EventId, Payload};
use outbox_relay::route::Route;
use serde_json::{Value, json};
use uuid::Uuid;

use super::cluster::skip;

/// Reads records, one JSON object a line, and prints the events that the SDK makes of them.
const PYTHON: &str = r#"
import base64, json, sys
from cloudevents.core.bindings.kafka import KafkaMessage, from_kafka
from cloudevents.core.formats.json import JSONFormat

for line in sys.stdin:
    record = json.loads(line)
    headers = {name: base64.b64decode(value) for name, value in record["headers"]}
    value = None if record["value"] is None else base64.b64decode(record["value"])
    event = from_kafka(KafkaMessage(headers, base64.b64decode(record["key"]), value), JSONFormat())
    attributes = dict(event.get_attributes())
    attributes["time"] = attributes["time"].isoformat()
    data = event.get_data()
    if isinstance(data, bytes):
        data = {"base64": base64.b64encode(data).decode()}
    print(json.dumps({"attributes": attributes, "data": data}))
"#;

#[test]
fn the_sdk_reads_what_was_written() {
    const TEST: &str = "kafka::cloudevents::the_sdk_reads_what_was_written";
    let python = env::var("PYTHON_BIN").unwrap_or("python3".to_owned());
    let import = ["-c", "import cloudevents.core.bindings.kafka"];
    let found = Command::new(&python)
        .args(import)
        .stderr(Stdio::null())
        .status();
    if !found.is_ok_and(|status| status.success()) {
        return skip(TEST, &format!("{python} has no cloudevents 2"));
    }
    let events = events();
    let formats = [Format::CloudeventsBinary, Format::CloudeventsJson];
    let mut expected = Vec::new();
    let mut records = String::new();
    for event in &events {
        for format in formats {
            records += &(record(event, format).to_string() + "\n");
            expected.push(expected_of(event));
        }
    }
    let read = run(&python, &records);
    for (read, expected) in read.iter().zip(&expected) {
        assert_eq!(read, expected);
    }
    assert_eq!(read.len(), expected.len());
}

fn events() -> Vec<Event> {
    let event = |payload: Payload| Event {
        id: EventId(42),
        event_id: Uuid::from_u128(0x1234_5678_9abc_4def_8123_4567_89ab_cdef),
        aggregate_type: "order".into(),
        aggregate_id: "17".into(),
        event_type: "com.example.order.placed".into(),
        payload,
        content_type: None,
        headers: Some(r#"{"tenant":"blue","traceparent":"00-ab-cd-01"}"#.into()),
        occurred_at_us: 1_700_000_000_123_456,
    };
    let json = |text: &'static str| Payload::Json(Bytes::from_static(text.as_bytes()));
    let encoded = |bytes: &'static [u8]| Payload::Encoded(Bytes::from_static(bytes));
    vec![
        event(json(
            r#"{"total": 12.5, "lines": [1, null, "größe"], "deep": {"er": true}}"#,
        )),
        event(json("[]")),
        event(json(r#""text""#)),
        event(json("17")),
        event(encoded(b"\0\x01\xfe\xff")),
        Event {
            content_type: Some("application/avro".into()),
            ..event(encoded(b"Obj\x01\xff"))
        },
        Event {
            content_type: Some("application/vnd.shop+json".into()),
            ..event(json(r#"{"a":1}"#))
        },
        Event {
            // Without a subject, and without any headers of its own.
            aggregate_id: "".into(),
            headers: None,
            ..event(json("{}"))
        },
        Event {
            aggregate_id: "größe 注文".into(),
            event_type: "größe".into(),
            occurred_at_us: 1,
            ..event(json("{}"))
        },
    ]
}

/// The record as it travels.
fn record(event: &Event, format: Format) -> Value {
    let route = Route {
        topic: "{aggregate_type}".parse().expect("a template"),
        key: "{aggregate_id}".parse().expect("a template"),
    };
    let encoding = Encoding {
        format,
        cloudevents_source: "/shop/orders".to_owned(),
    };
    let texts = Texts::of(event);
    let record = encode(event, &texts, &route, &encoding).expect("a record");
    let base64 = |bytes: &[u8]| BASE64_STANDARD.encode(bytes);
    json!({
        "key": record.key.as_deref().map(base64),
        "value": record.value.as_deref().map(base64),
        "headers": record
            .headers
            .iter()
            .map(|(name, value)| json!([name, value.as_deref().map(base64)]))
            .collect::<Vec<_>>(),
    })
}

/// What a consumer should see, in both formats.
fn expected_of(event: &Event) -> Value {
    let (data, content_type) = match &event.payload {
        Payload::Json(json) => {
            let data = serde_json::from_slice(json).expect("JSON");
            (data, "application/json")
        }
        Payload::Encoded(bytes) => (
            json!({ "base64": BASE64_STANDARD.encode(bytes) }),
            "application/octet-stream",
        ),
        payload => panic!("{payload:?}"),
    };
    let time = match event.occurred_at_us {
        1 => "1970-01-01T00:00:00.000001+00:00",
        _ => "2023-11-14T22:13:20.123456+00:00",
    };
    let mut attributes = json!({
        "specversion": "1.0",
        "id": event.event_id.to_string(),
        "source": "/shop/orders",
        "type": &*event.event_type,
        "time": time,
        "sequence": event.id.to_string(),
        "datacontenttype": event.content_type.as_deref().unwrap_or(content_type),
        // The SDK's own, made of the key.
        "partitionkey": &*event.aggregate_id,
    });
    if !event.aggregate_id.is_empty() {
        attributes["subject"] = json!(&*event.aggregate_id);
    }
    json!({ "attributes": attributes, "data": data })
}

fn run(python: &str, records: &str) -> Vec<Value> {
    let mut child = Command::new(python)
        .args(["-c", PYTHON])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start Python");
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all(records.as_bytes()).expect("write records");
    drop(stdin);
    let output = child.wait_with_output().expect("Python ends");
    let printed = String::from_utf8(output.stdout).expect("text");
    let problem = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{printed}{problem}");
    let lines = printed.lines();
    lines
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect()
}
