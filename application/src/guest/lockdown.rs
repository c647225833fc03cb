//! Close all ways into guests.

use std::sync::Arc;

use ghost_domain::guest::{AuditRecord, Lockdown};
use ghost_domain::ports::Change;
use ghost_domain::{Error, ErrorCode, EventKind, Principal, Result, Role};

use super::detail::escape;
use super::door::Door;
use crate::fleet::check_own;
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
        if let Err(error) = check_own(principal).and_then(|()| principal.require(Role::Admin)) {
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
        let (lockdown, new, mut sessions_cut) = self.shut(&wanted);
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
        let recorded = loop {
            let row = lockdown.clone();
            let stands = registry
                .transact(move |model| {
                    let stands = model.lockdown.is_some();
                    let changes = stands.then_some(Change::PutLockdown(row));
                    Ok(Decision::of(stands, changes.into_iter().collect()))
                })
                .await;
            match stands {
                Ok(true) => break Ok(()),
                // A lift that had begun before came to its end in between: shut again.
                Ok(false) => sessions_cut = sessions_cut.saturating_add(self.shut(&lockdown).2),
                Err(error) => break Err(error),
            }
        };
        registry.export_withdrawal().await;
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

    /// Shuts everything in memory and at the links: the lockdown in force, whether it is new, and
    /// how many sessions were cut. Shut twice, the first one's time and reason stay, and sessions
    /// are cut all the same.
    fn shut(&self, wanted: &Lockdown) -> (Lockdown, bool, u32) {
        // The link is told under the model's lock, so that a lift at the same moment opens it
        // wholly before or not at all.
        self.door.registry.observe(|model| {
            let new = model.lockdown.is_none();
            let lockdown = model.lockdown.get_or_insert_with(|| wanted.clone()).clone();
            let consoles = u32::try_from(self.door.consoles.len()).unwrap_or(u32::MAX);
            let cut = self.door.ports.guests.lock_down(true);
            (lockdown, new, cut.saturating_add(consoles))
        })
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
        registry.export_withdrawal().await;
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
