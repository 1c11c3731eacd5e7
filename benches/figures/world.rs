//! Where everything happens: databases and topics of this run, relays and bare loops over them. Nothing stays behind.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Error};
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Executor};

use crate::options::{Options, Sizes};
use crate::process::{Broker, Process};
use crate::topics::{self, COMPRESSION, Cluster, Topics};
use crate::workload::{EVENT_TYPE, Workload};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capture {
    Poll,
    Listen,
}

impl Capture {
    pub fn name(self) -> &'static str {
        match self {
            Self::Poll => "poll",
            Self::Listen => "listen",
        }
    }
}

/// How a relay is set up, where it matters; everything else is the default.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub capture: Capture,
    pub exactly_once: bool,
    pub compression: &'static str,
    pub pipelines: usize,
    /// Of each pipeline.
    pub shards: u32,
    /// Begins with what comes next, and not with what is there.
    pub latest: bool,
    /// Only events of the type [`EVENT_TYPE`].
    pub filtered: bool,
    pub lease: Duration,
    /// How long published events stay, and events per partition.
    pub retention: Option<(Duration, i64)>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            capture: Capture::Poll,
            exactly_once: false,
            compression: COMPRESSION,
            pipelines: 1,
            shards: 1,
            latest: false,
            filtered: false,
            lease: Duration::from_secs(10),
            retention: None,
        }
    }
}

/// What a bare loop is told that a relay knows.
#[derive(Clone, Copy, Debug)]
pub struct Bare {
    /// It begins behind this id.
    pub after: i64,
    /// Rows of a select.
    pub page: i64,
    /// Its records have the headers that a relay's have.
    pub headers: bool,
}

impl Bare {
    /// From the beginning, without headers.
    pub fn of(page: i64) -> Self {
        Self {
            after: 0,
            page,
            headers: false,
        }
    }
}

/// A database with the outbox in it.
pub struct Log {
    pub options: PgConnectOptions,
    name: String,
}

impl Log {
    pub async fn connect(&self) -> Result<PgConnection, Error> {
        self.options
            .clone()
            .connect()
            .await
            .context("connect to the bench's database")
    }
}

/// One start of a relay or a bare loop: its name, and topics that nobody else writes to.
pub struct Run {
    pub name: String,
    pub pipelines: usize,
    pub topics: Topics,
}

impl Run {
    pub fn pipeline(&self, number: usize) -> String {
        format!("{}-{number}", self.name)
    }
}

pub struct World {
    pub sizes: Sizes,
    pub cluster: Cluster,
    pub broker: Option<Broker>,
    kafka_config: Option<PathBuf>,
    only: Vec<String>,
    partitions: i32,
    server: PgConnectOptions,
    /// Begins the names of everything.
    prefix: String,
    scratch: tempfile::TempDir,
    made: Cell<u32>,
    databases: RefCell<Vec<String>>,
    filled: RefCell<BTreeMap<Workload, Rc<Log>>>,
}

impl World {
    pub fn new(options: &Options) -> Result<Self, Error> {
        let say = "is not given: see --help, or let benches/run bring the services up";
        let url = options.database_url.as_ref();
        let url = url.with_context(|| format!("DATABASE_URL {say}"))?;
        let brokers = options.kafka_brokers.clone();
        Ok(Self {
            sizes: options.sizes(),
            cluster: Cluster::new(
                brokers.with_context(|| format!("KAFKA_BROKERS {say}"))?,
                options.kafka_config.as_deref(),
            )?,
            kafka_config: options.kafka_config.clone(),
            broker: options.broker_pid.map(Broker::of).transpose()?,
            only: options.only.clone(),
            partitions: options.partitions,
            server: url.parse().context("read DATABASE_URL")?,
            prefix: format!("figures{}", std::process::id()),
            scratch: tempfile::tempdir()?,
            made: Cell::new(0),
            databases: RefCell::default(),
            filled: RefCell::default(),
        })
    }

    /// Whether a variant was asked for.
    pub fn wants(&self, variant: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| variant.contains(only))
    }

    pub async fn admin(&self) -> Result<PgConnection, Error> {
        let connected = self.server.clone().connect().await;
        connected.context("connect to DATABASE_URL")
    }

    fn next(&self) -> u32 {
        self.made.set(self.made.get() + 1);
        self.made.get()
    }

    /// An empty log in a database of its own.
    pub async fn log(&self) -> Result<Log, Error> {
        let name = format!("{}_{}", self.prefix, self.next());
        self.admin()
            .await?
            .execute(AssertSqlSafe(format!("create database {name}")))
            .await
            .context("create a database: DATABASE_URL has to name a superuser")?;
        self.databases.borrow_mut().push(name.clone());
        let options = self.server.clone().database(&name);
        outbox_relay::migrate::postgres(options.clone()).await?;
        Ok(Log { options, name })
    }

    /// A backlog of that shape, as an hour-old one would be: vacuumed, and known to the planner. Made once.
    pub async fn backlog(&self, workload: Workload) -> Result<Rc<Log>, Error> {
        if let Some(log) = self.filled.borrow().get(&workload) {
            return Ok(Rc::clone(log));
        }
        eprintln!("  writing {workload}");
        let log = Rc::new(self.log().await?);
        let mut db = log.connect().await?;
        workload.fill(&mut db).await?;
        db.execute("vacuum analyze outbox.events").await?;
        // Else that happens in the middle of a measurement.
        db.execute("checkpoint").await?;
        self.filled.borrow_mut().insert(workload, Rc::clone(&log));
        Ok(log)
    }

    pub async fn forget(&self, log: &Log) -> Result<(), Error> {
        let drop = format!("drop database if exists {} with (force)", log.name);
        self.admin().await?.execute(AssertSqlSafe(drop)).await?;
        self.databases.borrow_mut().retain(|name| *name != log.name);
        Ok(())
    }

    /// Drops the backlogs, at the end of a case.
    pub async fn forget_backlogs(&self) -> Result<(), Error> {
        let filled = std::mem::take(&mut *self.filled.borrow_mut());
        for log in filled.values() {
            self.forget(log).await?;
        }
        Ok(())
    }

    /// A name and topics for one start: of each pipeline one per aggregate type.
    pub async fn run(&self, pipelines: usize, aggregate_types: &[String]) -> Result<Run, Error> {
        let name = format!("{}-{}", self.prefix, self.next());
        let names = (0..pipelines)
            .flat_map(|number| {
                let name = &name;
                aggregate_types
                    .iter()
                    .map(move |aggregate| format!("{name}.{number}.{aggregate}"))
            })
            .collect();
        let topics = Topics::create(&self.cluster, names, self.partitions).await?;
        Ok(Run {
            name,
            pipelines,
            topics,
        })
    }

    /// Starts a relay on a log.
    pub fn relay(&self, log: &Log, run: &Run, setup: &Setup) -> Result<Process, Error> {
        let file = self.scratch.path().join(format!("{}.toml", self.next()));
        std::fs::write(&file, self.configuration(log, run, setup)?)?;
        let mut relay = Command::new(env!("CARGO_BIN_EXE_outbox-relay"));
        relay
            .args(["run", "--config"])
            .arg(file)
            .current_dir(self.scratch.path());
        // Nobody else's settings.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("RELAY_") {
                relay.env_remove(name);
            }
        }
        Process::start("relay", &mut relay)
    }

    fn configuration(&self, log: &Log, run: &Run, setup: &Setup) -> Result<String, Error> {
        let delivery = if setup.exactly_once {
            format!(
                "delivery = \"exactly-once\"\ntransactional_id = {:?}",
                run.name
            )
        } else {
            "delivery = \"at-least-once\"".to_owned()
        };
        let mut text = format!(
            "[source.postgres]\nurl = {:?}\ncapture = {:?}\n\
             [sink.kafka]\nbrokers = {:?}\ncompression = {:?}\n{delivery}\n\
             [pipeline]\nshards = {}\n\
             [relay]\nlease_ttl = \"{}ms\"\n\
             [admin]\nenabled = false\n[log]\nlevel = \"warn\"\n",
            log.options.to_url_lossy().as_str(),
            setup.capture.name(),
            self.cluster.brokers,
            setup.compression,
            setup.shards,
            setup.lease.as_millis(),
        );
        text += "[sink.kafka.properties]\n";
        for (name, value) in &self.cluster.properties {
            writeln!(text, "{name:?} = {value:?}")?;
        }
        if let Some((keep, events)) = setup.retention {
            let (keep_ms, interval_ms) = (keep.as_millis(), (keep.as_millis() / 5).max(1000));
            write!(
                text,
                "[retention]\nkeep = \"{keep_ms}ms\"\ninterval = \"{interval_ms}ms\"\npartition_events = {events}\n"
            )?;
        }
        for number in 0..setup.pipelines {
            let (pipeline, name) = (run.pipeline(number), &run.name);
            write!(
                text,
                "[pipelines.{pipeline}]\ntopic = \"{name}.{number}.{{aggregate_type}}\"\n"
            )?;
            if setup.latest {
                writeln!(text, "start = \"latest\"")?;
            }
            if setup.filtered {
                writeln!(text, "filter.event_types = [{EVENT_TYPE:?}]")?;
            }
        }
        Ok(text)
    }

    /// Starts the bare loop on a log.
    pub fn naked(&self, log: &Log, run: &Run, setup: &Setup, bare: Bare) -> Result<Process, Error> {
        let mut naked = Command::new(std::env::current_exe()?);
        naked
            .arg("naked")
            .args(["--url", log.options.to_url_lossy().as_str()])
            .args(["--brokers", &self.cluster.brokers, "--prefix", &run.name])
            .args(["--compression", setup.compression])
            .args(["--loops", &setup.pipelines.to_string()])
            .args(["--page", &bare.page.to_string()])
            .args(["--after", &bare.after.to_string()]);
        if setup.filtered {
            naked.args(["--event-type", EVENT_TYPE]);
        }
        if let Some(file) = &self.kafka_config {
            naked.arg("--kafka-config").arg(file);
        }
        if bare.headers {
            naked.arg("--headers");
        }
        if setup.capture == Capture::Listen {
            naked.arg("--listen");
        }
        Process::start("bare loop", &mut naked)
    }

    /// Takes back whatever is left.
    pub async fn clean(&self) -> Result<(), Error> {
        let mut admin = self.admin().await?;
        for name in self.databases.take() {
            let drop = format!("drop database if exists {name} with (force)");
            admin.execute(AssertSqlSafe(drop)).await?;
        }
        topics::delete(&self.cluster, &[format!("{}-", self.prefix)]).await
    }
}
