//! The Kafka sink against a real broker.

mod cloudevents;
pub mod cluster;
mod outage;
mod partition;
mod record;
mod security;
mod topic;
