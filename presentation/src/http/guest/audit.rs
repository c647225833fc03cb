//! Lockdown and the audit log.

use std::sync::Arc;
use std::time::SystemTime;

use axum::Json;
use axum::extract::State;
use axum::response::IntoResponse;
use ghost_application::guest::{ListAuditCommand, SetLockdownCommand};
use ghost_domain::Timestamp;
use ghost_proto::view;

use super::super::extract::{Body, Caller, Query};
use super::super::problem::Problem;
use super::super::{Answer, Shell};
use super::RequestName;
use super::bodies::{AuditQuery, LockdownBody};
use crate::convert;

/// Whether all ways into guests are closed
#[utoipa::path(get, path = "/v1/lockdown", tag = "guests",
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = view::Lockdown), (status = "default", body = Problem)))]
pub(in crate::http) async fn get_lockdown(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
) -> Answer {
    let found = shell.use_cases.get_lockdown.execute(&caller).await?;
    Ok(Json(view::Lockdown::from(convert::lockdown(found))).into_response())
}

/// Close all ways into guests, or open them again
///
/// Closing cuts every session at once, before it is answered.
#[utoipa::path(put, path = "/v1/lockdown", tag = "guests", request_body = LockdownBody,
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = view::Lockdown), (status = "default", body = Problem)))]
pub(in crate::http) async fn set_lockdown(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    RequestName(request_id): RequestName,
    Body(body): Body<LockdownBody>,
) -> Answer {
    let command = SetLockdownCommand {
        active: body.active,
        reason: body.reason,
        request_id,
    };
    let set = &shell.use_cases.set_lockdown;
    let found = set.execute(&caller, command).await?;
    Ok(Json(view::Lockdown::from(convert::lockdown(found))).into_response())
}

/// The audit log, newest last
#[utoipa::path(get, path = "/v1/audit", tag = "guests", params(AuditQuery),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = [view::AuditEntry]), (status = "default", body = Problem)))]
pub(in crate::http) async fn list_audit(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Query(query): Query<AuditQuery>,
) -> Answer {
    let command = ListAuditCommand {
        since: query.since(Timestamp::from(SystemTime::now()))?,
        limit: query.limit()?,
        vm: query.vm,
    };
    let found = shell
        .use_cases
        .list_audit
        .execute(&caller, &command)
        .await?;
    let views: Vec<view::AuditEntry> = found
        .into_iter()
        .map(|one| convert::audit_entry(one).into())
        .collect();
    Ok(Json(views).into_response())
}

/// Check the audit log's chain
#[utoipa::path(get, path = "/v1/audit/verify", tag = "guests",
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = view::AuditVerdict), (status = "default", body = Problem)))]
pub(in crate::http) async fn verify_audit(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
) -> Answer {
    let verdict = shell.use_cases.verify_audit.execute(&caller).await?;
    let told = view::AuditVerdict::from(convert::audit_verdict(verdict));
    Ok(Json(told).into_response())
}
