//! `/live`, `/ready` and `/health`: whether Core runs, and whether it can do its work. No key is
//! asked for, and nothing of the fleet is told.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};

use crate::application::fleet::Fleet;
use crate::application::health::problems;

/// The routes.
pub fn router(fleet: Arc<Fleet>) -> Router {
    Router::new()
        .route(
            "/live",
            get(|| async { Json(serde_json::json!({"status": "ok"})) }),
        )
        .route("/ready", get(ready))
        .route("/health", get(ready))
        .with_state(fleet)
}

async fn ready(State(fleet): State<Arc<Fleet>>) -> Response {
    let problems = problems(&fleet).await;
    if problems.is_empty() {
        return Json(serde_json::json!({"status": "ok"})).into_response();
    }
    let body = serde_json::json!({"status": "unavailable", "problems": problems});
    (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
}
