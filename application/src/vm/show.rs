//! See VMs.

use std::collections::BTreeMap;
use std::sync::Arc;

use ghost_domain::{Principal, Result, Role, VmId};
use tokio::sync::watch;

use crate::application::Ports;
use crate::registry::{Registry, VmView};

/// Lists VMs, from memory.
pub struct ListVms {
    pub(crate) registry: Arc<Registry>,
}

impl ListVms {
    /// All VMs that have all of `tags`, by name.
    ///
    /// # Errors
    /// `PermissionDenied`.
    pub async fn execute(
        &self,
        principal: &Principal,
        tags: &BTreeMap<String, String>,
    ) -> Result<Vec<VmView>> {
        principal.require(Role::Viewer)?;
        let now = self.registry.clock().monotonic();
        let mut views: Vec<VmView> = self.registry.read(|model| {
            model
                .vms
                .values()
                .filter(|entry| {
                    tags.iter()
                        .all(|(key, value)| entry.vm.spec.tags.get(key) == Some(value))
                })
                .map(|entry| VmView::of(model, entry, now))
                .collect()
        });
        views.sort_by(|a, b| a.vm.name.cmp(&b.vm.name));
        Ok(views)
    }
}

/// Shows one VM.
pub struct GetVm {
    pub(crate) registry: Arc<Registry>,
    pub(crate) ports: Ports,
}

impl GetVm {
    /// The VM, with its disk usage measured now.
    ///
    /// # Errors
    /// `VmNotFound`, `VmAmbiguous`.
    pub async fn execute(&self, principal: &Principal, vm: &str) -> Result<VmView> {
        principal.require(Role::Viewer)?;
        let id = self
            .registry
            .read(|model| model.find_vm(vm).map(|entry| entry.vm.id))?;
        if let Ok(usage) = self.ports.storage.usage(id).await {
            self.registry.report(|model| {
                if let Some(entry) = model.vms.get_mut(&id) {
                    entry.usage = usage;
                }
            });
        }
        let now = self.registry.clock().monotonic();
        self.registry
            .read(|model| Ok(VmView::of(model, model.vm(id)?, now)))
    }
}

/// Follows one VM.
pub struct WatchVm {
    pub(crate) registry: Arc<Registry>,
}

/// A VM as it changes.
pub struct VmWatch {
    registry: Arc<Registry>,
    changed: watch::Receiver<u64>,
    vm: VmId,
    last: Option<VmView>,
}

impl WatchVm {
    /// Begins to follow.
    ///
    /// # Errors
    /// `VmNotFound`, `VmAmbiguous`.
    pub async fn execute(&self, principal: &Principal, vm: &str) -> Result<VmWatch> {
        principal.require(Role::Viewer)?;
        let vm = self
            .registry
            .read(|model| model.find_vm(vm).map(|entry| entry.vm.id))?;
        Ok(VmWatch {
            changed: self.registry.watch(),
            registry: Arc::clone(&self.registry),
            vm,
            last: None,
        })
    }
}

impl VmWatch {
    /// The VM now, then again whenever it has changed; `None` once it is gone.
    pub async fn next(&mut self) -> Option<VmView> {
        loop {
            self.changed.borrow_and_update();
            let now = self.registry.clock().monotonic();
            let view = self.registry.read(|model| {
                model
                    .vms
                    .get(&self.vm)
                    .map(|entry| VmView::of(model, entry, now))
            })?;
            if !self.last.as_ref().is_some_and(|last| same(last, &view)) {
                self.last = Some(view.clone());
                return Some(view);
            }
            self.changed.changed().await.ok()?;
        }
    }
}

/// Ages pass by themselves and are no change.
fn same(a: &VmView, b: &VmView) -> bool {
    a.vm == b.vm
        && a.shown.state == b.shown.state
        && a.addresses == b.addresses
        && a.conditions == b.conditions
        && a.operation == b.operation
}
