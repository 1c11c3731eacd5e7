//! `outbox-relay tail`: committed events as the relay would read them. Owns nothing and writes nothing.

use std::time::Duration;

use anyhow::{Context, Error};
use bytes::Bytes;
use clap::Args;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::pipelines::Whereto;
use super::show::{self, DIM, say};
use super::{ConfigArgs, Outcome, Usage};
use crate::config::Config;
use crate::database::Database;
use crate::encode::{Texts, encode};
use crate::event::{Event, EventId, Payload, PipelineName, Start};
use crate::position::Position;
use crate::relay::Pipeline;
use crate::source::{PageLimits, Source};
use crate::supervise;

/// One read holds this much.
const PAGE: PageLimits = PageLimits {
    rows: 500,
    bytes: 4 << 20,
};
/// How often it is asked how far relays have come, from where on new events have to be looked for.
const ASK: Duration = Duration::from_secs(5);
/// Between two looks where nothing is new, at least.
const PAUSE: Duration = Duration::from_millis(200);
/// The look takes at most this part of the time.
const SHARE: u32 = 10;
/// Of a payload, in a line for people.
const PAYLOAD_CHARS: usize = 200;

/// Show committed events as they come; nothing is published, no position moves, no lease is taken.
///
/// Reads as a relay does, with the same rights, and writes nothing to the database. Payloads are printed.
#[derive(Debug, Args)]
pub(super) struct Tail {
    #[command(flatten)]
    config: ConfigArgs,
    /// Only what this pipeline takes, with the topic and the key that it gives to the record.
    #[arg(long, value_name = "NAME")]
    pipeline: Option<PipelineName>,
    /// From where on: earliest, latest (or now), a time (2026-01-31T10:00:00Z, 2026-01-31, 1h), the id of an event, or its uuid.
    #[arg(long, value_name = "POSITION", default_value = "now")]
    from: String,
    /// End after this many events.
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    /// Print a JSON object a line, with the whole payload.
    #[arg(long)]
    json: bool,
}

impl Tail {
    pub(super) async fn run(self) -> Result<Outcome, Error> {
        let config = self.config.load()?;
        let pipeline = self.chosen(&config)?;
        let from = match &self.from[..] {
            "now" => "latest",
            from => from,
        };
        let from: Whereto = from
            .parse()
            .map_err(|wrong| Usage(format!("--from: {wrong}")))?;
        let mut database = Database::open(&config.source).await?;
        let from = from.resolve(&mut database).await?;
        tokio::select! {
            looked = self.look(&config, pipeline, &mut database, from) => looked?,
            () = show::closed() => {}
            interrupted = tokio::signal::ctrl_c() => interrupted?,
        }
        Ok(Outcome::Done)
    }

    fn chosen<'c>(&self, config: &'c Config) -> Result<Option<&'c Pipeline>, Error> {
        let Some(name) = &self.pipeline else {
            return Ok(None);
        };
        let mut pipelines = config.pipelines.iter().map(|p| &p.pipeline);
        let found = pipelines.find(|pipeline| pipeline.name == *name);
        let none = || Usage(format!("the configuration has no pipeline {name}"));
        Ok(Some(found.ok_or_else(none)?))
    }

    async fn look(
        &self,
        config: &Config,
        pipeline: Option<&Pipeline>,
        database: &mut Database,
        from: Start,
    ) -> Result<(), Error> {
        let mut source = supervise::onlooker(&config.source);
        source.seek(database.look_from(from).await?);
        let mut left = self.limit.unwrap_or(u64::MAX);
        let mut passed = Position::beginning();
        let mut asked_at: Option<Instant> = None;
        while left > 0 {
            if asked_at.is_none_or(|at| at.elapsed() >= ASK) {
                passed = database.furthest_position().await?;
                asked_at = Some(Instant::now());
            }
            let began = Instant::now();
            let page = source.capture(PAGE, &passed).await?;
            for event in &page.events {
                if left > 0 && self.print(event, pipeline)? {
                    left -= 1;
                }
            }
            if !page.more {
                sleep(PAUSE.max(began.elapsed() * SHARE)).await;
            }
        }
        Ok(())
    }

    /// False where the event is not for the pipeline.
    fn print(&self, event: &Event, pipeline: Option<&Pipeline>) -> Result<bool, Error> {
        let mut record = Value::Null;
        if let Some(pipeline) = pipeline {
            let rejection = match pipeline.filter.admits(event) {
                Ok(false) => return Ok(false),
                Ok(true) => None,
                Err(rejection) => Some(rejection),
            };
            let texts = Texts::of(event);
            record = match (
                rejection,
                encode(event, &texts, &pipeline.route, &pipeline.encoding),
            ) {
                (Some(rejection), _) | (None, Err(rejection)) => {
                    json!({ "rejected": rejection.to_string() })
                }
                (None, Ok(record)) => json!({
                    "topic": record.topic,
                    "key": record.key.as_deref().map(String::from_utf8_lossy),
                }),
            };
        }
        if self.json {
            say!(
                "{}",
                serde_json::to_string(&document(event, record)).context("write the event")?
            );
        } else {
            line(event, &record);
        }
        Ok(true)
    }
}

fn document(event: &Event, record: Value) -> Value {
    let Event {
        id: EventId(id),
        event_id,
        aggregate_type,
        aggregate_id,
        event_type,
        payload,
        content_type,
        headers,
        occurred_at_us,
    } = event;
    let mut document = json!({
        "id": id,
        "event_id": event_id.to_string(),
        "occurred_at_us": occurred_at_us,
        "aggregate_type": &aggregate_type[..],
        "aggregate_id": &aggregate_id[..],
        "event_type": &event_type[..],
        "content_type": content_type.as_deref(),
        "headers": headers.as_deref().map(|text| {
            serde_json::from_str(text).unwrap_or_else(|_| Value::from(text))
        }),
    });
    let text = |json: &Bytes| Value::from(String::from_utf8_lossy(json));
    let hex = |bytes: &Bytes| Value::from(hex(bytes));
    // The text as it was written: numbers and the order of names are the writer's.
    match payload {
        Payload::Tombstone => document["payload"] = Value::Null,
        Payload::Json(json) => document["payload"] = text(json),
        Payload::Encoded(bytes) => document["payload_hex"] = hex(bytes),
        Payload::Ambiguous(json, bytes) => {
            document["payload"] = text(json);
            document["payload_hex"] = hex(bytes);
        }
        Payload::Unread(rejection) => document["unread"] = Value::from(rejection.to_string()),
    }
    if !record.is_null() {
        document["record"] = record;
    }
    document
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn line(event: &Event, record: &Value) {
    let payload = match &event.payload {
        Payload::Tombstone => "tombstone".to_owned(),
        Payload::Json(json) | Payload::Ambiguous(json, _) => {
            String::from_utf8_lossy(json).into_owned()
        }
        Payload::Encoded(bytes) => format!("{} bytes", bytes.len()),
        Payload::Unread(rejection) => format!("not read: {rejection}"),
    };
    let mut payload = show::plain(&payload);
    if let Some((at, _)) = payload.char_indices().nth(PAYLOAD_CHARS) {
        payload.truncate(at);
        payload.push('…');
    }
    let whereto = match (&record["topic"], &record["rejected"]) {
        (Value::String(topic), _) => format!(" → {topic}"),
        (_, Value::String(rejected)) => format!(" → rejected: {rejected}"),
        _ => String::new(),
    };
    say!(
        "{} {DIM}{}{DIM:#} {} {}{} {DIM}{payload}{DIM:#}",
        event.id,
        show::moment(event.occurred_at_us),
        show::plain(&format!("{}/{}", event.aggregate_type, event.aggregate_id)),
        show::plain(&event.event_type),
        show::plain(&whereto),
    );
}
