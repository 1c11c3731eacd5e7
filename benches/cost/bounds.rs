//! What an event may cost, and whether it does. Pure; never does I/O.

use std::fmt::Write;

/// What one stage does with an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Stage {
    /// A row of PostgreSQL's binary copy format becomes an event.
    Decode,
    /// An event is taken up, settled and released.
    Order,
    /// Filter, topic and key.
    Route,
    /// A record is made, with the routing that is part of it.
    Encode,
    /// The same of an event with three headers of its own.
    EncodeHeaders,
    /// The same in the format `cloudevents_json`.
    EncodeCloudevents,
    /// The real loop from the recorded page to a sink that confirms at once.
    Drain,
    /// The same with a filter that drops 90 %.
    DrainFiltered,
    /// The same to librdkafka, and a broker inside of this process.
    DrainKafka,
}

/// What an event costs.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    pub instructions: f64,
    pub allocations: f64,
}

/// What an event of one stage cost when this was written, from which follows what it may cost.
#[derive(Clone, Copy, Debug)]
pub struct Bound {
    pub stage: Stage,
    pub measured: Cost,
}

const fn bound(stage: Stage, instructions: f64, allocations: f64) -> Bound {
    Bound {
        stage,
        measured: Cost {
            instructions,
            allocations,
        },
    }
}

/// The only table of bounds. Whoever makes a stage cheaper, or dearer for a reason, puts the new figures here and the table that
/// is printed into `docs/performance.md`.
pub const BOUNDS: [Bound; 9] = [
    bound(Stage::Decode, 1607.0, 0.01),
    bound(Stage::Order, 124.0, 0.0),
    bound(Stage::Route, 237.0, 0.0),
    bound(Stage::Encode, 1022.0, 1.0),
    bound(Stage::EncodeHeaders, 2885.0, 2.0),
    bound(Stage::EncodeCloudevents, 7744.0, 5.0),
    bound(Stage::Drain, 3472.0, 1.0),
    bound(Stage::DrainFiltered, 2154.0, 0.1),
    bound(Stage::DrainKafka, 15991.0, 8.1),
];

/// More than this beyond what was measured is too much. Another processor, C library or compiler alone makes less of a
/// difference.
const SLACK: f64 = 0.1;
/// This much below what was measured, and the bound no longer guards anything.
const GAIN: f64 = 0.15;
/// Allocations are counted, not estimated: one more for each event is never a matter of percent.
const ALLOCATIONS_SLACK: f64 = 0.25;
/// One in so many events is no change: a buffer grows sooner or later.
const ALLOCATIONS_GRAIN: f64 = 0.05;

/// How a cost stands to its bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Within,
    /// So far below that the bound should be tightened.
    Loose,
    /// Dearer than allowed.
    Above,
}

impl Bound {
    pub fn instructions_max(&self) -> f64 {
        self.measured.instructions * (1.0 + SLACK)
    }

    pub fn allocations_max(&self) -> f64 {
        let was = self.measured.allocations;
        was + (was * SLACK).min(ALLOCATIONS_SLACK) + ALLOCATIONS_GRAIN
    }

    /// Of a cost that was measured now.
    pub fn judge(&self, now: Cost) -> Verdict {
        let was = self.measured;
        if now.instructions > self.instructions_max() || now.allocations > self.allocations_max() {
            Verdict::Above
        } else if now.instructions < was.instructions * (1.0 - GAIN)
            || now.allocations < was.allocations * (1.0 - GAIN) - ALLOCATIONS_GRAIN
        {
            Verdict::Loose
        } else {
            Verdict::Within
        }
    }

    /// What to say about it; nothing when it is as it was. `profile` is the file that callgrind wrote.
    pub fn remark(&self, now: Cost, profile: &str) -> Option<String> {
        let stage = name(self.stage);
        match self.judge(now) {
            Verdict::Within => None,
            Verdict::Loose => Some(format!(
                "{stage} has become cheaper: tighten its bound in benches/cost/bounds.rs to {:.0} instructions and {} allocations",
                now.instructions,
                decimals(now.allocations),
            )),
            Verdict::Above => Some(format!(
                "{stage} has become dearer: {}\n  where: callgrind_annotate --inclusive=yes {profile}",
                self.excess(now).join("; ")
            )),
        }
    }

    fn excess(&self, now: Cost) -> Vec<String> {
        let was = self.measured;
        let figures = [
            (
                "instructions",
                now.instructions,
                was.instructions,
                self.instructions_max(),
            ),
            (
                "allocations",
                now.allocations,
                was.allocations,
                self.allocations_max(),
            ),
        ];
        let above = figures.into_iter().filter(|(_, now, _, most)| now > most);
        above
            .map(|(what, now, was, _)| {
                let (now, was) = (decimals(now), decimals(was));
                format!("{now} {what} per event, {was} until now")
            })
            .collect()
    }
}

/// As on the command line.
pub fn name(stage: Stage) -> String {
    let value = clap::ValueEnum::to_possible_value(&stage);
    value.map_or_else(String::new, |value| value.get_name().to_owned())
}

/// A table of Markdown, which is readable as it is.
pub fn table(rows: &[(Bound, Cost)]) -> String {
    let mut table = String::from(
        "| stage              | instructions |  bound | allocations | bound |\n\
         |--------------------|-------------:|-------:|------------:|------:|\n",
    );
    for (bound, now) in rows {
        // Writing to a string can't fail.
        let _ = writeln!(
            table,
            "| {:18} | {:12.0} | {:6.0} | {:11.2} | {:5.2} |",
            name(bound.stage),
            now.instructions,
            bound.instructions_max(),
            now.allocations,
            bound.allocations_max(),
        );
    }
    table
}

/// Whole numbers above 100, two decimals below.
fn decimals(number: f64) -> String {
    if number >= 100.0 {
        format!("{number:.0}")
    } else {
        format!("{number:.2}")
    }
}
