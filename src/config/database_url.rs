//! Whether a PostgreSQL URL says what was meant. Pure; no reason repeats anything that stands behind the scheme.
//!
//! The parser of the client takes what it finds: a password with a slash ends the host, and a misspelt parameter is ignored.

const EXAMPLE: &str = "postgres://user:password@host:5432/database";

/// What the client knows, by the names of libpq; the last is the client's own.
const PARAMETERS: [&str; 13] = [
    "sslmode",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "password",
    "application_name",
    "options",
    "statement-cache-capacity",
];

const SSL_MODES: [&str; 6] = [
    "disable",
    "allow",
    "prefer",
    "require",
    "verify-ca",
    "verify-full",
];

/// Why the URL is refused.
pub(super) fn check(url: &str) -> Result<(), String> {
    let rest = ["postgres://", "postgresql://"]
        .iter()
        .find_map(|scheme| url.strip_prefix(scheme))
        .ok_or_else(|| format!("is not a URL such as {EXAMPLE}"))?;
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, behind) = rest.split_at(end);
    let (_, host) = authority.rsplit_once('@').unwrap_or(("", authority));
    let path_end = behind.find('?').unwrap_or(behind.len());
    let (path, query) = behind.split_at(path_end);
    if authority.matches('@').count() > 1 || path.contains(['@', '#']) {
        return Err(format!(
            "has a character in its user, password or database that ends that part: write / as %2F, @ as %40, : as %3A, \
             # as %23, ? as %3F and % as %25, as in {EXAMPLE}"
        ));
    }
    if path.matches('/').count() > 1 {
        return Err(format!(
            "has more than a database behind its host; it should be such as {EXAMPLE}"
        ));
    }
    if host.contains(',') {
        return Err(
            "names several hosts: name one, such as the address that follows the primary"
                .to_owned(),
        );
    }
    let parameters: Vec<(&str, &str)> = query
        .trim_start_matches('?')
        .split('&')
        .filter(|parameter| !parameter.is_empty())
        .map(|parameter| parameter.split_once('=').unwrap_or((parameter, "")))
        .collect();
    let value = |wanted: &str| {
        let found = parameters.iter().find(|(name, _)| *name == wanted);
        found.map(|(_, value)| *value)
    };
    if host.is_empty() && value("host").is_none() && value("hostaddr").is_none() {
        return Err(format!("names no host; it should be such as {EXAMPLE}"));
    }
    for (name, _) in &parameters {
        known(name)?;
    }
    let mode = value("sslmode");
    if let Some(mode) = mode.filter(|mode| !SSL_MODES.contains(mode)) {
        let nearest = nearest(mode, &SSL_MODES);
        return Err(format!(
            "has an unknown sslmode: it has to be one of {}{nearest}",
            SSL_MODES.join(", ")
        ));
    }
    if value("sslrootcert").is_some() && !matches!(mode, Some("verify-ca" | "verify-full")) {
        return Err(
            "has sslrootcert, which verifies nothing without sslmode=verify-full or verify-ca: write one of them".to_owned(),
        );
    }
    Ok(())
}

fn known(name: &str) -> Result<(), String> {
    if PARAMETERS.contains(&name) {
        return Ok(());
    }
    let plain = |name: &str| name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    // A part of a password may have come to stand here.
    let shown = if name.len() <= 30 && plain(name) && !nearest(name, &PARAMETERS).is_empty()
        || ["channel_binding", "target_session_attrs", "sslpassword"].contains(&name)
    {
        format!("the parameter {name}, which this client does not know")
    } else {
        "a parameter that this client does not know".to_owned()
    };
    Err(format!(
        "has {shown}{}; there is {}",
        nearest(name, &PARAMETERS),
        PARAMETERS.join(", ")
    ))
}

fn nearest(given: &str, valid: &[&str]) -> String {
    let likeness = |known: &str| strsim::jaro_winkler(given, known);
    valid
        .iter()
        .max_by(|a, b| likeness(a).total_cmp(&likeness(b)))
        .filter(|known| likeness(known) > 0.85)
        .map_or_else(String::new, |known| format!("; did you mean {known}?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_that_say_what_they_mean_are_taken() {
        for url in [
            "postgres://relay@127.0.0.1:5432/app",
            "postgresql://relay:p%40ss%2Fw0rd@db/app?sslmode=verify-full&sslrootcert=/etc/ca.pem",
            "postgres://relay@%2Fvar%2Frun%2Fpostgresql/app",
            "postgres:///app?host=/var/run/postgresql",
            "postgres://db",
            "postgres://db?sslmode=prefer&statement-cache-capacity=100",
            "postgres://relay@[::1]:5432/app?application_name=shop",
        ] {
            assert_eq!(check(url), Ok(()), "{url}");
        }
    }

    #[test]
    fn others_are_refused_and_nothing_of_them_is_repeated() {
        for (url, why) in [
            ("postgres://relay:p@ss/planted@db/app", "write / as %2F"),
            ("postgres://relay:planted/x@db/app", "write / as %2F"),
            ("postgres://relay:planted#x@db/app", "write / as %2F"),
            (
                "postgres://relay:planted?x@db/app",
                "a parameter that this client does not know",
            ),
            ("postgres://relay:planted@a,b/app", "several hosts"),
            ("postgres://relay:planted@/app", "names no host"),
            (
                "postgres://relay:planted@db/app/more",
                "more than a database",
            ),
            ("jdbc:postgresql://relay:planted@db/app", "is not a URL"),
            ("mysql://relay:planted@db/app", "is not a URL"),
            (
                "postgres://relay@db/app?sslmod=planted",
                "did you mean sslmode?",
            ),
            ("postgres://relay@db/app?sslmode=planted", "unknown sslmode"),
            (
                "postgres://relay@db/app?sslmode=verify_full",
                "did you mean verify-full?",
            ),
            (
                "postgres://relay@db/app?sslmode=require&sslrootcert=planted",
                "verifies nothing",
            ),
            ("postgres://relay@db/app?sslpassword=planted", "sslpassword"),
            (
                "postgres://relay@db/app?target_session_attrs=planted",
                "target_session_attrs",
            ),
        ] {
            let refused = check(url).unwrap_err();
            assert!(refused.contains(why), "{url}: {refused}");
            assert!(!refused.contains("planted"), "{url}: {refused}");
        }
    }
}
