//! The Kafka sink against a real broker.

mod cloudevents;
pub(crate) mod cluster;
mod outage;
mod partition;
mod record;
mod security;
mod topic;
mod transactions;
