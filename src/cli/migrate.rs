//! `outbox-relay migrate`: makes or updates the outbox tables.

use clap::{Args, ValueEnum};

use super::{ConfigArgs, Outcome};
use crate::config::Source;
use crate::migrate::{self, Kind};
use crate::supervise::sqlite_options;

/// Make or update the outbox tables.
#[derive(Debug, Args)]
pub(super) struct Migrate {
    #[command(flatten)]
    config: ConfigArgs,
    /// Print the SQL instead of running it; needs no database.
    #[arg(long, value_name = "DATABASE", num_args = 0..=1, default_missing_value = "postgres")]
    print: Option<Database>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Database {
    Postgres,
    Sqlite,
}

impl Migrate {
    pub(super) async fn run(self) -> Result<Outcome, anyhow::Error> {
        if let Some(kind) = self.print {
            let kind = match kind {
                Database::Postgres => Kind::Postgres,
                Database::Sqlite => Kind::Sqlite,
            };
            anstream::print!("{}", migrate::print(kind));
            return Ok(Outcome::Done);
        }
        let report = match self.config.load()?.source {
            // Migrations need a session of their own, which a pooler does not give.
            Source::Postgres(settings) => migrate::postgres(settings.direct_connector).await?,
            Source::Sqlite { path, .. } => migrate::sqlite(sqlite_options(&path)).await?,
        };
        for version in &report.applied {
            anstream::println!("applied {version}");
        }
        if report.applied.is_empty() {
            anstream::println!(
                "nothing to do: {} migrations are applied",
                report.present.len()
            );
        }
        Ok(Outcome::Done)
    }
}
