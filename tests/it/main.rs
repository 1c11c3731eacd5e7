//! The tiers that need more than the library alone. What lacks its service is skipped, and says so.

mod contract {
    mod ledger;
    mod source;
}
mod harness {
    pub mod books;
    pub mod log;
    pub mod postgres;
    pub mod sqlite;
}
mod migrate;
