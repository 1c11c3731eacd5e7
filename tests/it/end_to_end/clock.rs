//! A wall clock that a test sets, for the relays that are started with it and nobody else. The monotonic clock is left
//! alone, as it is where the clock of a machine is set.

use std::cell::Cell;
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

pub(super) struct Clock {
    folder: TempDir,
    ahead_seconds: Cell<i64>,
}

impl Clock {
    /// One that is right so far.
    pub(super) fn new() -> Self {
        let clock = Self {
            folder: TempDir::new().unwrap(),
            ahead_seconds: Cell::new(0),
        };
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/end_to_end/clock.c");
        // What has built the tests can build this.
        let built = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"])
            .arg(clock.path("clock.so"))
            .arg(source)
            .status();
        assert!(built.unwrap().success(), "{source}");
        clock.set(0);
        clock
    }

    /// Sets it forward by so many seconds, or back.
    pub(super) fn step(&self, seconds: i64) {
        self.set(self.ahead_seconds.get() + seconds);
    }

    fn set(&self, ahead_seconds: i64) {
        self.ahead_seconds.set(ahead_seconds);
        // In one piece: a relay reads it whenever it looks at the clock.
        std::fs::write(self.path("new"), ahead_seconds.to_string()).unwrap();
        std::fs::rename(self.path("new"), self.path("ahead")).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What a relay is started with.
    pub(super) fn environment(&self) -> [(String, String); 2] {
        [("LD_PRELOAD", "clock.so"), ("CLOCK_AHEAD_FILE", "ahead")].map(|(name, file)| {
            let path = self.path(file).to_str().unwrap().to_owned();
            (name.to_owned(), path)
        })
    }
}
