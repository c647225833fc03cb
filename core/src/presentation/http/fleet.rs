//! The fleet's objects.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use ghost_presentation::http::extract::{Body, IdempotencyKey, Name, OptionalBody, Query};
use ghost_presentation::http::problem::Problem;
use ghost_proto::agent::v1 as agent;
use ghost_proto::core::v1 as message;
use ghost_proto::view;
use serde::Serialize;

use super::ask::{ask, ask_all, listed_vms};
use super::bodies::{
    AuditQuery, CommandsQuery, ForceQuery, HostsQuery, KeyBody, PlaceBody, QueueBody, TenantBody,
    TenantQuery, TokenBody, UpdateHostBody, UpdateTenantBody, UpdateUserBody, VmsQuery,
};
use super::{Answer, Shell};

/// A method of the fleet's service.
macro_rules! fleet {
    ($method:literal) => {
        concat!("/ghost.core.v1.FleetService/", $method)
    };
}

fn each<A, B: From<A> + Serialize>(items: Vec<A>) -> Response {
    let views: Vec<B> = items.into_iter().map(B::from).collect();
    Json(views).into_response()
}

fn one<A, B: From<A> + Serialize>(item: A) -> Response {
    Json(B::from(item)).into_response()
}

fn made<A, B: From<A> + Serialize>(item: A) -> Response {
    (StatusCode::CREATED, Json(B::from(item))).into_response()
}

/// This document
#[utoipa::path(get, path = "/v1/openapi.json", tag = "fleet",
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, content_type = "application/json"), (status = "default", body = Problem)))]
pub(super) async fn document(State(shell): State<Arc<Shell>>, headers: HeaderMap) -> Answer {
    // Whoever may look at anything may read it.
    let _: agent::Identity = who(&shell, &headers).await?;
    let json = [(header::CONTENT_TYPE, "application/json")];
    Ok((json, shell.document.clone()).into_response())
}

async fn who(
    shell: &Arc<Shell>,
    headers: &HeaderMap,
) -> Result<agent::Identity, ghost_presentation::http::problem::Failure> {
    let path = "/ghost.agent.v1.AccessService/WhoAmI";
    ask(shell, headers, path, &agent::WhoAmIRequest {}).await
}

/// Who the caller is
#[utoipa::path(get, path = "/v1/whoami", tag = "fleet",
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = view::Identity), (status = "default", body = Problem)))]
pub(super) async fn who_am_i(State(shell): State<Arc<Shell>>, headers: HeaderMap) -> Answer {
    let found = who(&shell, &headers).await?;
    Ok(one::<_, view::Identity>(found))
}

/// Core itself
#[utoipa::path(get, path = "/v1/status", tag = "fleet",
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = view::FleetStatus), (status = "default", body = Problem)))]
pub(super) async fn status(State(shell): State<Arc<Shell>>, headers: HeaderMap) -> Answer {
    let request = message::GetCoreStatusRequest {};
    let found: message::CoreStatus = ask(&shell, &headers, fleet!("GetStatus"), &request).await?;
    Ok(one::<_, view::FleetStatus>(found))
}

/// List hosts
#[utoipa::path(get, path = "/v1/hosts", tag = "hosts", params(HostsQuery),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = [view::FleetHost]), (status = "default", body = Problem)))]
pub(super) async fn list_hosts(
    State(shell): State<Arc<Shell>>,
    headers: HeaderMap,
    Query(query): Query<HostsQuery>,
) -> Answer {
    let request = query.message()?;
    let found: message::ListHostsResponse =
        ask(&shell, &headers, fleet!("ListHosts"), &request).await?;
    Ok(each::<_, view::FleetHost>(found.hosts))
}

/// Show a host
#[utoipa::path(get, path = "/v1/hosts/{host}", tag = "hosts",
    params(("host" = String, Path, description = "A name, a full id or a unique prefix of an id")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = view::FleetHost), (status = "default", body = Problem)))]
pub(super) async fn get_host(
    State(shell): State<Arc<Shell>>,
    headers: HeaderMap,
    Name(host): Name,
) -> Answer {
    let request = message::GetHostRequest { host };
    let found: message::Host = ask(&shell, &headers, fleet!("GetHost"), &request).await?;
    Ok(one::<_, view::FleetHost>(found))
}

/// Change a host
///
/// Its labels, whether anything new is placed on it, its name.
#[utoipa::path(patch, path = "/v1/hosts/{host}", tag = "hosts", request_body = UpdateHostBody,
    params(("host" = String, Path, description = "A name, a full id or a unique prefix of an id")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = view::FleetHost), (status = "default", body = Problem)))]
pub(super) async fn update_host(
    State(shell): State<Arc<Shell>>,
    headers: HeaderMap,
    Name(host): Name,
    Body(body): Body<UpdateHostBody>,
) -> Answer {
    let request = body.message(host);
    let found: message::Host = ask(&shell, &headers, fleet!("UpdateHost"), &request).await?;
    Ok(one::<_, view::FleetHost>(found))
}

/// Remove a host
///
/// Its identity is revoked and it is forgotten. Its VMs go on where they are.
#[utoipa::path(delete, path = "/v1/hosts/{host}", tag = "hosts",
    params(ForceQuery, ("host" = String, Path, description = "A name, a full id or a unique prefix of an id")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 204), (status = "default", body = Problem)))]
pub(super) async fn remove_host(
    State(shell): State<Arc<Shell>>,
    headers: HeaderMap,
    Name(host): Name,
    Query(query): Query<ForceQuery>,
) -> Answer {
    let request = message::RemoveHostRequest {
        host,
        force: query.force,
    };
    let _: message::RemoveHostResponse =
        ask(&shell, &headers, fleet!("RemoveHost"), &request).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// List the VMs of all hosts
///
/// From Core's memory: what is known of a host that is not online is as old as `age_seconds` says.
#[utoipa::path(get, path = "/v1/vms", tag = "vms", params(VmsQuery),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = [view::FleetVm]), (status = "default", body = Problem)))]
pub(super) async fn list_vms(
    State(shell): State<Arc<Shell>>,
    headers: HeaderMap,
    Query(query): Query<VmsQuery>,
) -> Answer {
    let listed = listed_vms(&shell, &headers, &query.message()?).await?;
    let json = [(header::CONTENT_TYPE, "application/json")];
    Ok((json, listed).into_response())
}

/// Tell where a VM would go
///
/// And why there, and why not to the other hosts. Nothing is made.
#[utoipa::path(post, path = "/v1/placement", tag = "vms", request_body = Option<PlaceBody>,
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = view::Placement), (status = "default", body = Problem)))]
pub(super) async fn place(
    State(shell): State<Arc<Shell>>,
    headers: HeaderMap,
    OptionalBody(body): OptionalBody<PlaceBody>,
) -> Answer {
    let found: message::Placement = ask(&shell, &headers, fleet!("Place"), &body.message()).await?;
    Ok(one::<_, view::Placement>(found))
}

/// List commands
#[utoipa::path(get, path = "/v1/commands", tag = "commands", params(CommandsQuery),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = [view::FleetCommand]), (status = "default", body = Problem)))]
pub(super) async fn list_commands(
    State(shell): State<Arc<Shell>>,
    headers: HeaderMap,
    Query(query): Query<CommandsQuery>,
) -> Answer {
    let request = message::ListCommandsRequest {
        host: query.host,
        all: query.all,
    };
    let found: message::ListCommandsResponse =
        ask(&shell, &headers, fleet!("ListCommands"), &request).await?;
    Ok(each::<_, view::FleetCommand>(found.commands))
}

/// Queue a command
///
/// For a host that may be away: it is done once, when the host is there, or expires.
#[utoipa::path(post, path = "/v1/commands", tag = "commands", request_body = QueueBody,
    params(("Idempotency-Key" = Option<String>, Header, description = "The same key returns the same command")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 202, body = view::FleetCommand), (status = "default", body = Problem)))]
pub(super) async fn queue_command(
    State(shell): State<Arc<Shell>>,
    headers: HeaderMap,
    IdempotencyKey(request_id): IdempotencyKey,
    Body(body): Body<QueueBody>,
) -> Answer {
    let id = request_id.map(|id| id.as_str().to_owned());
    let request = body.message(id.unwrap_or_default())?;
    let queued: message::QueuedCommand =
        ask(&shell, &headers, fleet!("QueueCommand"), &request).await?;
    let location = format!("/v1/commands/{}", queued.id);
    let view = view::FleetCommand::from(queued);
    Ok((
        StatusCode::ACCEPTED,
        [(header::LOCATION, location)],
        Json(view),
    )
        .into_response())
}

/// Show a command
#[utoipa::path(get, path = "/v1/commands/{id}", tag = "commands",
    params(("id" = String, Path, description = "Its id or a unique prefix of it")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = view::FleetCommand), (status = "default", body = Problem)))]
pub(super) async fn get_command(
    State(shell): State<Arc<Shell>>,
    headers: HeaderMap,
    Name(id): Name,
) -> Answer {
    let request = message::GetCommandRequest { id };
    let found: message::QueuedCommand =
        ask(&shell, &headers, fleet!("GetCommand"), &request).await?;
    Ok(one::<_, view::FleetCommand>(found))
}

/// Take a command back
///
/// Only while its host has not taken it.
#[utoipa::path(delete, path = "/v1/commands/{id}", tag = "commands",
    params(("id" = String, Path, description = "Its id or a unique prefix of it")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = view::FleetCommand), (status = "default", body = Problem)))]
pub(super) async fn cancel_command(
    State(shell): State<Arc<Shell>>,
    headers: HeaderMap,
    Name(id): Name,
) -> Answer {
    let request = message::CancelCommandRequest { id };
    let found: message::QueuedCommand =
        ask(&shell, &headers, fleet!("CancelCommand"), &request).await?;
    Ok(one::<_, view::FleetCommand>(found))
}

/// Make a join token
///
/// For a host or, with a role, for a person. It is shown this once.
#[utoipa::path(post, path = "/v1/tokens", tag = "access", request_body = Option<TokenBody>,
    security(("bearer" = []), ("key" = [])),
    responses((status = 201, body = view::FleetToken), (status = "default", body = Problem)))]
pub(super) async fn create_token(
    State(shell): State<Arc<Shell>>,
    headers: HeaderMap,
    OptionalBody(body): OptionalBody<TokenBody>,
) -> Answer {
    let request = body.message()?;
    let token: message::FleetToken = ask(&shell, &headers, fleet!("CreateToken"), &request).await?;
    Ok(made::<_, view::FleetToken>(token))
}

/// List tenants
#[utoipa::path(get, path = "/v1/tenants", tag = "access",
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = [view::Tenant]), (status = "default", body = Problem)))]
pub(super) async fn list_tenants(State(shell): State<Arc<Shell>>, headers: HeaderMap) -> Answer {
    let request = message::ListTenantsRequest {};
    let found: message::ListTenantsResponse =
        ask(&shell, &headers, fleet!("ListTenants"), &request).await?;
    Ok(each::<_, view::Tenant>(found.tenants))
}

/// Make a tenant
#[utoipa::path(post, path = "/v1/tenants", tag = "access", request_body = TenantBody,
    security(("bearer" = []), ("key" = [])),
    responses((status = 201, body = view::Tenant), (status = "default", body = Problem)))]
pub(super) async fn create_tenant(
    State(shell): State<Arc<Shell>>,
    headers: HeaderMap,
    Body(body): Body<TenantBody>,
) -> Answer {
    let tenant: message::Tenant =
        ask(&shell, &headers, fleet!("CreateTenant"), &body.message()).await?;
    Ok(made::<_, view::Tenant>(tenant))
}

/// Change a tenant's quotas
#[utoipa::path(patch, path = "/v1/tenants/{tenant}", tag = "access", request_body = UpdateTenantBody,
    params(("tenant" = String, Path, description = "Its name")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = view::Tenant), (status = "default", body = Problem)))]
pub(super) async fn update_tenant(
    State(shell): State<Arc<Shell>>,
    headers: HeaderMap,
    Name(tenant): Name,
    Body(body): Body<UpdateTenantBody>,
) -> Answer {
    let request = body.message(tenant);
    let tenant: message::Tenant = ask(&shell, &headers, fleet!("UpdateTenant"), &request).await?;
    Ok(one::<_, view::Tenant>(tenant))
}

/// Delete a tenant
///
/// Only one without hosts and users.
#[utoipa::path(delete, path = "/v1/tenants/{tenant}", tag = "access",
    params(("tenant" = String, Path, description = "Its name")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 204), (status = "default", body = Problem)))]
pub(super) async fn delete_tenant(
    State(shell): State<Arc<Shell>>,
    headers: HeaderMap,
    Name(name): Name,
) -> Answer {
    let request = message::DeleteTenantRequest { name };
    let _: message::DeleteTenantResponse =
        ask(&shell, &headers, fleet!("DeleteTenant"), &request).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// List people
#[utoipa::path(get, path = "/v1/users", tag = "access", params(TenantQuery),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = [view::FleetUser]), (status = "default", body = Problem)))]
pub(super) async fn list_users(
    State(shell): State<Arc<Shell>>,
    headers: HeaderMap,
    Query(query): Query<TenantQuery>,
) -> Answer {
    let request = message::ListUsersRequest {
        tenant: query.tenant,
    };
    let found: message::ListUsersResponse =
        ask(&shell, &headers, fleet!("ListUsers"), &request).await?;
    Ok(each::<_, view::FleetUser>(found.users))
}

/// Change somebody's quota or role
#[utoipa::path(patch, path = "/v1/users/{user}", tag = "access", request_body = UpdateUserBody,
    params(("user" = String, Path, description = "A name, an id or a unique prefix of an id")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = view::FleetUser), (status = "default", body = Problem)))]
pub(super) async fn update_user(
    State(shell): State<Arc<Shell>>,
    headers: HeaderMap,
    Name(user): Name,
    Body(body): Body<UpdateUserBody>,
) -> Answer {
    let request = body.message(user);
    let user: message::User = ask(&shell, &headers, fleet!("UpdateUser"), &request).await?;
    Ok(one::<_, view::FleetUser>(user))
}

/// Revoke somebody
///
/// All that the user proves itself with, for good.
#[utoipa::path(delete, path = "/v1/users/{user}", tag = "access",
    params(("user" = String, Path, description = "A name, an id or a unique prefix of an id")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = view::FleetUser), (status = "default", body = Problem)))]
pub(super) async fn revoke_user(
    State(shell): State<Arc<Shell>>,
    headers: HeaderMap,
    Name(user): Name,
) -> Answer {
    let request = message::RevokeUserRequest { user };
    let user: message::User = ask(&shell, &headers, fleet!("RevokeUser"), &request).await?;
    Ok(one::<_, view::FleetUser>(user))
}

/// List keys
#[utoipa::path(get, path = "/v1/keys", tag = "access", params(TenantQuery),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = [view::FleetKey]), (status = "default", body = Problem)))]
pub(super) async fn list_keys(
    State(shell): State<Arc<Shell>>,
    headers: HeaderMap,
    Query(query): Query<TenantQuery>,
) -> Answer {
    let request = message::ListFleetKeysRequest {
        tenant: query.tenant,
    };
    let found: message::ListFleetKeysResponse =
        ask(&shell, &headers, fleet!("ListKeys"), &request).await?;
    Ok(each::<_, view::FleetKey>(found.keys))
}

/// Make a key
///
/// Its secret is shown this once.
#[utoipa::path(post, path = "/v1/keys", tag = "access", request_body = KeyBody,
    security(("bearer" = []), ("key" = [])),
    responses((status = 201, body = view::CreatedFleetKey), (status = "default", body = Problem)))]
pub(super) async fn create_key(
    State(shell): State<Arc<Shell>>,
    headers: HeaderMap,
    Body(body): Body<KeyBody>,
) -> Answer {
    let request = body.message()?;
    let created: message::CreatedFleetKey =
        ask(&shell, &headers, fleet!("CreateKey"), &request).await?;
    Ok(made::<_, view::CreatedFleetKey>(created))
}

/// Revoke a key
#[utoipa::path(delete, path = "/v1/keys/{id}", tag = "access",
    params(("id" = String, Path, description = "Its id or a unique prefix of it")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = view::FleetKey), (status = "default", body = Problem)))]
pub(super) async fn revoke_key(
    State(shell): State<Arc<Shell>>,
    headers: HeaderMap,
    Name(id): Name,
) -> Answer {
    let request = message::RevokeFleetKeyRequest { id };
    let key: message::FleetKey = ask(&shell, &headers, fleet!("RevokeKey"), &request).await?;
    Ok(one::<_, view::FleetKey>(key))
}

/// Who did what
///
/// Oldest first; of this replica.
#[utoipa::path(get, path = "/v1/audit", tag = "access", params(AuditQuery),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = [view::FleetAuditEntry]), (status = "default", body = Problem)))]
pub(super) async fn list_audit(
    State(shell): State<Arc<Shell>>,
    headers: HeaderMap,
    Query(query): Query<AuditQuery>,
) -> Answer {
    let request = query.message();
    let found: Vec<message::FleetAuditEntry> =
        ask_all(&shell, &headers, fleet!("ListAudit"), &request).await?;
    Ok(each::<_, view::FleetAuditEntry>(found))
}
