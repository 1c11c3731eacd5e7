//! **outbox-relay** publishes the committed rows of a transactional outbox to Kafka, in order per entity.
//!
//! pub mods
pub mod admin;
pub mod cli;
pub mod config;
pub mod doctor;
pub mod encode;
pub mod event;
pub mod ledger;
pub mod logging;
pub mod migrate;
pub mod order;
pub mod position;
pub mod reason;
pub mod relay;
pub mod retention;
pub mod route;
pub mod sink;
pub mod source;
pub mod supervise;
pub mod telemetry;
