//! Images.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body as Bytes;
use axum::extract::State;
use axum::response::IntoResponse;
use futures::StreamExt;
use ghost_application::image::{DeleteImageCommand, ImportImageCommand, PullImageCommand};
use ghost_domain::{Error, ErrorCode};
use ghost_proto::view;

use super::bodies::{ImportQuery, PullImageBody};
use super::extract::{Body, Caller, IdempotencyKey, Name, Query};
use super::problem::Problem;
use super::{Answer, Shell, accepted};
use crate::convert;

/// How long an upload may stand still before it is thrown away.
const PATIENCE: Duration = Duration::from_secs(60);

/// The images in the cache
#[utoipa::path(get, path = "/v1/images", tag = "images",
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = [view::Image]), (status = "default", body = Problem)))]
pub(super) async fn list(State(shell): State<Arc<Shell>>, Caller(caller): Caller) -> Answer {
    let found = shell.use_cases.list_images.execute(&caller).await?;
    let views: Vec<view::Image> = found.iter().map(|one| convert::image(one).into()).collect();
    Ok(Json(views).into_response())
}

/// One image
#[utoipa::path(get, path = "/v1/images/{name}", tag = "images",
    params(("name" = String, Path, description = "The image's name")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = view::Image), (status = "default", body = Problem)))]
pub(super) async fn get(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(name): Name,
) -> Answer {
    let found = shell.use_cases.get_image.execute(&caller, &name).await?;
    Ok(Json(view::Image::from(convert::image(&found))).into_response())
}

/// The official images that can be pulled by name
#[utoipa::path(get, path = "/v1/catalogue", tag = "images",
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = [view::CatalogueEntry]), (status = "default", body = Problem)))]
pub(super) async fn catalogue(State(shell): State<Arc<Shell>>, Caller(caller): Caller) -> Answer {
    let found = shell.use_cases.list_catalogue.execute(&caller).await?;
    let views: Vec<view::CatalogueEntry> = found
        .iter()
        .map(|one| convert::catalogue_entry(one).into())
        .collect();
    Ok(Json(views).into_response())
}

/// Download an image into the cache
#[utoipa::path(post, path = "/v1/images", tag = "images", request_body = PullImageBody,
    params(("Idempotency-Key" = Option<String>, Header, description = "The same key returns the same operation")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 202, body = view::Operation), (status = "default", body = Problem)))]
pub(super) async fn pull(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    IdempotencyKey(request_id): IdempotencyKey,
    Body(body): Body<PullImageBody>,
) -> Answer {
    let command = PullImageCommand {
        name: body.name,
        url: body.url,
        checksum: body.checksum,
        request_id,
    };
    let found = shell.use_cases.pull_image.execute(&caller, command).await?;
    Ok(accepted(&found))
}

/// Upload an image
///
/// The body is the file: raw or qcow2, plain or compressed with gzip, xz or zstd.
#[utoipa::path(put, path = "/v1/images/{name}", tag = "images",
    params(ImportQuery,
        ("name" = String, Path, description = "The name that the image gets"),
        ("Idempotency-Key" = Option<String>, Header, description = "The same key returns the same operation")),
    request_body(content_type = "application/octet-stream", content = String),
    security(("bearer" = []), ("key" = [])),
    responses((status = 202, body = view::Operation), (status = "default", body = Problem)))]
pub(super) async fn import(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(name): Name,
    Query(query): Query<ImportQuery>,
    IdempotencyKey(request_id): IdempotencyKey,
    body: Bytes,
) -> Answer {
    let file_name = if query.file_name.is_empty() {
        name.clone()
    } else {
        query.file_name
    };
    let command = ImportImageCommand {
        name,
        file_name,
        request_id,
    };
    // Whatever ends this request early drops the upload, and what came is thrown away.
    let mut upload = shell
        .use_cases
        .import_image
        .execute(&caller, command)
        .await?;
    let mut pieces = body.into_data_stream();
    loop {
        let piece = tokio::select! {
            () = shell.shutdown.cancelled() => {
                return Err(Error::new(ErrorCode::ShuttingDown, "the agent is shutting down")
                    .hint("upload it again in a moment")
                    .retry_after(Duration::from_secs(5))
                    .into());
            }
            piece = tokio::time::timeout(PATIENCE, pieces.next()) => piece,
        };
        let piece = piece.map_err(|_| {
            Error::new(
                ErrorCode::DeadlineExceeded,
                "the upload stood still for too long",
            )
            .hint("upload it again")
        })?;
        let Some(piece) = piece else { break };
        let data = piece.map_err(|cause| {
            Error::new(ErrorCode::InvalidArgument, "the upload ended early").because(cause)
        })?;
        upload.append(&data).await?;
    }
    let found = upload.finish().await?;
    Ok(accepted(&found))
}

/// Delete an image
#[utoipa::path(delete, path = "/v1/images/{name}", tag = "images",
    params(("name" = String, Path, description = "The image's name"),
        ("Idempotency-Key" = Option<String>, Header, description = "The same key returns the same operation")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 202, body = view::Operation), (status = "default", body = Problem)))]
pub(super) async fn delete(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(name): Name,
    IdempotencyKey(request_id): IdempotencyKey,
) -> Answer {
    let command = DeleteImageCommand { name, request_id };
    let found = shell
        .use_cases
        .delete_image
        .execute(&caller, command)
        .await?;
    Ok(accepted(&found))
}
