//! Tries to break the capture from PostgreSQL: random writers against an oracle of its own, schedules that were thought
//! up to hurt, readers that are known to be wrong, and the plans of the statements.

mod database;
mod oracle;
mod plans;
mod reader;
mod sabotage;
mod schedules;
mod storm;
mod writers;
