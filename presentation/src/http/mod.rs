//! The HTTP shell: the same use cases as gRPC's, as JSON for programs that would rather not.
//!
//! A change answers 202 with its operation and where to follow it. Errors are the problem documents
//! of [`problem`]. Everything but the health routes needs a key and the role of [`routes::ROUTES`].

mod bodies;
pub mod compat;
pub mod events;
pub mod extract;
mod guard;
mod guest;
mod health;
mod host;
mod images;
mod operations;
pub mod problem;
pub mod routes;
mod server;
mod vms;

pub use server::{ServerOptions, serve};

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use ghost_application::{OperationView, UseCases};
use ghost_domain::{Error, ErrorCode};
use ghost_proto::view;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use utoipa::OpenApi;
use utoipa::openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::TraceParent;
use crate::convert::{self, AgentInfo};
use crate::metrics::Recorder;
use problem::Failure;

/// What the composition root decides.
#[derive(Clone)]
pub struct Options {
    /// Shown in the host's status and the OpenAPI document.
    pub agent: AgentInfo,
    /// Ties a request's span to the caller's trace.
    pub trace: Option<TraceParent>,
    /// How long a request may take, uploads and streams aside.
    pub timeout: Duration,
    /// Most requests at once, streams aside.
    pub most_requests: usize,
    /// How often the key behind a session is looked at again: how late a revocation counts.
    pub recheck: Duration,
    /// Whether the routes of Batwa are served too.
    pub batwa: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            agent: AgentInfo::default(),
            trace: None,
            timeout: Duration::from_secs(30),
            most_requests: 256,
            recheck: Duration::from_secs(15),
            batwa: false,
        }
    }
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("agent", &self.agent)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

/// What every route may need.
struct Shell {
    use_cases: Arc<UseCases>,
    recorder: Arc<Recorder>,
    options: Options,
    room: Semaphore,
    /// Ends streams.
    shutdown: CancellationToken,
    /// Told apart from other runs of the agent: event ids of another run mean nothing in this one.
    run: String,
    document: String,
}

/// What a handler answers with.
type Answer = Result<Response, Failure>;

/// The router with all routes; streams end when `shutdown` is cancelled.
pub fn router(
    use_cases: Arc<UseCases>,
    recorder: Arc<Recorder>,
    options: Options,
    shutdown: CancellationToken,
) -> Router {
    let (router, mut document) = described(&options.agent).split_for_parts();
    let batwa = options.batwa;
    if batwa {
        document.merge(compat::openapi());
    }
    let shell = Arc::new(Shell {
        use_cases,
        recorder,
        room: Semaphore::new(options.most_requests),
        options,
        shutdown,
        run: uuid::Uuid::new_v4().simple().to_string(),
        document: document.to_json().unwrap_or_default(),
    });
    let router = if batwa {
        router.merge(compat::router(Arc::new(compat::Local(Arc::clone(&shell)))))
    } else {
        router
    };
    router
        .fallback(nothing)
        .method_not_allowed_fallback(nothing)
        .layer(axum::middleware::from_fn_with_state(
            Arc::clone(&shell),
            guard::guard,
        ))
        .with_state(shell)
}

async fn nothing() -> Failure {
    Failure(
        Error::new(ErrorCode::NotFound, "there is no such route")
            .hint("see /v1/openapi.json for those there are"),
    )
}

/// The OpenAPI document, as `/v1/openapi.json` serves it.
pub fn openapi(agent: &AgentInfo) -> utoipa::openapi::OpenApi {
    described(agent).into_openapi()
}

#[derive(OpenApi)]
#[openapi(info(
    title = "Ghost agent",
    description = "Virtual machines of one host. A change answers 202 with its operation."
))]
struct Document;

fn described(agent: &AgentInfo) -> OpenApiRouter<Arc<Shell>> {
    let mut document = Document::openapi();
    document.info.version.clone_from(&agent.version);
    let components = document.components.get_or_insert_default();
    components.add_security_scheme(
        "bearer",
        SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build()),
    );
    components.add_security_scheme(
        "key",
        SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::new("X-API-Key"))),
    );
    OpenApiRouter::with_openapi(document)
        .routes(routes!(health::health))
        .routes(routes!(health::live))
        .routes(routes!(health::ready))
        .routes(routes!(host::document))
        .routes(routes!(host::status))
        .routes(routes!(host::list_networks))
        .routes(routes!(host::get_network))
        .routes(routes!(vms::list, vms::create))
        .routes(routes!(vms::get, vms::update, vms::delete))
        .routes(routes!(vms::start))
        .routes(routes!(vms::stop))
        .routes(routes!(vms::restart))
        .routes(routes!(vms::pause))
        .routes(routes!(vms::resume))
        .routes(routes!(vms::logs))
        .routes(routes!(images::list, images::pull))
        .routes(routes!(images::get, images::import, images::delete))
        .routes(routes!(images::catalogue))
        .routes(routes!(operations::list))
        .routes(routes!(operations::get, operations::cancel))
        .routes(routes!(events::watch))
        .routes(routes!(guest::exec, guest::exec_session))
        .routes(routes!(guest::shell))
        .routes(routes!(guest::console))
        .routes(routes!(guest::read_file, guest::write_file))
        .routes(routes!(guest::guest_status))
        .routes(routes!(guest::ping))
        .routes(routes!(guest::history))
        .routes(routes!(guest::register_address))
        .routes(routes!(guest::shut_down))
        .routes(routes!(guest::set_password))
        .routes(routes!(guest::update_ssh_keys))
        .routes(routes!(guest::sync_clock))
        .routes(routes!(guest::update_agent))
        .routes(routes!(guest::set_access))
        .routes(routes!(guest::freeze))
        .routes(routes!(guest::thaw))
        .routes(routes!(guest::get_lockdown, guest::set_lockdown))
        .routes(routes!(guest::list_audit))
        .routes(routes!(guest::verify_audit))
        .routes(routes!(guest::connect::ping_agent))
        .routes(routes!(guest::connect::execute_script))
        .routes(routes!(guest::connect::read_guest_file))
        .routes(routes!(guest::connect::write_guest_file))
        .routes(routes!(guest::connect::guest_shutdown))
}

/// 202 with the operation, and where to follow it.
fn accepted(view: &OperationView) -> Response {
    let body = view::Operation::from(convert::operation(view));
    let location = format!("/v1/operations/{}", body.id);
    (
        StatusCode::ACCEPTED,
        [(header::LOCATION, location)],
        axum::Json(body),
    )
        .into_response()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::access::Access;

    #[test]
    fn every_route_declares_its_role_and_no_other_is_declared() {
        let document = serde_json::to_value(openapi(&AgentInfo::default())).unwrap();
        let mut described = BTreeSet::new();
        for (path, methods) in document["paths"].as_object().unwrap() {
            for (method, route) in methods.as_object().unwrap() {
                described.insert((method.to_uppercase(), path.clone()));
                let open = routes::ROUTES
                    .iter()
                    .any(|one| one.path == path && one.access == Access::Anyone);
                assert_eq!(route.get("security").is_none(), open, "{method} {path}");
                assert!(route["summary"].is_string(), "{method} {path}");
            }
        }
        let declared: BTreeSet<_> = routes::ROUTES
            .iter()
            .map(|route| (route.method.to_owned(), route.path.to_owned()))
            .collect();
        assert_eq!(declared, described);
        assert_eq!(declared.len(), routes::ROUTES.len(), "a route stands twice");
    }

    #[test]
    fn only_health_is_open() {
        let open: Vec<_> = routes::ROUTES
            .iter()
            .filter(|route| route.access == Access::Anyone)
            .map(|route| route.path)
            .collect();
        assert_eq!(open, ["/health", "/live", "/ready"]);
    }
}
