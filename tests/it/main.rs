//! The tiers that need more than the library alone. Where a service is missing a test says `SKIPPED` and ends, or fails
//! when `RELAY_TEST_REQUIRE=1`.

mod contract {
    mod ledger;
    mod source;
}
mod end_to_end;
mod examples;
mod fake;
mod fresh;
mod harness {
    pub mod books;
    pub mod log;
    pub mod postgres;
    pub mod sqlite;
}
mod layering;
mod migrate;
mod oracle;
mod partitions;
mod rights;
mod sim;
mod stories;
mod windows;
