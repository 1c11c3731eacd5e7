//! What operators gave up on purpose: the auditor tells it from what is lost.

use std::process::Stdio;

use serde_json::Value;

use super::process::Setup;
use super::verify::{counts, settled, sqlite, verify};
use super::{Line, PATIENCE, eventually, run};

/// An outbox with one event that can't be published, one behind it and one of somebody else, and `lose`, which makes an
/// event that the cursor has passed and that nobody published.
async fn what_was_dropped_is_told_from_what_is_lost(
    setup: &Setup,
    run: impl AsyncFn(&'static str),
    lose: &'static str,
) {
    let relay = setup.start();
    let parked = |report: &Value| report["pipelines"][0]["parked"].clone();
    let report = settled(setup).await;
    assert_eq!((counts(&report), parked(&report)), ([0; 5], 2.into()));
    relay.stop().await;
    let mut drop = setup.command("parked");
    drop.args(["drop", "--entity", "order/1", "--reason", "test data"])
        .stdout(Stdio::null());
    let done = tokio::task::spawn_blocking(move || drop.status().unwrap());
    assert!(done.await.unwrap().success());
    // A wish is not a deed: nobody has given it up yet.
    let (code, report) = verify(setup, &[]).await;
    assert_eq!((code, parked(&report)), (0, 2.into()), "{report}");
    assert_eq!(report["pipelines"][0]["dropped"], 0);

    let relay = setup.start();
    let report = eventually("the event is dropped", PATIENCE, async || {
        let (code, report) = verify(setup, &[]).await;
        (parked(&report) == 0).then_some((code, report))
    });
    let (code, report) = report.await;
    assert_eq!((code, counts(&report)), (0, [0; 5]), "{report}");
    let pipeline = &report["pipelines"][0];
    assert_eq!(pipeline["notes"], serde_json::json!([]));
    // What waited behind it is published.
    assert_eq!(
        (&pipeline["dropped"], &pipeline["found"]),
        (&1.into(), &2.into())
    );
    relay.stop().await;

    run(lose).await;
    let (code, report) = verify(setup, &[]).await;
    assert_eq!((code, counts(&report)), (3, [1, 0, 0, 0, 0]), "{report}");
    assert_eq!(report["pipelines"][0]["dropped"], 1);
    let mut command = setup.command("verify");
    let said = tokio::task::spawn_blocking(move || command.output().unwrap());
    let said = String::from_utf8(said.await.unwrap().stdout).unwrap();
    for part in [
        "dropped       1 ",
        "`outbox-relay acts`",
        "missing       1 ",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_operator_dropped_is_no_finding_and_what_is_lost_is() {
    const TEST: &str = "what_an_operator_dropped_is_no_finding_and_what_is_lost_is";
    let Some(line) = Line::create(TEST).await else {
        return;
    };
    line.kafka.create(&["order"]).await;
    let pool = &line.database.pool;
    run(
        pool,
        "alter table outbox.events drop constraint events_headers_can_leave;
         insert into outbox.events (aggregate_type, aggregate_id, event_type, payload, headers)
         values ('order', '1', 'bad', '1', '[1]'), ('order', '1', 'good', '2', null), ('order', '2', 'good', '3', null)",
    )
    .await;
    let lose = "insert into outbox.events (xid, aggregate_type, aggregate_id, event_type, payload)
                select xid, 'order', '2', 'lost', '{}' from outbox.events order by id limit 1;
                update outbox.cursors set last_id = ceiling + 1000000, ceiling = ceiling + 1000000";
    what_was_dropped_is_told_from_what_is_lost(&line.setup, async |sql| run(pool, sql).await, lose)
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_operator_dropped_from_sqlite_is_no_finding_and_what_is_lost_is() {
    const TEST: &str = "what_an_operator_dropped_from_sqlite_is_no_finding_and_what_is_lost_is";
    let Some((file, _, setup)) = sqlite(TEST).await else {
        return;
    };
    let run = async |sql: &'static str| {
        let mut connection = file.connect().await;
        sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
    };
    run(
        "drop trigger outbox_events_headers_can_leave;
         insert into outbox_events (aggregate_type, aggregate_id, event_type, payload, headers)
         values ('order', '1', 'bad', '1', '[1]'), ('order', '1', 'good', '2', null), ('order', '2', 'good', '3', null)",
    )
    .await;
    let lose = "insert into outbox_events (aggregate_type, aggregate_id, event_type) values ('order', '2', 'lost');
                update outbox_cursors set last_id = 4";
    what_was_dropped_is_told_from_what_is_lost(&setup, run, lose).await;
}
