//! A virtual machine.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{each, filled, optional_seconds, optional_time, seconds, time_of};
use crate::agent::v1 as message;

/// The state that people and programs see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Being made.
    Creating,
    /// Off.
    Stopped,
    /// On its way up.
    Starting,
    /// Running.
    Running,
    /// Being halted.
    Pausing,
    /// Halted, memory kept.
    Paused,
    /// On its way down.
    Stopping,
    /// On its way down and up again.
    Restarting,
    /// Being removed.
    Deleting,
    /// Broken or crashed.
    Failed,
    /// Nobody knows, `state_reason` says why.
    Unknown,
}

impl VmState {
    /// The state in lower case.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Stopped => "stopped",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Restarting => "restarting",
            Self::Deleting => "deleting",
            Self::Failed => "failed",
            Self::Unknown => "unknown",
        }
    }
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl From<message::VmState> for VmState {
    /// A state that this version does not know is unknown, never something it might not be.
    fn from(state: message::VmState) -> Self {
        match state {
            message::VmState::Creating => Self::Creating,
            message::VmState::Stopped => Self::Stopped,
            message::VmState::Starting => Self::Starting,
            message::VmState::Running => Self::Running,
            message::VmState::Pausing => Self::Pausing,
            message::VmState::Paused => Self::Paused,
            message::VmState::Stopping => Self::Stopping,
            message::VmState::Restarting => Self::Restarting,
            message::VmState::Deleting => Self::Deleting,
            message::VmState::Failed => Self::Failed,
            message::VmState::Unspecified | message::VmState::Unknown => Self::Unknown,
        }
    }
}

/// The power state that the owner wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DesiredState {
    /// On.
    Running,
    /// Off.
    Stopped,
    /// Halted, memory kept.
    Paused,
}

impl DesiredState {
    /// The state in lower case.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Paused => "paused",
        }
    }

    pub(super) fn from_message(state: message::DesiredState) -> Option<Self> {
        match state {
            message::DesiredState::Unspecified => None,
            message::DesiredState::Running => Some(Self::Running),
            message::DesiredState::Stopped => Some(Self::Stopped),
            message::DesiredState::Paused => Some(Self::Paused),
        }
    }
}

/// A disk of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Disk {
    /// Its name within the VM, such as `root`.
    pub name: String,
    /// The size that the guest sees.
    pub size_bytes: u64,
    /// The space that it occupies on the host.
    pub allocated_bytes: u64,
}

impl From<message::Disk> for Disk {
    fn from(disk: message::Disk) -> Self {
        Self {
            name: disk.name,
            size_bytes: disk.size_bytes,
            allocated_bytes: disk.allocated_bytes,
        }
    }
}

/// A network card of a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Nic {
    /// The network's name.
    pub network: String,
    /// The MAC address, lower case with colons.
    pub mac: String,
    /// IP addresses learnt from DHCP leases.
    pub addresses: Vec<String>,
    /// How old that knowledge is; null while there is none.
    pub addresses_age_seconds: Option<f64>,
}

impl From<message::NetworkInterface> for Nic {
    fn from(nic: message::NetworkInterface) -> Self {
        Self {
            network: nic.network,
            mac: nic.mac,
            addresses: nic.addresses,
            addresses_age_seconds: optional_seconds(nic.addresses_age.as_ref()),
        }
    }
}

/// One thing that is true of a VM or not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Condition {
    /// What it is about, such as `address` or `drift`.
    pub r#type: String,
    /// Whether it holds.
    pub status: bool,
    /// Why, for people; null where there is nothing to say.
    pub reason: Option<String>,
    /// Since when, RFC 3339.
    #[schema(format = DateTime)]
    pub since: Option<String>,
}

impl From<message::Condition> for Condition {
    fn from(condition: message::Condition) -> Self {
        Self {
            r#type: condition.r#type,
            status: condition.status,
            reason: filled(condition.reason),
            since: optional_time(condition.since.as_ref()),
        }
    }
}

/// What the agent inside a VM is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestPolicy {
    /// How it gets there: `auto`, `always` or `never`.
    pub inject: String,
    /// Whether exec, shell, files and accounts may be reached through it.
    pub access: bool,
}

impl From<message::GuestPolicy> for GuestPolicy {
    fn from(policy: message::GuestPolicy) -> Self {
        Self {
            inject: policy.inject,
            access: policy.access,
        }
    }
}

/// Start with the host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Autostart {
    /// Lower starts first.
    pub order: i32,
    /// How long to wait after this VM before the next one.
    pub delay_seconds: f64,
}

impl From<message::Autostart> for Autostart {
    fn from(autostart: message::Autostart) -> Self {
        Self {
            order: autostart.order,
            delay_seconds: autostart.delay.as_ref().map_or(0.0, seconds),
        }
    }
}

/// What happens after a crash of the guest or of QEMU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RestartPolicy {
    /// How many times within the window it is started again; 0: it stays off.
    pub max_restarts: u32,
    /// The window.
    pub window_seconds: f64,
}

impl From<message::RestartPolicy> for RestartPolicy {
    fn from(policy: message::RestartPolicy) -> Self {
        Self {
            max_restarts: policy.max_restarts,
            window_seconds: policy.window.as_ref().map_or(0.0, seconds),
        }
    }
}

/// A virtual machine: what its owner wants, what was observed, and how that is known.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    /// UUID.
    #[schema(format = Uuid)]
    pub id: String,
    /// The name, unique on its host.
    pub name: String,
    /// The state now.
    pub state: VmState,
    /// Why it is in that state, for people.
    pub state_reason: Option<String>,
    /// How the state is known: `libvirt_event`, `libvirt_sync`, `operation` or `none`.
    pub state_source: String,
    /// How long ago the source last vouched for it; null before the first look.
    pub state_age_seconds: Option<f64>,
    /// The power state that the owner wants.
    pub desired_state: Option<DesiredState>,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory.
    pub memory_bytes: u64,
    /// The image that it was made from.
    pub image: String,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// Its network cards.
    pub nics: Vec<Nic>,
    /// What is true of it or not.
    pub conditions: Vec<Condition>,
    /// The owner's labels.
    pub tags: BTreeMap<String, String>,
    /// Rises with each change of the record.
    pub generation: u64,
    /// When it was made, RFC 3339.
    #[schema(format = DateTime)]
    pub created_at: String,
    /// The operation that holds it now, if one does.
    #[schema(format = Uuid)]
    pub operation_id: Option<String>,
    /// How it starts with the host; null: it does not.
    pub autostart: Option<Autostart>,
    /// What happens after a crash.
    pub restart_policy: Option<RestartPolicy>,
    /// Whether deleting it is refused.
    pub delete_protection: bool,
    /// The agent inside it; null where the host agent is too old to know of one.
    pub guest: Option<GuestPolicy>,
    /// Who created it through Ghost Core, `<tenant>/<user>`; null for the host's owner.
    pub owner: Option<String>,
}

impl From<message::Vm> for Vm {
    fn from(vm: message::Vm) -> Self {
        Self {
            state: vm.state().into(),
            desired_state: DesiredState::from_message(vm.desired_state()),
            id: vm.id,
            name: vm.name,
            state_reason: filled(vm.state_reason),
            state_source: if vm.state_source.is_empty() {
                "none".to_owned()
            } else {
                vm.state_source
            },
            state_age_seconds: optional_seconds(vm.state_age.as_ref()),
            vcpus: vm.vcpus,
            memory_bytes: vm.memory_bytes,
            image: vm.image,
            disks: each(vm.disks),
            nics: each(vm.nics),
            conditions: each(vm.conditions),
            tags: vm.tags.into_iter().collect(),
            generation: vm.generation,
            created_at: time_of(vm.created_at.as_ref()),
            operation_id: filled(vm.operation_id),
            autostart: vm.autostart.map(Autostart::from),
            restart_policy: vm.restart_policy.map(RestartPolicy::from),
            delete_protection: vm.delete_protection,
            guest: vm.guest.map(Into::into),
            owner: filled(vm.owner),
        }
    }
}
