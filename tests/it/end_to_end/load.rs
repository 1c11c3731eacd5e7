//! Writers that change entities and emit, and the oracle that holds what they committed against what was read.
//!
//! Each entity has a counter in its row, which the writer locks before it emits and puts into the payload. So the table
//! itself is the truth, whatever became of a writer's connection: an entity whose counter is n has committed 1 to n.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool, PgPoolOptions};
use sqlx::{Connection, Executor};
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::eventually;
use super::kafka::{Kafka, Received};

/// Topics are named after these.
pub(super) const KINDS: [&str; 3] = ["order", "customer", "invoice"];

type Entity = (String, String);

pub(super) struct Load {
    options: PgConnectOptions,
    pool: PgPool,
    topics: Vec<String>,
}

/// Writers at work.
pub(super) struct Writing {
    tasks: JoinSet<()>,
    stop: Arc<AtomicBool>,
    commits: Arc<AtomicU64>,
}

impl Writing {
    /// Waits until this many more transactions have been committed.
    pub(super) async fn commits(&self, more: u64) {
        let until = self.commits.load(Ordering::Relaxed) + more;
        eventually("commits", super::PATIENCE, async || {
            (self.commits.load(Ordering::Relaxed) >= until).then_some(())
        })
        .await;
    }

    pub(super) async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.tasks.join_all().await;
    }
}

impl Load {
    /// Makes the tables of the writers and the topics.
    pub(super) async fn prepare(options: &PgConnectOptions, kafka: &Kafka) -> Self {
        let pool = PgPoolOptions::new()
            .max_connections(2)
            .connect_lazy_with(options.clone());
        pool.execute(
            "create table entities (
                 kind text, id text, n bigint not null default 0, primary key (kind, id));
             insert into entities
             select kind, id::text from unnest('{order,customer,invoice}'::text[]) kind, generate_series(1, 7) id;
             create function change(wanted_kind text, wanted_id text, doomed boolean) returns void language sql as $$
                 with changed as (
                     update entities set n = n + 1 where kind = wanted_kind and id = wanted_id returning n)
                 select outbox.emit(wanted_kind, wanted_id, 'changed', json_build_object('n', n, 'doomed', doomed))
                   from changed
             $$;",
        )
        .await
        .unwrap();
        kafka.create(&KINDS).await;
        Self {
            options: options.clone(),
            pool,
            topics: KINDS.iter().map(|kind| kafka.topic(kind)).collect(),
        }
    }

    pub(super) fn topics(&self) -> Vec<String> {
        self.topics.clone()
    }

    /// Starts writers; they connect again when they are cut off.
    pub(super) fn start(&self, writers: usize) -> Writing {
        let mut tasks = JoinSet::new();
        let stop = Arc::new(AtomicBool::new(false));
        let commits = Arc::new(AtomicU64::new(0));
        for _ in 0..writers {
            let (options, stop, commits) = (self.options.clone(), stop.clone(), commits.clone());
            tasks.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    // The truth is in the table: a writer's trouble is of no interest.
                    let _ = write(&options, &stop, &commits).await;
                    sleep(Duration::from_millis(20)).await;
                }
            });
        }
        Writing {
            tasks,
            stop,
            commits,
        }
    }

    /// Commits this many changes, one transaction each.
    pub(super) async fn write(&self, changes: u64) {
        let writing = self.start(2);
        writing.commits(changes).await;
        writing.stop().await;
    }

    /// How often each entity was changed.
    pub(super) async fn committed(&self) -> HashMap<Entity, u64> {
        let rows: Vec<(String, String, i64)> =
            sqlx::query_as("select kind, id, n from entities where n > 0")
                .fetch_all(&self.pool)
                .await
                .unwrap();
        rows.into_iter()
            .map(|(kind, id, n)| ((kind, id), n.cast_unsigned()))
            .collect()
    }
}

/// Changes one to three entities at a time, in an order in which nobody waits for each other in a circle; one transaction
/// in eight is taken back, and some stay open for a while.
async fn write(
    options: &PgConnectOptions,
    stop: &AtomicBool,
    commits: &AtomicU64,
) -> Result<(), sqlx::Error> {
    let mut connection = PgConnection::connect_with(options).await?;
    while !stop.load(Ordering::Relaxed) {
        let doomed = fastrand::u8(..8) == 0;
        let mut entities: Vec<(&str, u8)> = (0..fastrand::usize(1..=3))
            .map(|_| (KINDS[fastrand::usize(..3)], fastrand::u8(1..=7)))
            .collect();
        entities.sort_unstable();
        entities.dedup();
        let mut transaction = connection.begin().await?;
        for (kind, id) in entities {
            sqlx::query("select change($1, $2, $3)")
                .bind(kind)
                .bind(id.to_string())
                .bind(doomed)
                .execute(&mut *transaction)
                .await?;
        }
        if fastrand::u8(..16) == 0 {
            sleep(Duration::from_millis(fastrand::u64(1..30))).await;
        }
        if doomed {
            transaction.rollback().await?;
        } else {
            transaction.commit().await?;
            commits.fetch_add(1, Ordering::Relaxed);
        }
        sleep(Duration::from_millis(2)).await;
    }
    connection.close().await
}

/// What a consumer has seen so far.
#[derive(Debug, Default)]
pub(super) struct Seen {
    entities: HashMap<Entity, HashSet<u64>>,
    newest: HashMap<Entity, u64>,
    pub(super) records: u64,
    pub(super) duplicates: u64,
    out_of_order: Vec<String>,
    doomed: u64,
    ids: HashMap<(Entity, u64), Vec<u8>>,
    foreign: u64,
}

impl Seen {
    pub(super) fn add(&mut self, record: &Received) {
        self.records += 1;
        let payload: serde_json::Value =
            serde_json::from_slice(record.value.as_deref().unwrap()).unwrap();
        let n = payload["n"].as_u64().unwrap();
        let kind = record.topic.rsplit('.').next().unwrap();
        let entity = (kind.to_owned(), record.key_text().to_owned());
        self.doomed += u64::from(payload["doomed"] == true);
        let id = record.header("id").unwrap().to_vec();
        if !self.entities.entry(entity.clone()).or_default().insert(n) {
            self.duplicates += 1;
            // The same change, so it has to be the same event.
            self.foreign += u64::from(self.ids[&(entity, n)] != id);
            return;
        }
        let newest = self.newest.entry(entity.clone()).or_default();
        if n != *newest + 1 {
            self.out_of_order
                .push(format!("{n} of {entity:?} after {newest}"));
        }
        *newest = n.max(*newest);
        self.ids.insert((entity, n), id);
    }

    pub(super) fn missing(&self, committed: &HashMap<Entity, u64>) -> usize {
        let is_missing = |entity: &Entity, n: &u64| {
            self.entities
                .get(entity)
                .is_none_or(|seen| !seen.contains(n))
        };
        committed
            .iter()
            .map(|(entity, newest)| (1..=*newest).filter(|n| is_missing(entity, n)).count())
            .sum()
    }

    /// # Panics
    /// When something is missing, out of order, or was never committed.
    pub(super) fn judge(&self, committed: &HashMap<Entity, u64>) {
        assert_eq!(self.missing(committed), 0, "missing");
        assert_eq!(self.out_of_order, Vec::<String>::new());
        assert_eq!(self.doomed, 0, "taken back and published");
        assert_eq!(self.foreign, 0, "one change, two events");
        let total: usize = self.entities.values().map(HashSet::len).sum();
        assert_eq!(
            total as u64,
            committed.values().sum::<u64>(),
            "never committed"
        );
    }
}
