//! Bring a guest's agent up to date.

use std::sync::Arc;

use ghost_domain::{Error, ErrorCode, Principal, Result};

use super::GuestTarget;
use super::door::Door;

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
    pub async fn execute(&self, principal: &Principal, target: &GuestTarget) -> Result<()> {
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
        let outcome = self.door.ports.guests.update(visit.vm).await;
        visit.settle(outcome)
    }
}
