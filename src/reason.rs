//! An error as one line for people: every cause once, in the server's own words where a server spoke.

use anyhow::Error;

/// The causes from the outermost in, joined by colons.
#[must_use]
pub fn reason(error: &Error) -> String {
    let mut causes: Vec<String> = Vec::new();
    for cause in error.chain() {
        if let Some(sqlx::Error::Database(said)) = cause.downcast_ref::<sqlx::Error>() {
            // What follows in the chain is the same again.
            causes.push(said.message().to_owned());
            break;
        }
        let text = cause.to_string();
        // Some errors repeat their cause in their own text.
        if !causes.last().is_some_and(|outer| outer.ends_with(&text)) {
            causes.push(text);
        }
    }
    causes.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cause_is_told_once() {
        let error = Error::msg("refused")
            .context("connect: refused")
            .context("open the books");
        assert_eq!(reason(&error), "open the books: connect: refused");
    }
}
