//! The serial console and its log.

use std::sync::Arc;

use async_trait::async_trait;
use ghost_domain::guest::AuditRecord;
use ghost_domain::ports::{ConsoleReader, ConsoleSession, ConsoleWriter, LogReader};
use ghost_domain::{Error, Principal, Result, Role, VmId};
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::application::Ports;
use crate::fleet::check_enter;
use crate::guest::{Door, escape, locked};
use crate::registry::Registry;

/// Attaches to a VM's serial console.
pub struct OpenConsole {
    pub(crate) door: Arc<Door>,
}

impl OpenConsole {
    /// Attaches. Whoever types on a console may act as the guest's root, so this needs an
    /// operator who may enter guests, and a lockdown closes it too. The VM's guest access is about its agent and changes nothing
    /// here: the console is what is left where the agent is not wanted.
    ///
    /// # Errors
    /// `VmNotFound`, `Lockdown`, `VmNotRunning`, `VmBusy` where somebody is attached.
    pub async fn execute(&self, principal: &Principal, vm: &str) -> Result<(VmId, ConsoleSession)> {
        principal.require_guest_access()?;
        let registry = &self.door.registry;
        let (id, name, closed) = registry.read(|model| {
            let entry = model.find_vm(vm)?;
            let closed = model
                .lockdown
                .as_ref()
                .map(locked)
                .or_else(|| check_enter(model, principal).err());
            Ok::<_, Error>((entry.vm.id, entry.vm.name.clone(), closed))
        })?;
        let outcome = match closed {
            Some(error) => Err(error),
            None => self.door.ports.storage.open_console(id).await,
        };
        let record = AuditRecord {
            principal: escape(&principal.name, 256),
            vm_id: id.to_string(),
            vm_name: name.to_string(),
            action: "console".into(),
            ..AuditRecord::default()
        };
        let session = self.door.attached(record, outcome)?;
        tracing::info!(vm = %id, name = %name, principal = %principal.name, "console attached");
        let open = self.door.consoles.token();
        let session = ConsoleSession {
            reader: Box::new(Watched {
                inner: session.reader,
                registry: Arc::clone(registry),
                _open: Some(open),
            }),
            writer: Box::new(Watched {
                inner: session.writer,
                registry: Arc::clone(registry),
                _open: None,
            }),
        };
        Ok((id, session))
    }
}

/// A half of a session that ends with a lockdown.
struct Watched<T> {
    inner: T,
    registry: Arc<Registry>,
    _open: Option<TaskTrackerToken>,
}

impl<T> Watched<T> {
    fn check(registry: &Registry) -> Result<()> {
        match registry.read(|model| model.lockdown.as_ref().map(locked)) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

#[async_trait]
impl ConsoleReader for Watched<Box<dyn ConsoleReader>> {
    async fn read(&mut self) -> Result<Vec<u8>> {
        Self::check(&self.registry)?;
        let registry = Arc::clone(&self.registry);
        let closed = registry.wait_for(|model| model.lockdown.as_ref().map(locked));
        tokio::select! {
            data = self.inner.read() => data,
            error = closed => Err(error.unwrap_or_else(|gone| gone)),
        }
    }
}

#[async_trait]
impl ConsoleWriter for Watched<Box<dyn ConsoleWriter>> {
    async fn write(&mut self, data: &[u8]) -> Result<()> {
        Self::check(&self.registry)?;
        self.inner.write(data).await
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
        let id = self.registry.read(|model| {
            check_enter(model, principal)?;
            model.find_vm(vm).map(|entry| entry.vm.id)
        })?;
        self.ports.storage.open_log(id, tail_bytes).await
    }
}
