//! Parked events over HTTP: the same as the commands see and ask for. What changes something needs the token.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Error, anyhow};
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, Query, Request, State as Shared};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use secrecy::ExposeSecret;
use serde::Deserialize;
use serde_json::{Value, json};
use subtle::ConstantTimeEq;

use super::Shown;
use super::serve::Peer;
use crate::config::Token;
use crate::database::{Database, Refusal};
use crate::event::{EventId, PipelineName};
use crate::ledger::acts::{Action, NotedAct, ParkedDetail, ParkedEvents, Selector, Wish};
use crate::reason::reason;

/// Of the payload of one event.
const PAYLOAD_BYTES: u32 = 1 << 20;
const LIMIT_MAX: u32 = 10_000;

pub(super) fn routes(shown: &Arc<Shown>) -> Router<Arc<Shown>> {
    let change = Router::new()
        .route("/parked/redrive", post(redrive))
        .route("/parked/drop", post(drop_events))
        .route_layer(middleware::from_fn_with_state(shown.clone(), authorized));
    Router::new()
        .route("/parked", get(list))
        .route("/parked/{pipeline}/{id}", get(show))
        .route("/acts", get(acts))
        .merge(change)
}

/// An answer that is not what was asked for.
struct Failed(StatusCode, Error);

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let Self(code, error) = self;
        (code, Json(json!({ "error": reason(&error) }))).into_response()
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        let code = if error.is::<Refusal>() {
            StatusCode::CONFLICT
        } else {
            StatusCode::SERVICE_UNAVAILABLE
        };
        Self(code, error)
    }
}

fn wrong(why: impl Into<String>) -> Failed {
    Failed(StatusCode::BAD_REQUEST, anyhow!(why.into()))
}

/// Whether the request has the token; the error says what is wrong.
fn check_token(headers: &HeaderMap, token: &Token) -> Result<(), Failed> {
    // The error names a path, which is nothing for clients.
    let Ok(token) = token.current() else {
        let why = "the file of admin.token_file can't be read at the moment, or its token is too short: nothing can be changed";
        return Err(Failed(StatusCode::SERVICE_UNAVAILABLE, anyhow!(why)));
    };
    let Some(token) = token else {
        let why = "this needs a token, and none is set: set admin.token, RELAY_ADMIN__TOKEN or admin.token_file";
        return Err(Failed(StatusCode::FORBIDDEN, anyhow!(why)));
    };
    let given = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    let same = given.is_some_and(|given| given.ct_eq(token.expose_secret().as_bytes()).into());
    if same {
        return Ok(());
    }
    let why = "this needs the header `Authorization: Bearer` with the token of admin.token";
    Err(Failed(StatusCode::UNAUTHORIZED, anyhow!(why)))
}

/// Before anything of the body is read.
async fn authorized(
    Shared(shown): Shared<Arc<Shown>>,
    request: Request,
    next: Next,
) -> Result<Response, Failed> {
    check_token(request.headers(), &shown.token)?;
    Ok(next.run(request).await)
}

/// Which events, as queries and bodies have it.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Which {
    pipeline: Option<String>,
    id: Option<i64>,
    entity: Option<String>,
    error: Option<String>,
    older_than: Option<String>,
    limit: Option<u32>,
    /// For changes: everything that is parked.
    all: bool,
    dry_run: bool,
    with_waiting: bool,
    reason: Option<String>,
}

impl Which {
    fn selector(&self) -> Result<Selector, Failed> {
        let pipeline = self.pipeline.as_ref().map(|name| name.parse());
        let entity = self.entity.as_ref().map(|name| name.parse());
        let age = self.older_than.as_ref();
        let older_than: Option<Result<Duration, _>> = age.map(|age| {
            humantime::parse_duration(age).map_err(|_| {
                wrong(format!(
                    "older_than = {age:?}: has to be a duration such as \"1h\""
                ))
            })
        });
        Ok(Selector {
            pipeline: pipeline.transpose().map_err(|why: String| wrong(why))?,
            id: self.id.map(EventId),
            entity: entity.transpose().map_err(|why: String| wrong(why))?,
            error: self.error.clone(),
            older_than: older_than.transpose()?,
            ..Selector::default()
        })
    }
}

async fn list(
    Shared(shown): Shared<Arc<Shown>>,
    Query(which): Query<Which>,
) -> Result<Json<ParkedEvents>, Failed> {
    let limit = which.limit.unwrap_or(100).min(LIMIT_MAX);
    let selector = which.selector()?;
    let _turn = shown.database_turns.acquire().await.map_err(Error::from)?;
    let mut database = Database::open(&shown.source).await?;
    Ok(Json(database.parked(&selector, limit).await?))
}

async fn show(
    Shared(shown): Shared<Arc<Shown>>,
    Path((pipeline, id)): Path<(String, i64)>,
    headers: HeaderMap,
) -> Result<Json<ParkedDetail>, Failed> {
    let pipeline: PipelineName = pipeline.parse().map_err(|why: String| wrong(why))?;
    let selector = Selector {
        pipeline: Some(pipeline),
        id: Some(EventId(id)),
        ..Selector::default()
    };
    // Who may change something may see what it is about; to everybody else payloads and headers are nobody's business.
    let trusted = check_token(&headers, &shown.token).is_ok();
    let _turn = shown.database_turns.acquire().await.map_err(Error::from)?;
    let mut database = Database::open(&shown.source).await?;
    let found = database.show(&selector, PAYLOAD_BYTES).await?;
    let Some(mut detail) = found.into_iter().next() else {
        let why = anyhow!("event {id} is not parked");
        return Err(Failed(StatusCode::NOT_FOUND, why));
    };
    if !trusted {
        (detail.payload, detail.payload_hex, detail.headers) = (None, None, None);
    }
    Ok(Json(detail))
}

async fn acts(
    Shared(shown): Shared<Arc<Shown>>,
    Query(which): Query<Which>,
) -> Result<Json<Vec<NotedAct>>, Failed> {
    let limit = which.limit.unwrap_or(50).min(LIMIT_MAX);
    let _turn = shown.database_turns.acquire().await.map_err(Error::from)?;
    let mut database = Database::open(&shown.source).await?;
    Ok(Json(database.acts(limit).await?))
}

async fn redrive(
    Shared(shown): Shared<Arc<Shown>>,
    Extension(peer): Extension<Peer>,
    body: Result<Json<Which>, JsonRejection>,
) -> Result<Json<Value>, Failed> {
    ask(&shown, peer, Action::Redrive, body).await
}

async fn drop_events(
    Shared(shown): Shared<Arc<Shown>>,
    Extension(peer): Extension<Peer>,
    body: Result<Json<Which>, JsonRejection>,
) -> Result<Json<Value>, Failed> {
    ask(&shown, peer, Action::Drop, body).await
}

async fn ask(
    shown: &Shown,
    Peer(peer): Peer,
    action: Action,
    body: Result<Json<Which>, JsonRejection>,
) -> Result<Json<Value>, Failed> {
    let Json(which) =
        body.map_err(|rejection| Failed(rejection.status(), anyhow!(rejection.body_text())))?;
    let selector = which.selector()?;
    if selector.is_everything() && !which.all {
        return Err(wrong(
            "say which events: \"id\", \"entity\", \"error\", \"older_than\", or \"all\": true",
        ));
    }
    if action == Action::Drop && which.reason.is_none() {
        return Err(wrong("say why: \"reason\""));
    }
    let wish = Wish {
        action,
        selector,
        with_waiting: which.with_waiting && action == Action::Drop,
        who: format!("http {peer}"),
        reason: which.reason,
    };
    let _turn = shown.database_turns.acquire().await.map_err(Error::from)?;
    let mut database = Database::open(&shown.source).await?;
    if which.dry_run {
        if let Some(refusal) = database.refusal(&wish).await? {
            return Err(Error::from(refusal).into());
        }
        let would = database.parked(&wish.selector, LIMIT_MAX).await?;
        return Ok(Json(json!({ "dry_run": true, "would": would })));
    }
    let marked = database.mark(&wish).await?;
    for marked in &marked {
        tracing::info!(
            pipeline = marked.pipeline,
            events = marked.events,
            action = action.as_str(),
            who = wish.who,
            "asked for parked events"
        );
    }
    Ok(Json(json!({ "marked": marked })))
}
