//! Passwords that are replaced while a relay runs: in the server first or in the file first, and with the file gone for a
//! moment. The same process goes on.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPool};
use tempfile::TempDir;
use tokio::time::Instant;

use super::kafka::{Kafka, Reader};
use super::process::{Process, Setup};
use super::run;
use super::services::Own;
use crate::harness::postgres::TestDatabase;

/// Patience. 15 s are promised; what it took is printed, because a busy machine takes longer.
const WITHIN: Duration = Duration::from_secs(60);

/// A file with a secret, replaced as Kubernetes and Vault do: by a rename.
struct Secret {
    folder: TempDir,
}

impl Secret {
    fn new(text: &str) -> Self {
        let secret = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        secret.replace(text);
        secret
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("secret")
    }

    fn replace(&self, text: &str) {
        let new = self.folder.path().join("new");
        std::fs::write(&new, format!("{text}\n")).unwrap();
        std::fs::rename(new, self.path()).unwrap();
    }
}

async fn emit(pool: &PgPool, id: &str) {
    let emit = format!("select outbox.emit('order', '{id}', 'placed', '{{}}')");
    run(pool, emit).await;
}

/// Waits until an event of this entity is published, and says how long that took.
async fn published(reader: &mut Reader, id: &str) {
    let since = Instant::now();
    loop {
        let records = reader.read_on(1).await;
        assert!(since.elapsed() < WITHIN, "{id}: not published in time");
        if records.iter().any(|record| record.key_text() == id) {
            break;
        }
    }
    eprintln!("{id}: published after {:?}", since.elapsed());
}

fn says_no_secret(relay: &Process, secrets: &[&str]) {
    let log = relay.log();
    for secret in secrets {
        assert!(!log.contains(secret), "{log}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_of_the_database_is_rotated_without_a_restart() {
    const TEST: &str = "a_password_of_the_database_is_rotated_without_a_restart";
    let Some(brokers) = crate::fresh::needed(TEST, "KAFKA_BROKERS") else {
        return;
    };
    let Some(own) = Own::postgres(TEST) else {
        return;
    };
    let admin: PgConnectOptions = own.variable("DATABASE_URL").parse().unwrap();
    outbox_relay::migrate::postgres(admin.clone())
        .await
        .unwrap();
    let pool = PgPool::connect_with(admin).await.unwrap();
    run(&pool, "grant outbox_relay to needs_password").await;
    let url = |password: &str| {
        own.variable("DATABASE_PASSWORD_URL")
            .replace("open-sesame", password)
    };
    let secret = Secret::new(&url("open-sesame"));
    let kafka = Kafka::new(brokers);
    kafka.create(&["order"]).await;
    let mut reader = kafka.reader(&[kafka.topic("order")]);
    let mut setup = Setup::new("");
    setup.kafka(&kafka);
    setup.set("RELAY__LEASE_TTL", "2s");
    let path = secret.path();
    setup.set("SOURCE__POSTGRES__URL_FILE", path.to_str().unwrap());
    let mut relay = setup.start();
    relay.ready().await;
    emit(&pool, "before").await;
    published(&mut reader, "before").await;

    // The server first: until the file is replaced everything is refused.
    rotate(&pool, "second-secret").await;
    relay.not_ready(&["password authentication failed"]).await;
    emit(&pool, "second").await;
    std::fs::remove_file(&path).unwrap();
    relay.not_ready(&["No such file"]).await;
    std::fs::write(&path, "").unwrap();
    relay.not_ready(&["the file is empty"]).await;
    secret.replace(&url("second-secret"));
    published(&mut reader, "second").await;
    relay.ready().await;

    // The file first.
    secret.replace(&url("third-secret"));
    rotate(&pool, "third-secret").await;
    emit(&pool, "third").await;
    published(&mut reader, "third").await;

    // The other commands and the HTTP interface use the same source of values.
    let (code, _) = relay.get("/acts").unwrap();
    assert_eq!(code, 200);
    relay.signal("HUP");
    relay.says("source.postgres.url_file (its content)").await;
    relay.signal("HUP");
    relay.says("nothing has changed").await;
    says_no_secret(&relay, &["open-sesame", "second-secret", "third-secret"]);
    assert!(relay.is_alive());
    relay.stop().await;
}

/// Replaces the password, and ends the sessions that used the one before.
async fn rotate(pool: &PgPool, password: &str) {
    run(
        pool,
        format!("alter role needs_password password '{password}'"),
    )
    .await;
    run(
        pool,
        "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'needs_password'",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_of_kafka_is_rotated_without_a_restart() {
    rotated_in_kafka("a_password_of_kafka_is_rotated_without_a_restart", false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_of_kafka_is_rotated_exactly_once() {
    rotated_in_kafka("a_password_of_kafka_is_rotated_exactly_once", true).await;
}

async fn rotated_in_kafka(test: &str, exactly_once: bool) {
    let Some(mut broker) = Own::kafka(test) else {
        return;
    };
    let Some(database) = TestDatabase::create().await else {
        return;
    };
    let kafka = Kafka::new(broker.variable("KAFKA_BROKERS").to_owned());
    kafka.create(&["order"]).await;
    let mut reader = kafka.reader(&[kafka.topic("order")]);
    let secret = Secret::new(broker.variable("KAFKA_SASL_PASSWORD"));
    let path = secret.path();
    let mut setup = Setup::new(&database.url);
    setup.kafka(&kafka);
    for (name, value) in [
        ("BROKERS", broker.variable("KAFKA_SASL_BROKERS")),
        ("TLS__ENABLED", "true"),
        ("TLS__CA_FILE", broker.variable("KAFKA_CA_FILE")),
        ("SASL__MECHANISM", "SCRAM-SHA-512"),
        ("SASL__USERNAME", broker.variable("KAFKA_SASL_USERNAME")),
        ("SASL__PASSWORD_FILE", path.to_str().unwrap()),
    ] {
        setup.set(&format!("SINK__KAFKA__{name}"), value);
    }
    if exactly_once {
        setup.set("SINK__KAFKA__DELIVERY", "exactly-once");
        setup.set("SINK__KAFKA__TRANSACTIONAL_ID", &kafka.prefix);
    }
    let mut relay = setup.start();
    relay.ready().await;
    emit(&database.pool, "before").await;
    published(&mut reader, "before").await;

    alter_password(&broker, "second-secret");
    // Ends the sessions that logged in with the password before.
    broker.stop();
    broker.start();
    emit(&database.pool, "second").await;
    relay.not_ready(&["authentication"]).await;
    secret.replace("second-secret");
    published(&mut reader, "second").await;
    relay.ready().await;

    std::fs::remove_file(&path).unwrap();
    alter_password(&broker, "third-secret");
    broker.stop();
    broker.start();
    emit(&database.pool, "third").await;
    relay.not_ready(&["No such file"]).await;
    secret.replace("third-secret");
    published(&mut reader, "third").await;
    relay.ready().await;
    says_no_secret(&relay, &["relay-secret", "second-secret", "third-secret"]);
    assert!(relay.is_alive());
    relay.stop().await;
}

/// As `kafka-configs.sh` does.
fn alter_password(broker: &Own, password: &str) {
    let output = Command::new("java")
        .args(["-XX:TieredStopAtLevel=1", "-cp"])
        .arg(format!("{}/*", broker.variable("KAFKA_JARS")))
        .arg("kafka.admin.ConfigCommand")
        .args(["--bootstrap-server", broker.variable("KAFKA_BROKERS")])
        .args(["--alter", "--entity-type", "users", "--entity-name"])
        .arg(broker.variable("KAFKA_SASL_USERNAME"))
        .arg("--add-config")
        .arg(format!("SCRAM-SHA-512=[password={password}]"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}
