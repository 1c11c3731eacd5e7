//! The connection that is notified. It only waits, so that it proves now and then that it is still there: a firewall that forgot
//! it tells neither end.

use std::future::{Future, pending};
use std::pin::Pin;
use std::time::Duration;

use anyhow::anyhow;
use sqlx::Executor;
use sqlx::postgres::{PgListener, PgPoolOptions};
use tokio::time::{Instant, sleep_until, timeout};

use super::Connector;

/// An attempt may take this long.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// Without a notification for this long the connection is asked to answer.
const PROVE_AFTER: Duration = Duration::from_secs(10);
/// The answer of a server takes a round trip.
const PROVE_MAX: Duration = Duration::from_secs(5);

type Listening = Pin<Box<dyn Future<Output = Result<PgListener, anyhow::Error>> + Send>>;

pub(super) enum Listener {
    /// There is none, and none is made before this time.
    Closed(Instant),
    /// It is being made, beside the polls.
    Opening(Listening),
    /// What comes has to be taken: the server keeps it for a session that does not read, until no transaction of anybody can
    /// notify any more.
    Open(PgListener, Instant),
    /// It is asked to answer. What comes meanwhile is kept by the connection.
    Proving(Listening),
}

/// What wakes.
pub(super) enum Heard {
    /// What was committed before did not notify this connection.
    Begun,
    Notification,
    /// The connection has answered.
    Alive,
}

impl Listener {
    pub(super) fn opening(connector: Connector) -> Self {
        Self::Opening(Box::pin(listen(connector)))
    }

    /// Whether notifications arrive, as far as is known.
    pub(super) fn is_open(&self) -> bool {
        matches!(self, Self::Open(..) | Self::Proving(_))
    }

    /// # Cancel safety
    /// Safe: what is under way is gone on with, and a lost hint costs latency only.
    pub(super) async fn hear(&mut self) -> Result<Heard, anyhow::Error> {
        match self {
            Self::Closed(_) => pending().await,
            Self::Opening(opening) => {
                *self = Self::Open(opening.await?, Instant::now());
                Ok(Heard::Begun)
            }
            Self::Proving(proving) => {
                *self = Self::Open(proving.await?, Instant::now());
                Ok(Heard::Alive)
            }
            Self::Open(listener, heard_at) => {
                let heard = tokio::select! {
                    biased;
                    heard = listener.try_recv() => Some(heard?),
                    () = sleep_until(*heard_at + PROVE_AFTER) => None,
                };
                match heard {
                    Some(Some(_)) => {
                        *heard_at = Instant::now();
                        Ok(Heard::Notification)
                    }
                    Some(None) => Err(anyhow!("the connection was lost")),
                    None => {
                        self.prove();
                        Box::pin(self.hear()).await
                    }
                }
            }
        }
    }

    fn prove(&mut self) {
        match std::mem::replace(self, Self::Closed(Instant::now())) {
            Self::Open(listener, _) => *self = Self::Proving(Box::pin(prove(listener))),
            other => *self = other,
        }
    }
}

async fn prove(mut listener: PgListener) -> Result<PgListener, anyhow::Error> {
    let asked = timeout(PROVE_MAX, listener.execute("select 1")).await;
    asked.map_err(|_| {
        anyhow!(
            "the connection that waits for notifications does not answer within {} s",
            PROVE_MAX.as_secs()
        )
    })??;
    Ok(listener)
}

async fn listen(connector: Connector) -> Result<PgListener, anyhow::Error> {
    // Says why it fails: a pool asks again and again, and in the end only that there was no time left.
    drop(connector.connect().await?);
    let options = connector.current()?;
    let listening = async {
        let pool = PgPoolOptions::new()
            .max_connections(1)
            .connect_with(options)
            .await?;
        let mut listener = PgListener::connect_with(&pool).await?;
        // Else it would connect again by itself, for half a minute, and without a word.
        listener.eager_reconnect(false);
        listener.listen("outbox_events").await?;
        Ok(listener)
    };
    match timeout(CONNECT_MAX, listening).await {
        Ok(listening) => listening,
        Err(_) => Err(anyhow!("no answer within {} s", CONNECT_MAX.as_secs())),
    }
}
