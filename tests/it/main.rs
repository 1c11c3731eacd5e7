//! The tests that need real services. Where one is missing a test says `SKIPPED` and ends, or fails when
//! `RELAY_TEST_REQUIRE=1`.

mod examples;
mod fresh;
mod partitions;
mod rights;
