//! The example services are run as they are documented, and emit what they say.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::fresh::{self, needed, run, skip, value, values};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

#[tokio::test]
async fn psql_emits() {
    emits("examples::psql_emits", "psql", |url| {
        let mut psql = Command::new("psql");
        psql.args(["-X", url, "-f", "examples/psql/emit.sql"]);
        psql
    })
    .await;
}

#[tokio::test]
async fn sqlite_emits() {
    let test = "examples::sqlite_emits";
    if !succeeds(Command::new("sqlite3").arg("--version")) {
        return skip(test, "sqlite3 is missing");
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("shop.db");
    let file = file.to_str().unwrap();
    let mut migrate = Command::new(env!("CARGO_BIN_EXE_outbox-relay"));
    migrate
        .arg("migrate")
        .env_clear()
        .env("RELAY_SOURCE__KIND", "sqlite")
        .env("RELAY_SOURCE__SQLITE__PATH", file);
    assert!(migrate.status().unwrap().success());
    let sqlite = |input: &str| {
        let mut sqlite = Command::new("sqlite3");
        let out = sqlite.args(["-bail", file, input]).output().unwrap();
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        String::from_utf8(out.stdout).unwrap()
    };
    let printed = sqlite(".read examples/sqlite/emit.sql");
    let emitted = sqlite("select event_id from outbox_events");
    assert_eq!(printed, emitted, "the printed uuid is that of the event");
    let event =
        "select aggregate_type, aggregate_id, event_type, payload, headers from outbox_events";
    assert_eq!(
        sqlite(event),
        "order|1001|placed|{\"id\": \"1001\", \"status\": \"placed\"}|{\"tenant\": \"acme\"}\n"
    );
}

#[tokio::test]
async fn python_emits() {
    let test = "examples::python_emits";
    let python = std::env::var("PYTHON_BIN").unwrap_or_else(|_| "python3".to_owned());
    if !succeeds(Command::new(&python).args(["-c", "import psycopg"])) {
        return skip(test, &format!("{python} has no psycopg"));
    }
    emits(test, "python", |_| {
        let mut command = Command::new(&python);
        command.arg("examples/python/emit.py");
        command
    })
    .await;
}

#[tokio::test]
async fn node_emits() {
    let test = "examples::node_emits";
    if !succeeds(Command::new("node").args(["-e", "require('pg')"])) {
        return skip(test, "node is missing, or NODE_PATH has no pg");
    }
    emits(test, "node", |_| {
        let mut command = Command::new("node");
        command.arg("examples/node/emit.js");
        command
    })
    .await;
}

#[tokio::test]
async fn rust_emits() {
    emits("examples::rust_emits", "rust", |_| {
        let mut cargo = cargo();
        cargo.args(["run", "--quiet", "--locked", "--example", "emit"]);
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        cargo
    })
    .await;
}

/// Another cargo, which builds what else there is.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(env!("CARGO"));
    // What cargo tells a test about its package would make build scripts believe that everything has changed.
    let told = ["CARGO_MANIFEST_", "CARGO_PKG_"];
    for (name, _) in std::env::vars() {
        if told.iter().any(|prefix| name.starts_with(prefix)) {
            cargo.env_remove(name);
        }
    }
    cargo
}

#[tokio::test]
async fn java_emits() {
    let test = "examples::java_emits";
    let Some(driver) = needed(test, "PG_JDBC_JAR") else {
        return;
    };
    emits(test, "java", |_| {
        let mut java = Command::new("java");
        java.args(["-cp", &driver, "examples/java/Emit.java"]);
        java
    })
    .await;
}

/// Runs an example twice, as a role that may only emit and have tables of its own, and compares what it leaves behind.
/// `command` is told the database's URL, which is in the environment as well.
async fn emits(test: &str, channel: &str, command: impl Fn(&str) -> Command) {
    let program = command("").get_program().to_owned();
    if !succeeds(Command::new(&program).arg("--version")) {
        return skip(test, &format!("{} is missing", program.display()));
    }
    fresh::database(test, async |database| {
        let mut superuser = database.superuser().await;
        let role = database.login("shop", "in role outbox_writer").await;
        run(&mut superuser, &format!("create schema authorization {role}")).await;
        let url = database.url(&role);

        let printed: Vec<String> = (0..2).map(|_| output(command(&url), &url)).collect();

        let placed = values(
            &mut superuser,
            "select event_id::text from outbox.events where event_type = 'order.placed' order by id",
        )
        .await;
        assert_eq!(printed, placed, "the printed uuids are those of the events");
        let once = expected(channel);
        let events = values(
            &mut superuser,
            "select concat_ws(' | ', aggregate_type, aggregate_id, event_type, coalesce(payload::jsonb::text,
                    encode(payload_bytes, 'hex'), 'tombstone'), content_type, headers::jsonb::text)
               from outbox.events order by id",
        )
        .await;
        assert_eq!(events, [once.clone(), once].concat());
        let orders = format!("select concat_ws(' ', id, status) from {role}.shop_order");
        assert_eq!(value(&mut superuser, &orders).await, "1001 placed");
    })
    .await;
}

/// The events of one run, headers of the transaction included: nothing of the transaction that was rolled back.
fn expected(channel: &str) -> Vec<String> {
    let mut events = vec![format!(
        r#"order | 1001 | order.placed | {{"total": "49.90", "order_id": "1001"}} | {{"tenant": "acme", "channel": "{channel}", "traceparent": "{TRACE}"}}"#
    )];
    if channel == "python" {
        events.push(format!(
            r#"invoice | 1001 | invoice.issued | 0a043130303110fe26 | application/x-protobuf | {{"tenant": "acme", "traceparent": "{TRACE}"}}"#
        ));
    }
    events.push("order | 1000 | order.deleted | tombstone".to_owned());
    events
}

/// What the example prints; it must succeed.
fn output(mut command: Command, url: &str) -> String {
    let output = command
        .env("DATABASE_URL", url)
        .current_dir(Path::new(ROOT))
        .output()
        .expect("start the example");
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let printed = String::from_utf8(output.stdout).expect("UTF-8");
    printed.strip_suffix('\n').expect("a line").to_owned()
}

fn succeeds(command: &mut Command) -> bool {
    let quiet = command.stdout(Stdio::null()).stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}
