//! Switch the guest access of one VM off or on.
//!
//! A change of the record alone: it needs neither libvirt nor an idle VM nor its image, because
//! whoever shuts a door must not have to wait for the house. Supervision writes it into libvirt's
//! metadata as soon as that is there; until then the record's export holds it.

use std::sync::Arc;

use ghost_domain::guest::AuditRecord;
use ghost_domain::ports::Change;
use ghost_domain::vm::Vm;
use ghost_domain::{Error, EventKind, Principal, Result, Role, VmId};

use super::GuestTarget;
use super::detail::escape;
use super::door::{Door, failed};
use crate::fleet::check_enter;
use crate::registry::Decision;

/// Why calls end that were under way.
pub(crate) const SWITCHED_OFF: &str = "guest access of this VM was switched off";

/// How it stands now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestAccessView {
    /// Whose.
    pub vm: VmId,
    /// Whether the VM's guest may be entered.
    pub access: bool,
    /// Sessions that this call ended.
    pub sessions_cut: u32,
}

/// Switches the guest access of a VM off or on.
#[derive(Clone)]
pub struct SetGuestAccess {
    pub(crate) door: Arc<Door>,
}

impl SetGuestAccess {
    /// Off takes effect at once, before anything is written, and ends what goes on in the guest;
    /// an operator may do that. On needs the permission to enter guests: who has it not must not
    /// open the door for others either. Telemetry and the console are not touched.
    ///
    /// # Errors
    /// `PermissionDenied`, `VmNotFound`, `VmAmbiguous`, `ShuttingDown` (for on);
    /// `StoreUnavailable` where it is off but could not be recorded, so that it would not survive
    /// a restart of the agent.
    pub async fn execute(
        &self,
        principal: &Principal,
        target: &GuestTarget,
        access: bool,
    ) -> Result<GuestAccessView> {
        let door = &self.door;
        let found = door.registry.read(|model| {
            model
                .find_vm(&target.vm)
                .map(|entry| (entry.vm.id, entry.vm.name.to_string()))
        });
        let mut record = AuditRecord {
            principal: escape(&principal.name, 256),
            action: "access".into(),
            vm_name: escape(&target.vm, 128),
            detail: if access { "on" } else { "off" }.into(),
            request_id: escape(&target.request_id, 128),
            ..AuditRecord::default()
        };
        let allowed = if access {
            door.registry
                .read(|model| check_enter(model, principal))
                .and_then(|()| principal.require_guest_access())
        } else {
            principal.require(Role::Operator)
        };
        let (id, name) = match allowed.and(found) {
            Ok(found) => found,
            Err(error) => {
                record.outcome = failed(&error);
                door.write_refusal(record);
                return Err(error);
            }
        };
        record.vm_id = id.to_string();
        record.vm_name.clone_from(&name);
        if access {
            // What cannot be logged does not happen; shutting a door may.
            door.write(AuditRecord {
                outcome: "begun".into(),
                ..record.clone()
            })
            .await?;
        }
        let outcome = if access {
            self.record(id, name, true).await.map(|()| 0)
        } else {
            self.switch_off(id, name).await
        };
        record.outcome = match &outcome {
            Ok(cut) if !access => format!("ok: {cut} sessions cut"),
            Ok(_) => "ok".into(),
            Err(error) => failed(error),
        };
        door.write_later(record);
        outcome.map(|sessions_cut| GuestAccessView {
            vm: id,
            access,
            sessions_cut,
        })
    }

    /// Writes that somebody opened a VM together with another change of it.
    pub(crate) fn opened(&self, principal: &Principal, id: VmId, name: String) {
        self.door.write_later(AuditRecord {
            principal: escape(&principal.name, 256),
            action: "access".into(),
            vm_id: id.to_string(),
            vm_name: name,
            detail: "on".into(),
            outcome: "ok".into(),
            ..AuditRecord::default()
        });
    }

    /// How many sessions were cut.
    async fn switch_off(&self, id: VmId, name: String) -> Result<u32> {
        let registry = &self.door.registry;
        let shut = || {
            registry.observe(|model| {
                if let Some(entry) = model.vms.get_mut(&id)
                    && entry.vm.spec.guest.access
                {
                    let mut vm = Vm::clone(&entry.vm);
                    vm.spec.guest.access = false;
                    entry.vm = Arc::new(vm);
                }
                // Under the model's lock: who asks the door after this is refused there.
                self.door.ports.guests.cut(id, SWITCHED_OFF)
            })
        };
        let cut = shut();
        let recorded = self.record(id, name.clone(), false).await;
        // A commit that had begun before with the record as it was may have let somebody in.
        let cut = cut.saturating_add(shut());
        registry.export_withdrawal().await;
        recorded.map(|()| cut).map_err(|error| {
            Error::new(
                error.code(),
                format!("guest access of {name} is off, {cut} sessions were cut, but it could not be recorded"),
            )
            .because(&error)
            .hint("it would be on again after a restart of the agent: make room on its disk, then set it again")
        })
    }

    async fn record(&self, id: VmId, name: String, access: bool) -> Result<()> {
        self.door
            .registry
            .transact(move |model| {
                if access {
                    model.check_accepting()?;
                }
                let mut vm = Vm::clone(&model.vm(id)?.vm);
                vm.spec.guest.access = access;
                let changes = vec![Change::PutVm(Box::new(vm))];
                Ok(Decision::of((), changes).notice(EventKind::VmUpdated, Some(id), name))
            })
            .await
    }
}
