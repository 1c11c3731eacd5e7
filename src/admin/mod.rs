//! The HTTP interface: metrics, health, readiness, status, parked events. Only who has the token changes anything.
//!
//! Both ends of `/status` are here: the daemon that serves it and [`ask`], with which the commands look at a daemon.

mod parked;
mod serve;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use axum::extract::State as Shared;
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Request, header};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

use crate::config::{Source, Token};
use crate::crew::ShownRelay;
use crate::relay::status::Status;
use crate::telemetry;

/// For the answer of a daemon; it is usually on the same machine.
const ANSWER_MAX: Duration = Duration::from_secs(3);
/// No daemon has that much to say; whatever else listens there is not read to its end.
const ANSWER_BYTES_MAX: usize = 4 << 20;

/// What the interface shows.
pub struct Shown {
    /// This process, as leases name it.
    pub holder: String,
    /// Every relay with what it says about itself.
    pub relays: watch::Receiver<Vec<ShownRelay>>,
    /// The metrics.
    pub metrics: telemetry::Exporter,
    /// Where the parked events are.
    pub source: Source,
    /// What whoever changes something has to know.
    pub token: Token,
    /// Who asks the database waits for one: curiosity must not use up its connections.
    pub database_turns: Semaphore,
}

/// Questions to the database at once.
pub const DATABASE_TURNS: usize = 2;

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
}

impl Shown {
    fn render(&self) -> String {
        let mut ready = BTreeMap::new();
        for relay in &*self.relays.borrow() {
            *ready.entry(relay.pipeline.clone()).or_insert(true) &=
                relay.status.borrow().state.is_ready();
        }
        for (pipeline, ready) in ready {
            telemetry::ready(pipeline.as_str(), ready);
        }
        self.metrics.render()
    }

    fn overview(&self) -> Overview {
        let pipelines: Vec<PipelineView> = self
            .relays
            .borrow()
            .iter()
            .map(|relay| PipelineView {
                pipeline: relay.pipeline.to_string(),
                shard: relay.shard.index,
                status: relay.status.borrow().clone(),
            })
            .collect();
        Overview {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            holder: self.holder.clone(),
            ready: pipelines.iter().all(|view| view.status.state.is_ready()),
            pipelines,
        }
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
        .route(
            "/metrics",
            get(async |Shared(shown): Shared<Arc<Shown>>| shown.render()),
        )
        .route("/healthz", get(async || "alive\n"))
        .route("/readyz", get(ready))
        .route(
            "/status",
            get(async |Shared(shown): Shared<Arc<Shown>>| Json(shown.overview())),
        )
        .merge(parked::routes(&shown))
        .with_state(shown);
    serve::serve(listener, router).await
}

async fn ready(Shared(shown): Shared<Arc<Shown>>) -> (StatusCode, Json<Overview>) {
    let overview = shown.overview();
    let code = if overview.ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (code, Json(overview))
}

/// Asks the daemon that listens on `address` what it is doing.
///
/// With the client half of hyper, whose server half axum brings anyway: no second HTTP library in the program.
///
/// # Errors
/// When nobody answers there, or somebody else does.
pub async fn ask(address: SocketAddr) -> Result<Overview, anyhow::Error> {
    let address = reachable(address);
    timeout(ANSWER_MAX, get_status(address))
        .await
        .map_err(|_| anyhow!("no answer within {} s", ANSWER_MAX.as_secs()))
        .flatten()
        .with_context(|| format!("no daemon answers at http://{address}/status"))
}

/// An address to listen on everywhere is no address to connect to.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => {
            address.set_ip(Ipv4Addr::LOCALHOST.into());
        }
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => {
            address.set_ip(Ipv6Addr::LOCALHOST.into());
        }
        _ => {}
    }
    address
}

async fn get_status(address: SocketAddr) -> Result<Overview, anyhow::Error> {
    let stream = TcpStream::connect(address).await?;
    let (mut requests, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::get("/status")
        .header(header::HOST, address.to_string())
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())?;
    let answer = async move {
        let response = requests.send_request(request).await?;
        ensure!(
            response.status().is_success(),
            "the answer is {}",
            response.status()
        );
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX)
            .collect()
            .await
            .map_err(|error| anyhow!(error))?;
        serde_json::from_slice(&body.to_bytes()).context("it is not an outbox-relay of this kind")
    };
    // The connection has to be driven while the answer is awaited; whether it ends well does not matter.
    let (answer, _) = tokio::join!(answer, connection);
    answer
}
