//! What `status --watch` sees moving: does the backlog shrink, and when is it gone? Pure.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::cli::show;
use crate::ledger::view::{Books, PipelineBooks};

/// Over so many looks.
const LOOKS: usize = 6;

/// When, the newest id, and where the pipelines stood.
type Look = (Instant, i64, Vec<(String, i64)>);

/// What was seen at the last looks.
#[derive(Default)]
pub(super) struct Rates {
    looks: VecDeque<Look>,
}

/// The pipelines with the position of the shard that is furthest behind.
fn positions(books: &Books) -> Vec<(String, i64)> {
    let mut positions: Vec<(String, i64)> = Vec::new();
    for PipelineBooks {
        pipeline, last_id, ..
    } in &books.pipelines
    {
        let Some(last_id) = last_id else { continue };
        match positions.iter_mut().find(|(name, _)| name == pipeline) {
            Some((_, least)) => *least = (*least).min(*last_id),
            None => positions.push((pipeline.clone(), *last_id)),
        }
    }
    positions
}

impl Rates {
    /// A line for each pipeline, from the second look on.
    pub(super) fn look(&mut self, now: Instant, books: &Books) -> Vec<String> {
        let positions = positions(books);
        let newest = books.newest_id;
        let lines = match self.looks.front() {
            Some((since, newest_then, then)) => {
                let time = now.duration_since(*since);
                positions
                    .iter()
                    .filter_map(|(name, at)| {
                        let (_, was) = then.iter().find(|(other, _)| other == name)?;
                        let moved = (newest - newest_then, at - was);
                        Some(format!("{name}: {}", line(moved, newest - at, time)))
                    })
                    .collect()
            }
            None => Vec::new(),
        };
        self.looks.push_back((now, newest, positions));
        if self.looks.len() > LOOKS {
            self.looks.pop_front();
        }
        lines
    }
}

/// In ids, which are events but for gaps.
#[expect(clippy::cast_precision_loss, reason = "for people")]
fn line((came, went): (i64, i64), backlog: i64, time: Duration) -> String {
    let seconds = time.as_secs_f64().max(0.001);
    let (rate_in, rate_out) = (came.max(0) as f64 / seconds, went.max(0) as f64 / seconds);
    let end = match backlog {
        ..=0 => "nothing waits".to_owned(),
        _ if rate_out > rate_in => format!(
            "empty in {}",
            show::age(backlog as f64 / (rate_out - rate_in))
        ),
        _ if rate_out < rate_in => "it grows".to_owned(),
        _ => "it stays".to_owned(),
    };
    format!("in {rate_in:.0}/s, out {rate_out:.0}/s, {end}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backlog_is_empty_when_what_waits_is_gone_faster_than_it_comes() {
        let ten = Duration::from_secs(10);
        let lines = [
            ((200, 34_000), 135_200),
            ((200, 100), 50),
            ((0, 0), 7),
            ((200, 200), 0),
        ]
        .map(|(moved, backlog)| line(moved, backlog, ten));
        assert_eq!(
            lines,
            [
                "in 20/s, out 3400/s, empty in 40 s",
                "in 20/s, out 10/s, it grows",
                "in 0/s, out 0/s, it stays",
                "in 20/s, out 20/s, nothing waits",
            ]
        );
    }
}
