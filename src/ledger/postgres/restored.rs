//! The database is another one than before: restored elsewhere, failed over, or taken back in time.

use std::time::Duration;

use anyhow::{Context, anyhow};
use sqlx::postgres::PgConnection;
use tokio::time::timeout;

use super::{Connector, Fence, LedgerError, Settings, execute, fetch_one, get};

/// For rewriting a log after a restore.
const ADOPT_MAX: Duration = Duration::from_hours(1);

/// Whether the log comes from another cluster.
pub(super) async fn is_restored(connection: &mut PgConnection) -> Result<bool, anyhow::Error> {
    let row = fetch_one(connection, "select outbox.is_restored()".to_owned())
        .await
        .context("ask whether the log was restored")?;
    get(&row, 0)
}

/// Makes a log that was restored from another cluster belong to this one.
pub(super) async fn adopt(connector: &Connector) -> Result<(), LedgerError> {
    let mut connection = connector.connect().await?;
    tracing::warn!(
        "the outbox was restored from another cluster, whose transaction ids mean nothing here: adopting its \
         events, which may take minutes"
    );
    // May rewrite the whole log, whatever limit the role has for other work.
    let adopted = fetch_one(
        &mut connection,
        "set local statement_timeout = 0; select outbox.adopt()".to_owned(),
    );
    let row = timeout(ADOPT_MAX, adopted)
        .await
        .map_err(|_| anyhow!("adopting the restored log takes more than an hour"))?
        .context("adopt the restored log")?;
    let events: i64 = get(&row, 0)?;
    tracing::warn!(
        events,
        "adopted the restored log: so many events are not known to be published by every pipeline, and are \
         published now, some of them perhaps again"
    );
    Ok(())
}

/// After a failover or a restore to a point in time the cursor is as old as the rows beside it: whatever it had seen end
/// was logged before it was, so it ended in this history too, and the ids that are used again are those that it had not
/// seen. Going on from it skips nothing. What was published and then lost by the database stays published.
pub(super) async fn promoted(
    connection: &mut PgConnection,
    settings: &Settings,
    fence: &Fence,
    timeline: i32,
) -> Result<(), anyhow::Error> {
    tracing::warn!(
        pipeline = %settings.pipeline,
        timeline,
        "the server failed over or was restored to a point in time: going on from the cursor as it was then; events \
         that it published and then lost stay published"
    );
    execute(
        connection,
        format!(
            "update outbox.cursors set timeline = {timeline} where {}",
            fence.holds(settings)
        ),
    )
    .await
    .context("note the new timeline")?;
    Ok(())
}

/// Which database this is: its transaction ids mean something only within one system identifier and timeline.
pub(super) async fn identity(connection: &mut PgConnection) -> Result<(i64, i32), anyhow::Error> {
    let row = fetch_one(
        connection,
        "select system_identifier, \
                ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int \
           from pg_control_system()"
            .to_owned(),
    )
    .await
    .context("read the system identifier and timeline (is this a standby?)")?;
    Ok((get(&row, 0)?, get(&row, 1)?))
}
