//! Keeps partitions of the log made ahead of the newest id.
//!
//! An insert never waits for this: what fits no partition goes to the default one, and later ranges leave room for it.

use std::time::Duration;

use anyhow::Context;
use sqlx::postgres::PgConnectOptions;
use sqlx::{Executor, Row};
use tokio::time::sleep;

use crate::source::postgres::connect;

/// Partitions are looked after this often; each holds millions of events and several are ahead.
const EVERY: Duration = Duration::from_mins(10);

/// Makes partitions now and then, for ever. Trouble is logged and tried again: nothing depends on the time.
pub async fn keep(options: PgConnectOptions) {
    loop {
        match make(&options).await {
            Ok(0) => {}
            Ok(made) => tracing::info!(made, "made partitions of outbox.events ahead"),
            Err(error) => {
                tracing::warn!(error = %format!("{error:#}"), "could not make partitions, inserts go on");
            }
        }
        sleep(EVERY).await;
    }
}

async fn make(options: &PgConnectOptions) -> Result<i32, anyhow::Error> {
    let mut connection = connect(options).await?;
    let row = connection
        .fetch_one(sqlx::raw_sql("select outbox.make_partitions()"))
        .await
        .context("make partitions")?;
    row.try_get_unchecked(0)
        .context("decode how many partitions were made")
}
