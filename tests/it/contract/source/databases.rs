//! What a source keeps of one database only, or of the way in which it is woken.

use super::*;
use outbox_relay::source::postgres::PostgresSource;

use crate::harness::log::HeardPostgres;

#[tokio::test]
async fn a_transaction_left_open_holds_nobody_up_and_appears_later() {
    let Some(mut log) = PolledPostgres::create().await else {
        return;
    };
    let mut reader = Reader::new(&log);
    let first = log.begin_late(vec![event("late1"), event("late1")]).await;
    let mut emitted = Vec::new();
    let mut between = None;
    for round in 0..10 {
        emitted.extend(log.emit(vec![event("e1"), event("e2")]).await);
        if round == 4 {
            between = Some(log.begin_late(vec![event("late2")]).await);
        }
        reader.drain(&mut log, ROOMY).await;
        assert_eq!(reader.events(), emitted);
    }
    emitted.extend(between.unwrap().commit().await);
    reader.drain(&mut log, ROOMY).await;
    assert_eq!(reader.events(), emitted, "the younger one ended first");
    emitted.extend(first.commit().await);
    reader.drain(&mut log, ROOMY).await;
    assert_eq!(reader.events(), emitted);
    assert_repeatable(&mut log, &reader.pages).await;
}

#[tokio::test]
async fn late_events_are_paged_like_others_and_repeatable() {
    let Some(mut log) = PolledPostgres::create().await else {
        return;
    };
    let mut reader = Reader::new(&log);
    let mut open = Vec::new();
    for n in 0..4 {
        let events = (0..5).map(|_| event(&format!("late{n}"))).collect();
        open.push(log.begin_late(events).await);
    }
    log.emit(vec![event("e")]).await;
    reader.drain(&mut log, ROOMY).await;
    // One window with the rows of two old transactions, which lie between each other's, and with new ones.
    open.pop().unwrap().commit().await;
    open.remove(0).commit().await;
    log.emit((0..5).map(|_| event("e")).collect()).await;
    reader
        .drain(&mut log, PageLimits { rows: 4, ..ROOMY })
        .await;
    for late in open {
        late.commit().await;
    }
    reader
        .drain(&mut log, PageLimits { rows: 3, ..ROOMY })
        .await;
    assert_eq!(reader.events().len(), 26);
    assert_repeatable(&mut log, &reader.pages).await;
}

#[tokio::test]
async fn a_prepared_transaction_appears_when_it_is_committed() {
    let Some(mut log) = PolledPostgres::create().await else {
        return;
    };
    let mut reader = Reader::new(&log);
    // PostgreSQL prepares no transaction that notifies.
    log.writer()
        .execute("alter table outbox.events disable trigger events_notify")
        .await
        .unwrap();
    let name = Uuid::new_v4().to_string();
    let late = log.begin_late(vec![event("late")]).await;
    let late = late.prepare(&name).await;
    let mut emitted = log.emit(vec![event("e")]).await;
    reader.drain(&mut log, ROOMY).await;
    assert_eq!(reader.events(), emitted);
    let commit = format!("commit prepared '{name}'");
    execute(log.writer(), commit).await;
    emitted.extend(late);
    reader.drain(&mut log, ROOMY).await;
    assert_eq!(reader.events(), emitted);
}

#[tokio::test]
async fn a_transaction_rolled_back_late_never_appears() {
    let Some(mut log) = PolledPostgres::create().await else {
        return;
    };
    let mut reader = Reader::new(&log);
    let late = log.begin_late(vec![event("late")]).await;
    let mut emitted = log.emit(vec![event("e")]).await;
    reader.drain(&mut log, ROOMY).await;
    late.connection.close().await.unwrap();
    emitted.extend(log.emit(vec![event("e")]).await);
    reader.drain(&mut log, ROOMY).await;
    assert_eq!(reader.events(), emitted);
}

/// What a writer on another version of SQLite can do to the file between two looks.
#[tokio::test]
async fn deleted_rows_and_idle_looks_leave_the_order_alone() {
    let mut log = SqliteLog::create().await.unwrap();
    let mut reader = Reader::new(&log);
    let first = log.emit(vec![event("e1"), event("e2")]).await;
    reader.drain(&mut log, ROOMY).await;
    log.writer()
        .execute("delete from outbox_events")
        .await
        .unwrap();
    reader.drain(&mut log, ROOMY).await;
    // Emitted and deleted before anybody looked: the window ends above its last event.
    log.emit(vec![event("e1")]).await;
    log.writer()
        .execute("delete from outbox_events")
        .await
        .unwrap();
    reader.drain(&mut log, ROOMY).await;
    let second = log.emit(vec![event("e1")]).await;
    reader.drain(&mut log, ROOMY).await;
    assert_eq!(reader.events(), [first, second].concat());
    migrate::sqlite(log.file.options.clone()).await.unwrap();
}

/// The uuids of what is new to a relay whose cursor stands where the last one stopped, which a ledger has written down.
async fn read_and_note(log: &SqliteLog, at: &mut Position) -> Vec<Uuid> {
    let mut source = log.source();
    source.seek(at.clone());
    let mut uuids = Vec::new();
    loop {
        let page = source.capture(ROOMY, at).await.unwrap();
        if page.events.is_empty() {
            break;
        }
        uuids.extend(page.events.iter().map(|event| event.event_id));
        *at = page.end;
    }
    sqlx::query("insert or replace into outbox_cursors (pipeline, ceiling, last_id) values ('main', ?1, ?1)")
        .bind(at.last_id.0)
        .execute(&mut log.connect().await)
        .await
        .unwrap();
    uuids
}

#[tokio::test]
async fn ids_of_sqlite_that_began_anew_lose_nothing() {
    let mut log = SqliteLog::create().await.unwrap();
    let mut at = Position::beginning();
    let uuids = |events: Vec<Event>| -> Vec<Uuid> {
        events.into_iter().map(|event| event.event_id).collect()
    };
    let batch = |events: usize| (0..events).map(|_| event("e")).collect::<Vec<_>>();
    let first = uuids(log.emit(batch(10)).await);
    assert_eq!(read_and_note(&log, &mut at).await, first);
    // As many as there were, fewer and more; the sequence is forgotten, or set back.
    for (events, reset) in [
        (10, "delete from sqlite_sequence"),
        (3, "update sqlite_sequence set seq = 0"),
        (25, "update sqlite_sequence set seq = 1"),
    ] {
        let statement = format!("delete from outbox_events; {reset}");
        execute_sqlite(log.writer(), &statement).await;
        let again = uuids(log.emit(batch(events)).await);
        assert_eq!(read_and_note(&log, &mut at).await, again, "{reset}");
        // Several rows of one statement, and what comes after them.
        execute_sqlite(
            log.writer(),
            "delete from outbox_events; delete from sqlite_sequence; \
             insert into outbox_events (aggregate_type, aggregate_id, event_type) \
             values ('thing', 'e', 'a'), ('thing', 'e', 'b'), ('thing', 'e', 'c')",
        )
        .await;
        let after = uuids(log.emit(batch(1)).await);
        let read = read_and_note(&log, &mut at).await;
        assert_eq!(read.len(), 4, "{reset}");
        assert_eq!(read.last(), after.last(), "{reset}");
    }
}

async fn execute_sqlite(connection: &mut sqlx::sqlite::SqliteConnection, statement: &str) {
    connection
        .execute(sqlx::raw_sql(sqlx::AssertSqlSafe(statement.to_owned())))
        .await
        .unwrap();
}

#[tokio::test]
async fn content_of_sqlite_that_is_too_large_stays_in_the_log() {
    let mut log = SqliteLog::create().await.unwrap();
    let mut at = Position::beginning();
    log.emit(vec![event("e")]).await;
    execute_sqlite(
        log.writer(),
        "insert into outbox_events (aggregate_type, aggregate_id, event_type, payload_bytes) \
         values ('thing', 'e', 'large', zeroblob(20000000)), \
                ('thing', cast(zeroblob(9000000) as text), 'large', null)",
    )
    .await;
    log.emit(vec![event("e")]).await;
    let mut source = log.source();
    source.seek(at.clone());
    let mut unread = Vec::new();
    loop {
        let page = source.capture(ROOMY, &at).await.unwrap();
        if page.events.is_empty() {
            break;
        }
        unread.extend(
            page.events
                .iter()
                .map(|event| matches!(event.payload, Payload::Unread(_))),
        );
        at = page.end;
    }
    assert_eq!(unread, [false, true, true, false]);
}

/// A reader with a transaction open would let the write-ahead log grow for ever.
#[tokio::test]
async fn reading_sqlite_does_not_hold_the_write_ahead_log() {
    let mut log = SqliteLog::create().await.unwrap();
    log.emit((0..10).map(|_| event("e")).collect()).await;
    let mut source = log.source();
    let limits = PageLimits { rows: 4, ..ROOMY };
    let page = capture(&mut source, limits, &Position::beginning()).await;
    assert!(page.more);
    log.emit(vec![event("e")]).await;
    let (busy, frames, moved): (i64, i64, i64) = sqlx::query_as("pragma wal_checkpoint(truncate)")
        .fetch_one(log.writer())
        .await
        .unwrap();
    assert_eq!((busy, frames, moved), (0, 0, 0));
}

/// Of two that are open at the same time one notifies. The other is looked for at once, and who has seen all looks no more.
#[tokio::test]
async fn a_commit_without_a_notification_is_looked_for() {
    let Some(mut log) = HeardPostgres::create().await else {
        return;
    };
    let mut reader = Reader::new(&log);
    listens(&mut reader, &mut log, ROOMY).await;
    let idle = log.wake_max() / 2;
    let mut looked_after = Vec::new();
    for round in 0..5 {
        let notifying = log.begin_late(vec![event("first")]).await;
        let silent = log.begin_late(vec![event("second")]).await;
        let mut emitted = notifying.commit().await;
        let found = async {
            while reader.events().len() == 2 * round {
                reader.source.wake().await;
                reader.drain(&mut log, ROOMY).await;
            }
        };
        timeout(PATIENCE, found).await.expect("the first");
        let began = Instant::now();
        reader.source.wake().await;
        looked_after.push(began.elapsed());
        emitted.extend(silent.commit().await);
        reader.drain(&mut log, ROOMY).await;
        assert!(reader.events().ends_with(&emitted));
        let began = Instant::now();
        reader.source.wake().await;
        assert!(began.elapsed() >= idle, "nobody is missing");
        reader.drain(&mut log, ROOMY).await;
    }
    // The quickest: the machine may hold up any of them, and one that waits for a notification always waits.
    let quickest = looked_after.iter().min();
    assert!(quickest < Some(&idle), "{looked_after:?}");
}

/// One that all writers had to wake would take more of the machine than they do.
#[tokio::test]
async fn nobody_listens_in_a_crowd() {
    const CROWD: usize = 40;
    // What one look counts for at most.
    let limits = PageLimits { rows: 32, ..ROOMY };
    let Some(mut log) = HeardPostgres::create().await else {
        return;
    };
    let mut reader = Reader::new(&log);
    listens(&mut reader, &mut log, limits).await;
    log.emit(vec![event("e"); CROWD * limits.rows]).await;
    reader.drain(&mut log, limits).await;
    reader.source.wake().await;
    listens_no_more(&mut log).await;
    listens(&mut reader, &mut log, limits).await;
    assert_eq!(reader.events().len(), CROWD * limits.rows);
}

/// What nobody takes would be kept by the server, until it has no more room and nobody can commit.
#[tokio::test]
async fn nobody_listens_who_rests() {
    let Some(mut log) = HeardPostgres::create().await else {
        return;
    };
    let mut reader = Reader::new(&log);
    listens(&mut reader, &mut log, ROOMY).await;
    reader.source.rest();
    listens_no_more(&mut log).await;
    let emitted = log.emit(vec![event("e")]).await;
    listens(&mut reader, &mut log, ROOMY).await;
    assert_eq!(reader.events(), emitted);
}

/// Attempts to listen take seconds where they fail, and are made again and again.
#[tokio::test]
async fn who_cannot_listen_polls() {
    let Some(log) = HeardPostgres::create().await else {
        return;
    };
    let mut source = log.source_that_cannot_listen();
    let mut waited = Vec::new();
    for _ in 0..5 {
        capture(&mut source, ROOMY, &Position::beginning()).await;
        let began = Instant::now();
        source.wake().await;
        waited.push(began.elapsed());
    }
    // The quickest of those behind the beginning: the machine may hold up any of them.
    let quickest = waited[1..].iter().min();
    assert!(quickest < Some(&Duration::from_secs(1)), "{waited:?}");
}

/// Waits until it does.
async fn listens(reader: &mut Reader<PostgresSource>, log: &mut HeardPostgres, limits: PageLimits) {
    let listening = async {
        while log.listeners().await == 0 {
            reader.drain(log, limits).await;
            reader.source.wake().await;
        }
        reader.drain(log, limits).await;
    };
    timeout(PATIENCE, listening).await.expect("it listens");
}

async fn listens_no_more(log: &mut HeardPostgres) {
    let deaf = async { while log.listeners().await > 0 {} };
    timeout(PATIENCE, deaf).await.expect("it listens no more");
}
