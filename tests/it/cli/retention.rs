//! What `status`, `doctor` and `migrate` say and do about the time that events are kept.

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection, SqliteConnection};

use super::{Ran, relay};
use crate::fresh::{empty_database, run, value};

/// Emits, and lets a sample be that old.
async fn old(superuser: &mut PgConnection, hours: u32) {
    run(
        superuser,
        "select outbox.emit('order', '1', 'placed', '{}') from generate_series(1, 100);
         update outbox.events set occurred_at = 'infinity' where id = 1;
         update outbox.events set occurred_at = '-infinity' where id = 2",
    )
    .await;
    // In a transaction of its own: a sample has what was committed before it.
    run(superuser, "select outbox.take_sample('1 s')").await;
    run(
        superuser,
        &format!(
            "update outbox.samples
                set at = at - interval '{hours} hours', counted = counted - {hours} * 3600"
        ),
    )
    .await;
}

#[tokio::test]
async fn personal_data_that_outlives_its_time_is_told_with_the_cause() {
    let test = "personal_data_that_outlives_its_time_is_told_with_the_cause";
    empty_database(test, async |database| {
        let owner = database.login("owner", "superuser").await;
        let owner_url = database.url(&owner);
        let role = database.login("relay", "in role outbox_relay").await;
        let env = |url| {
            [
                ("RELAY_SOURCE__POSTGRES__URL", url),
                ("RELAY_SINK__KIND", "stdout"),
                ("RELAY_ADMIN__ENABLED", "false"),
                ("RELAY_RETENTION__KEEP", "10h"),
                ("RELAY_RETENTION__PARTITION_EVENTS", "300"),
                ("RELAY_RETENTION__PARTITIONS_AHEAD", "2"),
            ]
        };
        relay(&["migrate"], &env(&owner_url)).await.ends_with(0);
        let mut superuser = database.superuser().await;
        let bounds = "select string_agg(lower || '-' || upper, ' ' order by lower) from outbox.partition_bounds()";
        assert_eq!(
            value(&mut superuser, bounds).await,
            "1-301 301-601 601-901",
            "as large as they are configured"
        );
        let url = database.url(&role);
        let env = &env(&url)[..];
        let tells = async |expected: &[&str]| {
            for words in [&["status"][..], &["doctor"]] {
                let Ran { out, .. } = relay(words, env).await;
                for part in expected {
                    assert!(out.contains(part), "{words:?}: {part}: {out}");
                }
            }
        };
        old(&mut superuser, 13).await;
        tells(&["event 1 is in the log for 13h", "pipeline main has not published it"]).await;
        let Ran { out, .. } = relay(&["status"], env).await.ends_with(0);
        assert!(out.contains("the oldest event is 13 h old"), "{out}");
        assert!(!out.contains("a day"), "nothing came in: {out}");
        run(
            &mut superuser,
            "insert into outbox.cursors (pipeline, prev, cur, floor, ceiling, next_floor, last_id, system_identifier, timeline)
             select 'main', pg_current_snapshot(), pg_current_snapshot(), 100, 100, 100, 100, s.system_identifier, c.timeline_id
               from pg_control_system() s, pg_control_checkpoint() c;
             create table public.note (event bigint constraint note_event references outbox.events (id))",
        )
        .await;
        tells(&["event 1 is in the log for 13h", "no relay has looked after the log for 13h"]).await;
        let Ran { out, .. } = relay(&["doctor"], env).await.ends_with(3);
        assert!(out.contains("alter table public.note drop constraint \"note_event\""), "{out}");
        // A sample of now: a relay looks after the log, but for the foreign key.
        run(
            &mut superuser,
            "insert into outbox.samples (counted, seen, newest, system_identifier)
             select counted + 13 * 3600, pg_current_snapshot(), 100, system_identifier from outbox.samples",
        )
        .await;
        tells(&["foreign keys refer to outbox.events: note_event of public.note"]).await;
        run(&mut superuser, "drop table public.note").await;
        tells(&["the relay could not remove it"]).await;
        run(&mut superuser, "update outbox.samples set counted = 0").await;
        tells(&["relays ran for 0s of that time, and only that counts"]).await;
        run(&mut superuser, "delete from outbox.events").await;
        let Ran { out, .. } = relay(&["status"], env).await.ends_with(0);
        assert!(!out.contains("is in the log for"), "{out}");
    })
    .await;
}

#[tokio::test]
async fn a_forecast_needs_an_hour() {
    let test = "a_forecast_needs_an_hour";
    empty_database(test, async |database| {
        let owner = database.login("owner", "superuser").await;
        let url = database.url(&owner);
        let env = [
            ("RELAY_SOURCE__POSTGRES__URL", &url[..]),
            ("RELAY_SINK__KIND", "stdout"),
            ("RELAY_ADMIN__ENABLED", "false"),
        ];
        relay(&["migrate"], &env).await.ends_with(0);
        let mut superuser = database.superuser().await;
        run(&mut superuser, "select outbox.take_sample('1 s')").await;
        run(
            &mut superuser,
            "select outbox.emit('order', n::text, 'placed', '{}') from generate_series(1, 1000) n",
        )
        .await;
        let Ran { out, .. } = relay(&["status"], &env).await.ends_with(0);
        assert!(!out.contains("a day"), "{out}");
        run(
            &mut superuser,
            "update outbox.samples set at = at - interval '59 minutes'",
        )
        .await;
        let Ran { out, .. } = relay(&["status"], &env).await.ends_with(0);
        assert!(!out.contains("a day"), "{out}");
        run(
            &mut superuser,
            "update outbox.samples set at = at - interval '61 minutes'",
        )
        .await;
        let Ran { out, .. } = relay(&["status"], &env).await.ends_with(0);
        assert!(out.contains("a day come in (1000 ids in 2 h, "), "{out}");
        let Ran { out, .. } = relay(&["status", "--json"], &env).await.ends_with(0);
        let seen: serde_json::Value = serde_json::from_str(&out).unwrap();
        let each = seen["books"]["log"]["growth"]["bytes_per_event"]
            .as_f64()
            .unwrap();
        // A row of about 130 bytes in two indexes; the nine empty partitions would be 216 bytes more each.
        assert!((100.0..330.0).contains(&each), "{each}");
    })
    .await;
}

#[tokio::test]
async fn a_sqlite_outbox_tells_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("shop.db");
    let file = file.to_str().unwrap();
    let env = [
        ("RELAY_SOURCE__KIND", "sqlite"),
        ("RELAY_SOURCE__SQLITE__PATH", file),
        ("RELAY_SINK__KIND", "stdout"),
        ("RELAY_ADMIN__ENABLED", "false"),
        ("RELAY_RETENTION__KEEP", "10h"),
    ];
    relay(&["migrate"], &env).await.ends_with(0);
    let mut connection = SqliteConnection::connect(file).await.unwrap();
    let mut run = async |sql: &str| {
        let sql = AssertSqlSafe(sql.to_owned());
        sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
    };
    run(
        "with recursive n (n) as (select 1 union all select n + 1 from n where n < 5000)
         insert into outbox_events (aggregate_type, aggregate_id, event_type, occurred_at)
         select 'order', n, 'placed', iif(n % 2, -9223372036854775807, 9223372036854775807) from n;
         insert into outbox_samples (at, counted, newest)
         values ((unixepoch() - 13 * 3600) * 1000000, 0, 0), ((unixepoch() - 12 * 3600) * 1000000, 3600, 4000)",
    )
    .await;
    let Ran { out, .. } = relay(&["status"], &env).await.ends_with(0);
    for part in [
        "event 1 is in the log for 12h",
        "pipeline main has not published it",
        "a day come in (5000 ids in 13 h, ",
        "the oldest event is 13 h old",
    ] {
        assert!(out.contains(part), "{part}: {out}");
    }
    run("insert into outbox_cursors (pipeline, last_id) values ('main', 5000)").await;
    let Ran { out, .. } = relay(&["doctor"], &env).await.ends_with(3);
    assert!(
        out.contains("no relay has looked after the log for 12h"),
        "{out}"
    );
    run("update outbox_samples set at = at + 12 * 3600000000").await;
    let Ran { out, .. } = relay(&["status"], &env).await.ends_with(0);
    assert!(!out.contains("is in the log for"), "{out}");
}
