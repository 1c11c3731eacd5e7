//! The tiers that need a service; each test says when it is skipped.

mod windows;
