//! Change a VM.

use std::sync::Arc;

use ghost_domain::vm::{Request, Vm};
use ghost_domain::{
    ByteSize, Demand, Error, ErrorCode, OperationKind, Principal, RequestId, Result, Role, VmChange,
};

use super::create::check_link;
use super::power::{check_state, find};
use crate::operations::{Engine, Submission, apply_change};
use crate::registry::{OperationView, Registry};

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
    /// Submits the operation.
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
        let kind = OperationKind::UpdateVm {
            change: change.clone(),
        };
        let (id, name) = find(
            &self.registry,
            &command.vm,
            command.request_id.as_ref(),
            kind.name(),
        )?;
        let submission = Submission {
            request_hash: Submission::hash(&(kind.name(), id, format!("{change:?}"))),
            kind,
            vm: Some(id),
            subject: name,
            request_id: command.request_id,
        };
        let registry = Arc::clone(&self.registry);
        self.engine
            .submit(principal, submission, move |model| {
                let entry = model.vm(id)?;
                check_generation(&entry.vm, command.expected_generation)?;
                check_link(model)?;
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
                Ok(Vec::new())
            })
            .await
    }
}
