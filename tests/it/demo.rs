//! The demo as a stranger runs it: the program itself, its words, its exit code, and what it leaves behind.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::metadata::MetadataTopic;
use sqlx::{ConnectOptions, Connection};

use crate::harness::postgres::server;
use crate::kafka::cluster;

fn demo(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outbox-relay"));
    command
        .args(["demo", "--plain", "--seed", "7"])
        .args(arguments)
        .stdin(Stdio::null())
        .env_remove("RUST_LOG");
    command
}

fn texts(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("the output is UTF-8");
    (text(&output.stdout), text(&output.stderr))
}

/// The number of a row of the summary.
fn number(stdout: &str, name: &str) -> u64 {
    let row = stdout
        .lines()
        .find_map(|line| line.strip_prefix(&format!("  {name:<22}")));
    let row = row.unwrap_or_else(|| panic!("no row {name:?} in:\n{stdout}"));
    let digits = row.split_whitespace().next().unwrap_or_default();
    digits.replace(',', "").parse().expect("a number")
}

/// A run to the end in which everything is as it should be.
fn check(arguments: &[&str]) -> String {
    let output = demo(arguments).output().expect("run the demo");
    let (stdout, stderr) = texts(&output);
    assert_eq!(output.status.code(), Some(0), "{stdout}\n{stderr}");
    assert_eq!(stderr, "");
    assert!(!stdout.contains('\u{1b}'), "no escape codes:\n{stdout}");
    assert!(stdout.contains("Everything that was committed arrived, once and in order."));
    let committed = number(&stdout, "committed");
    assert!((300..310).contains(&committed), "{committed}");
    assert_eq!(number(&stdout, "consumed"), committed);
    for finding in [
        "lost",
        "duplicated",
        "out of order",
        "altered",
        "rolled back, yet seen",
    ] {
        assert_eq!(number(&stdout, finding), 0, "{finding}");
    }
    // What it showed is what it summed up.
    let events = |first: &str| -> usize {
        let lines = stdout.lines().filter(|line| line.starts_with(first));
        lines.map(|line| 1 + line.matches(", ").count()).sum()
    };
    assert_eq!(events("commit "), usize::try_from(committed).unwrap());
    let topics = ["customer[", "product[", "order["];
    assert_eq!(
        topics.iter().map(|topic| events(topic)).sum::<usize>(),
        usize::try_from(committed).unwrap()
    );
    assert!(events("rollback ") > 0, "something was taken back");
    stdout
}

const QUICK: [&str; 4] = ["--events", "300", "--rate", "0"];

#[test]
fn it_runs_with_nothing_installed() {
    check(&QUICK);
}

#[test]
fn an_early_end_has_a_summary_too() {
    let running = demo(&["--events", "1000000"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut running = running.expect("start the demo");
    // It is at work once the consumer has received something.
    let mut stdout = BufReader::new(running.stdout.take().expect("a pipe"));
    let mut line = String::new();
    while !line.contains("]@") {
        line.clear();
        let bytes = stdout.read_line(&mut line).expect("read");
        assert!(bytes > 0, "it ended by itself");
    }
    let interrupted = Command::new("kill")
        .args(["-s", "INT", &running.id().to_string()])
        .status();
    assert!(interrupted.expect("run kill").success());
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).expect("read");
    let code = running.wait().expect("wait").code();
    assert_eq!(code, Some(0), "{rest}");
    assert_eq!(number(&rest, "lost"), 0);
    assert_eq!(number(&rest, "consumed"), number(&rest, "committed"));
}

#[test]
fn what_cannot_be_reached_is_one_line_without_the_password() {
    let url = "postgres://somebody:open-sesame@127.0.0.1:1/shop";
    for (arguments, code, says) in [
        (["--database-url", url], 1, "127.0.0.1:1"),
        (["--database-url", &url[1..]], 2, "--database-url"),
        (["--brokers", "127.0.0.1:1"], 1, "127.0.0.1:1"),
    ] {
        let output = demo(&arguments).output().expect("run the demo");
        let (stdout, stderr) = texts(&output);
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        assert_eq!(
            (stdout.as_str(), stderr.lines().count()),
            ("", 1),
            "{stderr}"
        );
        assert!(stderr.contains(says), "{stderr}");
        assert!(!stderr.contains("sesame"), "{stderr}");
    }
}

#[tokio::test]
async fn on_a_real_database_it_leaves_nothing_behind() {
    let Some(server) = server() else { return };
    let url = std::env::var("DATABASE_URL").expect("there is a server");
    let stdout = check(&[&QUICK[..], &["--database-url", &url]].concat());
    let name = name(&stdout, "PostgreSQL outbox_demo_");
    let mut connection = server.connect().await.expect("connect");
    let left: Vec<String> =
        sqlx::query_scalar("select datname::text from pg_database where datname = $1")
            .bind(name)
            .fetch_all(&mut connection)
            .await
            .expect("look for the database");
    assert_eq!(left, [""; 0]);
    connection.close().await.expect("close");
}

#[test]
fn on_a_real_broker_it_leaves_nothing_behind() {
    let test = "demo::on_a_real_broker_it_leaves_nothing_behind";
    let Some(brokers) = cluster::brokers(test) else {
        return;
    };
    let stdout = check(&[&QUICK[..], &["--brokers", &brokers]].concat());
    let name = name(&stdout, "Kafka demo-");
    let prefix = name.trim_end_matches('*');
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .create()
        .expect("a client");
    // The broker says that they are deleted before all of them are.
    for _ in 0..100 {
        let metadata = consumer.fetch_metadata(None, Duration::from_secs(10));
        let metadata = metadata.expect("the topics");
        let mut topics = metadata.topics().iter().map(MetadataTopic::name);
        if !topics.any(|topic| topic.starts_with(prefix)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("topics {name} are left");
}

/// The name that the first line tells, with its known beginning.
fn name(stdout: &str, begins: &str) -> String {
    let (kind, begin) = begins.split_once(' ').expect("a kind and a name");
    let mut words = stdout.lines().next().unwrap_or_default().split(' ');
    words.find(|word| *word == kind);
    let name = words.next().unwrap_or_default();
    assert!(
        name.len() > begin.len() && name.starts_with(begin),
        "{name}"
    );
    name.to_owned()
}
