//! Watch what happens.

use std::sync::Arc;

use ghost_domain::{Principal, Result, Role, VmId};

pub use crate::registry::EventStream;
use crate::registry::Registry;

/// Watches events.
pub struct WatchEvents {
    pub(crate) registry: Arc<Registry>,
}

/// Which events to watch.
#[derive(Clone, Debug, Default)]
pub struct WatchEventsCommand {
    /// Only those of this VM.
    pub vm: Option<String>,
    /// Start with what is still remembered.
    pub replay: bool,
}

impl WatchEvents {
    /// Subscribes; the second value is the VM to filter by.
    ///
    /// # Errors
    /// `VmNotFound`, `VmAmbiguous`.
    pub async fn execute(
        &self,
        principal: &Principal,
        command: &WatchEventsCommand,
    ) -> Result<(EventStream, Option<VmId>)> {
        principal.require(Role::Viewer)?;
        let vm = match &command.vm {
            Some(vm) => Some(
                self.registry
                    .read(|model| model.find_vm(vm).map(|entry| entry.vm.id))
                    .or_else(|error| {
                        // A deleted VM's events are still found by its name.
                        self.registry
                            .recent_events()
                            .iter()
                            .rev()
                            .find(|event| event.subject == *vm)
                            .and_then(|event| event.vm)
                            .ok_or(error)
                    })?,
            ),
            None => None,
        };
        Ok((self.registry.subscribe(command.replay), vm))
    }
}
