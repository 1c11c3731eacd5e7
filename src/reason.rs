//! Says in one line why something failed: for readiness, status and log.

/// The chain of causes, outermost first, each said once. Of what the database answered only its message: the place in its
/// own sources helps nobody. Where the outbox is missing all that fails says the same: what to run.
#[must_use]
pub fn reason(error: &anyhow::Error) -> String {
    let mut said: Vec<String> = Vec::new();
    for cause in error.chain() {
        if let Some(sqlx::Error::Database(answer)) = cause.downcast_ref() {
            // No such table, no such schema.
            let missing = matches!(answer.code().as_deref(), Some("42P01" | "3F000"));
            if missing && answer.message().contains("\"outbox") {
                return format!(
                    "there is no outbox in this database: run `outbox-relay migrate` ({})",
                    answer.message()
                );
            }
            said.push(answer.message().to_owned());
            break;
        }
        let text = cause.to_string();
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

#[cfg(test)]
mod tests {
    use super::reason;

    #[test]
    fn a_cause_that_repeats_is_said_once() {
        let refused = std::io::Error::new(std::io::ErrorKind::ConnectionRefused, "refused");
        let error = anyhow::Error::from(sqlx::Error::Io(refused)).context("connect");
        assert_eq!(
            reason(&error),
            "connect: error communicating with database: refused"
        );
    }
}
