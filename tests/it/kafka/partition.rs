//! The partition of a key is the one that a Java producer picks.

use std::collections::HashMap;
use std::env;
use std::fs;
use std::process::Command;
use std::time::Duration;

use outbox_relay::event::{Record, Seq};
use outbox_relay::sink::kafka::{Settings, partition_of};
use outbox_relay::sink::{Refused, Sink};

use tokio::time::Instant;

use super::cluster::{
    brokers, consume, delivered, opened, publish, record, settings, skip, topic, variable,
};

const PARTITIONS: i32 = 7;

/// Prints the partition of each line of the standard input, a key in hexadecimal.
const JAVA: &str = r"
    import java.io.*;
    import java.util.HexFormat;
    import org.apache.kafka.clients.producer.internals.BuiltInPartitioner;

    class Partitions {
        public static void main(String[] partitions) throws IOException {
            var lines = new BufferedReader(new InputStreamReader(System.in));
            for (String line; (line = lines.readLine()) != null; ) {
                byte[] key = HexFormat.of().parseHex(line);
                System.out.println(BuiltInPartitioner.partitionForKey(key, Integer.parseInt(partitions[0])));
            }
        }
    }
";

#[tokio::test]
async fn keys_get_the_partitions_of_the_java_client() {
    const TEST: &str = "kafka::partition::keys_get_the_partitions_of_the_java_client";
    let (Some(brokers), Some(jars)) = (brokers(TEST), variable(TEST, "KAFKA_JARS")) else {
        return;
    };
    let keys = keys();
    let Some(expected) = java_partitions(&keys, &jars) else {
        return skip(TEST, "no Java here that runs a source file");
    };
    let topic = topic("partition");
    let mut settings = settings(&brokers);
    settings.topics.partitions = PARTITIONS;
    let mut sink = opened(settings, &[&topic]).await;
    let records: Vec<Record<'_>> = keys.iter().map(|key| record(&topic, key, b"1")).collect();
    publish(&mut sink, &records).await;
    let arrived = consume(&brokers, &topic).await;
    assert_eq!(arrived.len(), keys.len());
    let partitions: HashMap<Vec<u8>, i32> = arrived
        .into_iter()
        .map(|record| (record.key.expect("a key"), record.partition))
        .collect();
    for (key, expected) in keys.iter().zip(expected) {
        assert_eq!(partitions[key], expected, "key {}", hex(key));
        let known = partition_of(key, usize::try_from(PARTITIONS).expect("few"));
        assert_eq!(i32::try_from(known), Ok(expected), "key {}", hex(key));
    }
}

#[tokio::test]
async fn without_keys_all_partitions_are_used() {
    let Some(brokers) = brokers("kafka::partition::without_keys_all_partitions_are_used") else {
        return;
    };
    let topic = topic("keyless");
    let settings = Settings {
        // Librdkafka's own default spreads by batch.
        properties: [("sticky.partitioning.linger.ms".to_owned(), "0".to_owned())].into(),
        ..settings(&brokers)
    };
    let mut sink = opened(settings, &[&topic]).await;
    let keyless = Record {
        key: None,
        ..record(&topic, b"", b"1")
    };
    publish(&mut sink, &vec![keyless; 400]).await;
    let arrived = consume(&brokers, &topic).await;
    assert_eq!(arrived.len(), 400);
    assert!(arrived.iter().all(|record| record.key.is_none()));
    for partition in 0..4 {
        let used = arrived.iter().any(|record| record.partition == partition);
        assert!(used, "partition {partition}");
    }
}

/// In a life's beginning the first record of a partition makes the next one wait: a few round trips, whatever there is to do.
#[tokio::test]
async fn the_beginning_of_a_life_costs_a_few_round_trips() {
    let Some(brokers) =
        brokers("kafka::partition::the_beginning_of_a_life_costs_a_few_round_trips")
    else {
        return;
    };
    for topics in [1, 50] {
        let topics: Vec<String> = (0..topics).map(|_| topic("first")).collect();
        let names: Vec<&str> = topics.iter().map(|topic| &topic[..]).collect();
        let mut settings = settings(&brokers);
        settings.topics.partitions = 8;
        let mut sink = opened(settings, &names).await;
        let keys: Vec<String> = (0..4_000)
            .map(|n| format!("key-{}", n * 7919 % 10_007))
            .collect();
        let records: Vec<Record<'_>> = keys
            .iter()
            .zip(topics.iter().cycle())
            .map(|(key, topic)| record(topic, key.as_bytes(), b"1"))
            .collect();
        let (mut took, mut waits) = ([Duration::ZERO; 2], 0);
        for took in &mut took {
            let began = Instant::now();
            let mut receipts = Vec::new();
            for (seq, record) in (0..).zip(&records) {
                while let Err(refused) = sink.hand_over(Seq(seq), record) {
                    assert_eq!(refused, Refused::Full);
                    waits += 1;
                    sink.receipts(&mut receipts).await.expect("receipts");
                }
            }
            delivered(&mut sink, &mut receipts, records.len()).await;
            *took = began.elapsed();
        }
        let partitions = topics.len() * 8;
        eprintln!(
            "{partitions} partitions: {waits} waits, {:?}, once known {:?}",
            took[0], took[1]
        );
        // A receipt of any partition ends a wait, so that there are more of them than round trips.
        assert!(waits <= 10 * partitions, "{waits}");
    }
}

/// Different keys: empty, short, long, text in several scripts, any bytes.
fn keys() -> Vec<Vec<u8>> {
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut byte = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random.to_be_bytes()[0]
    };
    let mut keys: Vec<Vec<u8>> = (0..2_000_usize)
        .map(|number| {
            // Unique by its first bytes, and of every length modulo four, which murmur2 tells apart.
            let mut key = u32::try_from(number).expect("small").to_be_bytes().to_vec();
            key.extend((0..number % 67).map(|_| byte()));
            key
        })
        .collect();
    keys.extend((0..300).map(|number| format!("order-{number}").into_bytes()));
    keys.extend(["", "a", "ab", "abc", "größe", "ключ", "注文", "🦀"].map(Into::into));
    keys.extend([
        vec![0],
        vec![0xff; 3],
        vec![b'k'; 10_000],
        vec![0x80; 65_537],
    ]);
    keys
}

fn java_partitions(keys: &[Vec<u8>], jars: &str) -> Option<Vec<i32>> {
    let folder = tempfile::tempdir().expect("a folder");
    let (program, input) = (
        folder.path().join("Partitions.java"),
        folder.path().join("keys"),
    );
    fs::write(&program, JAVA).expect("write the program");
    let lines: String = keys.iter().map(|key| hex(key) + "\n").collect();
    fs::write(&input, lines).expect("write the keys");
    let java = env::var("JAVA_HOME").map_or("java".to_owned(), |home| format!("{home}/bin/java"));
    let output = Command::new(java)
        .args(["-cp", &format!("{jars}/*")])
        .arg(&program)
        .arg(PARTITIONS.to_string())
        .stdin(fs::File::open(&input).expect("read the keys"))
        .output()
        .ok()?;
    let problem = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{problem}");
    let partitions = String::from_utf8(output.stdout).expect("text");
    Some(
        partitions
            .lines()
            .map(|line| line.parse().expect("a number"))
            .collect(),
    )
}

fn hex(bytes: &[u8]) -> String {
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits
        .filter_map(|digit| char::from_digit(digit.into(), 16))
        .collect()
}
