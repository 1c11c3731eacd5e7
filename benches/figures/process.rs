//! A relay or a bare loop as a process: what it uses, and its end.

use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Error, bail, ensure};

/// Linux counts CPU time for other processes in ticks of 10 ms on every architecture.
const TICK: Duration = Duration::from_millis(10);
const STOP_MAX: Duration = Duration::from_mins(1);

/// What a process has used so far.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    pub cpu: Duration,
    pub resident_mib: f64,
    pub peak_mib: f64,
}

/// It does not outlive the measurement.
pub struct Process {
    child: Child,
    name: &'static str,
    pub began: Instant,
}

impl Process {
    pub fn start(name: &'static str, command: &mut Command) -> Result<Self, Error> {
        let began = Instant::now();
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("start the {name}"))?;
        Ok(Self { child, name, began })
    }

    /// What it uses.
    ///
    /// # Errors
    /// When it has ended, which it is never to do by itself.
    pub fn usage(&mut self) -> Result<Usage, Error> {
        if let Some(status) = self.child.try_wait()? {
            bail!("the {} ended by itself: {status}", self.name);
        }
        usage(self.child.id())
    }

    pub fn signal(&self, signal: &str) -> Result<(), Error> {
        send(self.child.id(), signal)
    }

    /// SIGTERM, and how long it took to end with success.
    pub async fn stop(mut self) -> Result<Duration, Error> {
        let began = Instant::now();
        self.signal("TERM")?;
        let status = self.ended().await?;
        ensure!(status.success(), "the {} failed: {status}", self.name);
        Ok(began.elapsed())
    }

    /// SIGKILL; the moment before it.
    pub async fn kill(mut self) -> Result<Instant, Error> {
        let at = Instant::now();
        self.child.kill()?;
        self.ended().await?;
        Ok(at)
    }

    async fn ended(&mut self) -> Result<ExitStatus, Error> {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            ensure!(began.elapsed() < STOP_MAX, "the {} does not end", self.name);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has ended already when all went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A Kafka broker on this machine.
#[derive(Clone, Copy, Debug)]
pub struct Broker(u32);

/// What a broker has used so far.
#[derive(Clone, Copy, Debug)]
pub struct BrokerUsage {
    pub cpu: Duration,
    /// Bytes of files that are written to the disk, or will be.
    pub written: f64,
}

impl Broker {
    /// The broker of this process.
    ///
    /// # Errors
    /// When the process does not look like one: a wrong number must not freeze a stranger.
    pub fn of(pid: u32) -> Result<Self, Error> {
        let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline"))
            .with_context(|| format!("--broker-pid: there is no process {pid}"))?;
        ensure!(
            line.to_lowercase().contains("kafka"),
            "--broker-pid: process {pid} is no Kafka broker"
        );
        Ok(Self(pid))
    }

    /// What it uses. Of somebody else's process only root may know what it writes.
    pub fn usage(self) -> Result<BrokerUsage, Error> {
        let file = format!("/proc/{}/io", self.0);
        let io = std::fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
        let written = io
            .lines()
            .find_map(|line| line.strip_prefix("write_bytes: "))
            .with_context(|| format!("read write_bytes in {file}"))?;
        Ok(BrokerUsage {
            cpu: usage(self.0)?.cpu,
            written: written.parse()?,
        })
    }

    /// Stops it.
    pub fn freeze(self) -> Result<Frozen, Error> {
        send(self.0, "STOP")?;
        Ok(Frozen(self.0))
    }
}

/// Another process that is frozen until this is dropped.
pub struct Frozen(u32);

impl Drop for Frozen {
    fn drop(&mut self) {
        if let Err(error) = send(self.0, "CONT") {
            eprintln!("process {} is still stopped: {error}", self.0);
        }
    }
}

fn send(pid: u32, signal: &str) -> Result<(), Error> {
    let sent = Command::new("kill")
        .args(["-s", signal, &pid.to_string()])
        .status()
        .context("run kill")?;
    ensure!(sent.success(), "could not send SIG{signal} to {pid}");
    Ok(())
}

fn usage(pid: u32) -> Result<Usage, Error> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, rest) = stat.rsplit_once(')').context("read /proc/PID/stat")?;
    // Fields 14 and 15 of the whole line: user and system time.
    let ticks: u32 = rest
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(str::parse::<u32>)
        .sum::<Result<u32, _>>()?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let mib = |name: &str| -> Result<f64, Error> {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let kib: f64 = line
            .and_then(|line| line.trim().strip_suffix(" kB"))
            .with_context(|| format!("read {name}"))?
            .parse()?;
        Ok(kib / 1024.0)
    };
    Ok(Usage {
        cpu: TICK * ticks,
        resident_mib: mib("VmRSS:")?,
        peak_mib: mib("VmHWM:")?,
    })
}
