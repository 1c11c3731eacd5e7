//! The table `retention`.

use std::time::Duration;

use bytesize::ByteSize;
use serde::Deserialize;

use super::{ConfigError, PipelineConfig};
use crate::retention::Settings;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawRetention {
    keep: Term,
    drop_unpublished_after: Term,
    disk_budget: Option<ByteSize>,
    #[serde(with = "humantime_serde")]
    interval: Duration,
    partition_events: u64,
    partitions_ahead: u32,
}

/// A duration, or none for "forever" and "never".
#[derive(Deserialize)]
#[serde(try_from = "String")]
struct Term(Option<Duration>);

impl TryFrom<String> for Term {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        if ["forever", "never"].contains(&&text[..]) {
            return Ok(Self(None));
        }
        let duration = humantime::parse_duration(&text).map_err(|_| {
            format!(
                "{text:?} is no duration such as \"7d\" or \"12h\", nor \"forever\" or \"never\""
            )
        })?;
        Ok(Self(Some(duration)))
    }
}

impl RawRetention {
    pub(super) fn resolve(self, pipelines: &[PipelineConfig]) -> Result<Settings, ConfigError> {
        let Self {
            keep: Term(keep),
            drop_unpublished_after: Term(drop_unpublished_after),
            disk_budget,
            interval,
            partition_events,
            partitions_ahead,
        } = self;
        if interval < Duration::from_secs(1) {
            return Err(ConfigError::new(format!(
                "retention.interval = {}: has to be at least 1s",
                humantime::format_duration(interval)
            )));
        }
        for (key, value, most) in [
            ("partition_events", partition_events, 1_000_000_000_000),
            ("partitions_ahead", partitions_ahead.into(), 1000),
        ] {
            if !(1..=most).contains(&value) {
                return Err(ConfigError::new(format!(
                    "retention.{key} = {value}: has to be from 1 to {most}"
                )));
            }
        }
        if let (Some(after), Some(keep)) = (drop_unpublished_after, keep)
            && after < keep
        {
            return Err(ConfigError::new(format!(
                "retention.drop_unpublished_after = {} is shorter than retention.keep = {}",
                humantime::format_duration(after),
                humantime::format_duration(keep)
            )));
        }
        Ok(Settings {
            keep,
            drop_unpublished_after,
            disk_budget_bytes: disk_budget.map(|budget| budget.as_u64()),
            interval,
            partition_events,
            partitions_ahead,
            pipelines: pipelines.iter().map(|p| p.pipeline.name.clone()).collect(),
        })
    }
}
