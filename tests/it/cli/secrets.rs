//! A secret that is planted in every place that can hold one, rightly or by mistake, is found in nothing that the program says.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::time::sleep;

use super::{NOBODY, PLANTED, program, relay};
use crate::fresh::needed;

/// Mistakes in a file. `{}` is the secret, `FILE` a file that holds nothing but it.
const MISTAKES: [&str; 41] = [
    "[source.postgres]\nurl = \"{}\"",
    "[source.postgres]\nurl = [\"{}\"]",
    "[source.postgres]\nurl = { a = \"{}\" }",
    "[source.postgres]\nurrl = \"{}\"",
    "[source.postgres]\npassword = \"{}\"",
    "[source.postgres]\nurl = \"mysql://u:{}@db/app\"",
    "[source.postgres]\nurl = \"postgres://u:{}@db:port/app\"",
    "[source.postgres]\nurl = \"postgres://u:p@{}/x@db/app\"",
    "[source.postgres]\nurl = \"postgres://u:{}/x@db/app\"",
    "[source.postgres]\nurl = \"postgres://u:{}@db/app?sslmod=require\"",
    "[source.postgres]\nurl = \"postgres://u@db/app?{}=1\"",
    "[source.postgres]\nurl = \"postgres://u@db/app?sslpassword={}\"",
    "[source.postgres]\nurl = \"postgres://u@db/app?sslmode={}\"",
    "[source.postgres]\nurl = \"postgres://u@db/app?sslmode=verify-full&sslrootcert={}\"",
    "[source.postgres]\nurl_file = \"FILE\"",
    "[source.postgres]\ndirect_url = \"{}\"",
    "[source.postgres]\nurl = \"{}\" x",
    "[source.postgres]\nurl = \"{}",
    "[source.postgres]\nurl = '{}",
    "[source.postgres]\nurl \"{}\"",
    "[source.postgres]\nurl = {}",
    "source = \"{}\"",
    "[sink.kafka]\nbrokers = \"u:{}@kafka:9092\"",
    "[sink.kafka]\nsasl = \"{}\"",
    "[sink.kafka]\nsasl = [\"PLAIN\", \"u\", \"{}\"]\ncompression = \"none of them\"",
    "[sink.kafka]\npassword = \"{}\"",
    "[sink.kafka.sasl]\npassword = \"{}\"",
    "[sink.kafka.sasl]\npassword = 5\nusername = \"{}\" x",
    "[sink.kafka.sasl]\npasword = \"{}\"",
    "[sink.kafka.sasl]\npassword_file = \"FILE\"",
    "[sink.kafka.tls]\nkey_password = \"{}\"",
    "[sink.kafka.tls]\nkeypassword = \"{}\"",
    "[sink.kafka.properties]\n\"sasl.pasword\" = \"{}\"",
    "[sink.kafka.properties]\n\"{}\" = \"true\"",
    "[sink.kafka.properties]\n\"acks\" = \"{}\"",
    "[sink.kafka.properties]\n\"security.protocol\" = \"{}\"",
    "[sink.kafka.properties]\n\"security.protocol\" = \"ssl\"\n\"ssl.key.pem\" = \"{}\"\n\"ssl.certificate.pem\" = \"{}\"",
    "[sink.kafka.properties]\n\"ssl.key.password\" = \"{}\"",
    "[admin]\ntoken = \"{}\"\ntokn = \"{}\"",
    "[admin]\ntoken = [\"{}\"]",
    "[admin]\ntoken = \"{}\"\nlisten = \"nowhere\"",
];

/// Settings that are right, in one way or the other.
fn right(folder: &Path) -> Vec<Vec<(String, String)>> {
    let file = |name: &str, text: &str| {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let with = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
        let common = [
            ("SINK__KAFKA__BROKERS", "127.0.0.1:1"),
            ("ADMIN__LISTEN", "127.0.0.1:0"),
            ("LOG__LEVEL", "trace"),
            ("SINK__KAFKA__PROPERTIES__DEBUG", "all"),
        ];
        let owned = |(name, value): &(&str, &str)| (format!("RELAY_{name}"), (*value).to_owned());
        common.iter().chain(pairs).map(owned).collect()
    };
    vec![
        with(&[
            ("SOURCE__POSTGRES__URL", NOBODY),
            ("SINK__KAFKA__SASL__MECHANISM", "PLAIN"),
            ("SINK__KAFKA__SASL__USERNAME", "relay"),
            ("SINK__KAFKA__SASL__PASSWORD", PLANTED),
            ("ADMIN__TOKEN", "planted-secret-of-the-interface"),
        ]),
        with(&[
            ("SOURCE__POSTGRES__URL_FILE", &file("url", NOBODY)),
            ("SINK__KAFKA__SASL__MECHANISM", "SCRAM-SHA-256"),
            ("SINK__KAFKA__SASL__USERNAME", "relay"),
            (
                "SINK__KAFKA__SASL__PASSWORD_FILE",
                &file("password", PLANTED),
            ),
            (
                "ADMIN__TOKEN_FILE",
                &file("token", "planted-secret-of-the-interface"),
            ),
        ]),
        with(&[
            ("SOURCE__POSTGRES__URL", NOBODY),
            ("SOURCE__POSTGRES__DIRECT_URL", NOBODY),
            (
                "SINK__KAFKA__PROPERTIES__SECURITY_PROTOCOL",
                "sasl_plaintext",
            ),
            ("SINK__KAFKA__PROPERTIES__SASL_MECHANISM", "PLAIN"),
            ("SINK__KAFKA__PROPERTIES__SASL_USERNAME", "relay"),
            ("SINK__KAFKA__PROPERTIES__SASL_PASSWORD", PLANTED),
        ]),
    ]
}

/// A process that is killed with the value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts `run` with its output in a file.
fn start(args: &[&str], env: &[(&str, &str)], output: &Path) -> Running {
    let file = File::create(output).unwrap();
    let mut command = program(args, env);
    command.stdout(file.try_clone().unwrap()).stderr(file);
    Running(command.spawn().unwrap())
}

/// Reads what was said so far; it has no secret in it.
fn said(output: &Path) -> String {
    let text = std::fs::read_to_string(output).unwrap();
    assert!(!text.contains(PLANTED), "a secret was printed:\n{text}");
    text
}

async fn until(output: &Path, words: &str, times: usize) {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let text = said(output);
        if text.matches(words).count() >= times {
            return;
        }
        assert!(Instant::now() < deadline, "no {words:?} in:\n{text}");
        sleep(Duration::from_millis(20)).await;
    }
}

fn written(folder: &TempDir, mistake: &str) -> String {
    let holder = folder.path().join("holder");
    std::fs::write(&holder, PLANTED).unwrap();
    mistake
        .replace("FILE", holder.to_str().unwrap())
        .replace("{}", PLANTED)
}

#[tokio::test]
async fn no_mistake_in_a_file_prints_a_secret() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("relay.toml");
    let path = file.to_str().unwrap();
    for mistake in MISTAKES {
        let text = written(&folder, mistake);
        std::fs::write(&file, &text).unwrap();
        // Only where the file does not say it itself.
        let env: &[(&str, &str)] = if mistake.starts_with("[source.postgres]") {
            &[]
        } else {
            &[("RELAY_SOURCE__POSTGRES__URL", NOBODY)]
        };
        for args in [
            &["check", "--all", "--config", path][..],
            &["run", "--config", path],
            &["status", "--config", path],
        ] {
            let status_may_go_on = args[0] == "status" && text.contains(".pem");
            let ran = relay(args, env).await;
            if !status_may_go_on {
                assert_eq!(ran.code, 2, "{args:?} {mistake}: {} {}", ran.out, ran.err);
            }
            assert!(!ran.err.is_empty(), "{mistake}");
        }
    }
}

#[tokio::test]
async fn no_mistake_in_a_variable_prints_a_secret() {
    for name in [
        "SOURCE__POSTGRES__URL",
        "SOURCE__POSTGRES__URL_FILE",
        "SOURCE__POSTGRES__URLL",
        "SOURCE_POSTGRES_URL",
        "POSTGRES_PASSWORD",
        "SINK__KAFKA__SASL__PASSWORD",
        "SINK__KAFKA__SASL__PASWORD",
        "SINK__KAFKA__SASL",
        "SINK__KAFKA__TLS__KEY_PASSWORD",
        "SINK__KAFKA__PROPERTIES__SASL_PASSWRD",
        "SINK__KAFKA__PROPERTIES__ACKS",
        "SINK__KAFKA__PROPERTIES",
        "SINK__KAFKA__PASSWORD",
        "ADMIN__TOKEN",
        "ADMIN__TOKEEN",
        "ADMIN",
        "ADMIN_TOKEN",
    ] {
        let name = format!("RELAY_{name}");
        let mut env = vec![(&name[..], PLANTED)];
        if !name.contains("POSTGRES__URL") {
            env.push(("RELAY_SOURCE__POSTGRES__URL", NOBODY));
        }
        for command in ["check", "run"] {
            relay(&[command], &env).await.ends_with(2);
        }
    }
}

#[tokio::test]
async fn no_command_prints_a_secret_of_a_right_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let mut configurations = right(folder.path());
    if let (Some(brokers), Some(ca_file)) = (
        needed("no_command_prints_a_secret", "KAFKA_SASL_BROKERS"),
        needed("no_command_prints_a_secret", "KAFKA_CA_FILE"),
    ) {
        // One that a real broker refuses.
        let mut refused = configurations[0].clone();
        refused.retain(|(name, _)| name != "RELAY_SINK__KAFKA__BROKERS");
        for (name, value) in [
            ("BROKERS", brokers),
            ("TLS__ENABLED", "true".to_owned()),
            ("TLS__CA_FILE", ca_file),
        ] {
            refused.push((format!("RELAY_SINK__KAFKA__{name}"), value));
        }
        configurations.push(refused);
    }
    for (n, env) in configurations.iter().enumerate() {
        let env: Vec<(&str, &str)> = env.iter().map(|(a, b)| (&a[..], &b[..])).collect();
        for args in [
            &["check", "--all"][..],
            &["migrate"],
            &["status"],
            &["parked", "list"],
            &["parked", "redrive", "--all"],
            &["acts"],
            &["replay", "list"],
            &["verify"],
        ] {
            relay(args, &env).await;
        }
        relay(&["doctor"], &env).await.ends_with(3);
        let output = folder.path().join(format!("{n}.log"));
        let _running = start(&["run"], &env, &output);
        until(&output, "stalled, trying again", 1).await;
        // Some attempts more.
        sleep(Duration::from_secs(2)).await;
        said(&output);
    }
}

#[tokio::test]
async fn no_reload_prints_a_secret() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("relay.toml");
    let outbox = folder.path().join("shop.db");
    let output = folder.path().join("log");
    let env = [
        ("RELAY_SOURCE__KIND", "sqlite"),
        ("RELAY_SOURCE__SQLITE__PATH", outbox.to_str().unwrap()),
        ("RELAY_SINK__KAFKA__BROKERS", "127.0.0.1:1"),
        ("RELAY_ADMIN__ENABLED", "false"),
        ("RELAY_LOG__LEVEL", "trace"),
    ];
    relay(&["migrate"], &env).await.ends_with(0);
    std::fs::write(&file, "").unwrap();
    let args = ["run", "--config", file.to_str().unwrap()];
    let running = start(&args, &env, &output);
    until(&output, "outbox-relay 0", 1).await;
    let mut refused = 0;
    for mistake in MISTAKES {
        // What the database has to do with is not looked at with SQLite, and files are tried at the start.
        let shows = !mistake.contains("brokers")
            && (mistake.contains(" x")
                || !mistake.starts_with("[source") && !mistake.contains(".pem"));
        if !shows {
            continue;
        }
        std::fs::write(&file, written(&folder, mistake)).unwrap();
        let hung_up = Command::new("kill")
            .args(["-s", "HUP", &running.0.id().to_string()])
            .status()
            .unwrap();
        assert!(hung_up.success());
        refused += 1;
        until(&output, "the changed configuration is wrong", refused).await;
    }
}
