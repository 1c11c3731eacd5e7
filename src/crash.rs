//! Places at which a test lets the process die, to see what a crash there leaves behind. Not in release builds.

/// Dies here, as if killed, the nth time if `RELAY_CRASH_AT` is `NAME:n`.
#[inline]
pub(crate) fn point(name: &str) {
    #[cfg(debug_assertions)]
    debug::point(name);
    #[cfg(not(debug_assertions))]
    let _ = name;
}

#[cfg(debug_assertions)]
mod debug {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicI64, Ordering};

    struct Fate {
        name: String,
        left: AtomicI64,
    }

    static FATE: OnceLock<Option<Fate>> = OnceLock::new();

    pub(super) fn point(name: &str) {
        let fate = FATE.get_or_init(|| {
            let set = std::env::var("RELAY_CRASH_AT").ok()?;
            let (name, nth) = set.split_once(':')?;
            Some(Fate {
                name: name.to_owned(),
                left: AtomicI64::new(nth.parse().ok()?),
            })
        });
        if let Some(fate) = fate
            && fate.name == name
            && fate.left.fetch_sub(1, Ordering::Relaxed) == 1
        {
            // Nothing is closed, flushed or told to anybody.
            std::process::abort();
        }
    }
}
