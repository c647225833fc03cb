//! Keeps what libvirt's metadata says of guest access true to the record.
//!
//! The record alone decides who is let in. But whoever reads `virsh dumpxml`, and an agent that has
//! lost its store, goes by the domain: what was shut must not stand open there until the next change
//! of the definition. Nobody waits for this; where libvirt is away it is done once it is back.

use ghost_domain::VmId;
use ghost_domain::vm::Lifecycle;

use super::{LOOK_AGAIN, Supervisor};
use crate::registry::Model;

/// Writes into domains whatever of it they do not say, as it changes.
pub(super) async fn keep_access(supervisor: Supervisor) {
    let registry = &supervisor.registry;
    while let Ok(differing) = registry.wait_for(differing).await {
        let mut failed = false;
        for (id, access) in differing {
            match supervisor
                .ports
                .hypervisor
                .set_guest_access(id, access)
                .await
            {
                Ok(()) => {
                    tracing::debug!(vm = %id, access, "guest access written into the domain");
                    registry.report(|model| {
                        if let Some(entry) = model.vms.get_mut(&id) {
                            entry.access_in_domain = Some(access);
                        }
                    });
                }
                Err(error) => {
                    failed = true;
                    tracing::warn!(vm = %id, access, %error, "libvirt's metadata does not say yet whether the guest may be entered");
                }
            }
        }
        if failed {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
}

/// The VMs whose domain says otherwise than the record, with what the record says.
fn differing(model: &Model) -> Option<Vec<(VmId, bool)>> {
    if !model.link.connected {
        return None;
    }
    let differing: Vec<(VmId, bool)> = model
        .vms
        .values()
        .filter(|entry| entry.vm.lifecycle != Lifecycle::Deleting)
        .filter_map(|entry| {
            let access = entry.vm.spec.guest.access;
            let said = entry.access_in_domain?;
            (said != access).then_some((entry.vm.id, access))
        })
        .collect();
    (!differing.is_empty()).then_some(differing)
}
