//! `tail` shows what is committed, and leaves everything as it is.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection, SqliteConnection};

use super::pipelines::{World, both, postgres};
use super::program;
use super::status::Daemon;
use crate::fresh::{run, value, values};

/// Everything that the outbox holds: the rows of all tables, and the sequence.
async fn contents(world: &World<'_>) -> Vec<String> {
    let mut all = Vec::new();
    if let Some(database) = world.database {
        let mut connection = database.superuser().await;
        let tables = "select c.oid::regclass::text from pg_class c join pg_namespace n on n.oid = c.relnamespace \
                      where n.nspname = 'outbox' and c.relkind in ('r', 'p', 'S') order by 1";
        for table in values(&mut connection, tables).await {
            let rows = format!(
                "select coalesce(string_agg(row(t.*)::text, ' ' order by row(t.*)::text), '') from {table} t"
            );
            all.push(format!("{table}: {}", value(&mut connection, &rows).await));
        }
    } else {
        let mut connection: SqliteConnection = world.sqlite().await;
        let tables: Vec<String> =
            sqlx::query_scalar("select name from sqlite_schema where type = 'table' order by 1")
                .fetch_all(&mut connection)
                .await
                .unwrap();
        for table in tables {
            let columns: Vec<String> =
                sqlx::query_scalar("select name from pragma_table_info(?1) order by cid")
                    .bind(&table)
                    .fetch_all(&mut connection)
                    .await
                    .unwrap();
            let rows: Vec<String> = sqlx::query_scalar(AssertSqlSafe(format!(
                "select json_array({}) from {table} order by rowid",
                columns.join(", ")
            )))
            .fetch_all(&mut connection)
            .await
            .unwrap_or_default();
            all.push(format!("{table}: {rows:?}"));
        }
        connection.close().await.unwrap();
    }
    all
}

fn tail(world: &World<'_>, args: &[&str]) -> (Daemon, BufReader<std::process::ChildStdout>) {
    let args = [&["tail", "--json"], args].concat();
    let mut command = program(&args, &world.env(&[]));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut tail = Daemon(command.spawn().unwrap());
    let out = tail.0.stdout.take().unwrap();
    (tail, BufReader::new(out))
}

/// The next line; a test's limit of time ends one that never comes.
async fn next(
    mut out: BufReader<std::process::ChildStdout>,
) -> (String, BufReader<std::process::ChildStdout>) {
    let read = tokio::task::spawn_blocking(move || {
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        (line, out)
    });
    tokio::time::timeout(Duration::from_secs(60), read)
        .await
        .unwrap()
        .unwrap()
}

#[tokio::test]
async fn what_is_committed_is_shown_and_everything_stays_as_it_is() {
    both(
        "what_is_committed_is_shown_and_everything_stays_as_it_is",
        async |world| {
            world.emit(&["1", "2", "3"]).await;
            let before = contents(world).await;
            let ran = world
                .ends_with(0, &["tail", "--from", "earliest", "--limit", "3"])
                .await;
            let shown: Vec<&str> = ran.out.lines().collect();
            assert_eq!(shown.len(), 3, "{}", ran.out);
            assert!(
                shown[1].starts_with("2 ") && shown[1].contains("order/2 placed"),
                "{}",
                ran.out
            );
            let one = [
                "tail",
                "--from",
                "3",
                "--limit",
                "1",
                "--json",
                "--pipeline",
                "main",
            ];
            let ran = world.ends_with(0, &one).await;
            let event: Value = serde_json::from_str(&ran.out).unwrap();
            assert_eq!(event["aggregate_id"], "3");
            assert_eq!(event["payload"], "{}");
            assert_eq!(
                (&event["record"]["topic"], &event["record"]["key"]),
                (&"order".into(), &"3".into())
            );
            assert_eq!(contents(world).await, before);
            world.ends_with(2, &["tail", "--from", "yesterday"]).await;
            world.ends_with(2, &["tail", "--pipeline", "none"]).await;
        },
    )
    .await;
}

#[tokio::test]
async fn new_events_come_and_a_closed_pipe_is_the_end() {
    both(
        "new_events_come_and_a_closed_pipe_is_the_end",
        async |world| {
            world.emit(&["1"]).await;
            let before = contents(world).await;
            let (mut child, out) = tail(world, &["--from", "earliest"]);
            let (line, out) = next(out).await;
            assert!(line.contains("\"aggregate_id\":\"1\""), "{line}");
            // Nothing is written for the windows that it has opened since.
            tokio::time::sleep(Duration::from_millis(700)).await;
            assert_eq!(contents(world).await, before);
            world.emit(&["2"]).await;
            let (line, out) = next(out).await;
            assert!(line.contains("\"aggregate_id\":\"2\""), "{line}");
            // Nobody reads on, and nothing comes that would have to be written.
            drop(out);
            let ended = tokio::task::spawn_blocking(move || {
                let status = child.0.wait().unwrap();
                let mut said = String::new();
                let err = child.0.stderr.take().unwrap();
                std::io::Read::read_to_string(&mut { err }, &mut said).unwrap();
                (status.code(), said)
            });
            let ended = tokio::time::timeout(Duration::from_secs(30), ended).await;
            assert_eq!(ended.unwrap().unwrap(), (Some(0), String::new()));
        },
    )
    .await;
}

#[tokio::test]
async fn events_that_commit_late_are_shown_and_a_reset_is_told_and_not_mended() {
    let test = "events_that_commit_late_are_shown_and_a_reset_is_told_and_not_mended";
    postgres(test, &async |world: &World<'_>| {
        let database = world.database.unwrap();
        let mut late = database.superuser().await;
        run(
            &mut late,
            "begin; select outbox.emit('order', 'late', 'placed', '{}')",
        )
        .await;
        world.emit(&["2"]).await;
        let (_child, out) = tail(world, &["--from", "earliest"]);
        let (line, out) = next(out).await;
        assert!(line.contains("\"aggregate_id\":\"2\""), "{line}");
        run(&mut late, "commit").await;
        let (line, _out) = next(out).await;
        assert!(line.contains("\"aggregate_id\":\"late\""), "{line}");
        let mut superuser = database.superuser().await;
        run(
            &mut superuser,
            "select setval('outbox.events_id_seq', 1, false)",
        )
        .await;
        let before = contents(world).await;
        let ran = world
            .ends_with(1, &["tail", "--from", "earliest", "--limit", "1"])
            .await;
        assert!(
            ran.err.contains("select outbox.repair_sequence()"),
            "{}",
            ran.err
        );
        assert_eq!(contents(world).await, before);
    })
    .await;
}
