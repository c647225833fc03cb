//! `vm start`, `stop`, `restart`, `pause`, `resume` and `delete`.

use ghost_proto::agent::v1::{
    DeleteVmRequest, PauseVmRequest, RestartVmRequest, ResumeVmRequest, StartVmRequest,
    StopVmRequest,
};

use super::{change, wire};
use crate::arguments::{VmDelete, VmPower, VmStop};
use crate::connect::{Session, ask};
use crate::errors::{Exit, Failure};

pub(super) async fn start(args: VmPower, session: &Session) -> Result<Exit, Failure> {
    change::each(
        &args.vms.names,
        &args.change,
        "Started",
        session,
        |agent, vm, request_id| async move {
            let request = StartVmRequest { vm, request_id };
            agent.vms().start(ask(request)).await
        },
    )
    .await
}

pub(super) async fn stop(args: VmStop, session: &Session) -> Result<Exit, Failure> {
    let (force, timeout) = (args.force, args.timeout.map(wire));
    change::each(
        &args.vms.names,
        &args.change,
        "Stopped",
        session,
        |agent, vm, request_id| async move {
            let request = StopVmRequest {
                vm,
                force,
                timeout,
                request_id,
            };
            agent.vms().stop(ask(request)).await
        },
    )
    .await
}

pub(super) async fn restart(args: VmStop, session: &Session) -> Result<Exit, Failure> {
    let (force, timeout) = (args.force, args.timeout.map(wire));
    change::each(
        &args.vms.names,
        &args.change,
        "Restarted",
        session,
        |agent, vm, request_id| async move {
            let request = RestartVmRequest {
                vm,
                force,
                timeout,
                request_id,
            };
            agent.vms().restart(ask(request)).await
        },
    )
    .await
}

pub(super) async fn pause(args: VmPower, session: &Session) -> Result<Exit, Failure> {
    change::each(
        &args.vms.names,
        &args.change,
        "Paused",
        session,
        |agent, vm, request_id| async move {
            let request = PauseVmRequest { vm, request_id };
            agent.vms().pause(ask(request)).await
        },
    )
    .await
}

pub(super) async fn resume(args: VmPower, session: &Session) -> Result<Exit, Failure> {
    change::each(
        &args.vms.names,
        &args.change,
        "Resumed",
        session,
        |agent, vm, request_id| async move {
            let request = ResumeVmRequest { vm, request_id };
            agent.vms().resume(ask(request)).await
        },
    )
    .await
}

pub(super) async fn delete(args: VmDelete, session: &Session) -> Result<Exit, Failure> {
    let force = args.force;
    change::each(
        &args.vms.names,
        &args.change,
        "Deleted",
        session,
        |agent, vm, request_id| async move {
            let request = DeleteVmRequest {
                vm,
                force,
                request_id,
                expected_generation: 0,
            };
            agent.vms().delete(ask(request)).await
        },
    )
    .await
}
