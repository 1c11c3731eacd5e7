//! The tiers of tests that need more than one module. Those that need services skip loudly without them.

mod fake;
mod layering;
mod oracle;
mod sim;
mod stories;
