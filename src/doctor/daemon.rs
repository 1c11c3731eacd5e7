//! Asks the daemon of this configuration what it says about itself: what `/readyz` says is what doctor says.

use super::Finding;
use super::books::age;
use crate::admin::{self, Overview};
use crate::config::Config;
use crate::reason::reason;
use crate::relay::status::State;

/// What the daemon answers; none where it can't be asked. And what there is to say about that.
pub(super) async fn examine(config: &Config, now_us: i64) -> (Option<Overview>, Vec<Finding>) {
    if !config.admin.enabled {
        let finding = Finding::note(
            "daemon",
            "the daemon can't be asked: admin.enabled is false",
            "of a relay that runs only its lease is seen",
        );
        return (None, vec![finding]);
    }
    // Without the token the answer says less.
    let token = config.admin.token.current().ok().flatten();
    match admin::ask_as(config.admin.listen, token.as_ref()).await {
        Ok(overview) => {
            let findings = judge(&overview, config, now_us);
            (Some(overview), findings)
        }
        Err(error) => {
            let finding = Finding::note(
                "daemon",
                reason(&error),
                "of relays that run elsewhere only their leases are seen: ask doctor there too",
            );
            (None, vec![finding])
        }
    }
}

fn judge(overview: &Overview, config: &Config, now_us: i64) -> Vec<Finding> {
    let Overview {
        version,
        holder,
        ready,
        pipelines,
    } = overview;
    let mut findings = Vec::new();
    for view in pipelines {
        let shards = pipelines
            .iter()
            .filter(|other| other.pipeline == view.pipeline)
            .count();
        let name = if shards > 1 {
            format!("{}/{}", view.pipeline, view.shard)
        } else {
            view.pipeline.clone()
        };
        #[expect(clippy::cast_precision_loss, reason = "for people")]
        let seconds = now_us.saturating_sub(view.status.state_since_us).max(0) as f64 / 1e6;
        let lasts = age(seconds);
        let (what, finding_why, advice) = match &view.status.state {
            State::Running | State::Standby { .. } | State::Paused { .. } => continue,
            State::Stalled { reason } => (
                format!("pipeline {name} has been stalled for {lasts}: {reason}"),
                "nothing of it is published; the relay tries again until it works",
                "mend what the reason says; the other findings may say more",
            ),
            State::Halted { reason } => (
                format!("pipeline {name} has been halted for {lasts}: {reason}"),
                "nothing of it is published until a person does something",
                "do what the reason says",
            ),
            State::Starting => (
                format!("pipeline {name} has been starting for {lasts}"),
                "it has not reached database and broker yet",
                "run `outbox-relay doctor` again in some seconds",
            ),
            State::Stopped => (
                format!("pipeline {name} has been stopped for {lasts}"),
                "the daemon is about to end",
                "start it again: outbox-relay run",
            ),
        };
        findings.push(Finding::error("daemon", what, finding_why).advice(advice));
    }
    if *ready {
        findings.push(Finding::ok(
            "daemon",
            format!(
                "the relay at {} is ready: version {version}, {holder}",
                config.admin.listen
            ),
        ));
    }
    findings
}
