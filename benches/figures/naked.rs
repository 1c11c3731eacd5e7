//! The limit of a drain: `select … where id > $1 order by id limit 5000` into librdkafka, with no order, lease, policy,
//! filter or metric; with the headers of the relay's records where asked. A process of its own, so that its CPU and memory
//! are measured as the relay's are.
//!
//! It goes on looking every 200 ms, as the relay does, or when it is notified, until SIGTERM; then it waits for what it has
//! handed over.

use std::io::Write;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Error, ensure};
use futures_util::FutureExt;
use futures_util::future::try_join_all;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, DefaultProducerContext, Producer};
use rdkafka::types::RDKafkaErrorCode;
use sqlx::postgres::{PgConnectOptions, PgListener, PgRow};
use sqlx::{AssertSqlSafe, ConnectOptions, Row};
use tokio::signal::unix::{SignalKind, signal};
use uuid::Uuid;
use uuid::fmt::Hyphenated;

use crate::options::Naked;
use crate::topics::Cluster;

const LOOK: Duration = Duration::from_millis(200);
const FLUSH_MAX: Duration = Duration::from_mins(1);

type Polled = Arc<BaseProducer<DefaultProducerContext>>;

/// With a thread that takes the receipts as the relay's does, whose turns leave nothing to spin for.
fn polled(producer: BaseProducer<DefaultProducerContext>) -> Result<Polled, Error> {
    const TURN: Duration = Duration::from_micros(100_100);
    let producer = Arc::new(producer);
    let polled = Arc::clone(&producer);
    std::thread::Builder::new().spawn(move || {
        loop {
            polled.poll(TURN);
        }
    })?;
    Ok(producer)
}

pub async fn run(naked: Naked) -> Result<(), Error> {
    let mut terminate = signal(SignalKind::terminate())?;
    let cluster = Cluster::new(naked.brokers.clone(), naked.kafka_config.as_deref())?;
    let producers: Vec<Polled> = (0..naked.loops)
        .map(|_| polled(cluster.producer(&naked.compression)?))
        .collect::<Result<_, _>>()?;
    let loops = producers
        .iter()
        .enumerate()
        .map(|(number, producer)| publish(&naked, number, producer));
    let loops = pin!(try_join_all(loops));
    tokio::select! {
        ended = loops => { ended?; }
        _ = terminate.recv() => {}
    }
    for producer in &producers {
        producer.flush(FLUSH_MAX)?;
    }
    Ok(())
}

async fn publish(naked: &Naked, number: usize, producer: &Polled) -> Result<(), Error> {
    let options: PgConnectOptions = naked.url.parse().context("read --url")?;
    let mut db = options.connect().await?;
    let event_id = if naked.headers { ", event_id" } else { "" };
    let page = format!(
        "select id, aggregate_type, aggregate_id, event_type, payload::text{event_id} \
         from outbox.events where id > $1 order by id limit $2"
    );
    let page_rows = usize::try_from(naked.page)?;
    let mut last = naked.after;
    let mut listener = None;
    if naked.listen {
        let mut listening = PgListener::connect(&naked.url).await?;
        listening.listen("outbox_events").await?;
        listener = Some(listening);
    }
    loop {
        let rows = sqlx::query(AssertSqlSafe(&*page))
            .bind(last)
            .bind(naked.page)
            .fetch_all(&mut db)
            .await?;
        if let Some(tail) = rows.last() {
            last = tail.try_get(0)?;
        }
        for row in &rows {
            hand_over(naked, number, producer, row).await?;
        }
        match &mut listener {
            Some(listener) if rows.len() < page_rows => {
                listener.recv().await?;
                // One look answers them all.
                while let Some(more) = listener.recv().now_or_never() {
                    more?;
                }
            }
            None if rows.is_empty() => tokio::time::sleep(LOOK).await,
            _ => {}
        }
    }
}

async fn hand_over(
    naked: &Naked,
    number: usize,
    producer: &Polled,
    row: &PgRow,
) -> Result<(), Error> {
    let event_type: &str = row.try_get(3)?;
    if naked
        .event_type
        .as_deref()
        .is_some_and(|only| only != event_type)
    {
        return Ok(());
    }
    let (aggregate, key, payload): (&str, &str, &str) =
        (row.try_get(1)?, row.try_get(2)?, row.try_get(4)?);
    let topic = format!("{}.{number}.{aggregate}", naked.prefix);
    let mut record = BaseRecord::to(&topic).key(key).payload(payload);
    if naked.headers {
        record.headers = Some(headers(row, event_type)?);
    }
    while let Err((error, refused)) = producer.send(record) {
        ensure!(
            error.rdkafka_error_code() == Some(RDKafkaErrorCode::QueueFull),
            "produce: {error}"
        );
        tokio::time::sleep(Duration::from_millis(1)).await;
        record = refused;
    }
    Ok(())
}

/// `id`, `type` and `sequence`, as the relay's records have them.
fn headers(row: &PgRow, event_type: &str) -> Result<OwnedHeaders, Error> {
    let (id, sequence): (&[u8], i64) = (row.try_get_unchecked(5)?, row.try_get(0)?);
    let id = Uuid::from_slice(id)?;
    let (mut hyphenated, mut digits) = ([0; Hyphenated::LENGTH], Vec::with_capacity(20));
    write!(digits, "{sequence}")?;
    Ok([
        (
            "id",
            id.hyphenated().encode_lower(&mut hyphenated).as_bytes(),
        ),
        ("type", event_type.as_bytes()),
        ("sequence", &digits),
    ]
    .into_iter()
    .fold(
        OwnedHeaders::new_with_capacity(3),
        |headers, (key, value)| {
            let value = Some(value);
            headers.insert(Header { key, value })
        },
    ))
}
