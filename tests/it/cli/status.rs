//! `status` and `parked list`, with and without a daemon.

use std::process::{Child, Stdio};
use std::time::Duration;

use serde_json::Value;
use sqlx::Connection;
use tokio::time::Instant;

use super::{Ran, program, relay};
use crate::fresh::{empty_database, run};

/// A daemon that does not outlive its test.
pub(super) struct Daemon(pub(super) Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn start(env: &[(&str, &str)]) -> Daemon {
    let mut command = program(&["run"], env);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    Daemon(command.spawn().unwrap())
}

pub(super) fn free_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

async fn seen(env: &[(&str, &str)]) -> Value {
    let Ran { out, .. } = relay(&["status", "--json"], env).await.ends_with(0);
    serde_json::from_str(&out).unwrap()
}

/// Waits for a fact that the status shows.
pub(super) async fn until(env: &[(&str, &str)], fact: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let seen = seen(env).await;
        if fact(&seen) {
            return seen;
        }
        assert!(Instant::now() < deadline, "{seen:#}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

const EMIT: &str = "select outbox.emit('big order', '17', 'placed', '{\"card\": \"planted-secret\"}'); \
                    select outbox.emit('big order', '17', 'paid', '{\"card\": \"planted-secret\"}'); \
                    select outbox.emit('order', '1', 'placed', '{}')";

#[tokio::test]
async fn the_books_of_postgres_and_the_daemon_are_shown() {
    empty_database(
        "the_books_of_postgres_and_the_daemon_are_shown",
        async |database| {
            let owner = database.login("owner", "superuser").await;
            let url = database.url(&owner);
            let address = free_address();
            let env = [
                ("RELAY_SOURCE__POSTGRES__URL", &url[..]),
                ("RELAY_SINK__KIND", "stdout"),
                ("RELAY_ADMIN__LISTEN", &address[..]),
            ];
            relay(&["migrate"], &env).await.ends_with(0);
            let Ran { out, .. } = relay(&["status"], &env).await.ends_with(0);
            assert!(out.contains("main      never ran"), "{out}");
            assert!(out.contains("no daemon answers at"), "{out}");

            let daemon = start(&env);
            until(&env, |seen| seen["daemon"]["ready"] == true).await;
            let mut writer = database.superuser().await;
            run(&mut writer, EMIT).await;
            let shown = until(&env, |seen| {
                let pipeline = &seen["books"]["pipelines"][0];
                // The id of a transaction in progress may be reached before its events are published.
                pipeline["last_id"] == 3
                    && pipeline["parked_events"] == 2
                    && pipeline["oldest_unpublished_seconds"].is_null()
            })
            .await;
            let pipeline = &shown["books"]["pipelines"][0];
            assert_eq!(pipeline["backlog_ids"], 0);
            assert_eq!(pipeline["parked_entities"], 1);
            assert_eq!(pipeline["owner"]["holder"], shown["daemon"]["holder"]);
            let Ran { out, .. } = relay(&["status"], &env).await.ends_with(0);
            assert!(out.contains("main      running"), "{out}");
            assert!(out.contains("2 (1 entity)"), "{out}");
            drop(daemon);

            // Killed: the books say when the lease ends, then that nobody owns it, and how old the oldest event is.
            run(&mut writer, EMIT).await;
            let shown = until(&env, |seen| {
                seen["books"]["pipelines"][0]["owner"].is_null()
            })
            .await;
            let pipeline = &shown["books"]["pipelines"][0];
            assert_eq!(pipeline["backlog_ids"], 3);
            assert!(
                pipeline["oldest_unpublished_seconds"].as_f64() > Some(0.0),
                "{shown:#}"
            );
            let Ran { out, .. } = relay(&["status"], &env).await.ends_with(0);
            assert!(out.contains("main: no relay owns it"), "{out}");
            assert!(out.contains("`outbox-relay run`"), "{out}");

            let Ran { out, .. } = relay(&["parked", "list"], &env).await.ends_with(0);
            assert!(out.contains("big order/17"), "{out}");
            assert!(
                out.contains("the topic name has the character ' '"),
                "{out}"
            );
            let Ran { out, .. } = relay(&["parked", "list", "--json"], &env)
                .await
                .ends_with(0);
            let parked: Value = serde_json::from_str(&out).unwrap();
            assert_eq!(parked["events"][0]["id"], 1);
            assert_eq!(parked["events"][0]["event_type"], "placed");
            assert_eq!(parked["events"][0]["waiting_events"], 1);
            let none = ["parked", "list", "--pipeline", "other"];
            let Ran { out, .. } = relay(&none, &env).await.ends_with(0);
            assert_eq!(out, "nothing is parked\n");
        },
    )
    .await;
}

#[tokio::test]
async fn an_event_of_a_transaction_that_commits_late_is_the_oldest() {
    empty_database(
        "an_event_of_a_transaction_that_commits_late_is_the_oldest",
        async |database| {
            let owner = database.login("owner", "superuser").await;
            let url = database.url(&owner);
            let env = [
                ("RELAY_SOURCE__POSTGRES__URL", &url[..]),
                ("RELAY_SINK__KIND", "stdout"),
                ("RELAY_ADMIN__ENABLED", "false"),
            ];
            relay(&["migrate"], &env).await.ends_with(0);
            let mut late = database.superuser().await;
            let mut writer = database.superuser().await;
            run(
                &mut late,
                "begin; select outbox.emit('order', '1', 'placed', '{}')",
            )
            .await;
            let daemon = start(&env);
            run(
                &mut writer,
                "select outbox.emit('order', '2', 'placed', '{}')",
            )
            .await;
            // In progress: nobody waits for it, and it is shown.
            let shown = until(&env, |seen| {
                let pipeline = &seen["books"]["pipelines"][0];
                pipeline["last_id"] == 2 && pipeline["oldest_unpublished_seconds"].is_null()
            })
            .await;
            assert!(shown["books"]["server"]["oldest_transaction"]["seconds"].as_f64() > Some(0.0));
            drop(daemon);
            run(&mut late, "commit").await;
            let shown = seen(&env).await;
            let pipeline = &shown["books"]["pipelines"][0];
            // Its id is below the position, and it waits all the same.
            assert_eq!(pipeline["backlog_ids"], 0);
            assert!(
                pipeline["oldest_unpublished_seconds"].as_f64() > Some(0.0),
                "{shown:#}"
            );
            let _daemon = start(&env);
            until(&env, |seen| {
                seen["books"]["pipelines"][0]["oldest_unpublished_seconds"].is_null()
            })
            .await;
        },
    )
    .await;
}

#[tokio::test]
async fn the_books_of_sqlite_are_shown() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("shop.db");
    let address = free_address();
    let env = [
        ("RELAY_SOURCE__KIND", "sqlite"),
        ("RELAY_SOURCE__SQLITE__PATH", path.to_str().unwrap()),
        ("RELAY_SINK__KIND", "stdout"),
        ("RELAY_ADMIN__LISTEN", &address[..]),
    ];
    let ran = relay(&["status"], &env).await.ends_with(1);
    assert!(ran.err.contains("shop.db"), "{}", ran.err);
    assert!(!path.exists(), "looking creates nothing");
    relay(&["migrate"], &env).await.ends_with(0);
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(&path);
    let mut writer = sqlx::SqliteConnection::connect_with(&options)
        .await
        .unwrap();
    let emit = "insert into outbox_events (aggregate_type, aggregate_id, event_type, payload) \
                values ('big order', '17', 'placed', '{\"card\": \"planted-secret\"}'), ('order', '1', 'placed', '{}')";
    sqlx::raw_sql(emit).execute(&mut writer).await.unwrap();
    let daemon = start(&env);
    let shown = until(&env, |seen| seen["books"]["pipelines"][0]["last_id"] == 2).await;
    assert_eq!(shown["books"]["pipelines"][0]["parked_events"], 1);
    assert_eq!(
        shown["books"]["pipelines"][0]["owner"]["holder"],
        shown["daemon"]["holder"]
    );
    assert_eq!(shown["books"]["server"], Value::Null);
    drop(daemon);
    sqlx::raw_sql(emit).execute(&mut writer).await.unwrap();
    let shown = seen(&env).await;
    assert_eq!(shown["books"]["pipelines"][0]["backlog_ids"], 2);
    assert!(shown["books"]["pipelines"][0]["oldest_unpublished_seconds"].is_number());
    let Ran { out, .. } = relay(&["parked", "list"], &env).await.ends_with(0);
    assert!(out.contains("big order/17"), "{out}");
}

#[tokio::test]
async fn watching_goes_on_without_the_database() {
    let env = [
        ("RELAY_SOURCE__POSTGRES__URL", super::NOBODY),
        ("RELAY_ADMIN__ENABLED", "false"),
    ];
    let mut command = program(&["status", "--watch", "--json"], &env);
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    let mut watching = Daemon(command.spawn().unwrap());
    let out = watching.0.stdout.take().unwrap();
    let lines = tokio::task::spawn_blocking(move || {
        use std::io::BufRead;
        std::io::BufReader::new(out)
            .lines()
            .filter(|line| line.as_ref().is_ok_and(|line| line.starts_with('{')))
            .take(2)
            .collect::<Result<Vec<_>, _>>()
            .unwrap()
    });
    for line in lines.await.unwrap() {
        let seen: Value = serde_json::from_str(&line).unwrap();
        let trouble = seen["books_trouble"].as_str().unwrap();
        assert!(trouble.contains("Connection refused"), "{trouble}");
        assert!(!line.contains(super::PLANTED));
    }
}

/// The lines of `/metrics` about readiness.
fn readiness(address: &str) -> Vec<String> {
    lines(address, "outbox_ready{")
}

/// The lines of `/metrics` that begin in this way.
fn lines(address: &str, start: &str) -> Vec<String> {
    use std::io::{Read, Write};
    let Ok(mut stream) = std::net::TcpStream::connect(address) else {
        return Vec::new();
    };
    write!(
        stream,
        "GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let about = |line: &&str| line.starts_with(start);
    answer.lines().filter(about).map(str::to_owned).collect()
}

#[tokio::test]
async fn a_pipeline_without_its_database_is_not_ready_in_the_metrics() {
    let address = free_address();
    let env = [
        ("RELAY_SOURCE__POSTGRES__URL", super::NOBODY),
        ("RELAY_SINK__KIND", "stdout"),
        ("RELAY_ADMIN__LISTEN", &address[..]),
    ];
    let _daemon = start(&env);
    let deadline = Instant::now() + Duration::from_secs(30);
    while readiness(&address).is_empty() {
        assert!(Instant::now() < deadline, "nobody answers at {address}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(readiness(&address), ["outbox_ready{pipeline=\"main\"} 0"]);
    // What is not known is absent, and no 0.
    for name in [
        "outbox_backlog_ids{",
        "outbox_oldest_unpublished_seconds{",
        "outbox_in_flight_events{",
        "outbox_set_aside_events{",
        "outbox_log_bytes ",
    ] {
        assert_eq!(lines(&address, name), [""; 0]);
    }
}
