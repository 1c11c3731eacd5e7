//! What `outbox.emit`, an insert and a copy take from a writer, what they refuse, and what they give back.

use sqlx::Connection;
use sqlx::postgres::PgConnection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};

use outbox_relay::encode::{RESERVED_HEADERS, parse_headers};

use crate::fresh::{self, all_refused, run, value, values};

const REFUSED: &str = "22023";

#[tokio::test]
async fn ids_and_payloads_of_any_usual_type_are_taken() {
    fresh::database("emit::ids_and_payloads_of_any_usual_type_are_taken", async |database| {
        let mut writer = database.writer("writer").await;
        for call in [
            "emit('order', 17, 'a', '{\"id\":17}')",
            "emit('order', 17::bigint, 'b', jsonb_build_object('id', 17))",
            "emit('order', 17::smallint, 'c', json_build_object('id', 17))",
            "emit('order', '17', 'd', jsonb_build_object('id', 17), jsonb_build_object('h', 1))",
            "emit('order', '0b5cf1ae-0b5c-4f1a-8b5c-f1ae0b5cf1ae'::uuid, 'e', null, '{\"h\": \"1\"}')",
            "emit('order', '17'::varchar, 'f', '{\"id\":17}'::varchar)",
            "emit('order', '17', 'g')",
            "emit('order', 17, 'h', null)",
            "emit(aggregate_type => 'order', aggregate_id => 17, event_type => 'i', headers => '{\"h\": \"1\"}')",
            "emit_bytes('order', 17, 'j', '\\x00', 'x/y')",
        ] {
            run(&mut writer, &format!("select outbox.{call}")).await;
        }
        // As drivers send it that leave types to the server.
        run(
            &mut writer,
            "prepare untyped as select outbox.emit($1, $2, $3, $4, $5); \
             execute untyped('order', '17', 'k', '{\"id\":  17}', null)",
        )
        .await;
        let stored = values(
            &mut database.superuser().await,
            "select concat_ws('|', event_type, aggregate_id, payload, headers) from outbox.events order by id",
        )
        .await;
        assert_eq!(
            stored,
            [
                r#"a|17|{"id":17}"#,
                r#"b|17|{"id": 17}"#,
                r#"c|17|{"id" : 17}"#,
                r#"d|17|{"id": 17}|{"h": 1}"#,
                r#"e|0b5cf1ae-0b5c-4f1a-8b5c-f1ae0b5cf1ae|{"h": "1"}"#,
                r#"f|17|{"id":17}"#,
                "g|17",
                "h|17",
                r#"i|17|{"h": "1"}"#,
                "j|17",
                r#"k|17|{"id":  17}"#,
            ]
        );
    })
    .await;
}

#[tokio::test]
async fn headers_that_can_never_leave_are_refused_by_name() {
    fresh::database("emit::headers_that_can_never_leave_are_refused_by_name", async |database| {
        let mut writer = database.writer("writer").await;
        let cases = [
            (r#"{"a": {"b": 1}}"#, REFUSED, "the header \"a\" is an object"),
            (r#"{"ok": "1", "a": [1]}"#, REFUSED, "the header \"a\" is an array"),
            (r#"{"": "x"}"#, REFUSED, "it has no name"),
            (r#"[1]"#, REFUSED, "headers must be a JSON object of texts, got array"),
            (r#" "x""#, REFUSED, "headers must be a JSON object of texts, got string"),
            (r#"7"#, REFUSED, "headers must be a JSON object of texts, got number"),
            (r#"{"a": "\ud800"}"#, "22P02", "invalid input syntax for type json"),
            (r#"{"a\u0000": "x"}"#, REFUSED, "its name has a zero byte"),
        ];
        for (headers, code, message) in cases {
            let quoted = headers.replace('\'', "''");
            for statement in [
                format!("select outbox.emit('a', 'b', 'c', '{{}}', '{quoted}')"),
                format!("select outbox.emit_bytes('a', 'b', 'c', '', 'x/y', '{quoted}')"),
                format!(
                    "insert into outbox.events (aggregate_type, aggregate_id, event_type, headers) \
                     values ('a', 'b', 'c', '{quoted}')"
                ),
                format!("select outbox.context('{quoted}')"),
            ] {
                all_refused(&mut writer, &[(&statement, code, message)]).await;
            }
            let copied = copy(&mut writer, headers).await.unwrap_err();
            let error = copied.as_database_error().expect("refused by the server");
            assert_eq!(error.code().as_deref(), Some(code), "{headers}: {error}");
            assert!(error.message().contains(message), "{headers}: {error}");
        }
        for name in RESERVED_HEADERS {
            let statement = format!("select outbox.emit('a', 'b', 'c', '{{}}', '{{\"{name}\": \"x\"}}')");
            let message = format!("the header \"{name}\" can't be emitted: the name belongs to the relay");
            all_refused(&mut writer, &[(&statement, REFUSED, &message)]).await;
            // Also where the quick look does not suffice.
            let statement = statement.replace("{\"", "{\"a\": \"[\", \"");
            all_refused(&mut writer, &[(&statement, REFUSED, &message)]).await;
        }
        assert_eq!(value(&mut database.superuser().await, "select count(*)::text from outbox.events").await, "0");
    })
    .await;
}

async fn copy(writer: &mut PgConnection, headers: &str) -> Result<u64, sqlx::Error> {
    let mut copy = writer
        .copy_in_raw(
            "copy outbox.events (aggregate_type, aggregate_id, event_type, headers) from stdin",
        )
        .await?;
    let escaped = headers
        .replace('\\', "\\\\")
        .replace('\n', "\\n")
        .replace('\t', "\\t");
    let row = format!("a\tb\tc\t{}\n", escaped);
    copy.send(row.as_bytes()).await?;
    copy.finish().await
}

/// What the database takes, the relay can send.
#[tokio::test]
async fn headers_that_are_taken_can_leave() {
    fresh::database("emit::headers_that_are_taken_can_leave", async |database| {
        let mut writer = database.writer("writer").await;
        let cases = [
            r#"{"n": 5, "f": 1.50e3, "t": true, "none": null}"#,
            r#"{"brackets": "a{b}[c]", "escapes": "\"\\\ud83d\uddfd"}"#,
            r#"{ "ce_tenant": "acme", "ID": "x", "Type": "y", "ids": "id", "type ": "id" }"#,
            r#"{"a": "1", "a": "2"}"#,
            r#"{"zero": "\u0000", "backslash": "\\u0000"}"#,
            "{}",
            " \n{\t}",
        ];
        for headers in cases {
            run(
                &mut writer,
                &format!("select outbox.emit('a', 'b', 'c', '1', '{headers}')"),
            )
            .await;
            copy(&mut writer, headers).await.expect(headers);
        }
        let stored = values(
            &mut database.superuser().await,
            "select headers::text from outbox.events order by id",
        )
        .await;
        assert_eq!(stored.len(), 2 * cases.len());
        for headers in &stored {
            parse_headers(Some(headers)).unwrap_or_else(|error| panic!("{headers}: {error}"));
        }
    })
    .await;
}

#[tokio::test]
async fn the_context_of_another_transaction_is_void() {
    fresh::database("emit::the_context_of_another_transaction_is_void", async |database| {
        let mut writer = database.writer("writer").await;
        // A service that leaves its settings in the session, which a pooler then gives to another service.
        run(&mut writer, r#"set outbox.context = '{"tenant": "stranger"}'"#).await;
        run(&mut writer, "select outbox.emit('order', '1', 'emit', '1')").await;
        run(
            &mut writer,
            r#"begin; select outbox.context('{"tenant": "stranger"}');
               select set_config('outbox.context', current_setting('outbox.context'), false),
                      set_config('outbox.context_of', current_setting('outbox.context_of'), false); commit"#,
        )
        .await;
        assert_eq!(value(&mut writer, "select current_setting('outbox.context')").await, r#"{"tenant": "stranger"}"#);
        run(&mut writer, "select outbox.emit('order', '1', 'emit', '1')").await;
        run(&mut writer, "select outbox.emit('order', '1', 'emit', '1', '{\"own\": \"1\"}')").await;
        run(&mut writer, "insert into outbox.events (aggregate_type, aggregate_id, event_type) values ('order', '1', 'insert')")
            .await;
        run(
            &mut writer,
            r#"begin; select outbox.context('{"tenant": "a"}'); select outbox.emit('order', '1', 'emit'); commit"#,
        )
        .await;
        let headers = values(
            &mut database.superuser().await,
            "select coalesce(headers::text, 'none') from outbox.events order by id",
        )
        .await;
        assert_eq!(headers, ["none", "none", r#"{"own": "1"}"#, "none", r#"{"tenant": "a"}"#]);
    })
    .await;
}

/// As an ORM asks for what the server has filled in.
#[tokio::test]
async fn writers_read_back_what_the_server_filled_in() {
    fresh::database("emit::writers_read_back_what_the_server_filled_in", async |database| {
        let mut writer = database.writer("writer").await;
        let insert = "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload) values ('a', 'b', 'c', '{}')";
        for column in ["id", "event_id", "occurred_at"] {
            let returned = value(&mut writer, &format!("{insert} returning {column}::text")).await;
            assert!(!returned.is_empty(), "{column}");
        }
        for column in ["payload", "headers", "aggregate_id", "*"] {
            let statement = format!("{insert} returning {column}");
            all_refused(&mut writer, &[(&statement, "42501", "permission denied for table events")]).await;
        }
    })
    .await;
}

#[tokio::test]
async fn sqlite_refuses_headers_that_can_never_leave() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("shop.db");
    let options = SqliteConnectOptions::new()
        .filename(&file)
        .create_if_missing(true);
    outbox_relay::migrate::sqlite(options.clone())
        .await
        .unwrap();
    let mut writer = SqliteConnection::connect_with(&options).await.unwrap();
    let mut insert = async |headers: String| {
        sqlx::query("insert into outbox_events (aggregate_type, aggregate_id, event_type, headers) values ('a', 'b', 'c', ?1)")
            .bind(headers)
            .execute(&mut writer)
            .await
            .map_err(|error| error.to_string())
    };
    for (headers, reason) in [
        (r#"{"a": {"b": 1}}"#, "a header is an object or an array"),
        (r#"{"a": [1]}"#, "a header is an object or an array"),
        (r#"{"": "x"}"#, "has no name"),
        ("[1]", "headers must be a JSON object of texts"),
        ("7", "headers must be a JSON object of texts"),
        ("{", "events_headers_is_json"),
    ] {
        let refused = insert(headers.to_owned()).await.unwrap_err();
        assert!(refused.contains(reason), "{headers}: {refused}");
    }
    for name in RESERVED_HEADERS {
        let refused = insert(format!("{{\"{name}\": \"x\"}}")).await.unwrap_err();
        assert!(
            refused.contains("a name that belongs to the relay"),
            "{name}: {refused}"
        );
    }
    insert(r#"{"n": 5, "t": true, "none": null, "ce_tenant": "a{[", "ID": "x"}"#.to_owned())
        .await
        .unwrap();
}
