//! A database that was restored elsewhere: the relay refuses to guess, and what the README tells to do loses nothing.
//!
//! A dump carries the rows' transaction ids into a cluster that has not got that far: told by the ids alone, the rows
//! would count as not committed yet.

use std::time::Duration;

use outbox_relay::event::{EventId, Start};
use outbox_relay::ledger::postgres::PostgresLedger;
use outbox_relay::ledger::{Acquired, Ledger, Settings};
use outbox_relay::source::postgres::{self, CaptureMode, PostgresSource};
use outbox_relay::source::{PageLimits, Source};

use crate::harness::postgres::TestDatabase;

fn books(holder: &str) -> Settings {
    Settings {
        pipeline: "main".parse().unwrap(),
        holder: holder.to_owned(),
        lease_ttl: Duration::from_secs(10),
        start: Start::Earliest,
    }
}

/// The statements of the README's block after "restored", as a person would copy them.
fn remedy() -> String {
    let readme = include_str!("../../README.md");
    let (_, after) = readme
        .split_once("-- restored from a dump")
        .expect("the README says what to do");
    let (block, _) = after.split_once("```").expect("the block ends");
    let (_, statements) = block.split_once('\n').expect("the first line is a comment");
    statements.to_owned()
}

#[tokio::test]
async fn after_a_dump_and_restore_the_readme_s_remedy_publishes_everything() {
    const EVENTS: i64 = 2_500;
    let Some(database) = TestDatabase::create().await else {
        return;
    };
    let run = async |statements: &str| {
        sqlx::raw_sql(sqlx::AssertSqlSafe(statements.to_owned()))
            .execute(&database.pool)
            .await
            .unwrap();
    };
    let mut ledger = PostgresLedger::new(database.options.clone(), books("before"));
    assert!(matches!(ledger.acquire().await.unwrap(), Acquired::Ours(_)));
    ledger.release().await.unwrap();
    run(&format!(
        "select outbox.emit('order', n::text, 'placed') from generate_series(1, {EVENTS}) n"
    ))
    .await;
    run("update outbox.events set xid = '9000000000000'; update outbox.cursors set system_identifier = 1").await;

    let mut ledger = PostgresLedger::new(database.options.clone(), books("after"));
    let refused = ledger.acquire().await.unwrap_err().to_string();
    assert!(refused.contains("restored"), "{refused}");

    run(&remedy()).await;
    let mut ledger = PostgresLedger::new(database.options.clone(), books("again"));
    let tenure = loop {
        match ledger.acquire().await.unwrap() {
            Acquired::Ours(tenure) => break tenure,
            // The lease of the one that was refused has to end first.
            Acquired::Held { expires_in, .. } => tokio::time::sleep(expires_in).await,
        }
    };
    let mut source = PostgresSource::new(postgres::Settings {
        options: database.options.clone(),
        direct_options: database.options.clone(),
        mode: CaptureMode::Poll,
        poll_interval: Duration::from_millis(50),
    });
    source.seek(tenure.position.clone());
    let limits = PageLimits {
        rows: 100,
        bytes: 1 << 20,
    };
    let mut seen = Vec::new();
    loop {
        let page = source.capture(limits, &tenure.position).await.unwrap();
        seen.extend(page.events.iter().map(|event| event.id));
        if !page.more {
            break;
        }
    }
    assert_eq!(seen, (1..=EVENTS).map(EventId).collect::<Vec<_>>());
}
