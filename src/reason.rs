//! Says in one line why something failed: for readiness, status and log.

use std::io::ErrorKind;

/// The chain of causes, outermost first, each said once. Of what the database answered only its message: the place in its
/// own sources helps nobody. Where the outbox is missing all that fails says the same: what to run.
#[must_use]
pub fn reason(error: &anyhow::Error) -> String {
    let mut said: Vec<String> = Vec::new();
    for cause in error.chain() {
        let text = match cause.downcast_ref() {
            Some(sqlx::Error::Database(answer)) => {
                // No such table, no such schema.
                let missing = matches!(answer.code().as_deref(), Some("42P01" | "3F000"));
                if missing && answer.message().contains("\"outbox") {
                    return format!(
                        "there is no outbox in this database: run `outbox-relay migrate` ({})",
                        answer.message()
                    );
                }
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

/// The text with `N` for each number: of two reasons that differ in numbers alone it is the same.
#[must_use]
pub fn kind(reason: &str) -> String {
    let mut kind = String::with_capacity(reason.len());
    let mut in_number = false;
    for c in reason.chars() {
        if !c.is_ascii_digit() {
            kind.push(c);
        } else if !in_number {
            kind.push('N');
        }
        in_number = c.is_ascii_digit();
    }
    kind
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
