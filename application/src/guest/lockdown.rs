//! Close all ways into guests.

use std::sync::Arc;

use ghost_domain::guest::{AuditRecord, Lockdown};
use ghost_domain::ports::Change;
use ghost_domain::{Error, ErrorCode, EventKind, Principal, Result, Role};

use super::detail::escape;
use super::door::Door;
use crate::registry::{Decision, Registry};

/// What to do.
#[derive(Clone, Debug, Default)]
pub struct SetLockdownCommand {
    /// Close, or open again.
    pub active: bool,
    /// Why; at most 1,024 bytes.
    pub reason: String,
    /// The id of the request as the log and traces have it, for the audit log.
    pub request_id: String,
}

/// How it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockdownView {
    /// The lockdown, where there is one.
    pub lockdown: Option<Lockdown>,
    /// Sessions that this call ended.
    pub sessions_cut: u32,
}

/// Closes all ways into guests, or opens them again.
pub struct SetLockdown {
    pub(crate) door: Arc<Door>,
}

impl SetLockdown {
    /// Takes effect at once, before anything is written: a full disk keeps no door open.
    ///
    /// # Errors
    /// `PermissionDenied`, `InvalidArgument`; `StoreUnavailable` where it is in force but could
    /// not be recorded, so that it would not survive a restart of the agent.
    pub async fn execute(
        &self,
        principal: &Principal,
        command: SetLockdownCommand,
    ) -> Result<LockdownView> {
        let action = if command.active {
            "lockdown"
        } else {
            "lockdown_lift"
        };
        let record = AuditRecord {
            principal: escape(&principal.name, 256),
            action: action.into(),
            detail: escape(&command.reason, 1024),
            request_id: escape(&command.request_id, 128),
            ..AuditRecord::default()
        };
        if let Err(error) = principal.require(Role::Admin) {
            self.door.write_refusal(AuditRecord {
                outcome: format!("denied: {}", error.code()),
                ..record
            });
            return Err(error);
        }
        if command.reason.len() > 1024 {
            return Err(
                Error::new(ErrorCode::InvalidArgument, "the reason is too long")
                    .field("reason", "at most 1024 bytes"),
            );
        }
        if command.active {
            self.close(principal, command, record).await
        } else {
            self.open(principal, command, record).await
        }
    }

    async fn close(
        &self,
        principal: &Principal,
        command: SetLockdownCommand,
        record: AuditRecord,
    ) -> Result<LockdownView> {
        let registry = &self.door.registry;
        let wanted = Lockdown {
            reason: escape(&command.reason, 1024),
            set_by: escape(&principal.name, 256),
            since: registry.clock().now(),
        };
        // Closed twice: the first one's time and reason stay, sessions are cut all the same.
        // The link is told under the model's lock, so that a lift at the same moment comes wholly
        // before or wholly after.
        let (lockdown, new, sessions_cut) = registry.observe(|model| {
            let new = model.lockdown.is_none();
            let lockdown = model.lockdown.get_or_insert(wanted).clone();
            let consoles = u32::try_from(self.door.consoles.len()).unwrap_or(u32::MAX);
            let cut = self.door.ports.guests.lock_down(true);
            (lockdown, new, cut.saturating_add(consoles))
        });
        if new {
            registry.tell(
                EventKind::Lockdown {
                    active: true,
                    by: lockdown.set_by.clone(),
                    reason: lockdown.reason.clone(),
                },
                None,
                "guests",
            );
        }
        self.door.write_later(AuditRecord {
            outcome: format!("ok: {sessions_cut} sessions cut"),
            ..record
        });
        // Written again where it is in force already: the first try may not have been recorded.
        let row = lockdown.clone();
        let recorded = registry
            .transact(move |model| {
                let stands = model.lockdown.as_ref() == Some(&row);
                let changes = stands.then_some(Change::PutLockdown(row));
                Ok(Decision::of((), changes.into_iter().collect()))
            })
            .await;
        match recorded {
            Ok(()) => Ok(LockdownView {
                lockdown: Some(lockdown),
                sessions_cut,
            }),
            Err(error) => Err(Error::new(
                error.code(),
                format!("the lockdown is in force, {sessions_cut} sessions were cut, but it could not be recorded"),
            )
            .because(&error)
            .hint("it would end with a restart of the agent: make room on its disk, then set it again")),
        }
    }

    async fn open(
        &self,
        principal: &Principal,
        command: SetLockdownCommand,
        record: AuditRecord,
    ) -> Result<LockdownView> {
        let registry = &self.door.registry;
        // Recorded first: a door that cannot be kept open is not opened.
        let by = escape(&principal.name, 256);
        let reason = escape(&command.reason, 1024);
        self.door.write(record_of(&record, "begun")).await?;
        let lifted = registry
            .transact(move |model| {
                if model.lockdown.is_none() {
                    return Ok(Decision::nothing(()));
                }
                let kind = EventKind::Lockdown {
                    active: false,
                    by,
                    reason,
                };
                Ok(Decision::of((), vec![Change::DeleteLockdown]).notice(kind, None, "guests"))
            })
            .await;
        match &lifted {
            Ok(()) => {
                registry.observe(|model| {
                    if model.lockdown.is_none() {
                        self.door.ports.guests.lock_down(false);
                    }
                });
                self.door.write_later(record_of(&record, "ok"));
            }
            Err(error) => self
                .door
                .write_later(record_of(&record, &super::door::failed(error))),
        }
        lifted.map(|()| LockdownView {
            lockdown: None,
            sessions_cut: 0,
        })
    }
}

fn record_of(record: &AuditRecord, outcome: &str) -> AuditRecord {
    AuditRecord {
        outcome: outcome.to_owned(),
        ..record.clone()
    }
}

/// Tells whether all ways into guests are closed.
pub struct GetLockdown {
    pub(crate) registry: Arc<Registry>,
}

impl GetLockdown {
    /// How it stands; a viewer may know.
    ///
    /// # Errors
    /// `PermissionDenied`.
    pub async fn execute(&self, principal: &Principal) -> Result<LockdownView> {
        principal.require(Role::Viewer)?;
        Ok(LockdownView {
            lockdown: self.registry.read(|model| model.lockdown.clone()),
            sessions_cut: 0,
        })
    }
}
