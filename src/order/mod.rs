//! Decides what may be handed over and what may be acknowledged. (source → *order* → route → encode → sink)
//!
//! Never does I/O, reads a clock, logs or awaits. Events enter in log order and are handed over in that order, which
//! keeps the order per entity (I2); what is kept here is the other half: what is in flight, bounded in rows and bytes
//! (I5), how far everything is settled without a gap (I3, I4), which entities wait, and who is suspected after a refusal
//! (I6).

mod in_flight;
mod suspects;
mod waiting;

#[cfg(test)]
mod tests;

pub use in_flight::{Advance, InFlight, Settled};
pub use suspects::Suspects;
pub use waiting::Waiting;
