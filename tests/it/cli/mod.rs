//! The commands as people run them: what they print, where, and how they end.

mod admin;
mod agree;
mod check;
mod doctor;
mod doctor_rights;
mod parked;
mod pipelines;
mod retention;
mod secrets;
mod status;
mod tail;

use std::fmt::Write;
use std::process::{Command, Stdio};

use expect_test::{expect, expect_file};

use crate::fresh::{empty_database, needed};

/// Planted wherever a secret can stand; found nowhere.
const PLANTED: &str = "planted-secret";

const NOBODY: &str = "postgres://relay:planted-secret@127.0.0.1:1/shop";

struct Ran {
    code: i32,
    out: String,
    err: String,
}

impl Ran {
    /// Panics with everything that was said.
    fn ends_with(self, code: i32) -> Self {
        assert_eq!(self.code, code, "out:\n{}\nerr:\n{}", self.out, self.err);
        self
    }
}

/// The program with nothing in its environment but this.
fn program(args: &[&str], env: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outbox-relay"));
    command
        .args(args)
        .env_clear()
        .envs(env.iter().copied())
        .stdin(Stdio::null());
    command
}

/// Runs the program to its end. Whatever it says holds no planted secret.
async fn relay(args: &[&str], env: &[(&str, &str)]) -> Ran {
    let mut command = program(args, env);
    let output = tokio::task::spawn_blocking(move || command.output())
        .await
        .unwrap()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).expect("only UTF-8 is printed");
    let ran = Ran {
        code: output.status.code().expect("it ended by itself"),
        out: text(output.stdout),
        err: text(output.stderr),
    };
    for said in [&ran.out, &ran.err] {
        assert!(!said.contains(PLANTED), "a secret was printed:\n{said}");
    }
    ran
}

#[tokio::test]
async fn the_help_is_pinned() {
    let commands: &[&[&str]] = &[
        &[],
        &["run"],
        &["migrate"],
        &["check"],
        &["doctor"],
        &["ready"],
        &["status"],
        &["tail"],
        &["parked"],
        &["parked", "list"],
        &["parked", "show"],
        &["parked", "redrive"],
        &["parked", "drop"],
        &["pipelines"],
        &["pipelines", "list"],
        &["pipelines", "pause"],
        &["pipelines", "resume"],
        &["pipelines", "seek"],
        &["pipelines", "skip"],
        &["pipelines", "remove"],
        &["acts"],
        &["replay"],
        &["replay", "start"],
        &["replay", "resume"],
        &["replay", "list"],
        &["replay", "cancel"],
        &["verify"],
        &["demo"],
        &["completions"],
    ];
    let mut all = String::new();
    for command in commands {
        let mut args = command.to_vec();
        args.push("--help");
        let Ran { out, .. } = relay(&args, &[]).await.ends_with(0);
        writeln!(all, "$ outbox-relay {}\n{out}", args.join(" ")).unwrap();
    }
    expect_file!["help.txt"].assert_eq(&all);
}

#[tokio::test]
async fn completions_are_printed_for_the_usual_shells() {
    for shell in ["bash", "zsh", "fish"] {
        let Ran { out, .. } = relay(&["completions", shell], &[]).await.ends_with(0);
        assert!(
            out.contains("outbox-relay") && out.contains("doctor"),
            "{shell}: {out}"
        );
    }
}

#[tokio::test]
async fn a_wrong_configuration_is_one_line_and_exit_code_2() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("relay.toml");
    std::fs::write(&file, "[sink.kafka]\nbroker = \"kafka:9092\"\n").unwrap();
    let path = file.to_str().unwrap();
    let mut said = String::new();
    type Case<'a> = (&'a [&'a str], &'a [(&'a str, &'a str)]);
    let cases: &[Case<'_>] = &[
        (
            &["run", "--config", path],
            &[("RELAY_SOURCE__POSTGRES__URL", NOBODY)],
        ),
        (&["check"], &[]),
        (&["doctor", "--config", "/nowhere/relay.toml"], &[]),
        (
            &["status"],
            &[(
                "RELAY_SOURCE__POSTGRES__URL",
                "mysql://u:planted-secret@h/d",
            )],
        ),
        (
            &["migrate"],
            &[
                ("RELAY_SOURCE__POSTGRES__URL", NOBODY),
                ("RELAY_LOG__FORMAT", "xml"),
            ],
        ),
    ];
    for (args, env) in cases {
        let ran = relay(args, env).await.ends_with(2);
        assert_eq!(ran.out, "");
        said += &ran.err.replace(path, "relay.toml");
    }
    expect![[r#"
        outbox-relay: relay.toml: sink.kafka.broker: no such setting; did you mean "brokers"?
        outbox-relay: source.postgres.url is missing: set it in the file, in RELAY_SOURCE__POSTGRES__URL, or name a file with source.postgres.url_file
        outbox-relay: /nowhere/relay.toml: no such file
        outbox-relay: source.postgres.url is not a URL such as postgres://user:password@host:5432/database
        outbox-relay: RELAY_LOG__FORMAT: log.format = "xml": has to be one of text, json; there is text, json
    "#]]
    .assert_eq(&said);
}

#[tokio::test]
async fn a_wrong_command_line_is_exit_code_2() {
    for args in [
        &["statsu"][..],
        &["parked", "list", "--pipeline", "No Name"],
        &["parked", "list", "--entity", "order"],
        &["parked", "drop", "--all"],
        &["parked", "redrive", "5", "--all"],
        &[],
    ] {
        let ran = relay(args, &[]).await.ends_with(2);
        assert!(ran.err.contains("--help"), "{}", ran.err);
    }
}

#[tokio::test]
async fn a_database_that_is_not_there_is_named() {
    let env = [
        ("RELAY_SOURCE__POSTGRES__URL", NOBODY),
        ("RELAY_ADMIN__ENABLED", "false"),
    ];
    for args in [
        &["status"][..],
        &["parked", "list"],
        &["parked", "redrive", "--all"],
        &["pipelines", "list"],
        &["tail"],
        &["acts"],
        &["migrate"],
    ] {
        let ran = relay(args, &env).await.ends_with(1);
        for part in ["127.0.0.1:1", "\"shop\"", "Connection refused"] {
            assert!(ran.err.contains(part), "{args:?}: {}", ran.err);
        }
        assert_eq!(ran.err.lines().count(), 1, "{}", ran.err);
    }
}

#[tokio::test]
async fn a_wrong_password_is_told_and_not_shown() {
    let Some(url) = needed(
        "a_wrong_password_is_told_and_not_shown",
        "DATABASE_PASSWORD_URL",
    ) else {
        return;
    };
    let (before, rest) = url.split_once("://").unwrap();
    let (user, host) = rest.split_once('@').unwrap();
    let user = user.split_once(':').unwrap().0;
    let wrong = format!("{before}://{user}:{PLANTED}@{host}");
    let env = [
        ("RELAY_SOURCE__POSTGRES__URL", &wrong[..]),
        ("RELAY_SINK__KIND", "stdout"),
        ("RELAY_ADMIN__ENABLED", "false"),
    ];
    let expected = format!("password authentication failed for user \"{user}\"");
    for args in [&["status"][..], &["migrate"]] {
        let ran = relay(args, &env).await.ends_with(1);
        assert!(ran.err.contains(&expected), "{}", ran.err);
    }
    let ran = relay(&["doctor"], &env).await.ends_with(3);
    assert!(ran.out.contains(&expected), "{}", ran.out);
    assert!(
        ran.out.contains("put the right password into"),
        "{}",
        ran.out
    );
}

#[tokio::test]
async fn check_says_what_the_configuration_means_and_no_secret() {
    let env = [
        ("RELAY_SOURCE__POSTGRES__URL", NOBODY),
        ("RELAY_SOURCE__POSTGRES__CAPTURE", "poll"),
        ("RELAY_SINK__KAFKA__BROKERS", "kafka-1:9092,kafka-2:9092"),
        ("RELAY_SINK__KAFKA__TLS__ENABLED", "true"),
        ("RELAY_SINK__KAFKA__SASL__MECHANISM", "SCRAM-SHA-512"),
        ("RELAY_SINK__KAFKA__SASL__USERNAME", "relay"),
        ("RELAY_SINK__KAFKA__SASL__PASSWORD", PLANTED),
        ("RELAY_SINK__KAFKA__PROPERTIES__SSL_KEY_PASSWORD", PLANTED),
        ("RELAY_PIPELINES__ALL__ON_REJECTED", "halt"),
        ("RELAY_PIPELINES__LETTERS__ON_REJECTED", "dead_letter"),
        ("RELAY_PIPELINES__LETTERS__DEAD_LETTER_TOPIC", "dead"),
        ("RELAY_PIPELINES__LOSSY__ON_REJECTED", "drop"),
        ("RELAY_PIPELINES__ORDERS__TOPIC", "shop.{aggregate_type}"),
        (
            "RELAY_PIPELINES__ORDERS__FILTER__AGGREGATE_TYPES",
            r#"["order", "cart"]"#,
        ),
        ("RELAY_RETENTION__DROP_UNPUBLISHED_AFTER", "30d"),
    ];
    let Ran { out, .. } = relay(&["check"], &env).await.ends_with(0);
    expect![[r#"
        the configuration is right
          from      PostgreSQL at 127.0.0.1:1, database "shop", as "relay", TLS if the server offers it, server not verified, polling
          to        Kafka at kafka-1:9092,kafka-2:9092, TLS, brokers verified, login by SCRAM-SHA-512, topics are created, at least once
          pipeline  all: everything to topic {aggregate_type}, key {aggregate_id}; what is rejected is a reason to stop
          pipeline  letters: everything to topic {aggregate_type}, key {aggregate_id}; what is rejected is a dead letter, copied to topic dead
          pipeline  lossy: everything to topic {aggregate_type}, key {aggregate_id}; what is rejected is DROPPED
          pipeline  orders: order, cart to topic shop.{aggregate_type}, key {aggregate_id}; what is rejected is parked
          retention published events stay for 7days; events that a pipeline has not published within 30days are LOST (retention.drop_unpublished_after)
          note      the pipelines all and letters write to the same topic ({aggregate_type}), and some events match the filters of both: those are published twice
          note      the pipelines all and lossy write to the same topic ({aggregate_type}), and some events match the filters of both: those are published twice
          note      the pipelines letters and lossy write to the same topic ({aggregate_type}), and some events match the filters of both: those are published twice
        whether both ends answer is told by `outbox-relay doctor`
    "#]]
    .assert_eq(&out);
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("shop.db");
    let env = [
        ("RELAY_SOURCE__KIND", "sqlite"),
        ("RELAY_SOURCE__SQLITE__PATH", file.to_str().unwrap()),
        ("RELAY_SINK__KIND", "stdout"),
        ("RELAY_ADMIN__LISTEN", &address[..]),
    ];
    let ran = relay(&["run"], &env).await.ends_with(1);
    let last = format!(
        "outbox-relay: listen on {address} (admin.listen): Address already in use (os error 98)\n"
    );
    assert!(ran.err.ends_with(&last), "{}", ran.err);
    // What it prints would count as published: that is said before.
    assert!(ran.err.contains("`outbox-relay tail`"), "{}", ran.err);
    // And whoever listens there is not taken for a daemon: it never answers.
    let ran = relay(&["migrate"], &env).await.ends_with(0);
    assert_eq!(ran.out, "applied 0001 outbox\n");
    let ran = relay(&["status"], &env).await.ends_with(0);
    assert!(ran.out.contains("no answer within 3 s"), "{}", ran.out);
}

#[tokio::test]
async fn a_database_without_the_outbox_says_so() {
    empty_database("a_database_without_the_outbox_says_so", async |database| {
        let role = database.login("owner", "superuser").await;
        let url = database.url(&role);
        let env = [
            ("RELAY_SOURCE__POSTGRES__URL", &url[..]),
            ("RELAY_SINK__KIND", "stdout"),
            ("RELAY_ADMIN__ENABLED", "false"),
        ];
        for args in [&["status"][..], &["parked", "list"]] {
            let ran = relay(args, &env).await.ends_with(1);
            let line = "there is no outbox in this database: run `outbox-relay migrate`";
            assert!(ran.err.contains(line), "{}", ran.err);
        }
    })
    .await;
}
