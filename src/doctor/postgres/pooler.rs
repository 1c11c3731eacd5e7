//! Finds out whether LISTEN works on the direct connection, by trying it; and if not, whether a pooler is the cause.
//!
//! A transaction-mode pooler accepts LISTEN and delivers nothing: silence, not an error. It is known by two connections,
//! open at the same time, that are served by one server process, or one connection that is served by two. Without a
//! pooler a notification that one sends oneself has to arrive.

use std::time::Duration;

use anyhow::{Context, anyhow};
use serde::Deserialize;
use sqlx::postgres::{PgConnection, PgListener, PgPoolOptions};
use sqlx::{AssertSqlSafe, Connection, Executor};
use tokio::time::timeout;

use super::super::Finding;
use crate::reason::reason;
use crate::source::postgres::{Connector, ask};

/// A notification takes a millisecond; a server under load gets the benefit of the doubt.
const ARRIVES_WITHIN: Duration = Duration::from_secs(2);

pub(super) async fn examine(connector: &Connector) -> Result<Vec<Finding>, anyhow::Error> {
    // Not tried through a pooler: the process that listens would go on to serve others.
    if shares_processes(connector).await? {
        return Ok(vec![pooled()]);
    }
    Ok(match hears(connector).await {
        Ok(true) => Vec::new(),
        Ok(false) => vec![deaf()],
        Err(error) => vec![refused(&error)],
    })
}

fn pooled() -> Finding {
    mend(Finding::warning(
        "listen",
        "a transaction-mode pooler stands between the relay and the server on the connection for LISTEN",
        "the relay is not woken and finds new events by its slow poll, up to a second late; and the process that \
         listens serves others too, whose drivers may fail at a notification that they did not ask for",
    ))
}

fn deaf() -> Finding {
    mend(Finding::warning(
        "listen",
        "a notification sent to the connection for LISTEN did not arrive",
        "the relay is not woken and finds new events by its slow poll, up to a second late (nothing is lost)",
    ))
}

fn refused(error: &anyhow::Error) -> Finding {
    mend(Finding::warning(
        "listen",
        format!("LISTEN does not work: {}", reason(error)),
        "new events are found by polling instead, so publishing is slower (nothing is lost)",
    ))
}

fn mend(finding: Finding) -> Finding {
    finding.configuration(
        "[source.postgres]\ndirect_url = \"postgres://...\"   # past the pooler; or capture = \"poll\"",
    )
}

#[derive(Deserialize)]
struct Process {
    pid: i32,
}

/// Whether connections share server processes. Of a pooler that gives the process used last to whoever comes next, one
/// look suffices; others are caught within a few.
async fn shares_processes(connector: &Connector) -> Result<bool, anyhow::Error> {
    let mut ours = connector.connect().await?;
    let mut other = connector.connect().await?;
    let mut shared = false;
    for _ in 0..5 {
        let before = pid(&mut ours).await?;
        let mut holding = ask::begin(&mut other, ARRIVES_WITHIN).await?;
        // While this transaction holds its process, a pooler has to give us another one.
        let held = pid(&mut holding).await?;
        let after = pid(&mut ours).await?;
        holding.rollback().await.context("end the transaction")?;
        shared = before == held || before != after;
        if shared {
            break;
        }
    }
    ours.close().await.ok();
    other.close().await.ok();
    Ok(shared)
}

async fn pid(connection: &mut PgConnection) -> Result<i32, anyhow::Error> {
    let Process { pid } = ask::one(connection, "select pg_backend_pid() as pid")
        .await
        .context("ask for the server process")?;
    Ok(pid)
}

/// Sends a notification to itself, on a channel of its own.
async fn hears(connector: &Connector) -> Result<bool, anyhow::Error> {
    let channel = format!("outbox_doctor_{}", uuid::Uuid::new_v4().simple());
    let pool = PgPoolOptions::new()
        .max_connections(1)
        .connect_with(connector.current()?)
        .await?;
    let mut listener = PgListener::connect_with(&pool).await?;
    timeout(ARRIVES_WITHIN, listener.listen(&channel))
        .await
        .map_err(|_| anyhow!("no answer within {} s", ARRIVES_WITHIN.as_secs()))??;
    let mut sender = connector.connect().await?;
    sender
        .execute(sqlx::raw_sql(AssertSqlSafe(format!("notify {channel}"))))
        .await
        .context("send a notification")?;
    let heard = timeout(ARRIVES_WITHIN, listener.recv()).await;
    // Behind a pooler the process that listens now serves others.
    timeout(ARRIVES_WITHIN, listener.unlisten(&channel))
        .await
        .ok();
    sender.close().await.ok();
    Ok(matches!(heard, Ok(Ok(_))))
}
