//! `vm wait`: follows the VM's stream until it is in the state that is waited for.

use ghost_proto::agent::v1::WatchVmRequest;
use ghost_proto::view::{Vm, VmState};

use crate::arguments::{VmWait, WaitFor};
use crate::connect::{Agent, Session};
use crate::errors::{ErrorCode, Exit, Failure, timed_out};
use crate::text::{exact_duration, printable};

pub(super) async fn run(args: VmWait, session: &Session) -> Result<Exit, Failure> {
    let (what, not_yet) = match args.what {
        WaitFor::Running => ("running", "does not run yet"),
        WaitFor::Stopped => ("stopped", "has not stopped yet"),
        WaitFor::Address => ("an address", "has no address yet"),
        WaitFor::Agent => return Err(not_reported("agents in its VMs")),
        WaitFor::CloudInit => return Err(not_reported("cloud-init in its VMs")),
    };
    let agent = session.agent().await?;
    let mut tracker = session.printer.progress().track(&args.name);
    let mut last = None;
    let watched = tokio::time::timeout(
        args.timeout,
        watch(&agent, &args, &mut last, |vm| {
            tracker.update(&format!("{}, waiting for {what}", vm.state), None);
        }),
    )
    .await;
    drop(tracker);
    let vm = watched.unwrap_or_else(|_| {
        let failure = timed_out(format!("{} {not_yet}", args.name), args.timeout);
        Err(match &last {
            Some(vm) => failure
                .because(format!(
                    "it is {} after {}",
                    vm.state,
                    exact_duration(args.timeout)
                ))
                .hint(format!("ghostctl vm logs {}", vm.name)),
            None => failure.hint("ghostctl status"),
        })
    })?;
    session.printer.several(
        std::slice::from_ref(&vm),
        1,
        |vm| &vm.name,
        |vm, _| match args.what {
            WaitFor::Address => first_address(vm)
                .map(|address| format!("{}\n", printable(address)))
                .unwrap_or_default(),
            WaitFor::Running | WaitFor::Stopped | WaitFor::Agent | WaitFor::CloudInit => {
                format!("{} is {}\n", printable(&vm.name), vm.state)
            }
        },
    )?;
    Ok(Exit::Done)
}

/// This version of the protocol has no such condition; to wait for it would be to wait for ever.
fn not_reported(what: &str) -> Failure {
    Failure::new(
        ErrorCode::Internal,
        format!("this agent does not report {what} yet"),
    )
    .hint("ghostctl vm wait NAME --for address")
}

fn first_address(vm: &Vm) -> Option<&String> {
    vm.nics.iter().flat_map(|nic| &nic.addresses).next()
}

async fn watch(
    agent: &Agent,
    args: &VmWait,
    last: &mut Option<Vm>,
    mut show: impl FnMut(&Vm),
) -> Result<Vm, Failure> {
    let failed = |status| agent.failure(&status);
    let mut stream = agent
        .vms()
        .watch(WatchVmRequest {
            vm: args.name.clone(),
        })
        .await
        .map_err(failed)?
        .into_inner();
    while let Some(vm) = stream.message().await.map_err(failed)? {
        let vm = Vm::from(vm);
        let there = match args.what {
            WaitFor::Running => vm.state == VmState::Running,
            WaitFor::Stopped => vm.state == VmState::Stopped,
            WaitFor::Address => first_address(&vm).is_some(),
            WaitFor::Agent | WaitFor::CloudInit => false,
        };
        if there {
            return Ok(vm);
        }
        // A VM that failed and that nobody works on stays as it is: the deadline would only
        // hide that.
        if vm.state == VmState::Failed && vm.operation_id.is_none() {
            let failure =
                Failure::new(ErrorCode::WrongState, format!("{} has failed", vm.name)).hint(
                    format!("ghostctl vm show {0}, ghostctl vm logs {0}", vm.name),
                );
            return Err(match vm.state_reason {
                Some(reason) => failure.because(reason),
                None => failure,
            });
        }
        show(&vm);
        *last = Some(vm);
    }
    Err(match last {
        Some(vm) => Failure::new(ErrorCode::VmNotFound, format!("{} is gone", vm.name))
            .because("it was deleted while it was waited for"),
        None => Failure::new(
            ErrorCode::AgentUnreachable,
            "the agent ended the wait without an answer",
        )
        .hint("ghostctl status"),
    })
}
