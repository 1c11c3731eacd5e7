//! The database as the commands look at it: opened for reading, whichever kind it is.

use anyhow::Error;
use sqlx::ConnectOptions;
use sqlx::postgres::PgConnection;
use sqlx::sqlite::SqliteConnection;

use crate::config::Source;
use crate::event::PipelineName;
use crate::ledger::view::{self, Books, ParkedEntities};
use crate::source::{postgres, sqlite};
use crate::supervise::sqlite_options;

pub(super) enum Database {
    Postgres(PgConnection),
    Sqlite(SqliteConnection),
}

impl Database {
    pub(super) async fn open(source: &Source) -> Result<Self, Error> {
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

    pub(super) async fn books(&mut self) -> Result<Books, Error> {
        match self {
            Self::Postgres(connection) => view::postgres::read(connection).await,
            Self::Sqlite(connection) => view::sqlite::read(connection).await,
        }
        .map_err(with_next_step)
    }

    pub(super) async fn parked(
        &mut self,
        pipeline: Option<&PipelineName>,
        limit: u32,
    ) -> Result<ParkedEntities, Error> {
        match self {
            Self::Postgres(connection) => view::postgres::parked(connection, pipeline, limit).await,
            Self::Sqlite(connection) => view::sqlite::parked(connection, pipeline, limit).await,
        }
        .map_err(with_next_step)
    }
}

/// Says what to do where the cause is known.
fn with_next_step(error: Error) -> Error {
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
