//! A broker that lets nobody do what was not granted: the relay gets along with what the README grants, and says what is
//! missing otherwise.

use std::collections::HashSet;
use std::process::{Command, Output};

use serde_json::Value;

use super::kafka::Kafka;
use super::process::Setup;
use super::services::Own;
use super::verify::verify;
use super::{number, run, settled};
use crate::harness::postgres::TestDatabase;

/// What the README grants for each mode, in its order.
#[derive(Clone, Copy)]
enum Grants {
    AtLeastOnce,
    ExactlyOnce,
    Verify,
}

/// The commands of one block of the README's section.
fn commands(grants: Grants) -> Vec<String> {
    let readme = concat!(env!("CARGO_MANIFEST_DIR"), "/README.md");
    let readme = std::fs::read_to_string(readme).unwrap();
    let (_, section) = readme.split_once("\n## Rights in Kafka\n").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    let blocks: Vec<&str> = section.split("```").skip(1).step_by(2).collect();
    assert_eq!(blocks.len(), 3);
    let block = blocks[grants as usize].strip_prefix("sh\n").unwrap();
    let block = block.replace("\\\n", "");
    block.lines().map(str::to_owned).collect()
}

/// A broker with an authorizer; whoever logs in without a password is an administrator.
struct Guarded {
    broker: Own,
    kafka: Kafka,
    database: TestDatabase,
    setup: Setup,
}

impl Guarded {
    async fn create(test: &str) -> Option<Self> {
        let broker = Own::kafka_with(
            test,
            &[
                "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer",
                "super.users=User:ANONYMOUS",
            ],
        )?;
        let database = TestDatabase::create().await?;
        let kafka = Kafka {
            brokers: broker.variable("KAFKA_BROKERS").to_owned(),
            prefix: "shop".to_owned(),
        };
        let mut setup = Setup::new(&database.url);
        for (name, value) in [
            ("BROKERS", broker.variable("KAFKA_SASL_BROKERS")),
            ("TOPICS__PARTITIONS", "3"),
            ("TLS__ENABLED", "true"),
            ("TLS__CA_FILE", broker.variable("KAFKA_CA_FILE")),
            ("SASL__MECHANISM", "PLAIN"),
            ("SASL__USERNAME", broker.variable("KAFKA_SASL_USERNAME")),
            ("SASL__PASSWORD", broker.variable("KAFKA_SASL_PASSWORD")),
        ] {
            setup.set(&format!("SINK__KAFKA__{name}"), value);
        }
        setup.set("PIPELINE__TOPIC", "shop.{aggregate_type}");
        Some(Self {
            broker,
            kafka,
            database,
            setup,
        })
    }

    /// Runs what people would run with `kafka-acls.sh`.
    async fn acls(&self, commands: Vec<String>) {
        let (jars, brokers) = (
            self.broker.variable("KAFKA_JARS").to_owned(),
            self.kafka.brokers.clone(),
        );
        for command in commands {
            let words = command.strip_prefix("kafka-acls.sh ").unwrap();
            let words = words.replace("kafka.example:9092", &brokers);
            let mut tool = Command::new("java");
            tool.args(["-XX:TieredStopAtLevel=1", "-cp", &format!("{jars}/*")])
                .arg("org.apache.kafka.tools.AclCommand")
                .args(words.split_whitespace());
            let output = output(tool).await;
            assert!(output.status.success(), "{command}: {output:?}");
        }
    }

    async fn grant(&self, grants: Grants) {
        self.acls(commands(grants)).await;
    }

    async fn deny(&self, operation: &str, topic: &str) {
        let deny = format!(
            "kafka-acls.sh --bootstrap-server kafka.example:9092 --add --deny-principal User:relay \
             --topic {topic} --operation {operation}"
        );
        self.acls(vec![deny]).await;
    }

    async fn emit(&self, kinds: &str) {
        run(
            &self.database.pool,
            format!(
                "select outbox.emit(kind, (n % 3)::text, 'changed', n::text::json)
                   from generate_series(1, 30) n, unnest('{{{kinds}}}'::text[]) kind"
            ),
        )
        .await;
    }

    /// Why events of this aggregate type were rejected.
    async fn errors(&self, kind: &str) -> Vec<String> {
        sqlx::query_scalar(
            "select error from outbox.parked where aggregate_type = $1 and error is not null",
        )
        .bind(kind)
        .fetch_all(&self.database.pool)
        .await
        .unwrap()
    }

    /// What rights the doctor misses at the brokers, for a pipeline to this topic: text and remedy.
    async fn doctor(&self, topic: &str) -> Vec<(String, String)> {
        let mut doctor = self.setup.command("doctor");
        doctor.arg("--json").env("RELAY_PIPELINE__TOPIC", topic);
        let output = output(doctor).await;
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        let found = found.as_array().unwrap().iter();
        found
            .filter(|finding| finding["check"] == "kafka_rights")
            .map(|finding| {
                let remedy = finding["remedy"]["command"].as_str().unwrap();
                (
                    finding["what"].as_str().unwrap().to_owned(),
                    remedy.to_owned(),
                )
            })
            .collect()
    }
}

async fn output(mut command: Command) -> Output {
    let ran = tokio::task::spawn_blocking(move || command.output().unwrap());
    ran.await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rights_in_the_readme_suffice_and_a_topic_without_them_stands_alone() {
    const TEST: &str = "the_rights_in_the_readme_suffice_and_a_topic_without_them_stands_alone";
    let Some(guarded) = Guarded::create(TEST).await else {
        return;
    };
    // To look at topics and to make them is not enough.
    let [all] = &commands(Grants::AtLeastOnce)[..] else {
        panic!("one command");
    };
    let some = all.replace("--operation Write", "");
    assert_ne!(some, *all);
    guarded.acls(vec![some]).await;
    guarded.emit("order,customer").await;
    let relay = guarded.setup.start();
    relay
        .not_ready(&["lacks the right Write on every topic"])
        .await;
    guarded.grant(Grants::AtLeastOnce).await;
    settled(&guarded.database.pool).await;
    let published = guarded.kafka.read(&["order", "customer"]).await;
    assert_eq!(published.len(), 60);
    assert_eq!(guarded.doctor("shop.new").await, []);
    guarded.grant(Grants::Verify).await;
    let (code, report) = verify(&guarded.setup, &[]).await;
    assert_eq!(
        (code, &report["pipelines"][0]["found"]),
        (0, &60.into()),
        "{report}"
    );

    // It is there, and may be looked at.
    guarded.kafka.create(&["invoice"]).await;
    guarded.deny("Write", "shop.invoice").await;
    guarded.deny("Describe", "shop.hidden").await;
    // What can be done without, once the topic is there.
    guarded.deny("Create", "shop.order").await;
    guarded.deny("DescribeConfigs", "shop.order").await;
    guarded.deny("Create", "shop.absent").await;
    guarded.emit("order,invoice,hidden,absent").await;
    settled(&guarded.database.pool).await;
    // Nobody waits while a thousand entities of that topic are refused.
    run(
        &guarded.database.pool,
        "select outbox.emit('invoice', 'x' || n, 'changed', n::text::json) from generate_series(1, 1000) n",
    )
    .await;
    guarded.emit("order").await;
    settled(&guarded.database.pool).await;
    // A refusal ends a life, so that others may come twice.
    let orders = guarded.kafka.read(&["order"]).await;
    let distinct: HashSet<_> = orders.iter().map(|order| order.header("id")).collect();
    assert_eq!(distinct.len(), 90);
    for (kind, right, entities) in [
        ("invoice", "Write", 1003),
        ("hidden", "Describe", 3),
        ("absent", "Create", 3),
    ] {
        // The others of an entity wait behind its first.
        let errors = guarded.errors(kind).await;
        assert_eq!(errors.len(), entities, "{kind}");
        let lacks = format!("lacks the right {right} on");
        let other = errors.iter().find(|error| !error.contains(&lacks));
        assert_eq!(other, None, "{kind}");
    }
    assert_eq!(
        number(&guarded.database.pool, "select count(*) from outbox.parked").await,
        1090
    );
    relay.stop().await;
    for (topic, right) in [("shop.hidden", "Describe"), ("shop.absent", "Create")] {
        let found = guarded.doctor(topic).await;
        let [(what, remedy)] = &found[..] else {
            panic!("{topic}: {found:?}");
        };
        assert_eq!(
            *what,
            format!("relay lacks the right {right} on topic {topic}")
        );
        let grant = format!("--allow-principal User:relay --topic {topic} --operation Describe");
        assert!(remedy.contains(&grant), "{remedy}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exactly_once_stalls_until_its_rights_are_granted() {
    const TEST: &str = "exactly_once_stalls_until_its_rights_are_granted";
    let Some(mut guarded) = Guarded::create(TEST).await else {
        return;
    };
    guarded.setup.set("SINK__KAFKA__DELIVERY", "exactly-once");
    guarded
        .setup
        .set("SINK__KAFKA__TRANSACTIONAL_ID", "shop-relay");
    guarded.grant(Grants::AtLeastOnce).await;
    guarded.emit("order,customer").await;
    let relay = guarded.setup.start();
    let reason = relay.not_ready(&["lacks the right Describe on"]).await;
    assert!(reason.contains("shop-relay.main.0.positions"), "{reason}");
    let found = guarded.doctor("shop.order").await;
    let found: Vec<&str> = found.iter().map(|(what, _)| &what[..]).collect();
    assert_eq!(
        found,
        [
            "relay lacks the right Describe on topic shop-relay.main.0.positions",
            "relay lacks the right Describe or Write on transactional ids that begin with shop-relay."
        ]
    );
    let [ids, positions] = &commands(Grants::ExactlyOnce)[..] else {
        panic!("two commands");
    };
    guarded.acls(vec![positions.clone()]).await;
    let reason = relay
        .not_ready(&["lacks the right Describe or Write on"])
        .await;
    assert!(
        reason.contains("transactional id shop-relay.main.0"),
        "{reason}"
    );
    assert_eq!(relay.state(), "stalled");
    // It goes on by itself.
    guarded.acls(vec![ids.clone()]).await;
    settled(&guarded.database.pool).await;
    let topics = ["order", "customer"].map(|kind| guarded.kafka.topic(kind));
    let mut reader = guarded.kafka.reader(&topics);
    assert_eq!(reader.read_on(60).await.len(), 60);
    assert_eq!(
        number(&guarded.database.pool, "select count(*) from outbox.parked").await,
        0
    );

    assert_eq!(guarded.doctor("shop.order").await, []);

    guarded.kafka.create(&["invoice"]).await;
    guarded.deny("Write", "shop.invoice").await;
    guarded.emit("order,invoice").await;
    settled(&guarded.database.pool).await;
    assert_eq!(reader.read_on(30).await.len(), 30);
    let errors = guarded.errors("invoice").await;
    assert_eq!(errors.len(), 3);
    assert!(errors[0].contains("lacks the right Write on"), "{errors:?}");
    relay.stop().await;
}
