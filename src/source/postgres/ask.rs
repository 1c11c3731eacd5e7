//! Questions about the state of the database, for people: each answer is one JSON document that becomes a type.
//!
//! Each is a transaction, or in one that [`begin`] has begun, with settings and a limit of its own, so that it works through a pooler that keeps transactions
//! together, means the same in every database, and does not hold up a server that is in trouble already. Never asked by the
//! loop.

use std::time::Duration;

use anyhow::{Context, anyhow};
use serde::de::DeserializeOwned;
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection, Executor, Postgres, Row, Transaction};
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
    let asked = async {
        if connection.is_in_transaction() {
            let question = sqlx::raw_sql(AssertSqlSafe(question.to_owned()));
            return Ok(connection.fetch_all(question).await?);
        }
        let mut transaction = begin(connection, limit).await?;
        let question = sqlx::raw_sql(AssertSqlSafe(question.to_owned()));
        let rows = transaction.fetch_all(question).await?;
        transaction.commit().await?;
        Ok::<_, anyhow::Error>(rows)
    };
    let rows = timeout(limit + Duration::from_secs(2), asked)
        .await
        .map_err(|_| anyhow!("no answer within {} s", limit.as_secs() + 2))??;
    let row = rows.first().context("the answer is empty")?;
    row.try_get_unchecked(0).context("decode the answer")
}

/// Begins a transaction whose statements mean the same in every database: names belong to `pg_catalog`, so that an object that
/// a stranger made in another schema is never called, and no setting of the database, the role or the session changes how a
/// text is read or written. All of it ends with the transaction, also behind a pooler, and so does the limit of each statement;
/// a limit of zero is none.
///
/// # Errors
/// When the server refuses, or can't be reached.
pub(crate) async fn begin(
    connection: &mut PgConnection,
    limit: Duration,
) -> Result<Transaction<'_, Postgres>, anyhow::Error> {
    let begin = format!(
        "begin isolation level read committed; \
         select pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true), \
                pg_catalog.set_config('standard_conforming_strings', 'on', true), \
                pg_catalog.set_config('bytea_output', 'hex', true), \
                pg_catalog.set_config('datestyle', 'ISO', true), \
                pg_catalog.set_config('intervalstyle', 'postgres', true), \
                pg_catalog.set_config('timezone', 'UTC', true), \
                pg_catalog.set_config('extra_float_digits', '1', true), \
                pg_catalog.set_config('statement_timeout', '{}', true)",
        limit.as_millis()
    );
    connection
        .begin_with(AssertSqlSafe(begin))
        .await
        .context("begin a transaction")
}

/// Quotes a text for SQL as SQLite wants it, and PostgreSQL with `standard_conforming_strings` on, as in every transaction of
/// [`begin`].
pub(crate) fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// Quotes a name for SQL.
pub(crate) fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
