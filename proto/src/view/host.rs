//! The host, its networks, and what happens on it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{each, filled, optional_seconds, optional_time, seconds, time_of};
use crate::agent::v1 as message;

/// CPUs, memory and disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Resources {
    /// CPUs.
    pub cpus: u32,
    /// Memory.
    pub memory_bytes: u64,
    /// Disk.
    pub disk_bytes: u64,
}

impl From<message::Resources> for Resources {
    fn from(resources: message::Resources) -> Self {
        Self {
            cpus: resources.cpus,
            memory_bytes: resources.memory_bytes,
            disk_bytes: resources.disk_bytes,
        }
    }
}

impl Resources {
    pub(super) fn less(self, other: Self) -> Self {
        Self {
            cpus: self.cpus.saturating_sub(other.cpus),
            memory_bytes: self.memory_bytes.saturating_sub(other.memory_bytes),
            disk_bytes: self.disk_bytes.saturating_sub(other.disk_bytes),
        }
    }
}

/// Whose the host's resources are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ResourceShares {
    /// What the host has.
    pub total: Resources,
    /// What stays the owner's.
    pub reserved: Resources,
    /// What VMs may have together.
    pub allocatable: Resources,
    /// What they hold.
    pub committed: Resources,
    /// What new VMs can get: allocatable less committed.
    pub free: Resources,
}

/// The agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AgentStatus {
    /// Its version.
    pub version: String,
    /// `running`, `recovering` or `draining`.
    pub state: String,
    /// How long it has been up.
    pub uptime_seconds: Option<f64>,
    /// Operations that have not finished.
    pub open_operations: u32,
    /// SHA-256 of its CA certificate, hexadecimal.
    pub authority_fingerprint: Option<String>,
}

/// The machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Machine {
    /// The host name.
    pub hostname: String,
    /// The operating system, for people.
    pub operating_system: String,
    /// The kernel's release.
    pub kernel: String,
    /// The CPU's model.
    pub cpu_model: String,
    /// Load average of the last minute.
    pub load_one_minute: f64,
    /// Memory that could be used now without swapping.
    pub memory_available_bytes: u64,
    /// Free space of the file system with the VMs.
    pub disk_free_bytes: u64,
}

/// libvirt and QEMU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Hypervisor {
    /// `connected` or `unreachable`.
    pub state: String,
    /// For how long it has been in that state.
    pub state_age_seconds: Option<f64>,
    /// Why it is unreachable.
    pub reason: Option<String>,
    /// The libvirt URI.
    pub uri: String,
    /// libvirt's version; null before the first connection.
    pub libvirt_version: Option<String>,
    /// QEMU's version; null before the first connection.
    pub version: Option<String>,
    /// `kvm` or `tcg`; null before the first connection.
    pub accelerator: Option<String>,
    /// Why that one.
    pub accelerator_reason: Option<String>,
}

/// The agent's own records.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Store {
    /// `sled` or `redb`.
    pub engine: String,
    /// Whether it takes writes.
    pub writable: bool,
    /// What is wrong with it.
    pub problem: Option<String>,
}

/// A host and its agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HostStatus {
    /// `agent.name` of the configuration.
    pub name: String,
    /// The agent.
    pub agent: AgentStatus,
    /// The machine.
    pub machine: Machine,
    /// libvirt and QEMU.
    pub hypervisor: Hypervisor,
    /// Whose the host's resources are.
    pub resources: ResourceShares,
    /// Number of VMs by state.
    pub vms: BTreeMap<String, u32>,
    /// The agent's own records.
    pub store: Store,
    /// What does not work now, one line each with its remedy.
    pub warnings: Vec<String>,
    /// How the link to Ghost Core fares; null where the agent is too old to know of one.
    pub core: Option<CoreLink>,
}

/// How the link to Ghost Core fares, as the host sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CoreLink {
    /// Whether this host has joined a fleet.
    pub enrolled: bool,
    /// Its id there.
    #[schema(format = Uuid)]
    pub host_id: Option<String>,
    /// Its name there.
    pub host_name: Option<String>,
    /// Its tenant.
    pub tenant: Option<String>,
    /// The trust domain of all SPIFFE ids.
    pub trust_domain: Option<String>,
    /// Where Core's replicas are, `host:port`.
    pub addresses: Vec<String>,
    /// SHA-256 of Core's CA certificate, hexadecimal.
    pub authority_fingerprint: Option<String>,
    /// When this host's certificate ends, RFC 3339.
    #[schema(format = DateTime)]
    pub certificate_expires_at: Option<String>,
    /// Rises by one with each certificate.
    pub certificate_generation: u64,
    /// What the owner lets Core do: `off`, `read`, `operate` or `operate_and_enter`.
    pub permissions: String,
    /// `off`, `connecting`, `up`, `silent`, `waiting` or `refused`.
    pub state: String,
    /// Why it is silent, waiting or refused.
    pub reason: Option<String>,
    /// Since when it is in that state, RFC 3339.
    #[schema(format = DateTime)]
    pub since: Option<String>,
    /// How a link that is up came to be: `link`, `piko` or `direct`.
    pub carrier: Option<String>,
    /// The replica of Core at the other end.
    pub replica: Option<String>,
    /// The round trip of the last ping.
    pub round_trip_seconds: Option<f64>,
    /// Until the next attempt.
    pub retry_in_seconds: Option<f64>,
    /// Why the last attempt or link ended.
    pub last_failure: Option<String>,
    /// Until when Core may delete any number of VMs, RFC 3339; null: not now.
    #[schema(format = DateTime)]
    pub deletes_allowed_until: Option<String>,
    /// Every way by which Core can reach this host, each with its own state.
    pub carriers: Vec<CoreCarrier>,
}

/// One way between a host and Ghost Core.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CoreCarrier {
    /// `link`, `piko` or `direct`.
    pub name: String,
    /// `off`, `connecting`, `up`, `silent`, `waiting` or `refused`.
    pub state: String,
    /// Why it is not up.
    pub reason: Option<String>,
    /// The other end, for people.
    pub peer: Option<String>,
}

impl From<message::CoreCarrier> for CoreCarrier {
    fn from(carrier: message::CoreCarrier) -> Self {
        Self {
            name: carrier.name,
            state: carrier.state,
            reason: filled(carrier.reason),
            peer: filled(carrier.peer),
        }
    }
}

impl From<message::CoreLink> for CoreLink {
    fn from(link: message::CoreLink) -> Self {
        Self {
            enrolled: link.enrolled,
            host_id: filled(link.host_id),
            host_name: filled(link.host_name),
            tenant: filled(link.tenant),
            trust_domain: filled(link.trust_domain),
            addresses: link.addresses,
            authority_fingerprint: filled(link.authority_fingerprint),
            certificate_expires_at: optional_time(link.certificate_expires_at.as_ref()),
            certificate_generation: link.certificate_generation,
            permissions: link.permissions,
            state: link.state,
            reason: filled(link.reason),
            since: optional_time(link.since.as_ref()),
            carrier: filled(link.carrier),
            replica: filled(link.replica),
            round_trip_seconds: link.round_trip.as_ref().map(seconds),
            retry_in_seconds: link.retry_in.as_ref().map(seconds),
            last_failure: filled(link.last_failure),
            deletes_allowed_until: optional_time(link.deletes_allowed_until.as_ref()),
            carriers: link.carriers.into_iter().map(CoreCarrier::from).collect(),
        }
    }
}

impl From<message::HostStatus> for HostStatus {
    fn from(status: message::HostStatus) -> Self {
        let allocatable: Resources = status.allocatable.unwrap_or_default().into();
        let committed: Resources = status.committed.unwrap_or_default().into();
        Self {
            name: status.name,
            agent: AgentStatus {
                version: status.agent_version,
                state: status.agent_state,
                uptime_seconds: optional_seconds(status.agent_uptime.as_ref()),
                open_operations: status.open_operations,
                authority_fingerprint: filled(status.authority_fingerprint),
            },
            machine: Machine {
                hostname: status.hostname,
                operating_system: status.operating_system,
                kernel: status.kernel,
                cpu_model: status.cpu_model,
                load_one_minute: status.load_one_minute,
                memory_available_bytes: status.memory_available_bytes,
                disk_free_bytes: status.disk_free_bytes,
            },
            hypervisor: Hypervisor {
                state: status.hypervisor_state,
                state_age_seconds: status.hypervisor_state_age.as_ref().map(seconds),
                reason: filled(status.hypervisor_reason),
                uri: status.hypervisor_uri,
                libvirt_version: filled(status.libvirt_version),
                version: filled(status.hypervisor_version),
                accelerator: filled(status.accelerator),
                accelerator_reason: filled(status.accelerator_reason),
            },
            resources: ResourceShares {
                total: status.total.unwrap_or_default().into(),
                reserved: status.reserved.unwrap_or_default().into(),
                allocatable,
                committed,
                free: allocatable.less(committed),
            },
            vms: status.vms.into_iter().collect(),
            store: Store {
                engine: status.store_engine,
                writable: status.store_writable,
                problem: filled(status.store_problem),
            },
            warnings: status.warnings,
            core: status.core.map(CoreLink::from),
        }
    }
}

/// A DHCP lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Lease {
    /// The MAC address.
    pub mac: String,
    /// The IP address.
    pub address: String,
    /// The host name as the guest sent it: escape before showing.
    pub hostname: Option<String>,
    /// When it ends, RFC 3339.
    #[schema(format = DateTime)]
    pub expires_at: Option<String>,
    /// The VM whose MAC it is, if it is one of ours.
    pub vm: Option<String>,
}

impl From<message::Lease> for Lease {
    fn from(lease: message::Lease) -> Self {
        Self {
            mac: lease.mac,
            address: lease.address,
            hostname: filled(lease.hostname),
            expires_at: optional_time(lease.expires_at.as_ref()),
            vm: filled(lease.vm),
        }
    }
}

/// A network that VMs can be attached to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Network {
    /// Its name in Ghost.
    pub name: String,
    /// Its name in libvirt.
    pub libvirt_name: String,
    /// `nat`, `bridge`, …
    pub mode: String,
    /// The bridge on the host.
    pub bridge: Option<String>,
    /// The subnet in CIDR notation.
    pub subnet: Option<String>,
    /// The first address that DHCP gives.
    pub dhcp_first: Option<String>,
    /// The last one.
    pub dhcp_last: Option<String>,
    /// Whether it is up.
    pub active: bool,
    /// Its DHCP leases.
    pub leases: Vec<Lease>,
}

impl From<message::Network> for Network {
    fn from(network: message::Network) -> Self {
        Self {
            name: network.name,
            libvirt_name: network.libvirt_name,
            mode: network.mode,
            bridge: filled(network.bridge),
            subnet: filled(network.subnet),
            dhcp_first: filled(network.dhcp_first),
            dhcp_last: filled(network.dhcp_last),
            active: network.active,
            leases: each(network.leases),
        }
    }
}

/// Something that happened on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Rises by one within a run of the agent; a gap means that events were missed.
    pub sequence: u64,
    /// When, RFC 3339.
    #[schema(format = DateTime)]
    pub at: String,
    /// What, such as `vm_state` or `hypervisor_lost`.
    pub kind: String,
    /// `info`, `warning` or `error`.
    pub severity: String,
    /// The VM's id, where one is concerned.
    #[schema(format = Uuid)]
    pub vm: Option<String>,
    /// The name of the VM, image or network.
    pub subject: Option<String>,
    /// One line for people.
    pub message: String,
    /// The operation that it belongs to.
    #[schema(format = Uuid)]
    pub operation_id: Option<String>,
    /// The name of the host, where Core tells of all of them.
    pub host: Option<String>,
    /// Its id.
    #[schema(format = Uuid)]
    pub host_id: Option<String>,
    /// Its tenant.
    pub tenant: Option<String>,
    /// So many events before this one were missed, where Core tells.
    pub missed: u64,
}

impl From<message::Event> for Event {
    fn from(event: message::Event) -> Self {
        Self {
            sequence: event.sequence,
            at: time_of(event.at.as_ref()),
            kind: event.kind,
            severity: event.severity,
            vm: filled(event.vm),
            subject: filled(event.subject),
            message: event.message,
            operation_id: filled(event.operation_id),
            host: filled(event.host),
            host_id: filled(event.host_id),
            tenant: filled(event.tenant),
            missed: event.missed,
        }
    }
}
