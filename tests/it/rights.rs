//! What the schema lets whom do: writers emit and nothing else, the relay reads and keeps its books, strangers nothing.
//! And what it answers to nonsense.

use sqlx::Connection;
use sqlx::postgres::{PgConnection, PgListener, PgPoolOptions};

use crate::fresh::{self, Database, MIGRATIONS, all_refused, emit, run, value, values};

const DENIED: &str = "42501";

#[tokio::test]
async fn writers_emit_in_every_way() {
    fresh::database("rights::writers_emit_in_every_way", async |database| {
        let mut writer = database.writer("writer").await;
        run(&mut writer, "select outbox.emit('order', '1', 'function', '{}')").await;
        run(&mut writer, "select outbox.emit_bytes('order', '2', 'bytes', '\\x00ff', 'application/avro')").await;
        run(
            &mut writer,
            "insert into outbox.events (event_id, aggregate_type, aggregate_id, event_type, payload, headers, occurred_at)
             values (gen_random_uuid(), 'order', '3', 'insert', '{}', '{}', now())",
        )
        .await;
        let mut copy = writer
            .copy_in_raw("copy outbox.events (aggregate_type, aggregate_id, event_type, payload) from stdin")
            .await
            .expect("copy");
        copy.send(&b"order\t4\tcopy\t{}\norder\t5\tcopy\t\\N\n"[..]).await.expect("send");
        assert_eq!(copy.finish().await.expect("finish"), 2);

        let events = values(
            &mut database.superuser().await,
            "select aggregate_id || ' ' || event_type from outbox.events order by id",
        )
        .await;
        assert_eq!(events, ["1 function", "2 bytes", "3 insert", "4 copy", "5 copy"]);
    })
    .await;
}

#[tokio::test]
async fn writers_may_only_emit() {
    fresh::database("rights::writers_may_only_emit", async |database| {
        let mut writer = database.writer("writer").await;
        emit(&mut writer, "1").await;
        let events = "permission denied for table events";
        let sequence = "permission denied for sequence events_id_seq";
        all_refused(
            &mut writer,
            &[
                ("select * from outbox.events", DENIED, events),
                ("select payload from outbox.events", DENIED, events),
                ("select aggregate_id from outbox.events", DENIED, events),
                ("table outbox.events_1", DENIED, "permission denied for table events_1"),
                ("update outbox.events set payload = null", DENIED, events),
                ("delete from outbox.events", DENIED, events),
                ("truncate outbox.events", DENIED, events),
                ("copy outbox.events to stdout", DENIED, events),
                ("do $$ begin lock table outbox.events in access exclusive mode; end $$", DENIED, events),
                (
                    "insert into outbox.events (id, aggregate_type, aggregate_id, event_type) values (7, 'a', 'b', 'c')",
                    DENIED,
                    events,
                ),
                (
                    "insert into outbox.events (xid, aggregate_type, aggregate_id, event_type) values ('7', 'a', 'b', 'c')",
                    DENIED,
                    events,
                ),
                ("copy outbox.events (id, aggregate_type) from stdin", DENIED, events),
                (
                    "insert into outbox.events (aggregate_type, aggregate_id, event_type) values ('a', 'b', 'c')
                     returning payload",
                    DENIED,
                    events,
                ),
                (
                    "insert into outbox.events_1 (aggregate_type, aggregate_id, event_type) values ('a', 'b', 'c')",
                    DENIED,
                    "permission denied for table events_1",
                ),
                ("select setval('outbox.events_id_seq', 1)", DENIED, sequence),
                ("alter sequence outbox.events_id_seq restart", DENIED, "must be owner of sequence"),
                ("select last_value from outbox.events_id_seq", DENIED, sequence),
                ("select * from outbox.cursors", DENIED, "permission denied for table cursors"),
                ("update outbox.cursors set epoch = 9", DENIED, "permission denied for table cursors"),
                ("delete from outbox.leases", DENIED, "permission denied for table leases"),
                ("select * from outbox.leases", DENIED, "permission denied for table leases"),
                ("select * from outbox.members", DENIED, "permission denied for table members"),
                ("delete from outbox.pipelines", DENIED, "permission denied for table pipelines"),
                ("select outbox.shard_of('a', 'b', 2)", DENIED, "permission denied for function shard_of"),
                ("select * from outbox.parked", DENIED, "permission denied for table parked"),
                ("insert into outbox.parked (pipeline) values ('a')", DENIED, "permission denied for table parked"),
                ("select outbox.make_partitions()", DENIED, "permission denied for function make_partitions"),
                ("create table outbox.mine ()", DENIED, "permission denied for schema outbox"),
                ("alter table outbox.events disable trigger all", DENIED, "must be owner of table events"),
                ("drop table outbox.events_default", DENIED, "must be owner of table events_default"),
            ],
        )
        .await;
        let count = value(&mut database.superuser().await, "select count(*)::text from outbox.events").await;
        assert_eq!(count, "1");
    })
    .await;
}

#[tokio::test]
async fn the_relay_reads_and_keeps_its_books() {
    fresh::database("rights::the_relay_reads_and_keeps_its_books", async |database| {
        emit(&mut database.writer("writer").await, "1").await;
        let mut relay = database.relay("relay").await;
        assert_eq!(value(&mut relay, "select aggregate_id from outbox.events").await, "1");
        assert_eq!(value(&mut relay, "select last_value::text from outbox.events_id_seq").await, "1");
        // What tells one server, and one life of it, from another.
        run(
            &mut relay,
            "select system_identifier, pg_walfile_name(pg_current_wal_lsn()) from pg_control_system()",
        )
        .await;
        run(
            &mut relay,
            "insert into outbox.cursors (pipeline) values ('p');
             update outbox.cursors set cur = pg_current_snapshot();
             select cur from outbox.cursors;
             delete from outbox.cursors;
             insert into outbox.leases (pipeline, holder, epoch, expires_at) values ('p', 'h', 1, now());
             update outbox.leases set expires_at = now();
             select holder from outbox.leases for update;
             delete from outbox.leases;
             insert into outbox.parked (pipeline, id, event_id, aggregate_type, aggregate_id, event_type, occurred_at)
             select 'p', id, event_id, aggregate_type, aggregate_id, event_type, occurred_at from outbox.events;
             update outbox.parked set error = 'too large';
             select error from outbox.parked;
             insert into outbox.acts (who, action, selector, events) values ('me', 'drop', 'all', 1);
             select who from outbox.acts;
             insert into outbox.dropped (pipeline, id, event_id) select pipeline, id, event_id from outbox.parked;
             select event_id from outbox.dropped;
             delete from outbox.parked",
        )
        .await;
        assert_eq!(value(&mut relay, "select outbox.make_partitions(ahead => 10)::text").await, "2");

        let events = "permission denied for table events";
        all_refused(
            &mut relay,
            &[
                (
                    "insert into outbox.events (aggregate_type, aggregate_id, event_type) values ('a', 'b', 'c')",
                    DENIED,
                    events,
                ),
                ("select outbox.emit('a', 'b', 'c')", DENIED, "permission denied for function emit"),
                (
                    "select outbox.emit_bytes('a', 'b', 'c', '', '')",
                    DENIED,
                    "permission denied for function emit_bytes",
                ),
                ("update outbox.events set payload = null", DENIED, events),
                ("delete from outbox.events", DENIED, events),
                ("truncate outbox.events", DENIED, events),
                ("update outbox.acts set who = 'somebody else'", DENIED, "permission denied for table acts"),
                ("delete from outbox.acts", DENIED, "permission denied for table acts"),
                ("update outbox.dropped set id = 1", DENIED, "permission denied for table dropped"),
                ("delete from outbox.dropped", DENIED, "permission denied for table dropped"),
                (
                    "insert into outbox.acts (who, action, selector, events, database_user) values ('a', 'b', 'c', 1, 'd')",
                    DENIED,
                    "permission denied for table acts",
                ),
                ("select * from outbox.events for update", DENIED, events),
                ("drop table outbox.events_1", DENIED, "must be owner of table events_1"),
                (
                    "select setval('outbox.events_id_seq', 1)",
                    DENIED,
                    "permission denied for sequence events_id_seq",
                ),
                (
                    "select nextval('outbox.events_id_seq')",
                    DENIED,
                    "permission denied for sequence events_id_seq",
                ),
                ("create table outbox.mine ()", DENIED, "permission denied for schema outbox"),
            ],
        )
        .await;
    })
    .await;
}

#[tokio::test]
async fn strangers_may_do_nothing() {
    fresh::database("rights::strangers_may_do_nothing", async |database| {
        let role = database.login("stranger", "").await;
        let mut stranger = database.connect(&role).await;
        let schema = "permission denied for schema outbox";
        let statements = [
            "select outbox.emit('a', 'b', 'c')",
            "select outbox.emit_bytes('a', 'b', 'c', '', '')",
            "select outbox.context('{}')",
            "select outbox.merged_headers('{}')",
            "select outbox.make_partitions()",
            "insert into outbox.events (aggregate_type, aggregate_id, event_type) values ('a', 'b', 'c')",
            "select * from outbox.events",
            "select * from outbox.events_default",
            "select * from outbox.cursors",
            "select * from outbox.leases",
            "select * from outbox.parked",
            "select * from outbox.dropped",
            "select nextval('outbox.events_id_seq')",
        ];
        for sql in statements {
            all_refused(&mut stranger, &[(sql, DENIED, schema)]).await;
        }
        // Nor with the schema opened: nothing in it is granted to everybody.
        run(&mut database.superuser().await, "grant usage on schema outbox to public").await;
        for sql in statements {
            all_refused(&mut stranger, &[(sql, DENIED, "permission denied for")]).await;
        }
    })
    .await;
}

#[tokio::test]
async fn nonsense_is_refused_clearly() {
    fresh::database("rights::nonsense_is_refused_clearly", async |database| {
        let mut writer = database.writer("writer").await;
        let empty = "violates check constraint \"events_aggregate_type_not_empty\"";
        all_refused(
            &mut writer,
            &[
                ("select outbox.emit(null, 'b', 'c')", "23502", "null value in column \"aggregate_type\""),
                ("select outbox.emit('a', null, 'c')", "23502", "null value in column \"aggregate_id\""),
                ("select outbox.emit('a', 'b', null)", "23502", "null value in column \"event_type\""),
                ("select outbox.emit('', 'b', 'c')", "23514", empty),
                ("select outbox.emit_bytes('', 'b', 'c', '', '')", "23514", empty),
                (
                    "select outbox.emit('a', 'b', 'c', '{}', '[]')",
                    "22023",
                    "headers must be a JSON object of texts, got array",
                ),
                (
                    "select outbox.emit_bytes('a', 'b', 'c', '', '', '\"x\"')",
                    "22023",
                    "headers must be a JSON object of texts, got string",
                ),
                ("select outbox.emit('a', 'b', 'c', '{')", "22P02", "invalid input syntax for type json"),
                (
                    "select outbox.context('[1]')",
                    "22023",
                    "headers must be a JSON object of texts, got array",
                ),
                (
                    "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload, payload_bytes)
                     values ('a', 'b', 'c', '{}', '')",
                    "23514",
                    "violates check constraint \"events_one_payload\"",
                ),
            ],
        )
        .await;
    })
    .await;
}

#[tokio::test]
async fn names_of_any_kind_are_kept_exactly() {
    fresh::database(
        "rights::names_of_any_kind_are_kept_exactly",
        async |database| {
            let mut writer = database.writer("writer").await;
            let long = "x".repeat(1000);
            let names = [
                "it's \"quoted\" \\ $1 %",
                "größe/鍵/🗝\u{0301}\n\t",
                "",
                long.as_str(),
            ];
            for name in names {
                // Too long for a topic; the relay parks what a sink refuses, the writer is not stopped.
                sqlx::query("select outbox.emit($1, $2, $2)")
                    .bind(format!("t{name}"))
                    .bind(name)
                    .execute(&mut writer)
                    .await
                    .expect("emit");
            }
            let kept = values(
            &mut database.superuser().await,
            "select aggregate_id from outbox.events where aggregate_type = 't' || aggregate_id and
                    event_type = aggregate_id order by id",
        )
        .await;
            assert_eq!(kept, names);

            let error = sqlx::query("select outbox.emit('a', $1, 'c')")
                .bind("before\0after")
                .execute(&mut writer)
                .await
                .unwrap_err();
            let error = error.as_database_error().expect("refused by the server");
            assert_eq!(error.code().as_deref(), Some("22021"));
            assert!(error.message().contains("invalid byte sequence"), "{error}");
        },
    )
    .await;
}

#[tokio::test]
async fn the_context_ends_with_the_transaction() {
    fresh::database("rights::the_context_ends_with_the_transaction", async |database| {
        let mut writer = database.writer("writer").await;
        run(
            &mut writer,
            r#"
            begin;
            select outbox.emit('order', '1', 'before');
            select outbox.context('{"tenant": "a", "user": "1"}');
            select outbox.emit('order', '1', 'context');
            select outbox.emit('order', '1', 'merged', '{}', '{"user": "2", "scope": "s"}');
            insert into outbox.events (aggregate_type, aggregate_id, event_type) values ('order', '1', 'insert');
            savepoint inner_one;
            select outbox.context('{"tenant": "b"}');
            select outbox.emit('order', '1', 'in savepoint, lost');
            rollback to savepoint inner_one;
            select outbox.emit('order', '1', 'outer again');
            savepoint inner_two;
            select outbox.context('{"tenant": "c"}');
            release savepoint inner_two;
            select outbox.emit('order', '1', 'released');
            select outbox.context(null);
            select outbox.emit('order', '1', 'taken back');
            select outbox.context('{"tenant": "d"}');
            commit;
            "#,
        )
        .await;
        run(&mut writer, "select outbox.emit('order', '1', 'after commit')").await;
        run(
            &mut writer,
            r#"begin; select outbox.context('{"tenant": "e"}'); rollback;
               begin; savepoint s; select outbox.context('{"tenant": "f"}'); rollback to s;
               select outbox.emit('order', '1', 'after rollback'); commit"#,
        )
        .await;
        run(&mut writer, "select outbox.emit('order', '1', 'own only', '{}', '{\"own\": \"1\"}')").await;

        let headers = values(
            &mut database.superuser().await,
            "select event_type || ': ' || coalesce(headers::text, 'none') from outbox.events order by id",
        )
        .await;
        assert_eq!(
            headers,
            [
                r"before: none",
                r#"context: {"tenant": "a", "user": "1"}"#,
                r#"merged: {"user": "2", "scope": "s", "tenant": "a"}"#,
                r#"insert: {"tenant": "a", "user": "1"}"#,
                r#"outer again: {"tenant": "a", "user": "1"}"#,
                r#"released: {"tenant": "c"}"#,
                r"taken back: none",
                r"after commit: none",
                r"after rollback: none",
                r#"own only: {"own": "1"}"#,
            ]
        );
    })
    .await;
}

/// How many hints were sent since the last call. A marker after them shows that no more are under way.
async fn hints(listener: &mut PgListener, superuser: &mut PgConnection) -> usize {
    run(superuser, "select pg_notify('outbox_events', 'marker')").await;
    let mut hints = 0;
    while listener.recv().await.expect("notification").payload() != "marker" {
        hints += 1;
    }
    hints
}

#[tokio::test]
async fn of_many_open_transactions_one_notifies() {
    fresh::database(
        "rights::of_many_open_transactions_one_notifies",
        async |database| {
            let pool = PgPoolOptions::new()
                .connect_with(database.options())
                .await
                .expect("pool");
            let mut listener = PgListener::connect_with(&pool).await.expect("listen");
            listener.listen("outbox_events").await.expect("listen");
            let mut superuser = database.superuser().await;
            let (mut one, mut two) = (database.writer("one").await, database.writer("two").await);

            for writer in [&mut one, &mut two] {
                run(writer, "begin").await;
                emit(writer, "1").await;
                emit(writer, "2").await;
            }
            assert_eq!(
                hints(&mut listener, &mut superuser).await,
                0,
                "nothing is committed"
            );
            run(&mut one, "commit").await;
            run(&mut two, "commit").await;
            assert_eq!(hints(&mut listener, &mut superuser).await, 1);

            run(&mut one, "begin").await;
            emit(&mut one, "3").await;
            run(&mut one, "rollback").await;
            assert_eq!(
                hints(&mut listener, &mut superuser).await,
                0,
                "nothing was committed"
            );

            emit(&mut two, "4").await;
            emit(&mut two, "5").await;
            assert_eq!(
                hints(&mut listener, &mut superuser).await,
                2,
                "one after the other, each notifies"
            );
            drop(listener);
            pool.close().await;
        },
    )
    .await;
}

#[tokio::test]
async fn an_owner_without_privileges_can_migrate() {
    fresh::database(
        "rights::an_owner_without_privileges_can_migrate",
        async |_| {
            // That database made the roles. Now one whose owner is nobody special.
            fresh::empty_database(
                "rights::an_owner_without_privileges_can_migrate",
                async |database| {
                    let owner = database.login("owner", "").await;
                    let name = &database.name;
                    run(
                        &mut database.superuser().await,
                        &format!("alter database {name} owner to {owner}"),
                    )
                    .await;
                    let mut connection = database.connect(&owner).await;
                    for migration in MIGRATIONS {
                        run(&mut connection, migration).await;
                    }
                    emit(&mut database.writer("writer").await, "1").await;
                    let mut relay = database.relay("relay").await;
                    assert_eq!(
                        value(&mut relay, "select aggregate_id from outbox.events").await,
                        "1"
                    );
                    assert_eq!(
                        value(&mut relay, "select outbox.make_partitions(9)::text").await,
                        "1"
                    );
                },
            )
            .await;
        },
    )
    .await;
}

#[tokio::test]
async fn databases_are_migrated_at_the_same_time() {
    let test = "rights::databases_are_migrated_at_the_same_time";
    for _ in 0..4 {
        fresh::empty_database(test, async |one| {
            fresh::empty_database(test, async |two| {
                // Roles of its own stand for a server on which nobody has made them yet. They are dropped with the
                // first database, the last of those that use them.
                let migrate = async |database: &Database| {
                    let mut connection = database.superuser().await;
                    for migration in MIGRATIONS {
                        let migration = migration
                            .replace("outbox_writer", &format!("{}_w", one.name))
                            .replace("outbox_relay", &format!("{}_r", one.name));
                        run(&mut connection, &migration).await;
                    }
                    emit(&mut connection, "1").await;
                    connection.close().await.expect("close");
                };
                tokio::join!(migrate(one), migrate(two));
            })
            .await;
        })
        .await;
    }
}
