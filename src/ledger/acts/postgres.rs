//! Parked events as operators see them, in PostgreSQL. Every question and every wish is one message, for any pooler.

use std::time::Duration;

use anyhow::Context;
use serde::Deserialize;
use sqlx::postgres::PgConnection;

use super::{
    Cause, Dialect, ERROR_CHARACTERS, Extent, Marked, NotedAct, Paging, ParkedDetail, ParkedEvents,
    Selector, Wish, behind, literal, merge, waiting_behind,
};
use crate::source::postgres::ask;

const DIALECT: Dialect = Dialect::Postgres;
/// For a wish that concerns everything.
const MARK_MAX: Duration = Duration::from_secs(30);

#[derive(Deserialize)]
struct Counted {
    chosen: i64,
    everything: i64,
}

#[derive(Deserialize)]
struct Total {
    total: i64,
}

fn columns() -> String {
    format!(
        "p.pipeline, p.id, p.event_id, p.aggregate_type, p.aggregate_id, p.event_type, \
         left(p.error, {ERROR_CHARACTERS}) as error, p.attempts, p.holds, \
         p.wanted, extract(epoch from clock_timestamp() - p.parked_at)::float8 as parked_seconds, \
         (extract(epoch from p.parked_at) * 1000000)::bigint as parked_at_us, \
         {} as waiting_events",
        waiting_behind(DIALECT)
    )
}

/// Lists parked events, longest parked first; never their payloads.
///
/// # Errors
/// When the database refuses, in particular when it is not migrated.
pub async fn list(
    connection: &mut PgConnection,
    selector: &Selector,
    paging: &Paging,
) -> Result<ParkedEvents, anyhow::Error> {
    let condition = selector.condition(DIALECT, "p");
    let Total { total } = ask::one(
        connection,
        &format!("select count(*) as total from outbox.parked p where {condition}"),
    )
    .await
    .context("count the parked events")?;
    let events = ask::all(
        connection,
        &format!(
            "select {} from outbox.parked p where {condition} {} order by p.parked_at, p.pipeline, p.id limit {}",
            columns(),
            paging.condition(DIALECT),
            paging.limit
        ),
    )
    .await
    .context("list the parked events")?;
    Ok(ParkedEvents::page(events, total, paging))
}

/// Everything about the events that are meant, with at most this much of each payload; a handful of them.
///
/// # Errors
/// When the database refuses.
pub async fn show(
    connection: &mut PgConnection,
    selector: &Selector,
    payload_bytes_max: u32,
) -> Result<Vec<ParkedDetail>, anyhow::Error> {
    ask::all(
        connection,
        &format!(
            "select {}, coalesce(to_char(nullif(nullif(p.occurred_at, 'infinity'), '-infinity') at time zone 'UTC', \
                             'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'), p.occurred_at::text) as occurred_at, \
                    {} as behind, p.history, p.content_type, p.headers::text as headers, \
                    left(p.payload::text, {payload_bytes_max}) as payload, \
                    encode(substring(p.payload_bytes from 1 for {payload_bytes_max}), 'hex') as payload_hex, \
                    coalesce(octet_length(p.payload::text), 0) + coalesce(octet_length(p.payload_bytes), 0) \
                        as payload_bytes \
               from outbox.parked p where {} order by p.pipeline, p.id limit 10",
            columns(),
            behind(DIALECT),
            selector.condition(DIALECT, "p")
        ),
    )
    .await
    .context("read the parked event")
}

/// The reasons of rejected events, with how many share each.
///
/// # Errors
/// When the database refuses.
pub async fn causes(
    connection: &mut PgConnection,
    selector: &Selector,
) -> Result<Vec<Cause>, anyhow::Error> {
    let causes = ask::all(
        connection,
        &format!(
            "select p.pipeline, p.error, count(*) as events, count(distinct p.entity) as entities, \
                    max(extract(epoch from clock_timestamp() - p.parked_at))::float8 as oldest_seconds, \
                    min(p.id) as example_id \
               from outbox.parked p where {} and p.error is not null group by 1, 2 order by 3 desc limit 10000",
            selector.condition(DIALECT, "p")
        ),
    )
    .await
    .context("count the reasons")?;
    Ok(merge(causes))
}

/// How many events a wish concerns.
///
/// # Errors
/// When the database refuses.
pub async fn extent(connection: &mut PgConnection, wish: &Wish) -> Result<Extent, anyhow::Error> {
    let counted: Counted = ask::one(connection, &wish.counting(DIALECT))
        .await
        .context("count what is wanted")?;
    Ok(Extent {
        chosen: counted.chosen,
        behind: counted.everything - counted.chosen,
    })
}

/// Notes a wish, on the events and among the acts. The events are locked in the order of their ids, as the owner of their
/// pipeline does.
///
/// # Errors
/// When the database refuses; nothing is noted then.
pub async fn mark(
    connection: &mut PgConnection,
    wish: &Wish,
) -> Result<Vec<Marked>, anyhow::Error> {
    let action = literal(wish.action.as_str());
    let reason = wish
        .reason
        .as_ref()
        .map_or("null".to_owned(), |reason| literal(reason));
    let statement = format!(
        "with chosen as ( \
            select p.pipeline, p.event_id from outbox.parked p where {} order by p.pipeline, p.event_id for update of p), \
         marked as ( \
            update outbox.parked p set wanted = {action} from chosen \
             where p.pipeline = chosen.pipeline and p.event_id = chosen.event_id returning p.pipeline), \
         counted as (select pipeline, count(*) as events from marked group by pipeline), \
         noted as ( \
            insert into outbox.acts (who, action, pipeline, selector, events, reason) \
            select {}, {action}, pipeline, {}, events, {reason} from counted) \
         select coalesce(json_agg(counted order by pipeline), '[]')::text from counted",
        wish.condition(DIALECT),
        literal(&wish.who),
        literal(&wish.selector.to_string()),
    );
    ask::change(connection, &statement, MARK_MAX)
        .await
        .context("note what is wanted")
}

/// The newest acts first.
///
/// # Errors
/// When the database refuses.
pub async fn acts(
    connection: &mut PgConnection,
    limit: u32,
    before: Option<i64>,
) -> Result<Vec<NotedAct>, anyhow::Error> {
    ask::all(
        connection,
        &format!(
            "select id, to_char(at at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"') as at, database_user, who, \
                    action, pipeline, selector, events, reason \
               from outbox.acts where id < {} order by id desc limit {limit}",
            before.unwrap_or(i64::MAX)
        ),
    )
    .await
    .context("list the acts")
}
