//! Operations.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::IntoResponse;
use ghost_application::operation::ListOperationsCommand;
use ghost_proto::view;

use super::bodies::ListOperationsQuery;
use super::extract::{Caller, Name, Query};
use super::problem::Problem;
use super::{Answer, Shell, accepted};
use crate::convert;

/// Operations, newest first
#[utoipa::path(get, path = "/v1/operations", tag = "operations", params(ListOperationsQuery),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = [view::Operation]), (status = "default", body = Problem)))]
pub(super) async fn list(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Query(query): Query<ListOperationsQuery>,
) -> Answer {
    let command = ListOperationsCommand {
        vm: query.vm,
        all: query.all,
    };
    let found = shell
        .use_cases
        .list_operations
        .execute(&caller, &command)
        .await?;
    let views: Vec<view::Operation> = found
        .iter()
        .map(|one| convert::operation(one).into())
        .collect();
    Ok(Json(views).into_response())
}

/// One operation
#[utoipa::path(get, path = "/v1/operations/{id}", tag = "operations",
    params(("id" = String, Path, description = "A full id or a unique prefix")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = view::Operation), (status = "default", body = Problem)))]
pub(super) async fn get(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(id): Name,
) -> Answer {
    let found = shell.use_cases.get_operation.execute(&caller, &id).await?;
    Ok(Json(view::Operation::from(convert::operation(&found))).into_response())
}

/// Cancel an operation
///
/// Asks it to stop and undo what it did.
#[utoipa::path(delete, path = "/v1/operations/{id}", tag = "operations",
    params(("id" = String, Path, description = "A full id or a unique prefix")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 202, body = view::Operation), (status = "default", body = Problem)))]
pub(super) async fn cancel(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(id): Name,
) -> Answer {
    let found = shell
        .use_cases
        .cancel_operation
        .execute(&caller, &id)
        .await?;
    Ok(accepted(&found))
}
