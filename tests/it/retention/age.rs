//! The age of an event is told by samples that writers cannot write, and by no clock that a person can set.

use std::time::Duration;

use sqlx::postgres::PgConnection;

use outbox_relay::retention::Settings;
use outbox_relay::retention::postgres::Upkeep;

use super::{NOTHING, WEEK, publish, retire, sample, small_partitions};
use crate::fresh::{self, all_refused, emit, run, value, values};

async fn retained(superuser: &mut PgConnection) -> String {
    let ids = "select coalesce(string_agg(id::text, ' ' order by id), 'none') from outbox.events";
    value(superuser, ids).await
}

async fn delete(relay: &mut PgConnection) {
    run(relay, &format!("select * from outbox.retire_rows({WEEK})")).await;
}

/// A transaction has its id early and commits late: over several samples its row is not there, and is young then.
#[tokio::test]
async fn a_late_row_is_as_old_as_its_commit() {
    let test = "retention::age::a_late_row_is_as_old_as_its_commit";
    fresh::database(test, async |database| {
        let mut superuser = database.superuser().await;
        let mut relay = database.relay("relay").await;
        let mut late = database.writer("late").await;
        run(&mut late, "begin").await;
        emit(&mut late, "late").await;
        emit(&mut superuser, "1").await;
        sample(&mut superuser, 0.0).await;
        for _ in 0..4 {
            sample(&mut superuser, 2.0).await;
            emit(&mut superuser, "1").await;
        }
        publish(&mut superuser, "main", 100).await;
        delete(&mut relay).await;
        run(&mut late, "commit").await;
        publish(&mut superuser, "main", 100).await;
        delete(&mut relay).await;
        // What bounds the ids alone would have removed it: it is below every id that is old enough.
        assert_eq!(retained(&mut superuser).await, "1 3 4 5 6");
        sample(&mut superuser, 0.0).await;
        sample(&mut superuser, 7.0).await;
        delete(&mut relay).await;
        assert_eq!(
            retained(&mut superuser).await,
            "1 5 6",
            "as late as they were committed"
        );
        sample(&mut superuser, 1.0).await;
        delete(&mut relay).await;
        assert_eq!(retained(&mut superuser).await, "none");
    })
    .await;
}

/// The same with an age that is told by ids: the late row is removed on the day of its commit.
#[tokio::test]
async fn an_age_by_ids_would_lose_the_late_row() {
    let test = "retention::age::an_age_by_ids_would_lose_the_late_row";
    fresh::database(test, async |database| {
        let mut superuser = database.superuser().await;
        let mut relay = database.relay("relay").await;
        let sabotage =
            "pg_get_functiondef('outbox.may_go(pg_snapshot, pg_snapshot, boolean)'::regprocedure)";
        let function = value(&mut superuser, &format!("select {sabotage}")).await;
        let by_id = function.replace(
            "pg_visible_in_snapshot(e.xid, %L)\n        and",
            "%L::text is not null and e.id <= 2\n        and",
        );
        assert_ne!(by_id, function);
        run(&mut superuser, &by_id).await;
        let mut late = database.writer("late").await;
        run(&mut late, "begin").await;
        emit(&mut late, "late").await;
        emit(&mut superuser, "1").await;
        sample(&mut superuser, 0.0).await;
        sample(&mut superuser, 8.0).await;
        run(&mut late, "commit").await;
        publish(&mut superuser, "main", 100).await;
        delete(&mut relay).await;
        assert_eq!(retained(&mut superuser).await, "none", "caught");
    })
    .await;
}

#[tokio::test]
async fn an_import_with_old_times_is_young() {
    let test = "retention::age::an_import_with_old_times_is_young";
    fresh::database(test, async |database| {
        let (mut superuser, mut relay) = small_partitions(database).await;
        let mut writer = database.writer("writer").await;
        sample(&mut superuser, 0.0).await;
        sample(&mut superuser, 400.0).await;
        run(
            &mut writer,
            "insert into outbox.events (aggregate_type, aggregate_id, event_type, occurred_at)
             select 'order', '1', 'imported', case n % 4 when 0 then '-infinity' when 1 then '2001-01-01'
                                                         when 2 then 'infinity' else '2100-01-01' end::timestamptz
               from generate_series(1, 25) n",
        )
        .await;
        publish(&mut superuser, "main", 3).await;
        let lost = format!("{WEEK}, '7 days'");
        let deletion = format!("select events::text from outbox.retire_rows({lost})");
        sample(&mut superuser, 0.0).await;
        sample(&mut superuser, 7.0).await;
        assert_eq!(retire(&mut relay, &lost).await, NOTHING, "7 days old, and a fortieth is added");
        assert_eq!(values(&mut relay, &deletion).await, NOTHING);
        sample(&mut superuser, 0.2).await;
        assert_eq!(retire(&mut relay, &lost).await, ["outbox.events_1 1 10 10 7 t"]);
        assert_eq!(retire(&mut relay, &lost).await, ["outbox.events_11 11 20 10 10 t"]);
        assert_eq!(values(&mut relay, &deletion).await, NOTHING, "a twentieth later");
        sample(&mut superuser, 0.4).await;
        assert_eq!(values(&mut relay, &deletion).await, ["5"]);
        let acts = "select concat_ws(' ', pipeline, selector, events) from outbox.acts order by id";
        assert_eq!(
            values(&mut superuser, acts).await,
            ["main ids 4 to 10 7", "main ids 11 to 20 10", "main ids 21 to 25 5"]
        );
    })
    .await;
}

/// What the count was after a call; `known` and `elapsed` as SQL.
async fn take(relay: &mut PgConnection, known: &str, elapsed: &str) -> f64 {
    let take = format!("select outbox.take_sample('100 s', '4000 s', {known}, {elapsed})::text");
    value(relay, &take).await.parse().unwrap()
}

#[tokio::test]
async fn a_clock_that_was_set_counts_for_little() {
    let test = "retention::age::a_clock_that_was_set_counts_for_little";
    fresh::database(test, async |database| {
        let mut superuser = database.superuser().await;
        let mut relay = database.relay("relay").await;
        let near = |seconds: f64, expected: f64| (seconds - expected).abs() < 30.0;
        assert!(near(take(&mut relay, "null", "null").await, 0.0));
        // A relay that runs goes by its own clock, whatever the database's says.
        run(
            &mut superuser,
            "update outbox.samples set at = at - interval '9 years'",
        )
        .await;
        assert!(near(take(&mut relay, "0", "150").await, 150.0));
        run(
            &mut superuser,
            "update outbox.samples set at = at + interval '9 years'",
        )
        .await;
        assert!(near(take(&mut relay, "150", "150").await, 300.0));
        // One that starts knows the database's clock only, and takes a step of it for an absence: one sample's worth.
        run(
            &mut superuser,
            "update outbox.samples set at = clock_timestamp() - interval '9 years'",
        )
        .await;
        assert!(near(take(&mut relay, "null", "null").await, 400.0));
        run(
            &mut superuser,
            "update outbox.samples set at = clock_timestamp() + interval '9 years'",
        )
        .await;
        assert!(
            near(take(&mut relay, "null", "null").await, 400.0),
            "backwards counts for nothing"
        );
        // Another relay does not count the same time again.
        assert!(near(take(&mut relay, "300", "100").await, 400.0));
        assert!(near(take(&mut relay, "300", "150").await, 450.0));
        // Numbers of another server mean nothing here.
        run(
            &mut superuser,
            "update outbox.samples set system_identifier = 1, counted = counted + 1e9",
        )
        .await;
        assert!(near(take(&mut relay, "450", "100").await, 0.0));
        emit(&mut superuser, "1").await;
        publish(&mut superuser, "main", 9).await;
        take(&mut relay, "0", "100").await;
        run(
            &mut relay,
            "select * from outbox.retire_rows('50 s', array['main'])",
        )
        .await;
        assert_eq!(retained(&mut superuser).await, "1");
    })
    .await;
}

#[tokio::test]
async fn samples_stay_few() {
    let test = "retention::age::samples_stay_few";
    fresh::database(test, async |database| {
        let mut superuser = database.superuser().await;
        let mut relay = database.relay("relay").await;
        run(
            &mut superuser,
            "do $$ begin for n in 1..3000 loop
               perform outbox.take_sample('21600 s', '400 days', n * 21600 - 21600, 21600);
             end loop; end $$",
        )
        .await;
        let count: i64 = value(&mut relay, "select count(*)::text from outbox.samples")
            .await
            .parse()
            .unwrap();
        assert!((80..140).contains(&count), "{count}");
        // Of any age up to the longest there is one, a tenth of it younger at most.
        let holes = value(
            &mut relay,
            "select count(*)::text from generate_series(1, 400) days
              where not exists (select from outbox.samples
                                 where counted between 2999.0 * 21600 - days * 86400 - 40 * 86400
                                                   and 2999.0 * 21600 - days * 86400)",
        )
        .await;
        assert_eq!(holes, "0");
    })
    .await;
}

#[tokio::test]
async fn nobody_but_the_relay_notes_samples() {
    let test = "retention::age::nobody_but_the_relay_notes_samples";
    fresh::database(test, async |database| {
        let mut writer = database.writer("writer").await;
        let mut relay = database.relay("relay").await;
        const DENIED: &str = "42501";
        let samples = "permission denied for table samples";
        all_refused(
            &mut writer,
            &[
                ("select outbox.take_sample('1 s')", DENIED, "permission denied for function take_sample"),
                ("select * from outbox.retire_rows('1 s')", DENIED, "permission denied for function retire_rows"),
                (
                    "select * from outbox.retire_partition('1 s')",
                    DENIED,
                    "permission denied for function retire_partition",
                ),
                ("select * from outbox.samples", DENIED, samples),
                (
                    "insert into outbox.samples (counted, seen, newest, system_identifier) values (0, '1:1:', 1, 1)",
                    DENIED,
                    samples,
                ),
                ("select outbox.begin_upkeep('retention')", DENIED, "permission denied for function begin_upkeep"),
                ("select * from outbox.upkeep for update", DENIED, "permission denied for table upkeep"),
            ],
        )
        .await;
        all_refused(
            &mut relay,
            &[
                ("update outbox.samples set counted = 0", DENIED, samples),
                ("delete from outbox.samples", DENIED, samples),
                ("select * from outbox.upkeep for update", DENIED, "permission denied for table upkeep"),
                ("select outbox.may_go(null, null, true)", DENIED, "permission denied for function may_go"),
            ],
        )
        .await;
        // What the functions look at after a lock has to be what is committed by then.
        run(&mut relay, "set default_transaction_isolation = serializable").await;
        all_refused(
            &mut relay,
            &[(
                "select * from outbox.retire_rows('1 s')",
                "25001",
                "the upkeep of the outbox has to be called under read committed, not serializable",
            )],
        )
        .await;
    })
    .await;
}

#[tokio::test]
async fn locks_of_strangers_stop_nothing() {
    let test = "retention::age::locks_of_strangers_stop_nothing";
    fresh::database(test, async |database| {
        let mut superuser = database.superuser().await;
        let mut stranger = database.writer("stranger").await;
        run(
            &mut stranger,
            "select pg_advisory_lock(1868721016, 1), pg_advisory_lock(1868721016, 2), pg_advisory_lock(1868721016, 3)",
        )
        .await;
        emit(&mut superuser, "1").await;
        sample(&mut superuser, 0.0).await;
        sample(&mut superuser, 8.0).await;
        publish(&mut superuser, "main", 1).await;
        let mut relay = database.relay("relay").await;
        delete(&mut relay).await;
        assert_eq!(retained(&mut superuser).await, "none");
        assert_eq!(value(&mut relay, "select outbox.make_partitions(9)::text").await, "1");
    })
    .await;
}

/// Two relays look after the log, under the worst settings of a database: they count one time, and remove once.
#[tokio::test]
async fn two_relays_keep_one_log() {
    let test = "retention::age::two_relays_keep_one_log";
    fresh::database(test, async |database| {
        let (mut superuser, _) = small_partitions(database).await;
        run(
            &mut superuser,
            &format!(
                "alter database {0} set default_transaction_isolation = serializable;
                 alter database {0} set standard_conforming_strings = off;
                 alter database {0} set search_path = public, pg_temp",
                database.name
            ),
        )
        .await;
        let settings = Settings {
            keep: Some(Duration::from_secs(3600)),
            drop_unpublished_after: None,
            disk_budget_bytes: None,
            interval: Duration::from_secs(1),
            partition_events: 10,
            partitions_ahead: 3,
            pipelines: vec!["main".parse().unwrap()],
        };
        let role = database.login("other", "in role outbox_relay").await;
        let options = database
            .url(&role)
            .parse::<sqlx::postgres::PgConnectOptions>()
            .unwrap();
        let (mut one, mut two) = (
            Upkeep::new(options.clone(), settings.clone()),
            Upkeep::new(options, settings),
        );
        let mut plain = database.superuser().await;
        run(
            &mut plain,
            "set default_transaction_isolation = 'read committed'",
        )
        .await;
        for _ in 0..25 {
            emit(&mut plain, "1").await;
        }
        publish(&mut plain, "main", 25).await;
        let (first, second) = tokio::join!(one.look_after(), two.look_after());
        first.unwrap();
        second.unwrap();
        assert_eq!(retained(&mut plain).await.split(' ').count(), 25);
        let bounds = "select string_agg(lower || '-' || upper, ' ' order by lower) from outbox.partition_bounds()";
        assert_eq!(
            value(&mut plain, bounds).await,
            "1-11 11-21 21-31 31-41 41-51 51-61"
        );
        // An hour and a half passes for the samples, which no writer can do.
        run(
            &mut plain,
            "update outbox.samples set counted = counted - 5400",
        )
        .await;
        emit(&mut plain, "young").await;
        let (first, second) = tokio::join!(one.look_after(), two.look_after());
        first.unwrap();
        second.unwrap();
        one.look_after().await.unwrap();
        assert_eq!(retained(&mut plain).await, "26");
        assert_eq!(
            value(&mut plain, bounds).await,
            "21-31 31-41 41-51 51-61"
        );
    })
    .await;
}
