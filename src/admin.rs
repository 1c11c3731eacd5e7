//! The HTTP interface: metrics, health, readiness, status. Nothing here changes anything.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context;
use axum::extract::State as Shared;
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use metrics_exporter_prometheus::PrometheusHandle;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::event::PipelineName;
use crate::relay::status::Status;

/// What the interface shows.
pub struct Shown {
    /// This process, as leases name it.
    pub holder: String,
    /// Every pipeline with what it says about itself.
    pub pipelines: Vec<(PipelineName, watch::Receiver<Status>)>,
    /// The recorder of the metrics.
    pub metrics: PrometheusHandle,
}

#[derive(Serialize)]
struct Overview {
    version: &'static str,
    holder: String,
    ready: bool,
    pipelines: Vec<PipelineView>,
}

#[derive(Serialize)]
struct PipelineView {
    pipeline: String,
    #[serde(flatten)]
    status: Status,
}

impl Shown {
    fn overview(&self) -> Overview {
        let pipelines: Vec<PipelineView> = self
            .pipelines
            .iter()
            .map(|(name, status)| PipelineView {
                pipeline: name.to_string(),
                status: status.borrow().clone(),
            })
            .collect();
        Overview {
            version: env!("CARGO_PKG_VERSION"),
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
///
/// # Errors
/// When the listener fails.
pub async fn serve(listener: TcpListener, shown: Shown) -> Result<(), anyhow::Error> {
    let router = Router::new()
        .route(
            "/metrics",
            get(async |Shared(shown): Shared<Arc<Shown>>| shown.metrics.render()),
        )
        .route("/healthz", get(async || "alive\n"))
        .route("/readyz", get(ready))
        .route(
            "/status",
            get(async |Shared(shown): Shared<Arc<Shown>>| Json(shown.overview())),
        )
        .with_state(Arc::new(shown));
    axum::serve(listener, router)
        .await
        .context("serve the admin interface")
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
