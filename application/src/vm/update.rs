//! Change a VM.

use std::sync::Arc;

use ghost_domain::ports::Change;
use ghost_domain::vm::{Request, Vm};
use ghost_domain::{
    ByteSize, Demand, Error, ErrorCode, OperationKind, Principal, RequestId, Result, Role, VmChange,
};

use super::create::check_link;
use super::power::{check_state, find};
use crate::fleet;
use crate::guest::{GuestTarget, SetGuestAccess};
use crate::operations::{Engine, Submission, apply_change};
use crate::registry::{Model, OperationView, Registry};

/// What to change.
#[derive(Clone, Debug, Default)]
pub struct UpdateVmCommand {
    /// Name, full id or unique prefix.
    pub vm: String,
    /// The change.
    pub change: VmChange,
    /// The generation that the caller saw, if it matters.
    pub expected_generation: Option<u64>,
    /// The caller's idempotency key.
    pub request_id: Option<RequestId>,
}

/// Changes a VM's record and domain.
pub struct UpdateVm {
    pub(crate) engine: Arc<Engine>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) access: SetGuestAccess,
}

pub(crate) fn check_generation(vm: &Vm, expected: Option<u64>) -> Result<()> {
    match expected {
        Some(expected) if expected != vm.generation => Err(Error::new(
            ErrorCode::GenerationMismatch,
            format!(
                "{} has changed: it is at generation {}, not {expected}",
                vm.name, vm.generation
            ),
        )
        .hint(format!(
            "look at it again, then decide: ghostctl vm show {}",
            vm.name
        ))),
        _ => Ok(()),
    }
}

impl UpdateVm {
    /// Submits the operation. Guest access is switched off at once, whatever becomes of the rest,
    /// and on once the operation is admitted; where nothing else is to change, libvirt is not
    /// needed.
    ///
    /// # Errors
    /// `VmNotFound`, `VmRunning` (for CPUs and memory), `InvalidArgument`, `InvalidSize`,
    /// `InsufficientResources`, `GenerationMismatch`, `HypervisorUnavailable`, and those of every
    /// submission.
    pub async fn execute(
        &self,
        principal: &Principal,
        command: UpdateVmCommand,
    ) -> Result<OperationView> {
        principal.require(Role::Operator)?;
        let change = command.change;
        if change == VmChange::default() {
            return Err(
                Error::new(ErrorCode::InvalidArgument, "there is nothing to change")
                    .hint("see ghostctl vm update --help"),
            );
        }
        if change.guest_access == Some(true) {
            principal.require_guest_access()?;
        }
        let kind = OperationKind::UpdateVm {
            change: change.clone(),
        };
        let (id, name) = find(
            &self.registry,
            &command.vm,
            command.request_id.as_ref(),
            kind.name(),
        )?;
        let known = self.registry.read(|model: &Model| {
            let key = command.request_id.as_ref();
            key.is_some_and(|key| model.requests.contains_key(key))
        });
        let opens = change.guest_access == Some(true) && !known;
        // A request that comes again must not undo what was decided in between.
        if change.guest_access == Some(false) && !known {
            self.registry
                .read(|model| check_generation(&model.vm(id)?.vm, command.expected_generation))?;
            let target = GuestTarget {
                vm: id.to_string(),
                request_id: String::new(),
            };
            self.access.execute(principal, &target, false).await?;
        }
        let submission = Submission {
            request_hash: Submission::hash(&(kind.name(), id, format!("{change:?}"))),
            kind,
            vm: Some(id),
            subject: name.clone(),
            request_id: command.request_id,
        };
        let registry = Arc::clone(&self.registry);
        let caller = principal.clone();
        let view = self
            .engine
            .submit(principal, submission, move |model| {
                let entry = model.vm(id)?;
                if change.guest_access == Some(true) {
                    fleet::check_enter(model, &caller)?;
                }
                check_generation(&entry.vm, command.expected_generation)?;
                if change.concerns_domain() {
                    check_link(model)?;
                }
                let mut changed = Vm::clone(&entry.vm);
                apply_change(&mut changed, &change);
                changed.spec.validate()?;
                if change.vcpus.is_some() || change.memory.is_some() {
                    check_state(
                        model,
                        id,
                        Request::Reconfigure,
                        registry.clock().monotonic(),
                    )?;
                    let capacity = model.capacity(Some(id));
                    let alone = ghost_domain::Capacity {
                        committed: Demand::default(),
                        ..capacity
                    };
                    alone.admit(Demand {
                        disk: ByteSize::ZERO,
                        ..changed.spec.demand()
                    })?;
                }
                let mut changes = Vec::new();
                if change.guest_access == Some(true) {
                    let mut opened = Vm::clone(&entry.vm);
                    opened.spec.guest.access = true;
                    changes.push(Change::PutVm(Box::new(opened)));
                }
                Ok(changes)
            })
            .await?;
        if opens {
            self.access.opened(principal, id, name);
        }
        Ok(view)
    }
}
