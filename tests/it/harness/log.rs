//! Logs that tests write to: one trait for every database, and what it does to each.

use std::time::Duration;

use outbox_relay::event::{Event, EventId, Payload};
use outbox_relay::source::Source;
use outbox_relay::source::postgres::{CaptureMode, PostgresSource, Settings};
use outbox_relay::source::sqlite::SqliteSource;
use sqlx::postgres::PgConnection;
use sqlx::sqlite::SqliteConnection;
use sqlx::{Connection, Executor};
use uuid::Uuid;

use super::postgres::{TestDatabase, execute};
use super::sqlite::TestFile;

/// The longest that a source sleeps that only looks at the clock.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// A log that a source reads, written to by the test.
pub trait Log: Sized {
    type Source: Source;
    type Writer: Writer;

    /// An empty log, or none where its service is missing.
    async fn create() -> Option<Self>;

    /// A source at the beginning.
    fn source(&self) -> Self::Source;

    /// The connection that the test writes with.
    fn writer(&mut self) -> &mut Self::Writer;

    /// One more, to write at the same time.
    async fn connect(&self) -> Self::Writer;

    /// Completes a write, as writing down a cursor does.
    async fn write(&mut self);

    /// Whether a source that has been waited at is told of what is emitted from here on, if it is told at all.
    async fn tells(&mut self) -> bool {
        true
    }

    /// The longest that a source may sleep.
    fn wake_max(&self) -> Duration {
        POLL_INTERVAL
    }

    async fn emit(&mut self, events: Vec<Event>) -> Vec<Event> {
        self.writer().emit(events).await
    }
}

/// A connection of a service.
pub trait Writer {
    /// Inserts these events in one transaction, commits or rolls back, and returns them with their ids.
    async fn insert(&mut self, events: Vec<Event>, commit: bool) -> Vec<Event>;

    async fn emit(&mut self, events: Vec<Event>) -> Vec<Event> {
        self.insert(events, true).await
    }

    async fn emit_in_vain(&mut self, events: Vec<Event>) {
        self.insert(events, false).await;
    }
}

/// An event of this entity, without an id as yet.
pub fn event(entity: &str) -> Event {
    Event {
        id: EventId(0),
        event_id: Uuid::new_v4(),
        aggregate_type: "Order".into(),
        aggregate_id: entity.into(),
        event_type: "OrderPlaced".into(),
        payload: Payload::Json(r#"{"total": 12.50}"#.into()),
        content_type: None,
        headers: None,
        occurred_at_us: 1_700_000_000_123_456,
    }
}

pub struct SqliteLog {
    pub file: TestFile,
    writer: SqliteConnection,
}

impl Writer for SqliteConnection {
    async fn insert(&mut self, mut events: Vec<Event>, commit: bool) -> Vec<Event> {
        let mut transaction = self.begin().await.unwrap();
        for event in &mut events {
            insert_into_sqlite(&mut transaction, event).await;
        }
        if commit {
            transaction.commit().await.unwrap();
        } else {
            transaction.rollback().await.unwrap();
        }
        events
    }
}

async fn insert_into_sqlite(connection: &mut SqliteConnection, event: &mut Event) {
    let (json, bytes) = columns(&event.payload);
    let id: i64 = sqlx::query_scalar(
        "insert into outbox_events (event_id, aggregate_type, aggregate_id, event_type, payload, payload_bytes,
                content_type, headers, occurred_at)
         values (?1, ?2, ?3, ?4, cast(?5 as text), ?6, ?7, ?8, ?9) returning id",
    )
    .bind(event.event_id.to_string())
    .bind(&event.aggregate_type[..])
    .bind(&event.aggregate_id[..])
    .bind(&event.event_type[..])
    .bind(json)
    .bind(bytes)
    .bind(event.content_type.as_deref())
    .bind(event.headers.as_deref())
    .bind(event.occurred_at_us)
    .fetch_one(connection)
    .await
    .unwrap();
    event.id = EventId(id);
}

impl Log for SqliteLog {
    type Source = SqliteSource;
    type Writer = SqliteConnection;

    async fn create() -> Option<Self> {
        let file = TestFile::create().await;
        let writer = file.connect().await;
        Some(Self { file, writer })
    }

    fn source(&self) -> SqliteSource {
        SqliteSource::new(self.file.options.clone(), POLL_INTERVAL)
    }

    fn writer(&mut self) -> &mut SqliteConnection {
        &mut self.writer
    }

    async fn connect(&self) -> SqliteConnection {
        self.file.connect().await
    }

    async fn write(&mut self) {}
}

/// PostgreSQL, looked at by the clock.
pub struct PolledPostgres {
    pub database: TestDatabase,
    writer: PgConnection,
}

impl Writer for PgConnection {
    async fn insert(&mut self, mut events: Vec<Event>, commit: bool) -> Vec<Event> {
        let mut transaction = self.begin().await.unwrap();
        for event in &mut events {
            insert_into_postgres(&mut transaction, event).await;
        }
        if commit {
            transaction.commit().await.unwrap();
        } else {
            transaction.rollback().await.unwrap();
        }
        events
    }
}

async fn insert_into_postgres(connection: &mut PgConnection, event: &mut Event) {
    let (json, bytes) = columns(&event.payload);
    let id: i64 = sqlx::query_scalar(
        "insert into outbox.events (event_id, aggregate_type, aggregate_id, event_type, payload, payload_bytes,
                content_type, headers, occurred_at)
         values ($1::text::uuid, $2, $3, $4, $5::text::json, $6, $7, $8::text::json,
                timestamptz 'epoch' + $9 * interval '1 microsecond')
         returning id",
    )
    .bind(event.event_id.to_string())
    .bind(&event.aggregate_type[..])
    .bind(&event.aggregate_id[..])
    .bind(&event.event_type[..])
    .bind(json.map(|json| std::str::from_utf8(json).unwrap()))
    .bind(bytes)
    .bind(event.content_type.as_deref())
    .bind(event.headers.as_deref())
    .bind(event.occurred_at_us)
    .fetch_one(connection)
    .await
    .unwrap();
    event.id = EventId(id);
}

impl PolledPostgres {
    fn source_with(&self, mode: CaptureMode) -> PostgresSource {
        PostgresSource::new(Settings {
            connector: self.database.options.clone().into(),
            direct_connector: self.database.options.clone().into(),
            mode,
            poll_interval: POLL_INTERVAL,
        })
    }

    /// Emits in a transaction of its own and leaves it open.
    pub async fn begin_late(&mut self, mut events: Vec<Event>) -> Late {
        let mut connection = self.database.connect().await;
        connection.execute("begin").await.unwrap();
        for event in &mut events {
            insert_into_postgres(&mut connection, event).await;
        }
        Late { connection, events }
    }
}

/// A transaction that has emitted and is still open.
pub struct Late {
    pub connection: PgConnection,
    pub events: Vec<Event>,
}

impl Late {
    pub async fn commit(mut self) -> Vec<Event> {
        self.connection.execute("commit").await.unwrap();
        self.connection.close().await.unwrap();
        self.events
    }

    pub async fn prepare(mut self, name: &str) -> Vec<Event> {
        let prepare = format!("prepare transaction '{name}'");
        execute(&mut self.connection, prepare).await;
        self.connection.close().await.unwrap();
        self.events
    }
}

impl Log for PolledPostgres {
    type Source = PostgresSource;
    type Writer = PgConnection;

    async fn create() -> Option<Self> {
        let database = TestDatabase::create().await?;
        let writer = database.connect().await;
        Some(Self { database, writer })
    }

    fn source(&self) -> PostgresSource {
        self.source_with(CaptureMode::Poll)
    }

    fn writer(&mut self) -> &mut PgConnection {
        &mut self.writer
    }

    async fn connect(&self) -> PgConnection {
        self.database.connect().await
    }

    async fn write(&mut self) {
        self.writer
            .execute("select pg_current_xact_id()")
            .await
            .unwrap();
    }
}

/// PostgreSQL, woken by notifications.
pub struct HeardPostgres(PolledPostgres);

impl HeardPostgres {
    /// Nobody answers where it would listen.
    pub fn source_that_cannot_listen(&self) -> PostgresSource {
        let options = self.0.database.options.clone();
        PostgresSource::new(Settings {
            direct_connector: options.clone().port(1).into(),
            connector: options.into(),
            mode: CaptureMode::Listen,
            poll_interval: POLL_INTERVAL,
        })
    }

    /// Emits in a transaction of its own and leaves it open.
    pub async fn begin_late(&mut self, events: Vec<Event>) -> Late {
        self.0.begin_late(events).await
    }

    /// Connections of this database that wait for notifications.
    pub async fn listeners(&mut self) -> i64 {
        sqlx::query_scalar(
            "select count(*) from pg_stat_activity
              where datname = current_database() and query ilike 'listen %'",
        )
        .fetch_one(self.writer())
        .await
        .unwrap()
    }
}

impl Log for HeardPostgres {
    type Source = PostgresSource;
    type Writer = PgConnection;

    async fn create() -> Option<Self> {
        PolledPostgres::create().await.map(Self)
    }

    fn source(&self) -> PostgresSource {
        self.0.source_with(CaptureMode::Listen)
    }

    fn writer(&mut self) -> &mut PgConnection {
        self.0.writer()
    }

    async fn connect(&self) -> PgConnection {
        self.0.connect().await
    }

    async fn write(&mut self) {
        self.0.write().await;
    }

    async fn tells(&mut self) -> bool {
        self.listeners().await > 0
    }

    fn wake_max(&self) -> Duration {
        // The poll below notifications.
        Duration::from_secs(1)
    }
}

fn columns(payload: &Payload) -> (Option<&[u8]>, Option<&[u8]>) {
    match payload {
        Payload::Tombstone | Payload::Unread(_) => (None, None),
        Payload::Json(json) => (Some(json), None),
        Payload::Encoded(bytes) => (None, Some(bytes)),
        Payload::Ambiguous(json, bytes) => (Some(json), Some(bytes)),
    }
}
