//! A server that crashes behind a pooler. Nobody's connection breaks, and the transactions that had no time to reach the
//! disk are gone: cursor writes, which do not wait for the disk. Their ids are given to new transactions, which a snapshot
//! from before takes for old ones.

use std::process::{Command, Stdio};
use std::str::FromStr;
use std::time::Duration;

use outbox_relay::event::Start;
use outbox_relay::ledger::{Fenced, Ledger, Renewed};
use sqlx::Connection;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use tokio::time::sleep;

use super::database::{Database, ask, sql, with_database, with_database_of};
use super::schedules::{NOTHING, Relay, emit};
use crate::fresh::needed;

#[tokio::test]
async fn what_a_crash_empties_ends_the_tenure() {
    with_database("what_a_crash_empties_ends_the_tenure", async |database| {
        let mut writer = database.connect().await;
        let mut relay = Relay::start(database, Start::Earliest).await;
        sql(&mut writer, &emit(1)).await;
        assert_eq!(relay.drain().await, [1]);
        sql(&mut writer, &emit(2)).await;
        let page = relay.page(10).await;
        sql(&mut writer, "truncate outbox.incarnation").await;
        must_be_lost(&mut relay, &page.end).await;

        // One that begins after it is not held up, nor by another that begins at the same time.
        let mut relay = relay.restart().await;
        assert_eq!(relay.drain().await, [2]);
        assert_eq!(
            relay.ledger.renew().await.expect("renew"),
            Renewed::Extended
        );
    })
    .await;
}

#[tokio::test]
async fn a_crash_behind_a_pooler_loses_nothing() {
    let test = "a_crash_behind_a_pooler_loses_nothing";
    let Some(folder) = needed(test, "RELAY_TEST_FOLDER") else {
        return;
    };
    let version = std::env::var("POSTGRES_VERSION").unwrap_or_else(|_| "17".to_owned());
    let (server, pool) = (format!("{folder}/crash"), format!("{folder}/crash-pool"));
    let started = service("postgres", &[&version, &server]);
    let port = exported(&started, "PG_PORT");
    let through_pool = exported(&service("pgbouncer", &[&pool, &port]), "PGBOUNCER_URL");
    let options = PgConnectOptions::from_str(&exported(&started, "DATABASE_URL")).expect("a URL");
    with_database_of(options, async |database| {
        let log = Database {
            name: database.name.clone(),
            options: PgConnectOptions::from_str(&through_pool)
                .expect("a URL")
                .database(&database.name),
        };
        for round in 0..5 {
            crash_once(database, &log, round * 10).await;
        }
    })
    .await;
    service("down", &[&pool]);
    service("down", &[&server]);
}

async fn crash_once(database: &Database, log: &Database, n: u64) {
    let mut relay = Relay::start(log, Start::Earliest).await;
    relay.drain().await;
    let mut writer = database.connect().await;
    sql(&mut writer, &emit(n + 1)).await;
    // The cursor's write follows the last commit that waited for the disk, and an empty window follows it.
    assert_eq!(relay.drain().await, [n + 1]);
    let mut victim = database.connect().await;
    let pid = ask(&mut victim, "select pg_backend_pid()::text").await;
    let killed = Command::new("kill").args(["-KILL", &pid]).status();
    assert!(killed.expect("kill").success());
    // The server sees it, ends every backend, and recovers. The victim's own connection breaks before it sees it, and one
    // that is made in between breaks too.
    while writer.ping().await.is_ok() {
        sleep(Duration::from_millis(10)).await;
    }
    let mut writer = loop {
        if let Ok(mut connection) = PgConnection::connect_with(&database.options).await
            && connection.ping().await.is_ok()
        {
            break connection;
        }
        sleep(Duration::from_millis(20)).await;
    };
    sql(&mut writer, &emit(n + 2)).await;
    // What is read now, from a snapshot of before, may be less than there is; it must not move the cursor.
    let page = relay.page(10).await;
    must_be_lost(&mut relay, &page.end).await;
    let mut relay = relay.restart().await;
    let got = relay.drain().await;
    assert!(got.ends_with(&[n + 2]), "{got:?} has not {}", n + 2);
    assert_eq!(relay.drain().await, NOTHING);
}

async fn must_be_lost(relay: &mut Relay<'_>, position: &outbox_relay::position::Position) {
    let ledger = &mut relay.ledger;
    assert_eq!(ledger.renew().await.expect("renew"), Renewed::Lost);
    let moved = ledger.acknowledge(position).await.expect("move");
    assert_eq!(moved, Fenced::Lost);
    assert_eq!(ledger.park(&[]).await.expect("park"), Fenced::Lost);
}

/// Runs a script of `tests/services`, and returns what it prints.
fn service(name: &str, arguments: &[&str]) -> String {
    let output = Command::new(format!("tests/services/{name}"))
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .expect("run a service");
    assert!(output.status.success(), "{name} {arguments:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// The value of `export NAME='value'`.
fn exported(text: &str, name: &str) -> String {
    let start = format!("export {name}='");
    let line = text.lines().find_map(|line| line.strip_prefix(&start));
    line.and_then(|rest| rest.strip_suffix('\''))
        .unwrap_or_else(|| panic!("no {name} in {text}"))
        .to_owned()
}
