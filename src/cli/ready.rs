//! `outbox-relay ready`: whether the daemon is ready, for probes where there is neither shell nor curl.

use anyhow::{Error, bail};
use clap::Args;

use super::{ConfigArgs, Outcome};
use crate::admin;
use crate::relay::status::State;

/// Ask the daemon at admin.listen whether it is ready: exit code 0 if it is, 1 if not.
///
/// The message says which pipelines are not, and why.
#[derive(Debug, Args)]
pub(super) struct Ready {
    #[command(flatten)]
    config: ConfigArgs,
}

impl Ready {
    pub(super) async fn run(self) -> Result<Outcome, Error> {
        let admin = self.config.load()?.admin;
        if !admin.enabled {
            bail!("the daemon has no HTTP interface to ask: set admin.enabled = true");
        }
        // Without it the answer says less.
        let token = admin.token.current().ok().flatten();
        let overview = admin::ask_ready(admin.listen, token.as_ref()).await?;
        let mut wrong = Vec::new();
        for view in &overview.pipelines {
            let why = match &view.status.state {
                state if state.is_ready() => continue,
                State::Stalled { reason } => format!("is stalled: {reason}"),
                State::Halted { reason } => format!("has halted: {reason}"),
                State::Stopped => "has stopped".to_owned(),
                _ => "is starting".to_owned(),
            };
            let since = match &view.state_since {
                Some(since) => format!(" (since {since})"),
                None => String::new(),
            };
            wrong.push(format!(
                "pipeline {}, shard {}, {why}{since}",
                view.pipeline, view.shard
            ));
        }
        if !overview.ready {
            bail!("not ready: {}", wrong.join("; "));
        }
        anstream::println!("ready");
        Ok(Outcome::Done)
    }
}
