//! Looks at the server as a whole: version, role of the machine, settings, room for connections, clocks, long sessions.

use anyhow::Context;
use serde::Deserialize;
use sqlx::postgres::PgConnection;

use super::super::Finding;
use crate::source::postgres::ask;

/// What the relay is tested with.
const VERSIONS: std::ops::RangeInclusive<i32> = 14..=18;
/// Sessions that hold a transaction open for longer are worth a word.
const IDLE_MAX_SECONDS: f64 = 3600.0;
/// Ages that are computed from two clocks are off by the skew.
const SKEW_NOTE_US: i64 = 1_000_000;
const SKEW_WARNING_US: i64 = 10_000_000;

const FACTS: &str = "
select current_setting('server_version_num')::int / 10000 as major,
       current_setting('server_version') as version,
       pg_is_in_recovery() as in_recovery,
       current_setting('default_transaction_read_only')::bool as read_only,
       (select source from pg_settings where name = 'default_transaction_read_only') as read_only_source,
       current_user::text as role,
       current_database()::text as database,
       (select rolsuper from pg_roles where rolname = current_user) as superuser,
       current_setting('max_connections')::int as connections_max,
       current_setting('superuser_reserved_connections')::int
           + coalesce(current_setting('reserved_connections', true)::int, 0) as connections_reserved,
       (select count(*) from pg_stat_activity where backend_type = 'client backend') as connections,
       current_setting('fsync')::bool as fsync,
       current_setting('synchronous_commit') as synchronous_commit,
       (extract(epoch from clock_timestamp()) * 1000000)::bigint as clock_us,
       pg_has_role(current_user, 'pg_read_all_stats', 'usage') as sees_sessions,
       (select coalesce(json_agg(s), '[]') from (
            select pid, usename::text as \"user\", application_name as application,
                   extract(epoch from clock_timestamp() - xact_start)::float8 as seconds
              from pg_stat_activity
             where state like 'idle in transaction%' and pid <> pg_backend_pid()
             order by xact_start
             limit 20) s) as idle_in_transaction,
       (select coalesce(json_agg(t), '[]') from (
            select gid as name, extract(epoch from clock_timestamp() - prepared)::float8 as seconds
              from pg_prepared_xacts
             order by prepared
             limit 20) t) as prepared";

#[derive(Clone, Debug, Deserialize)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "what the server answered, column by column"
)]
struct Facts {
    major: i32,
    version: String,
    in_recovery: bool,
    read_only: bool,
    read_only_source: String,
    role: String,
    database: String,
    superuser: bool,
    connections_max: i64,
    connections_reserved: i64,
    connections: i64,
    fsync: bool,
    synchronous_commit: String,
    clock_us: i64,
    sees_sessions: bool,
    idle_in_transaction: Vec<Session>,
    prepared: Vec<Prepared>,
}

#[derive(Clone, Debug, Deserialize)]
struct Session {
    pid: i32,
    user: Option<String>,
    application: Option<String>,
    seconds: Option<f64>,
}

#[derive(Clone, Debug, Deserialize)]
struct Prepared {
    name: String,
    seconds: f64,
}

pub(super) async fn examine(
    connection: &mut PgConnection,
    now_us: fn() -> i64,
) -> Result<Vec<Finding>, anyhow::Error> {
    let asked_us = now_us();
    let facts: Facts = ask::one(connection, FACTS)
        .await
        .context("ask about the server")?;
    let answered_us = now_us();
    Ok([
        writing(&facts),
        version(&facts),
        connections(&facts),
        clock(facts.clock_us, asked_us, answered_us),
        durability(&facts),
        superuser(&facts),
        idle_in_transaction(&facts),
        prepared(&facts),
    ]
    .into_iter()
    .flatten()
    .collect())
}

fn writing(facts: &Facts) -> Option<Finding> {
    if facts.in_recovery {
        return Some(
            Finding::error(
                "in_recovery",
                "the server is a standby",
                "nothing can be written to it, and its snapshots are not those of the primary: events would be missed",
            )
            .configuration(
                "[source.postgres]\nurl = \"postgres://...\"   # of the primary; with several hosts a name that follows it",
            ),
        );
    }
    if !facts.read_only {
        return None;
    }
    let database = ask::identifier(&facts.database);
    let role = ask::identifier(&facts.role);
    let setting = "default_transaction_read_only";
    let reset = match &facts.read_only_source[..] {
        "database" => format!("alter database {database} reset {setting}"),
        "user" => format!("alter role {role} reset {setting}"),
        "database user" => format!("alter role {role} in database {database} reset {setting}"),
        // Not in a transaction block, so not with the others' `begin read write`.
        _ => {
            return Some(read_only(facts).sql(format!(
                "alter system set {setting} = off; select pg_reload_conf()"
            )));
        }
    };
    Some(read_only(facts).sql(format!("begin read write; {reset}; commit")))
}

fn read_only(facts: &Facts) -> Finding {
    Finding::error(
        "read_only",
        format!(
            "transactions are read-only (default_transaction_read_only is on, set for: {})",
            facts.read_only_source
        ),
        "the relay can't take its lease or move its cursor",
    )
}

fn version(facts: &Facts) -> Option<Finding> {
    let Facts { major, version, .. } = facts;
    if major < VERSIONS.start() {
        Some(
            Finding::error(
                "version",
                format!("the server is PostgreSQL {version}"),
                "the relay needs pg_current_snapshot and xid8 as they are from version 14 on",
            )
            .advice("upgrade the server to PostgreSQL 14 or newer"),
        )
    } else if major > VERSIONS.end() {
        Some(Finding::note(
            "version",
            format!("the server is PostgreSQL {version}"),
            format!("this program was tested with 14 to {}", VERSIONS.end()),
        ))
    } else {
        None
    }
}

fn connections(facts: &Facts) -> Option<Finding> {
    let usable = facts.connections_max - facts.connections_reserved;
    let used = facts.connections;
    (used * 10 >= usable * 9).then(|| {
        Finding::warning(
            "connections",
            format!("{used} of {usable} connections are in use"),
            "when there are none left the relay can't connect again after an interruption; a pipeline takes up to three",
        )
        .sql(format!(
            "alter system set max_connections = {}; -- then restart the server; or put a pooler in front of the service",
            facts.connections_max * 2
        ))
    })
}

/// The database's clock was read between the two readings of our own, so only what lies outside of them is skew.
fn clock(database_us: i64, asked_us: i64, answered_us: i64) -> Option<Finding> {
    let (skew_us, who) = if database_us < asked_us {
        (asked_us - database_us, "behind")
    } else {
        (database_us - answered_us, "ahead of")
    };
    if skew_us < SKEW_NOTE_US {
        return None;
    }
    let what = format!(
        "the database's clock is {} s {who} this machine's",
        skew_us / 1_000_000
    );
    let why = "ages and latencies that the relay shows are off by that much (leases are not: they use one clock)";
    let finding = if skew_us < SKEW_WARNING_US {
        Finding::note("clock", what, why)
    } else {
        Finding::warning("clock", what, why)
    };
    Some(finding.command("timedatectl set-ntp true   # on the machine whose clock is wrong"))
}

fn durability(facts: &Facts) -> Option<Finding> {
    if !facts.fsync {
        return Some(
            Finding::warning(
                "fsync",
                "fsync is off",
                "after a crash of the server the log may be corrupt, and events published that no longer exist",
            )
            .sql("alter system set fsync = on; select pg_reload_conf()"),
        );
    }
    (facts.synchronous_commit == "off").then(|| {
        Finding::note(
            "synchronous_commit",
            "synchronous_commit is off",
            "a crash of the server may take back transactions whose events were published already",
        )
        .sql("alter system set synchronous_commit = on; select pg_reload_conf()")
    })
}

fn superuser(facts: &Facts) -> Option<Finding> {
    let Facts {
        superuser, role, ..
    } = facts;
    superuser.then(|| {
        Finding::note(
            "superuser",
            format!("the relay connects as the superuser {role}"),
            "it needs no more than the rights of outbox_relay",
        )
        .sql("create role relay login password '...' in role outbox_relay")
    })
}

fn idle_in_transaction(facts: &Facts) -> Option<Finding> {
    if !facts.sees_sessions {
        return Some(
            Finding::note(
                "sessions",
                "the sessions of others can't be seen",
                "`status` and `doctor` can't name transactions that were forgotten open",
            )
            .sql(format!(
                "grant pg_read_all_stats to {}",
                ask::identifier(&facts.role)
            )),
        );
    }
    let old: Vec<&Session> = facts
        .idle_in_transaction
        .iter()
        .filter(|session| session.seconds.is_some_and(|s| s > IDLE_MAX_SECONDS))
        .collect();
    let oldest = old.first()?;
    let pids: Vec<String> = old.iter().map(|session| session.pid.to_string()).collect();
    Some(
        Finding::note(
            "idle_in_transaction",
            format!(
                "{} sessions have been idle in a transaction for over an hour, the oldest is process {} of {} ({})",
                old.len(),
                oldest.pid,
                oldest.user.as_deref().unwrap_or("?"),
                oldest.application.as_deref().unwrap_or_default(),
            ),
            "they hold up nobody else's events, but their own events wait for them, and vacuum does",
        )
        .sql(format!(
            "select pg_terminate_backend(pid) from unnest(array[{}]) pid",
            pids.join(", ")
        )),
    )
}

fn prepared(facts: &Facts) -> Option<Finding> {
    let oldest = facts
        .prepared
        .first()
        .filter(|oldest| oldest.seconds > IDLE_MAX_SECONDS)?;
    Some(
        Finding::note(
            "prepared",
            format!(
                "the transaction {:?} has been prepared for over an hour",
                oldest.name
            ),
            "it holds up nobody else's events, but its own events wait for it, and vacuum does",
        )
        .sql(format!(
            "rollback prepared {}; -- or commit prepared",
            ask::literal(&oldest.name)
        )),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::{Remedy, Severity};

    fn healthy() -> Facts {
        Facts {
            major: 17,
            version: "17.6".to_owned(),
            in_recovery: false,
            read_only: false,
            read_only_source: "default".to_owned(),
            role: "relay".to_owned(),
            database: "shop".to_owned(),
            superuser: false,
            connections_max: 100,
            connections_reserved: 3,
            connections: 20,
            fsync: true,
            synchronous_commit: "on".to_owned(),
            clock_us: 0,
            sees_sessions: true,
            idle_in_transaction: Vec::new(),
            prepared: Vec::new(),
        }
    }

    #[test]
    fn versions_from_14_to_18_are_right() {
        let found = |major| version(&Facts { major, ..healthy() }).map(|f| f.severity);
        assert_eq!(found(13), Some(Severity::Error));
        assert_eq!((14..=18).find_map(found), None);
        assert_eq!(found(19), Some(Severity::Note));
    }

    #[test]
    fn skew_is_what_lies_outside_of_the_question() {
        let found = |database_us| clock(database_us, 100_000_000, 105_000_000).map(|f| f.what);
        assert_eq!(found(102_000_000), None);
        assert_eq!(found(105_900_000), None);
        assert_eq!(
            found(108_000_000).as_deref(),
            Some("the database's clock is 3 s ahead of this machine's")
        );
        assert_eq!(
            found(98_000_000).as_deref(),
            Some("the database's clock is 2 s behind this machine's")
        );
    }

    #[test]
    fn nearly_no_connections_left_is_a_warning() {
        let found = |taken| {
            let facts = Facts {
                connections: taken,
                ..healthy()
            };
            connections(&facts).is_some()
        };
        assert!(!found(87));
        assert!(found(88));
    }

    #[test]
    fn read_only_is_mended_where_it_was_set() {
        let remedy = |source: &str| {
            let facts = Facts {
                read_only: true,
                read_only_source: source.to_owned(),
                ..healthy()
            };
            match writing(&facts).and_then(|finding| finding.remedy) {
                Some(Remedy::Sql(sql)) => sql,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(
            remedy("database"),
            "begin read write; alter database \"shop\" reset default_transaction_read_only; commit"
        );
        assert!(remedy("user").contains("alter role \"relay\" reset"));
        assert!(remedy("configuration file").starts_with("alter system"));
    }
}
