//! What happened, for those who watch.

use crate::{ErrorCode, OperationId, OperationStatus, Timestamp, VmId, vm::VmState};

/// How much an event matters to a person.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// Expected.
    Info,
    /// Worth a look.
    Warning,
    /// Something failed.
    Error,
}

/// One thing that happened. Sequence numbers rise by one within a run of the agent; a watcher that
/// sees a gap has missed events and lists anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Position in this run of the agent, from 1.
    pub sequence: u64,
    /// When.
    pub at: Timestamp,
    /// What.
    pub kind: EventKind,
    /// The VM concerned.
    pub vm: Option<VmId>,
    /// The name of the VM, image or network concerned, for people.
    pub subject: String,
}

/// The kinds of events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// A VM's shown state changed.
    VmState {
        /// Before.
        from: VmState,
        /// After.
        to: VmState,
        /// Why, in libvirt's or our words.
        reason: String,
    },
    /// A VM record came to be (created or adopted).
    VmAdded {
        /// Whether it was found in libvirt rather than created by a request.
        adopted: bool,
    },
    /// A VM's record changed (spec, tags, address).
    VmUpdated,
    /// A VM is gone.
    VmRemoved,
    /// libvirt's view differs from the record, by somebody else's hand.
    VmDrift {
        /// What differs.
        detail: String,
    },
    /// A guest crashed and is started again, or no longer is.
    VmCrashed {
        /// Whether the restart policy starts it again.
        restarting: bool,
        /// Why or why not.
        detail: String,
    },
    /// An operation changed its status.
    Operation {
        /// Which.
        operation: OperationId,
        /// To what.
        status: OperationStatus,
        /// The code, where it failed.
        code: Option<ErrorCode>,
    },
    /// An image came into the cache.
    ImageAdded,
    /// An image left the cache.
    ImageRemoved {
        /// Whether the size cap made it go rather than a request.
        evicted: bool,
    },
    /// The connection to libvirt is there (again).
    HypervisorConnected,
    /// The connection to libvirt is lost.
    HypervisorLost {
        /// Why.
        reason: String,
    },
    /// State was rebuilt from libvirt and the disks.
    StateRebuilt {
        /// What was found damaged and what was recovered.
        detail: String,
    },
    /// The agent in a guest greeted.
    GuestConnected {
        /// Its version, escaped: it is the guest's word.
        version: String,
        /// The guest's kernel was started anew, as far as the guest says.
        rebooted: bool,
    },
    /// The agent in a guest is no longer heard.
    GuestDisconnected {
        /// Why.
        reason: String,
    },
    /// The agent in a guest broke the protocol so often that it is held off for a while.
    GuestMisbehaved {
        /// What it did.
        detail: String,
    },
    /// The agent in a guest was replaced by the host's program, or could not be.
    GuestUpdated {
        /// Whether it was.
        updated: bool,
        /// To what, or why not.
        detail: String,
    },
    /// All ways into guests were closed, or opened again.
    Lockdown {
        /// Whether they are closed now.
        active: bool,
        /// By whom.
        by: String,
        /// Why.
        reason: String,
    },
    /// The link to Ghost Core is up.
    CoreConnected {
        /// How: `link`, `piko`, `direct`.
        carrier: String,
        /// The replica at the other end.
        replica: String,
    },
    /// The link to Ghost Core is no more.
    CoreLost {
        /// Why.
        reason: String,
    },
    /// The owner lets Core delete more VMs than usual for a while, or does so no longer.
    CoreDeletes {
        /// Until when; `None`: as usual again.
        until: Option<Timestamp>,
        /// By whom.
        by: String,
    },
}

impl EventKind {
    /// The stable name of the kind, in snake case.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::VmState { .. } => "vm_state",
            Self::VmAdded { .. } => "vm_added",
            Self::VmUpdated => "vm_updated",
            Self::VmRemoved => "vm_removed",
            Self::VmDrift { .. } => "vm_drift",
            Self::VmCrashed { .. } => "vm_crashed",
            Self::Operation { .. } => "operation",
            Self::ImageAdded => "image_added",
            Self::ImageRemoved { .. } => "image_removed",
            Self::HypervisorConnected => "hypervisor_connected",
            Self::HypervisorLost { .. } => "hypervisor_lost",
            Self::StateRebuilt { .. } => "state_rebuilt",
            Self::GuestConnected { .. } => "guest_connected",
            Self::GuestDisconnected { .. } => "guest_disconnected",
            Self::GuestMisbehaved { .. } => "guest_misbehaved",
            Self::GuestUpdated { .. } => "guest_updated",
            Self::Lockdown { .. } => "lockdown",
            Self::CoreConnected { .. } => "core_connected",
            Self::CoreLost { .. } => "core_lost",
            Self::CoreDeletes { .. } => "core_deletes",
        }
    }

    /// How much it matters.
    pub const fn severity(&self) -> Severity {
        match self {
            Self::VmDrift { .. }
            | Self::VmCrashed { .. }
            | Self::HypervisorLost { .. }
            | Self::StateRebuilt { .. }
            | Self::GuestMisbehaved { .. }
            | Self::GuestUpdated { updated: false, .. }
            | Self::CoreLost { .. }
            | Self::CoreDeletes { until: Some(_), .. }
            | Self::Lockdown { active: true, .. } => Severity::Warning,
            Self::Operation { status, .. } => match status {
                OperationStatus::Failed | OperationStatus::NeedsAttention => Severity::Error,
                OperationStatus::RolledBack => Severity::Warning,
                OperationStatus::Pending
                | OperationStatus::Running
                | OperationStatus::Succeeded
                | OperationStatus::Cancelled => Severity::Info,
            },
            Self::VmState { to, .. } => match to {
                VmState::Failed => Severity::Error,
                VmState::Unknown => Severity::Warning,
                _ => Severity::Info,
            },
            Self::VmAdded { .. }
            | Self::VmUpdated
            | Self::VmRemoved
            | Self::ImageAdded
            | Self::ImageRemoved { .. }
            | Self::HypervisorConnected
            | Self::GuestConnected { .. }
            | Self::GuestDisconnected { .. }
            | Self::GuestUpdated { updated: true, .. }
            | Self::CoreConnected { .. }
            | Self::CoreDeletes { until: None, .. }
            | Self::Lockdown { active: false, .. } => Severity::Info,
        }
    }

    /// One line for people.
    pub fn describe(&self) -> String {
        match self {
            Self::VmState { from, to, reason } if reason.is_empty() => format!("{from} -> {to}"),
            Self::VmState { from, to, reason } => format!("{from} -> {to} ({reason})"),
            Self::VmAdded { adopted: true } => "adopted from libvirt".into(),
            Self::VmAdded { adopted: false } => "created".into(),
            Self::VmUpdated => "updated".into(),
            Self::VmRemoved => "deleted".into(),
            Self::VmDrift { detail } => format!("changed behind our back: {detail}"),
            Self::VmCrashed {
                restarting: true,
                detail,
            } => format!("crashed, starting again: {detail}"),
            Self::VmCrashed {
                restarting: false,
                detail,
            } => format!("crashed, left off: {detail}"),
            Self::Operation {
                operation,
                status,
                code: None,
            } => format!("operation {operation} {status}"),
            Self::Operation {
                operation,
                status,
                code: Some(code),
            } => {
                format!("operation {operation} {status}: {code}")
            }
            Self::ImageAdded => "image added".into(),
            Self::ImageRemoved { evicted: true } => {
                "image evicted to stay within the cache's size".into()
            }
            Self::ImageRemoved { evicted: false } => "image deleted".into(),
            Self::HypervisorConnected => "libvirt connected".into(),
            Self::HypervisorLost { reason } => format!("libvirt lost: {reason}"),
            Self::StateRebuilt { detail } => format!("state rebuilt: {detail}"),
            Self::GuestConnected {
                version,
                rebooted: true,
            } => format!("guest agent {version} connected after a boot"),
            Self::GuestConnected {
                version,
                rebooted: false,
            } => format!("guest agent {version} connected"),
            Self::GuestDisconnected { reason } => format!("guest agent lost: {reason}"),
            Self::GuestMisbehaved { detail } => {
                format!("guest agent held off, it breaks the protocol: {detail}")
            }
            Self::GuestUpdated {
                updated: true,
                detail,
            } => format!("guest agent updated: {detail}"),
            Self::GuestUpdated {
                updated: false,
                detail,
            } => format!("guest agent not updated: {detail}"),
            Self::Lockdown {
                active: true,
                by,
                reason,
            } => format!("all ways into guests closed by {by}: {reason}"),
            Self::Lockdown {
                active: false, by, ..
            } => format!("ways into guests opened again by {by}"),
            Self::CoreConnected { carrier, replica } => {
                format!("connected to Ghost Core ({replica}) by {carrier}")
            }
            Self::CoreLost { reason } => format!("link to Ghost Core lost: {reason}"),
            Self::CoreDeletes { until: Some(_), by } => {
                format!("{by} lets Ghost Core delete more VMs than usual for a while")
            }
            Self::CoreDeletes { until: None, by } => {
                format!("Ghost Core may delete VMs only as usual again, by {by}")
            }
        }
    }
}
