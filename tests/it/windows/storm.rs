//! Random writers against the real source and ledger, driven as the relay drives them, for as long as one likes:
//! `RELAY_TEST_SECONDS` (3 unless set), `RELAY_TEST_SEED` to replay one (as far as concurrency can be replayed).

use std::time::Duration;

use futures_util::future::join_all;
use outbox_relay::source::Source;
use tokio::time::Instant;

use super::database::{Database, from_environment, number, with_database};
use super::oracle::{Fault, judge};
use super::reader::{Read, read};
use super::writers::{Journal, Writer, elsewhere, left_open, prepare, repeatable_reader};

const WRITERS: usize = 10;
const WRITERS_THROUGH_PGBOUNCER: usize = 3;

/// Runs writers and a reader, and returns what is wrong. `log` is where the reader reads.
pub(crate) async fn storm<S: Source>(
    test: &str,
    database: &Database,
    log: &Database,
    make: impl FnMut() -> S,
) -> Vec<Fault> {
    let seed = number("RELAY_TEST_SEED").unwrap_or_else(|| {
        u64::from_le_bytes(
            uuid::Uuid::new_v4().as_bytes()[..8]
                .try_into()
                .expect("8 bytes"),
        )
    });
    let seconds = number("RELAY_TEST_SECONDS").unwrap_or(3);
    // Printed first: a run that hangs or panics has told it too.
    println!("{test}: RELAY_TEST_SEED={seed} RELAY_TEST_SECONDS={seconds}");
    prepare(database).await;
    let journal = Journal::default();
    let until = Instant::now() + Duration::from_secs(seconds);
    let pooled =
        from_environment("PGBOUNCER_URL", "writers through PgBouncer").map(|options| Database {
            name: database.name.clone(),
            options: options.database(&database.name),
        });
    let writing = async {
        let mut writers = Vec::new();
        for number in 0..WRITERS {
            writers.push(
                Writer::new(database, &journal, seed, number)
                    .await
                    .run(until),
            );
        }
        if let Some(pooled) = &pooled {
            for number in WRITERS..WRITERS + WRITERS_THROUGH_PGBOUNCER {
                writers.push(Writer::new(pooled, &journal, seed, number).await.run(until));
            }
        }
        tokio::join!(
            join_all(writers),
            left_open(database, &journal, seed, until),
            repeatable_reader(database, seed, until),
            elsewhere(database, seed, until),
        );
        journal.finish();
    };
    let reading = Box::pin(read(log, &journal, seed, make));
    let ((), read) = tokio::join!(Box::pin(writing), reading);
    let committed = journal.committed();
    let Read {
        deliveries,
        mut faults,
        lives,
        windows,
        pages,
        late,
    } = read;
    faults.extend(judge(&committed, &deliveries));
    println!(
        "{test}: {} transactions with {} events, {} deliveries, {late} of them late, {windows} windows, {pages} pages, \
         {lives} lives, {} faults",
        journal.transactions(),
        committed.len(),
        deliveries.len(),
        faults.len(),
    );
    for fault in faults.iter().take(20) {
        println!("{test}: {fault}");
    }
    faults
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_writers() {
    let test = "random_writers";
    with_database(test, async |database| {
        let faults = storm(test, database, database, || database.source()).await;
        assert_eq!(faults, []);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_writers_read_through_pgbouncer() {
    let test = "random_writers_read_through_pgbouncer";
    with_database(test, async |database| {
        let Some(log) = database.through_pgbouncer(test) else {
            return;
        };
        let faults = storm(test, database, &log, || log.source()).await;
        assert_eq!(faults, []);
    })
    .await;
}
