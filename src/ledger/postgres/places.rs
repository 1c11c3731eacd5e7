//! Where pipelines and the sequence stand, for who looks on. Writes nothing.

use anyhow::Context;
use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{AssertSqlSafe, Executor};

use super::{
    NEWEST_ID, fetch_one, get, in_path, literal, newest_id, starting_position, stored_position,
};
use crate::event::{PipelineName, Shard, Start};
use crate::position::Position;

/// How far the furthest cursor has come; the beginning where there is none. Whoever only looks on needs to look for new events
/// above its ceiling alone: a transaction that wrote it has ended.
///
/// # Errors
/// When the database refuses.
pub async fn furthest(connection: &mut PgConnection) -> Result<Position, anyhow::Error> {
    let row = connection
        .fetch_optional(sqlx::raw_sql(AssertSqlSafe(in_path(
            "select prev::text, cur::text, floor, ceiling, next_floor, last_id from outbox.cursors \
              where prev is not null and system_identifier = (select system_identifier from pg_control_system()) \
              order by ceiling desc limit 1",
        ))))
        .await
        .context("read the cursors")?;
    let position = row.map(|row| stored_position(&row)).transpose()?.flatten();
    Ok(position.unwrap_or_else(Position::beginning))
}

/// Where the shards of a pipeline stand; none where one has not begun.
///
/// # Errors
/// When the database refuses.
pub async fn positions(
    connection: &mut PgConnection,
    pipeline: &PipelineName,
) -> Result<Vec<(Shard, Option<Position>)>, anyhow::Error> {
    let rows = connection
        .fetch_all(sqlx::raw_sql(AssertSqlSafe(in_path(&format!(
            "select c.prev::text, c.cur::text, c.floor, c.ceiling, c.next_floor, c.last_id, c.shard, coalesce(p.shards, 1) \
               from outbox.cursors c left join outbox.pipelines p on p.pipeline = c.pipeline \
              where c.pipeline = {} order by c.shard",
            literal(pipeline.as_str())
        )))))
        .await
        .context("read the cursors")?;
    let place = |row: &PgRow| {
        let shard = Shard {
            index: u32::try_from(get::<i32>(row, 6)?)?,
            count: u32::try_from(get::<i32>(row, 7)?)?,
        };
        Ok((shard, stored_position(row)?))
    };
    rows.iter().map(place).collect()
}

/// How many events are retained, at most `most`.
///
/// # Errors
/// When the database refuses.
pub async fn retained(connection: &mut PgConnection, most: i64) -> Result<i64, anyhow::Error> {
    let row = fetch_one(
        connection,
        format!("select count(*) from (select from outbox.events e limit {most}) e"),
    )
    .await
    .context("count the retained events")?;
    get(&row, 0)
}

/// Where the sequence of the ids is, and the highest id of rows and cursors.
///
/// # Errors
/// When the database refuses.
pub async fn sequence(connection: &mut PgConnection) -> Result<(i64, i64), anyhow::Error> {
    let row = fetch_one(
        connection,
        format!(
            "select coalesce({NEWEST_ID}, 0), greatest( \
                (select e.id from outbox.events e order by e.id desc limit 1), \
                (select max(greatest(c.ceiling, c.last_id)) from outbox.cursors c), 0)"
        ),
    )
    .await
    .context("compare the sequence with what it has handed out")?;
    Ok((get(&row, 0)?, get(&row, 1)?))
}

/// Where one begins to look who writes nothing.
///
/// # Errors
/// When the database refuses.
pub async fn look_from(
    connection: &mut PgConnection,
    from: Start,
) -> Result<Position, anyhow::Error> {
    let furthest = furthest(connection).await?;
    let from = match from {
        Start::Event(id) if id > newest_id(connection).await? => Start::Latest,
        from => from,
    };
    starting_position(connection, from, furthest.window.ceiling).await
}
