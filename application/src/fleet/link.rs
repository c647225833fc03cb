//! How the link to Core fares, for those who ask on the host.

use std::sync::Arc;
use std::time::Duration;

use ghost_domain::fleet::{CarrierState, CorePermissions, FleetIdentity, LinkState};
use ghost_domain::{Error, ErrorCode, Principal, Result, Role, Timestamp};

use super::LinkPlace;
use super::rights::check_own;
use crate::registry::{Model, Registry};

/// A certificate that ends within this time was not renewed when it should have been.
const ENDS_SOON: Duration = Duration::from_secs(4 * 3600);

/// What is to be known of the link.
#[derive(Clone, Debug, PartialEq)]
pub struct CoreLinkView {
    /// Who this host is in its fleet; `None` where it has not joined one.
    pub identity: Option<FleetIdentity>,
    /// What the owner lets Core do.
    pub permissions: CorePermissions,
    /// How the link fares.
    pub state: LinkState,
    /// Every way by which Core can reach this host, each with its own state.
    pub carriers: Vec<CarrierState>,
    /// Since when.
    pub since: Option<Timestamp>,
    /// Why the last link ended or could not be made; empty: there was no failure.
    pub last_failure: String,
    /// Until when Core may delete more VMs than usual, where it may now.
    pub deletes_allowed_until: Option<Timestamp>,
    /// Heartbeats that Core answered since the agent started.
    pub heartbeats_answered: u64,
    /// Heartbeats that were lost.
    pub heartbeats_lost: u64,
    /// Outcomes of Core's commands by status.
    pub commands: std::collections::BTreeMap<&'static str, u64>,
}

impl CoreLinkView {
    /// Why there is no link, as one line for people; empty while there is one.
    pub fn reason(&self) -> String {
        reason_of(&self.state)
    }

    /// What is wrong, with its remedy.
    pub fn warnings(&self, now: Timestamp) -> Vec<String> {
        let mut all = Vec::new();
        let Some(identity) = &self.identity else {
            return all;
        };
        match &self.state {
            LinkState::Refused { reason } => all.push(format!(
                "Ghost Core refuses this host ({reason}): enrol it again, or ghost-agent unenroll"
            )),
            LinkState::Silent { .. } | LinkState::Waiting { .. } => all.push(format!(
                "no link to Ghost Core ({}): ghostctl core status",
                reason_of(&self.state)
            )),
            LinkState::Off | LinkState::Connecting | LinkState::Up { .. } => {}
        }
        if identity.expires_at <= now {
            all.push("the certificate for Ghost Core has ended: ghostctl core reconnect".into());
        } else if identity.expires_at.since(now) < ENDS_SOON {
            all.push("the certificate for Ghost Core ends soon and was not renewed".into());
        }
        if self.deletes_allowed_until.is_some() {
            all.push(
                "Ghost Core may delete any number of VMs now: ghostctl core allow-deletes --for 0s"
                    .into(),
            );
        }
        all
    }
}

/// Why there is no link, for people.
pub(super) fn reason_of(state: &LinkState) -> String {
    let reason = match state {
        LinkState::Off => "it is off".into(),
        LinkState::Connecting => "connecting".into(),
        LinkState::Up { .. } => String::new(),
        LinkState::Silent { since } => format!("nothing was heard for {} s", since.as_secs()),
        LinkState::Waiting { reason, .. } | LinkState::Refused { reason } => reason.clone(),
    };
    crate::guest::escape(&reason, 256)
}

/// What others say, fit to be shown.
fn shown(mut carriers: Vec<CarrierState>) -> Vec<CarrierState> {
    for carrier in &mut carriers {
        carrier.reason = crate::guest::escape(&carrier.reason, 256);
        carrier.peer = crate::guest::escape(&carrier.peer, 256);
    }
    carriers
}

pub(crate) fn view(model: &Model, place: &LinkPlace, now: Timestamp) -> CoreLinkView {
    // The link itself knows the last round trip; the model knows what it was told.
    let link = place.get();
    let state = link.map_or_else(|| model.core.state.clone(), |link| link.state());
    CoreLinkView {
        identity: link.and_then(|link| link.identity()),
        permissions: model.core_permissions,
        state,
        carriers: link.map(|link| shown(link.carriers())).unwrap_or_default(),
        since: model.core.since.map(|(at, _)| at),
        last_failure: model.core.last_failure.clone(),
        deletes_allowed_until: model.delete_consent.filter(|until| *until > now),
        heartbeats_answered: model.core.heartbeats_answered,
        heartbeats_lost: model.core.heartbeats_lost,
        commands: model.core.commands.clone(),
    }
}

/// Shows how the link to Core fares.
pub struct GetCoreLink {
    pub(crate) registry: Arc<Registry>,
    pub(crate) place: LinkPlace,
}

impl GetCoreLink {
    /// From memory.
    ///
    /// # Errors
    /// `PermissionDenied`.
    pub async fn execute(&self, principal: &Principal) -> Result<CoreLinkView> {
        principal.require(Role::Viewer)?;
        let now = self.registry.clock().now();
        Ok(self.registry.read(|model| view(model, &self.place, now)))
    }
}

/// Connects to Core at once where the link waits.
pub struct ReconnectCore {
    pub(crate) place: LinkPlace,
}

impl ReconnectCore {
    /// Ends the wait; how it went shows [`GetCoreLink`].
    ///
    /// # Errors
    /// `PermissionDenied`, `CorePermissionDenied`; `NotEnrolled` where this host has not joined a
    /// fleet.
    pub async fn execute(&self, principal: &Principal) -> Result<()> {
        check_own(principal)?;
        principal.require(Role::Operator)?;
        let joined = self.place.get().filter(|link| link.identity().is_some());
        let Some(link) = joined else {
            return Err(
                Error::new(ErrorCode::NotEnrolled, "this host has not joined a fleet")
                    .hint("ghost-agent enroll --token TOKEN; ghost-core token create makes one"),
            );
        };
        link.reconnect();
        Ok(())
    }
}
