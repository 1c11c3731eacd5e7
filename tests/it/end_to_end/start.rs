//! What can be wrong when a relay starts: it says so, waits where waiting helps, and never shows a secret.

use std::net::{Ipv4Addr, TcpListener};

use sqlx::postgres::PgConnectOptions;

use super::process::{Process, Setup};
use crate::harness::postgres::TestDatabase;

const SECRET: &str = "hunter2-do-not-print";

async fn waits(setup: &Setup, words: &[&str]) {
    let mut relay: Process = setup.start();
    let reason = relay.not_ready(words).await;
    eprintln!("{reason}");
    relay.rests().await;
    assert!(relay.is_alive());
    assert!(matches!(relay.get("/healthz"), Some((200, _))));
    let (_, status) = relay.get("/status").unwrap();
    let (_, metrics) = relay.get("/metrics").unwrap();
    for shown in [relay.log(), relay.out(), reason, status, metrics] {
        assert!(!shown.contains(SECRET), "{shown}");
    }
    relay.stop().await;
}

fn url(options: &PgConnectOptions, user: &str, database: &str) -> String {
    let (host, port) = (options.get_host(), options.get_port());
    format!("postgres://{user}:{SECRET}@{host}:{port}/{database}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_unreachable_is_waited_for_and_named() {
    let Some(database) = TestDatabase::create().await else {
        return;
    };
    let options = &database.options;
    let name = options.get_database().unwrap();
    let user = options.get_username();
    let missing = Setup::new(&url(options, user, "no_such_database"));
    let nobody = Setup::new(&url(options, "nobody_at_all", name));
    let mut unreachable = Setup::new(&format!("postgres://relay:{SECRET}@127.0.0.1:1/app"));
    unreachable.set("SOURCE__POSTGRES__CAPTURE", "poll");
    let mut kafka = Setup::new(&url(options, user, name));
    kafka.set("SINK__KAFKA__BROKERS", "127.0.0.1:1");
    kafka.set("SINK__KAFKA__SASL__MECHANISM", "PLAIN");
    kafka.set("SINK__KAFKA__SASL__USERNAME", "relay");
    kafka.set("SINK__KAFKA__SASL__PASSWORD", SECRET);
    tokio::join!(
        waits(&missing, &["no_such_database"]),
        waits(&nobody, &["nobody_at_all"]),
        waits(&unreachable, &["refused"]),
        waits(&kafka, &["127.0.0.1:1"]),
    );
    if std::env::var("DATABASE_PASSWORD_URL").is_ok() {
        let wrong = Setup::new(&url(options, "needs_password", name));
        waits(&wrong, &["password"]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_in_use_and_a_wrong_setting_end_it() {
    let setup = Setup::new(&format!("postgres://relay:{SECRET}@127.0.0.1:1/app"));
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let mut relay = setup.start_on(port);
    assert_eq!(relay.exit().await.code(), Some(1));
    let log = relay.log();
    eprintln!("{log}");
    assert!(
        log.contains(&format!("127.0.0.1:{port}")) && log.contains("admin.listen"),
        "{log}"
    );
    assert!(log.to_lowercase().contains("in use"), "{log}");

    let mut typo = Setup::new(&format!("postgres://relay:{SECRET}@127.0.0.1:1/app"));
    typo.set("RELAY__LEASE_TLL", "2s");
    let mut relay = typo.start();
    assert_eq!(relay.exit().await.code(), Some(2));
    assert!(relay.log().contains("lease_ttl"), "{}", relay.log());
    assert_eq!(relay.log().trim_end().lines().count(), 1, "{}", relay.log());
    assert!(!relay.log().contains(SECRET));
}
