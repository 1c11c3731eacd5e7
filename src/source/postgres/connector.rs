//! Where the address and the password of the database come from.
//!
//! Never keeps what a file says: a file is read at each attempt to connect, so that a password that was rotated counts from
//! the next attempt on, in the same process.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{ConnectOptions, Connection};
use tokio::time::timeout;

/// An attempt may take this long.
const CONNECT_MAX: Duration = Duration::from_secs(10);

type Read = dyn Fn() -> Result<PgConnectOptions, anyhow::Error> + Send + Sync;

/// Connects to one database. Clones share the source of the values.
#[derive(Clone)]
pub struct Connector {
    options: PgConnectOptions,
    read: Option<Arc<Read>>,
}

impl fmt::Debug for Connector {
    // The options hold the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector")
            .field("host", &self.options.get_host())
            .field("database", &self.options.get_database())
            .field("from_file", &self.read.is_some())
            .finish_non_exhaustive()
    }
}

impl From<PgConnectOptions> for Connector {
    fn from(options: PgConnectOptions) -> Self {
        Self {
            options: options.disable_statement_logging(),
            read: None,
        }
    }
}

impl From<&PgConnectOptions> for Connector {
    fn from(options: &PgConnectOptions) -> Self {
        options.clone().into()
    }
}

impl Connector {
    /// The values are those that `read` returns, asked at each attempt to connect.
    ///
    /// # Errors
    /// Those of `read`, which is asked once to begin with.
    pub fn reading<E>(
        read: impl Fn() -> Result<PgConnectOptions, E> + Send + Sync + 'static,
    ) -> Result<Self, E>
    where
        E: Into<anyhow::Error>,
    {
        let options = read()?.disable_statement_logging();
        Ok(Self {
            options,
            read: Some(Arc::new(move || read().map_err(Into::into))),
        })
    }

    /// As the values were when the configuration was read; for words about host, database and user.
    #[must_use]
    pub fn known(&self) -> &PgConnectOptions {
        &self.options
    }

    /// The values as they are now.
    ///
    /// # Errors
    /// When the file can't be read or says no address of a database at the moment.
    pub fn current(&self) -> Result<PgConnectOptions, anyhow::Error> {
        match &self.read {
            Some(read) => Ok(read()?.disable_statement_logging()),
            None => Ok(self.options.clone()),
        }
    }

    /// Opens a connection with the values as they are now, with a limit on how long that may take.
    ///
    /// # Errors
    /// As [`Connector::current`], and when the server can't be reached or refuses; the message names host and database, never the
    /// password.
    pub(crate) async fn connect(&self) -> Result<PgConnection, anyhow::Error> {
        let options = self.current()?;
        let describe = || {
            format!(
                "connect to PostgreSQL at {}:{}, database {:?}, as {:?}",
                options.get_host(),
                options.get_port(),
                options.get_database().unwrap_or_default(),
                options.get_username(),
            )
        };
        timeout(CONNECT_MAX, PgConnection::connect_with(&options))
            .await
            .map_err(|_| anyhow!("no answer within {} s", CONNECT_MAX.as_secs()))
            .and_then(|connected| connected.map_err(anyhow::Error::from))
            .with_context(describe)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU16, Ordering};

    use super::*;

    #[test]
    fn the_values_are_asked_for_each_time() {
        static PORT: AtomicU16 = AtomicU16::new(1);
        let connector = Connector::reading(|| match PORT.load(Ordering::Relaxed) {
            0 => Err(anyhow!("empty")),
            port => Ok(PgConnectOptions::new_without_pgpass().port(port)),
        })
        .unwrap();
        assert_eq!(connector.current().unwrap().get_port(), 1);
        PORT.store(2, Ordering::Relaxed);
        assert_eq!(connector.clone().current().unwrap().get_port(), 2);
        PORT.store(0, Ordering::Relaxed);
        assert!(connector.current().is_err());
        PORT.store(3, Ordering::Relaxed);
        assert_eq!(connector.current().unwrap().get_port(), 3);
        assert_eq!(connector.known().get_port(), 1);
    }
}
