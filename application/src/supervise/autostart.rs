//! Autostart: once after each boot of the host, in order, with delays.

use std::time::Duration;

use ghost_domain::ports::Change;
use ghost_domain::vm::{DesiredPower, Vm};
use ghost_domain::{OperationKind, Principal, VmId};

use super::Supervisor;
use crate::operations::Submission;
use crate::registry::Decision;

/// VMs to start, in order: by `order`, then by name.
fn sequence<'a>(vms: impl Iterator<Item = &'a Vm>) -> Vec<(VmId, String, Duration)> {
    let mut wanted: Vec<_> = vms
        .filter_map(|vm| {
            vm.spec
                .autostart
                .map(|autostart| (autostart.order, vm, autostart.delay))
        })
        .collect();
    wanted.sort_by(|a, b| a.0.cmp(&b.0).then_with(|| a.1.name.cmp(&b.1.name)));
    wanted
        .into_iter()
        .map(|(_, vm, delay)| (vm.id, vm.name.to_string(), delay))
        .collect()
}

/// Starts what is to start with the host, if the host was booted since the last time.
pub(super) async fn run(supervisor: &Supervisor) {
    let registry = &supervisor.registry;
    let facts = match supervisor.ports.host.facts().await {
        Ok(facts) => facts,
        Err(error) => {
            tracing::warn!(%error, "cannot tell whether the host was booted; nothing is autostarted");
            return;
        }
    };
    let (before, to_start) = registry.read(|model| {
        let idle = model.vms.values().filter(|entry| {
            entry.operation.is_none()
                && !entry
                    .observation
                    .as_ref()
                    .is_some_and(|seen| seen.power.is_active())
        });
        (
            model.boot_id.clone(),
            sequence(idle.map(|entry| &*entry.vm)),
        )
    });
    if before.as_ref() == Some(&facts.boot_id) {
        return;
    }
    // Recorded first: an agent that dies in the middle must not start VMs again that their owner
    // has stopped in the meantime.
    let boot_id = facts.boot_id;
    // VMs that ran before the boot and do not start with the host are off by now, and off is what
    // is wanted until somebody says otherwise.
    let recorded = registry
        .transact(move |model| {
            let mut changes = vec![Change::PutBootId(boot_id)];
            for entry in model.vms.values() {
                let off = !entry
                    .observation
                    .as_ref()
                    .is_some_and(|seen| seen.power.is_active());
                if off && entry.operation.is_none() && entry.vm.desired != DesiredPower::Stopped {
                    let mut vm = Vm::clone(&entry.vm);
                    vm.desired = DesiredPower::Stopped;
                    changes.push(Change::PutVm(Box::new(vm)));
                }
            }
            Ok(Decision::of((), changes))
        })
        .await;
    if let Err(error) = recorded {
        tracing::error!(%error, "cannot record the boot; nothing is autostarted");
        return;
    }
    if before.is_none() || to_start.is_empty() {
        return;
    }
    tracing::info!(vms = to_start.len(), "the host was booted: starting VMs");
    let supervisor = supervisor.clone();
    tokio::spawn(async move {
        for (id, name, delay) in to_start {
            let submission = Submission {
                kind: OperationKind::StartVm,
                vm: Some(id),
                subject: name.clone(),
                request_id: None,
                request_hash: 0,
            };
            let started = supervisor
                .engine
                .submit(&Principal::agent(), submission, move |model| {
                    let entry = model.vm(id)?;
                    let demand = ghost_domain::Demand {
                        disk: ghost_domain::ByteSize::ZERO,
                        ..entry.vm.spec.demand()
                    };
                    model.capacity(Some(id)).admit(demand)?;
                    Ok(Vec::new())
                })
                .await;
            if let Err(error) = started {
                tracing::warn!(name, %error, "cannot autostart");
            }
            tokio::time::sleep(delay).await;
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::tests_support::vm;
    use ghost_domain::vm::Autostart;

    #[test]
    fn starts_by_order_then_name_and_only_what_is_asked_for() {
        let make = |name: &str, order: Option<i32>| {
            let mut vm = vm(name);
            vm.spec.autostart = order.map(|order| Autostart {
                order,
                delay: Duration::from_secs(1),
            });
            vm
        };
        let vms = [
            make("c", Some(5)),
            make("b", Some(1)),
            make("a", Some(5)),
            make("never", None),
        ];
        let names: Vec<String> = sequence(vms.iter())
            .into_iter()
            .map(|(_, name, _)| name)
            .collect();
        assert_eq!(names, ["b", "a", "c"]);
    }
}
