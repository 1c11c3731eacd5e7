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
        let mut shop = Self {
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
        shop.start(extra).await;
        shop
    }

    async fn start(&mut self, extra: &[(&str, &str)]) {
        let path = self.path("shop.db");
        let env = self.env(&path, extra);
        let mut command = program(&["run"], &env);
        command
            .stdout(File::create(self.path("out")).unwrap())
            .stderr(File::create(self.path("log")).unwrap());
        let daemon = Daemon(command.spawn().unwrap());
        until(&env, |seen| {
            seen["books"]["pipelines"][0]["last_id"] == 3 && seen["daemon"]["ready"] == true
        })
        .await;
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
        &format!("GET {path} HTTP/1.1\r\nhost: relay\r\nconnection: close\r\n{header}\r\n"),
    )
}

fn post(address: &str, path: &str, token: Option<&str>, body: &str) -> (u16, Value) {
    let token = token.map_or(String::new(), |token| {
        format!("authorization: Bearer {token}\r\n")
    });
    let (code, body) = ask(
        address,
        &format!(
            "POST {path} HTTP/1.1\r\nhost: relay\r\nconnection: close\r\ncontent-type: application/json\r\n\
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
    let (code, body) = get(address, "/parked?entity=order/17", "");
    let list: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((code, &list["total"]), (200, &json!(1)));
    assert_eq!(
        (
            &list["events"][0]["id"],
            &list["events"][0]["waiting_events"]
        ),
        (&json!(1), &json!(1))
    );
    assert_eq!(get(address, "/parked?entity=nonsense", "").0, 400);

    // Payload and headers are for those who have the token.
    let (code, body) = get(address, "/parked/main/1", "");
    assert!(code == 200 && !body.contains(PLANTED), "{body}");
    let authorized = format!("authorization: Bearer {TOKEN}\r\n");
    let (_, body) = get(address, "/parked/main/1", &authorized);
    let shown: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(
        (&shown["headers"], &shown["attempts"]),
        (&json!("[1]"), &json!(1))
    );
    assert!(shown["payload"].as_str().unwrap().contains("card"));
    assert_eq!(get(address, "/parked/main/7", "").0, 404);

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
    for (path, wrong) in [
        ("/parked/redrive", "{}"),
        ("/parked/redrive", r#"{"al": true}"#),
        ("/parked/redrive", "nonsense"),
        ("/parked/drop", r#"{"all": true}"#),
        (
            "/parked/drop",
            r#"{"older_than": "yesterday", "reason": "x"}"#,
        ),
    ] {
        let (code, body) = post(address, path, Some(TOKEN), wrong);
        assert!(
            (400..=422).contains(&code) && body["error"].is_string(),
            "{wrong}: {code} {body}"
        );
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
    assert_eq!(get(address, "/acts", "").1, "[]");

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
    let (_, acts) = get(address, "/acts", "");
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
    assert_eq!(get(&shop.address, "/acts", "").1, "[]");
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
        "GET /parked?entity=order/17&limit=5 HTTP/1.1\r\nhost: relay\r\nconnection: close\r\n\r\n",
        "GET /parked/main/1 HTTP/1.1\r\nhost: relay\r\nauthorization: Bearer x\r\nconnection: close\r\n\r\n",
        "POST /parked/redrive HTTP/1.1\r\nhost: relay\r\ncontent-type: application/json\r\ncontent-length: 12\r\n\r\n{\"all\": true}",
        "POST /parked/drop HTTP/1.1\r\nhost: relay\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
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
            assert_eq!(
                code == 503,
                asks_database || path == "/readyz",
                "{path}: {body}"
            );
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
