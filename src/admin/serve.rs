//! Serves HTTP within bounds: of connections, of the time for a request's head, for its answer and for reading that.
//!
//! Nothing that one client does keeps others out: where there is no room, the connection that has waited longest without
//! asking is closed for the new one. Each connection has one request. All of them are one future: dropping it closes them,
//! and no task is spawned.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Router};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::Service;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

/// Connections at once.
const CONNECTIONS_MAX: usize = 64;
/// From the beginning of a connection to the end of its request's head.
const HEAD_MAX: Duration = Duration::from_secs(5);
const HEAD_BYTES_MAX: usize = 16 << 10;
/// No request has that much to say.
const BODY_BYTES_MAX: usize = 64 << 10;
/// From the head of a request to the answer, the request's body included.
const ANSWER_MAX: Duration = Duration::from_secs(40);
/// From the answer to its last byte at the client's machine.
const WRITE_MAX: Duration = Duration::from_secs(10);
/// After a connection could not be accepted (out of files, as a rule) the next attempt waits this long.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// A trouble with accepting is told this often.
const TELL_AGAIN: Duration = Duration::from_mins(1);

/// How far a connection has come. In this order they make room for others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// It has not asked yet.
    Head,
    /// The client reads the answer.
    Writing,
    /// The answer is being made.
    Working,
}

/// The client of one request, as handlers see it.
#[derive(Clone, Debug)]
pub(super) struct Client {
    pub(super) address: SocketAddr,
    held: Arc<Mutex<Option<OwnedSemaphorePermit>>>,
}

impl Client {
    /// Keeps a permit until the connection is closed: an answer takes memory until the client has read it.
    pub(super) fn hold(&self, permit: OwnedSemaphorePermit) {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = Some(permit);
    }
}

/// What the loop knows of an open connection.
struct Open {
    number: u64,
    stage: watch::Receiver<Stage>,
    close: CancellationToken,
}

/// Serves until dropped.
pub(super) async fn serve(listener: TcpListener, router: Router) -> std::convert::Infallible {
    let router = router
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::from_fn(in_time));
    let mut conversations: FuturesUnordered<Pin<Box<dyn Future<Output = u64> + Send>>> =
        FuturesUnordered::new();
    let mut open: Vec<Open> = Vec::new();
    let mut accepted: u64 = 0;
    let mut accept_at = Instant::now();
    let mut tell_at = Instant::now();
    loop {
        // In this order: what a client has sent is read before its connection can be taken for a silent one.
        tokio::select! {
            biased;
            Some(ended) = conversations.next() => open.retain(|open| open.number != ended),
            () = sleep_until(accept_at), if accept_at > Instant::now() => {}
            stream = listener.accept(), if accept_at <= Instant::now() => match stream {
                Ok((stream, address)) => {
                    make_room(&mut open, CONNECTIONS_MAX - 1);
                    let (stage, seen) = watch::channel(Stage::Head);
                    let close = CancellationToken::new();
                    let number = accepted;
                    accepted += 1;
                    open.push(Open { number, stage: seen, close: close.clone() });
                    let talk = converse(stream, address, router.clone(), stage);
                    conversations.push(Box::pin(async move {
                        let _ = close.run_until_cancelled(talk).await;
                        number
                    }));
                }
                Err(error) => {
                    if Instant::now() >= tell_at {
                        tracing::warn!(%error, "could not accept a connection to the admin interface: tried again ten times a second");
                        tell_at = Instant::now() + TELL_AGAIN;
                    }
                    // Each connection is a file.
                    let fewer = open.len().saturating_sub(1);
                    make_room(&mut open, fewer);
                    accept_at = Instant::now() + ACCEPT_AGAIN;
                }
            },
        }
    }
}

/// Closes connections until there are at most so many: the oldest of those that have not asked first.
fn make_room(open: &mut Vec<Open>, most: usize) {
    while open.len() > most {
        let stages = open.iter().enumerate();
        let Some((first, _)) = stages.min_by_key(|(_, open)| (*open.stage.borrow(), open.number))
        else {
            return;
        };
        open.remove(first).close.cancel();
    }
}

/// One request and its answer. How a client goes is its own affair.
async fn converse(
    stream: TcpStream,
    address: SocketAddr,
    router: Router,
    stage: watch::Sender<Stage>,
) {
    let client = Client {
        address,
        held: Arc::default(),
    };
    let mut seen = stage.subscribe();
    let service = Staged {
        inner: TowerToHyperService::new(router.layer(Extension(client))),
        stage,
    };
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    let written = async {
        if seen
            .wait_for(|stage| *stage == Stage::Writing)
            .await
            .is_ok()
        {
            sleep(WRITE_MAX).await;
        }
    };
    tokio::select! {
        _ = &mut connection => {}
        () = written => {}
    }
}

/// Notes how far a connection has come.
struct Staged {
    inner: TowerToHyperService<Router>,
    stage: watch::Sender<Stage>,
}

impl Service<hyper::Request<Incoming>> for Staged {
    type Response = Response;
    type Error = std::convert::Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Self::Error>> + Send>>;

    fn call(&self, request: hyper::Request<Incoming>) -> Self::Future {
        self.stage.send_replace(Stage::Working);
        let answer = self.inner.call(request.map(Body::new));
        let stage = self.stage.clone();
        Box::pin(async move {
            let answer = answer.await;
            stage.send_replace(Stage::Writing);
            answer
        })
    }
}

async fn in_time(request: Request, next: Next) -> Response {
    match timeout(ANSWER_MAX, next.run(request)).await {
        Ok(response) => response,
        Err(_) => (
            StatusCode::SERVICE_UNAVAILABLE,
            format!("there is no answer within {} s\n", ANSWER_MAX.as_secs()),
        )
            .into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_connection_that_has_not_asked_makes_room() {
        let stages = [Stage::Working, Stage::Writing, Stage::Head, Stage::Head];
        let (senders, mut open): (Vec<_>, Vec<_>) = stages
            .into_iter()
            .zip(0..)
            .map(|(stage, number)| {
                let (sender, stage) = watch::channel(stage);
                let close = CancellationToken::new();
                (
                    sender,
                    Open {
                        number,
                        stage,
                        close,
                    },
                )
            })
            .unzip();
        let left = |open: &[Open]| open.iter().map(|open| open.number).collect::<Vec<_>>();
        make_room(&mut open, 3);
        assert_eq!(left(&open), [0, 1, 3]);
        make_room(&mut open, 1);
        assert_eq!(left(&open), [0]);
        drop(senders);
    }
}
