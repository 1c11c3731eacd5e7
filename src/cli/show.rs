//! How the commands show things: tables, ages, colours where a terminal is.

use std::io::{ErrorKind, Write};
use std::os::fd::AsFd;
use std::process::exit;
use std::time::{Duration, UNIX_EPOCH};

use anstyle::{AnsiColor, Style};
use comfy_table::{
    Cell, CellAlignment, ColumnConstraint, ContentArrangement, Table, Width, presets,
};

use tokio::io::Interest;
use tokio::net::unix::pipe::Sender;

use crate::ledger::view::PipelineBooks;

pub(super) const BOLD: Style = Style::new().bold();
pub(super) const RED: Style = AnsiColor::Red.on_default().bold();
pub(super) const YELLOW: Style = AnsiColor::Yellow.on_default();
pub(super) const GREEN: Style = AnsiColor::Green.on_default();
pub(super) const DIM: Style = Style::new().dimmed();

/// Prints a line. Nobody reads on where a pipe is closed, as `… | head` does: that ends the program and is no error.
macro_rules! say {
    ($($text:tt)*) => { $crate::cli::show::print_line(format_args!($($text)*)) };
}
pub(super) use say;

pub(super) fn print_line(line: std::fmt::Arguments<'_>) {
    match writeln!(anstream::stdout(), "{line}") {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => exit(0),
        // A full disk behind a redirection.
        Err(error) => {
            anstream::eprintln!("outbox-relay: write to the standard output: {error}");
            exit(1);
        }
        Ok(()) => {}
    }
}

/// Waits until nobody reads the standard output any more; for ever where it is no pipe.
pub(super) async fn closed() {
    if let Ok(out) = std::io::stdout().as_fd().try_clone_to_owned()
        && let Ok(out) = Sender::from_owned_fd_unchecked(out)
        && out.ready(Interest::ERROR).await.is_ok()
    {
        return;
    }
    std::future::pending::<()>().await;
}

/// A point in time, as in 2026-01-31T10:00:00.123456Z.
pub(super) fn moment(us: i64) -> String {
    match u64::try_from(us) {
        // To the end of the year 9999.
        Ok(us) if us < 253_402_300_800_000_000 => {
            humantime::format_rfc3339_micros(UNIX_EPOCH + Duration::from_micros(us)).to_string()
        }
        _ => format!("{us} us"),
    }
}

/// A table without lines, so that it can be cut and searched by other programs too. A name that begins with `>` stands
/// over numbers.
pub(super) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(header.iter().map(|name| match name.strip_prefix('>') {
            Some(name) => Cell::new(name).set_alignment(CellAlignment::Right),
            None => Cell::new(name),
        }));
    table
}

/// How wide the terminal is; none where there is none, and where it says 0, as serial consoles and `docker exec -t` do.
pub(super) fn width() -> Option<u16> {
    Table::new().width().filter(|width| *width > 0)
}

/// Breaks long cells so that the table has this width, and no heading inside a word.
pub(super) fn fit(table: &mut Table, width: Option<u16>) {
    let Some(width) = width else {
        table.set_content_arrangement(ContentArrangement::Disabled);
        return;
    };
    table.set_width(width);
    let headings: Vec<u16> = table.header().map_or(Vec::new(), |header| {
        let longest = |cell: &Cell| {
            let content = cell.content();
            let words = content.split(' ').map(|word| word.chars().count());
            words.max().unwrap_or_default()
        };
        let cells = header.cell_iter();
        cells
            .map(|cell| u16::try_from(longest(cell)).unwrap_or(u16::MAX))
            .collect()
    });
    for (column, heading) in table.column_iter_mut().zip(headings) {
        let (left, right) = (1, 1);
        column.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(
            heading + left + right,
        )));
    }
}

pub(super) fn print_table(table: &mut Table) {
    // A margin on the left would only make the first column hard to select.
    if let Some(first) = table.column_mut(0) {
        first.set_padding((0, 1));
    }
    fit(table, width());
    say!("{}", table.trim_fmt());
}

pub(super) fn number(value: Option<i64>) -> Cell {
    Cell::new(value.map_or("-".to_owned(), |value| value.to_string()))
        .set_alignment(CellAlignment::Right)
}

/// `1 event`, `2 events`; the word is the singular of a regular noun.
pub(super) fn count(number: impl Into<i64>, word: &str) -> String {
    let number = number.into();
    let word = match word.strip_suffix('y') {
        _ if number == 1 => word.to_owned(),
        Some(stem) => format!("{stem}ies"),
        None => format!("{word}s"),
    };
    format!("{number} {word}")
}

/// Parked events and their entities.
pub(super) fn parked(row: &PipelineBooks) -> String {
    match row.parked_events {
        0 => "-".to_owned(),
        events => format!("{events} ({})", count(row.parked_entities, "entity")),
    }
}

/// Text that others wrote: without control characters, which a terminal would obey.
pub(super) fn plain(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let escaped = c.is_control().then(|| c.escape_default());
            let kept = escaped.is_none().then_some(c);
            escaped.into_iter().flatten().chain(kept)
        })
        .collect()
}

/// A length of time with as much precision as a person wants.
pub(super) fn age(seconds: f64) -> String {
    let seconds = seconds.max(0.0);
    if seconds < 10.0 {
        format!("{seconds:.1} s")
    } else if seconds < 120.0 {
        format!("{seconds:.0} s")
    } else if seconds < 7200.0 {
        format!("{:.0} min", seconds / 60.0)
    } else if seconds < 172_800.0 {
        format!("{:.0} h", seconds / 3600.0)
    } else {
        format!("{:.0} d", seconds / 86_400.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_short() {
        let ages: Vec<String> = [0.04, 9.96, 75.0, 600.0, 86_400.0, 864_000.0]
            .map(age)
            .into();
        assert_eq!(ages, ["0.0 s", "10.0 s", "75 s", "10 min", "24 h", "10 d"]);
    }

    #[test]
    fn a_terminal_gets_no_orders_from_the_data() {
        assert_eq!(plain("a\u{1b}[2Jb\nä"), "a\\u{1b}[2Jb\\nä");
    }
}
