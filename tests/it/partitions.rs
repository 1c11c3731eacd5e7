//! Partitions are made ahead, and nobody notices.

use futures_util::future::join_all;
use sqlx::postgres::PgConnection;

use crate::fresh::{self, Database, all_refused, attempt, emit, refused, run, value, values};

/// The ranges of the partitions in order, the default partition left out.
async fn ranges(connection: &mut PgConnection) -> Vec<String> {
    values(
        connection,
        "select substring(pg_get_expr(c.relpartbound, c.oid), 'FROM (.*)$')
           from pg_inherits i join pg_class c on c.oid = i.inhrelid
          where i.inhparent = 'outbox.events'::regclass and pg_get_expr(c.relpartbound, c.oid) <> 'DEFAULT'
          order by substring(c.relname from '\\d+$')::bigint",
    )
    .await
}

/// Takes away the partitions that the migration made, so that small ones can be made.
async fn without_partitions(database: &Database) -> PgConnection {
    let mut superuser = database.superuser().await;
    run(
        &mut superuser,
        "do $$ declare name text; begin
           for name in select inhrelid::regclass::text from pg_inherits
                        where inhparent = 'outbox.events'::regclass and inhrelid <> 'outbox.events_default'::regclass
           loop execute 'drop table ' || name; end loop;
         end $$",
    )
    .await;
    superuser
}

#[tokio::test]
async fn partitions_are_made_ahead() {
    fresh::database("partitions::partitions_are_made_ahead", async |database| {
        let mut superuser = without_partitions(database).await;
        let mut relay = database.relay("relay").await;
        assert_eq!(
            value(&mut relay, "select outbox.make_partitions(2, 10)::text").await,
            "3"
        );
        assert_eq!(
            ranges(&mut superuser).await,
            ["('1') TO ('11')", "('11') TO ('21')", "('21') TO ('31')"]
        );
        assert_eq!(
            value(&mut relay, "select outbox.make_partitions(2, 10)::text").await,
            "0",
            "enough"
        );
        run(&mut superuser, "select setval('outbox.events_id_seq', 12)").await;
        // Another size goes on where the last partition ends.
        assert_eq!(
            value(&mut relay, "select outbox.make_partitions(1, 20)::text").await,
            "1"
        );
        assert_eq!(ranges(&mut superuser).await[3], "('31') TO ('51')");

        let odd = "outbox.make_partitions expects 1 to 1000 partitions of at least 1 row";
        all_refused(
            &mut relay,
            &[
                ("select outbox.make_partitions(0)", "22023", odd),
                ("select outbox.make_partitions(-1)", "22023", odd),
                ("select outbox.make_partitions(null)", "22023", odd),
                ("select outbox.make_partitions(1001)", "22023", odd),
                ("select outbox.make_partitions(8, 0)", "22023", odd),
                ("select outbox.make_partitions(8, -5)", "22023", odd),
                ("select outbox.make_partitions(8, null)", "22023", odd),
                (
                    "select outbox.make_partitions(8, 9223372036854775807)",
                    "22003",
                    "bigint out of range",
                ),
            ],
        )
        .await;
        assert_eq!(ranges(&mut superuser).await.len(), 4, "nothing half made");
        run(
            &mut relay,
            "begin; set local lock_timeout = '7s'; select outbox.make_partitions(3, 10)",
        )
        .await;
        assert_eq!(
            value(&mut relay, "show lock_timeout").await,
            "7s",
            "the caller's is not touched"
        );
    })
    .await;
}

#[tokio::test]
async fn partitions_are_made_beside_open_transactions() {
    fresh::database(
        "partitions::partitions_are_made_beside_open_transactions",
        async |database| {
            let mut relay = database.relay("relay").await;
            let (mut open, mut other) = (
                database.writer("open").await,
                database.writer("other").await,
            );
            run(&mut open, "begin").await;
            emit(&mut open, "1").await;
            assert_eq!(
                value(&mut relay, "select outbox.make_partitions(12)::text").await,
                "4"
            );

            // And the other way round: nobody waits for a call that is not committed.
            run(&mut relay, "begin; select outbox.make_partitions(16)").await;
            run(&mut other, "set statement_timeout = '5s'").await;
            emit(&mut other, "1").await;
            emit(&mut open, "1").await;
            run(&mut open, "commit").await;
            run(&mut relay, "commit").await;
            let names = "select distinct tableoid::regclass::text from outbox.events";
            assert_eq!(
                value(&mut database.superuser().await, names).await,
                "outbox.events_1"
            );
        },
    )
    .await;
}

#[tokio::test]
async fn the_default_partition_takes_over_and_gives_back() {
    fresh::database(
        "partitions::the_default_partition_takes_over_and_gives_back",
        async |database| {
            let mut superuser = without_partitions(database).await;
            let mut relay = database.relay("relay").await;
            let (mut open, mut other) = (
                database.writer("open").await,
                database.writer("other").await,
            );
            run(&mut superuser, "select outbox.make_partitions(1, 100)").await;
            run(
                &mut superuser,
                "select setval('outbox.events_id_seq', 1000)",
            )
            .await;
            emit(&mut other, "1").await;

            // An open transaction in the default partition: the call gives up, and holds nobody up longer than that.
            run(&mut open, "begin").await;
            emit(&mut open, "1").await;
            run(&mut other, "set statement_timeout = '5s'").await;
            let make = "select outbox.make_partitions(1, 100)::text";
            let (gave_up, ()) = tokio::join!(refused(&mut relay, make), emit(&mut other, "1"));
            assert_eq!(
                gave_up,
                (
                    "55P03".to_owned(),
                    "canceling statement due to lock timeout".to_owned()
                )
            );
            emit(&mut other, "1").await;
            run(&mut open, "commit").await;

            // Room is left for what is being inserted: the ids up to there stay in the default partition.
            assert_eq!(value(&mut relay, make).await, "1");
            assert_eq!(
                ranges(&mut superuser).await.last().expect("a range"),
                "('1104') TO ('1204')"
            );
            run(
                &mut superuser,
                "select setval('outbox.events_id_seq', 1102)",
            )
            .await;
            emit(&mut other, "1").await;
            emit(&mut other, "1").await;
            let rows = values(
                &mut superuser,
                "select id || ' ' || tableoid::regclass from outbox.events order by id",
            )
            .await;
            assert_eq!(
                rows,
                [
                    "1001 outbox.events_default",
                    "1002 outbox.events_default",
                    "1003 outbox.events_default",
                    "1004 outbox.events_default",
                    "1103 outbox.events_default",
                    "1104 outbox.events_1104",
                ]
            );
            // The proof for attaching is gone again: the default partition takes everything that fits nowhere else.
            run(
                &mut superuser,
                "select setval('outbox.events_id_seq', 5000)",
            )
            .await;
            emit(&mut other, "1").await;
        },
    )
    .await;
}

#[tokio::test]
async fn relays_that_start_together_make_partitions_once() {
    fresh::database(
        "partitions::relays_that_start_together_make_partitions_once",
        async |database| {
            let mut superuser = without_partitions(database).await;
            let role = database.login("relay", "in role outbox_relay").await;
            let made = join_all((0..8).map(|_| async {
                let mut relay = database.connect(&role).await;
                let made = value(&mut relay, "select outbox.make_partitions(4, 10)::text").await;
                made.parse::<usize>().expect("a number")
            }))
            .await;
            assert_eq!(made.iter().sum::<usize>(), 5, "{made:?}");
            assert_eq!(ranges(&mut superuser).await.len(), 5);
        },
    )
    .await;
}

#[tokio::test]
async fn an_insert_that_waits_for_the_default_partition_succeeds() {
    let test = "partitions::an_insert_that_waits_for_the_default_partition_succeeds";
    fresh::database(test, async |database| {
        let mut superuser = without_partitions(database).await;
        let (mut relay, mut writer) = (
            database.relay("relay").await,
            database.writer("writer").await,
        );
        run(&mut superuser, "select outbox.make_partitions(1, 100)").await;
        // The last partition ends at 200. Were the next one made there, this row would belong to it by the time its
        // transaction gets to the default partition, and be refused.
        run(&mut superuser, "select setval('outbox.events_id_seq', 195)").await;
        run(&mut relay, "begin; select outbox.make_partitions(1, 100)").await;
        run(&mut superuser, "select setval('outbox.events_id_seq', 200)").await;
        let commit = async {
            let waiting = "select count(*)::text from pg_stat_activity
                            where datname = current_database() and wait_event_type = 'Lock'";
            while value(&mut superuser, waiting).await == "0" {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
            run(&mut relay, "commit").await;
        };
        tokio::join!(emit(&mut writer, "1"), commit);
        let row = value(
            &mut superuser,
            "select id || ' ' || tableoid::regclass from outbox.events",
        )
        .await;
        assert_eq!(row, "201 outbox.events_default");
    })
    .await;
}

#[tokio::test]
async fn no_insert_fails_while_partitions_run_out() {
    const WRITERS: usize = 4;
    const EVENTS: usize = 400;
    // Partitions run out all the time because ids leap. The steps fall before, into and behind the room that is left.
    const LEAP: &str =
        "select setval('outbox.events_id_seq', last_value + 3700) from outbox.events_id_seq";
    let test = "partitions::no_insert_fails_while_partitions_run_out";
    fresh::database(test, async |database| {
        let mut superuser = without_partitions(database).await;
        run(&mut superuser, "select outbox.make_partitions(1, 10000)").await;
        let role = database.login("writer", "in role outbox_writer").await;
        let mut relay = database.relay("relay").await;
        let writers = join_all((0..WRITERS).map(|writer| {
            let role = &role;
            async move {
                let mut connection = database.connect(role).await;
                for _ in 0..EVENTS {
                    emit(&mut connection, &writer.to_string()).await;
                }
            }
        }));
        let partitions = async {
            loop {
                let make = "select outbox.make_partitions(1, 10000)";
                if let Err(error) = attempt(&mut relay, make).await {
                    let code = error
                        .as_database_error()
                        .and_then(sqlx::error::DatabaseError::code);
                    assert_eq!(code.as_deref(), Some("55P03"), "{error}");
                }
                run(&mut superuser, LEAP).await;
            }
        };
        tokio::select! {
            _ = writers => {}
            () = partitions => unreachable!("goes on for ever"),
        }
        let mut superuser = database.superuser().await;
        let count = value(&mut superuser, "select count(*)::text from outbox.events").await;
        assert_eq!(count, (WRITERS * EVENTS).to_string());
        let homes = "select count(distinct tableoid)::text from outbox.events";
        assert_ne!(
            value(&mut superuser, homes).await,
            "1",
            "partitions were used, and the default one"
        );
    })
    .await;
}

/// A schema that was copied without its rows has partitions far above its ids, or far below them after a repair.
#[tokio::test]
async fn partitions_are_made_where_the_ids_are() {
    let test = "partitions::partitions_are_made_where_the_ids_are";
    fresh::database(test, async |database| {
        let mut superuser = without_partitions(database).await;
        let mut relay = database.relay("relay").await;
        run(
            &mut superuser,
            "create table outbox.far partition of outbox.events for values from (500) to (600);
             delete from outbox.upkeep",
        )
        .await;
        assert_eq!(
            value(&mut relay, "select outbox.make_partitions(2, 100)::text").await,
            "3",
            "from the first id on, which was not handed out yet"
        );
        emit(&mut superuser, "1").await;
        let home = "select distinct tableoid::regclass::text from outbox.events";
        assert_eq!(value(&mut superuser, home).await, "outbox.events_1");
        // Nearly out: the gap is filled behind some room, up to what is there, and they go on behind that.
        run(&mut superuser, "select setval('outbox.events_id_seq', 290)").await;
        for _ in 0..4 {
            run(&mut relay, "select outbox.make_partitions(2, 150)").await;
        }
        let bounds = "select string_agg(lower || '-' || upper, ' ' order by lower) from outbox.partition_bounds()";
        assert_eq!(
            value(&mut superuser, bounds).await,
            "1-101 101-201 201-301 451-500 500-600 600-750"
        );
        // The ids went on far above, without a partition; what lies in the default one stays there.
        run(
            &mut superuser,
            "truncate outbox.events; select setval('outbox.events_id_seq', 90000)",
        )
        .await;
        emit(&mut superuser, "1").await;
        run(&mut superuser, "select setval('outbox.events_id_seq', 1)").await;
        run(&mut relay, "select outbox.repair_sequence()").await;
        emit(&mut superuser, "1").await;
        run(&mut relay, "select outbox.make_partitions(2, 100)").await;
        run(
            &mut superuser,
            "select setval('outbox.events_id_seq', last_value + 100) from outbox.events_id_seq",
        )
        .await;
        emit(&mut superuser, "1").await;
        let homes = "select string_agg(tableoid::regclass::text, ' ' order by id) from outbox.events";
        assert_eq!(
            value(&mut superuser, homes).await,
            "outbox.events_default outbox.events_default outbox.events_91102"
        );
    })
    .await;
}

/// Columns that a team adds to the log do not stop partition keeping.
#[tokio::test]
async fn columns_that_were_added_stop_nothing() {
    let test = "partitions::columns_that_were_added_stop_nothing";
    fresh::database(test, async |database| {
        let mut superuser = without_partitions(database).await;
        let mut relay = database.relay("relay").await;
        let version = value(&mut superuser, "select current_setting('server_version_num')").await;
        let identity = "alter table outbox.events add column number bigint generated by default as identity";
        let added = attempt(&mut superuser, identity).await;
        // Before 17 the server refuses it on a partitioned table itself.
        assert_eq!(added.is_ok(), version.parse::<u32>().unwrap() >= 170_000);
        run(
            &mut superuser,
            "alter table outbox.events add column tenant text default 'none';
             alter table outbox.events add column size integer generated always as (length(aggregate_id)) stored;
             alter table outbox.events add constraint short check (length(aggregate_id) < 100)",
        )
        .await;
        assert_eq!(
            value(&mut relay, "select outbox.make_partitions(2, 10)::text").await,
            "3"
        );
        emit(&mut superuser, "1").await;
        let home = "select tableoid::regclass || ' ' || tenant || ' ' || size from outbox.events";
        assert_eq!(value(&mut superuser, home).await, "outbox.events_1 none 1");
    })
    .await;
}
