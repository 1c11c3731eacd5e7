//! Which names of this interface a request may use.
//!
//! A page in a browser can have its own name point to this address and then read the answers as its own (DNS rebinding).
//! The browser still says that name in `Host`. So the relay refuses a name that the operator has not configured.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use axum::extract::{Request, State as Shared};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::Shown;

/// These say nothing but that the process is there; probes may use any name.
const OPEN: [&str; 2] = ["/healthz", "/livez"];

pub(super) async fn checked(
    Shared(shown): Shared<Arc<Shown>>,
    request: Request,
    next: Next,
) -> Response {
    let named = request
        .headers()
        .get(header::HOST)
        .map(|host| host.to_str().unwrap_or("?"));
    let named = request.uri().host().or(named);
    if let Some(host) = named
        && !OPEN.contains(&request.uri().path())
        && !is_known(host, &shown.hosts)
    {
        let why = "this name is not one of the relay's: use localhost or an IP address, or add the name to admin.hosts \
                   (RELAY_ADMIN__HOSTS)\n";
        return (StatusCode::MISDIRECTED_REQUEST, why).into_response();
    }
    next.run(request).await
}

/// Whether a host, with a port or without, is `localhost`, an IP address or one of the configured names.
fn is_known(host: &str, configured: &[String]) -> bool {
    if let Some(v6) = host.strip_prefix('[') {
        let address = v6.split_once(']').map_or("", |(address, _)| address);
        return address.parse::<Ipv6Addr>().is_ok();
    }
    let name = host.split_once(':').map_or(host, |(name, _)| name);
    let name = name.strip_suffix('.').unwrap_or(name);
    name.parse::<Ipv4Addr>().is_ok()
        || name.eq_ignore_ascii_case("localhost")
        || configured
            .iter()
            .any(|known| known.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_names_pass() {
        let configured = ["relay.shop.svc".to_owned()];
        for host in [
            "localhost",
            "LOCALHOST:9187",
            "127.0.0.1",
            "10.0.0.7:9187",
            "[::1]:9187",
            "[fe80::1]",
            "relay.shop.svc:9187",
            "Relay.Shop.Svc.",
        ] {
            assert!(is_known(host, &configured), "{host}");
        }
        for host in [
            "",
            "evil.example",
            "evil.example:9187",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "[evil]",
            "relay",
        ] {
            assert!(!is_known(host, &configured), "{host}");
        }
    }
}
