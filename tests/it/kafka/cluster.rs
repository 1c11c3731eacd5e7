//! A broker to test against: the one of the environment, or one that a test may stop.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use outbox_relay::event::{Record, Seq};
use outbox_relay::position::Position;
use outbox_relay::sink::kafka::{Delivery, KafkaSink, Sasl, Settings, Tls, Topics};
use outbox_relay::sink::{NotPrepared, Receipt, Refused, Sink};
use rdkafka::admin::{AdminClient, AdminOptions, ResourceSpecifier};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{Headers, Message};
use rdkafka::{Offset, TopicPartitionList};
use tempfile::TempDir;
use tokio::sync::{Mutex, MutexGuard};
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

/// For whatever a test waits for: far more than it takes.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// The log that all positions here belong to.
pub(crate) const LOG: &str = "test";

/// Settings for brokers without encryption: as shipped, with topics of four partitions.
pub(crate) fn settings(brokers: &str) -> Settings {
    Settings {
        brokers: brokers.to_owned(),
        client_id: "outbox-relay".to_owned(),
        delivery: Delivery::AtLeastOnce,
        transactional_id: None,
        outbox_id: None,
        compression: "lz4".to_owned(),
        linger: Duration::ZERO,
        queue_records: 20_000,
        queue_bytes: bytesize::ByteSize::mib(32),
        topics: Topics {
            create: true,
            partitions: 4,
            replication_factor: -1,
            max: 1000,
            config: BTreeMap::new(),
        },
        tls: Tls {
            enabled: false,
            ca_file: None,
            certificate_file: None,
            key_file: None,
            key_password: None,
        },
        sasl: Sasl {
            mechanism: None,
            username: None,
            password: None,
            password_file: None,
        },
        properties: BTreeMap::new(),
    }
}

/// A variable of the services, or none, loudly: `RELAY_TEST_REQUIRE=1` forbids to go without.
pub(crate) fn variable(test: &str, name: &str) -> Option<String> {
    let value = env::var(name).ok().filter(|value| !value.is_empty());
    if value.is_none() {
        skip(test, &format!("{name} is not set"));
    }
    value
}

/// Says that a test could not run.
pub(crate) fn skip(test: &str, reason: &str) {
    assert!(
        env::var("RELAY_TEST_REQUIRE").as_deref() != Ok("1"),
        "{test} can't be skipped here: {reason}"
    );
    eprintln!("SKIPPED {test}: {reason}");
}

/// The brokers of the environment.
pub(crate) fn brokers(test: &str) -> Option<String> {
    variable(test, "KAFKA_BROKERS")
}

/// A name that no other test and no other run uses.
pub(crate) fn topic(what: &str) -> String {
    format!("{what}-{}", Uuid::new_v4().simple())
}

/// A record with this key and value, and nothing else.
pub(crate) fn record<'a>(topic: &'a str, key: &'a [u8], value: &'a [u8]) -> Record<'a> {
    Record {
        topic: topic.into(),
        key: Some(key.into()),
        value: Some(value.into()),
        headers: Vec::new(),
        timestamp_ms: now_ms(),
    }
}

/// The wall clock.
pub(crate) fn now_ms() -> i64 {
    let since = std::time::UNIX_EPOCH.elapsed().expect("after 1970");
    i64::try_from(since.as_millis()).expect("before the year 292 million")
}

/// A sink that is open and has its topics; begins again when the sink asks for it, as the loop does.
pub(crate) async fn opened(settings: Settings, topics: &[&str]) -> KafkaSink {
    let mut sink = KafkaSink::new(settings);
    open(&mut sink, topics).await;
    sink
}

/// Begins a life, as the loop does.
pub(crate) async fn open(sink: &mut impl Sink, topics: &[&str]) {
    let deadline = Instant::now() + LONG;
    'lives: loop {
        assert!(Instant::now() < deadline, "the topics can't be prepared");
        sink.open().await.expect("open");
        for topic in topics {
            match sink.prepare(topic).await {
                Ok(()) => {}
                Err(NotPrepared::Unknown(error) | NotPrepared::Reopen(error)) => {
                    eprintln!("{topic}: {error}");
                    sleep(Duration::from_millis(100)).await;
                    continue 'lives;
                }
                Err(NotPrepared::Rejected(rejection)) => panic!("{topic}: {rejection}"),
            }
        }
        sink.resume(LOG).await.expect("resume");
        return;
    }
}

/// Hands one record over, waiting for room; gives back the receipts that came meanwhile.
pub(crate) async fn hand_over(sink: &mut impl Sink, seq: u64, record: &Record<'_>) -> Vec<Receipt> {
    let mut receipts = Vec::new();
    loop {
        match sink.hand_over(Seq(seq), record) {
            Ok(()) => return receipts,
            Err(Refused::Full) => {
                sink.commit(&Position::beginning());
                timeout(LONG, sink.receipts(&mut receipts))
                    .await
                    .expect("room in time")
                    .expect("receipts");
            }
            Err(refused) => panic!("record {seq}: {refused:?}"),
        }
    }
}

/// Waits until this many receipts are there, all of them for records that were delivered.
pub(crate) async fn delivered(sink: &mut impl Sink, receipts: &mut Vec<Receipt>, count: usize) {
    sink.commit(&Position::beginning());
    timeout(LONG, async {
        while receipts.len() < count {
            sink.receipts(receipts).await.expect("receipts");
        }
    })
    .await
    .expect("receipts in time");
    assert_eq!(receipts.len(), count);
    let mut seqs: Vec<u64> = receipts.iter().map(delivered_seq).collect();
    seqs.sort_unstable();
    seqs.dedup();
    assert_eq!(seqs.len(), count, "a receipt came twice");
}

/// The record that this receipt says was delivered.
pub(crate) fn delivered_seq(receipt: &Receipt) -> u64 {
    match receipt {
        Receipt::Delivered(seq) => seq.0,
        Receipt::Rejected(..) => panic!("{receipt:?}"),
    }
}

/// Publishes records and waits until all of them are there.
pub(crate) async fn publish(sink: &mut impl Sink, records: &[Record<'_>]) {
    let mut receipts = Vec::new();
    for (seq, record) in (0..).zip(records) {
        receipts.append(&mut hand_over(sink, seq, record).await);
    }
    delivered(sink, &mut receipts, records.len()).await;
}

/// A record as a consumer sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Arrived {
    pub(crate) partition: i32,
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) value: Option<Vec<u8>>,
    pub(crate) headers: Vec<(String, Option<Vec<u8>>)>,
    pub(crate) timestamp_ms: Option<i64>,
}

impl Arrived {
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(self.value.as_deref().expect("a value")).expect("text")
    }
}

/// Everything that is committed in a topic now, partition by partition, in the order of the log.
pub(crate) async fn consume(brokers: &str, topic: &str) -> Vec<Arrived> {
    let (brokers, topic) = (brokers.to_owned(), topic.to_owned());
    tokio::task::spawn_blocking(move || consume_now(&brokers, &topic))
        .await
        .expect("the consumer ends")
}

fn consume_now(brokers: &str, topic: &str) -> Vec<Arrived> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", topic)
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .create()
        .expect("a consumer");
    let metadata = consumer
        .fetch_metadata(Some(topic), LONG)
        .expect("metadata");
    let mut assignment = TopicPartitionList::new();
    let mut open = BTreeSet::new();
    for partition in metadata.topics()[0].partitions() {
        open.insert(partition.id());
        assignment
            .add_partition_offset(topic, partition.id(), Offset::Beginning)
            .expect("an offset");
    }
    consumer.assign(&assignment).expect("an assignment");
    let deadline = Instant::now() + LONG;
    let mut arrived: BTreeMap<i32, Vec<Arrived>> = BTreeMap::new();
    while !open.is_empty() {
        assert!(Instant::now() < deadline, "{open:?} have no end");
        let Some(message) = consumer.poll(Duration::from_millis(100)) else {
            continue;
        };
        if let Err(KafkaError::PartitionEOF(partition)) = message {
            open.remove(&partition);
            continue;
        }
        let message = message.expect("a record");
        arrived
            .entry(message.partition())
            .or_default()
            .push(Arrived {
                partition: message.partition(),
                key: message.key().map(<[u8]>::to_vec),
                value: message.payload().map(<[u8]>::to_vec),
                headers: message.headers().map_or_else(Vec::new, |headers| {
                    headers
                        .iter()
                        .map(|header| (header.key.to_owned(), header.value.map(<[u8]>::to_vec)))
                        .collect()
                }),
                timestamp_ms: message.timestamp().to_millis(),
            });
    }
    arrived.into_values().flatten().collect()
}

/// Checks that numbered values, `0` to `count - 1`, are all there, and that first deliveries of each key are in order.
pub(crate) fn assert_complete_and_in_order(arrived: &[Arrived], count: u64) {
    let mut newest: HashMap<&[u8], u64> = HashMap::new();
    let mut seen = vec![false; usize::try_from(count).expect("few")];
    for record in arrived {
        let number: u64 = record.text().trim().parse().expect("a number");
        let first = !std::mem::replace(&mut seen[usize::try_from(number).expect("few")], true);
        let key = record.key.as_deref().expect("a key");
        if first && let Some(before) = newest.insert(key, number) {
            assert!(before < number, "{number} came after {before}");
        }
    }
    let missing: Vec<usize> = (0..seen.len()).filter(|n| !seen[*n]).collect();
    assert!(
        missing.is_empty(),
        "{} are missing: {missing:?}",
        missing.len()
    );
}

/// For what tests do to topics themselves.
pub(crate) fn admin(brokers: &str) -> AdminClient<DefaultClientContext> {
    ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()
        .expect("an admin client")
}

/// The settings of a topic.
pub(crate) async fn topic_config(brokers: &str, topic: &str) -> HashMap<String, String> {
    let described = admin(brokers)
        .describe_configs([&ResourceSpecifier::Topic(topic)], &AdminOptions::new())
        .await
        .expect("an answer");
    let resource = described[0].as_ref().expect("a topic");
    resource
        .entries
        .iter()
        .filter_map(|entry| Some((entry.name.clone(), entry.value.clone()?)))
        .collect()
}

/// How many partitions a topic has.
pub(crate) fn partitions(brokers: &str, topic: &str) -> usize {
    let admin = admin(brokers);
    let metadata = admin.inner().fetch_metadata(Some(topic), LONG);
    metadata.expect("metadata").topics()[0].partitions().len()
}

/// One at a time is enough for a small machine.
static OWN_BROKER: Mutex<()> = Mutex::const_new(());

/// A broker that a test may stop, pause and kill.
pub(crate) struct OwnBroker {
    folder: PathBuf,
    variables: HashMap<String, String>,
    _temporary: Option<TempDir>,
    _only: MutexGuard<'static, ()>,
}

impl OwnBroker {
    /// Starts one, or says why not.
    pub(crate) async fn start(test: &str) -> Option<Self> {
        brokers(test)?;
        let only = OWN_BROKER.lock().await;
        // Where the one who started the services cleans up; else a temporary folder of our own.
        let (folder, temporary) = if let Some(folder) = env::var_os("RELAY_TEST_FOLDER") {
            (Path::new(&folder).join(topic("broker")), None)
        } else {
            let temporary = tempfile::tempdir().expect("a folder");
            (temporary.path().join("broker"), Some(temporary))
        };
        let mut broker = Self {
            folder,
            variables: HashMap::new(),
            _temporary: temporary,
            _only: only,
        };
        broker.start_again();
        Some(broker)
    }

    /// Starts it with its old ports and data.
    pub(crate) fn start_again(&mut self) {
        let started = Command::new(script("kafka"))
            .arg(&self.folder)
            .stderr(Stdio::inherit())
            .output()
            .expect("run the script");
        assert!(started.status.success(), "the broker does not start");
        self.variables = String::from_utf8(started.stdout)
            .expect("text")
            .lines()
            .filter_map(|line| line.strip_prefix("export ")?.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.trim_matches('\'').to_owned()))
            .collect();
    }

    pub(crate) fn brokers(&self) -> &str {
        &self.variables["KAFKA_BROKERS"]
    }

    /// Sends it a signal such as `KILL`, `STOP` or `CONT`.
    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .args(["-s", name, &self.variables["KAFKA_PID"]])
            .status()
            .expect("run kill");
        assert!(sent.success(), "signal {name}");
    }

    /// Stops it and waits for its end.
    pub(crate) fn stop(&self) {
        let stopped = Command::new(script("down")).arg(&self.folder).status();
        assert!(stopped.expect("run the script").success());
    }
}

impl Drop for OwnBroker {
    fn drop(&mut self) {
        drop(Command::new(script("down")).arg(&self.folder).status());
    }
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/services")
        .join(name)
}
