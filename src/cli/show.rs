//! How the commands show things: tables, ages, colours where a terminal is.

use anstyle::{AnsiColor, Style};
use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};

use crate::ledger::view::PipelineBooks;

pub(super) const BOLD: Style = Style::new().bold();
pub(super) const RED: Style = AnsiColor::Red.on_default().bold();
pub(super) const YELLOW: Style = AnsiColor::Yellow.on_default();
pub(super) const GREEN: Style = AnsiColor::Green.on_default();
pub(super) const DIM: Style = Style::new().dimmed();

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

pub(super) fn print_table(table: &mut Table) {
    // A margin on the left would only make the first column hard to select.
    if let Some(first) = table.column_mut(0) {
        first.set_padding((0, 1));
    }
    anstream::println!("{}", table.trim_fmt());
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
