//! How the commands look at a daemon: they ask its HTTP interface.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Error, anyhow, ensure};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use secrecy::{ExposeSecret, SecretString};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::Overview;

/// For the answer of a daemon; it is usually on the same machine.
const ANSWER_MAX: Duration = Duration::from_secs(3);
/// No daemon has that much to say; whatever else listens there is not read to its end.
const ANSWER_BYTES_MAX: usize = 4 << 20;

/// Asks the daemon that listens on `address` what it is doing.
///
/// With the client half of hyper, whose server half axum brings anyway: no second HTTP library in the program.
///
/// # Errors
/// When no program answers there, or one that is no relay.
pub async fn ask(address: SocketAddr) -> Result<Overview, Error> {
    ask_as(address, None).await
}

/// The same with the token, if there is one: then the answer also says which event a pipeline has halted at, and why.
///
/// # Errors
/// As [`ask`].
pub async fn ask_as(address: SocketAddr, token: Option<&SecretString>) -> Result<Overview, Error> {
    let (code, overview) = overview(address, "/status", token).await?;
    ensure!(
        code.is_success(),
        "the answer of http://{address}/status is {code}"
    );
    Ok(overview)
}

/// Asks the daemon that listens on `address` whether it is ready, and what it is doing.
///
/// # Errors
/// As [`ask`].
pub async fn ask_ready(
    address: SocketAddr,
    token: Option<&SecretString>,
) -> Result<Overview, Error> {
    Ok(overview(address, "/readyz", token).await?.1)
}

async fn overview(
    address: SocketAddr,
    path: &str,
    token: Option<&SecretString>,
) -> Result<(StatusCode, Overview), Error> {
    let address = reachable(address);
    timeout(ANSWER_MAX, get(address, path, token))
        .await
        .map_err(|_| anyhow!("no answer within {} s", ANSWER_MAX.as_secs()))
        .flatten()
        .with_context(|| format!("no daemon answers at http://{address}{path}"))
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

async fn get(
    address: SocketAddr,
    path: &str,
    token: Option<&SecretString>,
) -> Result<(StatusCode, Overview), Error> {
    let stream = TcpStream::connect(address).await?;
    let (mut requests, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let mut request = Request::get(path)
        .header(header::HOST, address.to_string())
        .header(header::CONNECTION, "close");
    if let Some(token) = token {
        let mut bearer: header::HeaderValue =
            format!("Bearer {}", token.expose_secret()).try_into()?;
        bearer.set_sensitive(true);
        request = request.header(header::AUTHORIZATION, bearer);
    }
    let request = request.body(Empty::<Bytes>::new())?;
    let answer = async move {
        let response = requests.send_request(request).await?;
        let code = response.status();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX)
            .collect()
            .await
            .map_err(|error| anyhow!(error))?;
        let overview = serde_json::from_slice(&body.to_bytes());
        let overview = overview.with_context(|| {
            format!("it is not an outbox-relay of this kind (the answer is {code})")
        })?;
        Ok((code, overview))
    };
    // The connection has to be driven while the answer is awaited; whether it ends well does not matter.
    let (answer, _) = tokio::join!(answer, connection);
    answer
}
