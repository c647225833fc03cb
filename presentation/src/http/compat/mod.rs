//! The routes of Batwa, a web interface with agents in front of Multipass, for its clients: on an
//! agent over its own VMs, on Core over those of all hosts of the caller's tenant.
//!
//! Nothing is decided here. The handlers read what such a client sends, ask a [`Backend`] and write
//! what such a client reads; the backend of an agent ([`local`]) calls the use cases behind the
//! guard of all routes, Core's makes the calls of gRPC through Core's own guard. What is known of
//! the original is the names of its routes and some of its fields; the rest is chosen as plain as it
//! can be and written down in docs/API.md.
//!
//! Where the original was at fault this differs on purpose:
//! - every route needs the key, the terminal included, and no key in an address is taken;
//! - `execute` runs a program in a guest and never anything on the host;
//! - a heartbeat by key makes no host online: that is what comes over its link;
//! - a registration enrols nobody and `api_url` is never dialled: a host proves who it is by its
//!   certificate;
//! - what is not there is 404 and not 500; pages of other origins get no terminal.

mod bodies;
mod calls;
mod local;
mod terminal;

use std::convert::Infallible;
use std::sync::Arc;

use async_trait::async_trait;
use axum::extract::{FromRequestParts, MatchedPath, Request, State};
use axum::http::request::Parts;
use axum::http::{Extensions, HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use ghost_domain::ports::ExecSession;
use ghost_domain::{Error, ErrorCode, Result};
use ghost_proto::agent::v1 as message;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::guard::subprotocol;
use super::problem::{Failure, PROBLEM_JSON, Problem};
use super::routes::{Route, batwa_route};

pub use bodies::{BatwaAgent, BatwaVm};
pub use calls::SETTLE;
pub(super) use local::Local;

/// Who asks, as the shell's own guard left it on the request.
#[derive(Clone, Debug)]
pub struct Asker {
    /// The headers, with the key of a WebSocket that a page opened as `Authorization`.
    pub headers: HeaderMap,
    /// What the shell put there.
    pub extensions: Extensions,
}

impl Asker {
    fn of(headers: &HeaderMap, extensions: &Extensions) -> Self {
        let mut headers = headers.clone();
        if let Some(key) = subprotocol(&headers)
            && let Ok(value) = format!("Bearer {key}").parse()
        {
            headers.insert(header::AUTHORIZATION, value);
        }
        Self {
            headers,
            extensions: extensions.clone(),
        }
    }
}

impl<S: Sync> FromRequestParts<S> for Asker {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(Self::of(&parts.headers, &parts.extensions))
    }
}

/// Which VMs, where.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Only of this name.
    pub name: Option<String>,
    /// Only on this host.
    pub agent_id: Option<String>,
}

/// What to do with a VM.
#[derive(Clone, Debug)]
pub enum Change {
    /// Start it.
    Start(message::StartVmRequest),
    /// Stop it.
    Stop(message::StopVmRequest),
    /// Delete it with its disks.
    Delete(message::DeleteVmRequest),
}

/// What was begun.
#[derive(Clone, Debug)]
pub struct Begun {
    /// How far it came within [`SETTLE`].
    pub operation: message::Operation,
    /// On which host.
    pub agent_id: String,
    /// Why there, where it was placed.
    pub placement: Option<String>,
}

/// What the routes act on. Every method checks the asker's rights as the native routes do.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// Lets a request in before its body is read, or refuses it by what `route` declares. What it
    /// puts into the asker's extensions the other methods find there.
    async fn admit(&self, asker: &mut Asker, route: &'static Route) -> Result<()>;
    /// The hosts that the asker sees.
    async fn agents(&self, asker: &Asker) -> Result<Vec<BatwaAgent>>;
    /// The host of exactly this name or id.
    ///
    /// # Errors
    /// `HostNotFound`.
    async fn agent(&self, asker: &Asker, agent_id: &str) -> Result<BatwaAgent>;
    /// Takes a host out of the fleet; one that is in use only with `force`. Its VMs go on.
    ///
    /// # Errors
    /// `HostNotFound`, `WrongState`.
    async fn unregister(&self, asker: &Asker, agent_id: &str, force: bool) -> Result<()>;
    /// VMs by host and name.
    async fn vms(&self, asker: &Asker, wanted: Wanted) -> Result<Vec<BatwaVm>>;
    /// Makes a VM, on a host or where there is room.
    async fn create(
        &self,
        asker: &Asker,
        agent_id: Option<String>,
        request: message::CreateVmRequest,
    ) -> Result<Begun>;
    /// Changes a VM.
    async fn change(&self, asker: &Asker, agent_id: &str, change: Change) -> Result<Begun>;
    /// Runs a program in a VM; the request names the VM.
    async fn execute(
        &self,
        asker: &Asker,
        agent_id: &str,
        request: message::ExecStart,
    ) -> Result<ExecSession>;
    /// Ends once a session of the asker must, with the reason.
    async fn called_off(&self, asker: Asker) -> Error;
}

/// What the handlers have.
pub(super) type Batwa = Arc<dyn Backend>;

/// An error on its way to a client of these: a problem document, whose `detail` is where such a
/// client looks. Who may not in is 403 there, with or without a key.
#[derive(Debug)]
pub(super) struct BatwaFailure(pub(super) Error);

impl From<Error> for BatwaFailure {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl From<Failure> for BatwaFailure {
    fn from(Failure(error): Failure) -> Self {
        Self(error)
    }
}

impl IntoResponse for BatwaFailure {
    fn into_response(self) -> Response {
        let Self(error) = self;
        if !matches!(
            error.code(),
            ErrorCode::Unauthenticated | ErrorCode::TokenInvalid
        ) {
            return Failure(error).into_response();
        }
        let status = StatusCode::FORBIDDEN;
        let problem = Problem {
            status: status.as_u16(),
            ..Problem::from(&error)
        };
        (
            status,
            [(header::CONTENT_TYPE, PROBLEM_JSON)],
            Json(problem),
        )
            .into_response()
    }
}

/// What a handler answers with.
type Answer = std::result::Result<Response, BatwaFailure>;

/// Whether a route is one of these.
pub(super) fn is_batwa(path: &str) -> bool {
    path.starts_with("/api/") || path == "/ws"
}

/// The OpenAPI document of these routes alone.
pub fn openapi() -> utoipa::openapi::OpenApi {
    described().into_openapi()
}

/// The routes over `backend`, for a router that names requests and, on an agent, guards them.
pub fn router<S: Clone + Send + Sync + 'static>(backend: Arc<dyn Backend>) -> Router<S> {
    let (router, _) = described().split_for_parts();
    router
        .layer(axum::middleware::from_fn_with_state(
            Arc::clone(&backend),
            door,
        ))
        .with_state(backend)
}

async fn door(State(batwa): State<Batwa>, mut request: Request, next: Next) -> Response {
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .and_then(|path| batwa_route(request.method(), path.as_str()));
    let mut asker = Asker::of(request.headers(), request.extensions());
    let admitted = match route {
        Some(route) => batwa.admit(&mut asker, route).await,
        // The router answers 405 by itself.
        None => Ok(()),
    };
    match admitted {
        Ok(()) => {
            *request.extensions_mut() = asker.extensions;
            next.run(request).await
        }
        Err(error) => BatwaFailure(error).into_response(),
    }
}

fn described() -> OpenApiRouter<Batwa> {
    OpenApiRouter::new()
        .routes(routes!(calls::register))
        .routes(routes!(calls::list_agents))
        .routes(routes!(calls::agent_info))
        .routes(routes!(calls::heartbeat))
        .routes(routes!(calls::unregister))
        .routes(routes!(calls::list_vms))
        .routes(routes!(calls::vm_info))
        .routes(routes!(calls::create_vm))
        .routes(routes!(calls::start_vm))
        .routes(routes!(calls::stop_vm))
        .routes(routes!(calls::delete_vm))
        .routes(routes!(calls::execute))
        .routes(routes!(terminal::terminal))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::access::Access;
    use crate::http::routes::{BATWA_ROUTES, ROUTES};

    #[test]
    fn no_body_takes_the_name_of_one_of_ours() {
        let names = |document: utoipa::openapi::OpenApi| {
            let components = document.components.unwrap_or_default();
            components.schemas.into_keys().collect::<BTreeSet<_>>()
        };
        let native = names(crate::http::openapi(&Default::default()));
        let own: Vec<_> = names(openapi())
            .into_iter()
            .filter(|name| !name.starts_with("Batwa"))
            .collect();
        assert_eq!(own, ["FieldViolation", "Problem"]);
        assert!(native.iter().all(|name| !name.starts_with("Batwa")));
    }

    #[test]
    fn every_route_declares_its_role_and_needs_a_key() {
        let document = serde_json::to_value(openapi()).unwrap();
        let mut described = BTreeSet::new();
        for (path, methods) in document["paths"].as_object().unwrap() {
            assert!(is_batwa(path), "{path}");
            for (method, route) in methods.as_object().unwrap() {
                described.insert((method.to_uppercase(), path.clone()));
                assert!(route["security"].is_array(), "{method} {path}");
                assert!(route["summary"].is_string(), "{method} {path}");
            }
        }
        let declared: BTreeSet<_> = BATWA_ROUTES
            .iter()
            .map(|route| (route.method.to_owned(), route.path.to_owned()))
            .collect();
        assert_eq!(declared, described);
        assert_eq!(declared.len(), BATWA_ROUTES.len(), "a route stands twice");
        for route in BATWA_ROUTES {
            assert_ne!(route.access, Access::Anyone, "{}", route.path);
            assert!(ROUTES.iter().all(|native| native.path != route.path));
        }
    }
}
