//! What was measured: rounds of a figure beside rounds of its limit, and what they come to.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Error};
use serde::{Deserialize, Serialize};

/// Everything of one run of the bench; this is what --json writes.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    pub header: Header,
    pub rows: Vec<Row>,
    /// What was not measured, and why.
    pub skipped: Vec<String>,
    /// What went wrong: no figure of such a run is to be believed.
    pub failed: Vec<String>,
}

/// What it was measured on: without that the figures mean nothing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Header {
    pub relay: String,
    /// Empty where the bench does not run in its repository.
    pub commit: String,
    pub machine: String,
    pub kernel: String,
    /// Before the bench began: others on the machine are noise.
    pub load_average: f64,
    /// What the host took of the processors while it ran.
    #[serde(default)]
    pub stolen_percent: Option<f64>,
    pub postgres: String,
    pub kafka: String,
    pub sizes: String,
    /// Why these are not figures: a debug build, small sizes.
    pub caveats: Vec<String>,
}

/// One figure.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// Name of the case.
    pub case: String,
    /// Which shape of it.
    pub variant: String,
    /// What was measured, with its unit.
    pub figure: String,
    /// What the limit is.
    pub limit: String,
    /// In the order in which they were measured.
    pub rounds: Vec<Round>,
    /// Places on the plots.
    #[serde(default)]
    pub axes: BTreeMap<String, f64>,
}

/// One round: the relay's figure, and the limit's of the same round.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Round {
    pub relay: f64,
    /// None where there is nothing to compare with.
    pub limit: Option<f64>,
}

/// Where a figure belongs.
#[derive(Clone, Debug)]
pub struct Place<'a> {
    pub case: &'a str,
    pub variant: &'a str,
    pub limit: &'a str,
}

/// Lowest, median and highest of the rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    pub low: f64,
    pub median: f64,
    pub high: f64,
}

impl Report {
    pub fn new(header: Header) -> Self {
        Self {
            header,
            rows: Vec::new(),
            skipped: Vec::new(),
            failed: Vec::new(),
        }
    }

    /// Adds one round of a figure.
    pub fn add(
        &mut self,
        place: &Place<'_>,
        figure: &str,
        relay: f64,
        limit: impl Into<Option<f64>>,
    ) {
        let Place {
            case,
            variant,
            limit: name,
        } = place;
        let same = |row: &Row| {
            (
                &row.case[..],
                &row.variant[..],
                &row.figure[..],
                &row.limit[..],
            ) == (*case, *variant, figure, *name)
        };
        let at = self.rows.iter().position(same).unwrap_or_else(|| {
            self.rows.push(Row {
                case: (*case).to_owned(),
                variant: (*variant).to_owned(),
                figure: figure.to_owned(),
                limit: (*name).to_owned(),
                rounds: Vec::new(),
                axes: BTreeMap::new(),
            });
            self.rows.len() - 1
        });
        let limit = limit.into();
        self.rows[at].rounds.push(Round { relay, limit });
    }

    pub fn skip(&mut self, reason: String) {
        eprintln!("SKIPPED {reason}");
        if !self.skipped.contains(&reason) {
            self.skipped.push(reason);
        }
    }

    pub fn write(&self, file: &Path) -> Result<(), Error> {
        let text = serde_json::to_string_pretty(self)?;
        std::fs::write(file, text + "\n").with_context(|| format!("write {}", file.display()))
    }

    pub fn read(file: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(file);
        let text = text.with_context(|| format!("read {}", file.display()))?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} is not what --json writes", file.display()))
    }

    /// As text within 100 columns, or as Markdown.
    pub fn show(&self, markdown: bool) -> String {
        let mut text = self.header.lines().join("\n");
        text.push('\n');
        let mut shown: Vec<(&str, &str)> = Vec::new();
        for row in &self.rows {
            let table = (&row.case[..], &row.limit[..]);
            if !shown.contains(&table) {
                shown.push(table);
                text.push_str(&self.table(table, markdown));
            }
        }
        for (title, lines) in [("SKIPPED", &self.skipped), ("FAILED", &self.failed)] {
            for line in lines {
                text.extend(["\n", title, " ", line]);
            }
        }
        text.trim_end().to_owned() + "\n"
    }

    fn table(&self, (case, limit): (&str, &str), markdown: bool) -> String {
        let rows: Vec<&Row> = self
            .rows
            .iter()
            .filter(|row| (&row.case[..], &row.limit[..]) == (case, limit))
            .collect();
        let title = format!("{case}, beside: {limit}");
        if markdown {
            format!("\n### {title}\n\n{}", as_markdown(&rows))
        } else {
            format!("\n{title}\n{}", as_text(&rows))
        }
    }
}

impl Header {
    pub fn lines(&self) -> Vec<String> {
        let stolen = self.stolen_percent.map_or(String::new(), |percent| {
            format!(", the host took {percent:.1} %")
        });
        let mut lines = vec![
            format!("outbox-relay {} {}", self.relay, self.commit),
            format!(
                "{}, Linux {}, load {}{stolen}",
                self.machine, self.kernel, self.load_average
            ),
            format!("PostgreSQL {}; Kafka {}", self.postgres, self.kafka),
            self.sizes.clone(),
        ];
        if !self.caveats.is_empty() {
            lines.push(format!("NOT FIGURES: {}", self.caveats.join(", ")));
        }
        lines
    }
}

impl Row {
    pub fn relay(&self) -> Spread {
        Spread::of(self.rounds.iter().map(|round| round.relay).collect())
    }

    pub fn limits(&self) -> Spread {
        Spread::of(self.rounds.iter().filter_map(|round| round.limit).collect())
    }

    /// The relay's median / the limit's (their ratios), or what there is of it.
    fn cell(&self) -> String {
        let (relay, limits) = (self.relay(), self.limits());
        if limits.median.is_finite() {
            let [relay, limit] = [relay, limits].map(|spread| number(spread.median));
            format!("{relay} / {limit} ({})", self.ratios().range())
        } else {
            relay.to_string()
        }
    }

    /// Of the ratios of each round, not the ratio of the medians: both of a round saw the same machine.
    pub fn ratios(&self) -> Spread {
        Spread::of(
            self.rounds
                .iter()
                .filter_map(|Round { relay, limit }| Some(relay / (*limit)?))
                .collect(),
        )
    }
}

impl Spread {
    /// Without the median.
    fn range(&self) -> String {
        if self.low < self.high {
            format!("{}..{}", number(self.low), number(self.high))
        } else {
            number(self.median)
        }
    }

    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self {
            low: values.first().copied().unwrap_or(f64::NAN),
            median: median(&values),
            high: values.last().copied().unwrap_or(f64::NAN),
        }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { low, median, high } = self;
        if !median.is_finite() {
            return f.write_str("-");
        }
        f.write_str(&number(*median))?;
        if low < high {
            write!(f, " ({}..{})", number(*low), number(*high))?;
        }
        Ok(())
    }
}

/// The middle one, or the mean of the two in the middle; not a number when there are none.
pub fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    match (values.len() / 2, values.len() % 2) {
        (0, 0) => f64::NAN,
        (half, 1) => values[half],
        (half, _) => f64::midpoint(values[half - 1], values[half]),
    }
}

/// Three digits, and thousands and millions as letters.
pub fn number(value: f64) -> String {
    let (scaled, letter) = match value.abs() {
        v if v >= 999_500.0 => (value / 1e6, "M"),
        v if v >= 9_995.0 => (value / 1e3, "k"),
        _ => (value, ""),
    };
    let digits = match scaled.abs() {
        v if !v.is_finite() => return "-".to_owned(),
        v if v >= 99.95 || v == 0.0 => 0,
        v if v >= 9.995 => 1,
        _ => 2,
    };
    format!("{scaled:.digits$}{letter}")
}

/// A line for each figure.
fn as_text(rows: &[&Row]) -> String {
    let mut lines = vec![["", "figure", "relay", "limit", "ratio"].map(str::to_owned)];
    let mut variant = "";
    for row in rows {
        // Said once for all figures of a variant.
        let name = if row.variant == variant {
            ""
        } else {
            &row.variant
        };
        variant = &row.variant;
        lines.push([
            name.to_owned(),
            row.figure.clone(),
            row.relay().to_string(),
            row.limits().to_string(),
            row.ratios().to_string(),
        ]);
    }
    let width = |column: usize| {
        let cells = lines.iter().map(|line| line[column].chars().count());
        cells.max().unwrap_or_default()
    };
    let widths = [0, 1, 2, 3].map(width);
    lines
        .iter()
        .map(|[variant, figure, relay, limit, ratio]| {
            let [a, b, c, d] = widths;
            let line = format!("{variant:<a$}  {figure:<b$}  {relay:<c$}  {limit:<d$}  {ratio}");
            line.trim_end().to_owned() + "\n"
        })
        .collect()
}

/// A line for each variant, a column for each figure.
fn as_markdown(rows: &[&Row]) -> String {
    let (mut figures, mut lines): (Vec<&str>, Vec<&str>) = (Vec::new(), Vec::new());
    for row in rows {
        if !figures.contains(&&row.figure[..]) {
            figures.push(&row.figure);
        }
        if !lines.contains(&&row.variant[..]) {
            lines.push(&row.variant);
        }
    }
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let head = std::iter::once("").chain(figures.iter().copied());
    let mut text = line(head.map(str::to_owned).collect());
    text += &line(vec!["---".to_owned(); figures.len() + 1]).replace(' ', "");
    for variant in lines {
        let cell = |figure: &&str| {
            let found = rows
                .iter()
                .find(|row| (&row.variant[..], &row.figure[..]) == (variant, *figure));
            found.map_or_else(|| "-".to_owned(), |row| row.cell())
        };
        let cells = std::iter::once(variant.to_owned()).chain(figures.iter().map(cell));
        text += &line(cells.collect());
    }
    text
}
