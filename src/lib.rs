//! **outbox-relay** publishes the committed rows of a transactional outbox to Kafka, in order per entity.

pub mod encode;
pub mod event;
pub mod ledger;
pub mod migrate;
pub mod order;
pub mod position;
pub mod route;
pub mod sink;
pub mod source;
