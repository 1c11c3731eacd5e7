//! The database as people reach it, through the commands and the HTTP interface: whichever kind it is.

use anyhow::Error;
use sqlx::postgres::PgConnection;
use sqlx::sqlite::SqliteConnection;
use sqlx::{ConnectOptions, Connection};

use crate::config::Source;
use crate::ledger::acts::{
    self, Action, Marked, NotedAct, Paging, ParkedDetail, ParkedEvents, Selector, Wish,
};
use crate::ledger::view::{self, Books, Waiting};
use crate::source::{postgres, sqlite};
use crate::supervise::sqlite_options;

pub(crate) enum Database {
    Postgres(PgConnection),
    Sqlite(SqliteConnection),
}

impl Database {
    pub(crate) async fn open(source: &Source) -> Result<Self, Error> {
        Ok(match source {
            Source::Postgres(settings) => {
                let options = settings.options.clone().disable_statement_logging();
                Self::Postgres(postgres::connect(&options).await?)
            }
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
        let Some(id) = wish.selector.id else {
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
