//! Random services: transactions of every kind that PostgreSQL has, which emit events of entities that they lock.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use sqlx::Connection;
use sqlx::postgres::PgConnection;
use tokio::time::{Instant, sleep};

use super::database::{Database, ask, sql};
use super::oracle::{Token, Written};

/// How many entities everybody fights for.
const HOT: u64 = 5;

/// Repeatable randomness (splitmix64).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub(crate) fn index(&mut self, limit: usize) -> usize {
        usize::try_from(self.below(limit as u64)).expect("below a usize")
    }
}

/// What the writers of a run share.
#[derive(Default)]
pub(crate) struct Journal {
    committed: Mutex<HashMap<Token, Written>>,
    tokens: AtomicU64,
    transactions: AtomicU64,
    finished: AtomicBool,
}

impl Journal {
    pub(crate) fn commit(&self, events: Vec<(Token, Written)>) {
        self.transactions.fetch_add(1, Ordering::Relaxed);
        self.locked().extend(events);
    }

    pub(crate) fn token(&self) -> Token {
        self.tokens.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn transactions(&self) -> u64 {
        self.transactions.load(Ordering::Relaxed)
    }

    pub(crate) fn committed(&self) -> HashMap<Token, Written> {
        self.locked().clone()
    }

    /// Nobody writes any more.
    pub(crate) fn finish(&self) {
        self.finished.store(true, Ordering::SeqCst);
    }

    pub(crate) fn finished(&self) -> bool {
        self.finished.load(Ordering::SeqCst)
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, HashMap<Token, Written>> {
        self.committed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The tables of the service.
pub(crate) async fn prepare(database: &Database) {
    let mut connection = database.connect().await;
    sql(
        &mut connection,
        "create table entities (id text primary key, change bigint not null default 0) with (fillfactor = 50);
         create table elsewhere (note text);
         insert into entities (id) select 'hot-' || n from generate_series(0, 9) n;
         insert into entities (id) select 'own-' || n from generate_series(0, 99) n;",
    )
    .await;
}

/// One service with one connection.
pub(crate) struct Writer<'a> {
    pub(crate) journal: &'a Journal,
    pub(crate) connection: PgConnection,
    pub(crate) random: Random,
    /// Its number; it has one entity that nobody else writes.
    pub(crate) number: usize,
    /// Whether the open transaction takes its time.
    slow: bool,
    /// What the transaction that is open would commit.
    events: Vec<(Token, Written)>,
}

impl<'a> Writer<'a> {
    pub(crate) async fn new(
        database: &Database,
        journal: &'a Journal,
        seed: u64,
        number: usize,
    ) -> Writer<'a> {
        Writer {
            journal,
            connection: database.connect().await,
            random: Random::new(seed.wrapping_mul(1_000_003).wrapping_add(number as u64)),
            number,
            slow: true,
            events: Vec::new(),
        }
    }

    /// Transactions one after the other, until then.
    pub(crate) async fn run(mut self, until: Instant) {
        while Instant::now() < until {
            self.transaction().await;
        }
    }

    async fn transaction(&mut self) {
        sql(&mut self.connection, "begin").await;
        self.slow = self.random.chance(20);
        let two_phase = self.random.chance(8);
        if two_phase {
            // PostgreSQL refuses to prepare what has notified.
            sql(&mut self.connection, "set local outbox.notify = off").await;
        }
        if self.random.chance(40) {
            // The transaction id is now older than the lock of the entity.
            sql(
                &mut self.connection,
                "insert into elsewhere values ('early')",
            )
            .await;
            self.pause(10).await;
        }
        // Who takes long keeps the others waiting.
        let hot_max = if self.slow { 2 } else { 4 };
        let mut hot: Vec<u64> = (0..self.random.below(hot_max))
            .map(|_| self.random.below(HOT))
            .collect();
        // In one order for everybody, so that nobody ends in a deadlock.
        hot.sort_unstable();
        hot.dedup();
        for n in hot {
            self.perhaps_in_savepoint(&format!("hot-{n}")).await;
        }
        let own = format!("own-{}", self.number);
        self.perhaps_in_savepoint(&own).await;
        if self.random.chance(10) {
            self.pause(200).await;
        }
        if two_phase {
            self.end_in_two_phases().await;
        } else {
            let commit = self.random.chance(85);
            self.end(commit).await;
        }
    }

    async fn perhaps_in_savepoint(&mut self, entity: &str) {
        if self.random.chance(25) {
            sql(&mut self.connection, "savepoint part").await;
            let before = self.events.len();
            self.change(entity).await;
            if self.random.chance(60) {
                sql(&mut self.connection, "rollback to savepoint part").await;
                self.events.truncate(before);
            } else {
                sql(&mut self.connection, "release savepoint part").await;
                return;
            }
            if self.random.chance(50) {
                return;
            }
        }
        self.change(entity).await;
    }

    /// Changes an entity once, and emits the events of that change.
    pub(crate) async fn change(&mut self, entity: &str) {
        let locked = format!(
            "update entities set change = change + 1 where id = '{entity}' returning change::text"
        );
        let change: u64 = ask(&mut self.connection, &locked)
            .await
            .parse()
            .expect("a number");
        self.pause(5).await;
        if self.random.chance(4) {
            let rows = 1 + self.random.below(300);
            self.copy(entity, change, rows).await;
            return;
        }
        for part in 0..=self.random.below(3) {
            let payload = self.event(entity, change, part);
            let emit = if self.random.chance(50) {
                format!("select outbox.emit('thing', '{entity}', 'changed', '{payload}')")
            } else {
                format!(
                    "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload) \
                     values ('thing', '{entity}', 'changed', '{payload}')"
                )
            };
            sql(&mut self.connection, &emit).await;
            if self.random.chance(20) {
                self.pause(5).await;
            }
        }
    }

    /// The events of one change by COPY.
    pub(crate) async fn copy(&mut self, entity: &str, change: u64, rows: u64) {
        let mut lines = String::new();
        for part in 0..rows {
            let payload = self.event(entity, change, part);
            writeln!(lines, "thing\t{entity}\tcopied\t{payload}").expect("write to a string");
        }
        let statement =
            "copy outbox.events (aggregate_type, aggregate_id, event_type, payload) from stdin";
        let mut copy = self
            .connection
            .copy_in_raw(statement)
            .await
            .expect("start the copy");
        copy.send(lines.into_bytes()).await.expect("send rows");
        assert_eq!(copy.finish().await.expect("finish the copy"), rows);
    }

    fn event(&mut self, entity: &str, change: u64, part: u64) -> String {
        let token = self.journal.token();
        let written = Written {
            entity: entity.to_owned(),
            change,
            part,
        };
        self.events.push((token, written));
        format!(r#"{{"token":{token},"change":{change},"part":{part}}}"#)
    }

    /// Ends the open transaction.
    pub(crate) async fn end(&mut self, commit: bool) {
        let events = std::mem::take(&mut self.events);
        if commit {
            sql(&mut self.connection, "commit").await;
            self.journal.commit(events);
        } else {
            sql(&mut self.connection, "rollback").await;
        }
    }

    async fn end_in_two_phases(&mut self) {
        let events = std::mem::take(&mut self.events);
        let gid = format!("gid-{}-{}", uuid::Uuid::new_v4().simple(), self.number);
        sql(
            &mut self.connection,
            &format!("prepare transaction '{gid}'"),
        )
        .await;
        self.pause(100).await;
        let commit = self.random.chance(70);
        let end = if commit { "commit" } else { "rollback" };
        sql(&mut self.connection, &format!("{end} prepared '{gid}'")).await;
        if commit {
            self.journal.commit(events);
        }
    }

    async fn pause(&mut self, limit_ms: u64) {
        if self.slow && self.random.chance(50) {
            let longest = limit_ms * 1_000;
            sleep(Duration::from_micros(self.random.below(longest))).await;
        }
    }
}

/// A transaction that stays open for the whole run, emits now and then, and commits at the end.
pub(crate) async fn left_open(database: &Database, journal: &Journal, seed: u64, until: Instant) {
    let mut writer = Writer::new(database, journal, seed, 99).await;
    sql(&mut writer.connection, "begin").await;
    while Instant::now() < until {
        writer.change("own-99").await;
        sleep(Duration::from_millis(50 + writer.random.below(300))).await;
    }
    writer.end(true).await;
}

/// Looks at the service's tables through snapshots that are held.
pub(crate) async fn repeatable_reader(database: &Database, seed: u64, until: Instant) {
    let mut connection = database.connect().await;
    let mut random = Random::new(seed);
    while Instant::now() < until {
        sql(&mut connection, "begin isolation level repeatable read").await;
        sql(&mut connection, "select sum(change) from entities").await;
        sleep(Duration::from_millis(random.below(400))).await;
        sql(&mut connection, "commit").await;
    }
    connection.close().await.expect("close");
}

/// Writes to another database of the same server, whose transaction ids are from the same counter.
pub(crate) async fn elsewhere(database: &Database, seed: u64, until: Instant) {
    let name = format!("{}_other", database.name);
    let mut here = database.connect().await;
    sql(&mut here, &format!("create database {name}")).await;
    let mut connection = PgConnection::connect_with(&database.options.clone().database(&name))
        .await
        .expect("connect to the other database");
    let mut random = Random::new(seed);
    sql(&mut connection, "create table noise (n bigint)").await;
    while Instant::now() < until {
        sql(&mut connection, "begin; insert into noise values (1)").await;
        sleep(Duration::from_millis(random.below(150))).await;
        let end = if random.chance(80) {
            "commit"
        } else {
            "rollback"
        };
        sql(&mut connection, end).await;
    }
    connection.close().await.expect("close");
    sql(&mut here, &format!("drop database {name} with (force)")).await;
}
