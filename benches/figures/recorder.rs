//! Latencies, counted from when something was meant to start: a measurement that falls behind does not hide what it
//! missed meanwhile (coordinated omission).

use std::time::{Duration, Instant};

use anyhow::Error;
use hdrhistogram::Histogram;

/// The percentiles that are shown.
pub const PERCENTILES: [(&str, f64); 3] = [("p50", 50.0), ("p99", 99.0), ("p99.9", 99.9)];

/// Microseconds, to three digits.
pub struct Recorder(Histogram<u64>);

impl Recorder {
    pub fn new() -> Result<Self, Error> {
        Ok(Self(Histogram::new(3)?))
    }

    /// One that was meant to start at `intended` and was over at `seen`.
    pub fn record(&mut self, intended: Instant, seen: Instant) -> Result<(), Error> {
        let took = seen.saturating_duration_since(intended);
        self.0.record(u64::try_from(took.as_micros())?)?;
        Ok(())
    }

    /// The percentiles, in milliseconds.
    pub fn milliseconds(&self) -> [f64; 3] {
        PERCENTILES.map(|(_, percentile)| {
            let micros = Duration::from_micros(self.0.value_at_percentile(percentile));
            micros.as_secs_f64() * 1e3
        })
    }
}
