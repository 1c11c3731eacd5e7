//! Columns to which somebody gave another type.

use outbox_relay::event::{Payload, Start};

use super::database::{sql, with_database};
use super::schedules::Relay;

/// On the wire a jsonb has a version before its text, and a number is no digits: neither must be taken for what it is not.
#[tokio::test]
async fn kindred_types_are_read_as_what_they_should_be() {
    with_database("kindred_types", async |database| {
        let mut writer = database.connect().await;
        let alter = "alter table outbox.events drop constraint events_headers_can_leave, \
             alter column payload type jsonb, alter column headers drop default, alter column headers type jsonb, \
             alter column aggregate_type type varchar(20), alter column aggregate_id type bigint using 1";
        sql(&mut writer, alter).await;
        let mut relay = Relay::start(database, Start::Earliest).await;
        let insert = "insert into outbox.events \
             (aggregate_type, aggregate_id, event_type, payload, headers) \
             values ('thing', 48, 'changed', '{\"a\":1}', '{\"b\":\"2\"}')";
        sql(&mut writer, insert).await;
        let page = relay.page(10).await;
        let [event] = &page.events[..] else {
            panic!("{:?}", page.events);
        };
        assert_eq!(event.aggregate_type, "thing");
        assert_eq!(event.aggregate_id, "48");
        assert_eq!(event.payload, Payload::Json(r#"{"a": 1}"#.into()));
        assert_eq!(event.headers.as_deref(), Some(r#"{"b": "2"}"#));
    })
    .await;
}
