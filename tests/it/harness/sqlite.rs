//! A SQLite file of its own for each test.

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions, Connection};
use tempfile::TempDir;

/// A file with the outbox in it, removed with the value.
pub struct TestFile {
    pub options: SqliteConnectOptions,
    _folder: TempDir,
}

impl TestFile {
    /// A migrated file.
    pub async fn create() -> Self {
        let file = Self::create_empty();
        outbox_relay::migrate::sqlite(file.options.clone().create_if_missing(true))
            .await
            .unwrap();
        file
    }

    /// The same before its first migration: there is no file yet.
    pub fn create_empty() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self {
            options: SqliteConnectOptions::new()
                .filename(folder.path().join("outbox.db"))
                .disable_statement_logging(),
            _folder: folder,
        }
    }

    /// A connection of its own.
    pub async fn connect(&self) -> SqliteConnection {
        SqliteConnection::connect_with(&self.options).await.unwrap()
    }
}
