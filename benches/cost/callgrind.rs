//! Reads what callgrind wrote: instructions in all, and calls of the allocator. Pure: text in, numbers out.
//!
//! Format: Valgrind manual, "Callgrind Format Specification". A name stands in full where it is first used, as
//! `cfn=(7) malloc`, and as `cfn=(7)` from then on; `calls=COUNT …` belongs to the callee named before it.

use std::collections::HashMap;
use std::ops::Sub;

use anyhow::{Context, Error, ensure};

/// What takes memory from the allocator, by the names of the C library. Rust's own allocator calls these too.
const ALLOCATORS: [&str; 6] = [
    "malloc",
    "calloc",
    "realloc",
    "memalign",
    "posix_memalign",
    "aligned_alloc",
];

/// What one run has cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    /// Instructions of all threads.
    pub instructions: u64,
    /// Calls of the allocator that take memory, or take more of it.
    pub allocations: u64,
}

impl Count {
    /// Reads a profile.
    ///
    /// # Errors
    /// When it has no end, or knows no allocator: the program would not be one that callgrind can look into.
    pub fn parse(profile: &str) -> Result<Self, Error> {
        let mut names = HashMap::new();
        let (mut inside, mut allocates, mut known) = (false, false, false);
        let mut count = Self {
            instructions: 0,
            allocations: 0,
        };
        let mut is_complete = false;
        for line in profile.lines() {
            if let Some(name) = line.strip_prefix("fn=") {
                inside = is_allocator(resolve(name, &mut names));
            } else if let Some(name) = line.strip_prefix("cfn=") {
                allocates = is_allocator(resolve(name, &mut names));
                known |= allocates;
            } else if let Some(calls) = line.strip_prefix("calls=") {
                let calls = calls.split(' ').next().unwrap_or_default();
                let calls: u64 = calls.parse().with_context(|| format!("read {line:?}"))?;
                // What `realloc` hands on to `malloc` is counted once.
                count.allocations += if allocates && !inside { calls } else { 0 };
            } else if let Some(total) = line.strip_prefix("totals:") {
                count.instructions = total.trim().parse().context("read the total")?;
                is_complete = true;
            }
        }
        ensure!(is_complete, "the profile has no end");
        ensure!(known, "the profile knows no allocator of the C library");
        Ok(count)
    }
}

impl Sub for Count {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            instructions: self.instructions.saturating_sub(other.instructions),
            allocations: self.allocations.saturating_sub(other.allocations),
        }
    }
}

/// The name behind `(7) malloc` or `(7)`.
fn resolve<'a>(text: &'a str, names: &mut HashMap<&'a str, &'a str>) -> &'a str {
    match text.split_once(' ') {
        Some((id, name)) => {
            names.insert(id, name);
            name
        }
        None => names.get(text).copied().unwrap_or(text),
    }
}

/// Callgrind appends `'2` to a function that calls itself, and the C library knows each by a second name.
fn is_allocator(name: &str) -> bool {
    let name = name.split('\'').next().unwrap_or(name);
    ALLOCATORS.contains(&name.trim_start_matches("__libc_"))
}
