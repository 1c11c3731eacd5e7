//! The relays of this process, one for each shard of each pipeline, and whose turn it is.
//!
//! Looks now and then at who else is there, tells each relay whether it may own its shard, and replaces them all when the
//! number of shards changes. None of that is needed for safety, which the leases give.

pub mod plan;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use self::plan::{Plan, plan};
use crate::config::{Config, PipelineConfig, Source};
use crate::event::{PipelineName, Shard};
use crate::ledger::LedgerError;
use crate::ledger::postgres::roster::{Crew, Roster};
use crate::relay::Changes;
use crate::relay::status::Status;
use crate::relay::turn::Turn;
use crate::reload::Reload;
use crate::supervise::assemble;
use crate::telemetry;

/// A process that owns every shard looks who else is there this often.
const LOOK_ALONE: Duration = Duration::from_secs(2);
/// One that stands by for something, so that it follows at once.
const LOOK: Duration = Duration::from_millis(500);
/// A shard that has been free for this long is anybody's: whoever should own it seems unable to.
const PATIENCE: Duration = Duration::from_secs(2);
/// For saying goodbye.
const LEAVE_MAX: Duration = Duration::from_secs(1);

/// A relay that runs until it is told to stop.
pub type Running = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What one relay says about itself.
#[derive(Clone)]
pub struct ShownRelay {
    /// Its pipeline.
    pub pipeline: PipelineName,
    /// Which part of it.
    pub shard: Shard,
    /// How it is.
    pub status: watch::Receiver<Status>,
}

/// The relays of this process.
pub struct Crews<'a> {
    config: &'a Config,
    holder: &'a str,
    /// None where there can be one relay only.
    roster: Option<Roster>,
    pipelines: Vec<Here<'a>>,
    shown: watch::Sender<Vec<ShownRelay>>,
    look_at: Instant,
    beat_at: Instant,
    /// Whether the last look failed.
    blind: bool,
    /// Relays that nobody runs yet.
    begun: Vec<Running>,
}

/// The relays of one pipeline.
struct Here<'a> {
    pipeline: &'a PipelineConfig,
    changes: watch::Receiver<Option<Arc<Changes>>>,
    /// One for each shard.
    turns: Vec<watch::Sender<Turn>>,
    /// Since when nobody has owned each shard.
    free_since: Vec<Option<Instant>>,
    shown: Vec<ShownRelay>,
    /// Who was told another number of shards than this process, when that was last said.
    told_otherwise: Vec<String>,
    stopping: &'a CancellationToken,
    /// Of the relays of this number of shards.
    until: CancellationToken,
}

impl<'a> Crews<'a> {
    /// The crews of a configuration. Their relays stop with `stopping`.
    #[must_use]
    pub fn new(
        config: &'a Config,
        reload: &Reload,
        holder: &'a str,
        stopping: &'a CancellationToken,
    ) -> Self {
        let roster = match &config.source {
            Source::Postgres(settings) => {
                let pipelines = config.pipelines.iter();
                Some(Roster::new(
                    settings.connector.clone(),
                    holder.to_owned(),
                    config.relay.lease_ttl,
                    pipelines
                        .map(|p| (p.pipeline.name.clone(), p.shards))
                        .collect(),
                ))
            }
            Source::Sqlite { .. } => None,
        };
        let here = config.pipelines.iter().map(|pipeline| Here {
            pipeline,
            changes: reload.changes(&pipeline.pipeline.name),
            turns: Vec::new(),
            free_since: Vec::new(),
            shown: Vec::new(),
            told_otherwise: Vec::new(),
            stopping,
            until: stopping.child_token(),
        });
        let mut crews = Self {
            config,
            holder,
            roster,
            pipelines: here.collect(),
            shown: watch::Sender::default(),
            look_at: Instant::now(),
            beat_at: Instant::now(),
            blind: false,
            begun: Vec::new(),
        };
        for here in &mut crews.pipelines {
            let relays = here.make(config, holder, here.pipeline.shards);
            crews.begun.extend(relays);
        }
        show(&crews.pipelines, &crews.shown);
        crews
    }

    /// What the relays say about themselves.
    #[must_use]
    pub fn shown(&self) -> watch::Receiver<Vec<ShownRelay>> {
        self.shown.subscribe()
    }

    /// Relays that are to run from now on.
    pub fn begun(&mut self) -> Vec<Running> {
        std::mem::take(&mut self.begun)
    }

    /// Waits until it is time, looks who is there, and says whose turn it is. May begin relays.
    ///
    /// # Cancel safety
    /// Safe: the next call looks again.
    pub async fn look(&mut self) {
        let Some(roster) = &mut self.roster else {
            return std::future::pending().await;
        };
        sleep_until(self.look_at).await;
        let beat = Instant::now() >= self.beat_at;
        let looked = roster.look(beat).await;
        self.look_at = Instant::now() + LOOK;
        let seen = match looked {
            Ok(seen) => seen,
            Err(error) => {
                self.lose_sight(&error);
                return;
            }
        };
        self.blind = false;
        if beat {
            self.beat_at = Instant::now() + self.config.relay.lease_ttl / 3;
        }
        let mut changes = Vec::new();
        let mut alone = true;
        for (here, crew) in self.pipelines.iter_mut().zip(seen) {
            if here.turns.len() != crew.leases.len() {
                tracing::info!(
                    pipeline = crew.pipeline,
                    shards = crew.shards,
                    "the pipeline has this many shards now"
                );
                let relays = here.make(self.config, self.holder, crew.shards);
                self.begun.extend(relays);
            }
            let plan = here.follow(self.holder, &crew);
            alone &= plan.turns.iter().all(|turn| *turn == Turn::Ours);
            if let Some(shards) = plan.reshard {
                changes.push((here.pipeline.pipeline.name.clone(), shards));
            }
        }
        if !self.begun.is_empty() {
            show(&self.pipelines, &self.shown);
        }
        for (pipeline, shards) in changes {
            // The next look sees it, or that somebody else was first.
            match roster.reshard(&pipeline, shards).await {
                Ok(_) => self.look_at = Instant::now(),
                Err(error) => {
                    tracing::warn!(%pipeline, %error, "could not change the number of shards");
                }
            }
        }
        if alone {
            self.look_at = (Instant::now() + LOOK_ALONE).min(self.beat_at);
        }
    }

    /// Without a view of the others the leases alone decide. So every relay asks for its own, and says what is wrong with the
    /// database.
    fn lose_sight(&mut self, error: &LedgerError) {
        if !std::mem::replace(&mut self.blind, true) {
            tracing::warn!(%error, "can't see which other relays are there");
        }
        for turn in self.pipelines.iter().flat_map(|here| &here.turns) {
            set(turn, &Turn::Ours);
        }
    }

    /// Says that this process is gone.
    pub async fn leave(&mut self) {
        if let Some(roster) = &mut self.roster
            && !self.blind
            && let Ok(Err(error)) = timeout(LEAVE_MAX, roster.leave()).await
        {
            tracing::debug!(%error, "could not leave the roster");
        }
    }
}

impl Here<'_> {
    /// Ends the relays that there are and makes one for each shard. Until the next look the leases alone decide.
    fn make(&mut self, config: &Config, holder: &str, shards: u32) -> Vec<Running> {
        telemetry::shards(self.pipeline.pipeline.name.as_str(), shards);
        // What they leave is the affair of those that follow.
        let theirs = Turn::Theirs {
            holder: format!("relays with {shards} shards"),
        };
        for turn in &self.turns {
            set(turn, &theirs);
        }
        self.until.cancel();
        self.until = self.stopping.child_token();
        self.turns.clear();
        self.shown.clear();
        self.free_since = vec![None; shards as usize];
        let mut relays: Vec<Running> = Vec::new();
        for index in 0..shards {
            let shard = Shard {
                index,
                count: shards,
            };
            let (mut relay, status) = assemble(config, self.pipeline, shard, holder);
            let (sender, receiver) = watch::channel(Turn::Ours);
            relay.turn = receiver;
            relay.changes = self.changes.clone();
            self.turns.push(sender);
            self.shown.push(ShownRelay {
                pipeline: self.pipeline.pipeline.name.clone(),
                shard,
                status,
            });
            // Its lines of log say which shard they are about.
            let span = if shards > 1 {
                tracing::info_span!("shard", index)
            } else {
                tracing::Span::none()
            };
            relays.push(Box::pin(relay.run(self.until.clone()).instrument(span)));
        }
        relays
    }

    /// Says who has to be told another number of shards, before it can come into force or because it never will.
    fn name_others(&mut self, crew: &Crew) {
        let told = self.pipeline.shards;
        let others = crew.members.iter().filter(|member| member.shards != told);
        let others: Vec<String> = others.map(|member| member.holder.clone()).collect();
        if !others.is_empty() && others != self.told_otherwise {
            tracing::warn!(
                pipeline = crew.pipeline,
                shards = crew.shards,
                told,
                others = others.join(", "),
                "other relays are told another number of shards: it changes when all are told the same"
            );
        }
        self.told_otherwise = others;
    }

    /// Tells each relay whether it is its turn.
    fn follow(&mut self, me: &str, crew: &Crew) -> Plan {
        self.name_others(crew);
        let now = Instant::now();
        for (free_since, lease) in self.free_since.iter_mut().zip(&crew.leases) {
            *free_since = match lease.holder {
                None => free_since.or(Some(now)),
                Some(_) => None,
            };
        }
        let waited: Vec<bool> = self
            .free_since
            .iter()
            .map(|since| since.is_some_and(|since| now - since >= PATIENCE))
            .collect();
        let plan = plan(me, crew, &waited);
        for (sender, turn) in self.turns.iter().zip(&plan.turns) {
            set(sender, turn);
        }
        plan
    }
}

fn show(pipelines: &[Here<'_>], shown: &watch::Sender<Vec<ShownRelay>>) {
    let relays = pipelines.iter().flat_map(|here| here.shown.clone());
    shown.send_replace(relays.collect());
}

fn set(turn: &watch::Sender<Turn>, to: &Turn) {
    turn.send_if_modified(|current| {
        let changed = *current != *to;
        current.clone_from(to);
        changed
    });
}
