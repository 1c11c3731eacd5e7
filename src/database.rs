//! The database as people reach it, through the commands and the HTTP interface: whichever kind it is.

use anyhow::Error;
use sqlx::postgres::PgConnection;
use sqlx::sqlite::SqliteConnection;
use sqlx::{ConnectOptions, Connection};

use crate::config::Source;
use crate::event::{EventId, PipelineName, Shard, Start};
use crate::ledger::acts::{
    self, Action, Cause, Extent, Marked, NotedAct, Paging, ParkedDetail, ParkedEvents, Selector,
    Wish,
};
use crate::ledger::pipelines::{Act, EventName, Remains, Seek, Skip};
use crate::ledger::view::{self, Books, Waiting};
use crate::ledger::{self, Pause};
use crate::position::Position;
use crate::source::sqlite;
use crate::supervise::sqlite_options;

/// Where a shard of a pipeline stands, or would begin.
pub(crate) struct Place {
    pub(crate) shard: Shard,
    pub(crate) position: Position,
}

/// Where the sequence of the ids is, and the highest id that is used.
pub(crate) struct SequencePlace {
    pub(crate) stands: i64,
    pub(crate) used: i64,
}

pub(crate) enum Database {
    Postgres(PgConnection),
    Sqlite(SqliteConnection),
}

impl Database {
    pub(crate) async fn open(source: &Source) -> Result<Self, Error> {
        Ok(match source {
            Source::Postgres(settings) => Self::Postgres(settings.connector.connect().await?),
            Source::Sqlite { path, .. } => {
                // Looking must not create an empty file where somebody mistyped a name.
                let options = sqlite_options(path)
                    .create_if_missing(false)
                    .disable_statement_logging();
                Self::Sqlite(sqlite::connect(&options).await?)
            }
        })
    }

    /// What waits of each shard that ever ran.
    pub(crate) async fn waiting(&mut self) -> Result<Vec<Waiting>, Error> {
        match self {
            Self::Postgres(connection) => view::postgres::waiting(connection).await,
            Self::Sqlite(connection) => view::sqlite::waiting(connection).await,
        }
        .map_err(with_next_step)
    }

    /// Whether the session still answers.
    pub(crate) async fn answers(&mut self) -> bool {
        match self {
            Self::Postgres(connection) => connection.ping().await.is_ok(),
            Self::Sqlite(connection) => connection.ping().await.is_ok(),
        }
    }

    pub(crate) async fn books(&mut self) -> Result<Books, Error> {
        match self {
            Self::Postgres(connection) => view::postgres::read(connection).await,
            Self::Sqlite(connection) => view::sqlite::read(connection).await,
        }
        .map_err(with_next_step)
    }

    pub(crate) async fn parked(
        &mut self,
        selector: &Selector,
        paging: &Paging,
    ) -> Result<ParkedEvents, Error> {
        match self {
            Self::Postgres(connection) => acts::postgres::list(connection, selector, paging).await,
            Self::Sqlite(connection) => acts::sqlite::list(connection, selector, paging).await,
        }
        .map_err(with_next_step)
    }

    pub(crate) async fn show(
        &mut self,
        selector: &Selector,
        payload_bytes_max: u32,
    ) -> Result<Vec<ParkedDetail>, Error> {
        match self {
            Self::Postgres(connection) => {
                acts::postgres::show(connection, selector, payload_bytes_max).await
            }
            Self::Sqlite(connection) => {
                acts::sqlite::show(connection, selector, payload_bytes_max).await
            }
        }
        .map_err(with_next_step)
    }

    pub(crate) async fn causes(&mut self, selector: &Selector) -> Result<Vec<Cause>, Error> {
        match self {
            Self::Postgres(connection) => acts::postgres::causes(connection, selector).await,
            Self::Sqlite(connection) => acts::sqlite::causes(connection, selector).await,
        }
        .map_err(with_next_step)
    }

    pub(crate) async fn extent(&mut self, wish: &Wish) -> Result<Extent, Error> {
        match self {
            Self::Postgres(connection) => acts::postgres::extent(connection, wish).await,
            Self::Sqlite(connection) => acts::sqlite::extent(connection, wish).await,
        }
        .map_err(with_next_step)
    }

    /// The newest first; with `before` those that came before that one.
    pub(crate) async fn acts(
        &mut self,
        limit: u32,
        before: Option<i64>,
    ) -> Result<Vec<NotedAct>, Error> {
        match self {
            Self::Postgres(connection) => acts::postgres::acts(connection, limit, before).await,
            Self::Sqlite(connection) => acts::sqlite::acts(connection, limit, before).await,
        }
        .map_err(with_next_step)
    }

    pub(crate) async fn pause(
        &mut self,
        pipeline: &PipelineName,
        act: &Act,
    ) -> Result<Option<Pause>, Error> {
        match self {
            Self::Postgres(connection) => {
                ledger::postgres::pipelines::pause(connection, pipeline, act).await
            }
            Self::Sqlite(connection) => {
                ledger::sqlite::pipelines::pause(connection, pipeline, act).await
            }
        }
        .map_err(with_next_step)
    }

    pub(crate) async fn resume(
        &mut self,
        pipeline: &PipelineName,
        act: &Act,
    ) -> Result<Option<Pause>, Error> {
        match self {
            Self::Postgres(connection) => {
                ledger::postgres::pipelines::resume(connection, pipeline, act).await
            }
            Self::Sqlite(connection) => {
                ledger::sqlite::pipelines::resume(connection, pipeline, act).await
            }
        }
        .map_err(with_next_step)
    }

    pub(crate) async fn seek(
        &mut self,
        pipeline: &PipelineName,
        to: Start,
        types: &[String],
        act: Option<&Act>,
    ) -> Result<Seek, Error> {
        match self {
            Self::Postgres(connection) => {
                ledger::postgres::pipelines::seek(connection, pipeline, to, types, act).await
            }
            Self::Sqlite(connection) => {
                ledger::sqlite::pipelines::seek(connection, pipeline, to, types, act).await
            }
        }
        .map_err(with_next_step)
    }

    pub(crate) async fn skip(
        &mut self,
        pipeline: &PipelineName,
        event: EventName,
        act: Option<&Act>,
    ) -> Result<Skip, Error> {
        match self {
            Self::Postgres(connection) => {
                ledger::postgres::pipelines::skip(connection, pipeline, event, act).await
            }
            Self::Sqlite(connection) => {
                ledger::sqlite::pipelines::skip(connection, pipeline, event, act).await
            }
        }
        .map_err(with_next_step)
    }

    pub(crate) async fn remove(
        &mut self,
        pipeline: &PipelineName,
        act: Option<&Act>,
    ) -> Result<Remains, Error> {
        match self {
            Self::Postgres(connection) => {
                ledger::postgres::pipelines::remove(connection, pipeline, act).await
            }
            Self::Sqlite(connection) => {
                ledger::sqlite::pipelines::remove(connection, pipeline, act).await
            }
        }
        .map_err(with_next_step)
    }

    /// Where one begins to look who writes nothing.
    pub(crate) async fn look_from(&mut self, from: Start) -> Result<Position, Error> {
        match self {
            Self::Postgres(connection) => {
                ledger::postgres::places::look_from(connection, from).await
            }
            Self::Sqlite(connection) => {
                ledger::sqlite::pipelines::look_from(connection, from).await
            }
        }
        .map_err(with_next_step)
    }

    /// Where each shard of a pipeline stands; of one that has not begun, where it would.
    pub(crate) async fn places(
        &mut self,
        pipeline: &PipelineName,
        start: Start,
    ) -> Result<Vec<Place>, Error> {
        let mut places = Vec::new();
        let stored = match self {
            Self::Postgres(connection) => {
                ledger::postgres::places::positions(connection, pipeline).await
            }
            Self::Sqlite(connection) => {
                ledger::sqlite::pipelines::positions(connection, pipeline).await
            }
        };
        for (shard, position) in stored.map_err(with_next_step)? {
            let position = match position {
                Some(position) => position,
                None => self.look_from(start).await?,
            };
            places.push(Place { shard, position });
        }
        if places.is_empty() {
            places.push(Place {
                shard: Shard::whole(),
                position: self.look_from(start).await?,
            });
        }
        Ok(places)
    }

    /// How many events are retained, counted as far as that takes no time.
    pub(crate) async fn retained(&mut self) -> Result<String, Error> {
        const MOST: i64 = 100_000;
        let events = match self {
            Self::Postgres(connection) => {
                ledger::postgres::places::retained(connection, MOST + 1).await
            }
            Self::Sqlite(connection) => {
                ledger::sqlite::pipelines::retained(connection, MOST + 1).await
            }
        }
        .map_err(with_next_step)?;
        Ok(if events > MOST {
            format!("more than {MOST}")
        } else {
            events.to_string()
        })
    }

    /// Where the sequence of the ids is; none in a file, whose trigger sees to it.
    pub(crate) async fn sequence(&mut self) -> Result<Option<SequencePlace>, Error> {
        match self {
            Self::Postgres(connection) => {
                let (stands, used) = ledger::postgres::places::sequence(connection)
                    .await
                    .map_err(with_next_step)?;
                Ok(Some(SequencePlace { stands, used }))
            }
            Self::Sqlite(_) => Ok(None),
        }
    }

    /// How far relays have come.
    pub(crate) async fn furthest_position(&mut self) -> Result<Position, Error> {
        match self {
            Self::Postgres(connection) => ledger::postgres::places::furthest(connection).await,
            Self::Sqlite(_) => Ok(Position::beginning()),
        }
        .map_err(with_next_step)
    }

    pub(crate) async fn id_of(&mut self, event: EventName) -> Result<EventId, Error> {
        match self {
            Self::Postgres(connection) => {
                ledger::postgres::pipelines::id_of(connection, event).await
            }
            Self::Sqlite(connection) => ledger::sqlite::pipelines::id_of(connection, event).await,
        }
        .map_err(with_next_step)
    }

    /// Notes a wish, unless it can't be granted in order.
    pub(crate) async fn mark(&mut self, wish: &Wish) -> Result<Vec<Marked>, Error> {
        if let Some(refusal) = self.refusal(wish).await? {
            return Err(refusal.into());
        }
        match self {
            Self::Postgres(connection) => acts::postgres::mark(connection, wish).await,
            Self::Sqlite(connection) => acts::sqlite::mark(connection, wish).await,
        }
        .map_err(with_next_step)
    }

    /// Why a wish for one event can't be granted, and what to do instead.
    pub(crate) async fn refusal(&mut self, wish: &Wish) -> Result<Option<Refusal>, Error> {
        let Selector { id, event_id, .. } = &wish.selector;
        let Some(id) = id
            .map(|id| id.to_string())
            .or(event_id.map(|uuid| uuid.to_string()))
        else {
            return Ok(None);
        };
        let found = self.show(&wish.selector, 0).await?;
        Ok(match &found[..] {
            [] => Some(Refusal(format!(
                "event {id} is not parked: see `outbox-relay parked list`"
            ))),
            [detail] => detail
                .behind
                .filter(|_| wish.action == Action::Redrive)
                .map(|oldest| {
                    Refusal(format!(
                        "event {id} is not the oldest of its entity that waits, and would overtake event {oldest}: \
                         redrive {oldest} and {id} follows, or drop {oldest}"
                    ))
                }),
            several if several.iter().all(|d| d.event.pipeline == several[0].event.pipeline) => {
                let uuids: Vec<&str> = several.iter().map(|d| &d.event.event_id[..]).collect();
                Some(Refusal(format!(
                    "there are {} events with the id {id}, because ids began anew: name one by its uuid, {}",
                    several.len(),
                    uuids.join(" or ")
                )))
            }
            several => {
                let pipelines: Vec<&str> =
                    several.iter().map(|d| &d.event.pipeline[..]).collect();
                Some(Refusal(format!(
                    "event {id} is parked by the pipelines {}: say which with --pipeline",
                    pipelines.join(", ")
                )))
            }
        })
    }
}

/// A wish that can't be granted.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Refusal(String);

/// Says what to do where the cause is known.
pub(crate) fn with_next_step(error: Error) -> Error {
    let cause = error
        .chain()
        .find_map(|cause| match cause.downcast_ref::<sqlx::Error>() {
            Some(sqlx::Error::Database(error)) => Some((
                error.code().unwrap_or_default().into_owned(),
                error.message().to_owned(),
            )),
            _ => None,
        });
    match cause {
        // No such table, no such schema.
        Some((code, _)) if code == "42P01" || code == "3F000" => {
            error.context("there is no outbox in this database: run `outbox-relay migrate`")
        }
        Some((_, message)) if message.starts_with("no such table") => {
            error.context("there is no outbox in this file: run `outbox-relay migrate`")
        }
        Some((code, _)) if code == "42501" => {
            error.context("the role may not look at the outbox: see `outbox-relay doctor`")
        }
        _ => error,
    }
}
