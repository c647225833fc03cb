//! Virtual machines.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body as Bytes;
use axum::extract::State;
use axum::http::{HeaderName, header};
use axum::response::IntoResponse;
use futures::{StreamExt, stream};
use ghost_application::vm::{DeleteVmCommand, PowerCommand, StopCommand};
use ghost_proto::view;

use super::bodies::{CreateVmBody, DeleteVmQuery, ListVmsQuery, LogsQuery, StopBody, UpdateVmBody};
use super::extract::{Body, Caller, IdempotencyKey, IfMatch, Name, OptionalBody, Query};
use super::problem::Problem;
use super::{Answer, Shell, accepted};
use crate::convert;

/// How often a followed log is looked at.
const LOOK_AT_LOG: Duration = Duration::from_millis(250);

/// VMs by name, from memory
#[utoipa::path(get, path = "/v1/vms", tag = "vms", params(ListVmsQuery),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = [view::Vm]), (status = "default", body = Problem)))]
pub(super) async fn list(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Query(query): Query<ListVmsQuery>,
) -> Answer {
    let found = shell
        .use_cases
        .list_vms
        .execute(&caller, &query.tags()?)
        .await?;
    let views: Vec<view::Vm> = found.iter().map(|one| convert::vm(one).into()).collect();
    Ok(Json(views).into_response())
}

/// Create a VM
///
/// With `dry_run` everything is checked and nothing changed: the answer is then 200.
#[utoipa::path(post, path = "/v1/vms", tag = "vms", request_body = CreateVmBody,
    params(("Idempotency-Key" = Option<String>, Header, description = "The same key returns the same operation")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 202, body = view::Operation), (status = 200, body = view::Operation),
        (status = "default", body = Problem)))]
pub(super) async fn create(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    IdempotencyKey(request_id): IdempotencyKey,
    Body(body): Body<CreateVmBody>,
) -> Answer {
    let dry_run = body.dry_run;
    let command = body.command(request_id)?;
    let found = shell.use_cases.create_vm.execute(&caller, command).await?;
    if dry_run {
        let body = view::Operation::from(convert::operation(&found));
        return Ok(Json(body).into_response());
    }
    Ok(accepted(&found))
}

/// One VM
///
/// The `ETag` is its generation, for `If-Match` of a change.
#[utoipa::path(get, path = "/v1/vms/{vm}", tag = "vms",
    params(("vm" = String, Path, description = "A name, a full id or a unique prefix of an id")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = view::Vm), (status = "default", body = Problem)))]
pub(super) async fn get(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
) -> Answer {
    let found = shell.use_cases.get_vm.execute(&caller, &vm).await?;
    let etag = format!("\"{}\"", found.vm.generation);
    let body = Json(view::Vm::from(convert::vm(&found)));
    Ok(([(header::ETAG, etag)], body).into_response())
}

/// Change a VM
#[utoipa::path(patch, path = "/v1/vms/{vm}", tag = "vms", request_body = UpdateVmBody,
    params(("vm" = String, Path, description = "A name, a full id or a unique prefix of an id"),
        ("If-Match" = Option<String>, Header, description = "The ETag of the VM as it was seen"),
        ("Idempotency-Key" = Option<String>, Header, description = "The same key returns the same operation")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 202, body = view::Operation), (status = "default", body = Problem)))]
pub(super) async fn update(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
    IfMatch(generation): IfMatch,
    IdempotencyKey(request_id): IdempotencyKey,
    Body(body): Body<UpdateVmBody>,
) -> Answer {
    let command = body.command(vm, generation, request_id)?;
    let found = shell.use_cases.update_vm.execute(&caller, command).await?;
    Ok(accepted(&found))
}

/// Delete a VM with its disks
#[utoipa::path(delete, path = "/v1/vms/{vm}", tag = "vms",
    params(DeleteVmQuery,
        ("vm" = String, Path, description = "A name, a full id or a unique prefix of an id"),
        ("If-Match" = Option<String>, Header, description = "The ETag of the VM as it was seen"),
        ("Idempotency-Key" = Option<String>, Header, description = "The same key returns the same operation")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 202, body = view::Operation), (status = "default", body = Problem)))]
pub(super) async fn delete(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
    Query(query): Query<DeleteVmQuery>,
    IfMatch(expected_generation): IfMatch,
    IdempotencyKey(request_id): IdempotencyKey,
) -> Answer {
    let command = DeleteVmCommand {
        vm,
        force: query.force,
        expected_generation,
        request_id,
    };
    let found = shell.use_cases.delete_vm.execute(&caller, command).await?;
    Ok(accepted(&found))
}

/// Start a VM
#[utoipa::path(post, path = "/v1/vms/{vm}/start", tag = "vms",
    params(("vm" = String, Path, description = "A name, a full id or a unique prefix of an id"),
        ("Idempotency-Key" = Option<String>, Header, description = "The same key returns the same operation")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 202, body = view::Operation), (status = "default", body = Problem)))]
pub(super) async fn start(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
    IdempotencyKey(request_id): IdempotencyKey,
) -> Answer {
    let command = PowerCommand { vm, request_id };
    let found = shell.use_cases.start_vm.execute(&caller, command).await?;
    Ok(accepted(&found))
}

/// Stop a VM
///
/// By ACPI; the power is cut only with `force`.
#[utoipa::path(post, path = "/v1/vms/{vm}/stop", tag = "vms", request_body = Option<StopBody>,
    params(("vm" = String, Path, description = "A name, a full id or a unique prefix of an id"),
        ("Idempotency-Key" = Option<String>, Header, description = "The same key returns the same operation")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 202, body = view::Operation), (status = "default", body = Problem)))]
pub(super) async fn stop(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
    IdempotencyKey(request_id): IdempotencyKey,
    OptionalBody(body): OptionalBody<StopBody>,
) -> Answer {
    let command = StopCommand {
        vm,
        force: body.force,
        timeout: body.timeout()?,
        request_id,
    };
    let found = shell.use_cases.stop_vm.execute(&caller, command).await?;
    Ok(accepted(&found))
}

/// Restart a VM
#[utoipa::path(post, path = "/v1/vms/{vm}/restart", tag = "vms", request_body = Option<StopBody>,
    params(("vm" = String, Path, description = "A name, a full id or a unique prefix of an id"),
        ("Idempotency-Key" = Option<String>, Header, description = "The same key returns the same operation")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 202, body = view::Operation), (status = "default", body = Problem)))]
pub(super) async fn restart(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
    IdempotencyKey(request_id): IdempotencyKey,
    OptionalBody(body): OptionalBody<StopBody>,
) -> Answer {
    let command = StopCommand {
        vm,
        force: body.force,
        timeout: body.timeout()?,
        request_id,
    };
    let found = shell.use_cases.restart_vm.execute(&caller, command).await?;
    Ok(accepted(&found))
}

/// Halt a VM, keeping its memory
#[utoipa::path(post, path = "/v1/vms/{vm}/pause", tag = "vms",
    params(("vm" = String, Path, description = "A name, a full id or a unique prefix of an id"),
        ("Idempotency-Key" = Option<String>, Header, description = "The same key returns the same operation")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 202, body = view::Operation), (status = "default", body = Problem)))]
pub(super) async fn pause(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
    IdempotencyKey(request_id): IdempotencyKey,
) -> Answer {
    let command = PowerCommand { vm, request_id };
    let found = shell.use_cases.pause_vm.execute(&caller, command).await?;
    Ok(accepted(&found))
}

/// Let a paused VM run on
#[utoipa::path(post, path = "/v1/vms/{vm}/resume", tag = "vms",
    params(("vm" = String, Path, description = "A name, a full id or a unique prefix of an id"),
        ("Idempotency-Key" = Option<String>, Header, description = "The same key returns the same operation")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 202, body = view::Operation), (status = "default", body = Problem)))]
pub(super) async fn resume(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
    IdempotencyKey(request_id): IdempotencyKey,
) -> Answer {
    let command = PowerCommand { vm, request_id };
    let found = shell.use_cases.resume_vm.execute(&caller, command).await?;
    Ok(accepted(&found))
}

/// A VM's console log
///
/// As the guest wrote it, control characters included: it is never to be shown as HTML.
#[utoipa::path(get, path = "/v1/vms/{vm}/logs", tag = "vms",
    params(LogsQuery, ("vm" = String, Path, description = "A name, a full id or a unique prefix of an id")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, content_type = "text/plain", body = String),
        (status = "default", body = Problem)))]
pub(super) async fn logs(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
    Query(query): Query<LogsQuery>,
) -> Answer {
    let reader = shell
        .use_cases
        .open_log
        .execute(&caller, &vm, query.tail_bytes)
        .await?;
    let follow = query.follow;
    let source = stream::try_unfold(reader, move |mut reader| async move {
        loop {
            let data = reader.read().await?;
            if !data.is_empty() {
                return Ok::<_, ghost_domain::Error>(Some((data, reader)));
            }
            if !follow {
                return Ok(None);
            }
            tokio::time::sleep(LOOK_AT_LOG).await;
        }
    })
    .take_until(shell.shutdown.clone().cancelled_owned());
    let headers: [(HeaderName, &str); 1] = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
    Ok((headers, Bytes::from_stream(source)).into_response())
}
