//! What stands before every route: who calls, whether that role may, how long it may take, and the
//! traces and numbers that come out of it.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{FromRequestParts, MatchedPath, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::FutureExt;
use ghost_application::fleet::CoreReach;
use ghost_domain::fleet::FleetPrincipal;
use ghost_domain::{Error, ErrorCode, Principal, Result, Secret};
use tracing::{Instrument, Span};

use super::Shell;
use super::compat::{self, BatwaFailure};
use super::guest::connect::{self, ConnectFailure};
use super::problem::Failure;
use super::routes::{self, Route};
use crate::access::{Access, Shape};
use crate::connection::Peer;
use crate::core_caller;
use crate::request::{CalledAs, REQUEST_ID, request_id, shown_key};

/// The middleware.
pub(super) async fn guard(
    State(shell): State<Arc<Shell>>,
    mut request: Request,
    next: Next,
) -> Response {
    let begun = Instant::now();
    let id = request_id(request.headers());
    request.extensions_mut().insert(CalledAs(id.clone()));
    let verb = known_method(request.method().as_str());
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .and_then(|path| routes::route(request.method(), path.as_str()));
    // Unknown paths share one name: what strangers send must not become label values.
    let path = route.map_or("unknown", |route| route.path);
    let span = tracing::info_span!(
        "http",
        otel.kind = "server",
        http.request.method = verb,
        http.route = path,
        request_id = %id,
        principal = tracing::field::Empty,
        role = tracing::field::Empty,
        http.response.status_code = tracing::field::Empty,
    );
    if let Some(trace) = &shell.options.trace {
        trace(request.headers(), &span);
    }
    let within = span.clone();
    async move {
        let mut response = pass(&shell, route, request, next)
            .await
            .unwrap_or_else(|error| fail(path, error));
        let headers = response.headers_mut();
        if let Ok(value) = HeaderValue::from_str(&id) {
            headers.insert(REQUEST_ID, value);
        }
        headers.insert(
            header::X_CONTENT_TYPE_OPTIONS,
            HeaderValue::from_static("nosniff"),
        );
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        let status = response.status().as_u16();
        within.record("http.response.status_code", status);
        let took = begun.elapsed();
        shell.recorder.http(verb, path, status, took);
        let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        // Who is turned away is worth a line by itself; all else can be asked for.
        if matches!(status, 401 | 403) {
            tracing::info!(status, took_ms, "refused");
        } else {
            tracing::debug!(status, took_ms, "answered");
        }
        response
    }
    .instrument(span)
    .await
}

/// An error in the form that callers of the route know.
fn fail(path: &str, error: Error) -> Response {
    if path.starts_with(connect::PREFIX) {
        return ConnectFailure(error).into_response();
    }
    if compat::is_batwa(path) {
        return BatwaFailure(error).into_response();
    }
    Failure(error).into_response()
}

async fn pass(
    shell: &Arc<Shell>,
    route: Option<&'static Route>,
    mut request: Request,
    next: Next,
) -> Result<Response> {
    let Some(route) = route else {
        return Err(Error::new(ErrorCode::NotFound, "there is no such route")
            .hint("see /v1/openapi.json for those there are"));
    };
    let from_core = matches!(request.extensions().get::<Peer>(), Some(Peer::Core));
    let shown = if from_core {
        // A key has no place on a call that Core forwards: who calls is Core's to say.
        core_caller::read(request.headers()).map(|caller| Shown::Core(caller, route.core))
    } else {
        key_of(request.headers()).map(Shown::Key)
    };
    // Whoever else says it lies.
    core_caller::strip(request.headers_mut());
    if route.access != Access::Anyone {
        let shown = shown?;
        let principal = shown.principal(shell, route.access).await?;
        let span = Span::current();
        span.record("principal", principal.name.as_str());
        span.record("role", principal.role.as_str());
        let access = route.access;
        access.check(&principal)?;
        request.extensions_mut().insert(principal);
        request
            .extensions_mut()
            .insert(PresentedKey { shown, access });
    }
    let _room = match route.shape {
        Shape::Stream => None,
        Shape::Unary | Shape::Long(_) => Some(shell.room.try_acquire().map_err(|_| {
            Error::new(ErrorCode::TooManyRequests, "too many requests at once")
                .hint("try again in a moment")
                .retry_after(Duration::from_secs(1))
        })?),
    };
    // A panic in a handler is our fault and one request's end, not the connection's.
    let call = AssertUnwindSafe(next.run(request)).catch_unwind();
    let answered = match route.shape.deadline(shell.options.timeout) {
        None => call.await,
        Some(deadline) => tokio::time::timeout(deadline, call).await.map_err(|_| {
            Error::new(ErrorCode::DeadlineExceeded, "the request took too long")
                .because(format!("it was given up after {} s", deadline.as_secs()))
                .hint("what it began may still take effect: look, then try again")
        })?,
    };
    answered.map_err(|_| Error::internal("the agent stumbled over this request"))
}

/// How a request shows who makes it.
#[derive(Clone, Debug)]
enum Shown {
    Key(Secret),
    /// Core says it, on a stream of its own.
    Core(FleetPrincipal, CoreReach),
}

impl Shown {
    async fn principal(&self, shell: &Shell, access: Access) -> Result<Principal> {
        let all = &shell.use_cases;
        match self {
            Self::Key(key) => all.authenticate_key.execute(key).await,
            Self::Core(caller, reach) => {
                all.admit_core.execute(caller, *reach, access.least_role())
            }
        }
    }
}

/// What a request came with, for what outlasts the request.
#[derive(Clone, Debug)]
pub(super) struct PresentedKey {
    shown: Shown,
    access: Access,
}

impl PresentedKey {
    /// Whether the request would be let in again.
    ///
    /// # Errors
    /// `Unauthenticated`, `PermissionDenied`.
    pub(super) async fn check(&self, shell: &Shell) -> Result<()> {
        let principal = self.shown.principal(shell, self.access).await?;
        self.access.check(&principal)
    }
}

impl<S: Sync> FromRequestParts<S> for PresentedKey {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Failure> {
        parts.extensions.get::<Self>().cloned().ok_or_else(|| {
            Failure(Error::new(
                ErrorCode::Unauthenticated,
                "the request has no identity",
            ))
        })
    }
}

/// The key of `Authorization: Bearer KEY` or `X-API-Key: KEY`; for a WebSocket also that of the
/// subprotocol `bearer.KEY`, because a page can give one no headers.
fn key_of(headers: &HeaderMap) -> Result<Secret> {
    shown_key(headers)
        .or_else(|| subprotocol(headers))
        .map(Secret::new)
        .ok_or_else(|| {
            Error::new(ErrorCode::Unauthenticated, "a key is needed")
                .because("neither Authorization: Bearer nor X-API-Key carries one")
                .hint("make one on the host: ghostctl key create NAME --role ROLE")
        })
}

/// The key of a WebSocket that a page opens.
pub(super) fn subprotocol(headers: &HeaderMap) -> Option<String> {
    let upgrade = headers.get(header::UPGRADE)?.to_str().ok()?;
    if !upgrade.eq_ignore_ascii_case("websocket") {
        return None;
    }
    headers
        .get_all(header::SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .find_map(|one| one.trim().strip_prefix("bearer."))
        .map(str::to_owned)
}

/// Methods are an open set: those that nobody serves share one name.
fn known_method(method: &str) -> &'static str {
    ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
        .into_iter()
        .find(|known| *known == method)
        .unwrap_or("other")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_in_either_header() {
        let mut headers = HeaderMap::new();
        assert_eq!(
            key_of(&headers).unwrap_err().code(),
            ErrorCode::Unauthenticated
        );
        headers.insert("x-api-key", HeaderValue::from_static("ghost_a_b"));
        assert_eq!(key_of(&headers).unwrap().expose(), "ghost_a_b");
        headers.insert(
            header::AUTHORIZATION,
            HeaderValue::from_static("Basic Zm9v"),
        );
        assert_eq!(key_of(&headers).unwrap().expose(), "ghost_a_b");
        headers.insert(
            header::AUTHORIZATION,
            HeaderValue::from_static("bearer  ghost_c_d "),
        );
        assert_eq!(key_of(&headers).unwrap().expose(), "ghost_c_d");
    }

    #[test]
    fn a_page_gives_its_key_as_a_subprotocol_of_a_websocket_and_nowhere_else() {
        let mut headers = HeaderMap::new();
        headers.insert(
            header::SEC_WEBSOCKET_PROTOCOL,
            HeaderValue::from_static("ghost.v1, bearer.ghost_a_b"),
        );
        assert!(key_of(&headers).is_err());
        headers.insert(header::UPGRADE, HeaderValue::from_static("WebSocket"));
        assert_eq!(key_of(&headers).unwrap().expose(), "ghost_a_b");
    }
}
