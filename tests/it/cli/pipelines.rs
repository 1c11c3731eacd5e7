//! `pipelines`: what operators ask of a whole pipeline, with a daemon beside it, for both databases.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use serde_json::Value;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{AssertSqlSafe, Connection};
use tempfile::TempDir;
use tokio::time::Instant;

use super::status::{Daemon, free_address};
use super::{Ran, program, relay};
use crate::fresh::{Database, empty_database, run, value};

/// An outbox, the environment of its relays, and a file to which all of them print what they publish.
pub(super) struct World<'a> {
    pub(super) database: Option<&'a Database>,
    pub(super) folder: TempDir,
    env: Vec<(String, String)>,
}

/// Runs a test with each database.
pub(super) async fn both(test: &str, work: impl AsyncFn(&World<'_>)) {
    sqlite(&work).await;
    postgres(test, &work).await;
}

pub(super) async fn sqlite(work: &impl AsyncFn(&World<'_>)) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("shop.db");
    let source = [
        ("RELAY_SOURCE__KIND", "sqlite"),
        ("RELAY_SOURCE__SQLITE__PATH", path.to_str().unwrap()),
    ];
    let world = World::new(None, folder, &source);
    world.ends_with(0, &["migrate"]).await;
    work(&world).await;
}

pub(super) async fn postgres(test: &str, work: &impl AsyncFn(&World<'_>)) {
    empty_database(test, async |database| {
        let owner = database.login("owner", "superuser").await;
        let url = database.url(&owner);
        let folder = tempfile::tempdir().unwrap();
        let mut world = World::new(
            Some(database),
            folder,
            &[("RELAY_SOURCE__POSTGRES__URL", &url)],
        );
        world.ends_with(0, &["migrate"]).await;
        // With no more rights than a relay has.
        let role = database.login("relay", "in role outbox_relay").await;
        world.env[0].1 = database.url(&role);
        work(&world).await;
    })
    .await;
}

impl<'a> World<'a> {
    pub(super) fn new(
        database: Option<&'a Database>,
        folder: TempDir,
        source: &[(&str, &str)],
    ) -> Self {
        let address = free_address();
        let more = [
            ("RELAY_SINK__KIND", "stdout"),
            ("RELAY_ADMIN__LISTEN", &address[..]),
            ("RELAY_ADMIN__TOKEN", "only-for-these-tests"),
            ("RELAY_RELAY__LEASE_TTL", "3s"),
        ];
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let env = source.iter().chain(&more).map(owned).collect();
        Self {
            database,
            folder,
            env,
        }
    }

    pub(super) fn env<'e>(&'e self, more: &[(&'e str, &'e str)]) -> Vec<(&'e str, &'e str)> {
        let env = self.env.iter().map(|(name, value)| (&name[..], &value[..]));
        env.chain(more.iter().copied()).collect()
    }

    pub(super) async fn ends_with(&self, code: i32, args: &[&str]) -> Ran {
        relay(args, &self.env(&[])).await.ends_with(code)
    }

    pub(super) async fn json(&self, args: &[&str]) -> Value {
        let mut args = args.to_vec();
        args.push("--json");
        let Ran { out, .. } = self.ends_with(0, &args).await;
        serde_json::from_str(&out).unwrap()
    }

    pub(super) fn published(&self) -> PathBuf {
        self.folder.path().join("published")
    }

    pub(super) fn start(&self, more: &[(&str, &str)]) -> Daemon {
        self.start_with(&self.env(more))
    }

    pub(super) fn start_with(&self, env: &[(&str, &str)]) -> Daemon {
        let out = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.published())
            .unwrap();
        let mut command = program(&["run"], env);
        command.stdout(out).stderr(Stdio::null());
        Daemon(command.spawn().unwrap())
    }

    /// Emits events of the type `order`, one for each entity in this order.
    pub(super) async fn emit(&self, entities: &[&str]) {
        for entity in entities {
            self.emit_of("order", entity).await;
        }
    }

    pub(super) async fn emit_of(&self, aggregate_type: &str, entity: &str) {
        if let Some(database) = self.database {
            let mut writer = database.superuser().await;
            let emit =
                format!("select outbox.emit('{aggregate_type}', '{entity}', 'placed', '{{}}')");
            run(&mut writer, &emit).await;
        } else {
            let insert = format!(
                "insert into outbox_events (aggregate_type, aggregate_id, event_type, payload) \
                 values ('{aggregate_type}', '{entity}', 'placed', '{{}}')"
            );
            let mut writer = self.sqlite().await;
            sqlx::raw_sql(AssertSqlSafe(insert))
                .execute(&mut writer)
                .await
                .unwrap();
        }
    }

    pub(super) async fn sqlite(&self) -> SqliteConnection {
        let path = self.folder.path().join("shop.db");
        let options = SqliteConnectOptions::new().filename(path);
        SqliteConnection::connect_with(&options).await.unwrap()
    }

    /// The keys of everything that was published, in order.
    pub(super) fn keys(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.published()).unwrap_or_default();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let key = |line: &str| {
            let line: Value = serde_json::from_str(line).unwrap();
            line["key"].as_str().unwrap().to_owned()
        };
        whole.lines().map(key).collect()
    }

    pub(super) async fn until_keys(&self, keys: &[&str]) {
        self.until(&format!("{keys:?}"), async || {
            let published = self.keys();
            assert!(published.len() <= keys.len(), "{published:?}");
            published == keys
        })
        .await;
    }

    pub(super) async fn until(&self, what: &str, fact: impl AsyncFn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !fact().await {
            assert!(
                Instant::now() < deadline,
                "{what}: published {:?}, status {:#}",
                self.keys(),
                self.json(&["status"]).await
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until the daemon says that the pipeline is in this state, in every shard.
    pub(super) async fn until_state(&self, state: &str) -> Value {
        self.until(state, async || {
            let seen = self.json(&["status"]).await;
            let shards = seen["daemon"]["pipelines"].as_array();
            shards.is_some_and(|shards| shards.iter().all(|shard| shard["state"] == state))
        })
        .await;
        self.json(&["status"]).await
    }

    pub(super) async fn pause(&self) {
        let pause = ["pipelines", "pause", "main", "--reason", "a test", "--wait"];
        self.ends_with(0, &pause).await;
    }

    pub(super) async fn resume(&self) {
        self.ends_with(0, &["pipelines", "resume", "main"]).await;
    }
}

pub(super) fn stop(daemon: Daemon) {
    let Daemon(child) = &daemon;
    let child: &Child = child;
    // SIGTERM, as an init does it.
    let killed = std::process::Command::new("kill")
        .arg(child.id().to_string())
        .status();
    assert!(killed.unwrap().success());
    wait(daemon);
}

fn wait(mut daemon: Daemon) {
    daemon.0.wait().unwrap();
}

fn exists(path: &Path) -> bool {
    path.exists()
}

#[tokio::test]
async fn a_paused_pipeline_stands_until_it_is_resumed() {
    both(
        "a_paused_pipeline_stands_until_it_is_resumed",
        async |world| {
            let daemon = world.start(&[]);
            world.emit(&["1", "2"]).await;
            world.until_keys(&["1", "2"]).await;
            assert!(exists(&world.published()));
            let reason = ["pipelines", "pause", "main", "--reason", "the broker moves"];
            let ran = world.ends_with(0, &reason).await;
            assert!(ran.out.contains("paused pipeline main"), "{}", ran.out);
            let seen = world.until_state("paused").await;
            // It does what it was told: that is no error.
            assert_eq!(seen["daemon"]["ready"], true);
            let shown = &seen["daemon"]["pipelines"][0];
            assert_eq!(shown["reason"], "the broker moves");
            assert!(shown["since"].as_str().unwrap().ends_with('Z'), "{shown}");
            assert!(seen["books"]["pipelines"][0]["owner"].is_null());
            world.emit(&["3"]).await;
            let Ran { out, .. } = world.ends_with(0, &["status"]).await;
            assert!(out.contains("PAUSED"), "{out}");
            assert!(out.contains("the broker moves"), "{out}");
            // A second pause changes nothing.
            let again = [
                "pipelines",
                "pause",
                "main",
                "--reason",
                "another",
                "--json",
            ];
            let Ran { out, .. } = world.ends_with(0, &again).await;
            assert!(out.contains("the broker moves"), "{out}");
            stop(daemon);
            let daemon = world.start(&[]);
            world.until_state("paused").await;
            assert_eq!(world.keys(), ["1", "2"]);
            let Ran { out, .. } = world.ends_with(0, &["pipelines", "list"]).await;
            assert!(out.contains("PAUSED"), "{out}");
            world.resume().await;
            let resumed = Instant::now();
            world.until_keys(&["1", "2", "3"]).await;
            assert!(
                resumed.elapsed() < Duration::from_secs(10),
                "{:?}",
                resumed.elapsed()
            );
            let acts = world.json(&["acts"]).await;
            let actions: Vec<&str> = acts
                .as_array()
                .unwrap()
                .iter()
                .map(|act| act["action"].as_str().unwrap())
                .collect();
            assert_eq!(actions, ["resume", "pause"]);
            assert_eq!(acts[1]["reason"], "the broker moves");
            drop(daemon);
        },
    )
    .await;
}

#[tokio::test]
async fn a_pipeline_goes_where_it_is_sent() {
    both("a_pipeline_goes_where_it_is_sent", async |world| {
        let daemon = world.start(&[]);
        world.emit(&["1", "2", "3"]).await;
        world.until_keys(&["1", "2", "3"]).await;
        let seek = |to| ["pipelines", "seek", "main", to, "--reason", "a test"];
        let ran = world.ends_with(1, &seek("earliest")).await;
        assert!(ran.err.contains("pause it first"), "{}", ran.err);
        world.pause().await;
        let dry = ["pipelines", "seek", "main", "2", "--dry-run"];
        let told = world.json(&dry).await;
        assert_eq!((&told["again"], &told["left_out"]), (&2.into(), &0.into()));
        assert_eq!((&told["to"], &told["newest_id"]), (&1.into(), &3.into()));
        world.resume().await;
        world.emit(&["4"]).await;
        world.until_keys(&["1", "2", "3", "4"]).await;
        world.pause().await;
        world.ends_with(0, &seek("3")).await;
        world.resume().await;
        world.until_keys(&["1", "2", "3", "4", "3", "4"]).await;
        world.pause().await;
        let ran = world.ends_with(1, &seek("9")).await;
        assert!(ran.err.contains("there is no event 9 yet"), "{}", ran.err);
        world.ends_with(2, &seek("somewhere")).await;
        world.emit(&["5", "6"]).await;
        let left_out = world.json(&seek("6")).await;
        assert_eq!(
            (&left_out["again"], &left_out["left_out"]),
            (&0.into(), &1.into())
        );
        world.resume().await;
        world.until_keys(&["1", "2", "3", "4", "3", "4", "6"]).await;
        world.pause().await;
        world.emit(&["7"]).await;
        world.ends_with(0, &seek("latest")).await;
        world.emit(&["8"]).await;
        world.resume().await;
        world
            .until_keys(&["1", "2", "3", "4", "3", "4", "6", "8"])
            .await;
        world.pause().await;
        world.ends_with(0, &seek("1h")).await;
        world.resume().await;
        let all = ["1", "2", "3", "4", "5", "6", "7", "8"];
        let expected = [&["1", "2", "3", "4", "3", "4", "6", "8"][..], &all].concat();
        world.until_keys(&expected).await;
        drop(daemon);
    })
    .await;
}

#[tokio::test]
async fn a_seek_holds_for_all_shards_and_for_open_transactions() {
    let test = "a_seek_holds_for_all_shards_and_for_open_transactions";
    postgres(test, &async |world: &World<'_>| {
        let database = world.database.unwrap();
        let daemon = world.start(&[("RELAY_PIPELINE__SHARDS", "3")]);
        let entities = ["1", "2", "3", "4", "5", "6"];
        world.emit(&entities).await;
        let sorted = |world: &World<'_>| {
            let mut keys = world.keys();
            keys.sort();
            keys
        };
        world
            .until("all of them", async || sorted(world) == entities)
            .await;
        let mut late = database.superuser().await;
        run(
            &mut late,
            "begin; select outbox.emit('order', 'late', 'placed', '{}')",
        )
        .await;
        world.pause().await;
        let mut superuser = database.superuser().await;
        // As if the number of shards had changed since: what an earlier shard had passed counts no more.
        run(
            &mut superuser,
            "insert into outbox.former_cursors (pipeline, generation, shards, shard, prev, cur, last_id) \
             select pipeline, 0, 1, 0, cur, cur, last_id from outbox.cursors where shard = 0",
        )
        .await;
        let seek = ["pipelines", "seek", "main", "latest", "--reason", "x"];
        world.ends_with(0, &seek).await;
        run(&mut late, "commit").await;
        world.resume().await;
        // It was open when the position was written.
        let with_late = ["1", "2", "3", "4", "5", "6", "late"];
        world
            .until("the late one", async || sorted(world) == with_late)
            .await;
        world.pause().await;
        let seek = ["pipelines", "seek", "main", "earliest", "--reason", "x"];
        let told = world.json(&seek).await;
        assert_eq!(told["again"], 7);
        assert_eq!(told["from"].as_array().unwrap().len(), 3);
        let left = "select count(*)::text from outbox.former_cursors";
        assert_eq!(value(&mut superuser, left).await, "0");
        world.resume().await;
        let mut twice = [with_late, with_late].concat();
        twice.sort_unstable();
        world
            .until("all of them again", async || sorted(world) == twice)
            .await;
        drop(daemon);
    })
    .await;
}

#[tokio::test]
async fn a_halted_pipeline_is_led_past_one_event() {
    both("a_halted_pipeline_is_led_past_one_event", async |world| {
        let halts = [("RELAY_PIPELINE__ON_REJECTED", "halt")];
        let daemon = world.start(&halts);
        world.emit(&["1"]).await;
        world
            .until("the position", async || {
                let seen = world.json(&["status"]).await;
                seen["books"]["pipelines"][0]["last_id"] == 1
            })
            .await;
        world.emit_of("big order", "1").await;
        world.emit_of("big order", "1").await;
        world.emit(&["2"]).await;
        let seen = world.until_state("halted").await;
        let reason = seen["daemon"]["pipelines"][0]["reason"].as_str().unwrap();
        for part in [
            "event 2: it is of \"big order/1\" and can't be published",
            "the topic name has the character ' '",
            "outbox-relay pipelines skip main ",
        ] {
            assert!(reason.contains(part), "{reason}");
        }
        // The command as the message has it.
        let (_, command) = reason
            .split_once("outbox-relay pipelines skip main ")
            .unwrap();
        let event = command.split(' ').next().unwrap().to_owned();
        let skip = |event| ["pipelines", "skip", "main", event, "--reason", "a bad name"];
        let ran = world.ends_with(1, &skip("1")).await;
        assert!(ran.err.contains("is past event 1"), "{}", ran.err);
        let ran = world.ends_with(1, &skip("99")).await;
        assert!(ran.err.contains("not in the log"), "{}", ran.err);
        world.ends_with(0, &skip(&event)).await;
        // Exactly this one: the next one halts again.
        world
            .until("the next one", async || {
                let seen = world.json(&["status"]).await;
                let reason = seen["daemon"]["pipelines"][0]["reason"].as_str();
                reason.is_some_and(|reason| reason.starts_with("event 3: "))
            })
            .await;
        world.ends_with(0, &skip("3")).await;
        world.until_keys(&["1", "2"]).await;
        let parked = world.json(&["parked", "list"]).await;
        for (row, id) in [(&parked["events"][0], 2), (&parked["events"][1], 3)] {
            assert_eq!(row["id"], id);
            assert_eq!(row["holds"], false);
            let error = row["error"].as_str().unwrap();
            assert!(error.contains("a bad name"), "{error}");
            assert!(
                error.contains("the topic name has the character"),
                "{error}"
            );
        }
        let ran = world.ends_with(1, &skip("3")).await;
        assert!(ran.err.contains("parked"), "{}", ran.err);
        drop(daemon);
    })
    .await;
}

#[tokio::test]
async fn a_pipeline_that_was_given_up_is_removed_whole() {
    both(
        "a_pipeline_that_was_given_up_is_removed_whole",
        async |world| {
            let daemon = world.start(&[]);
            world.emit(&["1"]).await;
            world.emit_of("big order", "1").await;
            world.until_keys(&["1"]).await;
            world
                .until("a parked event", async || {
                    let parked = world.json(&["parked", "list"]).await;
                    !parked["events"].as_array().unwrap().is_empty()
                })
                .await;
            let remove = [
                "pipelines",
                "remove",
                "main",
                "--reason",
                "given up",
                "--yes",
            ];
            let ran = world.ends_with(1, &remove).await;
            assert!(ran.err.contains("configuration names"), "{}", ran.err);
            let other = world.env(&[("RELAY_PIPELINES__OTHER__TOPIC", "other")]);
            let ran = relay(&remove, &other).await.ends_with(1);
            assert!(ran.err.contains("is owned by"), "{}", ran.err);
            stop(daemon);
            world.emit(&["2", "3"]).await;
            let ran = relay(&remove[..5], &other).await.ends_with(2);
            assert!(ran.out.contains("2 events of the log"), "{}", ran.out);
            assert!(ran.out.contains("1 parked event:"), "{}", ran.out);
            assert!(ran.err.contains("--yes"), "{}", ran.err);
            let Ran { out, .. } = relay(&["status", "--json"], &other).await.ends_with(0);
            assert!(out.contains("\"main\""), "{out}");
            relay(&remove, &other).await.ends_with(0);
            let Ran { out, .. } = relay(&["status", "--json"], &other).await.ends_with(0);
            assert!(!out.contains("\"main\""), "{out}");
            let ran = relay(&remove, &other).await.ends_with(2);
            assert!(ran.err.contains("a pipeline main"), "{}", ran.err);
            let acts = world.json(&["acts"]).await;
            assert_eq!(
                (&acts[0]["action"], &acts[0]["events"]),
                (&"remove".into(), &3.into())
            );
        },
    )
    .await;
}
