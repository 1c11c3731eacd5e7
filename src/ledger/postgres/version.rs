//! Whether this program knows the tables: an older one must not work with those of a newer one.

use anyhow::{Context, ensure};
use sqlx::postgres::PgConnection;

use super::super::{NEWEST_MIGRATION, too_old};
use super::{fetch_one, get};

/// # Errors
/// When the list of migrations has one that is newer than this program. Where there is no list, or it can't be read, `doctor`
/// says so; it keeps no relay from working.
pub(super) async fn demand_known(connection: &mut PgConnection) -> Result<(), anyhow::Error> {
    // Not one statement: without the table it could not be planned.
    const READABLE: &str = "select case when to_regclass('outbox.migrations') is not null \
                            then has_table_privilege('outbox.migrations', 'select') else false end";
    let readable = fetch_one(connection, READABLE.to_owned()).await;
    if !get::<bool>(&readable.context("look for the list of migrations")?, 0)? {
        return Ok(());
    }
    let newest = "select coalesce(max(version), 0) from outbox.migrations".to_owned();
    let newest = fetch_one(connection, newest).await;
    let newest: i64 = get(&newest.context("read the list of migrations")?, 0)?;
    ensure!(newest <= NEWEST_MIGRATION, too_old(newest));
    Ok(())
}
