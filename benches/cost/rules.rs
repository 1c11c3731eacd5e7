//! The pure stages, one at a time, over the same events again and again.

use std::hint::black_box;

use anyhow::{Context, Error, bail, ensure};
use outbox_relay::encode::{Texts, encode};
use outbox_relay::event::{Event, EventId, Seq};
use outbox_relay::order::{InFlight, Waiting};
use outbox_relay::position::Position;
use outbox_relay::relay::{Pipeline, Settings};
use outbox_relay::source::EVENT_BYTES_MAX;
use outbox_relay::source::postgres::row::{Decoder, Row};

use crate::recording::RecordedRow;

/// As many events as the loop hands over before it looks at receipts.
const AT_ONCE: usize = 512;

/// Reads the events of one answer.
///
/// # Errors
/// When something else is in it.
pub fn decode(rows: &[RecordedRow]) -> Result<Vec<Event>, Error> {
    let mut decoder = Decoder::new(EVENT_BYTES_MAX);
    let mut events = Vec::with_capacity(rows.len());
    for row in rows {
        match decoder.decode(&row.fields())? {
            Row::Event(event) => events.push(event),
            row @ Row::LongNames(_) => bail!("{row:?}"),
        }
    }
    Ok(events)
}

pub fn decode_all(rows: &[RecordedRow], rounds: usize) -> Result<(), Error> {
    for _ in 0..rounds {
        let events = decode(black_box(rows))?;
        ensure!(events.len() == rows.len(), "rows are missing");
        black_box(events);
    }
    Ok(())
}

pub fn order(events: &[Event], settings: &Settings, rounds: usize) -> Result<(), Error> {
    let waiting = Waiting::default();
    let mut in_flight = InFlight::new(settings.in_flight_rows, settings.in_flight_bytes);
    for _ in 0..rounds {
        let end = Position {
            last_id: EventId(i64::try_from(events.len())?),
            ..Position::beginning()
        };
        in_flight.begin_page(events.len(), end.clone());
        let mut settled = None;
        for batch in black_box(events).chunks(AT_ONCE) {
            let first = in_flight.next_seq();
            for event in batch {
                let bytes = event.size_bytes();
                ensure!(
                    in_flight.has_room_for(bytes) && !waiting.holds(event),
                    "it has to wait"
                );
                in_flight.push(event.key(), bytes, event.occurred_at_us, 0);
            }
            for seq in first.0..in_flight.next_seq().0 {
                black_box(in_flight.settle(Seq(seq)));
            }
            settled = in_flight.advance();
        }
        let settled = settled.context("nothing is settled")?;
        ensure!(settled.position == end, "the page is not settled");
    }
    Ok(())
}

pub fn route(events: &[Event], pipeline: &Pipeline, rounds: usize) -> Result<(), Error> {
    for _ in 0..rounds {
        for event in black_box(events) {
            ensure!(pipeline.filter.admits(event)?, "the filter drops it");
            black_box(pipeline.route.topic(event)?);
            black_box(pipeline.route.key.render(event));
        }
    }
    Ok(())
}

pub fn encode_all(events: &[Event], pipeline: &Pipeline, rounds: usize) -> Result<(), Error> {
    let Pipeline {
        route, encoding, ..
    } = pipeline;
    for _ in 0..rounds {
        for event in black_box(events) {
            let texts = Texts::of(event);
            black_box(encode(event, &texts, route, encoding)?);
        }
    }
    Ok(())
}
