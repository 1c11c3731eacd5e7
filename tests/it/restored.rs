//! The database is another one than before: restored from a dump, failed over to a standby that missed the end, restored to
//! a point in time. Real servers and real tools; nothing is skipped.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::time::Duration;

use outbox_relay::event::{Shard, Start};
use outbox_relay::ledger::postgres::PostgresLedger;
use outbox_relay::ledger::{Acquired, Ledger, Settings};
use outbox_relay::source::postgres::{self, CaptureMode, PostgresSource};
use outbox_relay::source::{PageLimits, Source};
use sqlx::Connection;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use uuid::Uuid;

use crate::fresh::{needed, run, value, values};

/// A server that is stopped with the value.
struct Server {
    folder: PathBuf,
    port: u16,
    pid: String,
    url: String,
    options: PgConnectOptions,
}

impl Server {
    /// Starts one of the version of the client tools; none where this machine has no servers, which is then said.
    fn start(test: &str) -> Option<Self> {
        let folder = needed(test, "RELAY_TEST_FOLDER")?;
        let name = format!("restored-{}", Uuid::new_v4().simple());
        Some(Self::start_in(&Path::new(&folder).join(name), &[]))
    }

    /// Starts what is in the folder, with settings `NAME=VALUE`.
    fn start_in(folder: &Path, settings: &[String]) -> Self {
        let output = Command::new(script("postgres"))
            .args([tools_version(), folder.display().to_string()])
            .args(settings)
            .stderr(Stdio::inherit())
            .output()
            .expect("run the script");
        assert!(output.status.success(), "the server does not start");
        let said = String::from_utf8(output.stdout).expect("text");
        let exported = |name: &str| {
            let line = said.lines().find_map(|line| {
                line.strip_prefix("export ")?
                    .strip_prefix(name)?
                    .strip_prefix('=')
            });
            line.expect(name).trim_matches('\'').to_owned()
        };
        Self {
            folder: folder.to_owned(),
            port: exported("PG_PORT").parse().expect("a port"),
            pid: exported("PG_PID"),
            options: PgConnectOptions::from_str(&exported("DATABASE_URL")).expect("a URL"),
            url: exported("DATABASE_URL"),
        }
    }

    fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    async fn connect(&self) -> PgConnection {
        PgConnection::connect_with(&self.options)
            .await
            .expect("connect")
    }

    async fn migrated(self) -> Self {
        outbox_relay::migrate::postgres(self.options.clone())
            .await
            .expect("migrate");
        self
    }

    /// A copy of its files, as a backup or as the beginning of a standby.
    fn backup(&self, arguments: &[&str]) -> PathBuf {
        let folder = self
            .folder
            .with_file_name(format!("restored-{}", Uuid::new_v4().simple()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let data = folder.join("data");
        tool(
            Command::new("pg_basebackup")
                .args([
                    "--host=127.0.0.1",
                    "--username=postgres",
                    "--checkpoint=fast",
                ])
                .arg(format!("--port={}", self.port))
                .arg("--pgdata")
                .arg(&data)
                .args(arguments),
        );
        // The server does not run as the one who copies.
        tool(
            Command::new("chown")
                .arg("--recursive")
                .arg(format!("--reference={}", self.data().display()))
                .arg(&data),
        );
        folder
    }

    /// The end without any farewell.
    fn kill(&self) {
        let pid = &self.pid;
        tool(Command::new("kill").args(["-KILL", pid]));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A panic here would hide the one that matters.
        drop(Command::new(script("down")).arg(&self.folder).status());
    }
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/services")
        .join(name)
}

fn tool(command: &mut Command) {
    let status = command.stdin(Stdio::null()).status();
    assert!(status.expect("run the tool").success(), "{command:?}");
}

/// The major version of `pg_dump`, which must not be older than that of the server.
fn tools_version() -> String {
    let output = Command::new("pg_dump").arg("--version").output();
    let text = String::from_utf8(output.expect("pg_dump").stdout).expect("text");
    let version = text.split_whitespace().nth(2).expect("a version");
    version.split('.').next().expect("a number").to_owned()
}

/// Publishes what there is for a pipeline, as a relay would, and returns the uuids in the order of publication.
async fn publish(options: &PgConnectOptions, pipeline: &str) -> Vec<String> {
    let mut ledger = PostgresLedger::new(
        options.clone(),
        Settings {
            pipeline: pipeline.parse().expect("a name"),
            shard: Shard::whole(),
            holder: "test".to_owned(),
            lease_ttl: Duration::from_secs(10),
            start: Start::Earliest,
        },
    );
    let Acquired::Ours(tenure) = ledger.acquire().await.expect("acquire") else {
        panic!("nobody else is here");
    };
    let mut source = PostgresSource::new(postgres::Settings {
        connector: options.clone().into(),
        direct_connector: options.clone().into(),
        mode: CaptureMode::Poll,
        poll_interval: Duration::from_millis(50),
    })
    .of_shard(pipeline.parse().expect("a name"), Shard::whole());
    source.seek(tenure.position.clone());
    let limits = PageLimits {
        rows: 100,
        bytes: 1 << 20,
    };
    let (mut published, mut at) = (Vec::new(), tenure.position);
    loop {
        let page = source.capture(limits, &at).await.expect("capture");
        published.extend(page.events.iter().map(|event| event.event_id.to_string()));
        at = page.end;
        ledger.acknowledge(&at).await.expect("acknowledge");
        if !page.more {
            break;
        }
    }
    ledger.release(true).await.expect("release");
    published
}

async fn emit(connection: &mut PgConnection, events: u32) {
    run(
        connection,
        &format!("select outbox.emit('order', n::text, 'placed', '{{}}') from generate_series(1, {events}) n"),
    )
    .await;
}

/// The uuids of the log in the order of the ids.
async fn committed(connection: &mut PgConnection) -> Vec<String> {
    values(
        connection,
        "select event_id::text from outbox.events order by id",
    )
    .await
}

/// Uses up transaction ids.
async fn spend_xids(connection: &mut PgConnection, count: u32) {
    run(
        connection,
        &format!(
            "do $$ begin for n in 1..{count} loop perform pg_current_xact_id(); commit; end loop; end $$"
        ),
    )
    .await;
}

async fn next_xid(connection: &mut PgConnection) -> u64 {
    let xmax = "select pg_snapshot_xmax(pg_current_snapshot())::text";
    value(connection, xmax).await.parse().expect("a number")
}

/// A log of which 200 events are published by `main`, 100 by `audit`, and 100 by nobody, is dumped while a transaction with
/// one more is open, and restored into a cluster whose writers do not wait for the relay.
async fn dump_and_restore(old: Server, new: Server) {
    let mut before = old.connect().await;
    emit(&mut before, 100).await;
    assert_eq!(publish(&old.options, "audit").await.len(), 100);
    emit(&mut before, 100).await;
    assert_eq!(publish(&old.options, "main").await.len(), 200);
    emit(&mut before, 100).await;
    run(
        &mut before,
        "insert into outbox.parked (pipeline, id, event_id, aggregate_type, aggregate_id, event_type, occurred_at, xid) \
         select 'gone', id, event_id, aggregate_type, aggregate_id, event_type, occurred_at, xid from outbox.events",
    )
    .await;
    // In another cluster it would seem to have passed whatever comes.
    run(
        &mut before,
        "insert into outbox.former_cursors (pipeline, generation, shards, shard, prev, cur, last_id) \
         values ('main', 1, 1, 0, '900000:900000:', '900000:900000:', 0)",
    )
    .await;
    let mut open = old.connect().await;
    run(&mut open, "begin").await;
    emit(&mut open, 1).await;
    let dump = old.folder.join("dump");
    tool(
        Command::new("pg_dump")
            .args(["--format=custom", "--dbname"])
            .arg(&old.url)
            .arg("--file")
            .arg(&dump),
    );
    let mut after = new.connect().await;
    run(
        &mut after,
        "create role outbox_writer nologin; create role outbox_relay nologin",
    )
    .await;
    tool(
        Command::new("pg_restore")
            .args(["--exit-on-error", "--dbname"])
            .arg(&new.url)
            .arg(&dump),
    );

    let restored = committed(&mut after).await;
    assert_eq!(restored.len(), 300);
    let mut late = new.connect().await;
    run(&mut late, "begin").await;
    emit(&mut late, 1).await;
    emit(&mut after, 50).await;
    let log = committed(&mut after).await;

    let first = publish(&new.options, "main").await;
    // What one pipeline has not published is published again by the other: 100 of them, and never fewer.
    assert_eq!(first, log[100..], "in the order of the log");
    let moved =
        "select bool_and(p.xid = e.xid)::text from outbox.parked p join outbox.events e using (id)";
    assert_eq!(
        value(&mut after, moved).await,
        "true",
        "a parked event lies where its event lies"
    );
    assert_eq!(publish(&new.options, "audit").await, log[100..]);
    run(&mut late, "commit").await;
    emit(&mut after, 5).await;
    let everything = committed(&mut after).await;
    let known: HashSet<&String> = log.iter().collect();
    let rest: Vec<String> = everything
        .iter()
        .filter(|id| !known.contains(id))
        .cloned()
        .collect();
    assert_eq!(rest.len(), 6);
    assert_eq!(publish(&new.options, "main").await, rest);

    // The ids that the old cluster had used come by, with one of them in progress at each look; nothing comes back.
    for _ in 0..20 {
        let mut open = new.connect().await;
        run(&mut open, "begin; select pg_current_xact_id()").await;
        spend_xids(&mut after, 50).await;
        assert_eq!(publish(&new.options, "main").await, [""; 0]);
    }
}

#[tokio::test]
async fn a_dump_that_is_restored_elsewhere_is_published_on() {
    let test = "restored::a_dump_that_is_restored_elsewhere_is_published_on";
    let (Some(old), Some(new)) = (Server::start(test), Server::start(test)) else {
        return;
    };
    let old = old.migrated().await;
    spend_xids(&mut old.connect().await, 500).await;
    assert!(
        next_xid(&mut new.connect().await).await + 100 < next_xid(&mut old.connect().await).await
    );
    dump_and_restore(old, new).await;
}

#[tokio::test]
async fn so_it_is_where_the_new_cluster_is_older() {
    let test = "restored::so_it_is_where_the_new_cluster_is_older";
    let (Some(old), Some(new)) = (Server::start(test), Server::start(test)) else {
        return;
    };
    let old = old.migrated().await;
    spend_xids(&mut new.connect().await, 5000).await;
    assert!(
        next_xid(&mut new.connect().await).await > 1000 + next_xid(&mut old.connect().await).await
    );
    dump_and_restore(old, new).await;
}

/// Published events of the log in the end, and whether each of it was published.
async fn assert_nothing_is_skipped(server: &Server, published: &[String]) -> Vec<String> {
    let log = committed(&mut server.connect().await).await;
    let published: HashSet<&String> = published.iter().collect();
    let skipped: Vec<&String> = log.iter().filter(|id| !published.contains(id)).collect();
    assert!(
        skipped.is_empty(),
        "{} of {} skipped",
        skipped.len(),
        log.len()
    );
    log
}

#[tokio::test]
async fn a_standby_that_missed_the_end_is_published_on() {
    let test = "restored::a_standby_that_missed_the_end_is_published_on";
    let Some(primary) = Server::start(test) else {
        return;
    };
    let primary = primary.migrated().await;
    let mut connection = primary.connect().await;
    emit(&mut connection, 100).await;
    let mut published = publish(&primary.options, "main").await;
    let standby = Server::start_in(&primary.backup(&["--write-recovery-conf"]), &[]);
    let mut open = primary.connect().await;
    run(&mut open, "begin").await;
    emit(&mut open, 1).await;
    emit(&mut connection, 50).await;
    published.extend(publish(&primary.options, "main").await);
    emit(&mut connection, 50).await;

    // From here on the standby hears nothing more.
    let mut replica = standby.connect().await;
    let newest = value(&mut connection, "select pg_current_wal_lsn()::text").await;
    let caught_up = format!("select (pg_last_wal_replay_lsn() >= '{newest}')::text");
    while value(&mut replica, &caught_up).await != "true" {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    run(&mut replica, "alter system set primary_conninfo = ''").await;
    run(&mut replica, "select pg_reload_conf()").await;
    while value(
        &mut replica,
        "select count(*)::text from pg_stat_wal_receiver",
    )
    .await
        != "0"
    {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for _ in 0..30 {
        emit(&mut connection, 2).await;
    }
    published.extend(publish(&primary.options, "main").await);
    let last_xid = value(&mut connection, "select max(xid)::text from outbox.events").await;
    primary.kill();
    run(&mut replica, "select pg_promote()").await;

    // The same ids again, for other events, in transactions with the same ids.
    for _ in 0..20 {
        emit(&mut replica, 2).await;
    }
    let reused = format!(
        "select count(*)::text from outbox.events where xid::text::bigint <= {last_xid} and id > 252"
    );
    assert_ne!(value(&mut replica, &reused).await, "0");
    published.extend(publish(&standby.options, "main").await);
    let log = assert_nothing_is_skipped(&standby, &published).await;
    assert_eq!(log.len(), 240);
    emit(&mut replica, 3).await;
    assert_eq!(publish(&standby.options, "main").await.len(), 3);
}

#[tokio::test]
async fn a_restore_to_a_point_in_time_is_published_on() {
    let test = "restored::a_restore_to_a_point_in_time_is_published_on";
    let Some(primary) = Server::start(test) else {
        return;
    };
    let primary = primary.migrated().await;
    let mut connection = primary.connect().await;
    emit(&mut connection, 100).await;
    let mut published = publish(&primary.options, "main").await;
    let backup = primary.backup(&[]);
    emit(&mut connection, 50).await;
    published.extend(publish(&primary.options, "main").await);
    emit(&mut connection, 50).await;
    run(&mut connection, "select pg_create_restore_point('before')").await;
    emit(&mut connection, 60).await;
    published.extend(publish(&primary.options, "main").await);
    run(&mut connection, "select pg_switch_wal()").await;

    std::fs::write(backup.join("data/recovery.signal"), "").expect("ask for recovery");
    let restored = Server::start_in(
        &backup,
        &[
            format!(
                "restore_command=cp {}/pg_wal/%f %p",
                primary.data().display()
            ),
            "recovery_target_name=before".to_owned(),
            "recovery_target_action=promote".to_owned(),
        ],
    );
    let mut after = restored.connect().await;
    while value(&mut after, "select pg_is_in_recovery()::text").await != "false" {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    emit(&mut after, 30).await;
    published.extend(publish(&restored.options, "main").await);
    let log = assert_nothing_is_skipped(&restored, &published).await;
    assert_eq!(log.len(), 230);
}
