//! `outbox-relay check`: is the configuration right?

use clap::Args;

use super::{ConfigArgs, Outcome};

/// Read the configuration and say what is wrong with it.
#[derive(Debug, Args)]
pub(super) struct Check {
    #[command(flatten)]
    config: ConfigArgs,
}

impl Check {
    pub(super) fn run(self) -> Result<Outcome, anyhow::Error> {
        let config = self.config.load()?;
        let names: Vec<&str> = config
            .pipelines
            .iter()
            .map(|p| p.pipeline.name.as_str())
            .collect();
        anstream::println!(
            "the configuration is right; pipelines: {}",
            names.join(", ")
        );
        Ok(Outcome::Done)
    }
}
