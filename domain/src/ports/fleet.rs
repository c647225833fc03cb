//! The link of this host to Ghost Core.

use async_trait::async_trait;

use crate::Result;
use crate::fleet::{
    CarrierState, CommandOutcome, CorePermissions, FleetCommand, FleetIdentity, HeartbeatReport,
    LinkState, RefusedCommand,
};

/// What the link asks of the application.
#[cfg_attr(feature = "mocks", mockall::automock)]
#[async_trait]
pub trait CoreLinkHandler: Send + Sync {
    /// What the owner lets Core do.
    fn permissions(&self) -> CorePermissions;

    /// The newest epoch and generation that were seen of the Core with this id; zeroes for another.
    fn ledger(&self, core_id: &str) -> (u64, u64);

    /// Core greeted. Durable when it returns.
    ///
    /// # Errors
    /// `StaleCommand` where the epoch is older than one that was seen: the link then ends, because
    /// that Core's records are out of date. `StoreUnavailable` where it cannot be kept.
    async fn welcomed(&self, core_id: &str, epoch: u64) -> Result<()>;

    /// What there is to tell now.
    async fn report(&self) -> Result<HeartbeatReport>;

    /// Resolves when something of the report changed that should not wait for the next heartbeat
    /// (a VM's state, a VM that came or went) since the last call.
    async fn report_changed(&self);

    /// Takes a command, or says what became of it. Durable before it returns; the operation that it
    /// begins goes on by itself. `None`: it came too early and will be sent again.
    async fn command(&self, command: FleetCommand) -> Option<CommandOutcome>;

    /// Refuses a command for good. It takes its place in the order, durably, so that those after it
    /// are not held up, where [`crate::fleet::FleetLedger::judge`] would have it taken. `None`: it
    /// came too early and will be sent again.
    ///
    /// Without an own implementation the refusal is told and forgotten.
    async fn refuse(&self, refused: RefusedCommand) -> Option<CommandOutcome> {
        Some(refused.outcome())
    }

    /// Outcomes that Core has not said it keeps, oldest first.
    fn outcomes(&self) -> Vec<CommandOutcome>;

    /// Resolves when [`Self::outcomes`] has something new since the last call.
    async fn outcomes_changed(&self);

    /// Core keeps the outcome of this generation, as far as it is finished.
    async fn outcome_kept(&self, generation: u64);

    /// The link's state changed, for status, metrics and events.
    fn link_changed(&self, state: LinkState);

    /// A heartbeat was answered by Core (`true`), or the link ended before it was.
    fn heartbeat_ended(&self, answered: bool) {
        let _ = answered;
    }
}

/// The link, for those who ask about it.
#[cfg_attr(feature = "mocks", mockall::automock)]
pub trait CoreLink: Send + Sync {
    /// Who this host is in its fleet; `None` where it has not joined one.
    fn identity(&self) -> Option<FleetIdentity>;

    /// How the link fares now.
    fn state(&self) -> LinkState;

    /// Every way by which Core can reach this host.
    fn carriers(&self) -> Vec<CarrierState>;

    /// Ends a wait and connects at once.
    fn reconnect(&self);
}
