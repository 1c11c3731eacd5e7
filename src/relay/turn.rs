//! Which of many replicas may ask for a shard: a matter of fairness. Which one owns it is decided by the lease alone.

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Whether a relay may own its shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It may.
    Ours,
    /// It is to leave the shard to somebody else, or to give it up.
    Theirs {
        /// Who has it, or will have it.
        holder: String,
    },
}

impl Turn {
    /// For a relay that has the shard to itself.
    #[must_use]
    pub fn always() -> watch::Receiver<Self> {
        watch::channel(Self::Ours).1
    }
}

/// Cancels when the turn is over; never ends.
pub(super) async fn ends(turn: &mut watch::Receiver<Turn>, until: &CancellationToken) {
    if turn.wait_for(|turn| *turn != Turn::Ours).await.is_ok() {
        until.cancel();
    }
    std::future::pending::<()>().await;
}
