//! Serves HTTP within bounds: so many connections, so much time for a request's head, for its answer and for a connection.
//!
//! All connections are one future: dropping it closes them, and nobody has to spawn.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, Request};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Router};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};

/// Connections at once; the next ones wait to be accepted.
const CONNECTIONS_MAX: usize = 64;
/// From the beginning of a connection, or the last answer, to the end of the next request's head.
const HEAD_MAX: Duration = Duration::from_secs(5);
const HEAD_BYTES_MAX: usize = 16 << 10;
/// No request has that much to say.
const BODY_BYTES_MAX: usize = 64 << 10;
/// From the head of a request to the answer, the request's body included.
const ANSWER_MAX: Duration = Duration::from_secs(40);
/// A connection that has lived this long is closed after the answer that is under way.
const CONNECTION_MAX: Duration = Duration::from_mins(1);

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer(pub(super) SocketAddr);

/// Serves until dropped.
pub(super) async fn serve(listener: TcpListener, router: Router) -> std::convert::Infallible {
    let router = router
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::from_fn(in_time));
    let mut connections: FuturesUnordered<Pin<Box<dyn Future<Output = ()> + Send>>> =
        FuturesUnordered::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => match accepted {
                Ok((stream, address)) => {
                    connections.push(Box::pin(converse(stream, address, router.clone())));
                }
                Err(error) => {
                    tracing::warn!(%error, "could not accept a connection to the admin interface");
                    // Out of files, as a rule: at once it would fail again.
                    connections.push(Box::pin(sleep(Duration::from_millis(100))));
                }
            },
            Some(()) = connections.next() => {}
        }
    }
}

async fn converse(stream: TcpStream, address: SocketAddr, router: Router) {
    let service = TowerToHyperService::new(router.layer(Extension(Peer(address))));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    // How a client goes is its own affair.
    if timeout(CONNECTION_MAX, connection.as_mut()).await.is_err() {
        connection.as_mut().graceful_shutdown();
        let _ = timeout(ANSWER_MAX, connection).await;
    }
}

async fn in_time(request: Request, next: Next) -> Response {
    match timeout(ANSWER_MAX, next.run(request)).await {
        Ok(response) => response,
        Err(_) => (
            StatusCode::REQUEST_TIMEOUT,
            format!("no answer within {} s\n", ANSWER_MAX.as_secs()),
        )
            .into_response(),
    }
}
