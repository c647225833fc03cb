//! What a host last said of itself. Kept durably where it changed, so that a restart of Core knows
//! the VMs of hosts that are away.

use ghost_domain::{ByteSize, Demand, HostResources, Timestamp};

use super::ToldVms;

/// How a host is.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct HostHealth {
    /// `running`, `recovering`, `draining`.
    pub agent_state: String,
    /// Whether libvirt answers.
    pub hypervisor_connected: bool,
    /// Whether its store takes writes.
    pub store_writable: bool,
    /// What does not work, bounded and escaped where it is shown.
    pub warnings: Vec<String>,
    /// All ways into guests are closed.
    pub lockdown: bool,
}

/// The VMs and the room of one host.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Inventory {
    /// VMs.
    pub vms: ToldVms,
    /// What the host has.
    pub total: HostResources,
    /// What VMs may have together.
    pub allocatable: Demand,
    /// What they hold.
    pub committed: Demand,
    /// Memory that could be given out without swapping.
    pub memory_available: ByteSize,
    /// Load over one minute.
    pub load_one_minute: f64,
    /// How it is.
    pub health: HostHealth,
    /// When it said so.
    pub at: Timestamp,
}

impl Inventory {
    /// What is left for VMs.
    pub fn free(&self) -> Demand {
        Demand {
            cpus: self.allocatable.cpus.saturating_sub(self.committed.cpus),
            memory: self
                .allocatable
                .memory
                .saturating_sub(self.committed.memory),
            disk: self.allocatable.disk.saturating_sub(self.committed.disk),
        }
    }
}
