//! Parked events and acts over HTTP: the same as the commands see and ask for. All of it needs the token, for it names
//! entities and operators.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Error, anyhow};
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{Path, Query, Request, State as Shared};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::{Value, json};
use subtle::ConstantTimeEq;

use super::Shown;
use super::serve::Client;
use super::sessions::ANSWERS_MAX;
use crate::database::Refusal;
use crate::event::{EventId, PipelineName};
use crate::ledger::acts::{
    Action, NotedAct, Paging, ParkedDetail, ParkedEvents, Place, Selector, Wish,
};
use crate::reason::reason;

/// Of the payload of one event.
const PAYLOAD_BYTES: u32 = 1 << 20;
/// Events or acts of one page.
const LIMIT_MAX: u32 = 1_000;
const LIMIT: u32 = 100;
/// Of a reason or a text to look for.
const TEXT_BYTES_MAX: usize = 1_000;

pub(super) fn routes(shown: &Arc<Shown>) -> Router<Arc<Shown>> {
    Router::new()
        .route("/parked", get(list))
        .route("/parked/{pipeline}/{id}", get(show))
        .route("/acts", get(acts))
        .route("/parked/redrive", post(redrive))
        .route("/parked/drop", post(drop_events))
        .route_layer(middleware::from_fn_with_state(shown.clone(), authorized))
}

/// An answer that is not what was asked for.
pub(super) struct Failed(StatusCode, Error);

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

impl From<QueryRejection> for Failed {
    fn from(rejection: QueryRejection) -> Self {
        wrong(rejection.body_text())
    }
}

impl From<PathRejection> for Failed {
    fn from(rejection: PathRejection) -> Self {
        wrong(rejection.body_text())
    }
}

impl From<JsonRejection> for Failed {
    fn from(rejection: JsonRejection) -> Self {
        match rejection {
            // The type of the content, and too much of it.
            JsonRejection::MissingJsonContentType(_) | JsonRejection::BytesRejection(_) => {
                Self(rejection.status(), anyhow!(rejection.body_text()))
            }
            rejection => wrong(rejection.body_text()),
        }
    }
}

/// Whether the request has the token.
pub(super) fn has_token(headers: &HeaderMap, token: Option<&SecretString>) -> bool {
    let given = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    token
        .zip(given)
        .is_some_and(|(token, given)| given.ct_eq(token.expose_secret().as_bytes()).into())
}

/// Before anything of the body is read.
async fn authorized(
    Shared(shown): Shared<Arc<Shown>>,
    request: Request,
    next: Next,
) -> Result<Response, Failed> {
    // The error names a path, which is nothing for clients.
    let Ok(token) = shown.token.current() else {
        let why =
            "the file of admin.token_file can't be read at the moment, or its token is too short";
        return Err(Failed(StatusCode::SERVICE_UNAVAILABLE, anyhow!(why)));
    };
    if token.is_none() {
        let why = "this needs a token, and none is set: set admin.token, RELAY_ADMIN__TOKEN or admin.token_file, and \
                   start the relay again";
        return Err(Failed(StatusCode::FORBIDDEN, anyhow!(why)));
    }
    if !has_token(request.headers(), token.as_ref()) {
        let why = "this needs the header `Authorization: Bearer` with the token of admin.token";
        return Err(Failed(StatusCode::UNAUTHORIZED, anyhow!(why)));
    }
    Ok(next.run(request).await)
}

/// Leave to use the database for one answer, until the client has read it.
fn admit(shown: &Shown, client: &Client) -> Result<(), Failed> {
    let Some(permit) = shown.sessions.admit() else {
        let why = format!(
            "{ANSWERS_MAX} answers that need the database are under way, and no more are made at once: ask again"
        );
        return Err(Failed(StatusCode::SERVICE_UNAVAILABLE, anyhow!(why)));
    };
    client.hold(permit);
    Ok(())
}

/// Which events, as queries have it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    pipeline: Option<String>,
    id: Option<i64>,
    entity: Option<String>,
    error: Option<String>,
    older_than: Option<String>,
    limit: Option<u32>,
    after: Option<String>,
}

/// Which acts.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ListActs {
    limit: Option<u32>,
    after: Option<i64>,
}

/// What is to be done with which events, as bodies have it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    pipeline: Option<String>,
    id: Option<i64>,
    entity: Option<String>,
    error: Option<String>,
    older_than: Option<String>,
    /// Everything that is parked.
    #[serde(default)]
    all: bool,
    #[serde(default)]
    dry_run: bool,
    #[serde(default)]
    with_waiting: bool,
    reason: Option<String>,
}

/// A text that a person gave: there, short, and one that the database takes.
fn text(name: &str, given: Option<String>) -> Result<Option<String>, Failed> {
    let Some(given) = given else {
        return Ok(None);
    };
    if given.trim().is_empty() {
        return Err(wrong(format!("{name} is empty: leave it out, or say one")));
    }
    if given.contains('\0') {
        return Err(wrong(format!(
            "{name} contains U+0000, which no text in the database can have"
        )));
    }
    if given.len() > TEXT_BYTES_MAX {
        return Err(wrong(format!(
            "{name} has {} bytes, and may have {TEXT_BYTES_MAX}",
            given.len()
        )));
    }
    Ok(Some(given))
}

fn selector(
    pipeline: Option<String>,
    id: Option<i64>,
    entity: Option<String>,
    error: Option<String>,
    older_than: Option<String>,
) -> Result<Selector, Failed> {
    let pipeline = text("pipeline", pipeline)?.map(|name| name.parse());
    let entity = text("entity", entity)?.map(|name| name.parse());
    let older_than: Option<Result<Duration, _>> = text("older_than", older_than)?.map(|age| {
        humantime::parse_duration(&age).map_err(|_| {
            wrong(format!(
                "older_than = {age:?}: has to be a duration such as \"1h\""
            ))
        })
    });
    Ok(Selector {
        pipeline: pipeline.transpose().map_err(|why: String| wrong(why))?,
        id: id.map(EventId),
        entity: entity.transpose().map_err(|why: String| wrong(why))?,
        error: text("error", error)?,
        older_than: older_than.transpose()?,
        ..Selector::default()
    })
}

fn limit(given: Option<u32>) -> Result<u32, Failed> {
    match given.unwrap_or(LIMIT) {
        limit @ 1..=LIMIT_MAX => Ok(limit),
        limit => Err(wrong(format!(
            "limit = {limit}: a page has 1 to {LIMIT_MAX} rows; the next one begins with `after`"
        ))),
    }
}

async fn list(
    Shared(shown): Shared<Arc<Shown>>,
    Extension(client): Extension<Client>,
    query: Result<Query<List>, QueryRejection>,
) -> Result<Json<ParkedEvents>, Failed> {
    let Query(List {
        pipeline,
        id,
        entity,
        error,
        older_than,
        limit,
        after,
    }) = query?;
    let after = text("after", after)?.map(|place| place.parse::<Place>());
    let paging = Paging {
        limit: self::limit(limit)?,
        after: after
            .transpose()
            .map_err(|why| wrong(format!("after: {why}")))?,
    };
    let selector = selector(pipeline, id, entity, error, older_than)?;
    admit(&shown, &client)?;
    let mut session = shown.sessions.open().await?;
    let parked = session.database.parked(&selector, &paging).await?;
    session.give_back();
    Ok(Json(parked))
}

async fn show(
    Shared(shown): Shared<Arc<Shown>>,
    Extension(client): Extension<Client>,
    path: Result<Path<(String, i64)>, PathRejection>,
) -> Result<Json<ParkedDetail>, Failed> {
    let Path((pipeline, id)) = path?;
    let pipeline: PipelineName = pipeline.parse().map_err(|why: String| wrong(why))?;
    let selector = Selector {
        pipeline: Some(pipeline),
        id: Some(EventId(id)),
        ..Selector::default()
    };
    admit(&shown, &client)?;
    let mut session = shown.sessions.open().await?;
    let found = session.database.show(&selector, PAYLOAD_BYTES).await?;
    session.give_back();
    let Some(detail) = found.into_iter().next() else {
        let why = anyhow!("event {id} is not parked");
        return Err(Failed(StatusCode::NOT_FOUND, why));
    };
    Ok(Json(detail))
}

async fn acts(
    Shared(shown): Shared<Arc<Shown>>,
    Extension(client): Extension<Client>,
    query: Result<Query<ListActs>, QueryRejection>,
) -> Result<Json<Vec<NotedAct>>, Failed> {
    let Query(ListActs { limit, after }) = query?;
    let limit = self::limit(limit)?;
    admit(&shown, &client)?;
    let mut session = shown.sessions.open().await?;
    let acts = session.database.acts(limit, after).await?;
    session.give_back();
    Ok(Json(acts))
}

async fn redrive(
    Shared(shown): Shared<Arc<Shown>>,
    Extension(client): Extension<Client>,
    body: Result<Json<Change>, JsonRejection>,
) -> Result<Json<Value>, Failed> {
    ask(&shown, &client, Action::Redrive, body).await
}

async fn drop_events(
    Shared(shown): Shared<Arc<Shown>>,
    Extension(client): Extension<Client>,
    body: Result<Json<Change>, JsonRejection>,
) -> Result<Json<Value>, Failed> {
    ask(&shown, &client, Action::Drop, body).await
}

async fn ask(
    shown: &Shown,
    client: &Client,
    action: Action,
    body: Result<Json<Change>, JsonRejection>,
) -> Result<Json<Value>, Failed> {
    let Json(change) = body?;
    let dry_run = change.dry_run;
    let wish = wish(change, action, client)?;
    admit(shown, client)?;
    let mut session = shown.sessions.open().await?;
    if dry_run {
        if let Some(refusal) = session.database.refusal(&wish).await? {
            return Err(Error::from(refusal).into());
        }
        let first = Paging::first(LIMIT);
        let would = session.database.parked(&wish.selector, &first).await?;
        session.give_back();
        return Ok(Json(json!({ "dry_run": true, "would": would })));
    }
    let marked = session.database.mark(&wish).await?;
    session.give_back();
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

/// What a body asks for, unless it is not clear or not complete.
fn wish(change: Change, action: Action, client: &Client) -> Result<Wish, Failed> {
    let Change {
        pipeline,
        id,
        entity,
        error,
        older_than,
        all,
        dry_run: _,
        with_waiting,
        reason,
    } = change;
    let reason = text("reason", reason)?;
    let selector = selector(pipeline, id, entity, error, older_than)?;
    // An age of nothing is everybody's age.
    let narrows = !selector.is_everything()
        && (selector.older_than != Some(Duration::ZERO)
            || selector.id.is_some()
            || selector.entity.is_some()
            || selector.error.is_some());
    if !narrows && !all {
        return Err(wrong(
            "say which events: \"id\", \"entity\", \"error\", \"older_than\", or \"all\": true",
        ));
    }
    if narrows && all {
        return Err(wrong(
            "\"all\": true and a narrower choice exclude each other: leave one of them out",
        ));
    }
    if action == Action::Drop && reason.is_none() {
        return Err(wrong("say why: \"reason\""));
    }
    if action == Action::Redrive && with_waiting {
        return Err(wrong(
            "\"with_waiting\" is for drop: what waits behind a redriven event follows by itself",
        ));
    }
    Ok(Wish {
        action,
        selector,
        with_waiting,
        who: format!("http {}", client.address),
        reason,
    })
}
