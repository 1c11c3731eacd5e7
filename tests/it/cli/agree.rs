//! `doctor`, `/readyz` and `status` say the same of the same relay.

use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::Value;

use super::pipelines::{World, both, postgres, stop};
use super::relay;
use crate::fresh::run;

/// What each of them says.
#[derive(Debug, PartialEq, Eq)]
struct Said {
    /// The code of `/readyz`; none where no daemon answers.
    readyz: Option<u16>,
    /// What `status --json` has of the daemon.
    status: Option<bool>,
    /// Whether `doctor` found an error, and its exit code.
    doctor: (bool, i32),
}

const READY: Said = Said {
    readyz: Some(200),
    status: Some(true),
    doctor: (false, 0),
};
const NOT_READY: Said = Said {
    readyz: Some(503),
    status: Some(false),
    doctor: (true, 3),
};

fn readyz(address: &str) -> Option<u16> {
    let mut stream = TcpStream::connect(address).ok()?;
    let request = format!("GET /readyz HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.split(' ').nth(1)?.parse().ok()
}

/// What they say, and all that doctor found, as `severity check: what`.
async fn said(env: &[(&str, &str)]) -> (Said, Vec<String>) {
    let address = env
        .iter()
        .rev()
        .find(|(name, _)| *name == "RELAY_ADMIN__LISTEN");
    let ran = relay(&["doctor", "--json"], env).await;
    let findings: Vec<Value> =
        serde_json::from_str(&ran.out).unwrap_or_else(|error| panic!("{error}: {}", ran.err));
    let found: Vec<String> = findings
        .iter()
        .map(|finding| {
            let text = |name: &str| finding[name].as_str().unwrap();
            format!("{} {}: {}", text("severity"), text("check"), text("what"))
        })
        .collect();
    let is_error = found.iter().any(|found| found.starts_with("error "));
    let status = relay(&["status", "--json"], env).await;
    let status: Value = serde_json::from_str(&status.out).unwrap();
    let said = Said {
        readyz: readyz(address.unwrap().1),
        status: status["daemon"]["ready"].as_bool(),
        doctor: (is_error, ran.code),
    };
    (said, found)
}

/// They agree on this, and doctor names it.
async fn agree(env: &[(&str, &str)], expected: Said, named: &str) {
    let (said, found) = said(env).await;
    assert_eq!(said, expected, "{found:#?}");
    assert!(
        found.iter().any(|found| found.contains(named)),
        "{named}: {found:#?}"
    );
}

#[tokio::test]
async fn of_a_healthy_and_of_a_paused_relay() {
    both("of_a_healthy_and_of_a_paused_relay", async |world| {
        let env = world.env(&[]);
        let daemon = world.start(&[]);
        world.emit(&["1"]).await;
        world.until_keys(&["1"]).await;
        world.until_state("running").await;
        world
            .until("the position", async || {
                let seen = world.json(&["status"]).await;
                seen["books"]["pipelines"][0]["oldest_unpublished_seconds"].is_null()
            })
            .await;
        agree(&env, READY, "ok daemon: the relay at ").await;
        let (_, found) = said(&env).await;
        let reached = if world.database.is_some() {
            "ok connection: PostgreSQL "
        } else {
            "ok connection: the SQLite file "
        };
        assert!(
            found.iter().any(|found| found.starts_with(reached)),
            "{found:#?}"
        );
        world.pause().await;
        world.until_state("paused").await;
        world.emit(&["2"]).await;
        agree(&env, READY, "note paused: pipeline main is paused since ").await;
        drop(daemon);
    })
    .await;
}

#[tokio::test]
async fn of_a_halted_relay_and_of_one_that_does_not_run() {
    both(
        "of_a_halted_relay_and_of_one_that_does_not_run",
        async |world| {
            let halts = [("RELAY_PIPELINE__ON_REJECTED", "halt")];
            let env = world.env(&halts);
            let daemon = world.start(&halts);
            world.until_state("running").await;
            world.emit_of("big order", "1").await;
            world.until_state("halted").await;
            agree(
                &env,
                NOT_READY,
                "error daemon: pipeline main has been halted for ",
            )
            .await;
            agree(
                &env,
                NOT_READY,
                "error rejected: pipeline main can't publish event 1 of type",
            )
            .await;
            let ran = relay(&["status"], &env).await;
            assert!(
                ran.out.contains("outbox-relay pipelines skip main"),
                "{}",
                ran.out
            );
            stop(daemon);
            let gone = Said {
                readyz: None,
                status: None,
                doctor: (true, 3),
            };
            let named = "error lease: no relay owns pipeline main, and 1 id waits";
            agree(&env, gone, named).await;
        },
    )
    .await;
}

#[tokio::test]
async fn of_a_relay_without_its_broker() {
    both("of_a_relay_without_its_broker", async |world| {
        let away = [
            ("RELAY_SINK__KIND", "kafka"),
            ("RELAY_SINK__KAFKA__BROKERS", "127.0.0.1:1"),
        ];
        let env: Vec<(&str, &str)> = world
            .env(&[])
            .into_iter()
            .filter(|(name, _)| *name != "RELAY_SINK__KIND")
            .chain(away)
            .collect();
        let mut command = super::program(&["run"], &env);
        command
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null());
        let daemon = super::status::Daemon(command.spawn().unwrap());
        world.emit(&["1"]).await;
        world.until_state("stalled").await;
        agree(
            &env,
            NOT_READY,
            "error daemon: pipeline main has been stalled for ",
        )
        .await;
        agree(
            &env,
            NOT_READY,
            "error kafka: no answer from Kafka at 127.0.0.1:1",
        )
        .await;
        drop(daemon);
    })
    .await;
}

#[tokio::test]
async fn of_a_standby_of_lacking_rights_and_of_a_row_that_is_not_read() {
    let test = "of_a_standby_of_lacking_rights_and_of_a_row_that_is_not_read";
    postgres(test, &async |world: &World<'_>| {
        let env = world.env(&[]);
        let daemon = world.start(&[]);
        world.until_state("running").await;
        let address = super::status::free_address();
        let second = [("RELAY_ADMIN__LISTEN", &address[..])];
        let second_env: Vec<(&str, &str)> = world
            .env(&[])
            .into_iter()
            .filter(|(name, _)| *name != "RELAY_ADMIN__LISTEN")
            .chain(second)
            .collect();
        let standby = world.start_with(&second_env);
        super::status::until(&second_env, |seen| {
            seen["daemon"]["pipelines"][0]["state"] == "standby"
        })
        .await;
        agree(&second_env, READY, "ok daemon: the relay at ").await;
        stop(standby);
        let database = world.database.unwrap();
        let mut superuser = database.superuser().await;
        run(
            &mut superuser,
            "revoke select on outbox.events from outbox_relay",
        )
        .await;
        // The tables can't be asked as the role of the relay any more, the daemon can.
        let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(60);
        while readyz(
            env.iter()
                .find(|(name, _)| *name == "RELAY_ADMIN__LISTEN")
                .unwrap()
                .1,
        ) != Some(503)
        {
            assert!(tokio::time::Instant::now() < deadline);
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        agree(
            &env,
            NOT_READY,
            "error daemon: pipeline main has been stalled for ",
        )
        .await;
        agree(&env, NOT_READY, "error rights: ").await;
        run(
            &mut superuser,
            "grant select on outbox.events to outbox_relay",
        )
        .await;
        world.until_state("running").await;
        stop(daemon);
        // Nine million bytes are not read: the relay stops there.
        let halts = [("RELAY_PIPELINE__ON_REJECTED", "halt")];
        let env = world.env(&halts);
        run(
            &mut superuser,
            "select outbox.emit('order', '1', 'big', to_json(repeat('x', 9000000)))",
        )
        .await;
        let daemon = world.start(&halts);
        world.until_state("halted").await;
        agree(
            &env,
            NOT_READY,
            "error rejected: pipeline main can't publish event 1 of type \"order\": too large",
        )
        .await;
        drop(daemon);
    })
    .await;
}

#[tokio::test]
async fn a_sequence_that_fell_behind_is_found_with_its_remedy() {
    let test = "a_sequence_that_fell_behind_is_found_with_its_remedy";
    postgres(test, &async |world: &World<'_>| {
        world.emit(&["1", "2", "3"]).await;
        let mut superuser = world.database.unwrap().superuser().await;
        run(&mut superuser, "select setval('outbox.events_id_seq', 1)").await;
        let env = world.env(&[]);
        let (said, found) = said(&env).await;
        assert_eq!(said.doctor, (true, 3));
        let named = "error sequence_behind: the sequence outbox.events_id_seq stands at 1, and ids up to 3 are used";
        assert!(found.iter().any(|found| found == named), "{found:#?}");
        run(&mut superuser, "select outbox.repair_sequence()").await;
        let (said, found) = self::said(&env).await;
        assert_eq!(said.doctor, (false, 0), "{found:#?}");
        let new = "note new_pipeline: pipeline main has no cursor: it begins at the earliest of 3 retained events (pipeline.start)";
        assert!(found.iter().any(|found| found == new), "{found:#?}");
    })
    .await;
}

#[tokio::test]
async fn a_pipeline_that_the_configuration_forgot_is_a_warning_while_events_wait() {
    let test = "a_pipeline_that_the_configuration_forgot_is_a_warning_while_events_wait";
    both(test, async |world| {
        let daemon = world.start(&[]);
        world.emit(&["1"]).await;
        world.until_keys(&["1"]).await;
        stop(daemon);
        world.emit(&["2", "3"]).await;
        let env = world.env(&[("RELAY_PIPELINES__AUDIT__TOPIC", "audit")]);
        let (said, found) = said(&env).await;
        assert_eq!(said.doctor, (false, 3), "{found:#?}");
        let named = "warning strange_cursor: pipeline main has a cursor and 2 ids waiting, the oldest event for ";
        assert!(found.iter().any(|found| found.starts_with(named)), "{found:#?}");
        let new = "note new_pipeline: pipeline audit has no cursor: it begins at the earliest of 3 retained events (pipeline.start)";
        assert!(found.iter().any(|found| found == new), "{found:#?}");
        let ran = relay(&["doctor"], &env).await;
        assert!(ran.out.contains("outbox-relay pipelines remove main"), "{}", ran.out);
    })
    .await;
}
