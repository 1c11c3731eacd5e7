//! `doctor` knows every right that the migrations grant, and finds what was granted besides.

use outbox_relay::config::Config;
use outbox_relay::doctor::{self, Finding, Remedy, Severity};
use outbox_relay::supervise;

use crate::fresh::{Database, empty_database, run, value, values};

/// What is wrong with the rights and the objects, as the relay's role sees it; notes are left out.
async fn wrong(database: &Database, config: &Config) -> Vec<Finding> {
    let mut found = doctor::examine(config, supervise::wall_clock_us).await;
    // Roles belong to the whole server: those of other tests are none of this one's.
    let of_others = |finding: &Finding| {
        finding.check == "writers_inherit" && !finding.what.contains(&database.name)
    };
    let is_wrong = |finding: &Finding| {
        matches!(finding.severity, Severity::Error | Severity::Warning) && !of_others(finding)
    };
    found.retain(is_wrong);
    found
}

fn sql(finding: &Finding) -> &str {
    match &finding.remedy {
        Some(Remedy::Sql(sql)) => sql,
        other => panic!("{finding:?}: {other:?}"),
    }
}

/// A migrated database, the role of a relay, and the configuration of a relay that connects as that role.
async fn with_relay(test: &str, work: impl AsyncFnOnce(&Database, &str, &Config)) {
    empty_database(test, async |database| {
        outbox_relay::migrate::postgres(database.options())
            .await
            .unwrap();
        let writer = database.login("service", "in role outbox_writer").await;
        let role = database.login("relay", "in role outbox_relay").await;
        eprintln!("{writer} emits, {role} relays");
        let env = [
            (
                "RELAY_SOURCE__POSTGRES__URL".to_owned(),
                database.url(&role),
            ),
            ("RELAY_SINK__KIND".to_owned(), "stdout".to_owned()),
        ];
        let config = Config::load(None, env).unwrap();
        assert_eq!(wrong(database, &config).await, []);
        work(database, &role, &config).await;
    })
    .await;
}

/// The grants of the migrations.
fn grants() -> Vec<String> {
    include_str!("../../../src/migrate/objects.txt")
        .lines()
        .filter(|line| line.starts_with("right\t"))
        .map(|line| line.rsplit('\t').next().unwrap().to_owned())
        .collect()
}

fn as_revoke(grant: &str) -> String {
    let (right, role) = grant
        .strip_prefix("grant ")
        .unwrap()
        .rsplit_once(" to ")
        .unwrap();
    format!("revoke {right} from {role}")
}

#[tokio::test]
async fn each_right_that_is_missing_is_found_and_given_back_by_its_remedy() {
    let test = "each_right_that_is_missing_is_found_and_given_back_by_its_remedy";
    with_relay(test, async |database, _, config| {
        let mut superuser = database.superuser().await;
        let server = [
            "pg_control_system()",
            "pg_current_wal_lsn()",
            "pg_walfile_name(pg_lsn)",
        ];
        let mut cases: Vec<(String, String)> = grants()
            .iter()
            .map(|grant| (as_revoke(grant), grant.clone()))
            .collect();
        assert!(cases.len() > 50, "{}", cases.len());
        cases.extend(server.map(|function| {
            let revoke = format!("revoke execute on function {function} from public");
            (
                revoke,
                format!("grant execute on function {function} to outbox_relay"),
            )
        }));
        for (revoke, grant) in cases {
            run(&mut superuser, &revoke).await;
            let found = wrong(database, config).await;
            let check = if grant.ends_with("outbox_writer") {
                "writers_rights"
            } else {
                "rights"
            };
            // Without the list of migrations or the schema, more than the right itself is missed.
            let Some(finding) = found.iter().find(|finding| finding.check == check) else {
                panic!("{revoke}: {found:#?}");
            };
            let remedy = sql(finding);
            assert!(remedy.contains(&grant), "{revoke}: {remedy}");
            run(&mut superuser, remedy).await;
            assert_eq!(wrong(database, config).await, [], "{revoke}");
        }
    })
    .await;
}

#[tokio::test]
async fn rights_that_nobody_needs_are_found_and_taken_by_their_remedy() {
    let test = "rights_that_nobody_needs_are_found_and_taken_by_their_remedy";
    with_relay(test, async |database, relay, config| {
        let mut superuser = database.superuser().await;
        let other = database.login("other", "").await;
        let functions = values(
            &mut superuser,
            "select oid::regprocedure::text from pg_proc where pronamespace = 'outbox'::regnamespace",
        )
        .await;
        assert!(functions.len() > 10, "{functions:?}");
        let mut cases: Vec<String> = functions
            .iter()
            .map(|function| format!("grant execute on function {function} to public"))
            .collect();
        for right in [
            "create on schema outbox to public",
            "select on outbox.events to outbox_writer",
            "delete on outbox.events to outbox_relay",
            "update on outbox.cursors to outbox_writer",
            "update on sequence outbox.events_id_seq to outbox_writer",
            "delete on outbox.events_1 to outbox_writer",
            "select on outbox.parked to public",
            "update (xid) on outbox.events to outbox_relay",
            &format!("truncate on outbox.events to {other}"),
            &format!("update on outbox.events to {other}"),
        ] {
            cases.push(format!("grant {right}"));
        }
        for grant in cases {
            run(&mut superuser, &grant).await;
            let found = wrong(database, config).await;
            let [finding] = &found[..] else {
                panic!("{grant}: {found:#?}");
            };
            assert_eq!(finding.check, "excess_rights", "{grant}");
            run(&mut superuser, sql(finding)).await;
            assert_eq!(wrong(database, config).await, [], "{grant}");
        }
        // What others may read, and services that have the writers' rights themselves, are nobody's concern.
        for right in [
            format!("select on outbox.events to {other}"),
            format!("insert (aggregate_type, aggregate_id, event_type, payload) on outbox.events to {other}"),
            format!("usage on schema outbox to {other}"),
        ] {
            run(&mut superuser, &format!("grant {right}")).await;
            assert_eq!(wrong(database, config).await, [], "{right}");
        }
        run(&mut superuser, &format!("drop owned by {other}")).await;
        assert_ne!(relay, other);
    })
    .await;
}

#[tokio::test]
async fn members_that_inherit_nothing_are_mended_by_the_remedy() {
    let test = "members_that_inherit_nothing_are_mended_by_the_remedy";
    with_relay(test, async |database, relay, config| {
        let mut superuser = database.superuser().await;
        let newer = value(
            &mut superuser,
            "select (current_setting('server_version_num')::int >= 160000)::text",
        )
        .await;
        let service = format!("{}_service", database.name);
        for (role, group, check) in [
            (relay, "outbox_relay", "rights"),
            (&service, "outbox_writer", "writers_inherit"),
        ] {
            let mut ways = vec![format!(
                "revoke {group} from {role}; alter role {role} noinherit; grant {group} to {role}"
            )];
            if newer == "true" {
                ways.push(format!(
                    "alter role {role} inherit; grant {group} to {role} with inherit false"
                ));
            }
            for way in ways {
                run(&mut superuser, &way).await;
                let found = wrong(database, config).await;
                let [finding] = &found[..] else {
                    panic!("{way}: {found:#?}");
                };
                assert_eq!(finding.check, check, "{way}");
                assert!(finding.what.contains("inherit"), "{finding:?}");
                run(&mut superuser, sql(finding)).await;
                assert_eq!(wrong(database, config).await, [], "{way}");
            }
        }
    })
    .await;
}

#[tokio::test]
async fn objects_that_somebody_changed_are_named() {
    let test = "objects_that_somebody_changed_are_named";
    with_relay(test, async |database, _, config| {
        let mut superuser = database.superuser().await;
        let stranger = database.login("stranger", "").await;
        for (change, undo, check, words) in [
            (
                "create schema strange; create function strange.nextval(text) returns bigint language sql as 'select 1::bigint'; \
                 alter table outbox.events alter column id set default strange.nextval('outbox.events_id_seq'::text)",
                "alter table outbox.events alter column id set default pg_catalog.nextval('outbox.events_id_seq'::regclass)",
                "columns",
                "the default of column id of outbox.events is strange.nextval('outbox.events_id_seq'::text)",
            ),
            (
                "alter function outbox.adopt() reset search_path",
                "alter function outbox.adopt() set search_path = pg_catalog, pg_temp",
                "objects",
                "outbox.adopt()",
            ),
            (
                "create function outbox.shard_of(text, text, bigint) returns integer language sql as 'select 0'",
                "drop function outbox.shard_of(text, text, bigint)",
                "objects",
                "outbox.shard_of(text,text,bigint)",
            ),
            (
                "alter table outbox.events alter column headers drop default",
                "",
                "columns",
                "the default of column headers of outbox.events is missing",
            ),
            (
                &format!("alter schema outbox owner to {stranger}"),
                "",
                "owner",
                "may drop whatever is in the schema",
            ),
        ] {
            run(&mut superuser, change).await;
            let mut found = wrong(database, config).await;
            // A function of a stranger is also one that everybody may call.
            found.retain(|finding| finding.check != "excess_rights");
            let [finding] = &found[..] else {
                panic!("{change}: {found:#?}");
            };
            assert_eq!(finding.check, check, "{change}");
            assert!(format!("{} {}", finding.what, finding.why).contains(words), "{finding:?}");
            let undo = if undo.is_empty() { sql(finding) } else { undo };
            run(&mut superuser, undo).await;
            assert_eq!(wrong(database, config).await, [], "{change}");
        }
    })
    .await;
}
