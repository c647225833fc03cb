//! Core over HTTP: the fleet's objects as JSON, and the HTTP API of every host through its link.
//!
//! - What concerns the fleet is the same calls as gRPC's, made in process: a request is turned into
//!   its message, goes through the same guard, and the answer becomes the JSON view that ghostctl
//!   writes too. There is no second place that decides who may do what.
//! - `/v1/hosts/{host}/…` is the agent's own API, carried through the link as it is, WebSockets and
//!   events included ([`through`]).
//! - Where the configuration says so, the routes of Batwa over all hosts ([`batwa`]).
//! - Errors are problem documents (RFC 9457). All but the health routes need a key.

mod ask;
mod batwa;
mod bodies;
mod events;
mod fleet;
mod health;
mod through;

use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderValue, header};
use axum::middleware::Next;
use axum::response::Response;
use axum::routing::any;
use ghost_domain::{Error, ErrorCode};
use ghost_presentation::http::compat;
use ghost_presentation::http::problem::Failure;
use ghost_presentation::request::{REQUEST_ID, request_id};
use utoipa::OpenApi;
use utoipa::openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::grpc::Front;

/// What every route may need.
struct Shell {
    front: Arc<Front>,
    document: String,
}

/// What a handler answers with.
type Answer = Result<Response, Failure>;

/// The id of a request, once for all who ask.
#[derive(Clone, Debug)]
struct CalledAs(String);

/// The router with all routes, before the same guard as gRPC.
pub fn router(front: Arc<Front>) -> Router {
    let (router, mut document) = described().split_for_parts();
    let batwa = front
        .options
        .batwa
        .then(|| batwa::Fleet(Arc::clone(&front)));
    if batwa.is_some() {
        document.merge(compat::openapi());
    }
    let shell = Arc::new(Shell {
        front,
        document: document.to_json().unwrap_or_default(),
    });
    let router = match batwa {
        Some(batwa) => router.merge(compat::router(Arc::new(batwa))),
        None => router,
    };
    router
        .route("/v1/hosts/{host}/{*rest}", any(through::onward))
        .fallback(nothing)
        .method_not_allowed_fallback(nothing)
        .layer(axum::middleware::from_fn(name))
        .with_state(shell)
}

async fn nothing() -> Failure {
    Failure(
        Error::new(ErrorCode::NotFound, "there is no such route")
            .hint("see /v1/openapi.json for those there are"),
    )
}

/// Names the request, for logs here and on the host, and bounds what browsers make of the answer.
async fn name(mut request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    request.extensions_mut().insert(CalledAs(id.clone()));
    if let Ok(value) = HeaderValue::from_str(&id) {
        request.headers_mut().insert(REQUEST_ID, value);
    }
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::from_str(&id) {
        headers.insert(REQUEST_ID, value);
    }
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[derive(OpenApi)]
#[openapi(info(
    title = "Ghost Core",
    description = "A fleet of hosts. What is under /v1/hosts/{host}/ is the API of that host's agent, as its own /v1/openapi.json describes it."
))]
struct Document;

/// The OpenAPI document, as `/v1/openapi.json` serves it.
pub fn openapi() -> utoipa::openapi::OpenApi {
    described().into_openapi()
}

fn described() -> OpenApiRouter<Arc<Shell>> {
    let mut document = Document::openapi();
    document.info.version = env!("CARGO_PKG_VERSION").to_owned();
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
        .routes(routes!(fleet::document))
        .routes(routes!(fleet::status))
        .routes(routes!(fleet::who_am_i))
        .routes(routes!(fleet::list_hosts))
        .routes(routes!(
            fleet::get_host,
            fleet::update_host,
            fleet::remove_host
        ))
        .routes(routes!(fleet::list_vms, through::create_vm))
        .routes(routes!(events::watch))
        .routes(routes!(fleet::place))
        .routes(routes!(fleet::list_commands, fleet::queue_command))
        .routes(routes!(fleet::get_command, fleet::cancel_command))
        .routes(routes!(fleet::create_token))
        .routes(routes!(fleet::list_tenants, fleet::create_tenant))
        .routes(routes!(fleet::update_tenant, fleet::delete_tenant))
        .routes(routes!(fleet::list_users))
        .routes(routes!(fleet::update_user, fleet::revoke_user))
        .routes(routes!(fleet::list_keys, fleet::create_key))
        .routes(routes!(fleet::revoke_key))
        .routes(routes!(fleet::list_audit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_but_health_needs_a_key_and_says_what_it_does() {
        let document = serde_json::to_value(openapi()).unwrap();
        let mut open = Vec::new();
        for (path, methods) in document["paths"].as_object().unwrap() {
            for (method, route) in methods.as_object().unwrap() {
                assert!(route["summary"].is_string(), "{method} {path}");
                if route.get("security").is_none() {
                    open.push(path.clone());
                }
            }
        }
        open.sort();
        assert_eq!(open, ["/health", "/live", "/ready"]);
    }
}
