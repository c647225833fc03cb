//! The host and its networks.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use ghost_proto::view;

use super::extract::{Caller, Name};
use super::problem::Problem;
use super::{Answer, Shell};
use crate::convert;

/// This document
#[utoipa::path(get, path = "/v1/openapi.json", tag = "host",
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, content_type = "application/json")))]
pub(super) async fn document(State(shell): State<Arc<Shell>>) -> Answer {
    Ok((
        [(header::CONTENT_TYPE, "application/json")],
        shell.document.clone(),
    )
        .into_response())
}

/// The host and its agent
#[utoipa::path(get, path = "/v1/host", tag = "host",
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = view::HostStatus), (status = "default", body = Problem)))]
pub(super) async fn status(State(shell): State<Arc<Shell>>, Caller(caller): Caller) -> Answer {
    let found = shell.use_cases.get_status.execute(&caller).await?;
    let message = convert::status(&found, &shell.options.agent);
    Ok(Json(view::HostStatus::from(message)).into_response())
}

/// The networks that VMs can be attached to
#[utoipa::path(get, path = "/v1/networks", tag = "networks",
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = [view::Network]), (status = "default", body = Problem)))]
pub(super) async fn list_networks(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
) -> Answer {
    let found = shell.use_cases.list_networks.execute(&caller).await?;
    let views: Vec<view::Network> = found
        .iter()
        .map(|one| convert::network(one).into())
        .collect();
    Ok(Json(views).into_response())
}

/// One network with its leases
#[utoipa::path(get, path = "/v1/networks/{name}", tag = "networks",
    params(("name" = String, Path, description = "The network's name")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = view::Network), (status = "default", body = Problem)))]
pub(super) async fn get_network(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(name): Name,
) -> Answer {
    let found = shell.use_cases.get_network.execute(&caller, &name).await?;
    Ok(Json(view::Network::from(convert::network(&found))).into_response())
}
