//! What happened in the fleet, for those who watch.

use ghost_domain::fleet::CommandStatus;
use ghost_domain::vm::VmState;
use ghost_domain::{CommandId, HostId, OperationId, Severity, TenantName, Timestamp, VmId};

use super::HostState;

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FleetEvent {
    /// When this replica saw it.
    pub at: Timestamp,
    /// On which host.
    pub host: HostId,
    /// The host's name at that time.
    pub host_name: String,
    /// Whose.
    pub tenant: TenantName,
    /// What.
    pub kind: FleetEventKind,
}

/// The kinds of events. Those of VMs have the names that the host's own agent gives them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FleetEventKind {
    /// A host joined.
    HostJoined,
    /// A host is gone for good: it was removed.
    HostRemoved,
    /// A host's shown state changed.
    HostState {
        /// After.
        to: HostState,
        /// Why, where it is not online.
        reason: String,
    },
    /// Nothing new is placed on a host.
    HostCordoned {
        /// Why.
        reason: String,
    },
    /// It is again.
    HostUncordoned,
    /// A host has another name.
    HostRenamed {
        /// Before.
        from: String,
    },
    /// A command got into a host's queue, or further.
    Command {
        /// Which.
        id: CommandId,
        /// How far.
        status: CommandStatus,
        /// `start_vm` and others.
        action: &'static str,
        /// The VM's name or id.
        subject: String,
        /// What the host said of it.
        message: String,
        /// Its operation on the host.
        operation: Option<OperationId>,
    },
    /// A VM came to be.
    VmAdded {
        /// Which.
        id: VmId,
        /// Its name.
        name: String,
    },
    /// A VM is gone.
    VmRemoved {
        /// Which.
        id: VmId,
        /// Its name.
        name: String,
    },
    /// A VM's shown state changed, as its host told it.
    VmState {
        /// Which.
        id: VmId,
        /// Its name.
        name: String,
        /// Before.
        from: VmState,
        /// After.
        to: VmState,
        /// Why.
        reason: String,
    },
}

impl FleetEventKind {
    /// The stable name.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::HostJoined => "host_joined",
            Self::HostRemoved => "host_removed",
            Self::HostState { to, .. } => match to {
                HostState::Online => "host_online",
                HostState::Degraded => "host_degraded",
                HostState::Offline => "host_offline",
                HostState::Locked => "host_locked",
                HostState::NeverSeen => "host_never_seen",
            },
            Self::HostCordoned { .. } => "host_cordoned",
            Self::HostUncordoned => "host_uncordoned",
            Self::HostRenamed { .. } => "host_renamed",
            Self::Command { status, .. } => match status {
                CommandStatus::Queued => "command_queued",
                CommandStatus::Accepted => "command_accepted",
                CommandStatus::Succeeded => "command_done",
                CommandStatus::Failed => "command_failed",
                CommandStatus::Refused => "command_refused",
                CommandStatus::Expired => "command_expired",
                CommandStatus::Cancelled => "command_cancelled",
            },
            Self::VmAdded { .. } => "vm_added",
            Self::VmRemoved { .. } => "vm_removed",
            Self::VmState { .. } => "vm_state",
        }
    }

    /// How much it matters.
    pub const fn severity(&self) -> Severity {
        match self {
            Self::HostState { to, .. } => match to {
                HostState::Online | HostState::NeverSeen => Severity::Info,
                HostState::Degraded | HostState::Offline => Severity::Warning,
                HostState::Locked => Severity::Error,
            },
            Self::Command { status, .. } => match status {
                CommandStatus::Failed => Severity::Error,
                CommandStatus::Refused | CommandStatus::Expired => Severity::Warning,
                _ => Severity::Info,
            },
            Self::VmState { to, .. } => match to {
                VmState::Failed => Severity::Error,
                VmState::Unknown => Severity::Warning,
                _ => Severity::Info,
            },
            Self::HostRemoved | Self::HostCordoned { .. } => Severity::Warning,
            Self::HostJoined
            | Self::HostUncordoned
            | Self::HostRenamed { .. }
            | Self::VmAdded { .. }
            | Self::VmRemoved { .. } => Severity::Info,
        }
    }

    /// The VM that is concerned.
    pub const fn vm(&self) -> Option<VmId> {
        match self {
            Self::VmAdded { id, .. } | Self::VmRemoved { id, .. } | Self::VmState { id, .. } => {
                Some(*id)
            }
            _ => None,
        }
    }

    /// The name of the VM that is concerned.
    pub fn vm_name(&self) -> Option<&str> {
        match self {
            Self::VmAdded { name, .. }
            | Self::VmRemoved { name, .. }
            | Self::VmState { name, .. } => Some(name),
            Self::Command { subject, .. } => Some(subject),
            _ => None,
        }
    }

    /// One line for people.
    pub fn message(&self) -> String {
        let with = |text: &str, reason: &str| match reason {
            "" => text.to_owned(),
            reason => format!("{text}: {reason}"),
        };
        match self {
            Self::HostJoined => "the host joined".to_owned(),
            Self::HostRemoved => "the host was removed".to_owned(),
            Self::HostState { to, reason } => with(&format!("the host is {to}"), reason),
            Self::HostCordoned { reason } => with("nothing new is placed on the host", reason),
            Self::HostUncordoned => "VMs are placed on the host again".to_owned(),
            Self::HostRenamed { from } => format!("the host was called {from}"),
            Self::Command {
                status,
                action,
                message,
                ..
            } => with(
                &format!("the command {action} is {}", status.as_str()),
                message,
            ),
            Self::VmAdded { .. } => "the VM was made".to_owned(),
            Self::VmRemoved { .. } => "the VM is gone".to_owned(),
            Self::VmState {
                from, to, reason, ..
            } => with(&format!("{from} -> {to}"), reason),
        }
    }
}
