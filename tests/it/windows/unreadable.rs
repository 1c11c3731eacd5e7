//! Rows that can't be read, or should not be: each is one event that says why, and the log goes on behind it.

use outbox_relay::event::{Event, Payload, Rejection, Start};
use sqlx::postgres::PgConnection;

use super::database::{Database, from_environment, sql, with_database, with_database_in};
use super::schedules::{Relay, emit};

/// Everything up to an empty page.
async fn events(database: &Database) -> Vec<Event> {
    let mut relay = Relay::start(database, Start::Earliest).await;
    let mut all = Vec::new();
    loop {
        let page = relay.page(100).await;
        if page.events.is_empty() {
            return all;
        }
        all.extend(page.events.clone());
        relay.acknowledge(page.end).await;
    }
}

fn why(event: &Event) -> Option<&str> {
    match &event.payload {
        Payload::Unread(Rejection(why)) => Some(why),
        _ => None,
    }
}

async fn insert(connection: &mut PgConnection, columns: &str, values: &str) {
    let statement = format!(
        "insert into outbox.events (aggregate_type, event_type, aggregate_id{columns}) \
         values ('thing', 'changed', {values})"
    );
    sql(connection, &statement).await;
}

#[tokio::test]
async fn content_that_is_too_large_stays_in_the_log() {
    let test = "content_that_is_too_large_stays_in_the_log";
    with_database(test, async |database| {
        let mut writer = database.connect().await;
        let json = |bytes: u32| format!("'e', to_json(repeat('x', {bytes}))");
        sql(&mut writer, &emit(1)).await;
        insert(&mut writer, ", payload", &json(60_000_000)).await;
        insert(&mut writer, ", payload", &json(8_000_000)).await;
        // Bytes that no compression makes fewer.
        let random = "'e', decode(string_agg(md5(n::text), ''), 'hex')";
        let statement = format!(
            "insert into outbox.events (aggregate_type, event_type, aggregate_id, payload_bytes) \
             select 'thing', 'changed', {random} from generate_series(1, 600000) n"
        );
        sql(&mut writer, &statement).await;
        let headers = "'e', '{}', json_build_object('n', repeat('x', 9000000))";
        insert(&mut writer, ", payload, headers", headers).await;
        sql(&mut writer, &emit(2)).await;
        let events = events(database).await;
        let reasons: Vec<Option<&str>> = events.iter().map(why).collect();
        let large = |bytes: u32| {
            format!("too large: the event has {bytes} bytes, the relay reads events of 8388608 bytes at most")
        };
        let (json, bytes, headers) = (large(60_000_002), large(9_600_000), large(9_000_012));
        assert_eq!(
            reasons,
            [
                None,
                Some(&json[..]),
                None,
                Some(&bytes[..]),
                Some(&headers[..]),
                None
            ]
        );
        assert_eq!(events[2].payload.bytes().map(<[u8]>::len), Some(8_000_002));
    })
    .await;
}

#[tokio::test]
async fn names_that_are_too_long_name_an_entity_all_the_same() {
    let test = "names_that_are_too_long_name_an_entity_all_the_same";
    with_database(test, async |database| {
        let mut writer = database.connect().await;
        sql(&mut writer, &emit(1)).await;
        for entity in ["x", "y", "x"] {
            insert(&mut writer, "", &format!("repeat('{entity}', 100000)")).await;
        }
        insert(&mut writer, ", content_type", "'e', repeat('t', 100000)").await;
        sql(&mut writer, &emit(2)).await;
        let events = events(database).await;
        assert_eq!(events.len(), 6);
        for event in &events[1..5] {
            let why = why(event).expect("it is rejected");
            assert!(why.contains("a name of more than 65536 bytes"), "{why}");
        }
        assert!(events[1].aggregate_id.starts_with("sha256:"));
        assert_eq!(events[1].aggregate_id, events[3].aggregate_id);
        assert_ne!(events[1].aggregate_id, events[2].aggregate_id);
    })
    .await;
}

#[tokio::test]
async fn every_time_is_read() {
    let test = "every_time_is_read";
    with_database(test, async |database| {
        let mut writer = database.connect().await;
        for time in [
            "infinity",
            "-infinity",
            "294276-12-31",
            "4713-01-01 BC",
            "epoch",
        ] {
            insert(&mut writer, ", occurred_at", &format!("'e', '{time}'")).await;
        }
        let events = events(database).await;
        let times: Vec<i64> = events.iter().map(|event| event.occurred_at_us).collect();
        assert_eq!(times.len(), 5);
        assert_eq!((times[0], times[1], times[4]), (i64::MAX, i64::MIN, 0));
    })
    .await;
}

/// The server refuses to send the row, and with it the page.
#[tokio::test]
async fn a_row_that_the_server_can_not_send_is_found_among_others() {
    let test = "a_row_that_the_server_can_not_send_is_found_among_others";
    let Some(server) = from_environment("DATABASE_URL", test) else {
        return;
    };
    with_database_in(server, "SQL_ASCII", async |database| {
        let mut writer = database.connect().await;
        let many = "insert into outbox.events (aggregate_type, event_type, aggregate_id, payload) \
                    select 'thing', 'changed', n::text, '{}' from generate_series(1, 300) n";
        sql(&mut writer, many).await;
        insert(
            &mut writer,
            ", payload",
            "convert_from('\\x636166e9', 'SQL_ASCII'), '{}'",
        )
        .await;
        insert(
            &mut writer,
            ", headers",
            "'e', convert_from('\\x7b2261223a22e9227d', 'SQL_ASCII')::json",
        )
        .await;
        sql(&mut writer, many).await;
        let events = events(database).await;
        assert_eq!(events.len(), 602);
        let unread: Vec<(usize, &str)> = events
            .iter()
            .enumerate()
            .filter_map(|(n, event)| Some((n, why(event)?)))
            .collect();
        assert_eq!(
            unread.iter().map(|(n, _)| *n).collect::<Vec<_>>(),
            [300, 301]
        );
        assert!(unread[0].1.contains("invalid byte sequence"), "{unread:?}");
        assert_eq!(events[300].aggregate_id, "caf\\xe9");
        assert_eq!(events[301].aggregate_id, "e");
    })
    .await;
}
