//! The HTTP interface: metrics, health, readiness, status, parked events.
//!
//! What names entities or operators needs the token, and so does every change. Both ends of `/status` are here: the daemon
//! that serves it and [`ask`], with which the commands look at a daemon.

mod client;
mod host;
mod parked;
mod serve;
mod sessions;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Context;
use axum::extract::State as Shared;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::middleware;
use axum::routing::get;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::sync::watch;

pub use self::client::{ask, ask_as, ask_ready};
use self::parked::has_token;
use self::sessions::Sessions;
use crate::backlog::Backlogs;
use crate::config::{Admin, Source, Token};
use crate::crew::ShownRelay;
use crate::relay::status::{State, Status};
use crate::telemetry;

/// What the interface shows.
pub struct Shown {
    holder: String,
    relays: watch::Receiver<Vec<ShownRelay>>,
    backlogs: watch::Receiver<Backlogs>,
    metrics: telemetry::Exporter,
    token: Token,
    hosts: Vec<String>,
    sessions: Sessions,
    now_us: fn() -> i64,
}

/// What is there, for people who try.
const INDEX: &str = "\
outbox-relay

GET  /healthz, /livez        the process is there
GET  /readyz                 200 while every pipeline moves or stands by, else 503, with the same answer as /status
GET  /status                 where every pipeline stands
GET  /metrics                for Prometheus

With the header `Authorization: Bearer` and the token of admin.token:
GET  /parked                 events that were set aside: ?pipeline, id, entity, error, older_than, limit, after
GET  /parked/PIPELINE/ID     one of them, with its payload
GET  /acts                   what operators asked for: ?limit, after
POST /parked/redrive         publish events after all
POST /parked/drop            give events up
";

/// The answer to `/status` and `/readyz`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Overview {
    /// Of the program.
    pub version: String,
    /// The process, as leases name it.
    pub holder: String,
    /// Whether every pipeline is.
    pub ready: bool,
    /// Those of the configuration, shard by shard.
    pub pipelines: Vec<PipelineView>,
}

/// One shard of a pipeline in the answer.
#[derive(Debug, Serialize, Deserialize)]
pub struct PipelineView {
    /// Its name.
    pub pipeline: String,
    /// Which of its shards, from 0 on.
    pub shard: u32,
    /// What its relay says about itself.
    #[serde(flatten)]
    pub status: Status,
    /// When it came into this state, as a time in UTC.
    #[serde(default)]
    pub state_since: Option<String>,
    /// For how long it has been in this state.
    #[serde(default)]
    pub for_seconds: Option<u64>,
    /// Ids between the cursor and the newest of the log; none where that is not known, or another relay's affair.
    #[serde(default)]
    pub backlog_ids: Option<i64>,
    /// Age of the oldest committed event that is not confirmed; none without one, and where `backlog_ids` is not known.
    #[serde(default)]
    pub oldest_unpublished_seconds: Option<f64>,
}

impl Shown {
    /// What is to be shown of this process, and where the parked events are.
    #[must_use]
    pub fn new(
        holder: String,
        relays: watch::Receiver<Vec<ShownRelay>>,
        backlogs: watch::Receiver<Backlogs>,
        metrics: telemetry::Exporter,
        (source, admin): (&Source, &Admin),
        now_us: fn() -> i64,
    ) -> Self {
        Self {
            holder,
            relays,
            backlogs,
            metrics,
            token: admin.token.clone(),
            hosts: admin.hosts.clone(),
            sessions: Sessions::new(source.clone()),
            now_us,
        }
    }

    fn render(&self) -> String {
        let mut pipelines = BTreeMap::new();
        for relay in &*self.relays.borrow() {
            let (ready, halted) = pipelines
                .entry(relay.pipeline.clone())
                .or_insert((true, false));
            let state = &relay.status.borrow().state;
            *ready &= state.is_ready();
            *halted |= matches!(state, State::Halted { .. });
        }
        for (pipeline, (ready, halted)) in pipelines {
            telemetry::ready(pipeline.as_str(), ready);
            telemetry::halted(pipeline.as_str(), halted);
        }
        self.metrics.render()
    }

    /// Without the token no entity is named.
    fn overview(&self, headers: &HeaderMap) -> Overview {
        // Where the file can't be read for a moment, the client is told less.
        let token = self.token.current().ok().flatten();
        let trusted = has_token(headers, token.as_ref());
        let pipelines: Vec<PipelineView> = self
            .relays
            .borrow()
            .iter()
            .map(|relay| self.view(relay, trusted))
            .collect();
        Overview {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            holder: self.holder.clone(),
            ready: pipelines.iter().all(|view| view.status.state.is_ready()),
            pipelines,
        }
    }

    fn view(&self, relay: &ShownRelay, trusted: bool) -> PipelineView {
        let mut status = relay.status.borrow().clone();
        if !trusted {
            status.state = status.state.without_names();
        }
        let lasts = status.lasts();
        let backlogs = self.backlogs.borrow();
        let backlog = backlogs.of(&relay.pipeline, relay.shard);
        if let Some(backlog) = backlog {
            status.newest_id = status.newest_id.max(backlog.newest_id);
        }
        PipelineView {
            pipeline: relay.pipeline.to_string(),
            shard: relay.shard.index,
            state_since: lasts.map(|lasts| self.time_before(lasts)),
            for_seconds: lasts.map(|lasts| lasts.as_secs()),
            backlog_ids: backlog.and_then(|backlog| backlog.ids),
            oldest_unpublished_seconds: backlog.and_then(|backlog| backlog.oldest_seconds),
            status,
        }
    }

    /// So long ago, as people read it.
    fn time_before(&self, lasts: Duration) -> String {
        let now = Duration::from_micros((self.now_us)().unsigned_abs());
        let time = UNIX_EPOCH + now.saturating_sub(lasts);
        humantime::format_rfc3339_seconds(time).to_string()
    }
}

/// Opens the port, so that an address in use is known before anything starts.
///
/// # Errors
/// When the address can't be listened on; the message names it.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, anyhow::Error> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("listen on {address} (admin.listen)"))
}

/// Serves until dropped.
pub async fn serve(listener: TcpListener, shown: Shown) -> Infallible {
    let shown = Arc::new(shown);
    let router = Router::new()
        .route("/", get(async || INDEX))
        .route(
            "/metrics",
            get(async |Shared(shown): Shared<Arc<Shown>>| shown.render()),
        )
        .route("/healthz", get(async || "alive\n"))
        .route("/livez", get(async || "alive\n"))
        .route("/readyz", get(ready))
        .route(
            "/status",
            get(
                async |Shared(shown): Shared<Arc<Shown>>, headers: HeaderMap| {
                    Json(shown.overview(&headers))
                },
            ),
        )
        .merge(parked::routes(&shown))
        .fallback(async |uri: Uri| {
            let why = format!("{}: there is no such path\n\n{INDEX}", uri.path());
            (StatusCode::NOT_FOUND, why)
        })
        .method_not_allowed_fallback(async || {
            let why = format!("this path is for the other method\n\n{INDEX}");
            (StatusCode::METHOD_NOT_ALLOWED, why)
        })
        .layer(middleware::from_fn_with_state(shown.clone(), host::checked))
        .with_state(shown.clone());
    tokio::select! {
        never = serve::serve(listener, router) => never,
        never = shown.sessions.close_idle() => never,
    }
}

async fn ready(
    Shared(shown): Shared<Arc<Shown>>,
    headers: HeaderMap,
) -> (StatusCode, Json<Overview>) {
    let overview = shown.overview(&headers);
    let code = if overview.ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (code, Json(overview))
}
