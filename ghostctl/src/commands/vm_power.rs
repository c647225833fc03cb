//! `vm start`, `stop`, `restart`, `pause`, `resume` and `delete`.

use ghost_proto::agent::v1::{
    DeleteVmRequest, PauseVmRequest, RestartVmRequest, ResumeVmRequest, StartVmRequest,
    StopVmRequest,
};
use ghost_proto::core::v1::queue_command_request::Action;

use super::{change, queue, wire};
use crate::arguments::{VmDelete, VmPower, VmStop};
use crate::connect::{Session, ask};
use crate::errors::{Exit, Failure};

pub(super) async fn start(args: VmPower, session: &Session) -> Result<Exit, Failure> {
    if let Some(lifetime) = args.queue.queue {
        let action = |vm| {
            Action::StartVm(StartVmRequest {
                vm,
                request_id: String::new(),
            })
        };
        return queue::each(&args.vms.names, lifetime, &args.change, session, action).await;
    }
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
    if let Some(lifetime) = args.queue.queue {
        let action = |vm| {
            Action::StopVm(StopVmRequest {
                vm,
                force,
                timeout,
                request_id: String::new(),
            })
        };
        return queue::each(&args.vms.names, lifetime, &args.change, session, action).await;
    }
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
    if let Some(lifetime) = args.queue.queue {
        let action = |vm| {
            Action::RestartVm(RestartVmRequest {
                vm,
                force,
                timeout,
                request_id: String::new(),
            })
        };
        return queue::each(&args.vms.names, lifetime, &args.change, session, action).await;
    }
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
    if let Some(lifetime) = args.queue.queue {
        let action = |vm| {
            Action::PauseVm(PauseVmRequest {
                vm,
                request_id: String::new(),
            })
        };
        return queue::each(&args.vms.names, lifetime, &args.change, session, action).await;
    }
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
    if let Some(lifetime) = args.queue.queue {
        let action = |vm| {
            Action::ResumeVm(ResumeVmRequest {
                vm,
                request_id: String::new(),
            })
        };
        return queue::each(&args.vms.names, lifetime, &args.change, session, action).await;
    }
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
    if let Some(lifetime) = args.queue.queue {
        let action = |vm| {
            Action::DeleteVm(DeleteVmRequest {
                vm,
                force,
                request_id: String::new(),
                expected_generation: 0,
            })
        };
        return queue::each(&args.vms.names, lifetime, &args.change, session, action).await;
    }
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
