//! Looks at the PostgreSQL end, probe by probe.

mod need;
mod partitions;
mod pooler;
mod rights;
mod security;
mod server;
mod table;

use sqlx::postgres::{PgConnectOptions, PgConnection};
use std::borrow::Cow;

use super::{Finding, Probed, answered};
use crate::migrate;
use crate::reason::reason;
use crate::retention;
use crate::source::postgres::{CaptureMode, Settings, ask};

pub(super) async fn examine(
    settings: &Settings,
    retention: &retention::Settings,
    now_us: fn() -> i64,
) -> Probed {
    let connector = &settings.connector;
    let mut connection = match connector.connect().await {
        Ok(connection) => connection,
        Err(error) => {
            return Probed {
                all: vec![unreachable(
                    "source.postgres.url",
                    connector.known(),
                    &error,
                )],
                tables: false,
            };
        }
    };
    let mut findings = vec![Finding::ok(
        "connection",
        reached(&connection, connector.known()),
    )];
    let mut tables = false;
    let security = security::examine(&mut connection, connector.known()).await;
    findings.extend(answered("postgres_security", security));
    findings.extend(answered(
        "server",
        server::examine(&mut connection, now_us).await,
    ));
    match table::exists(&mut connection).await {
        Ok(true) => {
            let (of_outbox, readable) = examine_outbox(&mut connection, settings, retention).await;
            findings.extend(of_outbox);
            tables = readable;
        }
        Ok(false) => findings.push(missing()),
        Err(error) => findings.push(Finding::unknown("table", &error)),
    }
    if settings.mode == CaptureMode::Listen {
        findings.extend(listening(settings).await);
    }
    Probed {
        all: findings,
        tables,
    }
}

/// What was reached: version, address, database, role.
fn reached(connection: &PgConnection, options: &PgConnectOptions) -> String {
    let version = connection.server_version_num().unwrap_or_default();
    format!(
        "PostgreSQL {}.{} at {}:{}, database {:?}, as {:?}",
        version / 10_000,
        version % 10_000,
        options.get_host(),
        options.get_port(),
        options.get_database().unwrap_or(options.get_username()),
        options.get_username(),
    )
}

/// What can only be asked where there is an outbox, and whether its tables may be read.
async fn examine_outbox(
    connection: &mut PgConnection,
    settings: &Settings,
    retention: &retention::Settings,
) -> (Vec<Finding>, bool) {
    let mut findings = Vec::new();
    let rights = rights::examine(connection).await;
    let enough = matches!(&rights, Ok(rights) if rights.suffice_to_read());
    findings.extend(answered("rights", rights.map(rights::Rights::judge)));
    if enough {
        let pending = migrate::pending_postgres(settings.connector.clone()).await;
        findings.extend(answered(
            "migrations",
            pending.map(|pending| not_migrated(&pending)),
        ));
    }
    findings.extend(answered(
        "table",
        table::examine(connection, settings.mode, retention).await,
    ));
    (findings, enough)
}

async fn listening(settings: &Settings) -> Vec<Finding> {
    let connector = &settings.direct_connector;
    match pooler::examine(connector).await {
        Ok(findings) => findings,
        // The same address as the other one: that it was reached is known, so the session itself is at fault.
        Err(error) => vec![unreachable(
            "source.postgres.direct_url",
            connector.known(),
            &error,
        )],
    }
}

fn missing() -> Finding {
    Finding::error(
        "migrations",
        "there is no outbox in this database (no table outbox.events)",
        "the relay has nothing to read and nowhere to keep its books",
    )
    .command("outbox-relay migrate")
}

fn not_migrated(pending: &[migrate::Version]) -> Vec<Finding> {
    if pending.is_empty() {
        return Vec::new();
    }
    let pending: Vec<String> = pending.iter().map(ToString::to_string).collect();
    vec![
        Finding::error(
            "migrations",
            format!("not applied: {}", pending.join(", ")),
            "the relay needs the tables as these leave them",
        )
        .command("outbox-relay migrate"),
    ]
}

/// Turns a connection that could not be opened into the next step; the message names no password.
fn unreachable(key: &str, options: &PgConnectOptions, error: &anyhow::Error) -> Finding {
    let code = error
        .chain()
        .find_map(|cause| match cause.downcast_ref::<sqlx::Error>() {
            Some(sqlx::Error::Database(error)) => error.code().map(Cow::into_owned),
            _ => None,
        });
    let (host, port) = (options.get_host(), options.get_port());
    let user = ask::identifier(options.get_username());
    let finding = Finding::error(
        "connection",
        format!("{key}: {}", reason(error)),
        "nothing is published without the database",
    );
    match code.as_deref() {
        Some("28P01") => finding.advice(format!(
            "put the right password into {key} (or its file), or set it: alter role {user} password '...'"
        )),
        Some("28000") => finding.advice(format!(
            "make the role (create role {user} login in role outbox_relay), or let it in: a line for it in \
             pg_hba.conf, then select pg_reload_conf()"
        )),
        Some("3D000") => finding.sql(format!(
            "create database {}",
            ask::identifier(options.get_database().unwrap_or(options.get_username()))
        )),
        Some("53300") => finding.sql(
            "select usename, application_name, count(*) from pg_stat_activity group by 1, 2 order by 3 desc",
        ),
        Some(_) => finding.advice("the server says what it wants"),
        None => finding.command(format!("pg_isready --host={host} --port={port}")),
    }
}
