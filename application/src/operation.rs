//! Use cases on operations.

use std::sync::Arc;

use ghost_domain::{OperationId, Principal, Result, Role};
use tokio::sync::watch;

use crate::operations::Engine;
use crate::registry::{OperationView, Registry};

/// Shows one operation.
pub struct GetOperation {
    pub(crate) registry: Arc<Registry>,
}

impl GetOperation {
    /// By full id or unique prefix.
    ///
    /// # Errors
    /// `OperationNotFound`.
    pub async fn execute(&self, principal: &Principal, id: &str) -> Result<OperationView> {
        principal.require(Role::Viewer)?;
        self.registry
            .read(|model| model.find_operation(id).map(OperationView::of))
    }
}

/// Which operations to list.
#[derive(Clone, Debug, Default)]
pub struct ListOperationsCommand {
    /// Only those of this VM.
    pub vm: Option<String>,
    /// Also those that have finished.
    pub all: bool,
}

/// Lists operations.
pub struct ListOperations {
    pub(crate) registry: Arc<Registry>,
}

impl ListOperations {
    /// Newest first.
    ///
    /// # Errors
    /// `VmNotFound`, `VmAmbiguous`.
    pub async fn execute(
        &self,
        principal: &Principal,
        command: &ListOperationsCommand,
    ) -> Result<Vec<OperationView>> {
        principal.require(Role::Viewer)?;
        let mut views: Vec<OperationView> = self.registry.read(|model| {
            let selector = command.vm.as_deref();
            let vm = match selector.map(|vm| model.find_vm(vm)) {
                Some(Ok(entry)) => Some(entry.vm.id),
                // A deleted VM's operations are still found by its name or full id.
                Some(Err(error)) => {
                    let known = model.operations.values().find_map(|entry| {
                        let operation = &entry.operation;
                        let named = Some(operation.subject.as_str()) == selector
                            || operation.vm.map(|vm| vm.to_string()).as_deref() == selector;
                        named.then_some(operation.vm).flatten()
                    });
                    Some(known.ok_or(error)?)
                }
                None => None,
            };
            Ok(model
                .operations
                .values()
                .filter(|entry| command.all || !entry.operation.status.is_finished())
                .filter(|entry| vm.is_none() || entry.operation.vm == vm)
                .map(OperationView::of)
                .collect::<Vec<_>>())
        })?;
        views.sort_by(|a, b| {
            b.operation
                .created_at
                .cmp(&a.operation.created_at)
                .then(b.operation.id.cmp(&a.operation.id))
        });
        Ok(views)
    }
}

/// Follows one operation.
pub struct WatchOperation {
    pub(crate) registry: Arc<Registry>,
}

/// An operation as it goes on.
pub struct OperationWatch {
    registry: Arc<Registry>,
    changed: watch::Receiver<u64>,
    id: OperationId,
    last: Option<OperationView>,
}

impl WatchOperation {
    /// Begins to follow.
    ///
    /// # Errors
    /// `OperationNotFound`.
    pub async fn execute(&self, principal: &Principal, id: &str) -> Result<OperationWatch> {
        principal.require(Role::Viewer)?;
        let id = self
            .registry
            .read(|model| model.find_operation(id).map(|entry| entry.operation.id))?;
        Ok(OperationWatch {
            changed: self.registry.watch(),
            registry: Arc::clone(&self.registry),
            id,
            last: None,
        })
    }
}

impl OperationWatch {
    /// The operation now, then again whenever its status or progress changed; `None` after it has
    /// finished.
    pub async fn next(&mut self) -> Option<OperationView> {
        if self
            .last
            .as_ref()
            .is_some_and(|last| last.operation.status.is_finished())
        {
            return None;
        }
        loop {
            self.changed.borrow_and_update();
            let view = self
                .registry
                .read(|model| model.operations.get(&self.id).map(OperationView::of))?;
            let same = self.last.as_ref().is_some_and(|last| {
                last.operation.status == view.operation.status && last.progress == view.progress
            });
            if !same {
                self.last = Some(view.clone());
                return Some(view);
            }
            self.changed.changed().await.ok()?;
        }
    }
}

/// Cancels an operation.
pub struct CancelOperation {
    pub(crate) engine: Arc<Engine>,
    pub(crate) registry: Arc<Registry>,
}

impl CancelOperation {
    /// Asks it to stop and undo what it did; answers at once.
    ///
    /// # Errors
    /// `OperationNotFound`, `OperationFinished`.
    pub async fn execute(&self, principal: &Principal, id: &str) -> Result<OperationView> {
        principal.require(Role::Operator)?;
        let id = self
            .registry
            .read(|model| model.find_operation(id).map(|entry| entry.operation.id))?;
        self.engine.cancel(id).await?;
        self.registry
            .read(|model| model.find_operation(&id.to_string()).map(OperationView::of))
    }
}
