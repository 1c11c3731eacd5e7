//! The program as a process: its settings, its log, its HTTP interface, its end.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use super::clock::Clock;
use super::kafka::Kafka;
use super::{PATIENCE, eventually};

/// With it a relay says all that it knows.
const TOKEN: &str = "the-token-of-the-tests";

/// What a relay is started with; several can be started with the same.
pub(super) struct Setup {
    folder: TempDir,
    environment: Vec<(String, String)>,
    config: String,
}

impl Setup {
    pub(super) fn new(database_url: &str) -> Self {
        let mut setup = Self {
            folder: tempfile::tempdir().unwrap(),
            environment: Vec::new(),
            config: String::new(),
        };
        setup.set("SOURCE__POSTGRES__URL", database_url);
        setup.set("LOG__LEVEL", "info");
        setup.set("ADMIN__TOKEN", TOKEN);
        setup
    }

    /// Publishes to topics with the prefix.
    pub(super) fn kafka(&mut self, kafka: &Kafka) {
        self.set("SINK__KAFKA__BROKERS", &kafka.brokers);
        self.set("PIPELINE__TOPIC", &kafka.topic("{aggregate_type}"));
    }

    /// Sets `RELAY_` and this; the last one counts.
    pub(super) fn set(&mut self, name: &str, value: &str) {
        let name = format!("RELAY_{name}");
        self.environment.retain(|(other, _)| *other != name);
        self.environment.push((name, value.to_owned()));
    }

    /// Lets the relays that are started have a wall clock of their own.
    pub(super) fn clock(&mut self, clock: &Clock) {
        self.environment.extend(clock.environment());
    }

    /// Leaves `RELAY_` and this to the configuration file.
    pub(super) fn unset(&mut self, name: &str) {
        let name = format!("RELAY_{name}");
        self.environment.retain(|(other, _)| *other != name);
    }

    /// The same settings for another database, so far without a process.
    pub(super) fn clone_for(&self, database_url: &str) -> Self {
        let mut setup = Self::new(database_url);
        setup.environment = self.environment.clone();
        setup.set("SOURCE__POSTGRES__URL", database_url);
        setup
    }

    /// A configuration file.
    pub(super) fn config(&mut self, toml: &str) {
        toml.clone_into(&mut self.config);
    }

    /// Another command of the program with the same settings.
    pub(super) fn command(&self, name: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_outbox-relay"));
        command
            .arg(name)
            .env_clear()
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null());
        command
    }

    /// Writes the configuration file, also while a relay runs with it.
    pub(super) fn write_config(&self) -> PathBuf {
        let config = self.folder.path().join("relay.toml");
        std::fs::write(&config, &self.config).unwrap();
        config
    }

    pub(super) fn start(&self) -> Process {
        self.start_on(free_port())
    }

    pub(super) fn start_on(&self, port: u16) -> Process {
        let out = File::create(self.file(port, "out")).unwrap();
        self.start_with(port, out.into())
    }

    /// Starts one whose standard output is a pipe that nobody reads.
    pub(super) fn start_unread(&self) -> Process {
        self.start_with(free_port(), Stdio::piped())
    }

    /// What all the relays wrote that were started with it, also those that are gone.
    pub(super) fn logs(&self) -> String {
        let files = std::fs::read_dir(self.folder.path()).unwrap();
        files
            .map(|file| file.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
            .map(|path| std::fs::read_to_string(path).unwrap())
            .collect()
    }

    fn file(&self, port: u16, name: &str) -> PathBuf {
        self.folder.path().join(format!("{port}.{name}"))
    }

    fn start_with(&self, port: u16, stdout: Stdio) -> Process {
        let config = self.write_config();
        let [out, log] = ["out", "log"].map(|name| self.file(port, name));
        let child = Command::new(env!("CARGO_BIN_EXE_outbox-relay"))
            .arg("run")
            .arg("--config")
            .arg(config)
            .env_clear()
            .envs(self.environment.iter().cloned())
            .env("RELAY_ADMIN__LISTEN", format!("127.0.0.1:{port}"))
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Process {
            child,
            port,
            out,
            log,
        }
    }
}

/// Below the ports of outgoing connections and above those of the services. None is handed out twice: whoever has one may not
/// have bound it yet.
fn free_port() -> u16 {
    const PORTS: u16 = 1_700;
    static NEXT: LazyLock<AtomicU16> = LazyLock::new(|| AtomicU16::new(fastrand::u16(..PORTS)));
    loop {
        let port = 31_000 + NEXT.fetch_add(1, Ordering::Relaxed) % PORTS;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

/// A relay that runs; killed with the value.
pub(super) struct Process {
    child: Child,
    pub(super) port: u16,
    out: PathBuf,
    log: PathBuf,
}

impl Process {
    /// What it wrote to its standard error.
    pub(super) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// What it wrote to its standard output.
    pub(super) fn out(&self) -> String {
        std::fs::read_to_string(&self.out).unwrap()
    }

    /// Asks the HTTP interface; none while nobody answers.
    pub(super) fn get(&self, path: &str) -> Option<(u16, String)> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.port));
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        write!(
            stream,
            "GET {path} HTTP/1.0\r\nhost: localhost\r\nauthorization: Bearer {TOKEN}\r\n\r\n"
        )
        .ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        let code = head.split_whitespace().nth(1)?.parse().ok()?;
        Some((code, body.to_owned()))
    }

    /// What one pipeline says about itself.
    pub(super) fn pipeline(&self, name: &str) -> Option<Value> {
        let (_, body) = self.get("/status")?;
        let status: Value = serde_json::from_str(&body).unwrap();
        let mut pipelines = status["pipelines"].as_array()?.iter();
        pipelines.find(|view| view["pipeline"] == name).cloned()
    }

    pub(super) fn state(&self) -> String {
        let view = self.pipeline("main").unwrap_or_default();
        view["state"].as_str().unwrap_or_default().to_owned()
    }

    /// The value of the metric with this beginning, labels included.
    pub(super) fn metric(&self, start: &str) -> Option<f64> {
        let (_, metrics) = self.get("/metrics")?;
        let line = metrics.lines().find(|line| line.starts_with(start))?;
        line.rsplit(' ').next()?.parse().ok()
    }

    pub(super) fn owns(&self) -> bool {
        self.owned() == [0]
    }

    /// The shards of the main pipeline that it owns, by what it says.
    pub(super) fn owned(&self) -> Vec<u32> {
        let metrics = self
            .get("/metrics")
            .map(|(_, body)| body)
            .unwrap_or_default();
        let shard_of = |line: &str| {
            let line = line.strip_prefix("outbox_owner{pipeline=\"main\",shard=\"")?;
            line.strip_suffix("\"} 1")?.parse().ok()
        };
        let mut owned: Vec<u32> = metrics.lines().filter_map(shard_of).collect();
        owned.sort_unstable();
        owned
    }

    pub(super) async fn ready(&self) {
        self.ready_within(PATIENCE).await;
    }

    /// The same when its client may have been told of no brokers: to be sure of its end takes ten seconds, and on a busy machine
    /// more than one try.
    pub(super) async fn ready_again(&self) {
        self.ready_within(PATIENCE * 3).await;
    }

    async fn ready_within(&self, patience: Duration) {
        eventually("ready", patience, async || {
            matches!(self.get("/readyz"), Some((200, _))).then_some(())
        })
        .await;
    }

    /// Waits until readiness is denied for a reason with one of these words, and returns it.
    pub(super) async fn not_ready(&self, words: &[&str]) -> String {
        let what = format!("not ready because of {words:?}");
        eventually(&what, PATIENCE, async || match self.get("/readyz") {
            Some((503, body)) => {
                let lower = body.to_lowercase();
                words
                    .iter()
                    .any(|word| lower.contains(&word.to_lowercase()))
                    .then_some(body)
            }
            _ => None,
        })
        .await
    }

    /// Waits until it has logged these words. What it logs may come after what it shows.
    pub(super) async fn says(&self, words: &str) {
        eventually(&format!("{words:?} in the log"), PATIENCE, async || {
            self.log().contains(words).then_some(())
        })
        .await;
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn signal(&self, signal: &str) {
        self::signal(&self.child.id().to_string(), signal);
    }

    pub(super) async fn exit(&mut self) -> ExitStatus {
        eventually("the end of the process", PATIENCE, async || {
            self.child.try_wait().unwrap()
        })
        .await
    }

    /// Asks it to stop; it has to do so in good order.
    pub(super) async fn stop(mut self) {
        self.signal("TERM");
        let status = self.exit().await;
        assert_eq!(status.code(), Some(0), "{}", self.log());
    }

    pub(super) async fn kill(mut self) {
        self.signal("KILL");
        self.exit().await;
    }

    pub(super) fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits until a second goes by in which it spends next to nothing on the processor. What it began before may take
    /// longer on a busy machine; what turns in circles never comes to rest.
    pub(super) async fn rests(&self) {
        const REST: Duration = Duration::from_millis(100);
        let mut spent = Vec::new();
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let before = self.cpu();
            sleep(Duration::from_secs(1)).await;
            spent.push(self.cpu() - before);
            if spent.last() < Some(&REST) {
                eprintln!("of CPU in a second: {spent:?}");
                return;
            }
        }
        panic!(
            "it does not rest; of CPU in a second: {spent:?}; by thread: {:?}",
            self.cpu_by_thread()
        );
    }

    /// The time that it has spent on the processor.
    fn cpu(&self) -> Duration {
        let (_, cpu) = cpu(&PathBuf::from(format!("/proc/{}", self.pid()))).unwrap();
        cpu
    }

    fn cpu_by_thread(&self) -> Vec<(String, Duration)> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        // One that has ended since is left out.
        tasks
            .filter_map(|task| cpu(&task.unwrap().path()))
            .collect()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended, and been collected, already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().rev().take(40).collect();
            eprintln!("--- the log of the relay on port {}:", self.port);
            for line in lines.iter().rev() {
                eprintln!("{line}");
            }
        }
    }
}

/// The name of a process or thread, by its folder in `/proc`, and the time that it has spent on the processor.
fn cpu(folder: &Path) -> Option<(String, Duration)> {
    let stat = std::fs::read_to_string(folder.join("stat")).ok()?;
    let (name, fields) = stat.rsplit_once(") ")?;
    let (_, name) = name.split_once('(')?;
    let ticks = fields.split(' ').skip(11).take(2);
    let ticks: u64 = ticks.map(|ticks| ticks.parse::<u64>().unwrap()).sum();
    // Linux counts in hundredths of a second.
    Some((name.to_owned(), Duration::from_millis(ticks * 10)))
}

/// Sends a signal to one process.
pub(super) fn signal(pid: &str, signal: &str) {
    let done = Command::new("kill")
        .args(["-s", signal, pid])
        .status()
        .unwrap();
    assert!(done.success(), "kill -s {signal} {pid}");
}
