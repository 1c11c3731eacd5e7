//! Puts what librdkafka complains about into words. Pure.
//!
//! librdkafka names itself, its threads, its states and how often it has said the same before; a person wants to know which
//! broker, and why.

use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};

/// One complaint. The texts are of the shape `sasl_ssl://kafka-1:9093/bootstrap: Connect to ipv4#10.0.0.1:9093 failed:
/// Connection refused (after 0ms in state CONNECT, 164 identical error(s) suppressed)`.
pub(super) fn words(code: Option<Code>, text: &str) -> String {
    let (broker, rest) = broker(text);
    let at = broker.map_or_else(|| "Kafka".to_owned(), |broker| format!("Kafka at {broker}"));
    let why = without_state(rest);
    match code {
        Some(Code::AllBrokersDown) => "none of Kafka's brokers is reached".to_owned(),
        Some(Code::Authentication | Code::SaslAuthenticationFailed) => {
            format!("{at} refuses the login: {why}")
        }
        Some(Code::SSL) => format!("TLS with {at} fails: {why}"),
        Some(Code::Resolve) => format!("the address of {at} can't be found: {why}"),
        Some(Code::BrokerTransportFailure | Code::OperationTimedOut) => {
            let cause = why
                .strip_prefix("Connect to ")
                .and_then(|rest| rest.split_once(" failed: "))
                .map_or(why, |(_, cause)| cause);
            format!("{at} does not answer ({})", lower_case(cause))
        }
        _ => format!("{at}: {why}"),
    }
}

/// An error of a question, without the names of the library.
pub(super) fn answer(error: &KafkaError) -> String {
    match error.rdkafka_error_code() {
        Some(Code::BrokerTransportFailure) => "no connection to a broker is up".to_owned(),
        Some(Code::OperationTimedOut) => "no answer in time".to_owned(),
        Some(Code::BrokerNotAvailable) => "the cluster names no brokers".to_owned(),
        _ => error.to_string(),
    }
}

/// Host and port, and what follows.
fn broker(text: &str) -> (Option<&str>, &str) {
    let Some((name, rest)) = text.split_once(": ") else {
        return (None, text);
    };
    // Of the form scheme://host:port/id.
    let address = name.rsplit_once("://").map_or(name, |(_, address)| address);
    match address.rsplit_once('/') {
        Some((address, _)) if address.contains(':') && !address.contains(' ') => {
            (Some(address), rest)
        }
        _ => (None, text),
    }
}

/// Without what stands in brackets at the end, if that tells of states and repetitions.
fn without_state(text: &str) -> &str {
    match text.rsplit_once(" (after ") {
        Some((text, rest)) if rest.ends_with(')') => text,
        _ => text,
    }
}

fn lower_case(text: &str) -> String {
    let mut letters = text.chars();
    match letters.next() {
        Some(first) => first.to_lowercase().chain(letters).collect(),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_name_the_broker_and_the_cause() {
        for (code, text, expected) in [
            (
                Code::BrokerTransportFailure,
                "127.0.0.1:29300/bootstrap: Connect to ipv4#127.0.0.1:29300 failed: Connection refused (after 0ms in \
                 state CONNECT, 164 identical error(s) suppressed)",
                "Kafka at 127.0.0.1:29300 does not answer (connection refused)",
            ),
            (
                Code::BrokerTransportFailure,
                "ssl://kafka-1:9093/1: Disconnected: receive 0 after POLLIN (after 3ms in state UP)",
                "Kafka at kafka-1:9093 does not answer (disconnected: receive 0 after POLLIN)",
            ),
            (
                Code::AllBrokersDown,
                "1/1 brokers are down",
                "none of Kafka's brokers is reached",
            ),
            (
                Code::Authentication,
                "sasl_ssl://[::1]:9093/bootstrap: SASL authentication error: Authentication failed (after 4ms in state \
                 AUTH_REQ)",
                "Kafka at [::1]:9093 refuses the login: SASL authentication error: Authentication failed",
            ),
            (
                Code::SSL,
                "ssl://kafka:9093/bootstrap: SSL handshake failed: certificate verify failed (a hint)",
                "TLS with Kafka at kafka:9093 fails: SSL handshake failed: certificate verify failed (a hint)",
            ),
            (
                Code::Resolve,
                "kafka:9092/bootstrap: Failed to resolve 'kafka:9092': Name or service not known (after 1ms in state \
                 CONNECT)",
                "the address of Kafka at kafka:9092 can't be found: Failed to resolve 'kafka:9092': Name or service not \
                 known",
            ),
            (
                Code::Fatal,
                "Unable to reconstruct MessageSet",
                "Kafka: Unable to reconstruct MessageSet",
            ),
        ] {
            assert_eq!(words(Some(code), text), expected);
        }
    }
}
