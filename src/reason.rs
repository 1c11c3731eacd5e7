//! Says in one line why something failed: for readiness, status and log.

use std::io::ErrorKind;

/// The chain of causes, outermost first, each said once. Of what the database answered only its message: the place in its
/// own sources helps nobody.
#[must_use]
pub fn reason(error: &anyhow::Error) -> String {
    let mut said: Vec<String> = Vec::new();
    for cause in error.chain() {
        let text = match cause.downcast_ref() {
            Some(sqlx::Error::Database(answer)) => {
                said.push(format!("the database says: {}", answer.message()));
                break;
            }
            Some(sqlx::Error::Io(error)) if is_an_end(error.kind()) => {
                said.push("the database closed the connection".to_owned());
                break;
            }
            // Which part of which library noticed it tells nothing.
            Some(sqlx::Error::Io(error)) => error.to_string(),
            _ => cause.to_string(),
        };
        if !said.last().is_some_and(|before| before.ends_with(&text)) {
            said.push(text);
        }
    }
    said.join(": ")
}

fn is_an_end(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(kind: ErrorKind, text: &str) -> String {
        let error = std::io::Error::new(kind, text);
        reason(&anyhow::Error::from(sqlx::Error::Io(error)).context("connect"))
    }

    #[test]
    fn a_cause_that_repeats_is_said_once() {
        assert_eq!(
            of(ErrorKind::ConnectionRefused, "refused"),
            "connect: refused"
        );
    }

    #[test]
    fn an_end_of_the_connection_is_said_in_words() {
        assert_eq!(
            of(
                ErrorKind::UnexpectedEof,
                "expected to read 5 bytes, got 0 bytes at EOF"
            ),
            "connect: the database closed the connection"
        );
    }
}
