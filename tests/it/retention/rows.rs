//! Events leave by their age also where no partition takes them along: young outboxes, slow ones, the default partition.

use sqlx::postgres::PgConnection;

use super::{NOTHING, WEEK, publish, retire, sample};
use crate::fresh::{self, attempt, emit, run, value, values};

/// What one call did: ids, events, of them unpublished, and how far it looked.
async fn delete(relay: &mut PgConnection, arguments: &str) -> Vec<String> {
    values(
        relay,
        &format!(
            "select concat_ws(' ', first_id, last_id, events, unpublished, looked_to)
               from outbox.retire_rows({arguments})"
        ),
    )
    .await
}

/// Ids that are retained.
async fn retained(superuser: &mut PgConnection) -> String {
    let ids = "select coalesce(string_agg(id::text, ' ' order by id), 'none') from outbox.events";
    value(superuser, ids).await
}

async fn emit_some(superuser: &mut PgConnection, events: u32) {
    let emit =
        format!("select outbox.emit('order', '1', 'p', '{{}}') from generate_series(1, {events})");
    run(superuser, &emit).await;
}

#[tokio::test]
async fn a_young_outbox_forgets_what_is_old() {
    let test = "retention::rows::a_young_outbox_forgets_what_is_old";
    fresh::database(test, async |database| {
        let mut superuser = database.superuser().await;
        let mut relay = database.relay("relay").await;
        emit_some(&mut superuser, 20).await;
        sample(&mut superuser, 0.0).await;
        sample(&mut superuser, 6.0).await;
        emit_some(&mut superuser, 10).await;
        sample(&mut superuser, 0.0).await;
        publish(&mut superuser, "main", 30).await;
        assert_eq!(delete(&mut relay, WEEK).await, NOTHING, "6 days old");
        sample(&mut superuser, 2.0).await;
        assert_eq!(
            retire(&mut relay, WEEK).await,
            NOTHING,
            "no partition can go whole"
        );
        // Three rows at a time, as far as the sample of eight days ago reaches.
        let from = |after: &str| format!("{WEEK}, null, null, {after}, 15");
        assert_eq!(delete(&mut relay, &from("null")).await, ["1 15 15 0 15"]);
        assert_eq!(delete(&mut relay, &from("15")).await, ["16 20 5 0 20"]);
        assert_eq!(delete(&mut relay, &from("20")).await, NOTHING);
        assert_eq!(
            retained(&mut superuser).await,
            "21 22 23 24 25 26 27 28 29 30"
        );
    })
    .await;
}

#[tokio::test]
async fn the_default_partition_forgets_what_is_old() {
    let test = "retention::rows::the_default_partition_forgets_what_is_old";
    fresh::database(test, async |database| {
        let mut superuser = database.superuser().await;
        let mut relay = database.relay("relay").await;
        run(
            &mut superuser,
            "select setval('outbox.events_id_seq', 100000000)",
        )
        .await;
        emit_some(&mut superuser, 3).await;
        assert_eq!(
            value(
                &mut superuser,
                "select count(*)::text from only outbox.events_default"
            )
            .await,
            "3"
        );
        sample(&mut superuser, 0.0).await;
        sample(&mut superuser, 8.0).await;
        publish(&mut superuser, "main", 100_000_003).await;
        assert_eq!(
            delete(&mut relay, WEEK).await,
            ["100000001 100000003 3 0 100000003"]
        );
        assert_eq!(retained(&mut superuser).await, "none");
    })
    .await;
}

#[tokio::test]
async fn what_is_needed_stays_and_the_rest_around_it_goes() {
    let test = "retention::rows::what_is_needed_stays_and_the_rest_around_it_goes";
    fresh::database(test, async |database| {
        let mut superuser = database.superuser().await;
        let mut relay = database.relay("relay").await;
        emit_some(&mut superuser, 12).await;
        sample(&mut superuser, 0.0).await;
        sample(&mut superuser, 8.0).await;
        publish(&mut superuser, "main", 10).await;
        // The relay could not read 3: it is parked without content. 4 is parked with it.
        run(
            &mut superuser,
            "insert into outbox.parked (pipeline, id, event_id, aggregate_type, aggregate_id, event_type, occurred_at, has_content)
             select 'main', id, event_id, aggregate_type, aggregate_id, event_type, occurred_at, id = 4
               from outbox.events where id in (3, 4);
             insert into outbox.replays (pipeline, selection, rate, from_id, until_id, last_id, holder, expires_at)
             values ('main', '{}', 1, 5, 7, 5, 'me', clock_timestamp())",
        )
        .await;
        assert_eq!(delete(&mut relay, WEEK).await, ["1 10 7 0 12"]);
        assert_eq!(retained(&mut superuser).await, "3 6 7 11 12");
        // Nor does a time after which unpublished events are lost remove what a replay or a person still needs.
        let lost = format!("{WEEK}, '7 days'");
        assert_eq!(delete(&mut relay, &lost).await, ["11 12 2 2 12"]);
        run(
            &mut superuser,
            "delete from outbox.parked; update outbox.replays set state = 'cancelled'",
        )
        .await;
        assert_eq!(delete(&mut relay, WEEK).await, ["3 7 3 0 7"]);
        assert_eq!(
            values(
                &mut superuser,
                "select concat_ws(' ', who, action, pipeline, selector, events) from outbox.acts"
            )
            .await,
            ["retention lost main ids 11 to 12 2"]
        );
    })
    .await;
}

#[tokio::test]
async fn a_pipeline_that_stands_or_has_not_begun_keeps_its_events() {
    let test = "retention::rows::a_pipeline_that_stands_or_has_not_begun_keeps_its_events";
    fresh::database(test, async |database| {
        let mut superuser = database.superuser().await;
        let mut relay = database.relay("relay").await;
        emit_some(&mut superuser, 6).await;
        sample(&mut superuser, 0.0).await;
        sample(&mut superuser, 8.0).await;
        assert_eq!(
            delete(&mut relay, WEEK).await,
            ["0 0 6"],
            "main has not begun"
        );
        publish(&mut superuser, "main", 6).await;
        publish(&mut superuser, "slow", 2).await;
        assert_eq!(delete(&mut relay, WEEK).await, ["1 2 2 0 6"]);
        assert_eq!(delete(&mut relay, WEEK).await, ["0 0 6"]);
        // After the time at which it was to be lost, a loss is written down for the pipeline that had it.
        let lost = format!("{WEEK}, '7 days'");
        assert_eq!(delete(&mut relay, &lost).await, ["3 6 4 4 6"]);
        let acts =
            "select concat_ws(' ', who, action, pipeline, selector, events) from outbox.acts";
        assert_eq!(
            values(&mut superuser, acts).await,
            ["retention lost slow ids 3 to 6 4"]
        );
    })
    .await;
}

#[tokio::test]
async fn writers_go_on_beside_it() {
    let test = "retention::rows::writers_go_on_beside_it";
    fresh::database(test, async |database| {
        let mut superuser = database.superuser().await;
        let mut relay = database.relay("relay").await;
        let mut open = database.writer("open").await;
        emit_some(&mut superuser, 5).await;
        sample(&mut superuser, 0.0).await;
        sample(&mut superuser, 8.0).await;
        publish(&mut superuser, "main", 5).await;
        run(&mut open, "begin").await;
        emit(&mut open, "1").await;
        assert_eq!(delete(&mut relay, WEEK).await, ["1 5 5 0 5"]);
        // And while the deletion is not committed, too.
        emit_some(&mut superuser, 5).await;
        sample(&mut superuser, 0.0).await;
        sample(&mut superuser, 8.0).await;
        publish(&mut superuser, "main", 11).await;
        run(&mut relay, "begin").await;
        assert_eq!(delete(&mut relay, WEEK).await, ["7 11 5 0 11"]);
        run(&mut superuser, "set statement_timeout = '5s'").await;
        emit(&mut superuser, "1").await;
        run(&mut open, "commit").await;
        run(&mut relay, "commit").await;
        assert_eq!(retained(&mut superuser).await, "6 12");
    })
    .await;
}

#[tokio::test]
async fn a_foreign_key_is_named() {
    let test = "retention::rows::a_foreign_key_is_named";
    fresh::database(test, async |database| {
        let mut superuser = database.superuser().await;
        let mut relay = database.relay("relay").await;
        emit_some(&mut superuser, 5).await;
        run(
            &mut superuser,
            "create table note (event bigint constraint note_event references outbox.events (id));
             insert into note values (3)",
        )
        .await;
        sample(&mut superuser, 0.0).await;
        sample(&mut superuser, 8.0).await;
        publish(&mut superuser, "main", 5).await;
        let refused = attempt(
            &mut relay,
            &format!("select * from outbox.retire_rows({WEEK})"),
        )
        .await
        .unwrap_err();
        assert!(refused.to_string().contains("note_event"), "{refused}");
        assert_eq!(retire(&mut relay, WEEK).await, NOTHING);
        run(&mut superuser, "delete from note").await;
        assert_eq!(delete(&mut relay, WEEK).await, ["1 5 5 0 5"]);
    })
    .await;
}

/// Without statistics a planner would read and sort all that is old for each batch.
#[tokio::test]
async fn a_batch_costs_what_its_own_rows_cost() {
    let test = "retention::rows::a_batch_costs_what_its_own_rows_cost";
    fresh::database(test, async |database| {
        let mut superuser = database.superuser().await;
        run(
            &mut superuser,
            "alter table outbox.events_1 set (autovacuum_enabled = off)",
        )
        .await;
        run(
            &mut superuser,
            "insert into outbox.events (aggregate_type, aggregate_id, event_type)
             select 'order', repeat('x', 400), 'p' from generate_series(1, 100000)",
        )
        .await;
        sample(&mut superuser, 0.0).await;
        sample(&mut superuser, 8.0).await;
        publish(&mut superuser, "main", 100_000).await;
        let batch = format!("select * from outbox.retire_rows({WEEK}, null, null, null, 1000)");
        // The catalogs are read once.
        run(&mut superuser, &batch).await;
        let explain = format!("explain (analyze, buffers) {batch}");
        let plan = values(&mut superuser, &explain).await.join("\n");
        let hits = plan.split_once("shared hit=").unwrap().1;
        let digits: String = hits.chars().take_while(char::is_ascii_digit).collect();
        let buffers: u32 = digits.parse().unwrap();
        assert!(buffers < 5000, "{plan}");
    })
    .await;
}
