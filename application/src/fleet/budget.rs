//! How many VMs Ghost Core may delete: at most a fifth of the host's within ten minutes, unless the
//! owner said on the host that it may be more.
//!
//! A broken or hostile Core that deletes everything is stopped early, and there is time to look.
//! All is computed from the operations' records, which are kept for longer than the window: a
//! restart of the agent forgets nothing.
//!
//! - What counts is every delete that Core's principals asked for, by a command of the queue or by
//!   a call, whatever became of it; only one that was cancelled before it began does not count.
//! - The fifth is of the VMs that there would be without those deletes, rounded down, and at least
//!   one, so that a host with few VMs can be used through Core at all.
//! - VMs that were made through Core within the window count on neither side: nobody loses anything
//!   old with them, and who makes a VM by mistake can delete it again.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use ghost_domain::ports::Change;
use ghost_domain::{
    Error, ErrorCode, EventKind, Operation, OperationKind, Principal, PrincipalSource, Result,
    Role, Timestamp, VmId,
};

use super::rights::check_own;
use crate::registry::{Decision, Model, Registry};

/// The time over which deletes are counted.
pub(crate) const WINDOW: Duration = Duration::from_secs(600);
/// One of so many VMs may be deleted in it.
const ONE_OF: usize = 5;
/// The longest time for which the owner can let Core delete more.
const LONGEST_CONSENT: Duration = Duration::from_secs(24 * 3600);

/// How many VMs may be deleted in a window that began with so many.
const fn most_deletes(vms: usize) -> usize {
    let part = vms / ONE_OF;
    if part == 0 { 1 } else { part }
}

/// Operations of Core's principals within the window; also those that the future seems to hold,
/// because the clock was set back: too many are counted then, and never too few.
fn lately(model: &Model, now: Timestamp) -> impl Iterator<Item = &Operation> {
    model
        .operations
        .values()
        .map(|entry| &*entry.operation)
        .filter(move |one| one.through_core && now.since(one.created_at) < WINDOW)
}

/// Refuses a principal of Core one more delete where it would be too many.
pub(crate) fn check(model: &Model, principal: &Principal, vm: VmId, now: Timestamp) -> Result<()> {
    if !matches!(principal.source, PrincipalSource::Core { .. }) {
        return Ok(());
    }
    let young: BTreeSet<VmId> = lately(model, now)
        .filter(|one| matches!(one.kind, OperationKind::CreateVm { .. }))
        .filter_map(|one| one.vm)
        .collect();
    if young.contains(&vm) {
        return Ok(());
    }
    let deleted: BTreeSet<VmId> = lately(model, now)
        .filter(|one| matches!(one.kind, OperationKind::DeleteVm { .. }))
        .filter(|one| !(one.status.is_finished() && one.journal.is_empty()))
        .filter_map(|one| one.vm)
        .filter(|id| !young.contains(id))
        .collect();
    // Asked for again because the first try failed: it is counted already.
    if deleted.contains(&vm) {
        return Ok(());
    }
    let present: BTreeSet<VmId> = model
        .vms
        .keys()
        .copied()
        .filter(|id| !young.contains(id))
        .collect();
    let vms = present.union(&deleted).count();
    let most = most_deletes(vms);
    if deleted.len() < most || model.delete_consent.is_some_and(|until| until > now) {
        return Ok(());
    }
    Err(Error::new(
        ErrorCode::ConfirmationRequired,
        "Ghost Core deletes so many VMs that the host's owner has to confirm it",
    )
    .because(format!(
        "{} of {vms} VMs were deleted through Core within {} minutes, and {most} may be",
        deleted.len(),
        WINDOW.as_secs() / 60
    ))
    .hint("on the host: ghostctl core allow-deletes --for 10m"))
}

/// Lets Core delete more VMs than usual for a while, or no longer.
pub struct AllowCoreDeletes {
    pub(crate) registry: Arc<Registry>,
}

impl AllowCoreDeletes {
    /// Until when it holds; a duration of zero takes it back. Only the host's own administrators
    /// can say it.
    ///
    /// # Errors
    /// `PermissionDenied`, `CorePermissionDenied`; `InvalidArgument` for more than a day;
    /// `StoreUnavailable`.
    pub async fn execute(&self, principal: &Principal, duration: Duration) -> Result<Timestamp> {
        check_own(principal)?;
        principal.require(Role::Admin)?;
        if duration > LONGEST_CONSENT {
            return Err(
                Error::new(ErrorCode::InvalidArgument, "that is for too long")
                    .because("at most 24 hours")
                    .field("duration", "at most 24h"),
            );
        }
        let now = self.registry.clock().now();
        let until = now.after(duration);
        let kind = EventKind::CoreDeletes {
            until: (!duration.is_zero()).then_some(until),
            by: principal.name.clone(),
        };
        self.registry
            .transact(move |_| {
                let decision = Decision::of((), vec![Change::PutDeleteConsent(until)]);
                Ok(decision.notice(kind, None, "core"))
            })
            .await?;
        Ok(until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fifth_rounded_down_and_at_least_one() {
        for (vms, most) in [
            (0, 1),
            (1, 1),
            (4, 1),
            (5, 1),
            (9, 1),
            (10, 2),
            (14, 2),
            (100, 20),
        ] {
            assert_eq!(most_deletes(vms), most, "{vms}");
        }
    }
}
