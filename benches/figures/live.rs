//! Steady load: something is due every so often, whether or not what came before is done (an open loop).

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, anyhow, ensure};
use futures_util::future::try_join_all;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::Message;
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer, ThreadedProducer};
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::{Offset, TopicPartitionList};
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Executor};
use tokio::sync::{Mutex, mpsc, oneshot};

use crate::topics::{COMPRESSION, Cluster};
use crate::workload::{PAYLOAD_BYTES, Workload};
use crate::world::Log;

/// Connections that write.
const WRITERS: usize = 16;
/// Transactions per second of what arrives beside something else.
const ARRIVALS: u32 = 100;
/// Between two records that find out whether everything runs.
const FIRST_EVERY: Duration = Duration::from_millis(200);
const ARRIVAL_MAX: Duration = Duration::from_mins(1);

/// Connections, caches and a just-in-time compiler are cold at first.
const WARM_UP_SECONDS: u32 = 3;

/// How much comes, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    pub events_per_second: u32,
    /// Those that count.
    seconds: u32,
    /// Those before.
    warm_up_seconds: u32,
    /// Events of one transaction: with many events a second there are 1,000 transactions.
    pub per_transaction: u32,
}

impl Pace {
    pub fn of(events_per_second: u32, seconds: u32) -> Self {
        Self {
            events_per_second,
            seconds,
            warm_up_seconds: seconds.min(WARM_UP_SECONDS),
            per_transaction: events_per_second.div_ceil(1000),
        }
    }

    /// Those of the warm-up too.
    fn transactions(&self) -> u32 {
        let seconds = self.warm_up_seconds + self.seconds;
        (self.events_per_second * seconds).div_ceil(self.per_transaction)
    }

    /// Those of the warm-up too.
    pub fn events(&self) -> u32 {
        self.transactions() * self.per_transaction
    }

    pub fn warm_up(&self) -> Duration {
        Duration::from_secs(self.warm_up_seconds.into())
    }

    pub fn counted_events(&self) -> u32 {
        self.events() - self.warm_up_events()
    }

    /// The first events, which do not count.
    pub fn warm_up_events(&self) -> u32 {
        let events = self.events_per_second * self.warm_up_seconds;
        events.next_multiple_of(self.per_transaction)
    }

    fn due(&self, began: Instant, transaction: u32) -> Instant {
        let every = Duration::from_secs(1) * self.per_transaction / self.events_per_second;
        began + every * transaction
    }
}

/// When one transaction was due, and when its commit returned.
#[derive(Clone, Copy, Debug)]
pub struct Committed {
    pub due: Instant,
    pub at: Instant,
}

/// Emits events with the keys `e0`, `e1` …; returns the transactions in their order.
pub async fn emit(log: &Log, pace: Pace) -> Result<Vec<Committed>, Error> {
    let (due, queue) = mpsc::unbounded_channel();
    let queue = Mutex::new(queue);
    let writers = usize::try_from(pace.transactions())?.min(WRITERS);
    let connected = (0..writers).map(|_| log.connect());
    let connected = try_join_all(connected).await?;
    let clock = pacemaker(pace, move |transaction, at| {
        // A writer that has failed ends the whole measurement.
        let _ = due.send((transaction, at));
    });
    let writers = connected.into_iter().map(|db| write(db, pace, &queue));
    let mut committed: Vec<(u32, Committed)> = try_join_all(writers).await?.concat();
    join(clock)?;
    committed.sort_unstable_by_key(|(transaction, _)| *transaction);
    Ok(committed.into_iter().map(|(_, times)| times).collect())
}

/// Calls at the due times, from a thread: timers of the runtime are late by up to a millisecond.
fn pacemaker(pace: Pace, mut call: impl FnMut(u32, Instant) + Send + 'static) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let began = Instant::now();
        for transaction in 0..pace.transactions() {
            let due = pace.due(began, transaction);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            call(transaction, due);
        }
    })
}

fn join<T>(thread: JoinHandle<T>) -> Result<T, Error> {
    thread.join().map_err(|_| anyhow!("a thread panicked"))
}

async fn write(
    mut db: PgConnection,
    pace: Pace,
    queue: &Mutex<mpsc::UnboundedReceiver<(u32, Instant)>>,
) -> Result<Vec<(u32, Committed)>, Error> {
    let mut committed = Vec::new();
    loop {
        let Some((transaction, due)) = queue.lock().await.recv().await else {
            return Ok(committed);
        };
        let first = i64::from(transaction * pace.per_transaction);
        emit_keys(&mut db, first, first + i64::from(pace.per_transaction) - 1).await?;
        let at = Instant::now();
        committed.push((transaction, Committed { due, at }));
    }
}

/// Emits events with the keys `eFIRST` to `eLAST` in one transaction.
async fn emit_keys(db: &mut PgConnection, first: i64, last: i64) -> Result<(), Error> {
    sqlx::query(
        "select outbox.emit('event0', 'e' || n, 'placed', $3::json) from generate_series($1, $2) n",
    )
    .bind(first)
    .bind(last)
    .bind(payload())
    .execute(db)
    .await
    .context("emit")?;
    Ok(())
}

/// Emits one event in a transaction of its own.
pub async fn emit_one(db: &mut PgConnection, key: &str) -> Result<(), Error> {
    sqlx::query("select outbox.emit('event0', $1, 'placed', $2::json)")
        .bind(key)
        .bind(payload())
        .execute(db)
        .await
        .context("emit")?;
    Ok(())
}

/// Emits so many events per second until it is enough, all by one writer: a bare loop would lose events of two. Returns how
/// many a second it really were.
pub async fn arrive(log: &Log, events_per_second: u32, enough: &Cell<bool>) -> Result<f64, Error> {
    let mut db = log.connect().await?;
    let row = Workload::of(1).row();
    let at_once = events_per_second.div_ceil(ARRIVALS);
    let insert = format!(
        "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload) \
         {row} from generate_series(1, {at_once}) n"
    );
    let mut every = tokio::time::interval(Duration::from_secs(1) / ARRIVALS);
    let (began, mut emitted) = (Instant::now(), 0.0);
    while !enough.get() {
        every.tick().await;
        db.execute(sqlx::query(AssertSqlSafe(insert.clone())))
            .await?;
        emitted += f64::from(at_once);
    }
    Ok(emitted / began.elapsed().as_secs_f64())
}

/// Produces records with the same keys straight to a topic; returns when each was due.
pub fn produce(cluster: &Cluster, topic: String, pace: Pace) -> Result<Vec<Committed>, Error> {
    let producer: ThreadedProducer<DefaultProducerContext> = cluster.producer(COMPRESSION)?;
    // The relay has its connections by now as well.
    producer
        .send(BaseRecord::to(&topic).key("warm").payload("{}"))
        .map_err(|(error, _)| error)?;
    producer.flush(ARRIVAL_MAX)?;
    let handle = std::thread::spawn(move || {
        let mut produced = Vec::new();
        let (sent, received) = std::sync::mpsc::channel();
        let clock = pacemaker(pace, move |transaction, due| {
            // The other end is gone only when the measurement has failed.
            let _ = sent.send((transaction, due));
        });
        for (transaction, due) in received {
            for n in 0..pace.per_transaction {
                let key = format!("e{}", transaction * pace.per_transaction + n);
                let payload = payload();
                let mut record = BaseRecord::to(&topic).key(&key).payload(&payload);
                // Behind a pause of the broker the queue is full: what is late by it counts from when it was due.
                while let Err((error, refused)) = producer.send(record) {
                    ensure!(
                        error.rdkafka_error_code() == Some(RDKafkaErrorCode::QueueFull),
                        "produce: {error}"
                    );
                    std::thread::sleep(Duration::from_millis(1));
                    record = refused;
                }
            }
            produced.push(Committed { due, at: due });
        }
        join(clock)?;
        producer.flush(ARRIVAL_MAX)?;
        Ok(produced)
    });
    join(handle)?
}

fn payload() -> String {
    let head = "{\"note\":\"";
    let bytes = usize::try_from(PAYLOAD_BYTES).unwrap_or_default() - head.len() - 2;
    format!(
        "{head}{}\"}}",
        "the customer asks to ring twice ".repeat(8)[..bytes].to_owned()
    )
}

/// A thread that notes when each key arrives first.
pub struct Listener {
    thread: JoinHandle<Result<HashMap<String, Instant>, Error>>,
    leaves: Arc<AtomicBool>,
}

impl Listener {
    /// Waits for so many different keys that begin with `e`; returns when a first record, of the key `warm`, has come.
    ///
    /// `publish_first` publishes one; it is called again and again, as the first ones may come before the consumer is there.
    pub async fn start(
        cluster: &Cluster,
        topic: &str,
        events: u32,
        publish_first: impl AsyncFn() -> Result<(), Error>,
    ) -> Result<Self, Error> {
        let consumer = cluster.consumer()?;
        let mut partitions = TopicPartitionList::new();
        let metadata = consumer.fetch_metadata(Some(topic), ARRIVAL_MAX)?;
        let found = metadata.topics().first().context("no such topic")?;
        for partition in found.partitions() {
            partitions.add_partition_offset(topic, partition.id(), Offset::End)?;
        }
        consumer.assign(&partitions)?;
        let (warm, mut is_warm) = oneshot::channel();
        let events = usize::try_from(events)?;
        let leaves = Arc::new(AtomicBool::new(false));
        let left = Arc::clone(&leaves);
        let thread = std::thread::spawn(move || collect(&consumer, events, warm, &left));
        loop {
            publish_first().await?;
            match tokio::time::timeout(FIRST_EVERY, &mut is_warm).await {
                Ok(Ok(())) => return Ok(Self { thread, leaves }),
                Ok(Err(_)) => {
                    join(thread)??;
                    return Err(anyhow!("the consumer ended early"));
                }
                Err(_) => {}
            }
        }
    }

    /// When each arrived, in the order of the keys' numbers; none for what came to be lost would be an error.
    pub fn seen(self, events: u32) -> Result<Vec<Instant>, Error> {
        let seen = join(self.thread)??;
        (0..events)
            .map(|n| {
                let at = seen.get(&format!("e{n}")).copied();
                at.with_context(|| format!("WRONG: event {n} is missing"))
            })
            .collect()
    }

    /// Whatever has come.
    pub fn leave(self) -> Result<(), Error> {
        self.leaves.store(true, Ordering::Relaxed);
        join(self.thread)??;
        Ok(())
    }
}

fn collect(
    consumer: &BaseConsumer,
    events: usize,
    warm: oneshot::Sender<()>,
    leaves: &AtomicBool,
) -> Result<HashMap<String, Instant>, Error> {
    let mut seen = HashMap::with_capacity(events);
    let (mut warm, mut heard) = (Some(warm), Instant::now());
    while seen.len() < events && !leaves.load(Ordering::Relaxed) {
        let message = match consumer.poll(Duration::from_millis(100)) {
            Some(Ok(message)) => message,
            Some(Err(KafkaError::PartitionEOF(_))) => continue,
            Some(Err(error)) => return Err(error).context("consume"),
            None => {
                ensure!(
                    heard.elapsed() < ARRIVAL_MAX,
                    "WRONG: only {} of {events} events arrived",
                    seen.len()
                );
                continue;
            }
        };
        heard = Instant::now();
        let key = std::str::from_utf8(message.key().context("a record without key")?)?;
        if key == "warm" {
            if let Some(warm) = warm.take() {
                // Whoever no longer waits has failed.
                let _ = warm.send(());
            }
        } else if key.starts_with('e') && !seen.contains_key(key) {
            seen.insert(key.to_owned(), heard);
        }
    }
    Ok(seen)
}
