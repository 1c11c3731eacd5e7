//! The tiers that need more than the library alone. Where a service is missing a test says `SKIPPED` and ends, or fails
//! when `RELAY_TEST_REQUIRE=1`.

#![allow(
    unreachable_pub,
    missing_docs,
    clippy::pedantic,
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "tests: nobody is outside, figures are for people, and a panic is a verdict"
)]
mod bench;
mod cli;
mod contract {
    mod ledger;
    mod parked;
    mod sink;
    mod source;
}
mod cost;
mod demo;
mod emit;
mod end_to_end;
mod examples;
mod fake;
mod fresh;
mod fuzz;
mod harness {
    pub mod books;
    pub mod hostile;
    pub mod log;
    pub mod postgres;
    pub mod sqlite;
}
mod kafka;
mod layering;
mod migrate;
mod names;
mod oracle;
mod partitions;
mod restored;
mod retention;
mod rights;
mod sim;
mod stories;
mod windows;
