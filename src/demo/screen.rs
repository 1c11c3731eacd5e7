//! Shows the demo: commits on the left, what a consumer receives on the right, numbers below. Or plain lines.

use std::collections::VecDeque;
use std::io::{self, BufWriter, Stdout, Write};
use std::time::Duration;

use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::symbols::{self, border::Set};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Borders, Paragraph};
use ratatui::{DefaultTerminal, Frame};

use super::Latency;
use super::checker::Seen;
use super::shop::{Kind, Transaction};

/// More lines than a screen has.
const LINES_KEPT: usize = 200;

const HINT: &str = "Ctrl-C: to the summary ";

/// What stands below.
#[derive(Clone, Debug, Default)]
pub(super) struct Numbers {
    pub(super) wanted: u64,
    pub(super) committed: u64,
    pub(super) published: u64,
    pub(super) consumed: u64,
    /// Transactions.
    pub(super) transactions: u64,
    /// Transactions.
    pub(super) rolled_back: u64,
    pub(super) per_second: u64,
    pub(super) latency: Option<Latency>,
    pub(super) elapsed: Duration,
    /// Nothing more is sold.
    pub(super) closing: bool,
    /// What the relay complains about.
    pub(super) trouble: Option<String>,
}

/// Where the demo is shown.
pub(super) enum Screen {
    Full(Box<Full>),
    Plain(Plain),
}

impl Screen {
    /// `path` says where events come from and go to.
    pub(super) fn open(plain: bool, path: String) -> io::Result<Self> {
        Ok(if plain {
            let mut out = BufWriter::new(io::stdout());
            writeln!(out, "demo  {path}")?;
            Self::Plain(Plain {
                out,
                told_at: Duration::ZERO,
                trouble: None,
            })
        } else {
            Self::Full(Box::new(Full {
                terminal: ratatui::try_init()?,
                picture: Picture {
                    path,
                    commits: VecDeque::new(),
                    topics: [const { VecDeque::new() }; 3],
                    received: [0; 3],
                },
            }))
        })
    }

    /// A transaction has ended.
    pub(super) fn ended(&mut self, transaction: &Transaction) -> io::Result<()> {
        match self {
            Self::Full(full) => full.picture.ended(transaction),
            Self::Plain(plain) => plain.ended(transaction)?,
        }
        Ok(())
    }

    /// A consumer has received a record.
    pub(super) fn seen(&mut self, seen: &Seen) -> io::Result<()> {
        match self {
            Self::Full(full) => full.picture.seen(seen),
            Self::Plain(plain) => plain.seen(seen)?,
        }
        Ok(())
    }

    /// A dozen times a second.
    pub(super) fn draw(&mut self, numbers: &Numbers) -> io::Result<()> {
        match self {
            Self::Full(full) => {
                let Full { terminal, picture } = &mut **full;
                terminal.draw(|frame| picture.draw(frame, numbers))?;
            }
            Self::Plain(plain) => plain.tell(numbers)?,
        }
        Ok(())
    }

    /// How often Ctrl-C was pressed where it is a key like any other.
    pub(super) fn interrupts(&mut self) -> io::Result<usize> {
        let mut interrupts = 0;
        if matches!(self, Self::Full(_)) {
            while event::poll(Duration::ZERO)? {
                if let Event::Key(key) = event::read()? {
                    let control_c = key.code == KeyCode::Char('c')
                        && key.modifiers.contains(KeyModifiers::CONTROL);
                    let quit = matches!(key.code, KeyCode::Char('q') | KeyCode::Esc);
                    let pressed = key.kind == KeyEventKind::Press;
                    interrupts += usize::from(pressed && (control_c || quit));
                }
            }
        }
        Ok(interrupts)
    }
}

/// Lines for a file or a pipe: two columns told apart by their first word.
pub(super) struct Plain {
    out: BufWriter<Stdout>,
    told_at: Duration,
    trouble: Option<String>,
}

impl Plain {
    fn ended(&mut self, transaction: &Transaction) -> io::Result<()> {
        let number = transaction.number;
        let changes: Vec<String> = transaction
            .changes
            .iter()
            .map(|change| format!("{} {}", change.entity, change.event_type))
            .collect();
        let changes = changes.join(", ");
        match transaction.refusal {
            None => writeln!(self.out, "commit {number}  {changes}"),
            Some(reason) => writeln!(self.out, "rollback {number}  {changes} ({reason})"),
        }
    }

    fn seen(&mut self, seen: &Seen) -> io::Result<()> {
        let Seen {
            partition,
            offset,
            event_type,
            ..
        } = seen;
        match seen.entity {
            Some(entity) => writeln!(
                self.out,
                "{}[{partition}]@{offset}  {} {event_type}",
                entity.kind.name(),
                entity.number
            ),
            None => writeln!(self.out, "?[{partition}]@{offset}  {event_type}"),
        }
    }

    fn tell(&mut self, numbers: &Numbers) -> io::Result<()> {
        if self.trouble != numbers.trouble {
            self.trouble.clone_from(&numbers.trouble);
            if let Some(trouble) = &self.trouble {
                writeln!(self.out, "relay  {trouble}")?;
            }
        }
        if numbers.elapsed >= self.told_at + Duration::from_secs(1) {
            self.told_at = numbers.elapsed;
            writeln!(
                self.out,
                "status  {} committed, {} published, {} consumed, {} rolled back, {}/s",
                numbers.committed,
                numbers.published,
                numbers.consumed,
                numbers.rolled_back,
                numbers.per_second
            )?;
        }
        self.out.flush()
    }
}

/// A terminal, whole and for itself; dropping it gives it back as it was.
pub(super) struct Full {
    terminal: DefaultTerminal,
    picture: Picture,
}

impl Drop for Full {
    fn drop(&mut self) {
        // Nothing to be done about a terminal that is gone.
        let _ = ratatui::try_restore();
    }
}

/// What is on the screen but for the numbers.
struct Picture {
    path: String,
    commits: VecDeque<Line<'static>>,
    topics: [VecDeque<Line<'static>>; 3],
    received: [u64; 3],
}

fn dim() -> Style {
    Style::new().fg(Color::DarkGray)
}

fn color(kind: Kind) -> Color {
    match kind {
        Kind::Customer => Color::Cyan,
        Kind::Product => Color::Yellow,
        Kind::Order => Color::Green,
    }
}

impl Picture {
    fn ended(&mut self, transaction: &Transaction) {
        let last = transaction.changes.len() - 1;
        for (index, change) in transaction.changes.iter().enumerate() {
            let branch = match (index, last) {
                (0, _) if transaction.refusal.is_some() => "✗",
                (0, 0) => "─",
                (0, _) => "┬",
                (index, last) if index == last => "└",
                _ => "├",
            };
            let number = match index {
                0 => format!(" {:>5} ", transaction.number),
                _ => " ".repeat(7),
            };
            let event = format!("{} {}", change.entity, change.event_type);
            let mut line = Line::from(vec![number.fg(Color::DarkGray)]);
            line.push_span(match branch {
                "✗" => branch.fg(Color::Red),
                _ => branch.fg(Color::DarkGray),
            });
            line.push_span(" ");
            match transaction.refusal {
                None => {
                    line.push_span(change.entity.kind.name().fg(color(change.entity.kind)));
                    line.push_span(format!(" {} {}", change.entity.number, change.event_type));
                }
                Some(reason) => {
                    line.push_span(event.fg(Color::Red).dim().crossed_out());
                    if index == 0 {
                        line.push_span(format!("  {reason}").fg(Color::Red));
                    }
                }
            }
            keep(&mut self.commits, line);
        }
    }

    fn seen(&mut self, seen: &Seen) {
        let Some(entity) = seen.entity else { return };
        self.received[entity.kind as usize] += 1;
        let line = Line::from(vec![
            format!(" [{}]@{:<6}", seen.partition, seen.offset).fg(Color::DarkGray),
            format!("{:>6}", entity.number).fg(color(entity.kind)),
            format!("  {}", seen.event_type).into(),
        ]);
        keep(&mut self.topics[entity.kind as usize], line);
    }

    fn draw(&self, frame: &mut Frame<'_>, numbers: &Numbers) {
        let [head, body, bar, counts, speeds] = Layout::vertical([
            Constraint::Length(2),
            Constraint::Min(3),
            Constraint::Length(1),
            Constraint::Length(1),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        let [left, right] =
            Layout::horizontal([Constraint::Percentage(55), Constraint::Percentage(45)])
                .areas(body);
        self.draw_head(frame, head, numbers);
        let block = titled("the shop commits".bold().into(), "transaction, events");
        draw_lines(frame, left, block, &self.commits);
        let [customer, product, order] = Layout::vertical([
            Constraint::Fill(3),
            Constraint::Fill(4),
            Constraint::Fill(5),
        ])
        .areas(right);
        for (kind, area) in Kind::ALL.into_iter().zip([customer, product, order]) {
            let name = Line::from(vec![
                "topic ".fg(Color::DarkGray),
                kind.name().fg(color(kind)).bold(),
            ]);
            let corner = if kind == Kind::ALL[0] { "┬" } else { "├" };
            let block = titled(name, &grouped(self.received[kind as usize]))
                .borders(Borders::TOP | Borders::LEFT)
                .border_set(Set {
                    top_left: corner,
                    ..symbols::border::PLAIN
                });
            draw_lines(frame, area, block, &self.topics[kind as usize]);
        }
        draw_bar(frame, bar, numbers);
        draw_numbers(frame, counts, speeds, numbers);
    }

    fn draw_head(&self, frame: &mut Frame<'_>, area: Rect, numbers: &Numbers) {
        let title = Line::from(vec![
            " outbox-relay demo".bold(),
            format!("   {}", self.path).fg(Color::DarkGray),
        ]);
        let seconds = numbers.elapsed.as_secs();
        let clock = format!("{:02}:{:02} ", seconds / 60, seconds % 60);
        frame.render_widget(title, area);
        frame.render_widget(Line::from(clock).style(dim()).right_aligned(), area);
    }
}

fn keep(lines: &mut VecDeque<Line<'static>>, line: Line<'static>) {
    if lines.len() == LINES_KEPT {
        lines.pop_front();
    }
    lines.push_back(line);
}

fn titled(name: Line<'static>, note: &str) -> Block<'static> {
    let mut title = Line::from(" ");
    title.extend(name);
    title.push_span(" ");
    Block::new()
        .borders(Borders::TOP)
        .border_style(dim())
        .title_top(title)
        .title_top(Line::from(format!(" {note} ")).style(dim()).right_aligned())
}

/// The newest lines that there is room for, the newest at the bottom.
fn draw_lines(
    frame: &mut Frame<'_>,
    area: Rect,
    block: Block<'_>,
    lines: &VecDeque<Line<'static>>,
) {
    let room = usize::from(block.inner(area).height);
    let newest = lines.iter().skip(lines.len().saturating_sub(room));
    let text: Vec<Line<'_>> = newest.cloned().collect();
    frame.render_widget(Paragraph::new(text).block(block), area);
}

fn draw_bar(frame: &mut Frame<'_>, area: Rect, numbers: &Numbers) {
    let width = u64::from(area.width);
    let cells = |events: u64| -> usize {
        let cells = events.min(numbers.wanted) * width / numbers.wanted.max(1);
        usize::try_from(cells).unwrap_or(0)
    };
    let done = cells(numbers.consumed);
    let line = Line::from(vec![
        "━".repeat(done).fg(Color::Green),
        "─"
            .repeat(usize::from(area.width) - done)
            .fg(Color::DarkGray),
    ]);
    frame.render_widget(line, area);
}

fn draw_numbers(frame: &mut Frame<'_>, counts: Rect, speeds: Rect, numbers: &Numbers) {
    let line = Line::from(vec![
        " committed ".fg(Color::DarkGray),
        grouped(numbers.committed).bold(),
        "   published ".fg(Color::DarkGray),
        grouped(numbers.published).bold(),
        "   consumed ".fg(Color::DarkGray),
        grouped(numbers.consumed).bold(),
        "   rolled back ".fg(Color::DarkGray),
        grouped(numbers.rolled_back).fg(Color::Red),
    ]);
    frame.render_widget(line, counts);
    if let Some(trouble) = &numbers.trouble {
        let line = Line::from(format!(" the relay: {trouble}")).fg(Color::Red);
        frame.render_widget(line, speeds);
        return;
    }
    let mut line = Line::from(vec![
        format!(" {}/s", grouped(numbers.per_second)).bold(),
        "   commit to consume ".fg(Color::DarkGray),
    ]);
    if let Some(Latency { p50, p99 }) = numbers.latency {
        line.extend([
            Span::from("p50 ").fg(Color::DarkGray),
            milliseconds(p50).bold(),
            "  p99 ".fg(Color::DarkGray),
            milliseconds(p99).bold(),
        ]);
    }
    let line_width = line.width();
    frame.render_widget(line, speeds);
    if usize::from(speeds.width) < line_width + HINT.len() {
        return;
    }
    let hint = if numbers.closing {
        "reading to the end "
    } else {
        HINT
    };
    frame.render_widget(Line::from(hint).style(dim()).right_aligned(), speeds);
}

/// `4 ms`, or `0.8 ms` where whole ones say too little.
pub(crate) fn milliseconds(time: Duration) -> String {
    let ms = time.as_secs_f64() * 1000.0;
    if ms < 10.0 {
        format!("{ms:.1} ms")
    } else {
        format!("{ms:.0} ms")
    }
}

/// `12,345`.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
