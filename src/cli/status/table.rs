//! The table of `status`: as wide as the terminal, and without a heading that is broken inside a word.

use comfy_table::{Cell, Table};

use super::Seen;
use crate::cli::show;
use crate::ledger::view::{Books, PipelineBooks};
use crate::relay::status::State;

/// Where a terminal has fewer columns, some of the table's are left out.
const NARROW: u16 = 120;
/// Of an owner, in a narrow terminal.
const OWNER_CHARS: usize = 16;

/// `width` is that of the terminal; none where there is none, or it does not say.
pub(super) fn pipelines(seen: &Seen, books: &Books, width: Option<u16>) -> Table {
    let narrow = width.is_some_and(|width| width < NARROW);
    let mut table = if narrow {
        show::table(&["PIPELINE", "STATE", ">BACKLOG", "OLDEST", "PARKED", "OWNER"])
    } else {
        show::table(&[
            "PIPELINE",
            "STATE",
            ">POSITION",
            ">NEWEST",
            ">BACKLOG",
            "OLDEST WAITING",
            "CURSOR MOVED",
            "PARKED",
            "LEASE",
            "OWNER",
        ])
    };
    for row in &books.pipelines {
        table.add_row(if narrow {
            short(seen, row)
        } else {
            long(seen, books, row)
        });
    }
    let known = |name: &String| books.pipelines.iter().any(|row| row.pipeline == *name);
    for name in seen.configured.iter().filter(|name| !known(name)) {
        let mut cells = vec![Cell::new(name), Cell::new("never ran")];
        if !narrow {
            cells.extend([show::number(None), show::number(Some(books.newest_id))]);
        }
        table.add_row(cells);
    }
    table
}

fn short(seen: &Seen, row: &PipelineBooks) -> Vec<Cell> {
    vec![
        Cell::new(row.name()),
        state(seen, row),
        show::number(row.backlog_ids),
        Cell::new(oldest(row)),
        parked(row),
        Cell::new(shortened(&owner(row))),
    ]
}

fn long(seen: &Seen, books: &Books, row: &PipelineBooks) -> Vec<Cell> {
    vec![
        Cell::new(row.name()),
        state(seen, row),
        show::number(row.last_id),
        show::number(Some(books.newest_id)),
        show::number(row.backlog_ids),
        Cell::new(oldest(row)),
        Cell::new(
            row.cursor_age_seconds
                .filter(|_| row.last_id.is_some())
                .map_or("never".to_owned(), |age| format!("{} ago", show::age(age))),
        ),
        parked(row),
        Cell::new(
            row.owner
                .as_ref()
                .map_or("-".to_owned(), |o| show::age(o.lease_ends_in_seconds)),
        ),
        Cell::new(owner(row)),
    ]
}

fn owner(row: &PipelineBooks) -> String {
    row.owner
        .as_ref()
        .map_or("-".to_owned(), |owner| show::plain(&owner.holder))
}

/// Without its middle: the host begins it, and what tells two of a host apart ends it.
fn shortened(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    if chars.len() <= OWNER_CHARS {
        return text.to_owned();
    }
    let half = OWNER_CHARS / 2;
    let begin: String = chars[..half - 1].iter().collect();
    let end: String = chars[chars.len() - half..].iter().collect();
    format!("{begin}…{end}")
}

fn state(seen: &Seen, row: &PipelineBooks) -> Cell {
    use comfy_table::Color::{Green, Red, Yellow};
    // Of a relay elsewhere nothing is known but that it renews its lease.
    let elsewhere = match (&row.owner, &row.paused) {
        (Some(_), Some(_)) => ("pausing", Yellow),
        (Some(_), None) => ("owned", Green),
        (None, Some(_)) => ("PAUSED", Yellow),
        (None, None) => ("no owner", Red),
    };
    let (text, colour) = match seen.state(row) {
        Some(State::Running) if row.paused.is_some() => ("pausing", Yellow),
        Some(State::Running) => ("running", Green),
        Some(State::Standby { .. }) => ("standby here", Green),
        Some(State::Starting) => ("starting", Yellow),
        Some(State::Stalled { .. }) => ("STALLED", Red),
        Some(State::Halted { .. }) => ("HALTED", Red),
        Some(State::Paused { .. }) => ("PAUSED", Yellow),
        Some(State::Stopped) => ("stopped", Yellow),
        None => elsewhere,
    };
    Cell::new(text).fg(colour)
}

fn oldest(row: &PipelineBooks) -> String {
    match (
        row.oldest_unpublished_seconds,
        &row.oldest_unpublished_unknown,
    ) {
        (_, Some(_)) => "unknown".to_owned(),
        (Some(seconds), None) => show::age(seconds),
        (None, None) => "-".to_owned(),
    }
}

fn parked(row: &PipelineBooks) -> Cell {
    let cell = Cell::new(show::parked(row));
    match row.parked_events {
        0 => cell,
        _ => cell.fg(comfy_table::Color::Yellow),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::view::{LogSize, Owner};

    fn shown(width: Option<u16>) -> String {
        let row = |pipeline: &str| PipelineBooks {
            pipeline: pipeline.to_owned(),
            shard: 0,
            shards: 1,
            last_id: Some(1_234_567),
            backlog_ids: Some(1_000_000),
            owner: Some(Owner {
                holder: "relay-7d9f:65772:26b06ee5".to_owned(),
                lease_ends_in_seconds: 9.9,
            }),
            cursor_age_seconds: Some(1320.0),
            oldest_unpublished_seconds: Some(95.0),
            oldest_unpublished_unknown: None,
            parked_events: 5,
            parked_entities: 2,
            dead_letters: 0,
            paused: None,
            moved: None,
        };
        let books = Books {
            retained: crate::ledger::view::Retained::default(),
            newest_id: 2_234_567,
            pipelines: vec![row("main"), row("audit")],
            relays: Vec::new(),
            log: LogSize {
                bytes: 0,
                oldest_seconds: None,
                growth: None,
            },
            server: None,
        };
        let seen = Seen {
            configured: vec!["main".to_owned(), "new".to_owned()],
            books: None,
            books_trouble: None,
            daemon: None,
            daemon_trouble: None,
        };
        let mut table = pipelines(&seen, &books, width);
        show::fit(&mut table, width);
        table.trim_fmt()
    }

    #[test]
    fn the_table_fits_eighty_columns_and_no_heading_is_broken() {
        for width in [Some(60), Some(80), Some(100), Some(120), Some(200), None] {
            let text = shown(width);
            let heading = text.lines().next().unwrap();
            for word in ["PIPELINE", "STATE", "BACKLOG", "OLDEST", "PARKED", "OWNER"] {
                assert!(heading.contains(word), "{width:?}:\n{text}");
            }
        }
        let text = shown(Some(80));
        assert_eq!(text.lines().count(), 4, "{text}");
        for line in text.lines() {
            assert!(line.chars().count() <= 80, "{text}");
        }
        assert!(text.contains("5 (2 entities)"), "{text}");
        assert!(text.contains("relay-7…26b06ee5"), "{text}");
        // A terminal that does not tell its width is not one of a single column.
        assert_eq!(shown(None).lines().count(), 4);
    }
}
