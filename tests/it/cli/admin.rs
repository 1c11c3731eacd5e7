//! The HTTP interface against clients of every kind, and that nothing it or the daemon says holds a secret.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::{Value, json};
use sqlx::{Connection, SqliteConnection};
use tempfile::TempDir;
use tokio::time::Instant;

use super::status::{Daemon, free_address, until};
use super::{NOBODY, PLANTED, program, relay};

const TOKEN: &str = "planted-secret-of-the-admin";

/// A daemon over a SQLite file in which an event can't be published and another waits behind it.
struct Shop {
    folder: TempDir,
    address: String,
    daemon: Option<Daemon>,
}

impl Shop {
    async fn open(extra: &[(&str, &str)]) -> Self {
        let mut shop = Self::closed().await;
        shop.start(extra).await;
        shop
    }

    /// The events are there, and no daemon.
    async fn closed() -> Self {
        let shop = Self {
            folder: tempfile::tempdir().unwrap(),
            address: free_address(),
            daemon: None,
        };
        let path = shop.path("shop.db");
        relay(&["migrate"], &shop.env(&path, &[]))
            .await
            .ends_with(0);
        let options = sqlx::sqlite::SqliteConnectOptions::new().filename(&path);
        let mut writer = SqliteConnection::connect_with(&options).await.unwrap();
        sqlx::raw_sql(
            "drop trigger outbox_events_headers_can_leave; \
             insert into outbox_events (aggregate_type, aggregate_id, event_type, payload, headers) values \
                ('order', '17', 'placed', '{\"card\": \"planted-secret\"}', '[1]'), \
                ('order', '17', 'paid', '2', null), ('order', '18', 'paid', '3', null)",
        )
        .execute(&mut writer)
        .await
        .unwrap();
        shop
    }

    async fn start(&mut self, extra: &[(&str, &str)]) {
        self.start_until(extra, |seen| {
            seen["books"]["pipelines"][0]["last_id"] == 3 && seen["daemon"]["ready"] == true
        })
        .await;
    }

    async fn start_until(&mut self, extra: &[(&str, &str)], fact: impl Fn(&Value) -> bool) {
        let path = self.path("shop.db");
        let env = self.env(&path, extra);
        let mut command = program(&["run"], &env);
        command
            .stdout(File::create(self.path("out")).unwrap())
            .stderr(File::create(self.path("log")).unwrap());
        let daemon = Daemon(command.spawn().unwrap());
        until(&env, fact).await;
        self.daemon = Some(daemon);
    }

    fn env<'a>(&'a self, path: &'a str, extra: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
        let mut env = vec![
            ("RELAY_SOURCE__KIND", "sqlite"),
            ("RELAY_SOURCE__SQLITE__PATH", path),
            ("RELAY_SINK__KIND", "stdout"),
            ("RELAY_RELAY__LEASE_TTL", "5s"),
            ("RELAY_ADMIN__LISTEN", &self.address),
        ];
        env.extend_from_slice(extra);
        env
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    async fn database(&self) -> SqliteConnection {
        let options = sqlx::sqlite::SqliteConnectOptions::new().filename(self.path("shop.db"));
        SqliteConnection::connect_with(&options).await.unwrap()
    }
}

/// The code and the body of an answer.
fn ask(address: &str, request: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    // The answer may come before the end of the request, and the connection may be closed then.
    let _ = stream.write_all(request.as_bytes());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("{answer:?}"));
    let code = head.split(' ').nth(1).unwrap().parse().unwrap();
    (code, body.to_owned())
}

fn get(address: &str, path: &str, header: &str) -> (u16, String) {
    ask(
        address,
        &format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{header}\r\n"),
    )
}

fn post(address: &str, path: &str, token: Option<&str>, body: &str) -> (u16, Value) {
    let token = token.map_or(String::new(), |token| {
        format!("authorization: Bearer {token}\r\n")
    });
    let (code, body) = ask(
        address,
        &format!(
            "POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n{token}\r\n{body}",
            body.len()
        ),
    );
    (
        code,
        serde_json::from_str(&body).unwrap_or(Value::String(body)),
    )
}

#[tokio::test]
async fn parked_events_are_seen_and_redriven_over_http() {
    let shop = Shop::open(&[("RELAY_ADMIN__TOKEN", TOKEN)]).await;
    let address = &shop.address;
    let authorized = format!("authorization: Bearer {TOKEN}\r\n");
    let (code, body) = get(address, "/parked?entity=order/17", &authorized);
    let list: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((code, &list["total"]), (200, &json!(1)));
    assert_eq!(
        (
            &list["events"][0]["id"],
            &list["events"][0]["waiting_events"]
        ),
        (&json!(1), &json!(1))
    );
    let (_, body) = get(address, "/parked/main/1", &authorized);
    let shown: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(
        (&shown["headers"], &shown["attempts"]),
        (&json!("[1]"), &json!(1))
    );
    assert!(shown["payload"].as_str().unwrap().contains("card"));
    assert_eq!(get(address, "/parked/main/7", &authorized).0, 404);

    let all = r#"{"all": true, "reason": "mended"}"#;
    for path in ["/parked/redrive", "/parked/drop"] {
        for token in [
            None,
            Some("wrong"),
            Some("planted-secret-of-the-admix"),
            Some(""),
        ] {
            assert_eq!(post(address, path, token, all).0, 401, "{path} {token:?}");
        }
    }
    let (code, body) = post(address, "/parked/redrive", Some(TOKEN), r#"{"id": 2}"#);
    assert!(
        code == 409 && body["error"].as_str().unwrap().contains("redrive 1"),
        "{code} {body}"
    );
    let (code, body) = post(
        address,
        "/parked/redrive",
        Some(TOKEN),
        r#"{"all": true, "dry_run": true}"#,
    );
    assert_eq!((code, &body["would"]["total"]), (200, &json!(1)));
    assert_eq!(get(address, "/acts", &authorized).1, "[]");

    sqlx::raw_sql("update outbox_parked set headers = '{}' where id = 1")
        .execute(&mut shop.database().await)
        .await
        .unwrap();
    let (code, body) = post(address, "/parked/redrive", Some(TOKEN), all);
    assert_eq!(
        (code, body),
        (200, json!({"marked": [{"pipeline": "main", "events": 1}]}))
    );
    let deadline = Instant::now() + Duration::from_secs(30);
    // The log tells of it after the event is out.
    while shop.read("out").lines().count() < 3
        || !shop.read("log").contains("published parked events")
    {
        assert!(Instant::now() < deadline, "{}", shop.read("log"));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let out = shop.read("out");
    let sequence =
        |line: &str| serde_json::from_str::<Value>(line).unwrap()["headers"]["sequence"].clone();
    let order: Vec<Value> = out.lines().map(sequence).collect();
    assert_eq!(order, ["3", "1", "2"]);
    let (_, acts) = get(address, "/acts", &authorized);
    let acts: Value = serde_json::from_str(&acts).unwrap();
    assert!(
        acts[0]["who"]
            .as_str()
            .unwrap()
            .starts_with("http 127.0.0.1:"),
        "{acts}"
    );
    let log = shop.read("log");
    assert!(
        log.contains("asked for parked events") && log.contains("published parked events"),
        "{log}"
    );
    assert!(!log.contains(PLANTED), "{log}");
}

#[tokio::test]
async fn without_a_token_nothing_can_be_changed() {
    let shop = Shop::open(&[]).await;
    for token in [None, Some(""), Some(TOKEN)] {
        let (code, body) = post(
            &shop.address,
            "/parked/drop",
            token,
            r#"{"all": true, "reason": "x"}"#,
        );
        assert_eq!(code, 403, "{body}");
        assert!(
            body["error"].as_str().unwrap().contains("admin.token"),
            "{body}"
        );
    }
    let parked = "select count(*) from outbox_parked where wanted is not null";
    let wanted: i64 = sqlx::query_scalar(parked)
        .fetch_one(&mut shop.database().await)
        .await
        .unwrap();
    assert_eq!(wanted, 0);
}

/// Paths that name entities, operators and errors.
const NAMING: [&str; 4] = ["/parked", "/parked?limit=5", "/parked/main/1", "/acts"];

#[tokio::test]
async fn what_names_entities_needs_the_token() {
    let shop = Shop::open(&[]).await;
    for path in NAMING {
        let (code, body) = get(&shop.address, path, "authorization: Bearer x\r\n");
        assert!(
            code == 403 && body.contains("RELAY_ADMIN__TOKEN"),
            "{path}: {code} {body}"
        );
    }
    drop(shop);
    let shop = Shop::open(&[("RELAY_ADMIN__TOKEN", TOKEN)]).await;
    for path in NAMING {
        for header in ["", "authorization: Bearer nonsense\r\n"] {
            let (code, body) = get(&shop.address, path, header);
            assert!(
                code == 401 && body.contains("admin.token") && !body.contains("order"),
                "{path}: {code} {body}"
            );
        }
    }
}

#[tokio::test]
async fn a_halt_is_explained_to_those_who_have_the_token() {
    let mut shop = Shop::closed().await;
    let more = [
        ("RELAY_ADMIN__TOKEN", TOKEN),
        ("RELAY_PIPELINE__ON_REJECTED", "halt"),
    ];
    shop.start_until(&more, |seen| {
        seen["daemon"]["pipelines"][0]["state"] == "halted"
    })
    .await;
    let reason = |header: &str| {
        let (code, body) = get(&shop.address, "/readyz", header);
        assert_eq!(code, 503);
        let body: Value = serde_json::from_str(&body).unwrap();
        let shown = &body["pipelines"][0];
        assert!(
            shown["state_since"].as_str().unwrap().ends_with('Z'),
            "{body}"
        );
        assert!(shown["for_seconds"].is_u64(), "{body}");
        shown["reason"].as_str().unwrap().to_owned()
    };
    let open = reason("");
    assert!(
        open.starts_with("event 1: ") && open.contains("token"),
        "{open}"
    );
    let full = reason(&format!("authorization: Bearer {TOKEN}\r\n"));
    assert!(full.starts_with("event 1: ") && full != open, "{full}");
    assert!(
        shop.read("log").contains(&full[9..]),
        "{}",
        shop.read("log")
    );
}

#[tokio::test]
async fn a_probe_without_a_shell_asks_with_the_program() {
    let mut shop = Shop::open(&[]).await;
    let path = shop.path("shop.db");
    let ran = relay(&["ready"], &shop.env(&path, &[])).await.ends_with(0);
    assert_eq!(ran.out, "ready\n");
    shop.daemon = None;
    let ran = relay(&["ready"], &shop.env(&path, &[])).await.ends_with(1);
    assert!(ran.err.contains("no daemon answers at"), "{}", ran.err);
    drop(shop);

    let mut shop = Shop::closed().await;
    let halt = [("RELAY_PIPELINE__ON_REJECTED", "halt")];
    shop.start_until(&halt, |seen| {
        seen["daemon"]["pipelines"][0]["state"] == "halted"
    })
    .await;
    let path = shop.path("shop.db");
    let ran = relay(&["ready"], &shop.env(&path, &[])).await.ends_with(1);
    let why = "not ready: pipeline main, shard 0, has halted: event 1: ";
    assert!(ran.err.contains(why), "{}", ran.err);
}

#[tokio::test]
async fn an_unclear_request_is_refused_in_words() {
    let shop = Shop::open(&[("RELAY_ADMIN__TOKEN", TOKEN)]).await;
    let address = &shop.address;
    for (path, wrong, why) in [
        ("/parked/redrive", "{}", "say which events"),
        ("/parked/redrive", r#"{"al": true}"#, "unknown field `al`"),
        (
            "/parked/redrive",
            r#"{"all": true, "limit": 5}"#,
            "unknown field `limit`",
        ),
        ("/parked/redrive", "nonsense", "JSON"),
        ("/parked/redrive", r#"{"entity": ""}"#, "entity is empty"),
        (
            "/parked/redrive",
            r#"{"pipeline": "main"}"#,
            "say which events",
        ),
        (
            "/parked/redrive",
            r#"{"older_than": "0s"}"#,
            "say which events",
        ),
        (
            "/parked/redrive",
            r#"{"all": true, "id": 1}"#,
            "exclude each other",
        ),
        (
            "/parked/redrive",
            r#"{"all": true, "with_waiting": true}"#,
            "is for drop",
        ),
        ("/parked/drop", r#"{"all": true}"#, "say why"),
        (
            "/parked/drop",
            r#"{"all": true, "reason": ""}"#,
            "reason is empty",
        ),
        (
            "/parked/drop",
            r#"{"all": true, "reason": "  "}"#,
            "reason is empty",
        ),
        (
            "/parked/drop",
            r#"{"all": true, "reason": "a\u0000b"}"#,
            "U+0000",
        ),
        (
            "/parked/drop",
            r#"{"error": "", "reason": "x"}"#,
            "error is empty",
        ),
        (
            "/parked/drop",
            r#"{"error": "\u0000", "reason": "x"}"#,
            "U+0000",
        ),
        (
            "/parked/drop",
            r#"{"pipeline": "", "entity": "", "error": "", "older_than": "", "reason": "x"}"#,
            "is empty",
        ),
        (
            "/parked/drop",
            r#"{"older_than": "yesterday", "reason": "x"}"#,
            "duration",
        ),
    ] {
        let (code, body) = post(address, path, Some(TOKEN), wrong);
        let said = body["error"].as_str().unwrap_or_default();
        assert!(code == 400 && said.contains(why), "{wrong}: {code} {body}");
    }
    let authorized = format!("authorization: Bearer {TOKEN}\r\n");
    for (path, why) in [
        ("/parked?entity=nonsense", "TYPE/ID"),
        ("/parked?entity=", "entity is empty"),
        ("/parked?error=a%00b", "U+0000"),
        ("/parked?entity=order/%00", "U+0000"),
        ("/parked?limit=0", "1 to 1000"),
        ("/parked?limit=10000", "1 to 1000"),
        ("/parked?limit=many", "limit"),
        ("/parked?al=true", "unknown field `al`"),
        ("/parked?after=nonsense", "after"),
        ("/parked/main/x", "x"),
        ("/parked/ma%00in/1", "is not a pipeline name"),
        ("/acts?pipeline=main", "unknown field `pipeline`"),
        ("/acts?limit=0", "1 to 1000"),
    ] {
        let (code, body) = get(address, path, &authorized);
        let body: Value = serde_json::from_str(&body).unwrap_or(Value::String(body));
        let said = body["error"].as_str().unwrap_or_default();
        assert!(code == 400 && said.contains(why), "{path}: {code} {body}");
    }
}

#[tokio::test]
async fn lists_are_read_page_by_page() {
    let shop = Shop::open(&[("RELAY_ADMIN__TOKEN", TOKEN)]).await;
    let authorized = format!("authorization: Bearer {TOKEN}\r\n");
    // Some were parked in the same moment.
    sqlx::raw_sql(
        "with n (n) as (select 10 union all select n + 1 from n where n < 16) \
         insert into outbox_parked (pipeline, id, event_id, aggregate_type, aggregate_id, event_type, error, \
                                    occurred_at, parked_at) \
         select pipeline, n, event_id || n, aggregate_type, 'e' || n, event_type, error, occurred_at, parked_at + n / 3 \
           from n, outbox_parked where id = 1",
    )
    .execute(&mut shop.database().await)
    .await
    .unwrap();
    let mut ids = Vec::new();
    let mut pages = 0;
    let mut next = String::new();
    loop {
        let (code, body) = get(
            &shop.address,
            &format!("/parked?limit=3{next}"),
            &authorized,
        );
        assert_eq!(code, 200, "{body}");
        let page: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(page["total"], 8);
        ids.extend(
            page["events"]
                .as_array()
                .unwrap()
                .iter()
                .map(|event| event["id"].clone()),
        );
        pages += 1;
        match page["next"].as_str() {
            Some(after) => next = format!("&after={after}"),
            None => break,
        }
    }
    let expected: Vec<Value> = [1].into_iter().chain(10..=16).map(Value::from).collect();
    assert_eq!((ids, pages), (expected, 3));

    for _ in 0..3 {
        let all = r#"{"all": true}"#;
        assert_eq!(
            post(&shop.address, "/parked/redrive", Some(TOKEN), all).0,
            200
        );
    }
    let acts = |query: &str| -> Vec<Value> {
        let (_, body) = get(&shop.address, &format!("/acts?limit=2{query}"), &authorized);
        let page: Vec<Value> = serde_json::from_str(&body).unwrap();
        page.iter().map(|act| act["id"].clone()).collect()
    };
    assert_eq!(acts(""), [3, 2]);
    assert_eq!(acts("&after=2"), [1]);
}

#[tokio::test]
async fn only_known_names_are_answered() {
    let shop = Shop::open(&[
        ("RELAY_ADMIN__TOKEN", TOKEN),
        ("RELAY_ADMIN__HOSTS", "[\"relay.shop.svc\"]"),
    ])
    .await;
    let named = |path: &str, host: &str| {
        let request =
            format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {TOKEN}\r\n\r\n");
        ask(&shop.address, &request)
    };
    for path in [
        "/", "/status", "/metrics", "/readyz", "/parked", "/acts", "/nothing",
    ] {
        let (code, body) = named(path, "evil.example:9187");
        assert!(
            code == 421 && body.contains("admin.hosts"),
            "{path}: {code} {body}"
        );
        let known = if path == "/nothing" { 404 } else { 200 };
        for host in ["localhost", "127.0.0.1:9187", "[::1]", "relay.shop.svc"] {
            assert_eq!(named(path, host).0, known, "{path} {host}");
        }
    }
    assert_eq!(named("/healthz", "evil.example").0, 200);
    assert_eq!(named("/livez", "evil.example").0, 200);
}

#[tokio::test]
async fn people_who_try_are_told_what_is_there() {
    let shop = Shop::open(&[]).await;
    let (code, body) = get(&shop.address, "/", "");
    assert!(
        code == 200 && body.contains("/metrics") && body.contains("/parked"),
        "{body}"
    );
    let (code, body) = get(&shop.address, "/helthz", "");
    assert!(
        code == 404 && body.contains("/helthz") && body.contains("/healthz"),
        "{body}"
    );
    let request = "DELETE /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let (code, body) = ask(&shop.address, request);
    assert!(code == 405 && body.contains("GET  /metrics"), "{body}");
    let request = "GET /healthz HTTP/1.0\r\n\r\n";
    assert_eq!(ask(&shop.address, request).0, 200, "without a name");
}

/// Clients that say nothing, that say half, and that ask and never read.
#[tokio::test]
async fn health_and_metrics_are_answered_however_many_connections_are_held() {
    let shop = Shop::open(&[("RELAY_ADMIN__TOKEN", TOKEN)]).await;
    // Long answers: more than the sockets' buffers hold.
    sqlx::raw_sql(
        "with n (n) as (select 10 union all select n + 1 from n where n < 1200) \
         insert into outbox_parked (pipeline, id, event_id, aggregate_type, aggregate_id, event_type, error, \
                                    occurred_at, parked_at) \
         select pipeline, n, event_id || n, aggregate_type, 'e' || n, event_type, \
                substr(replace(hex(zeroblob(4096)), '0', 'x'), 1, 8000), occurred_at, parked_at \
           from n, outbox_parked where id = 1",
    )
    .execute(&mut shop.database().await)
    .await
    .unwrap();
    let reader = format!(
        "GET /parked?limit=1000 HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {TOKEN}\r\n\r\n"
    );
    for request in ["", "GET /healthz HTTP/1.1\r\nhost: loc", &reader] {
        let held: Vec<TcpStream> = (0..200)
            .map(|_| {
                let mut stream = TcpStream::connect(&shop.address).unwrap();
                stream.write_all(request.as_bytes()).unwrap();
                stream
            })
            .collect();
        let began = Instant::now();
        for path in ["/healthz", "/livez", "/readyz", "/metrics"] {
            let address = shop.address.clone();
            let asked = tokio::task::spawn_blocking(move || get(&address, path, ""));
            let (code, body) = asked.await.unwrap();
            assert_eq!(code, 200, "{path} beside {request:?}: {body}");
        }
        assert!(
            began.elapsed() < Duration::from_secs(5),
            "{request:?}: {:?}",
            began.elapsed()
        );
        if request == reader {
            let (code, body) = get(
                &shop.address,
                "/acts",
                &format!("authorization: Bearer {TOKEN}\r\n"),
            );
            assert!(
                code == 200 || (code == 503 && body.contains("ask again")),
                "{code} {body}"
            );
        }
        drop(held);
    }
    // Those that waited for a client are free again.
    let deadline = Instant::now() + Duration::from_secs(30);
    while get(
        &shop.address,
        "/acts",
        &format!("authorization: Bearer {TOKEN}\r\n"),
    )
    .0 != 200
    {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn slow_and_large_clients_keep_nobody_out() {
    let shop = Shop::open(&[("RELAY_ADMIN__TOKEN", TOKEN)]).await;
    let address = &shop.address;
    let large = format!(r#"{{"all": true, "reason": "{}"}}"#, "x".repeat(100_000));
    assert_eq!(post(address, "/parked/drop", Some(TOKEN), &large).0, 413);
    let many = format!("x-many: {}\r\n", "y".repeat(40_000));
    assert_eq!(get(address, "/healthz", &many).0, 431);

    // More clients than there is room for, each of which begins a request and never ends it.
    let began = Instant::now();
    let mut slow: Vec<TcpStream> = (0..100)
        .map(|_| {
            let mut stream = TcpStream::connect(address).unwrap();
            stream
                .write_all(b"GET /healthz HTTP/1.1\r\nhost: re")
                .unwrap();
            stream.set_nonblocking(true).unwrap();
            stream
        })
        .collect();
    let honest = address.clone();
    let honest = tokio::task::spawn_blocking(move || get(&honest, "/healthz", "").0);
    assert_eq!(honest.await.unwrap(), 200);
    // They are cut off although they go on sending, a letter at a time.
    let mut open = slow.len();
    while open > 0 {
        assert!(
            began.elapsed() < Duration::from_secs(60),
            "{open} are still connected"
        );
        slow.retain_mut(|stream| {
            let sent = stream.write(b"l").is_ok();
            let ended = match stream.read(&mut [0; 1024]) {
                Ok(_) => true,
                Err(error) => error.kind() != ErrorKind::WouldBlock,
            };
            sent && !ended
        });
        open = slow.len();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    println!("all were cut off after {:?}", began.elapsed());
    assert_eq!(get(address, "/healthz", "").0, 200);
}

/// A request that was right before somebody cut, doubled and scratched it.
fn scratched(rng: &mut fastrand::Rng) -> Vec<u8> {
    const REQUESTS: [&str; 5] = [
        "GET /parked?entity=order/17&limit=5 HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
        "GET /parked/main/1 HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer x\r\nconnection: close\r\n\r\n",
        "POST /parked/redrive HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 12\r\n\r\n{\"all\": true}",
        "POST /parked/drop HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        "GET /metrics HTTP/1.0\r\n\r\n",
    ];
    let mut bytes = rng.choice(REQUESTS).unwrap().as_bytes().to_vec();
    for _ in 0..rng.usize(1..12) {
        let at = rng.usize(..bytes.len());
        match rng.u8(..4) {
            0 => bytes[at] = rng.u8(..),
            1 => bytes.insert(at, rng.u8(..)),
            2 => bytes.truncate(at.max(1)),
            _ => bytes.extend_from_within(at..),
        }
    }
    bytes
}

#[tokio::test]
async fn no_request_brings_it_down() {
    let shop = Shop::open(&[("RELAY_ADMIN__TOKEN", TOKEN)]).await;
    let seed = std::env::var("RELAY_TEST_SEED")
        .map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    println!("RELAY_TEST_SEED={seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    for _ in 0..500 {
        let mut stream = TcpStream::connect(&shop.address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        // It may have heard enough before the end.
        let _ = stream.write_all(&scratched(&mut rng));
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            Err(error) => panic!("neither an answer nor an end: {error}"),
        }
    }
    assert_eq!(get(&shop.address, "/healthz", "").0, 200);
    assert!(
        !shop.read("log").contains("panicked"),
        "{}",
        shop.read("log")
    );
    let parked = "select count(*) from outbox_parked";
    let count: i64 = sqlx::query_scalar(parked)
        .fetch_one(&mut shop.database().await)
        .await
        .unwrap();
    assert_eq!(count, 2, "nobody had the token");
}

#[tokio::test]
async fn no_secret_is_said_anywhere() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let address = free_address();
    let env = [
        ("RELAY_SOURCE__POSTGRES__URL", NOBODY),
        ("RELAY_SINK__KAFKA__BROKERS", "127.0.0.1:1"),
        ("RELAY_SINK__KAFKA__SASL__MECHANISM", "PLAIN"),
        ("RELAY_SINK__KAFKA__SASL__USERNAME", "relay"),
        ("RELAY_SINK__KAFKA__SASL__PASSWORD", PLANTED),
        ("RELAY_ADMIN__TOKEN", TOKEN),
        ("RELAY_ADMIN__LISTEN", &address),
        ("RELAY_LOG__LEVEL", "debug"),
    ];
    let mut command = program(&["run"], &env);
    command.stdout(File::create(folder.path().join("out")).unwrap());
    command.stderr(File::create(&log).unwrap());
    let _daemon = Daemon(command.spawn().unwrap());
    let deadline = Instant::now() + Duration::from_secs(30);
    while TcpStream::connect(&address).is_err()
        || !std::fs::read_to_string(&log).unwrap().contains("stalled")
    {
        assert!(
            Instant::now() < deadline,
            "{}",
            std::fs::read_to_string(&log).unwrap()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let authorized = format!("authorization: Bearer {TOKEN}\r\n");
    for path in [
        "/metrics",
        "/status",
        "/readyz",
        "/healthz",
        "/parked",
        "/parked/main/1",
        "/acts",
    ] {
        for header in ["", &authorized] {
            let (code, body) = get(&address, path, header);
            assert!(!body.contains(PLANTED), "{path}: {body}");
            let asks_database = path.starts_with("/parked") || path == "/acts";
            let expected = match path {
                _ if asks_database && header.is_empty() => 401,
                _ if asks_database || path == "/readyz" => 503,
                _ => 200,
            };
            assert_eq!(code, expected, "{path}: {body}");
        }
    }
    for token in [None, Some("wrong"), Some(TOKEN)] {
        let (_, body) = post(&address, "/parked/redrive", token, r#"{"all": true}"#);
        assert!(!body.to_string().contains(PLANTED), "{body}");
    }
    for args in [
        &["check"][..],
        &["doctor"],
        &["status"],
        &["parked", "list"],
        &["parked", "show", "1"],
        &["parked", "redrive", "--all"],
        &["acts"],
    ] {
        // What they say is searched there.
        relay(args, &env).await;
    }
    let log = std::fs::read_to_string(&log).unwrap();
    assert!(!log.contains(PLANTED), "{log}");
}
