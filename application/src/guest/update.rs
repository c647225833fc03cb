//! Bring a guest's agent up to date.

use std::sync::Arc;

use ghost_domain::{Error, ErrorCode, Principal, Result, VmId};

use super::GuestTarget;
use super::detail::escape;
use super::door::Door;
use crate::registry::Registry;

/// What became of an update.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestUpdateView {
    /// The agent's version before.
    pub from: String,
    /// The agent's version now.
    pub to: String,
    /// Whether it was replaced: not where it is the host's program already.
    pub replaced: bool,
}

/// Replaces a guest's agent by the host's program.
pub struct UpdateGuest {
    pub(crate) door: Arc<Door>,
}

impl UpdateGuest {
    /// Replaces it; returns once the new one has greeted.
    ///
    /// # Errors
    /// `GuestUnsupported` where this host has no program to give, and those of every call into a
    /// guest (see [`super::ExecInGuest`]).
    pub async fn execute(
        &self,
        principal: &Principal,
        target: &GuestTarget,
    ) -> Result<GuestUpdateView> {
        let Some(program) = self.door.program().await else {
            return Err(Error::new(
                ErrorCode::GuestUnsupported,
                "this host has no guest agent to give",
            )
            .hint("install ghost-guest on the host, or set guest.program"));
        };
        let hash: String = program
            .sha256
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let visit = self
            .door
            .enter(principal, target, "update", format!("to sha256:{hash}"))
            .await?;
        let _updating = Updating::new(&self.door.registry, visit.vm);
        let guests = &self.door.ports.guests;
        let hello = |vm| guests.status(vm).hello.unwrap_or_default();
        let before = hello(visit.vm);
        let outcome = guests.update(visit.vm).await.map(|()| {
            let after = hello(visit.vm);
            GuestUpdateView {
                from: escape(&before.agent_version, 64),
                to: escape(&after.agent_version, 64),
                replaced: before.program_sha256 != program.sha256,
            }
        });
        visit.settle(outcome)
    }
}

/// While it lives, calls into the guest wait.
struct Updating {
    registry: Arc<Registry>,
    vm: VmId,
}

impl Updating {
    fn new(registry: &Arc<Registry>, vm: VmId) -> Self {
        let this = Self {
            registry: Arc::clone(registry),
            vm,
        };
        this.set(true);
        this
    }

    fn set(&self, updating: bool) {
        self.registry.observe(|model| {
            if let Some(entry) = model.vms.get_mut(&self.vm) {
                entry.guest.updating = updating;
            }
        });
    }
}

impl Drop for Updating {
    fn drop(&mut self) {
        self.set(false);
    }
}
