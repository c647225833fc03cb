//! Whether Core lives and takes work: for supervisors and load balancers, without a key.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use super::Shell;
use crate::application::health::problems;

/// How Core fares.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct Health {
    /// The process serves.
    live: bool,
    /// It takes work.
    ready: bool,
    /// Why it does not, one line each.
    problems: Vec<String>,
}

/// That the process serves.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub(super) struct Live {
    /// True.
    live: bool,
}

async fn look(shell: &Shell) -> Response {
    let mut problems = problems(&shell.front.parts.fleet).await;
    if shell.front.shutdown.is_cancelled() {
        problems.push("it is shutting down".to_owned());
    }
    let status = if problems.is_empty() {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let health = Health {
        live: true,
        ready: problems.is_empty(),
        problems,
    };
    (status, Json(health)).into_response()
}

/// How Core fares
///
/// 200 where it takes work, 503 with the reasons where it does not.
#[utoipa::path(get, path = "/health", tag = "health",
    responses((status = 200, body = Health), (status = 503, body = Health)))]
pub(super) async fn health(State(shell): State<Arc<Shell>>) -> Response {
    look(&shell).await
}

/// Whether it takes work
///
/// As `/health`, for orchestrators that ask under this name.
#[utoipa::path(get, path = "/ready", tag = "health",
    responses((status = 200, body = Health), (status = 503, body = Health)))]
pub(super) async fn ready(State(shell): State<Arc<Shell>>) -> Response {
    look(&shell).await
}

/// Whether the process serves at all
///
/// Always 200: a process that cannot answer this wants to be restarted.
#[utoipa::path(get, path = "/live", tag = "health", responses((status = 200, body = Live)))]
pub(super) async fn live() -> Json<Live> {
    Json(Live { live: true })
}
