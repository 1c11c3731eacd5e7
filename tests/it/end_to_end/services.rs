//! Services of one test alone, which it may freeze and kill. Started by the scripts that start those of all tests.

use std::collections::HashMap;
use std::path::Path;
use std::process::{Command, Stdio};

use tempfile::TempDir;

pub(super) struct Own {
    folder: TempDir,
    script: &'static str,
    arguments: Vec<String>,
    settings: Vec<String>,
    environment: HashMap<String, String>,
    /// Whether the data lies in a file system of its own.
    disk: bool,
}

impl Own {
    pub(super) fn kafka(test: &str) -> Option<Self> {
        // Where the broker of all tests is from somewhere else, this machine may not be able to start one.
        crate::fresh::needed(test, "KAFKA_JARS")?;
        Some(Self::new("kafka", Vec::new(), |_| {}))
    }

    /// A broker with settings of its own, as `name=value`.
    pub(super) fn kafka_with(test: &str, settings: &[&str]) -> Option<Self> {
        crate::fresh::needed(test, "KAFKA_JARS")?;
        let settings = settings.iter().map(|&setting| setting.to_owned()).collect();
        let nothing = |_: &Path| {};
        Some(Self::with_settings("kafka", Vec::new(), settings, nothing))
    }

    /// A second broker of the same cluster.
    pub(super) fn member_of(kafka: &Self) -> Self {
        let folder = kafka.folder.path().display().to_string();
        Self::new("kafka_member", vec![folder], |_| {})
    }

    /// A broker whose data lies in a file system of this size, such as `64m`; only root can make one.
    pub(super) fn kafka_on_a_disk(test: &str, size: &str) -> Option<Self> {
        crate::fresh::needed(test, "KAFKA_JARS")?;
        let root = Command::new("id").arg("--user").output().unwrap().stdout == b"0\n";
        if !root {
            println!("SKIPPED {test}: only root can make a small disk");
            return None;
        }
        let mut own = Self::new("kafka", Vec::new(), |folder| {
            let data = folder.join("data");
            std::fs::create_dir(&data).unwrap();
            mount(
                &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"],
                &data,
            );
        });
        own.disk = true;
        Some(own)
    }

    /// Makes the disk larger.
    pub(super) fn resize_disk(&self, size: &str) {
        let options = format!("remount,size={size}");
        mount(&["-o", &options], &self.folder.path().join("data"));
    }

    pub(super) fn postgres(test: &str) -> Option<Self> {
        crate::fresh::needed(test, "PG_DATA")?;
        Some(Self::new("postgres", vec!["17".to_owned()], |_| {}))
    }

    fn new(script: &'static str, arguments: Vec<String>, prepare: impl FnOnce(&Path)) -> Self {
        Self::with_settings(script, arguments, Vec::new(), prepare)
    }

    fn with_settings(
        script: &'static str,
        arguments: Vec<String>,
        settings: Vec<String>,
        prepare: impl FnOnce(&Path),
    ) -> Self {
        let parent =
            std::env::var("RELAY_TEST_FOLDER").map_or_else(|_| std::env::temp_dir(), Into::into);
        let mut own = Self {
            folder: TempDir::new_in(parent).unwrap(),
            script,
            arguments,
            settings,
            environment: HashMap::new(),
            disk: false,
        };
        prepare(own.folder.path());
        own.start();
        own
    }

    /// Starts it, again with its data and its port.
    pub(super) fn start(&mut self) {
        // Not a pipe: the service inherits it and would keep it open.
        let status = script(self.script)
            .args(&self.arguments)
            .arg(self.folder.path())
            .args(&self.settings)
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(status.success(), "start {}", self.script);
        let environment = std::fs::read_to_string(self.folder.path().join("env")).unwrap();
        self.environment = environment
            .lines()
            .filter_map(|line| line.strip_prefix("export ")?.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.trim_matches('\'').to_owned()))
            .collect();
    }

    pub(super) fn stop(&self) {
        let status = script("down").arg(self.folder.path()).status().unwrap();
        assert!(status.success(), "stop {}", self.script);
    }

    pub(super) fn variable(&self, name: &str) -> &str {
        &self.environment[name]
    }

    pub(super) fn signal(&self, signal: &str) {
        let variable = if self.script == "postgres" {
            "PG_PID"
        } else {
            "KAFKA_PID"
        };
        super::process::signal(self.variable(variable), signal);
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        // A panic here would hide the one that matters.
        let _ = script("down").arg(self.folder.path()).status();
        if self.disk {
            let data = self.folder.path().join("data");
            let _ = Command::new("umount").arg("--lazy").arg(data).status();
        }
    }
}

fn mount(arguments: &[&str], at: &Path) {
    let status = Command::new("mount").args(arguments).arg(at).status();
    assert!(status.unwrap().success(), "mount {arguments:?}");
}

fn script(name: &str) -> Command {
    Command::new(
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/services")
            .join(name),
    )
}
