//! Tries to break the capture from PostgreSQL: random writers against an oracle of its own, schedules that were thought
//! up to hurt, readers that are known to be wrong, and the plans of the statements.

#![expect(
    clippy::print_stdout,
    reason = "seeds and figures, shown for tests that fail and with --nocapture"
)]

mod crash;
mod database;
mod hostile;
mod oracle;
mod plans;
mod reader;
mod resets;
mod reshard;
mod sabotage;
mod schedules;
mod storm;
mod types;
mod unreadable;
mod writers;
