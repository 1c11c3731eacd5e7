//! Writers at work: many entities, several events in a transaction, some transactions late and some taken back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use fastrand::Rng;
use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool};
use sqlx::{ConnectOptions, Connection};
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::super::load::KINDS;
use super::super::{eventually, run};

const ENTITIES: u32 = 60;
const WRITERS: u64 = 5;

/// The entities, whose rows the writers lock before they emit.
pub(super) async fn prepare(pool: &PgPool) {
    run(
        pool,
        format!(
            "create table entities (kind text, id text, n bigint not null default 0, primary key (kind, id));
             insert into entities
             select kind, id::text from unnest('{{order,customer,invoice}}'::text[]) kind, generate_series(1, {ENTITIES}) id;
             create function change(wanted_kind text, wanted_id text) returns void language sql as $$
                 with changed as (
                     update entities set n = n + 1 where kind = wanted_kind and id = wanted_id returning n)
                 select outbox.emit(wanted_kind, wanted_id, 'changed', json_build_object('n', n)) from changed
             $$;"
        ),
    )
    .await;
}

pub(super) struct Writers {
    tasks: JoinSet<()>,
    stop: Arc<AtomicBool>,
    commits: Arc<AtomicU64>,
}

impl Writers {
    pub(super) fn start(options: &PgConnectOptions, seed: u64) -> Self {
        let mut tasks = JoinSet::new();
        let (stop, commits) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        for writer in 0..WRITERS {
            let options = options.clone().disable_statement_logging();
            let mut random = Rng::with_seed(seed.wrapping_add(writer));
            let (stop, commits) = (stop.clone(), commits.clone());
            tasks.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    // The log is the truth: a writer's trouble is of no interest.
                    let _ = write(&options, &mut random, &stop, &commits).await;
                    sleep(Duration::from_millis(50)).await;
                }
            });
        }
        Self {
            tasks,
            stop,
            commits,
        }
    }

    /// Waits until there are so many more.
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

async fn write(
    options: &PgConnectOptions,
    random: &mut Rng,
    stop: &AtomicBool,
    commits: &AtomicU64,
) -> Result<(), sqlx::Error> {
    let mut connection = PgConnection::connect_with(options).await?;
    while !stop.load(Ordering::Relaxed) {
        // In one order, in which nobody waits for each other in a circle; an entity may change twice.
        let mut entities: Vec<(&str, u32)> = (0..random.usize(1..=5))
            .map(|_| (KINDS[random.usize(..3)], random.u32(1..=ENTITIES)))
            .collect();
        entities.sort_unstable();
        let mut transaction = connection.begin().await?;
        for (kind, id) in entities {
            sqlx::query("select change($1, $2)")
                .bind(kind)
                .bind(id.to_string())
                .execute(&mut *transaction)
                .await?;
        }
        match random.u32(..100) {
            0 => sleep(Duration::from_millis(random.u64(300..2_000))).await,
            1..10 => sleep(Duration::from_millis(random.u64(5..60))).await,
            _ => {}
        }
        if random.u32(..8) == 0 {
            transaction.rollback().await?;
        } else {
            transaction.commit().await?;
            commits.fetch_add(1, Ordering::Relaxed);
        }
        sleep(Duration::from_millis(8)).await;
    }
    connection.close().await
}
