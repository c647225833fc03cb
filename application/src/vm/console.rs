//! The serial console and its log.

use std::sync::Arc;

use ghost_domain::ports::{ConsoleSession, LogReader};
use ghost_domain::{Principal, Result, Role, VmId};

use crate::application::Ports;
use crate::registry::Registry;

/// Attaches to a VM's serial console.
pub struct OpenConsole {
    pub(crate) registry: Arc<Registry>,
    pub(crate) ports: Ports,
}

impl OpenConsole {
    /// Attaches. Whoever types on a console may act as the guest's root, so this needs an operator.
    ///
    /// # Errors
    /// `VmNotFound`, `VmNotRunning`, `VmBusy` where somebody is attached.
    pub async fn execute(&self, principal: &Principal, vm: &str) -> Result<(VmId, ConsoleSession)> {
        principal.require(Role::Operator)?;
        let (id, name) = self.registry.read(|model| {
            model
                .find_vm(vm)
                .map(|entry| (entry.vm.id, entry.vm.name.clone()))
        })?;
        tracing::info!(vm = %id, name = %name, principal = %principal.name, "console attached");
        Ok((id, self.ports.storage.open_console(id).await?))
    }
}

/// Reads a VM's console log.
pub struct OpenLog {
    pub(crate) registry: Arc<Registry>,
    pub(crate) ports: Ports,
}

impl OpenLog {
    /// Opens the log. What a guest prints may hold secrets, so this needs an operator too.
    ///
    /// # Errors
    /// `VmNotFound`, `IoFailed`.
    pub async fn execute(
        &self,
        principal: &Principal,
        vm: &str,
        tail_bytes: Option<u64>,
    ) -> Result<Box<dyn LogReader>> {
        principal.require(Role::Operator)?;
        let id = self
            .registry
            .read(|model| model.find_vm(vm).map(|entry| entry.vm.id))?;
        self.ports.storage.open_log(id, tail_bytes).await
    }
}
