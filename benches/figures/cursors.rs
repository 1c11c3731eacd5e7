//! What relays have written down about how far they are.

use anyhow::Error;
use sqlx::postgres::PgConnection;

/// How many of the pipelines `RUN-0`, `RUN-1` … have a shard that is not known to have arrived at this id. Before a relay
/// knows where to begin it has a cursor without an id.
pub async fn behind(
    db: &mut PgConnection,
    run: &str,
    pipelines: i64,
    last: i64,
) -> Result<i64, Error> {
    let behind = sqlx::query_scalar(
        "select $3 - count(*) from (
           select from outbox.cursors where starts_with(pipeline, $1)
            group by pipeline having min(coalesce(last_id, -1)) >= $2) done",
    )
    .bind(format!("{run}-"))
    .bind(last)
    .bind(pipelines)
    .fetch_one(db)
    .await?;
    Ok(behind)
}
