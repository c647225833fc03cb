//! `vm wait`: follows the VM's stream until it is in the state that is waited for.

use ghost_proto::view::{Vm, VmState};

use super::guest_wait::{self, CloudInit, Facts, cloud_init_failure, first_address};
use crate::arguments::{VmWait, WaitFor};
use crate::connect::Session;
use crate::errors::{ErrorCode, Exit, Failure, timed_out};
use crate::text::{exact_duration, printable};

pub(super) async fn run(args: VmWait, session: &Session) -> Result<Exit, Failure> {
    let (what, not_yet) = match args.what {
        WaitFor::Running => ("running", "does not run yet"),
        WaitFor::Stopped => ("stopped", "has not stopped yet"),
        WaitFor::Address => ("an address", "has no address yet"),
        WaitFor::Agent => ("its agent", "has no agent that answers yet"),
        WaitFor::CloudInit => ("cloud-init", "has not finished cloud-init yet"),
    };
    let agent = session.agent().await?;
    let mut tracker = session.printer.progress().track(&args.name);
    let mut facts = Facts::default();
    let watched = tokio::time::timeout(
        args.timeout,
        guest_wait::watch(&agent, &args.name, &mut facts, |facts| {
            let Some(vm) = &facts.vm else { return Ok(None) };
            if reached(args.what, vm, facts)? {
                return Ok(Some(vm.clone()));
            }
            let phase = facts
                .cloud_init_phase()
                .filter(|_| args.what == WaitFor::CloudInit && facts.agent())
                .map(|phase| format!(" ({})", printable(phase)))
                .unwrap_or_default();
            tracker.update(&format!("{}, waiting for {what}{phase}", vm.state), None);
            Ok(None)
        }),
    )
    .await;
    drop(tracker);
    let vm = watched.unwrap_or_else(|_| {
        let failure = timed_out(format!("{} {not_yet}", args.name), args.timeout);
        Err(match &facts.vm {
            Some(vm) => {
                let why = match (args.what, facts.cloud_init_phase(), facts.agent_reason()) {
                    (WaitFor::CloudInit, Some(phase), _) if facts.agent() => {
                        format!(", cloud-init is {phase}")
                    }
                    (WaitFor::Agent | WaitFor::CloudInit, _, Some(reason)) => {
                        format!(", and of its agent is known: {reason}")
                    }
                    _ => String::new(),
                };
                failure
                    .because(format!(
                        "it is {} after {}{why}",
                        vm.state,
                        exact_duration(args.timeout)
                    ))
                    .hint(match args.what {
                        WaitFor::Agent | WaitFor::CloudInit => {
                            format!("ghostctl guest status {0}, ghostctl vm logs {0}", vm.name)
                        }
                        _ => format!("ghostctl vm logs {}", vm.name),
                    })
            }
            None => failure.hint("ghostctl status"),
        })
    })?;
    session.printer.several(
        std::slice::from_ref(&vm),
        1,
        |vm| &vm.name,
        |vm, _| {
            let name = printable(&vm.name);
            match args.what {
                WaitFor::Address => first_address(vm)
                    .map(|address| format!("{}\n", printable(address)))
                    .unwrap_or_default(),
                WaitFor::Running | WaitFor::Stopped => format!("{name} is {}\n", vm.state),
                WaitFor::Agent => format!("the agent of {name} answers\n"),
                WaitFor::CloudInit => match facts.cloud_init() {
                    CloudInit::Absent => format!("{name} has no cloud-init to wait for\n"),
                    _ => format!("cloud-init of {name} has finished\n"),
                },
            }
        },
    )?;
    Ok(Exit::Done)
}

/// Whether it is there; a failure where it will never be.
fn reached(what: WaitFor, vm: &Vm, facts: &Facts) -> Result<bool, Failure> {
    let there = match what {
        WaitFor::Running => vm.state == VmState::Running,
        WaitFor::Stopped => vm.state == VmState::Stopped,
        WaitFor::Address => first_address(vm).is_some(),
        WaitFor::Agent => facts.agent(),
        WaitFor::CloudInit => match facts.cloud_init() {
            CloudInit::NotYet => false,
            CloudInit::Finished | CloudInit::Absent => true,
            CloudInit::Failed(errors) => return Err(cloud_init_failure(&vm.name, &errors)),
        },
    };
    if !there {
        has_not_failed(vm)?;
    }
    Ok(there)
}

/// A VM that failed and that nobody works on stays as it is: the deadline would only hide that.
pub(super) fn has_not_failed(vm: &Vm) -> Result<(), Failure> {
    if vm.state != VmState::Failed || vm.operation_id.is_some() {
        return Ok(());
    }
    let failure = Failure::new(ErrorCode::WrongState, format!("{} has failed", vm.name)).hint(
        format!("ghostctl vm show {0}, ghostctl vm logs {0}", vm.name),
    );
    Err(match &vm.state_reason {
        Some(reason) => failure.because(reason),
        None => failure,
    })
}
