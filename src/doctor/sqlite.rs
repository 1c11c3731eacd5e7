//! Looks at the SQLite file.

use std::path::Path;

use anyhow::Context;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions, Connection, Executor};

use super::{Finding, answered};
use crate::ledger::view;
use crate::migrate;
use crate::reason::reason;
use crate::retention;
use crate::source::sqlite::connect;
use crate::supervise::sqlite_options;

pub(super) async fn examine(path: &Path, retention: &retention::Settings) -> Vec<Finding> {
    let options = sqlite_options(path)
        .create_if_missing(false)
        .disable_statement_logging();
    let mut connection = match connect(&options).await {
        Ok(connection) => connection,
        Err(error) => return vec![unreachable(path, &error)],
    };
    let mut findings = Vec::new();
    match migrate::pending_sqlite(options.clone()).await {
        Ok(pending) if pending.is_empty() => {
            findings.extend(answered("ids_ascend", ids_ascend(&mut connection).await));
            findings.extend(answered("parked", parked(&mut connection).await));
            let books = view::sqlite::read(&mut connection).await;
            findings.extend(answered(
                "retention",
                books.map(|books| super::retention::judge(retention, &books)),
            ));
        }
        Ok(pending) => findings.push(not_migrated(&pending)),
        Err(error) => findings.push(Finding::unknown("migrations", &error)),
    }
    findings.extend(answered(
        "journal_mode",
        journal(path, &mut connection).await,
    ));
    findings.extend(writable(path, &options).await);
    findings
}

fn unreachable(path: &Path, error: &anyhow::Error) -> Finding {
    let finding = Finding::error(
        "connection",
        reason(error),
        "nothing is published without the file",
    );
    if path.exists() {
        finding.advice(format!(
            "let the user of the daemon read and write {} and its folder; if it is no SQLite file, set \
             source.sqlite.path",
            path.display()
        ))
    } else {
        finding.command("outbox-relay migrate")
    }
}

fn not_migrated(pending: &[migrate::Version]) -> Finding {
    let pending: Vec<String> = pending.iter().map(ToString::to_string).collect();
    Finding::error(
        "migrations",
        format!("not applied: {}", pending.join(", ")),
        "the relay needs these tables",
    )
    .command("outbox-relay migrate")
}

async fn ids_ascend(connection: &mut SqliteConnection) -> Result<Vec<Finding>, anyhow::Error> {
    let there: bool = sqlx::query_scalar(
        "select count(*) > 0 from sqlite_schema where type = 'trigger' and name = 'outbox_events_ids_ascend'",
    )
    .fetch_one(connection)
    .await
    .context("look for the trigger")?;
    Ok((!there)
        .then(|| {
            Finding::error(
                "ids_ascend",
                "the trigger outbox_events_ids_ascend is missing",
                "an event that is inserted with an id of its own below the newest is never published",
            )
            .sql(
                "create trigger outbox_events_ids_ascend after insert on outbox_events \
                 when new.id < 1 or new.id <= (select seq from sqlite_sequence where name = 'outbox_events') \
                 begin select raise(abort, 'outbox_events: leave the id to the table, an event below the newest id \
                 would never be published'); end;",
            )
        })
        .into_iter()
        .collect())
}

async fn parked(connection: &mut SqliteConnection) -> Result<Vec<Finding>, anyhow::Error> {
    let parked: i64 = sqlx::query_scalar("select count(*) from outbox_parked")
        .fetch_one(connection)
        .await
        .context("count parked events")?;
    Ok(super::parked(parked).into_iter().collect())
}

async fn journal(
    path: &Path,
    connection: &mut SqliteConnection,
) -> Result<Vec<Finding>, anyhow::Error> {
    let mode: String = sqlx::query_scalar("pragma journal_mode")
        .fetch_one(connection)
        .await
        .context("read the journal mode")?;
    if mode == "wal" {
        return Ok(Vec::new());
    }
    Ok(vec![
        Finding::warning(
            "journal_mode",
            format!("the journal mode is {mode}"),
            "without the write-ahead log the relay's reading and the service's writing wait for each other",
        )
        .command(format!(
            "sqlite3 '{}' 'pragma journal_mode = wal'",
            path.display()
        )),
    ])
}

/// Takes the write lock and gives it back. A file that is merely busy is in good health.
async fn writable(path: &Path, options: &SqliteConnectOptions) -> Option<Finding> {
    let asked: Result<(), anyhow::Error> = async {
        let mut connection = connect(options).await?;
        // The lock alone is given for a file that can't be written to; a change that is taken back is not.
        connection
            .execute("begin immediate; pragma user_version = 1; rollback")
            .await?;
        Ok(connection.close().await?)
    }
    .await;
    let error = asked.err()?;
    let text = reason(&error);
    if text.contains("locked") || text.contains("busy") {
        return Some(
            Finding::note(
                "writable",
                format!("somebody held the write lock: {text}"),
                "the relay's cursor waits for long write transactions, publishing does not",
            )
            .advice("keep write transactions short"),
        );
    }
    Some(
        Finding::error(
            "writable",
            format!("the file can't be written to: {text}"),
            "the relay keeps its cursor and lease in it",
        )
        .command(format!(
            "chmod u+w '{0}' && chmod u+wx \"$(dirname '{0}')\"",
            path.display()
        )),
    )
}
