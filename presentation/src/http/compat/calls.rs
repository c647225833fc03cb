//! The requests and answers, over whichever backend.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use ghost_domain::{Error, ErrorCode, Result};
use ghost_proto::agent::v1 as message;

use super::super::extract::{Body, IdempotencyKey, Name, Query};
use super::super::guest::{Captured, collect};
use super::super::problem::Problem;
use super::bodies::{
    AgentList, AgentQuery, BatwaAgent, BatwaVm, Changed, CreateBody, DeleteBody, ExecuteBody,
    Executed, HeartbeatBody, RegisterBody, Registered, StartBody, StopBody, UnregisterQuery,
    VmList,
};
use super::{Answer, Asker, Backend, Batwa, Begun, Change, Wanted};
use crate::convert;

/// So long an answer to a change waits for its end; what takes longer is told as under way.
pub const SETTLE: Duration = Duration::from_secs(10);
/// How much longer than a program's own time its answer may take.
const MARGIN: Duration = Duration::from_secs(30);

/// Acknowledge an agent
///
/// It enrols nobody and changes nothing: a host joins with a token of its own, by `ghost-agent
/// enroll`, and is known here from then on. One that is not is refused. `api_url` is never dialled.
#[utoipa::path(post, path = "/api/agent/register", tag = "batwa", request_body = RegisterBody,
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = Registered), (status = "default", body = Problem)))]
pub(super) async fn register(
    State(batwa): State<Batwa>,
    asker: Asker,
    Body(body): Body<RegisterBody>,
) -> Answer {
    let known = match batwa.agent(&asker, &body.agent_id).await {
        Err(error) if error.code() == ErrorCode::HostNotFound && !body.hostname.is_empty() => {
            batwa.agent(&asker, &body.hostname).await
        }
        known => known,
    };
    acknowledged(
        known,
        "the host is known by its own enrolment; nothing was changed",
    )
}

/// The answer to a host that says something of itself by a key.
fn acknowledged(known: Result<BatwaAgent>, message: &str) -> Answer {
    let agent = known.map_err(|error| match error.code() {
        ErrorCode::HostNotFound => Error::new(
            ErrorCode::NotEnrolled,
            "no host has joined under that agent_id or hostname",
        )
        .because("a key alone does not make a host: each has an identity of its own")
        .hint(
            "on Core: ghost-core token create --tenant TENANT; on the host: ghost-agent enroll --token TOKEN --name AGENT_ID",
        ),
        _ => error,
    })?;
    let registered = Registered {
        success: true,
        message: message.to_owned(),
        agent_id: agent.agent_id,
        hostname: agent.hostname,
        status: agent.status,
    };
    Ok(Json(registered).into_response())
}

/// Acknowledge a heartbeat
///
/// It changes nothing, whatever it says: a host is online by what comes over its own link. The
/// answer tells whether it is. One that has not joined is refused.
#[utoipa::path(post, path = "/api/agent/heartbeat", tag = "batwa", request_body = HeartbeatBody,
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = Registered), (status = "default", body = Problem)))]
pub(super) async fn heartbeat(
    State(batwa): State<Batwa>,
    asker: Asker,
    Body(body): Body<HeartbeatBody>,
) -> Answer {
    let known = batwa.agent(&asker, &body.agent_id).await;
    acknowledged(
        known,
        "the host is known; whether it is online is told by its own link",
    )
}

/// Show an agent
#[utoipa::path(get, path = "/api/agent/info/{agent_id}", tag = "batwa",
    params(("agent_id" = String, Path, description = "Its name or id; %2F for the slash of tenant/name")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = BatwaAgent), (status = "default", body = Problem)))]
pub(super) async fn agent_info(
    State(batwa): State<Batwa>,
    asker: Asker,
    Name(agent_id): Name,
) -> Answer {
    let agent = batwa.agent(&asker, &agent_id).await?;
    Ok(Json(agent).into_response())
}

/// Take a host out of the fleet
///
/// Its identity is good for nothing from then on; its VMs go on. One that is online, or for which
/// commands wait, only with `force`. An agent does not do that by a key: its owner does.
#[utoipa::path(delete, path = "/api/agent/unregister/{agent_id}", tag = "batwa",
    params(UnregisterQuery, ("agent_id" = String, Path, description = "Its name or id; %2F for the slash of tenant/name")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = Registered), (status = "default", body = Problem)))]
pub(super) async fn unregister(
    State(batwa): State<Batwa>,
    asker: Asker,
    Name(agent_id): Name,
    Query(query): Query<UnregisterQuery>,
) -> Answer {
    let agent = batwa.agent(&asker, &agent_id).await?;
    batwa
        .unregister(&asker, &agent.agent_id, query.force)
        .await?;
    let removed = Registered {
        success: true,
        message: "the host is not in the fleet any more; its VMs go on".to_owned(),
        agent_id: agent.agent_id,
        hostname: agent.hostname,
        status: "offline".to_owned(),
    };
    Ok(Json(removed).into_response())
}

/// List agents
///
/// All hosts that the caller sees, however they joined.
#[utoipa::path(get, path = "/api/agent/list", tag = "batwa",
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = AgentList), (status = "default", body = Problem)))]
pub(super) async fn list_agents(State(batwa): State<Batwa>, asker: Asker) -> Answer {
    let agents = batwa.agents(&asker).await?;
    Ok(Json(AgentList { agents }).into_response())
}

/// List VMs, each with its host
#[utoipa::path(get, path = "/api/vm/list", tag = "batwa", params(AgentQuery),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = VmList), (status = "default", body = Problem)))]
pub(super) async fn list_vms(
    State(batwa): State<Batwa>,
    asker: Asker,
    Query(query): Query<AgentQuery>,
) -> Answer {
    let wanted = Wanted {
        name: None,
        agent_id: query.agent_id,
    };
    let vms = batwa.vms(&asker, wanted).await?;
    Ok(Json(VmList { vms }).into_response())
}

/// Show a VM
#[utoipa::path(get, path = "/api/vm/info/{vm_name}", tag = "batwa",
    params(AgentQuery, ("vm_name" = String, Path, description = "Its name")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = BatwaVm), (status = "default", body = Problem)))]
pub(super) async fn vm_info(
    State(batwa): State<Batwa>,
    asker: Asker,
    Name(vm): Name,
    Query(query): Query<AgentQuery>,
) -> Answer {
    let found = the_one(batwa.as_ref(), &asker, &vm, query.agent_id).await?;
    let vm = found.ok_or_else(|| no_such_vm(&vm))?;
    Ok(Json(vm).into_response())
}

/// Create a VM and start it
///
/// On the host that `agent_id` names; otherwise Core finds one, and says why that.
#[utoipa::path(post, path = "/api/vm/create", tag = "batwa", request_body = CreateBody,
    params(("Idempotency-Key" = Option<String>, Header, description = "The same key returns the same operation")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = Changed), (status = 202, body = Changed),
        (status = "default", body = Problem)))]
pub(super) async fn create_vm(
    State(batwa): State<Batwa>,
    asker: Asker,
    IdempotencyKey(request_id): IdempotencyKey,
    Body(body): Body<CreateBody>,
) -> Answer {
    let agent_id = body.agent_id.clone();
    let request = body.message(text(request_id))?;
    answer(batwa.create(&asker, agent_id, request).await?, "created")
}

/// Start a VM
#[utoipa::path(post, path = "/api/vm/start", tag = "batwa", request_body = StartBody,
    params(("Idempotency-Key" = Option<String>, Header, description = "The same key returns the same operation")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = Changed), (status = 202, body = Changed),
        (status = "default", body = Problem)))]
pub(super) async fn start_vm(
    State(batwa): State<Batwa>,
    asker: Asker,
    IdempotencyKey(request_id): IdempotencyKey,
    Body(body): Body<StartBody>,
) -> Answer {
    let (agent_id, vm) = place(batwa.as_ref(), &asker, body.vm_name, body.agent_id).await?;
    let change = Change::Start(message::StartVmRequest {
        vm,
        request_id: text(request_id),
    });
    answer(batwa.change(&asker, &agent_id, change).await?, "started")
}

/// Stop a VM
///
/// By ACPI; the power is cut only with `force`.
#[utoipa::path(post, path = "/api/vm/stop", tag = "batwa", request_body = StopBody,
    params(("Idempotency-Key" = Option<String>, Header, description = "The same key returns the same operation")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = Changed), (status = 202, body = Changed),
        (status = "default", body = Problem)))]
pub(super) async fn stop_vm(
    State(batwa): State<Batwa>,
    asker: Asker,
    IdempotencyKey(request_id): IdempotencyKey,
    Body(body): Body<StopBody>,
) -> Answer {
    let timeout = body.timeout()?.map(convert::duration);
    let (agent_id, vm) = place(batwa.as_ref(), &asker, body.vm_name, body.agent_id).await?;
    let change = Change::Stop(message::StopVmRequest {
        vm,
        force: body.force,
        timeout,
        request_id: text(request_id),
    });
    answer(batwa.change(&asker, &agent_id, change).await?, "stopped")
}

/// Delete a VM with its disks
///
/// One that runs is refused, except with `force`.
#[utoipa::path(post, path = "/api/vm/delete", tag = "batwa", request_body = DeleteBody,
    params(("Idempotency-Key" = Option<String>, Header, description = "The same key returns the same operation")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = Changed), (status = 202, body = Changed),
        (status = "default", body = Problem)))]
pub(super) async fn delete_vm(
    State(batwa): State<Batwa>,
    asker: Asker,
    IdempotencyKey(request_id): IdempotencyKey,
    Body(body): Body<DeleteBody>,
) -> Answer {
    let (agent_id, vm) = place(batwa.as_ref(), &asker, body.vm_name, body.agent_id).await?;
    let change = Change::Delete(message::DeleteVmRequest {
        vm,
        force: body.force,
        request_id: text(request_id),
        ..Default::default()
    });
    answer(batwa.change(&asker, &agent_id, change).await?, "deleted")
}

/// Run a program in a VM and wait for its end
///
/// Never on the host. A client that goes away cancels it.
#[utoipa::path(post, path = "/api/execute", tag = "batwa", request_body = ExecuteBody,
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = Executed), (status = "default", body = Problem)))]
pub(super) async fn execute(
    State(batwa): State<Batwa>,
    asker: Asker,
    Body(body): Body<ExecuteBody>,
) -> Answer {
    let agent_id = body.agent_id.clone();
    let (vm, mut start, most) = body.request()?;
    // The guest ends it at its timeout; this is for a guest that does not.
    let patience = start
        .timeout
        .as_ref()
        .map_or(Ok(MARGIN), |time| convert::length_of(time, "timeout"))?
        + MARGIN;
    let (agent_id, vm) = place(batwa.as_ref(), &asker, vm, agent_id).await?;
    start.vm = vm;
    let called_off = batwa.called_off(asker.clone());
    let call = async {
        let session = batwa.execute(&asker, &agent_id, start).await?;
        collect(called_off, session, None, most).await
    };
    let done = tokio::time::timeout(patience, call).await.map_err(|_| {
        Error::new(ErrorCode::DeadlineExceeded, "the guest did not answer")
            .because(format!("it was given up after {} s", patience.as_secs()))
    })??;
    let text = |captured: &Captured| String::from_utf8_lossy(&captured.data).into_owned();
    let exit = &done.exit;
    let returncode = exit
        .signal
        .map_or_else(|| i32::from(exit.code), |signal| -i32::from(signal));
    let executed = Executed {
        success: returncode == 0 && !exit.timed_out && !exit.cancelled,
        returncode,
        stdout: text(&done.stdout),
        stderr: text(&done.stderr),
        timed_out: exit.timed_out,
        truncated: done.stdout.truncated || done.stderr.truncated || exit.truncated_bytes > 0,
    };
    Ok(Json(executed).into_response())
}

fn text(request_id: Option<ghost_domain::RequestId>) -> String {
    request_id.map_or_else(String::new, |id| id.as_str().to_owned())
}

fn no_such_vm(name: &str) -> Error {
    Error::new(ErrorCode::VmNotFound, format!("there is no VM {name:?}"))
        .hint("see GET /api/vm/list")
}

/// The VM of a name, or none; several are a conflict.
async fn the_one(
    batwa: &dyn Backend,
    asker: &Asker,
    name: &str,
    agent_id: Option<String>,
) -> Result<Option<BatwaVm>> {
    let wanted = Wanted {
        name: Some(name.to_owned()),
        agent_id,
    };
    let mut found = batwa.vms(asker, wanted).await?;
    if found.len() > 1 {
        let hosts: Vec<_> = found.iter().take(5).map(|vm| vm.agent_id.clone()).collect();
        let more = if found.len() > hosts.len() {
            " and more"
        } else {
            ""
        };
        return Err(Error::new(
            ErrorCode::VmAmbiguous,
            format!("{} hosts have a VM {name:?}", found.len()),
        )
        .because(format!("{}{more} do", hosts.join(", ")))
        .hint("say which: agent_id")
        .field("agent_id", "one of those hosts"));
    }
    Ok(found.pop())
}

/// Which VM on which host.
pub(super) async fn place(
    batwa: &dyn Backend,
    asker: &Asker,
    name: String,
    agent_id: Option<String>,
) -> Result<(String, String)> {
    if name.is_empty() {
        return Err(
            Error::new(ErrorCode::InvalidArgument, "no VM was named").field("vm_name", "needed")
        );
    }
    match the_one(batwa, asker, &name, agent_id.clone()).await? {
        // By its id: the name could be another VM's by the time that it gets there.
        Some(vm) => Ok((vm.agent_id, vm.id)),
        // What is known may be older than the VM: the host itself knows.
        None => match agent_id {
            Some(agent_id) => Ok((agent_id, name)),
            None => Err(no_such_vm(&name)),
        },
    }
}

/// 200 for what is done, 202 for what goes on, an error for what failed.
fn answer(begun: Begun, done: &str) -> Answer {
    use message::OperationStatus as Status;
    let status = match begun.operation.status() {
        Status::Succeeded => StatusCode::OK,
        Status::Pending | Status::Running | Status::Unspecified => StatusCode::ACCEPTED,
        Status::Failed | Status::Cancelled | Status::RolledBack | Status::NeedsAttention => {
            return Err(failure(begun.operation).into());
        }
    };
    Ok((status, Json(Changed::of(begun, done))).into_response())
}

/// Why an operation did not succeed.
fn failure(operation: message::Operation) -> Error {
    let told = operation.error.unwrap_or_default();
    let code = ErrorCode::parse(&told.code).unwrap_or(ErrorCode::Cancelled);
    let message = if told.message.is_empty() {
        "it did not come to its end".to_owned()
    } else {
        told.message
    };
    let mut error = Error::new(code, message);
    if !told.cause.is_empty() {
        error = error.because(told.cause);
    }
    if !told.hint.is_empty() {
        error = error.hint(told.hint);
    }
    match operation.id.parse() {
        Ok(id) => error.of_operation(id),
        Err(_) => error,
    }
}
