//! Restart after a crash, rate-limited.

use ghost_domain::ports::Change;
use ghost_domain::vm::{DesiredPower, RestartPolicy, Vm};
use ghost_domain::{EventKind, OperationKind, Principal, Timestamp, VmId};

use super::Supervisor;
use crate::operations::Submission;
use crate::registry::Model;

/// What the policy says: the restarts within the window, or why it stays off.
fn judge(vm: &Vm, now: Timestamp) -> Result<Vec<Timestamp>, String> {
    match vm.spec.restart_policy {
        RestartPolicy::Never => Err("its restart policy is never".into()),
        RestartPolicy::OnCrash {
            max_restarts,
            window,
        } => {
            let mut recent: Vec<Timestamp> = vm
                .crash_restarts
                .iter()
                .copied()
                .filter(|at| now.since(*at) < window)
                .collect();
            if recent.len() >= usize::try_from(max_restarts).unwrap_or(usize::MAX) {
                return Err(format!(
                    "it crashed more than {max_restarts} times within {} s",
                    window.as_secs()
                ));
            }
            recent.push(now);
            Ok(recent)
        }
    }
}

/// Handles a crash of the guest or of QEMU.
pub(super) async fn handle(supervisor: &Supervisor, id: VmId, reason: &str) {
    let registry = &supervisor.registry;
    let found = registry.read(|model| {
        model
            .vms
            .get(&id)
            .filter(|entry| Model::is_settled(entry) && entry.vm.desired == DesiredPower::Running)
            .map(|entry| Vm::clone(&entry.vm))
    });
    // Where an operation holds the VM, or it was not wanted running, nothing is started.
    let Some(vm) = found else { return };
    let name = vm.name.to_string();
    let now = registry.clock().now();
    let restarts = match judge(&vm, now) {
        Ok(restarts) => restarts,
        Err(why) => {
            let detail = format!("{reason}; {why}");
            registry.tell(
                EventKind::VmCrashed {
                    restarting: false,
                    detail,
                },
                Some(id),
                name,
            );
            return;
        }
    };
    let detail = format!("{reason}; restart {} within the window", restarts.len());
    registry.tell(
        EventKind::VmCrashed {
            restarting: true,
            detail,
        },
        Some(id),
        name.clone(),
    );
    let submission = Submission {
        kind: OperationKind::StartVm,
        vm: Some(id),
        subject: name,
        request_id: None,
        request_hash: 0,
    };
    let started = supervisor
        .engine
        .submit(&Principal::agent(), submission, move |model| {
            let mut vm = Vm::clone(&model.vm(id)?.vm);
            vm.crash_restarts = restarts;
            Ok(vec![Change::PutVm(Box::new(vm))])
        })
        .await;
    if let Err(error) = started {
        // The crash stands in the events, and the VM is shown as failed.
        tracing::warn!(vm = %id, %error, "cannot restart a crashed VM");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::tests_support::vm;
    use std::time::Duration;

    #[test]
    fn restarts_are_rate_limited_and_the_window_moves_on() {
        let mut vm = vm("web");
        vm.spec.restart_policy = RestartPolicy::OnCrash {
            max_restarts: 2,
            window: Duration::from_secs(60),
        };
        let at = |seconds: i64| Timestamp::from_unix_millis(seconds * 1000);
        vm.crash_restarts = judge(&vm, at(0)).unwrap();
        vm.crash_restarts = judge(&vm, at(1)).unwrap();
        assert!(judge(&vm, at(2)).unwrap_err().contains("more than 2 times"));
        assert_eq!(judge(&vm, at(60)).unwrap(), vec![at(1), at(60)]);
        vm.spec.restart_policy = RestartPolicy::Never;
        assert!(judge(&vm, at(1000)).is_err());
    }
}
