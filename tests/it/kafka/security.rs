//! Encryption and authentication: verified, named when they fail, and quiet about secrets.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::process::Command;
use std::time::Duration;

use outbox_relay::sink::Sink;
use outbox_relay::sink::kafka::{Delivery, KafkaSink, Settings};
use tokio::time::{Instant, sleep, timeout};

use super::cluster::{LONG, consume, opened, publish, record, settings, topic, variable};

#[tokio::test]
async fn tls_works_with_the_right_authority() {
    const TEST: &str = "kafka::security::tls_works_with_the_right_authority";
    let (Some(plain), Some(settings)) = (variable(TEST, "KAFKA_BROKERS"), tls(TEST)) else {
        return;
    };
    publish_one(settings, &plain).await;
}

#[tokio::test]
async fn tls_without_the_authority_says_that_the_certificate_is_not_trusted() {
    const TEST: &str =
        "kafka::security::tls_without_the_authority_says_that_the_certificate_is_not_trusted";
    let Some(mut settings) = tls(TEST) else {
        return;
    };
    settings.tls.ca_file = None;
    let error = refused(settings).await;
    assert!(
        error.to_lowercase().contains("certificate verify failed"),
        "{error}"
    );
}

#[tokio::test]
async fn scram_over_tls_works() {
    const TEST: &str = "kafka::security::scram_over_tls_works";
    let (Some(plain), Some(settings)) = (variable(TEST, "KAFKA_BROKERS"), sasl(TEST)) else {
        return;
    };
    let secret = variable(TEST, "KAFKA_SASL_PASSWORD").expect("set, as sasl() has it");
    assert!(!format!("{settings:?}").contains(&secret));
    let mut plain_mechanism = settings.clone();
    plain_mechanism.sasl.mechanism = Some("PLAIN".to_owned());
    publish_one(settings, &plain).await;
    publish_one(plain_mechanism, &plain).await;
}

#[tokio::test]
async fn a_wrong_password_is_named_and_not_shown() {
    const TEST: &str = "kafka::security::a_wrong_password_is_named_and_not_shown";
    let Some(mut settings) = sasl(TEST) else {
        return;
    };
    settings.sasl.password = Some("hunter2".to_owned().into());
    let error = refused(settings).await;
    assert!(error.contains("refuses the login"), "{error}");
    assert!(!error.contains("hunter2"), "{error}");
}

#[tokio::test]
async fn a_wrong_password_costs_next_to_nothing() {
    const TEST: &str = "kafka::security::a_wrong_password_costs_next_to_nothing";
    // Measured in a process of its own: this one runs other tests at the same time.
    if env::var_os("RELAY_TEST_CHILD").is_none() {
        if sasl(TEST).is_none() {
            return;
        }
        let child = Command::new(env::current_exe().expect("a path"))
            .args(["--exact", TEST, "--nocapture"])
            .env("RELAY_TEST_CHILD", "1")
            .output()
            .expect("run the test again");
        eprint!("{}", String::from_utf8_lossy(&child.stderr));
        assert!(
            child.status.success(),
            "{}",
            String::from_utf8_lossy(&child.stderr)
        );
        return;
    }
    let mut settings = sasl(TEST).expect("set by the parent");
    settings.sasl.password = Some("hunter2".to_owned().into());
    let mut sink = KafkaSink::new(settings);
    sink.open().await.expect("open");
    sink.check().await.expect_err("a wrong password");
    // The least of several: what else this machine does may only add to it.
    let mut used = Vec::new();
    for _ in 0..3 {
        let (began, before) = (Instant::now(), processor_time());
        while began.elapsed() < Duration::from_secs(1) {
            assert!(sink.trouble().is_some());
            sleep(Duration::from_millis(100)).await;
        }
        used.push(processor_time().saturating_sub(before));
    }
    eprintln!("of processor time in a second: {used:?}");
    assert!(used.iter().min() < Some(&Duration::from_millis(100)));
}

#[tokio::test]
async fn secrets_among_the_properties_are_not_shown() {
    let mut settings = settings("127.0.0.1:1");
    let property = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    settings.properties = BTreeMap::from([property("sasl.password", "hunter2")]);
    settings.sasl.password = Some("hunter2".to_owned().into());
    settings.tls.key_password = Some("hunter2".to_owned().into());
    assert!(!format!("{settings:?}").contains("hunter2"), "{settings:?}");
    assert!(format!("{settings:?}").contains("sasl.password"));
    // A misspelt name must not give the value away either.
    settings.properties = BTreeMap::from([property("sasl.pasword", "hunter2")]);
    let mut sink = KafkaSink::new(settings);
    let error = sink.open().await.expect_err("no such property").to_string();
    assert!(error.contains("sasl.pasword"), "{error}");
    assert!(!error.contains("hunter2"), "{error}");
}

/// It holds for the reader of the position as well.
#[tokio::test]
async fn the_way_to_the_brokers_may_be_among_the_properties() {
    const TEST: &str = "kafka::security::the_way_to_the_brokers_may_be_among_the_properties";
    let Some(given) = sasl(TEST) else {
        return;
    };
    let password = variable(TEST, "KAFKA_SASL_PASSWORD").expect("set, as sasl() has it");
    let ca_file = given.tls.ca_file.expect("set, as tls() has it");
    let mut settings = settings(&given.brokers);
    settings.properties = [
        ("security.protocol", "sasl_ssl"),
        ("ssl.ca.location", ca_file.to_str().expect("UTF-8")),
        ("sasl.mechanism", "SCRAM-SHA-512"),
        (
            "sasl.username",
            &given.sasl.username.expect("set, as sasl() has it"),
        ),
        ("sasl.password", &password),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    settings.delivery = Delivery::ExactlyOnce;
    settings.transactional_id = Some(topic("properties"));
    let mut sink = KafkaSink::new(settings);
    sink.open().await.expect("opening needs nobody");
    let resumed = sink.resume("log").await.expect("a position that was read");
    assert!(resumed.is_none(), "{resumed:?}");
}

/// Settings for TLS.
fn tls(test: &str) -> Option<Settings> {
    let mut settings = settings(&variable(test, "KAFKA_SSL_BROKERS")?);
    settings.tls.enabled = true;
    settings.tls.ca_file = Some(variable(test, "KAFKA_CA_FILE")?.into());
    Some(settings)
}

/// Settings for SCRAM over TLS.
fn sasl(test: &str) -> Option<Settings> {
    let mut settings = tls(test)?;
    settings.brokers = variable(test, "KAFKA_SASL_BROKERS")?;
    settings.sasl.mechanism = Some("SCRAM-SHA-512".to_owned());
    settings.sasl.username = variable(test, "KAFKA_SASL_USERNAME");
    settings.sasl.password = Some(variable(test, "KAFKA_SASL_PASSWORD")?.into());
    Some(settings)
}

async fn publish_one(settings: Settings, plain: &str) {
    let topic = topic("secure");
    let mut sink = opened(settings, &[&topic]).await;
    sink.check().await.expect("somebody answers");
    publish(&mut sink, &[record(&topic, b"a", b"1")]).await;
    assert_eq!(consume(plain, &topic).await.len(), 1);
}

/// The words of a sink that can't connect; they come soon, and as trouble as well.
async fn refused(settings: Settings) -> String {
    let mut sink = KafkaSink::new(settings);
    sink.open().await.expect("opening needs nobody");
    let checked = timeout(LONG, sink.check()).await.expect("in time");
    let error = checked.expect_err("no connection").to_string();
    let trouble = sink.trouble().expect("trouble");
    assert!(error.contains(&trouble), "{error} does not tell {trouble}");
    sink.prepare(&topic("refused"))
        .await
        .expect_err("no connection");
    error
}

/// What this process has used of the processors.
fn processor_time() -> Duration {
    const TICK: Duration = Duration::from_millis(10);
    let stat = fs::read_to_string("/proc/self/stat").expect("Linux");
    let fields = stat.rsplit(") ").next().expect("the name in brackets");
    let ticks = fields.split(' ').skip(11).take(2);
    let ticks: u32 = ticks
        .map(|ticks| ticks.parse::<u32>().expect("ticks"))
        .sum();
    TICK * ticks
}

/// A broker that trusts only the new certificate refuses the client with the old one, for ever.
#[tokio::test]
async fn files_that_were_replaced_end_a_session_that_is_in_trouble() {
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).expect("write");
        path
    };
    let mut settings = settings("127.0.0.1:1");
    settings.sasl.mechanism = Some("PLAIN".to_owned());
    settings.sasl.username = Some("relay".to_owned());
    settings.sasl.password_file = Some(write("password", "first\n"));
    let mut sink = KafkaSink::new(settings);
    sink.open().await.expect("open");
    assert_eq!(sink.outdated(), None);
    write("password", "second\n");
    let why = sink.outdated().expect("outdated");
    assert!(why.contains("has changed"), "{why}");
    sink.open().await.expect("open");
    assert_eq!(sink.outdated(), None);
    write("password", "");
    assert!(sink.outdated().is_some());
    let error = sink.open().await.expect_err("empty").to_string();
    assert!(error.contains("the file is empty"), "{error}");
    fs::remove_file(folder.path().join("password")).expect("remove");
    let error = sink.open().await.expect_err("gone").to_string();
    assert!(error.contains("No such file"), "{error}");
}
