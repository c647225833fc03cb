//! What each kind of operation consists of, and what its end means for the records.

use std::sync::Arc;
use std::time::Duration;

use ghost_domain::ports::Change;
use ghost_domain::vm::{DesiredPower, Lifecycle, Vm};
use ghost_domain::{EventKind, JournalEvent, Operation, OperationKind, OperationStatus, Timestamp};

use super::step::Step;
use super::steps;
use crate::registry::{Model, Notice};

/// How long a guest may take to follow an ACPI request where the caller names no time.
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(90);

/// The steps of an operation, in order.
pub(crate) struct Plan {
    pub(crate) steps: Vec<Box<dyn Step>>,
}

/// Makes the plan; a pure function of the record, so that it is the same after a crash.
pub(crate) fn plan(operation: &Operation) -> Plan {
    let steps: Vec<Box<dyn Step>> = match &operation.kind {
        OperationKind::CreateVm { start } => {
            let mut steps: Vec<Box<dyn Step>> = vec![
                Box::new(steps::FetchImage),
                Box::new(steps::CreateFolder),
                Box::new(steps::CreateDisk),
                Box::new(steps::WriteSeed),
                Box::new(steps::EnsureNetworks),
                Box::new(steps::DefineDomain),
            ];
            if *start {
                steps.push(Box::new(steps::StartDomain));
            }
            steps
        }
        OperationKind::StartVm => vec![
            Box::new(steps::EnsureNetworks),
            Box::new(steps::RestoreDomain),
            Box::new(steps::StartDomain),
        ],
        OperationKind::StopVm { force, timeout } => vec![stop(*force, *timeout)],
        OperationKind::RestartVm { force, timeout } => vec![
            stop(*force, *timeout),
            Box::new(steps::EnsureNetworks),
            Box::new(steps::StartDomain),
        ],
        OperationKind::PauseVm => vec![Box::new(steps::PauseDomain)],
        OperationKind::ResumeVm => vec![Box::new(steps::ResumeDomain)],
        OperationKind::DeleteVm { .. } => vec![
            Box::new(steps::CutPower),
            Box::new(steps::UndefineDomain),
            Box::new(steps::RemoveFolder),
        ],
        OperationKind::UpdateVm { change } if !change.concerns_domain() => Vec::new(),
        OperationKind::UpdateVm { change } => vec![Box::new(steps::RedefineDomain {
            change: change.clone(),
        })],
        OperationKind::PullImage {
            name,
            url,
            checksum,
        } => vec![Box::new(steps::PullImage {
            name: name.clone(),
            url: url.clone(),
            checksum: checksum.clone(),
        })],
        OperationKind::ImportImage {
            name,
            staged,
            file_name,
        } => vec![Box::new(steps::ImportImage {
            name: name.clone(),
            staged: staged.clone(),
            file_name: file_name.clone(),
        })],
        OperationKind::DeleteImage { name } => {
            vec![Box::new(steps::DeleteImage { name: name.clone() })]
        }
    };
    Plan { steps }
}

fn stop(force: bool, timeout: Option<Duration>) -> Box<dyn Step> {
    match (force, timeout) {
        (true, None) => Box::new(steps::CutPower),
        (force, timeout) => Box::new(steps::ShutDown {
            timeout: timeout.unwrap_or(STOP_TIMEOUT),
            force,
        }),
    }
}

/// What a step mostly takes, for bounding how many go on at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Weight {
    Light,
    Transfer,
    DiskWork,
}

/// The weight of a step.
pub(crate) fn weight(step: &str) -> Weight {
    match step {
        "fetch_image" | "pull_image" | "import_image" => Weight::Transfer,
        "create_disk" | "write_seed" | "start_domain" | "remove_folder" => Weight::DiskWork,
        _ => Weight::Light,
    }
}

/// Steps that are not waited for when the agent drains: their effects can be taken up again.
pub(crate) fn may_take_long(step: &str) -> bool {
    matches!(
        step,
        "fetch_image" | "pull_image" | "import_image" | "shut_down"
    )
}

/// When an operation is given up.
pub(crate) fn deadline_for(kind: &OperationKind) -> Duration {
    let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
    match kind {
        // A large image over a slow line: the download has its own stall timeout.
        OperationKind::CreateVm { .. } | OperationKind::PullImage { .. } => minutes(12 * 60),
        OperationKind::ImportImage { .. } => minutes(60),
        OperationKind::StopVm { timeout, .. } | OperationKind::RestartVm { timeout, .. } => {
            timeout.unwrap_or(STOP_TIMEOUT).saturating_add(minutes(2))
        }
        OperationKind::StartVm
        | OperationKind::PauseVm
        | OperationKind::ResumeVm
        | OperationKind::UpdateVm { .. }
        | OperationKind::DeleteImage { .. } => minutes(2),
        OperationKind::DeleteVm { .. } => minutes(10),
    }
}

/// The records that follow from an operation's end, and what is told of it.
pub(crate) fn completion(
    model: &Model,
    operation: &Operation,
    now: Timestamp,
) -> (Vec<Change>, Vec<Notice>) {
    let mut changes = Vec::new();
    let mut notices = Vec::new();
    let Some(entry) = operation.vm.and_then(|vm| model.vms.get(&vm)) else {
        return (changes, notices);
    };
    let vm = Arc::clone(&entry.vm);
    let tell = |kind: EventKind| Notice {
        kind,
        vm: Some(vm.id),
        subject: vm.name.to_string(),
    };
    let succeeded = operation.status == OperationStatus::Succeeded;
    let put = |change: &dyn Fn(&mut Vm)| {
        let mut vm = Vm::clone(&vm);
        change(&mut vm);
        Change::PutVm(Box::new(vm))
    };
    match &operation.kind {
        OperationKind::CreateVm { .. } => {
            if succeeded {
                changes.push(put(&|vm| vm.lifecycle = Lifecycle::Ready));
                if let Some(image) = model.images.get(&vm.spec.image.name) {
                    let mut image = image.clone();
                    image.last_used_at = now;
                    changes.push(Change::PutImage(image));
                }
                notices.push(tell(EventKind::VmAdded { adopted: false }));
            } else if operation.status == OperationStatus::NeedsAttention {
                let reason =
                    failure_reason("creating it failed and could not be undone", operation);
                changes.push(put(&|vm| {
                    vm.desired = DesiredPower::Stopped;
                    vm.lifecycle = Lifecycle::Failed {
                        reason: reason.clone(),
                    };
                }));
            } else {
                changes.push(Change::DeleteVm(vm.id));
            }
        }
        OperationKind::DeleteVm { .. } => {
            let nothing_done = !operation
                .journal
                .iter()
                .any(|line| line.event == JournalEvent::Done);
            if succeeded {
                changes.push(Change::DeleteVm(vm.id));
                notices.push(tell(EventKind::VmRemoved));
            } else if nothing_done {
                changes.push(put(&|vm| vm.lifecycle = Lifecycle::Ready));
            } else {
                let reason = failure_reason("deleting it did not finish", operation);
                changes.push(put(&|vm| {
                    vm.lifecycle = Lifecycle::Failed {
                        reason: reason.clone(),
                    }
                }));
            }
        }
        OperationKind::UpdateVm { change } => {
            if succeeded {
                if change.concerns_domain() {
                    changes.push(put(&|vm| steps::apply_change(vm, change)));
                }
                notices.push(tell(EventKind::VmUpdated));
            }
        }
        OperationKind::StartVm | OperationKind::RestartVm { .. } | OperationKind::ResumeVm => {
            if succeeded {
                changes.push(put(&|vm| {
                    vm.desired = DesiredPower::Running;
                    vm.lifecycle = Lifecycle::Ready;
                }));
            }
        }
        OperationKind::StopVm { .. } => {
            if succeeded {
                changes.push(put(&|vm| vm.desired = DesiredPower::Stopped));
            }
        }
        OperationKind::PauseVm => {
            if succeeded {
                changes.push(put(&|vm| vm.desired = DesiredPower::Paused));
            }
        }
        OperationKind::PullImage { .. }
        | OperationKind::ImportImage { .. }
        | OperationKind::DeleteImage { .. } => {}
    }
    (changes, notices)
}

fn failure_reason(what: &str, operation: &Operation) -> String {
    operation
        .error
        .as_ref()
        .map_or_else(|| what.to_owned(), |error| format!("{what}: {error}"))
}
