//! Reads a log as the relay does: pages, acknowledgements of what is done with, crashes, and the next life.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use outbox_relay::event::{Event, Payload, Start};
use outbox_relay::ledger::{Acquired, Fenced, Ledger};
use outbox_relay::position::{Position, Window};
use outbox_relay::source::{Page, PageLimits, Source};
use tokio::time::{Instant, sleep, timeout};

use super::database::Database;
use super::oracle::{Delivery, Fault, Token, Written};
use super::writers::{Journal, Random};

/// What a reader was given, and how it lived.
#[derive(Default)]
pub(crate) struct Read {
    pub(crate) deliveries: Vec<Delivery>,
    pub(crate) faults: Vec<Fault>,
    pub(crate) lives: usize,
    pub(crate) windows: usize,
    pub(crate) pages: usize,
    /// Events that came below the floor of their window: their transactions ended late.
    pub(crate) late: usize,
}

impl Read {
    /// Takes down a page, and returns the places after each of its events.
    fn page(
        &mut self,
        page: &Page,
        life: &mut Life,
        again: &mut VecDeque<(i64, Token)>,
    ) -> Vec<Position> {
        let window = &page.end.window;
        let number = life.window(window);
        for event in &page.events {
            let (token, written) = decode(event);
            let got = (event.id.0, token);
            if let Some(expected) = again.pop_front()
                && expected != got
            {
                let fault = format!("{expected:?} came as {got:?}");
                self.faults.push(Fault::NotTheSameAgain(fault));
                again.clear();
            }
            self.late += usize::from(event.id <= window.floor);
            life.places.push((number, event.id.0, token));
            self.deliveries.push(Delivery {
                life: self.lives,
                token,
                written,
                acknowledged: false,
            });
        }
        if page.events.is_empty() && !again.is_empty() {
            let fault = format!("{} are missing", again.len());
            self.faults.push(Fault::NotTheSameAgain(fault));
            again.clear();
        }
        let place = |event: &Event| Position {
            window: window.clone(),
            last_id: event.id,
        };
        page.events.iter().map(place).collect()
    }
}

/// One life: what was read in it, by place, so that the next life can tell what it may be given again.
struct Life {
    /// In the order in which they were opened; the first is the one of the durable position.
    windows: Vec<Arc<Window>>,
    /// Window (by number), id and token of each delivery.
    places: Vec<(usize, i64, Token)>,
    first_delivery: usize,
}

impl Life {
    fn window(&mut self, window: &Arc<Window>) -> usize {
        if self.windows.last() != Some(window) {
            self.windows.push(window.clone());
        }
        self.windows.len() - 1
    }

    fn number(&self, position: &Position) -> usize {
        self.windows
            .iter()
            .rposition(|window| *window == position.window)
            .expect("the durable position is one that this reader wrote")
    }
}

/// Reads until everything that was committed has come, or nothing comes any more.
pub(crate) async fn read<S: Source>(
    database: &Database,
    journal: &Journal,
    seed: u64,
    mut make: impl FnMut() -> S,
) -> Read {
    let mut random = Random::new(seed ^ 0x5eed);
    let mut read = Read::default();
    let mut before: Option<Life> = None;
    loop {
        read.lives += 1;
        let mut ledger = database.ledger(Start::Earliest);
        let Acquired::Ours(tenure) = ledger.acquire().await.expect("acquire") else {
            panic!("nobody else is here");
        };
        let mut again = match &before {
            Some(life) => carry_over(&mut read, life, &tenure.position),
            None => VecDeque::new(),
        };
        let mut source = make();
        source.seek(tenure.position.clone());
        let mut life = Life {
            windows: vec![tenure.position.window.clone()],
            places: Vec::new(),
            first_delivery: read.deliveries.len(),
        };
        let dies = live(
            &mut read,
            &mut life,
            &mut again,
            &mut source,
            &mut ledger,
            tenure.position,
            journal,
            &mut random,
        )
        .await;
        read.windows += life.windows.len() - 1;
        if !dies {
            return read;
        }
        before = Some(life);
    }
}

/// Marks what the durable position has passed, and returns what must come first now: the rest of its window, as it was.
fn carry_over(read: &mut Read, life: &Life, durable: &Position) -> VecDeque<(i64, Token)> {
    let number = life.number(durable);
    let mut again = VecDeque::new();
    for (n, (window, id, token)) in life.places.iter().enumerate() {
        let covered = *window < number || (*window == number && *id <= durable.last_id.0);
        read.deliveries[life.first_delivery + n].acknowledged = covered;
        if *window == number && !covered {
            again.push_back((*id, *token));
        }
    }
    again
}

#[expect(
    clippy::too_many_arguments,
    reason = "the state of a life, in the open"
)]
async fn live<S: Source>(
    read: &mut Read,
    life: &mut Life,
    again: &mut VecDeque<(i64, Token)>,
    source: &mut S,
    ledger: &mut impl Ledger,
    durable: Position,
    journal: &Journal,
    random: &mut Random,
) -> bool {
    let mut acknowledged = durable;
    let mut in_flight: VecDeque<Position> = VecDeque::new();
    let mut missing = Missing::default();
    let mut pages_left = 20 + random.below(400);
    loop {
        let rows_max = if random.chance(50) { 5 } else { 400 };
        let limits = PageLimits {
            rows: 1 + random.index(rows_max),
            bytes: if random.chance(5) { 2_000 } else { 1_000_000 },
        };
        let capture = source.capture(limits, &acknowledged);
        let page = if random.chance(2) {
            // Cancelled in the middle: it must be as if it had never begun.
            match timeout(Duration::from_micros(random.below(2_000)), capture).await {
                Ok(page) => page,
                Err(_) => continue,
            }
        } else {
            capture.await
        };
        let page = page.unwrap_or_else(|error| panic!("capture: {error:#}"));
        read.pages += 1;
        if !page.events.is_empty() {
            missing = Missing::default();
        }
        for place in read.page(&page, life, again) {
            if random.chance(10) {
                in_flight.push_back(place);
            }
        }
        // The end of an empty page may be acknowledged as well; the relay has no need to.
        if !page.events.is_empty() || random.chance(5) {
            in_flight.push_back(page.end.clone());
        }
        if !in_flight.is_empty() && random.chance(40) {
            let up_to = random.index(in_flight.len());
            let position = in_flight.drain(..=up_to).next_back().expect("one at least");
            let acknowledge = ledger.acknowledge(&position);
            if random.chance(2) {
                // Nobody knows whether this was written: the life ends, as the relay's does.
                let within = Duration::from_micros(random.below(1_000));
                if timeout(within, acknowledge).await.is_err() {
                    return true;
                }
            } else {
                assert_eq!(acknowledge.await.expect("acknowledge"), Fenced::Written);
            }
            acknowledged = position;
        }
        // The last life lives until it has waited long enough for what does not come, however quick its looks are.
        if !journal.finished() {
            pages_left -= 1;
        }
        if pages_left == 0 {
            return true;
        }
        if page.events.is_empty() && missing.is_over(journal, read) {
            return false;
        }
        if !page.more {
            // A hint only: sometimes waited for, sometimes not.
            tokio::select! {
                () = source.wake() => {}
                () = sleep(Duration::from_millis(random.below(6))) => {}
            }
        }
    }
}

/// When to stop looking for what has not come.
#[derive(Default)]
struct Missing {
    empty_since: Option<Instant>,
    empty: usize,
}

impl Missing {
    /// After an empty page: whether everything came (and some more looks found nothing twice), or nothing comes any more.
    fn is_over(&mut self, journal: &Journal, read: &Read) -> bool {
        if !journal.finished() {
            return false;
        }
        self.empty += 1;
        if self.empty < 10 {
            return false;
        }
        let since = *self.empty_since.get_or_insert_with(Instant::now);
        if since.elapsed() > Duration::from_secs(2) {
            return true;
        }
        let mut committed = journal.committed();
        for delivery in &read.deliveries {
            committed.remove(&delivery.token);
        }
        committed.is_empty()
    }
}

/// What the writer wrote into the payload.
pub(crate) fn decode(event: &Event) -> (Token, Written) {
    let Payload::Json(json) = &event.payload else {
        panic!("writers write JSON");
    };
    let value: serde_json::Value = serde_json::from_slice(json).expect("JSON");
    let field = |name: &str| value[name].as_u64().expect("a number");
    let written = Written {
        entity: event.aggregate_id.to_string(),
        change: field("change"),
        part: field("part"),
    };
    (field("token"), written)
}
