//! The hypervisor: libvirt, or the simulated one that keeps the same promises.

use std::path::PathBuf;

use async_trait::async_trait;

use crate::vm::{Observation, Vm};
use crate::{ImageFormat, Result, VmId};

/// How guests are executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Accelerator {
    /// Hardware virtualisation.
    Kvm,
    /// QEMU's software emulation.
    Tcg,
}

impl Accelerator {
    /// `kvm` or `tcg`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// What is there to run VMs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HypervisorInfo {
    /// The address we are connected to.
    pub uri: String,
    /// libvirt's version, such as `11.3.0`.
    pub libvirt_version: String,
    /// QEMU's version.
    pub hypervisor_version: String,
    /// What guests run on.
    pub accelerator: Accelerator,
    /// Why that accelerator, for people.
    pub accelerator_reason: String,
}

/// All that a domain is defined from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainDefinition {
    /// The record; id, name, generation and spec (not cloud-init, which may hold secrets) go into
    /// our metadata element, so that the record can be rebuilt from the domain.
    pub vm: Vm,
    /// The VM's disk; always qcow2 (an overlay), and said so in the XML.
    pub disk: PathBuf,
    /// The NoCloud seed, raw, attached read-only.
    pub seed: PathBuf,
    /// Unix socket of the serial console, where QEMU listens.
    pub console_socket: PathBuf,
    /// The console's log, written and bounded by virtlogd.
    pub console_log: PathBuf,
    /// Unix socket of the guest agent's virtio-serial channel, where QEMU listens.
    pub guest_socket: PathBuf,
    /// For each network card of the spec, in order: the libvirt network behind its network.
    pub libvirt_networks: Vec<String>,
    /// The base image of the disk and its format, spelled out in the backing chain so that
    /// libvirt never probes it.
    pub base_image: (PathBuf, ImageFormat),
}

/// One domain of ours, as libvirt has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainSnapshot {
    /// The domain's UUID.
    pub id: VmId,
    /// The domain's name.
    pub name: String,
    /// What is seen of it.
    pub observation: Observation,
    /// The record as our metadata holds it (with empty cloud-init), if the element is readable.
    pub record: Option<Vm>,
    /// How the domain's hardware differs from what its own metadata says, one line each: the
    /// trace of a `virsh edit`. Empty when it agrees.
    pub drift: Vec<String>,
}

/// Counters of one VM since its start.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct DomainStatistics {
    /// Which.
    pub id: Option<VmId>,
    /// CPU time used, nanoseconds.
    pub cpu_time_nanoseconds: u64,
    /// Memory given to it, bytes.
    pub memory_bytes: u64,
    /// Resident memory of its QEMU process, bytes.
    pub memory_resident_bytes: u64,
    /// Bytes read from its disks.
    pub block_read_bytes: u64,
    /// Bytes written to its disks.
    pub block_write_bytes: u64,
    /// Bytes received.
    pub network_receive_bytes: u64,
    /// Bytes sent.
    pub network_transmit_bytes: u64,
}

/// What the hypervisor tells by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HypervisorEvent {
    /// The connection is there (again). Whoever listens lists all domains now: what happened
    /// before was not told.
    Connected,
    /// The connection is gone, or the peer no longer answers.
    Disconnected {
        /// Why.
        reason: String,
    },
    /// A domain of ours (or one unknown to us) changed its power state.
    Power {
        /// Which.
        id: VmId,
        /// To what.
        observation: Observation,
        /// The guest itself crashed or QEMU died, rather than somebody ending it.
        crashed: bool,
    },
    /// A domain was defined or redefined: its definition may differ from the record now.
    Defined {
        /// Which.
        id: VmId,
    },
    /// A domain was undefined.
    Undefined {
        /// Which.
        id: VmId,
    },
}

/// Receives events; each subscriber sees all events since it subscribed.
#[async_trait]
pub trait HypervisorEvents: Send {
    /// The next event; `None` once the hypervisor adapter is gone. A subscriber that was too slow
    /// gets [`HypervisorEvent::Connected`] in place of what it missed, and lists anew.
    async fn next(&mut self) -> Option<HypervisorEvent>;
}

/// Runs VMs.
///
/// Errors of every call: `HypervisorUnavailable` when libvirt cannot be reached or does not answer
/// within the deadline (what was asked may still take effect: look, do not repeat blindly);
/// `VmNotFound` when the domain does not exist; `HypervisorFailed` for every refusal of libvirt or
/// QEMU, with their words as the cause.
#[cfg_attr(feature = "mocks", mockall::automock)]
#[async_trait]
pub trait Hypervisor: Send + Sync {
    /// What is there.
    async fn info(&self) -> Result<HypervisorInfo>;

    /// Subscribes to events.
    fn subscribe(&self) -> Box<dyn HypervisorEvents>;

    /// Defines the domain, or redefines it where one with its UUID exists. A domain with the same
    /// name and another UUID is somebody else's: `NameTaken`.
    async fn define(&self, definition: &DomainDefinition) -> Result<()>;

    /// Removes the definition, with managed save, NVRAM, snapshot and checkpoint metadata.
    /// Succeeds where there is none. Does not stop a running domain.
    async fn undefine(&self, vm: VmId) -> Result<()>;

    /// Writes into the metadata of a domain whether its guest may be entered, into the definition
    /// and into what runs; nothing else of it changes. Succeeds where it stands there already.
    async fn set_guest_access(&self, vm: VmId, access: bool) -> Result<()>;

    /// Powers on. Succeeds where it runs already.
    async fn start(&self, vm: VmId) -> Result<()>;

    /// Asks the guest by ACPI to shut down; returns once it was asked.
    async fn shut_down(&self, vm: VmId) -> Result<()>;

    /// Cuts the power. Succeeds where it is off already.
    async fn power_off(&self, vm: VmId) -> Result<()>;

    /// Halts the vCPUs. Succeeds where they are halted.
    async fn pause(&self, vm: VmId) -> Result<()>;

    /// Lets the vCPUs run on. Succeeds where they run.
    async fn resume(&self, vm: VmId) -> Result<()>;

    /// Looks at one domain; `None` where libvirt has none with this UUID, or it is not ours.
    async fn get(&self, vm: VmId) -> Result<Option<DomainSnapshot>>;

    /// Looks at all domains that carry our metadata. Others are never returned nor touched.
    async fn list(&self) -> Result<Vec<DomainSnapshot>>;

    /// Counters of all active domains of ours, by one bulk call.
    async fn statistics(&self) -> Result<Vec<DomainStatistics>>;
}
