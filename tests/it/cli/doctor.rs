//! `doctor` finds what was broken on purpose, and its remedy mends it.

use rdkafka::admin::{AdminOptions, NewTopic, TopicReplication};
use serde::Deserialize;
use sqlx::Connection;
use tempfile::TempDir;

use super::{PLANTED, Ran, relay};
use crate::fresh::{Database, empty_database, needed, run};

#[derive(Clone, Debug, Deserialize)]
struct Finding {
    severity: String,
    check: String,
    what: String,
    why: String,
    remedy: Option<Remedy>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Remedy {
    Sql(String),
    Command(String),
    Configuration(String),
    Advice(String),
}

impl Finding {
    fn is_wrong(&self) -> bool {
        !["note", "ok"].contains(&&self.severity[..])
    }

    fn sql(&self) -> &str {
        match &self.remedy {
            Some(Remedy::Sql(sql)) => sql,
            other => panic!("{}: no SQL but {other:?}", self.check),
        }
    }

    fn command(&self) -> &str {
        match &self.remedy {
            Some(Remedy::Command(command)) => command,
            other => panic!("{}: no command but {other:?}", self.check),
        }
    }

    fn setting(&self) -> &str {
        match &self.remedy {
            Some(Remedy::Configuration(setting) | Remedy::Advice(setting)) => setting,
            other => panic!("{}: no setting but {other:?}", self.check),
        }
    }
}

/// What `doctor` finds. Everything but a note comes with a remedy, and the exit code says whether there is anything.
async fn findings(env: &[(&str, &str)]) -> Vec<Finding> {
    let Ran { code, out, err } = relay(&["doctor", "--json"], env).await;
    let found: Vec<Finding> =
        serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}:\n{out}\n{err}"));
    let wrong = found.iter().any(Finding::is_wrong);
    assert_eq!(code, if wrong { 3 } else { 0 }, "{found:#?}");
    for finding in &found {
        assert!(
            !finding.what.is_empty() && !finding.why.is_empty(),
            "{finding:?}"
        );
        assert!(
            !finding.is_wrong() || finding.remedy.is_some(),
            "{finding:?}"
        );
    }
    found
}

/// The only thing that is wrong.
async fn only(check: &str, env: &[(&str, &str)]) -> Finding {
    let mut found = findings(env).await;
    found.retain(Finding::is_wrong);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!(found[0].check, check, "{found:#?}");
    found.remove(0)
}

async fn healthy(env: &[(&str, &str)]) {
    let mut found = findings(env).await;
    found.retain(Finding::is_wrong);
    assert!(found.is_empty(), "{found:#?}");
}

/// A migrated database and the environment of a relay that is a member of `outbox_relay`.
async fn migrated(test: &str, work: impl AsyncFnOnce(&Database, &str, &[(&str, &str)])) {
    empty_database(test, async |database| {
        let owner = database.login("owner", "superuser").await;
        let owner_url = database.url(&owner);
        let env = |url| {
            [
                ("RELAY_SOURCE__POSTGRES__URL", url),
                ("RELAY_SINK__KIND", "stdout"),
            ]
        };
        relay(&["migrate"], &env(&owner_url)).await.ends_with(0);
        let role = database.login("relay", "in role outbox_relay").await;
        let url = database.url(&role);
        work(database, &role, &env(&url)).await;
    })
    .await;
}

#[tokio::test]
async fn a_migrated_database_is_healthy() {
    migrated("a_migrated_database_is_healthy", async |_, _, env| {
        healthy(env).await;
        let Ran { out, .. } = relay(&["doctor"], env).await.ends_with(0);
        assert!(out.contains("nothing is wrong"), "{out}");
        assert!(out.contains("pipeline main has no cursor"), "{out}");
    })
    .await;
}

/// The table as somebody made it by hand who did not know that the order counts.
const SWAPPED: &str = "
alter sequence outbox.events_id_seq owned by none;
drop table outbox.events;
create table outbox.events (
    id bigint not null default nextval('outbox.events_id_seq') primary key,
    xid xid8 not null default pg_current_xact_id(),
    event_id uuid not null default gen_random_uuid(),
    aggregate_type text not null, aggregate_id text not null, event_type text not null,
    payload json, payload_bytes bytea, content_type text,
    headers json default case when current_setting('outbox.context_of', true) = pg_current_xact_id()::text
                              then current_setting('outbox.context', true)::json end,
    occurred_at timestamptz not null default clock_timestamp()) partition by range (id);
create index on outbox.events (xid, id);
create table outbox.events_default partition of outbox.events default;
create trigger events_notify after insert on outbox.events for each statement execute function outbox.notify_relay();
grant select on outbox.events to outbox_relay;
grant insert (event_id, aggregate_type, aggregate_id, event_type, payload, payload_bytes, content_type, headers, occurred_at)
    on outbox.events to outbox_writer;
grant select (id, event_id, occurred_at) on outbox.events to outbox_writer;
select outbox.make_partitions()";

const NO_PARTITIONS: &str = "
do $$
declare name text;
begin
    for name in select inhrelid::regclass::text from pg_inherits
                 where inhparent = 'outbox.events'::regclass and inhrelid <> 'outbox.events_default'::regclass loop
        execute 'drop table ' || name;
    end loop;
end $$";

#[tokio::test]
async fn what_is_broken_is_found_and_mended_by_its_remedy() {
    let cases: &[(&str, &str)] = &[
        (
            "sequence_cache",
            "alter sequence outbox.events_id_seq cache 20",
        ),
        ("sequence", "alter sequence outbox.events_id_seq cycle"),
        (
            "notify_trigger",
            "alter table outbox.events disable trigger events_notify",
        ),
        (
            "notify_trigger",
            "drop trigger events_notify on outbox.events",
        ),
        ("rights", "revoke select on outbox.events from outbox_relay"),
        (
            "rights",
            "revoke update on outbox.cursors from outbox_relay",
        ),
        ("rights", "revoke usage on schema outbox from outbox_relay"),
        (
            "rights",
            "revoke execute on function outbox.make_partitions from outbox_relay",
        ),
        (
            "rights",
            "revoke execute on function outbox.take_sample, outbox.retire_partition from outbox_relay",
        ),
        (
            "rights",
            "revoke execute on function outbox.retire_rows from outbox_relay; \
             revoke select on outbox.samples, outbox.upkeep from outbox_relay",
        ),
        (
            "writers_order",
            "grant insert on outbox.events to outbox_writer",
        ),
        (
            "writers_order",
            "grant insert (id) on outbox.events to outbox_writer",
        ),
        (
            "writers_rights",
            "revoke execute on function outbox.context from outbox_writer; \
             revoke usage on sequence outbox.events_id_seq from outbox_writer",
        ),
        (
            "columns",
            "alter table outbox.events alter column payload type jsonb using payload::jsonb",
        ),
        (
            "columns",
            "alter table outbox.events alter column occurred_at set default now()",
        ),
        (
            "columns",
            "alter table outbox.events drop column content_type",
        ),
        ("indexes", "drop index outbox.events_xid_id"),
        ("partitions", NO_PARTITIONS),
        ("partitions", "drop table outbox.events_default"),
        (
            "row_security",
            "alter table outbox.events enable row level security",
        ),
        ("column_order", SWAPPED),
    ];
    migrated(
        "what_is_broken_is_found_and_mended_by_its_remedy",
        async |database, _, env| {
            let mut superuser = database.superuser().await;
            for (check, broken) in cases {
                run(&mut superuser, broken).await;
                let finding = only(check, env).await;
                run(&mut superuser, finding.sql()).await;
                healthy(env).await;
            }
        },
    )
    .await;
}

#[tokio::test]
async fn the_mended_column_order_takes_the_transaction_before_the_id() {
    migrated(
        "the_mended_column_order_takes_the_transaction_before_the_id",
        async |database, _, env| {
            let mut superuser = database.superuser().await;
            run(&mut superuser, SWAPPED).await;
            run(&mut superuser, only("column_order", env).await.sql()).await;
            // An id that is asked for while the transaction has no number yet would be the broken order.
            run(
                &mut superuser,
                "create function outbox.asked(asked regclass) returns bigint language plpgsql as $$ begin \
                     if pg_current_xact_id_if_assigned() is null then raise exception 'no transaction yet'; end if; \
                     return nextval(asked); end $$; \
                 do $$ declare expression text := (select pg_get_expr(adbin, adrelid) from pg_attrdef d \
                     join pg_attribute a on a.attrelid = d.adrelid and a.attnum = d.adnum \
                    where d.adrelid = 'outbox.events'::regclass and a.attname = 'id'); \
                 begin execute 'alter table outbox.events alter column id set default ' || \
                     replace(expression, 'nextval(', 'outbox.asked('); end $$",
            )
            .await;
            run(
                &mut superuser,
                "insert into outbox.events (aggregate_type, aggregate_id, event_type) values ('order', '1', 'placed')",
            )
            .await;
        },
    )
    .await;
}

#[tokio::test]
async fn a_role_that_is_no_member_is_told_how_to_become_one() {
    migrated(
        "a_role_that_is_no_member_is_told_how_to_become_one",
        async |database, role, env| {
            let mut superuser = database.superuser().await;
            run(&mut superuser, &format!("revoke outbox_relay from {role}")).await;
            let finding = only("rights", env).await;
            assert_eq!(finding.sql(), format!("grant outbox_relay to \"{role}\""));
            run(&mut superuser, finding.sql()).await;
            healthy(env).await;
        },
    )
    .await;
}

#[tokio::test]
async fn a_read_only_database_is_mended_where_it_was_made_so() {
    migrated(
        "a_read_only_database_is_mended_where_it_was_made_so",
        async |database, role, env| {
            let mut superuser = database.superuser().await;
            for place in [
                format!("database {}", database.name),
                format!("role {role}"),
                format!("role {role} in database {}", database.name),
            ] {
                run(
                    &mut superuser,
                    &format!("alter {place} set default_transaction_read_only = on"),
                )
                .await;
                let finding = only("read_only", env).await;
                // As somebody whom the setting concerns too.
                let mut somebody = database.superuser().await;
                run(&mut somebody, finding.sql()).await;
                healthy(env).await;
            }
        },
    )
    .await;
}

#[tokio::test]
async fn an_empty_database_is_mended_by_migrate() {
    empty_database("an_empty_database_is_mended_by_migrate", async |database| {
        let owner = database.login("owner", "superuser").await;
        let url = database.url(&owner);
        let env = [
            ("RELAY_SOURCE__POSTGRES__URL", &url[..]),
            ("RELAY_SINK__KIND", "stdout"),
        ];
        let finding = only("migrations", &env).await;
        assert_eq!(finding.command(), "outbox-relay migrate");
        relay(&["migrate"], &env).await.ends_with(0);
        healthy(&env).await;
    })
    .await;
}

#[tokio::test]
async fn a_restored_database_is_told_apart() {
    migrated("a_restored_database_is_told_apart", async |database, _, env| {
        let mut superuser = database.superuser().await;
        for (of, what) in [
            ("1, 1", "cluster"),
            ("(select system_identifier from pg_control_system()), 99", "timeline"),
        ] {
            run(
                &mut superuser,
                &format!(
                    "delete from outbox.cursors; \
                     insert into outbox.cursors (pipeline, prev, cur, floor, ceiling, next_floor, last_id, \
                     system_identifier, timeline) select 'main', '1:1:', '1:1:', 0, 0, 0, 0, {of}"
                ),
            )
            .await;
            let mut found = findings(env).await;
            found.retain(|finding| finding.check == "moved");
            let [finding] = &found[..] else {
                panic!("{found:#?}");
            };
            assert_eq!(finding.severity, "note");
            assert!(finding.what.contains(what), "{}", finding.what);
        }
    })
    .await;
}

#[tokio::test]
async fn a_pooler_in_the_way_of_listen_is_found_every_time() {
    let test = "a_pooler_in_the_way_of_listen_is_found_every_time";
    let Some(pooler) = needed(test, "PGBOUNCER_URL") else {
        return;
    };
    migrated(test, async |database, _, env| {
        let (pooler, _) = pooler.rsplit_once('/').unwrap();
        let pooler = format!("{pooler}/{}", database.name);
        let mut pooled = env.to_vec();
        pooled.push(("RELAY_SOURCE__POSTGRES__DIRECT_URL", &pooler));
        for _ in 0..5 {
            let finding = only("listen", &pooled).await;
            assert!(finding.what.contains("pooler"), "{finding:?}");
            assert!(finding.setting().contains("direct_url"), "{finding:?}");
        }
        // The other way round is how it is meant to be: everything else through the pooler.
        let direct = env[0].1;
        let right = [
            ("RELAY_SOURCE__POSTGRES__URL", &pooler[..]),
            ("RELAY_SOURCE__POSTGRES__DIRECT_URL", direct),
            env[1],
        ];
        healthy(&right).await;
    })
    .await;
}

#[tokio::test]
async fn polling_and_notifying_is_a_note() {
    migrated(
        "polling_and_notifying_is_a_note",
        async |database, _, env| {
            let mut polling = env.to_vec();
            polling.push(("RELAY_SOURCE__POSTGRES__CAPTURE", "poll"));
            let found = findings(&polling).await;
            let note = found
                .iter()
                .find(|finding| finding.check == "notify_trigger")
                .expect("the note");
            assert_eq!(note.severity, "note");
            run(&mut database.superuser().await, note.sql()).await;
            let found = findings(&polling).await;
            assert!(
                found
                    .iter()
                    .all(|finding| finding.check != "notify_trigger")
            );
        },
    )
    .await;
}

fn sqlite(folder: &TempDir) -> [(&str, String); 3] {
    let path = folder.path().join("shop.db").display().to_string();
    [
        ("RELAY_SOURCE__KIND", "sqlite".to_owned()),
        ("RELAY_SOURCE__SQLITE__PATH", path),
        ("RELAY_SINK__KIND", "stdout".to_owned()),
    ]
}

#[tokio::test]
async fn a_sqlite_file_is_looked_at_too() {
    let folder = tempfile::tempdir().unwrap();
    let env = sqlite(&folder);
    let env: Vec<(&str, &str)> = env
        .iter()
        .map(|(name, value)| (*name, &value[..]))
        .collect();
    let path = folder.path().join("shop.db");
    let missing = only("connection", &env).await;
    assert_eq!(missing.command(), "outbox-relay migrate");
    assert!(!path.exists(), "looking creates nothing");
    relay(&["migrate"], &env).await.ends_with(0);
    healthy(&env).await;
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(&path);
    let mut connection = sqlx::SqliteConnection::connect_with(&options)
        .await
        .unwrap();
    for (check, broken) in [
        ("ids_ascend", "drop trigger outbox_events_ids_ascend"),
        ("journal_mode", "pragma journal_mode = delete"),
    ] {
        sqlx::raw_sql(broken)
            .execute(&mut connection)
            .await
            .unwrap();
        let finding = only(check, &env).await;
        let sql = match &finding.remedy {
            Some(Remedy::Sql(sql)) => sql.clone(),
            // sqlite3 FILE 'STATEMENT'
            _ => finding.command().rsplit('\'').nth(1).unwrap().to_owned(),
        };
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql))
            .execute(&mut connection)
            .await
            .unwrap();
        healthy(&env).await;
    }
}

/// A file that is healthy, so that only Kafka can be wrong.
async fn with_kafka(folder: &TempDir, more: &[(&str, &str)]) -> Vec<(String, String)> {
    let mut env: Vec<(String, String)> = sqlite(folder)
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
    env[2].1 = "kafka".to_owned();
    env.extend(
        more.iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
    );
    let borrowed: Vec<(&str, &str)> = env.iter().map(|(n, v)| (&n[..], &v[..])).collect();
    relay(&["migrate"], &borrowed).await.ends_with(0);
    env
}

#[tokio::test]
async fn a_broker_that_is_not_there_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let env = with_kafka(
        &folder,
        &[
            ("RELAY_SINK__KAFKA__BROKERS", "127.0.0.1:1"),
            ("RELAY_SINK__KAFKA__SASL__MECHANISM", "PLAIN"),
            ("RELAY_SINK__KAFKA__SASL__USERNAME", "relay"),
            ("RELAY_SINK__KAFKA__SASL__PASSWORD", PLANTED),
        ],
    )
    .await;
    let env: Vec<(&str, &str)> = env.iter().map(|(n, v)| (&n[..], &v[..])).collect();
    let finding = only("kafka", &env).await;
    assert!(finding.what.contains("Connection refused"), "{finding:?}");
    assert_eq!(finding.command(), "nc -vz 127.0.0.1 1");
}

#[tokio::test]
async fn missing_topics_are_named_with_the_command_that_makes_them() {
    let Some(brokers) = needed(
        "missing_topics_are_named_with_the_command_that_makes_them",
        "KAFKA_BROKERS",
    ) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let topic = format!("doctor-{}", uuid::Uuid::new_v4().simple());
    let env = with_kafka(
        &folder,
        &[
            ("RELAY_SINK__KAFKA__BROKERS", &brokers),
            ("RELAY_PIPELINES__ORDERS__TOPIC", &topic),
        ],
    )
    .await;
    let env: Vec<(&str, &str)> = env.iter().map(|(n, v)| (&n[..], &v[..])).collect();
    healthy(&env).await;
    let mut refusing = env.clone();
    refusing.push(("RELAY_SINK__KAFKA__TOPICS__CREATE", "false"));
    let finding = only("topic", &refusing).await;
    assert!(
        finding
            .command()
            .contains(&format!("--create --topic {topic} --partitions 8")),
        "{finding:?}"
    );
    let mut replicated = env.clone();
    replicated.push(("RELAY_SINK__KAFKA__TOPICS__REPLICATION_FACTOR", "99"));
    only("replication_factor", &replicated).await;
}

#[tokio::test]
async fn what_exactly_once_needs_is_looked_at() {
    let Some(brokers) = needed("what_exactly_once_needs_is_looked_at", "KAFKA_BROKERS") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let id = format!("doctor-{}", uuid::Uuid::new_v4().simple());
    let env = with_kafka(
        &folder,
        &[
            ("RELAY_SINK__KAFKA__BROKERS", &brokers),
            ("RELAY_SINK__KAFKA__DELIVERY", "exactly-once"),
            ("RELAY_SINK__KAFKA__TRANSACTIONAL_ID", &id),
        ],
    )
    .await;
    let mut env: Vec<(&str, &str)> = env.iter().map(|(n, v)| (&n[..], &v[..])).collect();
    healthy(&env).await;
    env.push(("RELAY_SINK__KAFKA__TOPICS__CREATE", "false"));
    let finding = only("positions_topic", &env).await;
    let create = format!("--create --topic {id}.main.0.positions --partitions 1");
    assert!(finding.command().contains(&create), "{finding:?}");
    let admin = crate::kafka::cluster::admin(&brokers);
    let positions = format!("{id}.main.0.positions");
    let topic = NewTopic::new(&positions, 1, TopicReplication::Fixed(1));
    let created = admin.create_topics([&topic], &AdminOptions::new()).await;
    created.unwrap()[0].as_ref().unwrap();
    let finding = only("positions_topic", &env).await;
    assert!(
        finding.command().contains("cleanup.policy=compact"),
        "{finding:?}"
    );
}

#[tokio::test]
async fn refused_logins_and_tls_are_told_apart() {
    let test = "refused_logins_and_tls_are_told_apart";
    let variables = ["KAFKA_SASL_BROKERS", "KAFKA_SSL_BROKERS", "KAFKA_CA_FILE"];
    let [Some(sasl), Some(ssl), Some(ca)] = variables.map(|variable| needed(test, variable)) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let tls = [
        ("RELAY_SINK__KAFKA__TLS__ENABLED", "true"),
        ("RELAY_SINK__KAFKA__TLS__CA_FILE", &ca[..]),
    ];
    let login = [
        ("RELAY_SINK__KAFKA__BROKERS", &sasl[..]),
        ("RELAY_SINK__KAFKA__SASL__MECHANISM", "SCRAM-SHA-512"),
        ("RELAY_SINK__KAFKA__SASL__USERNAME", "relay"),
        ("RELAY_SINK__KAFKA__SASL__PASSWORD", PLANTED),
    ];
    type Case<'a> = (&'a str, &'a str, Vec<(&'a str, &'a str)>);
    let cases: [Case<'_>; 3] = [
        ("kafka_sasl", "mechanism", [&tls[..], &login[..]].concat()),
        // Without the authority that signed the brokers' certificates.
        (
            "kafka_tls",
            "ca_file",
            vec![tls[0], ("RELAY_SINK__KAFKA__BROKERS", &ssl)],
        ),
        (
            "kafka",
            "enabled = true",
            vec![("RELAY_SINK__KAFKA__BROKERS", &ssl)],
        ),
    ];
    for (check, setting, more) in cases {
        let env = with_kafka(&folder, &more).await;
        let env: Vec<(&str, &str)> = env.iter().map(|(n, v)| (&n[..], &v[..])).collect();
        let finding = only(check, &env).await;
        assert!(finding.setting().contains(setting), "{finding:?}");
    }
}

#[tokio::test]
async fn brokers_that_are_not_verified_are_told() {
    const TEST: &str = "brokers_that_are_not_verified_are_told";
    let Some(brokers) = needed(TEST, "KAFKA_SSL_BROKERS") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let unverified = "RELAY_SINK__KAFKA__PROPERTIES__ENABLE_SSL_CERTIFICATE_VERIFICATION";
    let env = with_kafka(
        &folder,
        &[
            ("RELAY_SINK__KAFKA__BROKERS", &brokers),
            ("RELAY_SINK__KAFKA__TLS__ENABLED", "true"),
            (unverified, "false"),
        ],
    )
    .await;
    let env: Vec<(&str, &str)> = env.iter().map(|(a, b)| (&a[..], &b[..])).collect();
    let found = only("kafka_security", &env).await;
    assert!(found.what.contains("not verified"), "{}", found.what);
    let Ran { out, .. } = relay(&["doctor"], &env).await.ends_with(3);
    assert!(out.contains("TLS, brokers not verified"), "{out}");
}
