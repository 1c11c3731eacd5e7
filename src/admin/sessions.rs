//! The database sessions of the HTTP interface: a few, kept for a minute, shared by all requests.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit};
use tokio::time::{Instant, sleep};

use crate::config::Source;
use crate::database::Database;

/// Answers that use the database at once, those that are still being written included.
pub(super) const ANSWERS_MAX: usize = 8;
/// Sessions at once: requests must not use up the connections of the database.
const SESSIONS_MAX: usize = 2;
/// A session that nobody has used for this long is closed.
const IDLE_MAX: Duration = Duration::from_mins(1);

/// Where handlers get a session.
pub(super) struct Sessions {
    source: Source,
    answers: Arc<Semaphore>,
    turns: Semaphore,
    idle: Mutex<Vec<(Database, Instant)>>,
}

/// A session for one answer. Unless it is given back it is closed: what was interrupted can't be used again.
pub(super) struct Session<'a> {
    pub(super) database: Database,
    from: &'a Sessions,
    _turn: SemaphorePermit<'a>,
}

impl Sessions {
    pub(super) fn new(source: Source) -> Self {
        Self {
            source,
            answers: Arc::new(Semaphore::new(ANSWERS_MAX)),
            turns: Semaphore::new(SESSIONS_MAX),
            idle: Mutex::default(),
        }
    }

    /// Leave to make one answer; none where too many are under way.
    pub(super) fn admit(&self) -> Option<OwnedSemaphorePermit> {
        self.answers.clone().try_acquire_owned().ok()
    }

    /// Waits for a session that answers.
    ///
    /// # Errors
    /// When the database can't be reached.
    pub(super) async fn open(&self) -> Result<Session<'_>, Error> {
        let turn = self.turns.acquire().await?;
        let kept = self.idle().pop();
        let database = match kept {
            Some((mut database, _)) => database.answers().await.then_some(database),
            None => None,
        };
        let database = match database {
            Some(database) => database,
            None => Database::open(&self.source).await?,
        };
        Ok(Session {
            database,
            from: self,
            _turn: turn,
        })
    }

    /// Closes sessions that nobody uses, for ever.
    pub(super) async fn close_idle(&self) -> std::convert::Infallible {
        loop {
            sleep(IDLE_MAX / 2).await;
            self.idle().retain(|(_, since)| since.elapsed() < IDLE_MAX);
        }
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<(Database, Instant)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Session<'_> {
    /// Keeps the session for the next answer.
    pub(super) fn give_back(self) {
        let Self { database, from, .. } = self;
        from.idle().push((database, Instant::now()));
    }
}
