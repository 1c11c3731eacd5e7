//! What every pipeline has published gives its space back, and nothing else does.

mod age;
mod rows;
mod sqlite;

use sqlx::postgres::PgConnection;

use crate::fresh::{self, Database, emit, run, value, values};

/// A database whose partitions hold ten events each; the superuser, and a relay.
async fn small_partitions(database: &Database) -> (PgConnection, PgConnection) {
    let mut superuser = database.superuser().await;
    run(
        &mut superuser,
        "do $$ declare name text; begin
           for name in select inhrelid::regclass::text from pg_inherits
                        where inhparent = 'outbox.events'::regclass and inhrelid <> 'outbox.events_default'::regclass
           loop execute 'drop table ' || name; end loop;
           perform outbox.make_partitions(3, 10);
         end $$",
    )
    .await;
    let relay = database.relay("relay").await;
    (superuser, relay)
}

/// So many events, which a sample has, and eight days pass for the relay, whatever the writers say about the time.
async fn emit_old(superuser: &mut PgConnection, events: u32) {
    run(
        superuser,
        &format!(
            "select outbox.emit('order', '1', 'order.placed', '{{}}') from generate_series(1, {events});
             update outbox.events set occurred_at = 'infinity' where id % 2 = 0;
             update outbox.events set occurred_at = '-infinity' where id % 2 = 1"
        ),
    )
    .await;
    sample(superuser, 0.0).await;
    sample(superuser, 8.0).await;
}

/// What a relay notes whose clock has counted so many days since the last time.
async fn sample(connection: &mut PgConnection, days: f64) -> f64 {
    let last = "select coalesce(max(counted), 0)::text from outbox.samples";
    let last: f64 = value(connection, last).await.parse().unwrap();
    let seconds = days * 86_400.0;
    let take = format!(
        "select outbox.take_sample('1 millisecond', '9 days', {last}, {})::text",
        seconds.max(0.001)
    );
    value(connection, &take).await.parse().unwrap()
}

/// Writes the cursor of a pipeline that has published what is committed now, up to an id.
async fn publish(superuser: &mut PgConnection, pipeline: &str, last_id: i64) {
    run(
        superuser,
        &format!(
            "delete from outbox.cursors where pipeline = '{pipeline}';
             insert into outbox.cursors (pipeline, prev, cur, floor, ceiling, next_floor, last_id, system_identifier, timeline)
             select '{pipeline}', '1:1:', pg_current_snapshot(), 0, 1000000, 0, {last_id}, s.system_identifier, c.timeline_id
               from pg_control_system() s, pg_control_checkpoint() c"
        ),
    )
    .await;
}

/// What one call did: partition, ids, events, of them unpublished, whether it is gone.
async fn retire(relay: &mut PgConnection, arguments: &str) -> Vec<String> {
    values(
        relay,
        &format!(
            "select concat_ws(' ', partition, first_id, last_id, events, unpublished, dropped)
               from outbox.retire_partition({arguments})"
        ),
    )
    .await
}

const WEEK: &str = "'7 days', array['main']";
const NOTHING: [&str; 0] = [];

#[tokio::test]
async fn a_partition_goes_when_everybody_has_published_it() {
    let test = "retention::a_partition_goes_when_everybody_has_published_it";
    fresh::database(test, async |database| {
        let (mut superuser, mut relay) = small_partitions(database).await;
        emit_old(&mut superuser, 25).await;
        assert_eq!(
            retire(&mut relay, WEEK).await,
            NOTHING,
            "main has no cursor"
        );
        run(
            &mut superuser,
            "insert into outbox.cursors (pipeline) values ('main')",
        )
        .await;
        assert_eq!(
            retire(&mut relay, WEEK).await,
            NOTHING,
            "main published nothing"
        );
        publish(&mut superuser, "main", 15).await;
        publish(&mut superuser, "audit", 3).await;
        assert_eq!(retire(&mut relay, WEEK).await, NOTHING, "audit is behind");
        publish(&mut superuser, "audit", 25).await;
        run(
            &mut superuser,
            "insert into outbox.cursors (pipeline, shard) values ('main', 1)",
        )
        .await;
        assert_eq!(
            retire(&mut relay, WEEK).await,
            NOTHING,
            "the second shard of main has not begun"
        );
        run(&mut superuser, "delete from outbox.cursors where shard = 1").await;
        assert_eq!(
            retire(&mut relay, "'9 days', array['main']").await,
            NOTHING,
            "too young"
        );
        assert_eq!(retire(&mut relay, "null").await, NOTHING, "kept for ever");
        assert_eq!(
            retire(&mut relay, WEEK).await,
            ["outbox.events_1 1 10 10 0 t"]
        );
        assert_eq!(retire(&mut relay, WEEK).await, NOTHING, "main is behind");
        publish(&mut superuser, "main", 25).await;
        assert_eq!(
            retire(&mut relay, WEEK).await,
            ["outbox.events_11 11 20 10 0 t"]
        );
        assert_eq!(
            retire(&mut relay, WEEK).await,
            NOTHING,
            "the newest is in use"
        );
        assert_eq!(
            value(
                &mut superuser,
                "select string_agg(id::text, ' ' order by id) from outbox.events"
            )
            .await,
            "21 22 23 24 25"
        );
        // Its ids belong nowhere now, and yet nothing fails.
        emit(&mut superuser, "1").await;
    })
    .await;
}

#[tokio::test]
async fn a_transaction_that_commits_late_keeps_its_partition() {
    let test = "retention::a_transaction_that_commits_late_keeps_its_partition";
    fresh::database(test, async |database| {
        let (mut superuser, mut relay) = small_partitions(database).await;
        let mut late = database.writer("late").await;
        run(&mut late, "begin").await;
        run(
            &mut late,
            "insert into outbox.events (aggregate_type, aggregate_id, event_type, occurred_at)
             values ('order', '1', 'late', clock_timestamp() - interval '8 days')",
        )
        .await;
        emit_old(&mut superuser, 15).await;
        publish(&mut superuser, "main", 16).await;
        assert_eq!(
            retire(&mut relay, WEEK).await,
            NOTHING,
            "its row is not committed"
        );
        run(&mut late, "commit").await;
        assert_eq!(
            retire(&mut relay, WEEK).await,
            NOTHING,
            "its row is not published"
        );
        publish(&mut superuser, "main", 16).await;
        assert_eq!(
            retire(&mut relay, WEEK).await,
            NOTHING,
            "its row was committed just now"
        );
        sample(&mut superuser, 0.0).await;
        sample(&mut superuser, 8.0).await;
        assert_eq!(
            retire(&mut relay, WEEK).await,
            ["outbox.events_1 1 10 10 0 t"]
        );
    })
    .await;
}

#[tokio::test]
async fn a_long_transaction_elsewhere_keeps_the_empty_partition_only() {
    let test = "retention::a_long_transaction_elsewhere_keeps_the_empty_partition_only";
    fresh::database(test, async |database| {
        let (mut superuser, mut relay) = small_partitions(database).await;
        emit_old(&mut superuser, 25).await;
        publish(&mut superuser, "main", 25).await;
        let mut open = database.writer("open").await;
        run(&mut open, "begin").await;
        emit(&mut open, "1").await;
        // It holds a lock on the log as a whole, so nothing can be dropped, and writers go on beside it.
        run(&mut superuser, "set statement_timeout = '5s'").await;
        let (retired, ()) = tokio::join!(retire(&mut relay, WEEK), emit(&mut superuser, "1"));
        assert_eq!(retired, ["outbox.events_1 1 10 10 0 f"]);
        assert_eq!(
            retire(&mut relay, WEEK).await,
            ["outbox.events_11 11 20 10 0 f"]
        );
        assert_eq!(retire(&mut relay, WEEK).await, NOTHING);
        assert_eq!(
            value(
                &mut superuser,
                "select pg_relation_size('outbox.events_1')::text"
            )
            .await,
            "0"
        );
        run(&mut open, "commit").await;
        assert_eq!(
            retire(&mut relay, WEEK).await,
            ["outbox.events_1 1 10 0 0 t"]
        );
        assert_eq!(
            retire(&mut relay, WEEK).await,
            ["outbox.events_11 11 20 0 0 t"]
        );
        assert_eq!(
            value(
                &mut superuser,
                "select count(*)::text from outbox.events where id <= 25"
            )
            .await,
            "5"
        );
    })
    .await;
}

#[tokio::test]
async fn what_is_not_published_goes_only_when_that_is_asked_for() {
    let test = "retention::what_is_not_published_goes_only_when_that_is_asked_for";
    fresh::database(test, async |database| {
        let (mut superuser, mut relay) = small_partitions(database).await;
        emit_old(&mut superuser, 25).await;
        publish(&mut superuser, "main", 3).await;
        let after = |days: u32| format!("{WEEK}, interval '{days} days'");
        assert_eq!(retire(&mut relay, &after(9)).await, NOTHING);
        assert_eq!(
            retire(&mut relay, &after(7)).await,
            ["outbox.events_1 1 10 10 7 t"]
        );
        run(&mut superuser, "delete from outbox.cursors").await;
        assert_eq!(
            retire(&mut relay, &after(7)).await,
            ["outbox.events_11 11 20 10 10 t"]
        );
    })
    .await;
}

#[tokio::test]
async fn a_cursor_of_another_server_lets_nothing_go() {
    let test = "retention::a_cursor_of_another_server_lets_nothing_go";
    fresh::database(test, async |database| {
        let (mut superuser, mut relay) = small_partitions(database).await;
        emit_old(&mut superuser, 25).await;
        publish(&mut superuser, "main", 25).await;
        run(
            &mut superuser,
            "update outbox.cursors set system_identifier = 1",
        )
        .await;
        assert_eq!(retire(&mut relay, WEEK).await, NOTHING);
        run(&mut superuser, "delete from outbox.cursors").await;
        publish(&mut superuser, "main", 25).await;
        run(
            &mut superuser,
            "update outbox.cursors set timeline = timeline + 1",
        )
        .await;
        assert_eq!(retire(&mut relay, WEEK).await, NOTHING);
    })
    .await;
}
