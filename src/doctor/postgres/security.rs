//! Whether the session is encrypted, and whether the server is the one that was meant.

use serde::Deserialize;
use sqlx::postgres::{PgConnectOptions, PgConnection};

use super::super::Finding;
use crate::config::postgres_weakness;
use crate::source::postgres::ask;

#[derive(Deserialize)]
struct Session {
    encrypted: bool,
}

/// What is fine where no other machine is on the way is not asked about.
pub(super) async fn examine(
    connection: &mut PgConnection,
    options: &PgConnectOptions,
) -> Result<Vec<Finding>, anyhow::Error> {
    let Some(weakness) = postgres_weakness(options) else {
        return Ok(Vec::new());
    };
    let Session { encrypted } = ask::one(
        connection,
        "select coalesce((select ssl from pg_catalog.pg_stat_ssl where pid = pg_catalog.pg_backend_pid()), false)
             as encrypted",
    )
    .await?;
    Ok(vec![judge(weakness, encrypted)])
}

fn judge(weakness: &str, encrypted: bool) -> Finding {
    let finding = if encrypted {
        Finding::note(
            "postgres_security",
            weakness,
            "the session is encrypted at the moment; who controls the network can stand in for the server",
        )
    } else {
        Finding::warning(
            "postgres_security",
            format!("the session with PostgreSQL is not encrypted: {weakness}"),
            "who is on the way can read all events, and may learn the password",
        )
    };
    finding.configuration(
        "url = \"postgres://...?sslmode=verify-full&sslrootcert=/etc/ssl/postgres-ca.pem\"",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Severity;

    #[test]
    fn what_can_be_read_on_the_way_is_a_warning() {
        assert_eq!(judge("weak", false).severity, Severity::Warning);
        assert_eq!(judge("weak", true).severity, Severity::Note);
    }
}
