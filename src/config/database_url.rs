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

const SSL_MODES: [&str; 5] = ["disable", "prefer", "require", "verify-ca", "verify-full"];

/// What a URL says, as far as it is looked at here.
struct Parts<'a> {
    /// What stands before the parameters, by the names that those have.
    said: Vec<&'static str>,
    parameters: Vec<(&'a str, &'a str)>,
}

impl<'a> Parts<'a> {
    fn value(&self, wanted: &str) -> Option<&'a str> {
        let found = self.parameters.iter().find(|(name, _)| *name == wanted);
        found.map(|(_, value)| *value)
    }

    fn says(&self, name: &str) -> bool {
        self.said.contains(&name) || self.value(name).is_some()
    }
}

/// Why the URL is refused.
pub(super) fn check(url: &str) -> Result<(), String> {
    parts(url).map(|_| ())
}

/// What the client takes from variables of libpq because the URL does not say it, as notes for a person; the client does so
/// without a word.
///
/// # Errors
/// When a variable has a value that the client would ignore.
pub(super) fn from_environment(
    key: &str,
    url: &str,
    env: &[(String, String)],
) -> Result<Vec<String>, String> {
    let parts = parts(url).map_err(|why| format!("{key} {why}"))?;
    let value = |name: &str| {
        let found = env.iter().find(|(given, _)| given == name);
        found.map(|(_, value)| value.as_str())
    };
    let mut notes = Vec::new();
    let mut taken = |name: &str, what: &str, url_says: bool| {
        let given = value(name).filter(|_| !url_says)?;
        notes.push(format!(
            "{what} is taken from {name}, for {key} does not say it"
        ));
        Some(given.to_owned())
    };
    taken("PGUSER", "the user", parts.says("user"));
    taken("PGPASSWORD", "the password", parts.says("password"));
    taken("PGDATABASE", "the database", parts.says("dbname"));
    taken(
        "PGSSLCERT",
        "the client's certificate",
        parts.says("sslcert"),
    );
    taken("PGSSLKEY", "the client's key", parts.says("sslkey"));
    taken(
        "PGAPPNAME",
        "the name of the session",
        parts.says("application_name"),
    );
    taken("PGOPTIONS", "options of the session", false);
    if let Some(port) = taken("PGPORT", "the port", parts.says("port"))
        && port.parse::<u16>().is_err()
    {
        return Err("PGPORT is no port: correct it, or write the port into the URL".to_owned());
    }
    let mode = taken("PGSSLMODE", "sslmode", parts.says("sslmode"));
    if let Some(mode) = &mode {
        check_mode(mode).map_err(|why| format!("PGSSLMODE {why}"))?;
    }
    let mode = mode.as_deref().or(parts.value("sslmode"));
    let verifies = matches!(mode, Some("verify-ca" | "verify-full"));
    if taken("PGSSLROOTCERT", "sslrootcert", parts.says("sslrootcert")).is_some() && !verifies {
        notes.pop();
        notes.push(
            "PGSSLROOTCERT has no effect without sslmode=verify-full or verify-ca".to_owned(),
        );
    }
    Ok(notes)
}

/// Whether the files that the URL names are there. Their names are not repeated: a part of a password may have come to stand
/// there.
pub(super) fn check_files(url: &str) -> Result<(), String> {
    let parts = parts(url)?;
    for (name, mark) in [
        ("sslrootcert", "CERTIFICATE"),
        ("sslcert", "CERTIFICATE"),
        ("sslkey", "PRIVATE KEY"),
    ] {
        let Some(path) = parts.value(name) else {
            continue;
        };
        let path = percent_decoded(path);
        // The client takes the text itself as well.
        if path.contains("-----BEGIN") {
            continue;
        }
        let text =
            std::fs::read(path).map_err(|error| format!("names a file by {name}: {error}"))?;
        if !String::from_utf8_lossy(&text).contains(mark) {
            return Err(format!(
                "names a file by {name} that holds no {} in PEM form",
                mark.to_lowercase()
            ));
        }
    }
    Ok(())
}

fn percent_decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let code = bytes
            .get(at + 1..at + 3)
            .filter(|_| byte == b'%')
            .and_then(|code| u8::from_str_radix(std::str::from_utf8(code).ok()?, 16).ok());
        decoded.push(code.unwrap_or(byte));
        at += if code.is_some() { 3 } else { 1 };
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

fn check_mode(mode: &str) -> Result<(), String> {
    if mode == "allow" {
        return Err(
            "has sslmode=allow, with which this client never encrypts: write prefer or require, or disable if nothing is \
             to be encrypted"
                .to_owned(),
        );
    }
    if SSL_MODES.contains(&mode) {
        return Ok(());
    }
    let nearest = nearest(mode, &SSL_MODES);
    Err(format!(
        "has an unknown sslmode: it has to be one of {}{nearest}",
        SSL_MODES.join(", ")
    ))
}

fn parts(url: &str) -> Result<Parts<'_>, String> {
    let rest = ["postgres://", "postgresql://"]
        .iter()
        .find_map(|scheme| url.strip_prefix(scheme))
        .ok_or_else(|| format!("is not a URL such as {EXAMPLE}"))?;
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, behind) = rest.split_at(end);
    let (credentials, host) = authority.rsplit_once('@').unwrap_or(("", authority));
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
    let parts = Parts {
        said: [
            (
                "user",
                !credentials.is_empty() && !credentials.starts_with(':'),
            ),
            ("password", credentials.contains(':')),
            ("port", has_port(host)),
            ("dbname", path.len() > 1),
        ]
        .into_iter()
        .filter_map(|(name, is_said)| is_said.then_some(name))
        .collect(),
        parameters,
    };
    check_tls(&parts)?;
    Ok(parts)
}

fn has_port(host: &str) -> bool {
    host.rsplit_once(':')
        .is_some_and(|(_, port)| !port.is_empty() && !port.contains(']'))
}

/// Parameters of TLS that would change nothing are refused.
fn check_tls(parts: &Parts<'_>) -> Result<(), String> {
    let mode = parts.value("sslmode");
    mode.map_or(Ok(()), check_mode)?;
    if parts.value("sslrootcert").is_some() && !matches!(mode, Some("verify-ca" | "verify-full")) {
        return Err(
            "has sslrootcert, which verifies nothing without sslmode=verify-full or verify-ca: write one of them".to_owned(),
        );
    }
    let client = [
        parts.value("sslcert").is_some(),
        parts.value("sslkey").is_some(),
    ];
    if client[0] != client[1] {
        return Err(
            "has one of sslcert and sslkey: a client logs in with a certificate and its key"
                .to_owned(),
        );
    }
    if client[0] && mode == Some("disable") {
        return Err(
            "has sslcert, which has no effect with sslmode=disable: take one of them away"
                .to_owned(),
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
            "postgres://relay@db/app?sslmode=require&sslcert=/etc/relay.pem&sslkey=/etc/relay.key",
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
            (
                "postgres://relay:planted@db/app?sslmode=allow",
                "never encrypts",
            ),
            (
                "postgres://relay:planted@db/app?sslcert=planted",
                "one of sslcert and sslkey",
            ),
            (
                "postgres://relay:planted@db/app?sslmode=disable&sslcert=planted&sslkey=planted",
                "no effect",
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
    #[test]
    fn files_have_to_be_there() {
        let folder = tempfile::tempdir().unwrap();
        let certificate = folder.path().join("a certificate.pem");
        std::fs::write(&certificate, "-----BEGIN CERTIFICATE-----\n").unwrap();
        let url = |path: &str| format!("postgres://db/app?sslmode=verify-full&sslrootcert={path}");
        let path = certificate.to_str().unwrap().replace(' ', "%20");
        assert_eq!(check_files(&url(&path)), Ok(()));
        std::fs::write(&certificate, "planted").unwrap();
        let refused = check_files(&url(&path)).unwrap_err();
        assert!(refused.contains("holds no certificate"), "{refused}");
        let refused = check_files(&url("/planted")).unwrap_err();
        assert!(refused.contains("No such file"), "{refused}");
        assert!(!refused.contains("planted"), "{refused}");
    }

    #[test]
    fn what_flows_in_from_the_environment_is_told() {
        let env = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
            let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
            pairs.iter().map(owned).collect()
        };
        let all = env(&[
            ("PGHOST", "planted"),
            ("PGPORT", "25432"),
            ("PGUSER", "planted"),
            ("PGPASSWORD", "planted"),
            ("PGDATABASE", "planted"),
            ("PGSSLMODE", "require"),
            ("PGSSLROOTCERT", "planted"),
        ]);
        let notes = from_environment("source.postgres.url", "postgres://db", &all).unwrap();
        assert_eq!(notes.len(), 6, "{notes:?}");
        for name in ["PGPORT", "PGUSER", "PGPASSWORD", "PGDATABASE", "PGSSLMODE"] {
            let told = |note: &String| note.contains(&format!("taken from {name}"));
            assert!(notes.iter().any(told), "{name}: {notes:?}");
        }
        assert!(notes[5].contains("no effect"), "{notes:?}");
        assert!(!notes.concat().contains("planted"), "{notes:?}");
        let full = "postgres://u:p@db:5432/app?sslmode=disable&sslrootcert=";
        assert!(from_environment("key", full, &all).is_err());
        let full = "postgres://u:p@db:5432/app?sslmode=verify-full&sslrootcert=/ca.pem";
        let notes = from_environment("key", full, &all).unwrap();
        assert_eq!(notes, [""; 0]);
        for (name, value) in [
            ("PGPORT", "planted"),
            ("PGSSLMODE", "allow"),
            ("PGSSLMODE", "planted"),
        ] {
            let refused =
                from_environment("key", "postgres://db", &env(&[(name, value)])).unwrap_err();
            assert!(refused.starts_with(name), "{refused}");
            assert!(!refused.contains("planted"), "{refused}");
        }
    }
}
