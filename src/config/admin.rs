//! The table `admin`.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Deserializer, de};

use super::{ConfigError, read_secret};

/// A shorter token is too easy to guess.
const CHARACTERS_MIN: usize = 16;

/// The HTTP interface.
#[derive(Clone, Debug)]
pub struct Admin {
    /// Whether there is one.
    pub enabled: bool,
    /// Where it listens.
    pub listen: SocketAddr,
    /// Names besides `localhost` and IP addresses by which it may be asked.
    pub hosts: Vec<String>,
    /// What a client that changes something or sees entities has to know.
    pub token: Token,
}

/// What a client of the HTTP interface has to know before it may change something. A file is read again for each request,
/// so that a token that was replaced counts at once.
#[derive(Clone, Default)]
pub struct Token {
    given: Option<SecretString>,
    file: Option<PathBuf>,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (&self.given, &self.file) {
            (_, Some(_)) => "Token(of a file)",
            (Some(_), None) => "Token(set)",
            (None, None) => "Token(none)",
        })
    }
}

impl Token {
    /// The token as it is now; none where none is set, and nothing can be changed.
    ///
    /// # Errors
    /// When the file can't be read, is empty or too short.
    pub fn current(&self) -> Result<Option<SecretString>, ConfigError> {
        let (key, token) = match (&self.given, &self.file) {
            (_, Some(file)) => (
                "admin.token_file",
                Some(read_secret("admin.token_file", file)?),
            ),
            (given, None) => ("admin.token", given.clone()),
        };
        let short = |token: &SecretString| token.expose_secret().len() < CHARACTERS_MIN;
        if token.as_ref().is_some_and(short) {
            return Err(ConfigError::new(format!(
                "{key}: the token is too easy to guess: it has to have at least {CHARACTERS_MIN} characters"
            )));
        }
        Ok(token)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawAdmin {
    enabled: bool,
    #[serde(deserialize_with = "address")]
    listen: SocketAddr,
    hosts: Vec<String>,
    token: Option<SecretString>,
    token_file: Option<PathBuf>,
}

impl RawAdmin {
    pub(super) fn resolve(self) -> Result<Admin, ConfigError> {
        let Self {
            enabled,
            listen,
            hosts,
            token,
            token_file,
        } = self;
        let token = Token {
            given: token,
            file: token_file,
        };
        if token.given.is_some() && token.file.is_some() {
            return Err(ConfigError::new(
                "admin.token and admin.token_file are both set: take one of them away",
            ));
        }
        token.current()?;
        Ok(Admin {
            enabled,
            listen,
            hosts,
            token,
        })
    }
}

fn address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    let text = String::deserialize(deserializer)?;
    // A name would have to be looked up, and may have several addresses.
    let text = match text.strip_prefix("localhost:") {
        Some(port) => format!("127.0.0.1:{port}"),
        None => text,
    };
    text.parse().map_err(|_| {
        de::Error::custom(format!(
            "{text:?} has to be an address and a port, such as \"127.0.0.1:9187\", or \"0.0.0.0:9187\" for every address of \
             this machine"
        ))
    })
}
