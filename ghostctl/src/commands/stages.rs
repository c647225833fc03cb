//! How a new VM comes up, a line a stage: boot, address, agent, cloud-init.
//!
//! The VM is made and runs by then: whatever happens here, nothing is undone and nothing stops.

use std::time::Instant;

use ghost_proto::agent::v1::VmLogsRequest;
use ghost_proto::view::{Vm, VmState};

use super::guest_wait::{self, CloudInit, Facts, cloud_init_failure};
use super::vm_wait::has_not_failed;
use super::waiting::CtrlC;
use crate::arguments::{Following, WaitStage};
use crate::connect::{Agent, Session};
use crate::errors::{ErrorCode, Failure, timed_out};
use crate::text::printable;

/// What a person reads of a console to see where a boot hangs.
const CONSOLE_LINES: usize = 20;
/// Twenty lines are rarely longer.
const CONSOLE_BYTES: u64 = 8 << 10;
/// The log is read from the host's disk; a host that cannot do that has other problems.
const CONSOLE_PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);

/// How far to wait, where the person did not say: a person at a terminal wants to see the guest
/// come up, a script goes on as soon as the VM runs.
fn target(following: Following, vm: &Vm, session: &Session) -> WaitStage {
    let has_agent = vm
        .guest
        .as_ref()
        .is_some_and(|guest| guest.inject != "never");
    match following.wait {
        Some(stage) => stage,
        None if session.printer.is_watched() && has_agent => WaitStage::CloudInit,
        None => WaitStage::Running,
    }
}

/// Which stages were told of.
#[derive(Default)]
struct Told {
    running: bool,
    address: bool,
    agent: bool,
}

/// Follows a VM that was just started.
pub(super) async fn follow(
    agent: &Agent,
    name: &str,
    following: Following,
    session: &Session,
) -> Result<(), Failure> {
    if matches!(following.wait, Some(WaitStage::None | WaitStage::Running))
        || (following.wait.is_none() && !session.printer.is_watched())
    {
        // The operation has ended: it runs.
        return Ok(());
    }
    let begun = Instant::now();
    let mut ctrl_c = CtrlC::listen()?;
    let mut facts = Facts::default();
    let mut tracker = session.printer.progress().track(name);
    let mut told = Told::default();
    let say = |text: String| {
        session.printer.note(&format!(
            "{}: {} ({:.1}s)",
            printable(name),
            printable(&text),
            begun.elapsed().as_secs_f64()
        ));
    };
    let watch = guest_wait::watch(agent, name, &mut facts, |facts| {
        let Some(vm) = &facts.vm else { return Ok(None) };
        has_not_failed(vm)?;
        if vm.state == VmState::Running && !told.running {
            told.running = true;
            say("running".to_owned());
        }
        if let Some(address) = facts.address().filter(|_| !told.address) {
            told.address = true;
            say(format!("address {address}"));
        }
        if facts.agent() && !told.agent {
            told.agent = true;
            say(match facts.agent_reason() {
                Some(reason) => format!("agent answers, {reason}"),
                None => "agent answers".to_owned(),
            });
        }
        let there = match target(following, vm, session) {
            WaitStage::None | WaitStage::Running => told.running,
            WaitStage::Address => told.address,
            WaitStage::Agent => told.agent,
            WaitStage::CloudInit => match facts.cloud_init() {
                CloudInit::NotYet => false,
                CloudInit::Finished => {
                    say("cloud-init has finished".to_owned());
                    true
                }
                CloudInit::Absent => {
                    say("no cloud-init in it".to_owned());
                    true
                }
                CloudInit::Failed(errors) => return Err(cloud_init_failure(&vm.name, &errors)),
            },
        };
        if !there {
            tracker.update(&format!("waiting for {}", awaited(facts, &told)), None);
        }
        Ok(there.then_some(()))
    });
    let limited = async {
        match tokio::time::timeout(following.wait_timeout, watch).await {
            Ok(answer) => answer.map_err(|failure| (failure, false)),
            Err(_) => Err((timed_out(String::new(), following.wait_timeout), true)),
        }
    };
    let ended = {
        let mut outcome = Ok(());
        let waited = ctrl_c
            .or(
                async {
                    outcome = limited.await;
                    Ok(())
                },
                || {
                    Failure::new(
                        ErrorCode::Interrupted,
                        format!("interrupted; {name} goes on"),
                    )
                    .hint(format!("ghostctl vm wait {name} --for agent"))
                },
            )
            .await;
        waited.map(|()| outcome)
    };
    drop(tracker);
    match ended? {
        Ok(()) => Ok(()),
        Err((failure, false)) => Err(failure),
        Err((_, true)) => {
            console(agent, name, session).await;
            Err(late(name, following, &facts))
        }
    }
}

/// The stage that comes next.
fn awaited(facts: &Facts, told: &Told) -> String {
    if told.agent {
        match facts.cloud_init_phase() {
            Some(phase) => format!("cloud-init ({})", printable(phase)),
            None => "cloud-init".to_owned(),
        }
    } else if told.address {
        "the agent in it".to_owned()
    } else if told.running {
        "an address, and the agent in it".to_owned()
    } else {
        "its boot".to_owned()
    }
}

/// The wait is over and the VM is not there yet.
fn late(name: &str, following: Following, facts: &Facts) -> Failure {
    let missing = if facts.agent() {
        "has not finished cloud-init"
    } else if facts.address().is_some() {
        "has no agent that answers"
    } else {
        "has no address and no agent that answers"
    };
    let mut failure = timed_out(
        format!("{name} runs, but {missing}"),
        following.wait_timeout,
    )
    .hint(format!(
        "it goes on: ghostctl vm wait {name} --for agent, ghostctl guest status {name}"
    ));
    if let Some(phase) = facts.cloud_init_phase().filter(|_| facts.agent()) {
        failure = failure.because(format!("cloud-init is {phase}"));
    } else if let Some(reason) = facts.agent_reason() {
        failure = failure.because(reason);
    }
    failure
}

/// Shows the end of the console's log: it says where a boot hangs.
async fn console(agent: &Agent, name: &str, session: &Session) {
    let read = async {
        let mut stream = agent
            .vms()
            .logs(VmLogsRequest {
                vm: name.to_owned(),
                follow: false,
                tail_bytes: CONSOLE_BYTES,
            })
            .await?
            .into_inner();
        let mut bytes = Vec::new();
        while let Some(part) = stream.message().await? {
            bytes.extend(part.data);
        }
        Ok::<_, tonic::Status>(bytes)
    };
    // The failure that follows says what matters; without the log it is only shorter.
    let Ok(Ok(bytes)) = tokio::time::timeout(CONSOLE_PATIENCE, read).await else {
        session.printer.note("the console's log could not be read");
        return;
    };
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text
        .split(['\n', '\r'])
        .filter(|line| !line.trim().is_empty())
        .collect();
    if lines.is_empty() {
        session
            .printer
            .note(&format!("{} wrote nothing to its console", printable(name)));
        return;
    }
    session
        .printer
        .note(&format!("the end of the console of {}:", printable(name)));
    for line in &lines[lines.len().saturating_sub(CONSOLE_LINES)..] {
        session.printer.note(&format!("  {}", printable(line)));
    }
}
