use bytes::Bytes;
use expect_test::{Expect, expect};

use super::*;
use crate::event::EventId;

fn event(payload: Payload, headers: Option<&'static str>) -> Event {
    Event {
        id: EventId(42),
        event_id: uuid::Uuid::from_u128(0x1234_5678_9abc_4def_8123_4567_89ab_cdef),
        aggregate_type: "order".into(),
        aggregate_id: "17".into(),
        event_type: "placed".into(),
        payload,
        content_type: None,
        headers: headers.map(Into::into),
        occurred_at_us: 1_700_000_000_123_456,
    }
}

fn json(text: &'static str) -> Payload {
    Payload::Json(Bytes::from_static(text.as_bytes()))
}

fn check(event: &Event, format: Format, expected: &Expect) {
    let route = Route {
        topic: "{aggregate_type}".parse().unwrap(),
        key: "{aggregate_id}".parse().unwrap(),
    };
    let encoding = Encoding {
        format,
        cloudevents_source: "/shop".to_owned(),
    };
    let shown = match encode(event, &Texts::of(event), &route, &encoding) {
        Err(rejection) => format!("rejected: {rejection}\n"),
        Ok(record) => {
            let text = |bytes: &Option<Cow<'_, [u8]>>| {
                bytes.as_ref().map_or("null".to_owned(), |b| {
                    String::from_utf8_lossy(b).into_owned()
                })
            };
            let mut shown = format!(
                "{} {} @{}\n",
                record.topic,
                text(&record.key),
                record.timestamp_ms
            );
            for (name, value) in &record.headers {
                shown = shown + name + ": " + &text(value) + "\n";
            }
            shown + &text(&record.value) + "\n"
        }
    };
    expected.assert_eq(&shown);
}

#[test]
fn plain_leaves_the_payload_as_it_was_written() {
    let odd = json(r#"{ "n": 9007199254740993, "n": 1.10, "zero": "\u0000" }"#);
    check(
        &event(
            odd,
            Some(r#"{"tenant": "acme", "empty": "", "null": null}"#),
        ),
        Format::Plain,
        &expect![[r#"
            order 17 @1700000000123
            id: 12345678-9abc-4def-8123-456789abcdef
            type: placed
            sequence: 42
            tenant: acme
            empty: 
            null: null
            { "n": 9007199254740993, "n": 1.10, "zero": "\u0000" }
        "#]],
    );
}

#[test]
fn no_payload_is_a_tombstone_in_every_format() {
    for format in [
        Format::Plain,
        Format::CloudeventsBinary,
        Format::CloudeventsJson,
    ] {
        let event = event(Payload::Tombstone, None);
        let route = Route {
            topic: "{aggregate_type}".parse().unwrap(),
            key: "{aggregate_id}".parse().unwrap(),
        };
        let encoding = Encoding {
            format,
            cloudevents_source: "/shop".to_owned(),
        };
        assert_eq!(
            encode(&event, &Texts::of(&event), &route, &encoding)
                .unwrap()
                .value,
            None,
            "{format:?}"
        );
    }
}

#[test]
fn an_empty_payload_is_not_a_tombstone() {
    check(
        &event(Payload::Encoded(Bytes::new()), None),
        Format::Plain,
        &expect![[r#"
            order 17 @1700000000123
            id: 12345678-9abc-4def-8123-456789abcdef
            type: placed
            sequence: 42

        "#]],
    );
}

#[test]
fn cloudevents_binary_puts_attributes_into_headers() {
    check(
        &event(json("{}"), Some(r#"{"traceparent": "00-1"}"#)),
        Format::CloudeventsBinary,
        &expect![[r#"
            order 17 @1700000000123
            ce_specversion: 1.0
            ce_id: 12345678-9abc-4def-8123-456789abcdef
            ce_source: /shop
            ce_type: placed
            ce_time: 2023-11-14T22:13:20.123456Z
            ce_sequence: 42
            ce_subject: 17
            content-type: application/json
            traceparent: 00-1
            {}
        "#]],
    );
}

#[test]
fn cloudevents_json_embeds_the_payload() {
    check(
        &event(json(r#"{"n": 9007199254740993}"#), None),
        Format::CloudeventsJson,
        &expect![[r#"
            order 17 @1700000000123
            content-type: application/cloudevents+json; charset=UTF-8
            {"specversion":"1.0","id":"12345678-9abc-4def-8123-456789abcdef","source":"/shop","type":"placed","subject":"17","time":"2023-11-14T22:13:20.123456Z","sequence":"42","datacontenttype":"application/json","data":{"n": 9007199254740993}}
        "#]],
    );
    check(
        &event(Payload::Encoded(Bytes::from_static(b"\xff\x00")), None),
        Format::CloudeventsJson,
        &expect![[r#"
            order 17 @1700000000123
            content-type: application/cloudevents+json; charset=UTF-8
            {"specversion":"1.0","id":"12345678-9abc-4def-8123-456789abcdef","source":"/shop","type":"placed","subject":"17","time":"2023-11-14T22:13:20.123456Z","sequence":"42","datacontenttype":"application/octet-stream","data_base64":"/wA="}
        "#]],
    );
}

#[test]
fn headers_that_are_not_an_object_of_strings_are_rejected() {
    for (headers, reason) in [
        ("[]", "invalid type: sequence, expected an object"),
        (r#""x""#, "invalid type: string"),
        (r#"{"a": {}}"#, "the header \"a\" is an object or an array"),
        (
            r#"{"a": 1, "b": [1]}"#,
            "the header \"b\" is an object or an array",
        ),
        (r#"{"a": "\ud800", "b": 1}"#, "the headers can't be read"),
        (r#"{"": "x"}"#, "can't be the name of a header"),
        ("{\"a\\u0000\": \"x\"}", "can't be the name of a header"),
    ] {
        let Err(rejection) = parse_headers(Some(headers)) else {
            panic!("{headers} was accepted");
        };
        assert!(
            rejection.to_string().contains(reason),
            "{headers}: {rejection}"
        );
    }
}

#[test]
fn numbers_and_booleans_leave_as_their_json_text() {
    let headers = r#"{"n": 5, "big": 12345678901234567890123, "f": 1.50e3, "t": true, "s": "a\"b", "none": null}"#;
    let own = parse_headers(Some(headers)).unwrap();
    let own: Vec<(&str, Option<&str>)> = own
        .iter()
        .map(|(n, v)| (n.as_ref(), v.as_deref()))
        .collect();
    assert_eq!(
        own,
        [
            ("n", Some("5")),
            ("big", Some("12345678901234567890123")),
            ("f", Some("1.50e3")),
            ("t", Some("true")),
            ("s", Some("a\"b")),
            ("none", None),
        ]
    );
}

#[test]
fn two_payloads_are_rejected() {
    let both = Payload::Ambiguous(Bytes::from_static(b"{}"), Bytes::from_static(b"x"));
    check(
        &event(both, None),
        Format::Plain,
        &expect![[r#"
        rejected: payload and payload_bytes are both set
    "#]],
    );
}

#[test]
fn times_that_kafka_or_rfc_3339_cannot_write_are_bounded() {
    let mut ancient = event(json("{}"), None);
    ancient.occurred_at_us = -5;
    let mut never = event(json("{}"), None);
    never.occurred_at_us = i64::MAX;
    assert_eq!(rfc3339(&ancient), "1970-01-01T00:00:00.000000Z");
    assert_eq!(rfc3339(&never), "9999-12-31T23:59:59.999999Z");
}

#[test]
fn an_event_without_a_type_is_no_cloudevent() {
    let mut nameless = event(json("{}"), None);
    nameless.event_type = bytestring::ByteString::new();
    for format in [Format::CloudeventsBinary, Format::CloudeventsJson] {
        check(
            &nameless,
            format,
            &expect![[r#"
                rejected: CloudEvents have a type, and event_type is empty
            "#]],
        );
    }
}

#[test]
fn extensions_pass_and_names_of_the_relay_are_refused() {
    let with = |headers: &'static str| event(json("1"), Some(headers));
    let route = Route {
        topic: "{aggregate_type}".parse().unwrap(),
        key: "{aggregate_id}".parse().unwrap(),
    };
    for format in [
        Format::Plain,
        Format::CloudeventsBinary,
        Format::CloudeventsJson,
    ] {
        let encoding = Encoding {
            format,
            cloudevents_source: "/shop".to_owned(),
        };
        let event = with(r#"{"ce_traceparent": "00-1"}"#);
        let texts = Texts::of(&event);
        let record = encode(&event, &texts, &route, &encoding).unwrap();
        let header = record
            .headers
            .iter()
            .find(|(name, _)| name == "ce_traceparent");
        assert_eq!(header.unwrap().1.as_deref(), Some(&b"00-1"[..]));
        if format == Format::CloudeventsJson {
            let value = String::from_utf8_lossy(record.value.as_deref().unwrap()).into_owned();
            assert!(value.contains(r#""traceparent":"00-1""#), "{value}");
        }
        for reserved in [r#"{"id": "1"}"#, r#"{"ce_time": "now"}"#] {
            let event = with(reserved);
            let texts = Texts::of(&event);
            let refused = encode(&event, &texts, &route, &encoding).unwrap_err();
            assert!(
                refused.to_string().contains("belongs to the relay"),
                "{refused}"
            );
        }
    }
}
