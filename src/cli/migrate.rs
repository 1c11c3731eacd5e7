//! `outbox-relay migrate`: makes or updates the outbox tables.

use clap::{Args, ValueEnum};

use super::show::say;
use super::{ConfigArgs, Outcome};
use crate::config::Source;
use crate::migrate::{self, Kind, Partitions};
use crate::supervise::sqlite_options;

/// Make or update the outbox tables.
#[derive(Debug, Args)]
pub(super) struct Migrate {
    #[command(flatten)]
    config: ConfigArgs,
    /// Print the SQL instead of running it; needs no database. Without a name that of the configured kind of database, and
    /// PostgreSQL's where none is configured.
    #[arg(long, value_name = "DATABASE", num_args = 0..=1)]
    #[expect(clippy::option_option, reason = "absent, without a value, with one")]
    print: Option<Option<Database>>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Database {
    Postgres,
    Sqlite,
}

impl Migrate {
    pub(super) async fn run(self) -> Result<Outcome, anyhow::Error> {
        if let Some(kind) = self.print {
            let kind = match (kind, self.config.load()) {
                (Some(Database::Sqlite), _) => Kind::Sqlite,
                (None, Ok(config)) if matches!(config.source, Source::Sqlite { .. }) => {
                    Kind::Sqlite
                }
                (Some(Database::Postgres) | None, _) => Kind::Postgres,
            };
            anstream::print!("{}", migrate::print(kind));
            return Ok(Outcome::Done);
        }
        let config = self.config.load()?;
        let partitions = Partitions {
            events: config.retention.partition_events,
            ahead: config.retention.partitions_ahead,
        };
        let report = match config.source {
            // Migrations need a session of their own, which a pooler does not give.
            Source::Postgres(settings) => {
                migrate::postgres_with(settings.direct_connector, partitions).await?
            }
            Source::Sqlite { path, .. } => {
                migrate::sqlite(sqlite_options(&path).create_if_missing(true)).await?
            }
        };
        for version in &report.applied {
            say!("applied {version}");
        }
        if report.applied.is_empty() {
            say!(
                "nothing to do: {} migrations are applied",
                report.present.len()
            );
        }
        Ok(Outcome::Done)
    }
}
