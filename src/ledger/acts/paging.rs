//! Lists in pages: how many rows one has, and where it begins.

use std::fmt;
use std::str::FromStr;

use super::{Dialect, ParkedEvent, literal};

/// One page of parked events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paging {
    /// Events, at most.
    pub limit: u32,
    /// The page begins after this place; none: with the first event.
    pub after: Option<Place>,
}

impl Paging {
    /// The first page.
    #[must_use]
    pub fn first(limit: u32) -> Self {
        Self { limit, after: None }
    }

    /// Empty, or `and …` on the parked event `p`.
    pub(super) fn condition(&self, dialect: Dialect) -> String {
        let Some(Place {
            parked_at_us,
            pipeline,
            id,
        }) = &self.after
        else {
            return String::new();
        };
        let parked_at = match dialect {
            Dialect::Postgres => {
                format!("timestamptz 'epoch' + {parked_at_us} * interval '1 microsecond'")
            }
            Dialect::Sqlite => parked_at_us.to_string(),
        };
        format!(
            "and (p.parked_at, p.pipeline, p.id) > ({parked_at}, {}, {id})",
            literal(pipeline)
        )
    }

    /// Where the page after this one begins; none when this one is the last.
    pub(super) fn next(&self, events: &[ParkedEvent]) -> Option<Place> {
        let full = usize::try_from(self.limit).is_ok_and(|limit| events.len() >= limit);
        let last = events.last().filter(|_| full)?;
        Some(Place {
            parked_at_us: last.parked_at_us,
            pipeline: last.pipeline.clone(),
            id: last.id,
        })
    }
}

/// The place of an event in the list of parked events, which is ordered by the time of parking. As text
/// `TIME.ID.PIPELINE`, with the time in microseconds since the Unix epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    parked_at_us: i64,
    pipeline: String,
    id: i64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.parked_at_us, self.id, self.pipeline)
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let mut parts = text.splitn(3, '.');
            Some(Self {
                parked_at_us: parts.next()?.parse().ok()?,
                id: parts.next()?.parse().ok()?,
                pipeline: parts.next()?.to_owned(),
            })
        };
        parse()
            .filter(|place| !place.pipeline.contains('\0'))
            .ok_or_else(|| format!("{text:?} is not the \"next\" of a page"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_read_as_it_is_written() {
        for text in ["1800000000000000.-17.main", "0.9.a.b"] {
            assert_eq!(text.parse::<Place>().unwrap().to_string(), text);
        }
        for wrong in ["", "17", "1.2", "x.2.main", "1.2.ma\0in"] {
            assert!(wrong.parse::<Place>().is_err(), "{wrong:?}");
        }
    }
}
