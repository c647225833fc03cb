//! Status, history, and short requests.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use ghost_proto::view;

use super::super::extract::{Body, Caller, Name, OptionalBody, Query};
use super::super::problem::Problem;
use super::super::{Answer, Shell};
use super::RequestName;
use super::bodies::{
    AccessBody, AddressBody, FreezeBody, HistoryQuery, PasswordBody, ShutdownBody, SshKeysBody,
};
use crate::convert;

/// Each layer between the caller and the guest's agent
#[utoipa::path(get, path = "/v1/vms/{vm}/guest", tag = "guests",
    params(("vm" = String, Path, description = "A name, a full id or a unique prefix of an id")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = view::GuestStatus), (status = "default", body = Problem)))]
pub(in crate::http) async fn guest_status(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
) -> Answer {
    let status = &shell.use_cases.get_guest_status;
    let found = convert::guest_status(status.execute(&caller, &vm).await?);
    Ok(Json(view::GuestStatus::from(found)).into_response())
}

/// Whether the guest's agent answers
#[utoipa::path(post, path = "/v1/vms/{vm}/guest/ping", tag = "guests",
    params(("vm" = String, Path, description = "A name, a full id or a unique prefix of an id")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = view::GuestPing), (status = "default", body = Problem)))]
pub(in crate::http) async fn ping(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
) -> Answer {
    let ping = &shell.use_cases.ping_guest;
    let answer = convert::guest_ping(ping.execute(&caller, &vm).await?);
    Ok(Json(view::GuestPing::from(answer)).into_response())
}

/// How a VM fared
///
/// A point each five seconds within the last hour, one a minute beyond. `source` says whose word
/// CPU and memory are: the guest's, or the host's while it is silent.
#[utoipa::path(get, path = "/v1/vms/{vm}/history", tag = "guests",
    params(HistoryQuery, ("vm" = String, Path, description = "A name, a full id or a unique prefix of an id")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = view::GuestHistory), (status = "default", body = Problem)))]
pub(in crate::http) async fn history(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
    Query(query): Query<HistoryQuery>,
) -> Answer {
    let history = &shell.use_cases.get_guest_history;
    let found = history.execute(&caller, &vm, query.span()?).await?;
    let found = view::GuestHistory::from(convert::guest_history(found));
    Ok(Json(found).into_response())
}

/// Register an address of a VM
///
/// It is kept with the VM, and counts while the VM runs and neither the guest nor a lease says
/// otherwise. The field may also be called
/// `guest_ip`.
#[utoipa::path(post, path = "/v1/vms/{vm}/guest-ip", tag = "guests", request_body = AddressBody,
    params(("vm" = String, Path, description = "A name, a full id or a unique prefix of an id")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 204), (status = "default", body = Problem)))]
pub(in crate::http) async fn register_address(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
    name: RequestName,
    Body(body): Body<AddressBody>,
) -> Answer {
    let address = body.address.as_deref().map(convert::address).transpose()?;
    let register = &shell.use_cases.register_guest_address;
    register.execute(&caller, &name.target(vm), address).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Shut a guest down from within, or restart it
///
/// Answered once the guest agreed.
#[utoipa::path(post, path = "/v1/vms/{vm}/guest/shutdown", tag = "guests", request_body = ShutdownBody,
    params(("vm" = String, Path, description = "A name, a full id or a unique prefix of an id")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 204), (status = "default", body = Problem)))]
pub(in crate::http) async fn shut_down(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
    name: RequestName,
    OptionalBody(body): OptionalBody<ShutdownBody>,
) -> Answer {
    let delay = body.delay()?;
    let shutdown = &shell.use_cases.shutdown_guest;
    shutdown
        .execute(&caller, &name.target(vm), body.reboot, delay)
        .await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Set a user's password
#[utoipa::path(post, path = "/v1/vms/{vm}/guest/password", tag = "guests", request_body = PasswordBody,
    params(("vm" = String, Path, description = "A name, a full id or a unique prefix of an id")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 204), (status = "default", body = Problem)))]
pub(in crate::http) async fn set_password(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
    name: RequestName,
    Body(body): Body<PasswordBody>,
) -> Answer {
    let set = &shell.use_cases.set_guest_password;
    set.execute(&caller, &name.target(vm), body.command())
        .await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Change a user's authorized SSH keys
#[utoipa::path(post, path = "/v1/vms/{vm}/guest/ssh-keys", tag = "guests", request_body = SshKeysBody,
    params(("vm" = String, Path, description = "A name, a full id or a unique prefix of an id")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 204), (status = "default", body = Problem)))]
pub(in crate::http) async fn update_ssh_keys(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
    name: RequestName,
    Body(body): Body<SshKeysBody>,
) -> Answer {
    let update = &shell.use_cases.update_guest_ssh_keys;
    update
        .execute(&caller, &name.target(vm), body.command())
        .await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Set a guest's clock to the host's
#[utoipa::path(post, path = "/v1/vms/{vm}/guest/clock", tag = "guests",
    params(("vm" = String, Path, description = "A name, a full id or a unique prefix of an id")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 204), (status = "default", body = Problem)))]
pub(in crate::http) async fn sync_clock(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
    name: RequestName,
) -> Answer {
    let sync = &shell.use_cases.sync_guest_clock;
    sync.execute(&caller, &name.target(vm)).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Replace a guest's agent by the host's program
///
/// Answered once the new one has greeted; the old one is kept until then.
#[utoipa::path(post, path = "/v1/vms/{vm}/guest/update", tag = "guests",
    params(("vm" = String, Path, description = "A name, a full id or a unique prefix of an id")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = view::GuestUpdate), (status = "default", body = Problem)))]
pub(in crate::http) async fn update_agent(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
    name: RequestName,
) -> Answer {
    let update = &shell.use_cases.update_guest;
    let view = update.execute(&caller, &name.target(vm)).await?;
    let told = view::GuestUpdate::from(convert::guest_update(&view));
    Ok(Json(told).into_response())
}

/// Switch the guest access of a VM
///
/// Off cuts what goes on in the guest and is in force before anything is written: it needs neither
/// libvirt nor a VM that nothing is done with.
#[utoipa::path(put, path = "/v1/vms/{vm}/guest/access", tag = "guests", request_body = AccessBody,
    params(("vm" = String, Path, description = "A name, a full id or a unique prefix of an id")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = view::GuestAccess), (status = "default", body = Problem)))]
pub(in crate::http) async fn set_access(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
    name: RequestName,
    Body(body): Body<AccessBody>,
) -> Answer {
    let set = &shell.use_cases.set_guest_access;
    let view = set.execute(&caller, &name.target(vm), body.access).await?;
    let told = view::GuestAccess::from(convert::guest_access(view));
    Ok(Json(told).into_response())
}

/// Freeze file systems of a guest
#[utoipa::path(post, path = "/v1/vms/{vm}/guest/freeze", tag = "guests", request_body = FreezeBody,
    params(("vm" = String, Path, description = "A name, a full id or a unique prefix of an id")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = view::GuestFreeze), (status = "default", body = Problem)))]
pub(in crate::http) async fn freeze(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
    name: RequestName,
    OptionalBody(body): OptionalBody<FreezeBody>,
) -> Answer {
    let command = body.command()?;
    let freeze = &shell.use_cases.freeze_guest;
    let outcome = freeze.execute(&caller, &name.target(vm), command).await?;
    let told = view::GuestFreeze::from(convert::freeze(outcome));
    Ok(Json(told).into_response())
}

/// Thaw file systems of a guest
#[utoipa::path(post, path = "/v1/vms/{vm}/guest/thaw", tag = "guests",
    params(("vm" = String, Path, description = "A name, a full id or a unique prefix of an id")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = view::GuestFreeze), (status = "default", body = Problem)))]
pub(in crate::http) async fn thaw(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
    name: RequestName,
) -> Answer {
    let thaw = &shell.use_cases.thaw_guest;
    let outcome = thaw.execute(&caller, &name.target(vm)).await?;
    let told = view::GuestFreeze::from(convert::freeze(outcome));
    Ok(Json(told).into_response())
}
