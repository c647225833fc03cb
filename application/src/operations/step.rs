//! A step: an effect and its undo, both idempotent.

use std::sync::Arc;

use async_trait::async_trait;
use ghost_domain::ports::ProgressSink;
use ghost_domain::vm::Vm;
use ghost_domain::{Operation, OperationId, Progress, Result, VmId};

use crate::application::Ports;
use crate::registry::Registry;

/// What a step works with.
#[derive(Clone)]
pub(crate) struct StepContext {
    pub(crate) operation: Arc<Operation>,
    pub(crate) ports: Ports,
    pub(crate) registry: Arc<Registry>,
}

/// See the module's documentation. Dropping `perform` at any await must be as harmless as a crash
/// there: the undo (or the next `perform`) puts it right.
#[async_trait]
pub(crate) trait Step: Send + Sync {
    /// Stable: it stands in journals.
    fn name(&self) -> &'static str;
    /// What people read while it runs.
    fn phase(&self) -> &'static str;
    /// Has the effect.
    async fn perform(&self, context: &StepContext) -> Result<()>;
    /// Takes the effect back, also where it came about only in part or not at all.
    async fn undo(&self, _context: &StepContext) -> Result<()> {
        Ok(())
    }
}

impl StepContext {
    /// The VM of this operation.
    pub(crate) fn vm_id(&self) -> Result<VmId> {
        self.operation
            .vm
            .ok_or_else(|| ghost_domain::Error::internal("this operation has no VM"))
    }

    /// The VM's record as it is now.
    pub(crate) fn vm(&self) -> Result<Arc<Vm>> {
        let id = self.vm_id()?;
        self.registry
            .read(|model| model.vm(id).map(|entry| Arc::clone(&entry.vm)))
    }

    pub(crate) fn report(&self, progress: Progress) {
        report(&self.registry, self.operation.id, progress);
    }

    /// A sink that puts progress into this operation.
    pub(crate) fn sink(&self) -> Arc<dyn ProgressSink> {
        Arc::new(OperationSink {
            registry: Arc::clone(&self.registry),
            operation: self.operation.id,
        })
    }

    /// Looks at the domain and records what is seen, so that the state after an operation does
    /// not wait for an event.
    pub(crate) async fn observe(&self) {
        if let Ok(vm) = self.vm_id() {
            // Where libvirt does not answer, the event or the next full look will tell.
            let _seen = crate::supervise::observe_one(&self.registry, &self.ports, vm).await;
        }
    }
}

fn report(registry: &Registry, operation: OperationId, progress: Progress) {
    registry.report(|model| {
        if let Some(entry) = model.operations.get_mut(&operation) {
            entry.progress = progress;
        }
    });
}

struct OperationSink {
    registry: Arc<Registry>,
    operation: OperationId,
}

impl ProgressSink for OperationSink {
    fn report(&self, progress: Progress) {
        report(&self.registry, self.operation, progress);
    }
}
