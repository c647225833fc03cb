//! Delete a VM.

use std::sync::Arc;

use ghost_domain::ports::Change;
use ghost_domain::vm::{Lifecycle, Request, Vm};
use ghost_domain::{Error, ErrorCode, OperationKind, Principal, RequestId, Result, Role};

use super::create::check_link;
use super::power::{check_state, find};
use super::update::check_generation;
use crate::fleet;
use crate::operations::{Engine, Submission};
use crate::registry::{OperationView, Registry};

/// What to delete.
#[derive(Clone, Debug, Default)]
pub struct DeleteVmCommand {
    /// Name, full id or unique prefix.
    pub vm: String,
    /// Cut the power first where it runs.
    pub force: bool,
    /// The generation that the caller saw, if it matters.
    pub expected_generation: Option<u64>,
    /// The caller's idempotency key.
    pub request_id: Option<RequestId>,
}

/// Deletes a VM with its disks.
pub struct DeleteVm {
    pub(crate) engine: Arc<Engine>,
    pub(crate) registry: Arc<Registry>,
}

impl DeleteVm {
    /// Submits the operation.
    ///
    /// # Errors
    /// `VmNotFound`, `VmRunning`, `DeleteProtected`, `GenerationMismatch`, `Recovering`,
    /// `HypervisorUnavailable`, `ConfirmationRequired` for a principal of Core that deletes too many,
    /// and those of every submission.
    pub async fn execute(
        &self,
        principal: &Principal,
        command: DeleteVmCommand,
    ) -> Result<OperationView> {
        principal.require(Role::Operator)?;
        let kind = OperationKind::DeleteVm {
            force: command.force,
        };
        let (id, name) = find(
            &self.registry,
            &command.vm,
            command.request_id.as_ref(),
            kind.name(),
        )?;
        let submission = Submission {
            request_hash: Submission::hash(&(kind.name(), id, command.force)),
            kind,
            vm: Some(id),
            subject: name,
            request_id: command.request_id,
        };
        let registry = Arc::clone(&self.registry);
        let caller = principal.clone();
        self.engine
            .submit(principal, submission, move |model| {
                model.check_recovered()?;
                let entry = model.vm(id)?;
                check_generation(&entry.vm, command.expected_generation)?;
                if entry.vm.spec.delete_protection {
                    let name = &entry.vm.name;
                    return Err(Error::new(
                        ErrorCode::DeleteProtected,
                        format!("{name} is protected against deletion"),
                    )
                    .hint(format!(
                        "lift the protection first: ghostctl vm update {name} --unprotect"
                    )));
                }
                let request = if command.force {
                    Request::ForceDelete
                } else {
                    Request::Delete
                };
                check_state(model, id, request, registry.clock().monotonic())?;
                check_link(model)?;
                fleet::check_delete_budget(model, &caller, id, registry.clock().now())?;
                let mut vm = Vm::clone(&entry.vm);
                vm.lifecycle = Lifecycle::Deleting;
                Ok(vec![Change::PutVm(Box::new(vm))])
            })
            .await
    }
}
