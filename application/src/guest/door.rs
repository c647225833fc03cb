//! The one way into guests: who may, whether it is open, and the line in the audit log.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ghost_domain::guest::{AuditRecord, GuestLinkStatus, Lockdown};
use ghost_domain::ports::{AuditLog, AuditReceipt, GuestProgramFile};
use ghost_domain::vm::ObservedPower;
use ghost_domain::{Error, ErrorCode, Monotonic, Principal, Result, VmId};
use parking_lot::Mutex;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::GuestTarget;
use super::detail::{MAX_DETAIL, escape};
use crate::application::Ports;
use crate::registry::{Model, Registry, VmEntry};

/// How long a call waits for an update of the guest's agent.
const UPDATE_PATIENCE: Duration = Duration::from_secs(20);
/// A line that says how something ended is tried again until the pause has grown to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Lines about refused calls that one principal makes in a minute. The log is bounded, and who may
/// do nothing else must not be able to push out what others did.
const REFUSALS: u32 = 60;
const MINUTE: Duration = Duration::from_secs(60);

/// Lines about a principal's refused calls within a minute.
#[derive(Clone, Copy, Debug)]
struct Refusals {
    since: Monotonic,
    written: u32,
    unwritten: u64,
}

/// Bounds the lines about refused calls.
#[derive(Debug, Default)]
pub(crate) struct Denials(Mutex<BTreeMap<String, Refusals>>);

impl Denials {
    /// Whether a line is written, with how many were not since the one before.
    fn count(&self, principal: &str, now: Monotonic) -> Option<u64> {
        let mut all = self.0.lock();
        // Principals are as many as there are credentials; those of a minute ago are forgotten.
        all.retain(|name, one| {
            name == principal || one.unwritten > 0 || now.since(one.since) < MINUTE
        });
        let fresh = Refusals {
            since: now,
            written: 0,
            unwritten: 0,
        };
        let one = all.entry(principal.to_owned()).or_insert(fresh);
        if now.since(one.since) >= MINUTE {
            (one.since, one.written) = (now, 0);
        }
        if one.written >= REFUSALS {
            one.unwritten += 1;
            return None;
        }
        one.written += 1;
        Some(std::mem::take(&mut one.unwritten))
    }
}

/// See the module's documentation.
pub(crate) struct Door {
    pub(crate) registry: Arc<Registry>,
    pub(crate) ports: Ports,
    /// Whether the host's configuration lets anybody in.
    pub(crate) access: bool,
    /// Visits and the audit lines that are still to be written.
    pub(crate) tasks: TaskTracker,
    pub(crate) denials: Denials,
    /// Serial consoles that somebody is attached to.
    pub(crate) consoles: TaskTracker,
}

/// A call that has been let in, or turned away with a line about it. Its end is written whatever
/// becomes of it: by [`Visit::end`], or when it is dropped.
pub(crate) struct Visit {
    pub(crate) vm: VmId,
    door: Arc<Door>,
    record: AuditRecord,
    /// The line that it begins may not be on the disk yet.
    receipt: Option<AuditReceipt>,
    began: Monotonic,
    ended: bool,
    _open: TaskTrackerToken,
}

impl Door {
    /// Lets a call in: checks all that must hold and writes the line that says it begins.
    ///
    /// # Errors
    /// `PermissionDenied` (the role, or the permission to enter guests), `VmNotFound`, `VmAmbiguous`, `GuestAccessOff`, `Lockdown`,
    /// `VmNotRunning`, `GuestUnreachable`, in this order; and those of the audit log: what cannot
    /// be logged does not happen.
    pub(crate) async fn enter(
        self: &Arc<Self>,
        principal: &Principal,
        target: &GuestTarget,
        action: &'static str,
        detail: String,
    ) -> Result<Visit> {
        let mut visit = self.enter_early(principal, target, action, detail).await?;
        match visit.logged().await {
            Ok(()) => Ok(visit),
            Err(error) => {
                // Nothing has begun, and no line can be written about that.
                visit.ended = true;
                Err(error)
            }
        }
    }

    /// As [`Door::enter`], but while the line is in the log, it may not be on the disk yet. Nothing
    /// of what comes of the call may be told before [`Visit::logged`]: a power cut that takes the
    /// line takes the guest too, and then nobody was told anything.
    pub(crate) async fn enter_early(
        self: &Arc<Self>,
        principal: &Principal,
        target: &GuestTarget,
        action: &'static str,
        detail: String,
    ) -> Result<Visit> {
        let found = self.registry.read(|model| {
            model
                .find_vm(&target.vm)
                .map(|entry| (entry.vm.id, entry.vm.name.to_string()))
        });
        let mut record = AuditRecord {
            principal: escape(&principal.name, 256),
            action: action.to_owned(),
            detail: escape(&detail, MAX_DETAIL),
            request_id: escape(&target.request_id, 128),
            ..AuditRecord::default()
        };
        match &found {
            Ok((id, name)) => {
                record.vm_id = id.to_string();
                record.vm_name.clone_from(name);
            }
            // What the caller called it, for whoever looks for attempts.
            Err(_) => record.vm_name = escape(&target.vm, 128),
        }
        let allowed = self
            .registry
            .read(|model| crate::fleet::check_enter(model, principal))
            .and_then(|()| principal.require_guest_access());
        let checked = match (allowed, found) {
            (Err(error), _) | (Ok(()), Err(error)) => Err(error),
            (Ok(()), Ok((id, _))) => {
                self.let_update(id).await;
                self.check(id).map(|()| id)
            }
        };
        let vm = match checked {
            Ok(vm) => vm,
            Err(error) => {
                let outcome = match error.code() {
                    ErrorCode::PermissionDenied
                    | ErrorCode::CorePermissionDenied
                    | ErrorCode::GuestAccessOff
                    | ErrorCode::Lockdown => format!("denied: {}", error.code()),
                    code => format!("failed: {code}"),
                };
                self.write_refusal(AuditRecord { outcome, ..record });
                return Err(error);
            }
        };
        let began = self.registry.clock().monotonic();
        let begun = AuditRecord {
            outcome: "begun".into(),
            ..record.clone()
        };
        let receipt = self.ports.audit.begin(begun).await;
        let visit = Visit {
            receipt: Some(receipt.map_err(|error| unlogged(&error))?),
            vm,
            door: Arc::clone(self),
            record,
            began,
            ended: false,
            _open: self.tasks.token(),
        };
        // The policy may have changed while the line was written: then nothing has entered yet.
        match self.check_policy(vm) {
            Ok(()) => Ok(visit),
            Err(error) => Err(visit.fail(error)),
        }
    }

    /// Waits while the guest's agent is replaced: whoever calls then need not know of it.
    async fn let_update(&self, vm: VmId) {
        let updated = self.registry.wait_for(|model| {
            let updating = model.vms.get(&vm).is_some_and(|entry| entry.guest.updating);
            (!updating).then_some(())
        });
        // Where it takes longer, the link says how it stands.
        drop(tokio::time::timeout(UPDATE_PATIENCE, updated).await);
    }

    /// All that a call into a guest needs besides the caller's role.
    fn check(&self, vm: VmId) -> Result<()> {
        self.check_policy(vm)?;
        self.registry.read(|model| check_power(model, vm))?;
        let name = self
            .registry
            .read(|model| model.vm(vm).map(|entry| entry.vm.name.to_string()))?;
        check_link(&self.ports.guests.status(vm), &name)
    }

    /// The owner's decisions: the configuration's, the VM's, and a lockdown.
    pub(crate) fn check_policy(&self, vm: VmId) -> Result<()> {
        self.registry.read(|model| {
            let entry = model.vm(vm)?;
            model.check_accepting()?;
            check_access(entry, self.access)?;
            match &model.lockdown {
                None => Ok(()),
                Some(lockdown) => Err(locked(lockdown)),
            }
        })
    }

    pub(super) async fn write(&self, record: AuditRecord) -> Result<()> {
        match self.ports.audit.append(record).await {
            Ok(_) => Ok(()),
            Err(error) => Err(unlogged(&error)),
        }
    }

    /// The program that the host has for guests. Reads the disk where that has changed.
    pub(crate) async fn program(&self) -> Option<GuestProgramFile> {
        let guests = Arc::clone(&self.ports.guests);
        tokio::task::spawn_blocking(move || guests.program())
            .await
            .ok()
            .flatten()
    }

    /// Writes the line about an attached console. It need not be there first: on a host whose disk
    /// is full the console is the way to help.
    pub(crate) fn attached<T>(&self, record: AuditRecord, outcome: Result<T>) -> Result<T> {
        match &outcome {
            Ok(_) => self.write_later(AuditRecord {
                outcome: "ok".into(),
                ..record
            }),
            Err(error) => self.write_refusal(AuditRecord {
                outcome: failed(error),
                ..record
            }),
        }
        outcome
    }

    /// Writes a line about a call that was refused, unless its principal made very many of them.
    pub(super) fn write_refusal(&self, mut record: AuditRecord) {
        let now = self.registry.clock().monotonic();
        match self.denials.count(&record.principal, now) {
            None => {}
            Some(0) => self.write_later(record),
            Some(unwritten) => {
                record.outcome = format!("{} (and {unwritten} before it)", record.outcome);
                self.write_later(record);
            }
        }
    }

    /// Writes a line without holding up the caller.
    pub(super) fn write_later(&self, record: AuditRecord) {
        write_later(&self.tasks, &self.ports.audit, record);
    }
}

fn write_later(tasks: &TaskTracker, audit: &Arc<dyn AuditLog>, record: AuditRecord) {
    let audit = Arc::clone(audit);
    let Ok(runtime) = tokio::runtime::Handle::try_current() else {
        tracing::error!(?record, "an audit line is lost: the agent has ended");
        return;
    };
    tasks.spawn_on(
        async move {
            let mut pause = Duration::from_millis(100);
            loop {
                match audit.append(record.clone()).await {
                    Ok(_) => return,
                    // The log's disk does not keep up for a moment.
                    Err(error)
                        if error.code() == ErrorCode::TooManyRequests && pause < LONGEST_PAUSE =>
                    {
                        tokio::time::sleep(pause).await;
                        pause *= 2;
                    }
                    Err(error) => {
                        tracing::error!(%error, ?record, "the audit log cannot be written");
                        return;
                    }
                }
            }
        },
        &runtime,
    );
}

fn unlogged(error: &Error) -> Error {
    Error::new(
        error.code(),
        "the audit log cannot be written, and what it does not hold is not done",
    )
    .because(error)
    .hint("make room where the agent keeps its state; ghostctl status tells more")
}

impl Visit {
    /// Waits until the line that the call begins would survive a power cut.
    ///
    /// # Errors
    /// Those of the audit log: what was begun is to be ended.
    pub(crate) async fn logged(&mut self) -> Result<()> {
        match &mut self.receipt {
            None => Ok(()),
            Some(receipt) => {
                let outcome = receipt.await;
                self.receipt = None;
                outcome.map(drop).map_err(|error| unlogged(&error))
            }
        }
    }

    /// What the call did, as the link answered; for calls that are over with it.
    pub(crate) fn settle<T>(self, outcome: Result<T>) -> Result<T> {
        match outcome {
            Ok(value) => {
                self.end("ok".into(), 0, 0);
                Ok(value)
            }
            Err(error) => Err(self.fail(error)),
        }
    }

    /// For calls that go on: refuses where the policy changed while the link was asked.
    pub(crate) fn recheck(&self) -> Result<()> {
        self.door.check_policy(self.vm)
    }

    /// Writes that the call failed.
    pub(crate) fn fail(self, error: Error) -> Error {
        let outcome = failed(&error);
        self.end(outcome, 0, 0);
        error
    }

    /// Writes how the call ended.
    pub(crate) fn end(mut self, outcome: String, bytes_in: u64, bytes_out: u64) {
        self.close(outcome, bytes_in, bytes_out);
    }

    /// As [`Visit::end`]; only the first call counts.
    pub(crate) fn close(&mut self, outcome: String, bytes_in: u64, bytes_out: u64) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let now = self.door.registry.clock().monotonic();
        self.door.write_later(AuditRecord {
            outcome,
            bytes_in,
            bytes_out,
            duration: Some(now.since(self.began)),
            ..std::mem::take(&mut self.record)
        });
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        // The caller went away in the middle.
        self.close("cancelled".into(), 0, 0);
    }
}

/// What is said while all ways into guests are closed.
pub(crate) fn locked(lockdown: &Lockdown) -> Error {
    Error::new(ErrorCode::Lockdown, "all ways into guests are closed")
        .because(format!("{} did it: {}", lockdown.set_by, lockdown.reason))
        .hint("an admin opens them again: ghostctl lockdown --lift")
}

/// The outcome of a line for a call that failed.
pub(super) fn failed(error: &Error) -> String {
    match error.code() {
        ErrorCode::PermissionDenied
        | ErrorCode::CorePermissionDenied
        | ErrorCode::GuestAccessOff
        | ErrorCode::Lockdown => {
            format!("denied: {}", error.code())
        }
        code => format!("failed: {code}"),
    }
}

pub(super) fn check_access(entry: &VmEntry, host: bool) -> Result<()> {
    let name = &entry.vm.name;
    if !host {
        return Err(Error::new(
            ErrorCode::GuestAccessOff,
            "guests of this host may not be entered",
        )
        .because("guest.access is false in the agent's configuration")
        .hint("the host's owner decides: guest.access in /etc/ghost/agent.yaml"));
    }
    if !entry.vm.spec.guest.access {
        return Err(Error::new(
            ErrorCode::GuestAccessOff,
            format!("guest access of {name} is off"),
        )
        .hint(format!("switch it on: ghostctl guest access {name} on")));
    }
    Ok(())
}

pub(super) fn check_power(model: &Model, vm: VmId) -> Result<()> {
    let entry = model.vm(vm)?;
    let name = &entry.vm.name;
    let not = |what: &str, verb: &str| {
        Err(
            Error::new(ErrorCode::VmNotRunning, format!("{name} is {what}"))
                .hint(format!("ghostctl vm {verb} {name}")),
        )
    };
    match entry.observation.as_ref().map(|seen| seen.power) {
        Some(ObservedPower::Running | ObservedPower::ShuttingDown) => Ok(()),
        Some(ObservedPower::Paused) => not("paused", "resume"),
        Some(ObservedPower::Off | ObservedPower::Crashed | ObservedPower::Absent) => {
            not("not running", "start")
        }
        // Nobody has seen it yet: the link will say.
        None => Ok(()),
    }
}

pub(super) fn check_link(status: &GuestLinkStatus, name: &str) -> Result<()> {
    let hint = format!("see each layer: ghostctl guest status {name}");
    let unreachable = |cause: String| {
        Err(Error::new(
            ErrorCode::GuestUnreachable,
            format!("the agent in {name} cannot be reached"),
        )
        .because(cause)
        .hint(hint.clone()))
    };
    if status.held_off_until.is_some() {
        return unreachable("it broke the protocol and is held off for a while".into());
    }
    if !status.channel {
        return unreachable(match &status.channel_error {
            Some(error) => format!("its channel cannot be opened: {}", escape(error, 256)),
            None => "its channel is not open".into(),
        });
    }
    match &status.hello {
        None => unreachable("it has not greeted: the guest still boots, or has no agent".into()),
        Some(hello) if hello.protocol_version == 0 => unreachable(format!(
            "there is no common protocol version with its agent {}",
            escape(&hello.agent_version, 64)
        )),
        Some(_) => Ok(()),
    }
}
