//! Retained events are published again, beside the live flow.

use std::collections::HashSet;
use std::process::{Child, Output, Stdio};

use super::kafka::{Kafka, Received};
use super::process::{Setup, signal};
use super::verify::sqlite;
use super::{Line, PATIENCE, eventually, number, run};
use crate::harness::postgres::TestDatabase;
use crate::harness::sqlite::TestFile;

/// The outbox of a test. The tables have the same columns.
enum Outbox {
    Postgres(Box<TestDatabase>),
    Sqlite(Box<TestFile>),
}

/// Ten orders and ten customers with thirty events each.
const EMIT: [&str; 2] = [
    "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload)
     select kind, (n % 10)::text, case when n % 3 = 0 then 'third' else 'other' end, n::text::json
       from generate_series(0, 299) n, unnest(array['order', 'customer']) kind",
    "insert into outbox_events (aggregate_type, aggregate_id, event_type, payload)
     with recursive numbers (n) as (select 0 union all select n + 1 from numbers where n < 299)
     select kind, cast(n % 10 as text), iif(n % 3 = 0, 'third', 'other'), cast(n as text)
       from numbers, (select 'order' as kind union all select 'customer')",
];

impl Outbox {
    async fn emit(&self) {
        match self {
            Self::Postgres(database) => run(&database.pool, EMIT[0]).await,
            Self::Sqlite(file) => {
                let mut connection = file.connect().await;
                sqlx::raw_sql(EMIT[1])
                    .execute(&mut connection)
                    .await
                    .unwrap();
            }
        }
    }

    async fn number(&self, [postgres, sqlite]: [&'static str; 2]) -> i64 {
        match self {
            Self::Postgres(database) => number(&database.pool, postgres).await,
            Self::Sqlite(file) => {
                let mut connection = file.connect().await;
                let number = sqlx::query_scalar(sqlite).fetch_one(&mut connection);
                number.await.unwrap()
            }
        }
    }
}

/// Where the replayed records are, and what they are told by.
struct Stage {
    outbox: Outbox,
    kafka: Kafka,
    setup: Setup,
    topic: String,
}

impl Stage {
    async fn postgres(test: &str) -> Option<Self> {
        let Line {
            database,
            kafka,
            setup,
        } = Line::create(test).await?;
        Some(Self::set(Outbox::Postgres(Box::new(database)), kafka, setup).await)
    }

    async fn sqlite(test: &str) -> Option<Self> {
        let (file, kafka, setup) = sqlite(test).await?;
        Some(Self::set(Outbox::Sqlite(Box::new(file)), kafka, setup).await)
    }

    /// Everything is published once.
    async fn set(outbox: Outbox, kafka: Kafka, mut setup: Setup) -> Self {
        kafka.create(&["all", "again"]).await;
        let topic = kafka.topic("all");
        setup.set("PIPELINE__TOPIC", &topic);
        let relay = setup.start();
        relay.ready().await;
        outbox.emit().await;
        eventually("everything published", PATIENCE, async || {
            (relay.pipeline("main")?["delivered_events"] == 600).then_some(())
        })
        .await;
        relay.stop().await;
        let stage = Self {
            outbox,
            kafka,
            setup,
            topic,
        };
        assert_eq!(stage.read(&stage.topic).await.len(), 600);
        stage
    }

    async fn read(&self, topic: &str) -> Vec<Received> {
        let topics = [topic.to_owned()];
        self.kafka.reader(&topics).read_to_end().await
    }

    async fn replayed(&self, topic: &str) -> Vec<Received> {
        let mut records = self.read(topic).await;
        records.retain(|record| record.header("replay").is_some());
        records
    }

    fn start(&self, arguments: &[&str]) -> Child {
        let mut command = self.setup.command("replay");
        command
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    fn replay(&self, arguments: &[&str]) -> Output {
        self.start(arguments).wait_with_output().unwrap()
    }

    /// What a replay says that has to succeed.
    fn succeeds(&self, arguments: &[&str]) -> String {
        let output = self.replay(arguments);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What a replay says that has to fail.
    fn fails(&self, arguments: &[&str]) -> String {
        let output = self.replay(arguments);
        // 2 where the command line says too little.
        assert!(matches!(output.status.code(), Some(1 | 2)), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    }
}

/// `aggregate/event type/payload`, sorted.
fn names(records: &[Received]) -> Vec<String> {
    let mut names: Vec<String> = records
        .iter()
        .map(|record| {
            let name = record.header("type").unwrap_or_default();
            format!(
                "{}/{}/{}",
                record.key_text(),
                String::from_utf8_lossy(name),
                record.text()
            )
        })
        .collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_asked_for_is_published_again_and_marked() {
    const TEST: &str = "what_is_asked_for_is_published_again_and_marked";
    if let Some(stage) = Stage::postgres(TEST).await {
        is_published_again_and_marked(stage).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_asked_for_of_sqlite_is_published_again_and_marked() {
    const TEST: &str = "what_is_asked_for_of_sqlite_is_published_again_and_marked";
    if let Some(stage) = Stage::sqlite(TEST).await {
        is_published_again_and_marked(stage).await;
    }
}

async fn is_published_again_and_marked(stage: Stage) {
    const CURSOR: [&str; 2] = [
        "select last_id from outbox.cursors",
        "select last_id from outbox_cursors",
    ];
    let before = stage.outbox.number(CURSOR).await;
    assert!(stage.fails(&["start"]).contains("--all"));

    let said = stage.succeeds(&["start", "--entity", "order/7", "--dry-run"]);
    assert!(
        said.contains("would publish 30 events of 1 entity"),
        "{said}"
    );
    assert_eq!(stage.replayed(&stage.topic).await.len(), 0);

    stage.succeeds(&["start", "--entity", "order/7", "--rate", "100000"]);
    let again = stage.replayed(&stage.topic).await;
    let numbers: Vec<&str> = again.iter().map(Received::text).collect();
    let expected: Vec<String> = (0..30).map(|n| (n * 10 + 7).to_string()).collect();
    assert_eq!(numbers, expected, "in their order");
    assert!(
        again
            .iter()
            .all(|record| record.header("replay") == Some(b"1"))
    );
    // Apart from the mark they are what they were.
    let first = stage.read(&stage.topic).await;
    for record in &again {
        let id = record.header("id");
        let original = first
            .iter()
            .find(|other| other.header("id") == id && other.header("replay").is_none())
            .unwrap();
        assert_eq!(
            (&original.key, &original.value),
            (&record.key, &record.value)
        );
        assert_eq!(original.timestamp_ms, record.timestamp_ms);
    }

    // To a topic of its own, by several conditions.
    let other = stage.kafka.topic("again");
    let rate = ["--rate", "100000", "--topic", &other];
    stage.succeeds(
        &[
            &[
                "start",
                "--aggregate-type",
                "customer",
                "--event-type",
                "third",
            ],
            &rate[..],
        ]
        .concat(),
    );
    let third = stage.replayed(&other).await;
    assert_eq!(third.len(), 100);
    assert!(names(&third).iter().all(|name| name.contains("/third/")));
    let id = String::from_utf8(third[0].header("id").unwrap().to_vec()).unwrap();
    stage.succeeds(&[&["start", "--event-id", &id], &rate[..]].concat());
    assert_eq!(stage.replayed(&other).await.len(), 101);
    stage.succeeds(&[&["start", "--until", "2020-01-01T00:00:00Z"], &rate[..]].concat());
    assert_eq!(stage.replayed(&other).await.len(), 101);

    assert_eq!(stage.outbox.number(CURSOR).await, before);
    let listed = stage.succeeds(&["list"]);
    assert_eq!(listed.matches("done").count(), 4, "{listed}");
    let listed: serde_json::Value =
        serde_json::from_str(&stage.succeeds(&["list", "--json"])).unwrap();
    let newest = &listed[0];
    assert_eq!(newest["published"], 0);
    assert!(!newest["created_by"].as_str().unwrap().is_empty());
    assert!(newest["age_seconds"].as_f64().unwrap() < 60.0, "{newest}");
    assert!(stage.fails(&["resume", "1"]).contains("replay 1 is done"));
    assert!(stage.fails(&["cancel", "1"]).contains("no open replay 1"));
    assert!(
        stage
            .fails(&["resume", "99"])
            .contains("there is no replay 99")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_is_paused_resumed_and_cancelled() {
    if let Some(stage) = Stage::postgres("a_replay_is_paused_resumed_and_cancelled").await {
        is_paused_resumed_and_cancelled(stage).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_of_sqlite_is_paused_resumed_and_cancelled() {
    const TEST: &str = "a_replay_of_sqlite_is_paused_resumed_and_cancelled";
    if let Some(stage) = Stage::sqlite(TEST).await {
        is_paused_resumed_and_cancelled(stage).await;
    }
}

async fn is_paused_resumed_and_cancelled(stage: Stage) {
    const PUBLISHED: [&str; 2] = [
        "select coalesce(max(id * 1000 + published), 0) from outbox.replays",
        "select coalesce(max(id * 1000 + published), 0) from outbox_replays",
    ];
    let some_published = async |newest: i64| {
        eventually("some of it", PATIENCE, async || {
            let published = stage.outbox.number(PUBLISHED).await;
            (published >= newest * 1000 + 20).then_some(())
        })
        .await;
    };
    let slow = ["start", "--aggregate-type", "order", "--rate", "40"];
    let running = stage.start(&slow);
    some_published(1).await;
    assert!(stage.fails(&["resume", "1"]).contains("is being run by"));
    signal(&running.id().to_string(), "TERM");
    let output = running.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("outbox-relay replay resume 1"), "{said}");
    assert!(stage.succeeds(&["list"]).contains("paused"));
    stage.succeeds(&["resume", "1", "--rate", "100000"]);
    let records = stage.replayed(&stage.topic).await;
    let distinct: HashSet<&str> = records.iter().map(Received::text).collect();
    assert_eq!(distinct.len(), 300);
    // A page at 40 events a second has 10.
    assert!(records.len() <= 310, "{}", records.len());

    let running = stage.start(&slow);
    some_published(2).await;
    stage.succeeds(&["cancel", "2"]);
    let output = running.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("cancelled"), "{said}");
    assert!(stage.replayed(&stage.topic).await.len() < records.len() + 250);
    assert!(stage.fails(&["resume", "2"]).contains("is cancelled"));
}
