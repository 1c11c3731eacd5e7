//! The table `source`: which database, and where its address comes from.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use figment::Figment;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use sqlx::postgres::PgConnectOptions;

use super::{ConfigError, Source, both_set, database_url, read_secret};
use crate::source::postgres::{CaptureMode, Connector};

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum SourceKind {
    Postgres,
    Sqlite,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawSource {
    kind: SourceKind,
    postgres: RawPostgres,
    sqlite: RawSqlite,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPostgres {
    url: Option<SecretString>,
    url_file: Option<PathBuf>,
    direct_url: Option<SecretString>,
    direct_url_file: Option<PathBuf>,
    capture: CaptureMode,
    #[serde(with = "humantime_serde")]
    poll_interval: Duration,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSqlite {
    path: Option<PathBuf>,
    #[serde(with = "humantime_serde")]
    poll_interval: Duration,
}

impl RawSource {
    pub(super) fn resolve(
        self,
        figment: &Figment,
        env: &[(String, String)],
    ) -> Result<(Source, Vec<String>), ConfigError> {
        match self.kind {
            SourceKind::Postgres => self.postgres.resolve(figment, env),
            SourceKind::Sqlite => {
                let RawSqlite {
                    path,
                    poll_interval,
                } = self.sqlite;
                let path = path.ok_or_else(|| {
                    ConfigError::new(
                        "source.sqlite.path is missing: the file that holds the outbox",
                    )
                })?;
                let source = Source::Sqlite {
                    path,
                    poll_interval,
                };
                Ok((source, Vec::new()))
            }
        }
    }
}

impl RawPostgres {
    fn resolve(
        self,
        figment: &Figment,
        env: &[(String, String)],
    ) -> Result<(Source, Vec<String>), ConfigError> {
        let Self {
            url,
            url_file,
            direct_url,
            direct_url_file,
            capture,
            poll_interval,
        } = self;
        let given = |key: &'static str,
                     url: Option<SecretString>,
                     file_key: &'static str,
                     file: Option<PathBuf>| match (url, file) {
            (Some(_), Some(_)) => Err(both_set(key, file_key, figment)),
            (Some(url), None) => address(key, move || Ok(url.clone()), env).map(Some),
            (None, Some(file)) => {
                let read = move || read_secret(file_key, &file);
                address(file_key, read, env).map(Some)
            }
            (None, None) => Ok(None),
        };
        let (connector, notes) = given(
            "source.postgres.url",
            url,
            "source.postgres.url_file",
            url_file,
        )?
        .ok_or_else(|| {
            ConfigError::new(
                "source.postgres.url is missing: set it in the file, in RELAY_SOURCE__POSTGRES__URL, or name a file with \
                 source.postgres.url_file",
            )
        })?;
        let direct = given(
            "source.postgres.direct_url",
            direct_url,
            "source.postgres.direct_url_file",
            direct_url_file,
        )?;
        let direct_connector = direct.map_or_else(|| connector.clone(), |(direct, _)| direct);
        let source = Source::Postgres(Box::new(crate::source::postgres::Settings {
            connector,
            direct_connector,
            mode: capture,
            poll_interval,
        }));
        Ok((source, notes))
    }
}

/// A way to the database, and what of it comes from elsewhere. What `read` returns counts for each attempt to connect.
fn address(
    key: &'static str,
    read: impl Fn() -> Result<SecretString, ConfigError> + Send + Sync + 'static,
    env: &[(String, String)],
) -> Result<(Connector, Vec<String>), ConfigError> {
    let notes = database_url::from_environment(key, read()?.expose_secret(), env);
    let connector = Connector::reading(move || postgres_options(key, &read()?))?;
    Ok((connector, notes.map_err(ConfigError::new)?))
}

/// What the relay's connections have in common.
///
/// # Errors
/// When the text is no PostgreSQL URL; the error does not repeat it, for it may hold a password.
pub fn postgres_options(key: &str, url: &SecretString) -> Result<PgConnectOptions, ConfigError> {
    database_url::check(url.expose_secret())
        .map_err(|why| ConfigError::new(format!("{key} {why}")))?;
    database_url::check_files(url.expose_secret())
        .map_err(|why| ConfigError::new(format!("{key} {why}")))?;
    let options = PgConnectOptions::from_str(url.expose_secret()).map_err(|_| {
        ConfigError::new(format!(
            "{key} is not a URL such as postgres://user:password@host:5432/database"
        ))
    })?;
    // Poolers refuse start-up parameters that they do not know.
    let options = options.extra_float_digits(None);
    Ok(if options.get_application_name().is_none() {
        options.application_name("outbox-relay")
    } else {
        options
    })
}
