//! A broker to test against: the one of the environment, or one that a test may stop.

use std::collections::{BTreeMap, HashMap};
use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use outbox_relay::event::{Record, Seq};
use outbox_relay::sink::kafka::{KafkaSink, Sasl, Settings, Tls, Topics};
use outbox_relay::sink::{NotPrepared, Receipt, Refused, Sink};
use rdkafka::admin::{AdminClient, AdminOptions, ResourceSpecifier};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Headers, Message};
use rdkafka::{Offset, TopicPartitionList};
use tempfile::TempDir;
use tokio::sync::{Mutex, MutexGuard};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

/// For whatever a test waits for: far more than it takes.
pub const LONG: Duration = Duration::from_secs(60);

/// Settings for brokers without encryption: as shipped, with topics of four partitions.
pub fn settings(brokers: &str) -> Settings {
    Settings {
        brokers: brokers.to_owned(),
        client_id: "outbox-relay".to_owned(),
        compression: "lz4".to_owned(),
        linger: Duration::ZERO,
        queue_records: 20_000,
        queue_bytes: bytesize::ByteSize::mib(32),
        topics: Topics {
            create: true,
            partitions: 4,
            replication_factor: -1,
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
pub fn variable(test: &str, name: &str) -> Option<String> {
    let value = env::var(name).ok().filter(|value| !value.is_empty());
    if value.is_none() {
        skip(test, &format!("{name} is not set"));
    }
    value
}

/// Says that a test could not run.
pub fn skip(test: &str, reason: &str) {
    assert!(
        env::var("RELAY_TEST_REQUIRE").as_deref() != Ok("1"),
        "{test} can't be skipped here: {reason}"
    );
    eprintln!("SKIPPED {test}: {reason}");
}

/// The brokers of the environment.
pub fn brokers(test: &str) -> Option<String> {
    variable(test, "KAFKA_BROKERS")
}

/// A name that no other test and no other run uses.
pub fn topic(what: &str) -> String {
    format!("{what}-{}", Uuid::new_v4().simple())
}

/// A record with this key and value, and nothing else.
pub fn record<'a>(topic: &'a str, key: &'a [u8], value: &'a [u8]) -> Record<'a> {
    Record {
        topic: topic.into(),
        key: Some(key.into()),
        value: Some(value.into()),
        headers: Vec::new(),
        timestamp_ms: now_ms(),
    }
}

/// The wall clock.
pub fn now_ms() -> i64 {
    let since = std::time::UNIX_EPOCH.elapsed().expect("after 1970");
    i64::try_from(since.as_millis()).expect("before the year 292 million")
}

/// A sink that is open and has its topics; begins again when the sink asks for it, as the loop does.
pub async fn opened(settings: Settings, topics: &[&str]) -> KafkaSink {
    let mut sink = KafkaSink::new(settings);
    open(&mut sink, topics).await;
    sink
}

/// Begins a life, as the loop does.
pub async fn open(sink: &mut impl Sink, topics: &[&str]) {
    let deadline = Instant::now() + LONG;
    'lives: loop {
        assert!(Instant::now() < deadline, "the topics can't be prepared");
        sink.open().await.expect("open");
        for topic in topics {
            match sink.prepare(topic).await {
                Ok(()) => {}
                Err(NotPrepared::Unknown(error)) => {
                    eprintln!("{topic}: {error}");
                    sleep(Duration::from_millis(100)).await;
                    continue 'lives;
                }
                Err(NotPrepared::Rejected(rejection)) => panic!("{topic}: {rejection}"),
            }
        }
        return;
    }
}

/// Hands one record over, waiting for room; gives back the receipts that came meanwhile.
pub async fn hand_over(sink: &mut impl Sink, seq: u64, record: &Record<'_>) -> Vec<Receipt> {
    let mut receipts = Vec::new();
    loop {
        match sink.hand_over(Seq(seq), record) {
            Ok(()) => return receipts,
            Err(Refused::Full) => timeout(LONG, sink.receipts(&mut receipts))
                .await
                .expect("room in time")
                .expect("receipts"),
            Err(refused) => panic!("record {seq}: {refused:?}"),
        }
    }
}

/// Waits until this many receipts are there, all of them for records that were delivered.
pub async fn delivered(sink: &mut impl Sink, receipts: &mut Vec<Receipt>, count: usize) {
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
pub fn delivered_seq(receipt: &Receipt) -> u64 {
    match receipt {
        Receipt::Delivered(seq) => seq.0,
        Receipt::Rejected(..) => panic!("{receipt:?}"),
    }
}

/// Publishes records and waits until all of them are there.
pub async fn publish(sink: &mut impl Sink, records: &[Record<'_>]) {
    let mut receipts = Vec::new();
    for (seq, record) in (0..).zip(records) {
        receipts.append(&mut hand_over(sink, seq, record).await);
    }
    delivered(sink, &mut receipts, records.len()).await;
}

/// A record as a consumer sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrived {
    pub partition: i32,
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    pub headers: Vec<(String, Option<Vec<u8>>)>,
    pub timestamp_ms: Option<i64>,
}

impl Arrived {
    pub fn text(&self) -> &str {
        std::str::from_utf8(self.value.as_deref().expect("a value")).expect("text")
    }
}

/// Everything that is in a topic now, partition by partition, in the order of the log.
pub async fn consume(brokers: &str, topic: &str) -> Vec<Arrived> {
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
        .set("enable.partition.eof", "false")
        .create()
        .expect("a consumer");
    let metadata = consumer
        .fetch_metadata(Some(topic), LONG)
        .expect("metadata");
    let mut assignment = TopicPartitionList::new();
    let mut remaining = 0;
    for partition in metadata.topics()[0].partitions() {
        let (low, high) = consumer
            .fetch_watermarks(topic, partition.id(), LONG)
            .expect("watermarks");
        remaining += high - low;
        assignment
            .add_partition_offset(topic, partition.id(), Offset::Beginning)
            .expect("an offset");
    }
    consumer.assign(&assignment).expect("an assignment");
    let deadline = Instant::now() + LONG;
    let mut arrived: BTreeMap<i32, Vec<Arrived>> = BTreeMap::new();
    while remaining > 0 {
        assert!(Instant::now() < deadline, "{remaining} records are missing");
        let Some(message) = consumer.poll(Duration::from_millis(100)) else {
            continue;
        };
        let message = message.expect("a record");
        remaining -= 1;
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
pub fn assert_complete_and_in_order(arrived: &[Arrived], count: u64) {
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
pub fn admin(brokers: &str) -> AdminClient<DefaultClientContext> {
    ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()
        .expect("an admin client")
}

/// The settings of a topic.
pub async fn topic_config(brokers: &str, topic: &str) -> HashMap<String, String> {
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
pub fn partitions(brokers: &str, topic: &str) -> usize {
    let admin = admin(brokers);
    let metadata = admin.inner().fetch_metadata(Some(topic), LONG);
    metadata.expect("metadata").topics()[0].partitions().len()
}

/// One at a time is enough for a small machine.
static OWN_BROKER: Mutex<()> = Mutex::const_new(());

/// A broker that a test may stop, pause and kill.
pub struct OwnBroker {
    folder: PathBuf,
    variables: HashMap<String, String>,
    _temporary: Option<TempDir>,
    _only: MutexGuard<'static, ()>,
}

impl OwnBroker {
    /// Starts one, or says why not.
    pub async fn start(test: &str) -> Option<Self> {
        brokers(test)?;
        let only = OWN_BROKER.lock().await;
        // Where the one who started the services cleans up; else a temporary folder of our own.
        let (folder, temporary) = match env::var_os("RELAY_TEST_FOLDER") {
            Some(folder) => (Path::new(&folder).join(topic("broker")), None),
            None => {
                let temporary = tempfile::tempdir().expect("a folder");
                (temporary.path().join("broker"), Some(temporary))
            }
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
    pub fn start_again(&mut self) {
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

    pub fn brokers(&self) -> &str {
        &self.variables["KAFKA_BROKERS"]
    }

    /// Sends it a signal such as `KILL`, `STOP` or `CONT`.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .args(["-s", name, &self.variables["KAFKA_PID"]])
            .status()
            .expect("run kill");
        assert!(sent.success(), "signal {name}");
    }

    /// Stops it in order.
    pub fn stop(&self) {
        let stopped = Command::new(script("down")).arg(&self.folder).status();
        assert!(stopped.expect("run the script").success());
    }
}

impl Drop for OwnBroker {
    fn drop(&mut self) {
        let _ = Command::new(script("down")).arg(&self.folder).status();
    }
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/services")
        .join(name)
}
