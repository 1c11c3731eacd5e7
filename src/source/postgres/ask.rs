//! Questions about the state of the database, for people: each answer is one JSON document that becomes a type.
//!
//! Simple protocol and one statement each, so that they work through any pooler; each has a limit of its own, so that no
//! question holds up a server that is in trouble already. Never asked by the loop.

use std::time::Duration;

use anyhow::{Context, anyhow};
use serde::de::DeserializeOwned;
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Executor, Row};
use tokio::time::timeout;

/// Of the server for one answer; the connection gets a little more.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// The only row of `select`, column by column.
///
/// # Errors
/// When the server refuses or is silent, or there is not exactly one row of this shape.
pub(crate) async fn one<T: DeserializeOwned>(
    connection: &mut PgConnection,
    select: &str,
) -> Result<T, anyhow::Error> {
    let answer = ask(
        connection,
        &format!("select row_to_json(document)::text from ({select}) document"),
        ANSWER_MAX,
    )
    .await?;
    serde_json::from_str(&answer).context("understand the answer")
}

/// The rows of `select`, in its order.
///
/// # Errors
/// When the server refuses or is silent, or a row has another shape.
pub(crate) async fn all<T: DeserializeOwned>(
    connection: &mut PgConnection,
    select: &str,
) -> Result<Vec<T>, anyhow::Error> {
    all_within(connection, select, ANSWER_MAX).await
}

/// As [`all`], for what may take longer.
///
/// # Errors
/// As [`all`].
pub(crate) async fn all_within<T: DeserializeOwned>(
    connection: &mut PgConnection,
    select: &str,
    limit: Duration,
) -> Result<Vec<T>, anyhow::Error> {
    let answer = ask(
        connection,
        &format!("select coalesce(json_agg(document), '[]')::text from ({select}) document"),
        limit,
    )
    .await?;
    serde_json::from_str(&answer).context("understand the answer")
}

/// The document that a statement ends with which changes something.
///
/// # Errors
/// When the server refuses or is silent, or the answer has another shape; then nothing is changed.
pub(crate) async fn change<T: DeserializeOwned>(
    connection: &mut PgConnection,
    statement: &str,
    limit: Duration,
) -> Result<T, anyhow::Error> {
    let answer = ask(connection, statement, limit).await?;
    serde_json::from_str(&answer).context("understand the answer")
}

async fn ask(
    connection: &mut PgConnection,
    question: &str,
    limit: Duration,
) -> Result<String, anyhow::Error> {
    // Several statements of one message are one transaction: the limit ends with it, also behind a pooler.
    let statement = format!(
        "set local statement_timeout = {}; {question}",
        limit.as_millis()
    );
    let asked = connection.fetch_all(sqlx::raw_sql(AssertSqlSafe(statement)));
    let rows = timeout(limit + Duration::from_secs(2), asked)
        .await
        .map_err(|_| anyhow!("no answer within {} s", limit.as_secs() + 2))??;
    let row = rows.first().context("the answer is empty")?;
    row.try_get_unchecked(0).context("decode the answer")
}

/// Quotes a text for SQL as SQLite wants it, and PostgreSQL with `standard_conforming_strings` on, which it is since 9.1 unless
/// somebody changes that: then a backslash would mean something.
pub(crate) fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// Quotes a name for SQL.
pub(crate) fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
