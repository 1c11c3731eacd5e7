//! Readers that are known to be wrong: the same storm, or a schedule where chance is too rare, has to catch each.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use outbox_relay::event::{Event, EventId, Payload};
use outbox_relay::position::{Position, Snapshot, Window};
use outbox_relay::source::postgres::PostgresSource;
use outbox_relay::source::{Page, PageLimits, Source, SourceError};
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, Connection, Executor, Row};
use tokio::time::sleep;

use crate::harness::hostile;

use super::database::{sql, with_database};
use super::oracle::Fault;
use super::schedules::{NOTHING, drain, emit};
use super::storm::storm;

/// Which wrong idea.
#[derive(Clone, Copy)]
pub(crate) enum Idea {
    /// `id > last order by id`.
    IdCursor,
    /// `(xid, id) > last` below the oldest transaction in progress.
    Horizon,
}

pub(crate) struct WrongSource {
    idea: Idea,
    options: PgConnectOptions,
    connection: Option<PgConnection>,
    at: Position,
}

impl WrongSource {
    pub(crate) fn new(idea: Idea, options: PgConnectOptions) -> Self {
        Self {
            idea,
            options,
            connection: None,
            at: Position::beginning(),
        }
    }

    /// Whether there are rows that the horizon keeps back.
    async fn is_hidden(&self, connection: &mut PgConnection) -> bool {
        let (xid, id) = (self.at.window.cur.xmin, self.at.last_id);
        match self.idea {
            Idea::IdCursor => false,
            Idea::Horizon => sqlx::query_scalar(AssertSqlSafe(format!(
                "select exists (select from outbox.events where (xid, id) > ('{xid}', {id}))"
            )))
            .fetch_one(connection)
            .await
            .expect("look beyond the horizon"),
        }
    }

    /// The place after a row; the ledger stores it like any other.
    fn place(xid: u64, id: i64) -> Position {
        let mut window = Window::beginning();
        window.cur = Snapshot {
            xmin: xid.max(1),
            xmax: xid.max(1),
            in_progress: Vec::new(),
        };
        window.ceiling = EventId(i64::MAX);
        Position {
            window: Arc::new(window),
            last_id: EventId(id),
        }
    }
}

impl Source for WrongSource {
    fn seek(&mut self, position: Position) {
        self.at = position;
    }

    async fn capture(&mut self, limits: PageLimits, _: &Position) -> Result<Page, SourceError> {
        let (xid, id, rows) = (self.at.window.cur.xmin, self.at.last_id, limits.rows);
        let tail = match self.idea {
            Idea::IdCursor => format!("id > {id} order by id limit {rows}"),
            Idea::Horizon => format!(
                "(xid, id) > ('{xid}', {id}) and xid < pg_snapshot_xmin(pg_current_snapshot()) \
                 order by xid, id limit {rows}"
            ),
        };
        let statement = format!(
            "select xid::text::bigint, id, aggregate_id, payload::text from outbox.events where {tail}"
        );
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => PgConnection::connect_with(&hostile::of_tests(self.options.clone()))
                .await
                .expect("connect"),
        };
        let rows = loop {
            let rows = connection
                .fetch_all(sqlx::raw_sql(AssertSqlSafe(statement.clone())))
                .await
                .expect("read");
            // A transaction of anybody on the server, of another test too, hides what is committed already. Whoever reads
            // like this waits for it, however long that is.
            if !rows.is_empty() || !self.is_hidden(&mut connection).await {
                break rows;
            }
            sleep(Duration::from_millis(5)).await;
        };
        self.connection = Some(connection);
        let mut events = Vec::new();
        for row in rows {
            let (xid, id): (i64, i64) = (row.get(0), row.get(1));
            let xid = match self.idea {
                Idea::IdCursor => 1,
                Idea::Horizon => xid.cast_unsigned(),
            };
            self.at = Self::place(xid, id);
            events.push(Event {
                id: EventId(id),
                event_id: uuid::Uuid::nil(),
                aggregate_type: "thing".into(),
                aggregate_id: row.get::<String, _>(2).into(),
                event_type: "changed".into(),
                payload: Payload::Json(row.get::<String, _>(3).into()),
                content_type: None,
                headers: None,
                occurred_at_us: 0,
            });
        }
        Ok(Page {
            more: events.len() >= limits.rows,
            events,
            end: self.at.clone(),
        })
    }

    async fn wake(&mut self) {
        sleep(Duration::from_millis(1)).await;
    }
}

/// The real source, told that every ceiling it has read may be the next floor, although no write was completed since. It
/// finds out by itself that rows lie below its floor; that it had to is what is counted.
struct LeadingFloor {
    inner: PostgresSource,
    newest: Position,
    caught: Arc<AtomicU64>,
}

impl LeadingFloor {
    fn new(inner: PostgresSource, caught: &Arc<AtomicU64>) -> Self {
        Self {
            inner,
            newest: Position::beginning(),
            caught: caught.clone(),
        }
    }
}

impl Source for LeadingFloor {
    fn seek(&mut self, position: Position) {
        self.newest = position.clone();
        self.inner.seek(position);
    }

    async fn capture(&mut self, limits: PageLimits, _: &Position) -> Result<Page, SourceError> {
        let before = self.inner.resets();
        let page = self.inner.capture(limits, &self.newest).await?;
        self.caught
            .fetch_add(self.inner.resets() - before, Ordering::Relaxed);
        self.newest = page.end.clone();
        Ok(page)
    }

    async fn wake(&mut self) {
        self.inner.wake().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cursor_on_the_id_is_caught() {
    let test = "a_cursor_on_the_id_is_caught";
    with_database(test, async |database| {
        let make = || WrongSource::new(Idea::IdCursor, database.options.clone());
        let faults = storm(test, database, database, make).await;
        assert!(faults.iter().any(|fault| matches!(fault, Fault::Lost(_))));
    })
    .await;
}

/// A transaction that has nothing to do with the outbox goes on for longer than a storm looks for what does not come.
async fn hold_the_horizon(options: &PgConnectOptions) {
    let mut connection = PgConnection::connect_with(options).await.expect("connect");
    let held = "begin; select pg_current_xact_id(); select pg_sleep(8); commit";
    connection
        .execute(sqlx::raw_sql(held))
        .await
        .expect("hold the horizon");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cursor_below_the_horizon_is_caught() {
    let test = "a_cursor_below_the_horizon_is_caught";
    with_database(test, async |database| {
        let make = || WrongSource::new(Idea::Horizon, database.options.clone());
        let (faults, ()) = tokio::join!(
            storm(test, database, database, make),
            hold_the_horizon(&database.options)
        );
        assert!(
            faults
                .iter()
                .any(|fault| matches!(fault, Fault::OutOfOrder(_)))
        );
        // It is slow and out of order; it does not lose.
        assert!(!faults.iter().any(|fault| matches!(fault, Fault::Lost(_))));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_floor_that_leads_is_caught_by_the_storm() {
    let test = "a_floor_that_leads_is_caught_by_the_storm";
    // The busier the server is with other things, the less often the newest transaction of all is one that emits.
    let mut storms = 0;
    let mut lost = false;
    while !lost && storms < 10 {
        storms += 1;
        let mut ran = false;
        with_database(test, async |database| {
            let caught = Arc::default();
            let make = || LeadingFloor::new(database.source(), &caught);
            let faults = storm(test, database, database, make).await;
            lost = faults.iter().any(|fault| matches!(fault, Fault::Lost(_)))
                || caught.load(Ordering::Relaxed) > 0;
            ran = true;
        })
        .await;
        if !ran {
            return;
        }
    }
    println!("{test}: {storms} storms");
    assert!(lost);
}

/// The smallest schedule that shows it: a transaction that has its ids, and is the newest of the server, so that it is
/// not among those in progress *below* the snapshot's xmax. Other tests use the server too and end newer transactions at
/// any moment, so it takes some attempts; the real source must not lose in any of them.
#[tokio::test]
async fn a_floor_that_leads_loses_the_newest_transaction() {
    let test = "a_floor_that_leads_loses_the_newest_transaction";
    with_database(test, async |database| {
        let mut right = database.source();
        let caught = Arc::default();
        let mut wrong = LeadingFloor::new(database.source(), &caught);
        let mut writer = database.connect().await;
        for attempt in 1..=500 {
            sql(&mut writer, &format!("begin; {}", emit(attempt))).await;
            // Two windows while it is open: the first takes the ceiling, the second uses it as its floor.
            for _ in 0..2 {
                assert_eq!(drain(&mut wrong).await, NOTHING);
                assert_eq!(drain(&mut right).await, NOTHING);
            }
            sql(&mut writer, "commit").await;
            assert_eq!(drain(&mut right).await, [attempt]);
            let got = drain(&mut wrong).await;
            assert_eq!(right.resets(), 0, "the real one is never contradicted");
            if got.is_empty() || caught.load(Ordering::Relaxed) > 0 {
                println!("{test}: attempt {attempt}");
                return;
            }
        }
        panic!("a floor that leads was not seen to be wrong");
    })
    .await;
}
