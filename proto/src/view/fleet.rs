//! A fleet, as Ghost Core tells of it: hosts, their VMs, commands, tenants, people and keys.
//!
//! The names begin with `Fleet` where the host agent has something of the same name, so that one
//! document can speak of both.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    DesiredState, Resources, VmState, each, filled, optional_seconds, optional_time, time_of,
};
use crate::core::v1 as message;

/// Core itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FleetStatus {
    /// Which Core this is, for good.
    pub core_id: String,
    /// The replica that answered.
    pub replica: String,
    /// Its version.
    pub version: String,
    /// How long it has been up.
    pub uptime_seconds: Option<f64>,
    /// Rises whenever the records may have gone back.
    pub epoch: u64,
    /// The records.
    pub store: FleetStore,
    /// The trust domain of all SPIFFE ids.
    pub trust_domain: String,
    /// SHA-256 of the CA certificate, hexadecimal.
    pub authority_fingerprint: String,
    /// Number of hosts by state.
    pub hosts: BTreeMap<String, u32>,
    /// VMs on all hosts.
    pub vms: u32,
    /// Commands that their hosts have not taken.
    pub queued_commands: u32,
    /// The replicas that run.
    pub replicas: Vec<FleetReplica>,
    /// What does not work now, one line each with its remedy.
    pub warnings: Vec<String>,
}

/// Core's records.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FleetStore {
    /// `sled`, `redb` or `etcd`.
    pub engine: String,
    /// Whether it takes writes.
    pub writable: bool,
    /// What is wrong with it.
    pub problem: Option<String>,
}

/// A replica of Core.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FleetReplica {
    /// Its name.
    pub name: String,
    /// Where other replicas and hosts reach it, `host:port`.
    pub address: String,
    /// How many hosts' links it has.
    pub links: u32,
}

impl From<message::Replica> for FleetReplica {
    fn from(replica: message::Replica) -> Self {
        Self {
            name: replica.name,
            address: replica.address,
            links: replica.links,
        }
    }
}

impl From<message::CoreStatus> for FleetStatus {
    fn from(status: message::CoreStatus) -> Self {
        Self {
            core_id: status.core_id,
            replica: status.replica,
            version: status.version,
            uptime_seconds: optional_seconds(status.uptime.as_ref()),
            epoch: status.epoch,
            store: FleetStore {
                engine: status.store,
                writable: status.store_writable,
                problem: filled(status.store_problem),
            },
            trust_domain: status.trust_domain,
            authority_fingerprint: status.authority_fingerprint,
            hosts: status.hosts,
            vms: status.vms,
            queued_commands: status.queued_commands,
            replicas: each(status.replicas),
            warnings: status.warnings,
        }
    }
}

/// What seldom changes of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FleetFacts {
    /// The machine's own name.
    pub hostname: Option<String>,
    /// The operating system, for people.
    pub operating_system: Option<String>,
    /// The kernel's release.
    pub kernel: Option<String>,
    /// The CPU's model.
    pub cpu_model: Option<String>,
    /// `kvm` or `tcg`.
    pub accelerator: Option<String>,
    /// QEMU's version.
    pub hypervisor_version: Option<String>,
    /// libvirt's version.
    pub libvirt_version: Option<String>,
}

impl From<message::HostFacts> for FleetFacts {
    fn from(facts: message::HostFacts) -> Self {
        Self {
            hostname: filled(facts.hostname),
            operating_system: filled(facts.operating_system),
            kernel: filled(facts.kernel),
            cpu_model: filled(facts.cpu_model),
            accelerator: filled(facts.accelerator),
            hypervisor_version: filled(facts.hypervisor_version),
            libvirt_version: filled(facts.libvirt_version),
        }
    }
}

/// The room of a host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FleetCapacity {
    /// What the host has.
    pub total: Resources,
    /// What VMs may have together.
    pub allocatable: Resources,
    /// What they hold.
    pub committed: Resources,
    /// What new VMs can get: allocatable less committed.
    pub free: Resources,
    /// Memory that could be used now without swapping.
    pub memory_available_bytes: u64,
    /// Free space of the file system with the VMs.
    pub disk_free_bytes: u64,
    /// Load average of the last minute.
    pub load_one_minute: f64,
}

impl From<message::HostCapacity> for FleetCapacity {
    fn from(capacity: message::HostCapacity) -> Self {
        let allocatable: Resources = capacity.allocatable.unwrap_or_default().into();
        let committed: Resources = capacity.committed.unwrap_or_default().into();
        Self {
            total: capacity.total.unwrap_or_default().into(),
            allocatable,
            committed,
            free: allocatable.less(committed),
            memory_available_bytes: capacity.memory_available_bytes,
            disk_free_bytes: capacity.disk_free_bytes,
            load_one_minute: capacity.load_one_minute,
        }
    }
}

/// How a host is, in its own words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FleetHealth {
    /// `running`, `recovering` or `draining`.
    pub agent_state: Option<String>,
    /// Whether libvirt answers.
    pub hypervisor_connected: bool,
    /// Whether its records take writes.
    pub store_writable: bool,
    /// What does not work, as the host sent it: escape before showing.
    pub warnings: Vec<String>,
    /// All ways into guests are closed.
    pub lockdown: bool,
}

impl From<message::HostHealth> for FleetHealth {
    fn from(health: message::HostHealth) -> Self {
        Self {
            agent_state: filled(health.agent_state),
            hypervisor_connected: health.hypervisor_connected,
            store_writable: health.store_writable,
            warnings: health.warnings,
            lockdown: health.lockdown,
        }
    }
}

/// A host's link to Core.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FleetLink {
    /// `link`, `piko` or `direct`; null while there is none.
    pub carrier: Option<String>,
    /// The replica that holds it.
    pub replica: Option<String>,
    /// Round trip of the last ping.
    pub round_trip_seconds: Option<f64>,
    /// Links since the agent started.
    pub connects: u64,
    /// Why the one before this ended.
    pub last_loss: Option<String>,
    /// How calls reach the host: `link` or `direct`; null while they do not.
    pub way: Option<String>,
    /// The address of a direct way in use.
    pub direct_address: Option<String>,
    /// Why there is no direct way.
    pub direct_problem: Option<String>,
    /// Where the host says that its listener can be dialled.
    pub direct_addresses: Vec<DirectAddress>,
}

/// An address by which Core could dial a host itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DirectAddress {
    /// Where it comes from: `tailscale`, `wireguard` or `lan`.
    pub provider: String,
    /// `ip:port`.
    pub address: String,
}

impl From<message::DirectAddress> for DirectAddress {
    fn from(one: message::DirectAddress) -> Self {
        Self {
            provider: one.provider,
            address: one.address,
        }
    }
}

/// A host of the fleet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FleetHost {
    /// UUID.
    #[schema(format = Uuid)]
    pub id: String,
    /// Its name, unique in its tenant.
    pub name: String,
    /// Its tenant.
    pub tenant: String,
    /// `online`, `degraded`, `offline`, `locked` (its identity was cloned) or `never_seen`.
    pub state: String,
    /// What is wrong, such as `link: no answer for 12 s`.
    pub state_reason: Option<String>,
    /// Since when, RFC 3339.
    #[schema(format = DateTime)]
    pub state_since: Option<String>,
    /// How old the newest word of the host is.
    pub last_heard_age_seconds: Option<f64>,
    /// When it was last heard, RFC 3339.
    #[schema(format = DateTime)]
    pub last_heard_at: Option<String>,
    /// For placement and lists.
    pub labels: BTreeMap<String, String>,
    /// Nothing new is placed on it.
    pub cordoned: bool,
    /// Why.
    pub cordon_reason: Option<String>,
    /// The version of its agent.
    pub agent_version: Option<String>,
    /// What seldom changes of it.
    pub facts: Option<FleetFacts>,
    /// Its room, as of its last heartbeat.
    pub capacity: Option<FleetCapacity>,
    /// How it is, as of its last heartbeat.
    pub health: Option<FleetHealth>,
    /// Its link.
    pub link: FleetLink,
    /// What its owner lets Core do: `read`, `operate` or `operate_and_enter`.
    pub permissions: String,
    /// Number of VMs by state.
    pub vms: BTreeMap<String, u32>,
    /// Commands that it has not taken.
    pub queued_commands: u32,
    /// When it joined, RFC 3339.
    #[schema(format = DateTime)]
    pub enrolled_at: String,
    /// When its certificate ends, RFC 3339.
    #[schema(format = DateTime)]
    pub certificate_expires_at: Option<String>,
    /// Rises with each certificate.
    pub certificate_generation: u64,
}

impl From<message::Host> for FleetHost {
    fn from(host: message::Host) -> Self {
        let facts = host.link.unwrap_or_default();
        Self {
            id: host.id,
            name: host.name,
            tenant: host.tenant,
            state: host.state,
            state_reason: filled(host.state_reason),
            state_since: optional_time(host.state_since.as_ref()),
            last_heard_age_seconds: optional_seconds(host.last_heard_age.as_ref()),
            last_heard_at: optional_time(host.last_heard_at.as_ref()),
            labels: host.labels,
            cordoned: host.cordoned,
            cordon_reason: filled(host.cordon_reason),
            agent_version: filled(host.agent_version),
            facts: host.facts.map(FleetFacts::from),
            capacity: host.capacity.map(FleetCapacity::from),
            health: host.health.map(FleetHealth::from),
            link: FleetLink {
                carrier: filled(host.carrier),
                replica: filled(host.replica),
                round_trip_seconds: Some(facts.round_trip_seconds).filter(|taken| *taken > 0.0),
                connects: facts.connects,
                last_loss: filled(facts.last_loss),
                way: filled(host.way),
                direct_address: filled(host.direct_address),
                direct_problem: filled(host.direct_problem),
                direct_addresses: each(host.direct_addresses),
            },
            permissions: host.permissions,
            vms: host.vms,
            queued_commands: host.queued_commands,
            enrolled_at: time_of(host.enrolled_at.as_ref()),
            certificate_expires_at: optional_time(host.certificate_expires_at.as_ref()),
            certificate_generation: host.certificate_generation,
        }
    }
}

/// A VM of some host, from Core's memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FleetVm {
    /// UUID.
    #[schema(format = Uuid)]
    pub id: String,
    /// Its name on its host.
    pub name: String,
    /// The name of its host.
    pub host: String,
    /// The host's UUID.
    #[schema(format = Uuid)]
    pub host_id: String,
    /// The host's tenant.
    pub tenant: String,
    /// The host's state: while it is not online, all below is as old as `age_seconds` says.
    pub host_state: String,
    /// How old the host's word is.
    pub age_seconds: Option<f64>,
    /// The VM's state, as its host last said.
    pub state: VmState,
    /// Why.
    pub state_reason: Option<String>,
    /// What its owner wants.
    pub desired_state: Option<DesiredState>,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory.
    pub memory_bytes: u64,
    /// Virtual size of its disks.
    pub disk_bytes: u64,
    /// The image it was made of.
    pub image: Option<String>,
    /// Its addresses.
    pub addresses: Vec<String>,
    /// Its tags.
    pub tags: BTreeMap<String, String>,
    /// The record's generation.
    pub generation: u64,
    /// When it was created, RFC 3339.
    #[schema(format = DateTime)]
    pub created_at: String,
    /// Who created it through Core, `<tenant>/<user>`; null for the host's owner.
    pub owner: Option<String>,
}

impl From<message::FleetVm> for FleetVm {
    fn from(listed: message::FleetVm) -> Self {
        let vm = listed.vm.unwrap_or_default();
        Self {
            state: vm.state().into(),
            desired_state: DesiredState::from_message(vm.desired_state()),
            id: vm.id,
            name: vm.name,
            host: listed.host,
            host_id: listed.host_id,
            tenant: listed.tenant,
            host_state: listed.host_state,
            age_seconds: optional_seconds(listed.age.as_ref()),
            state_reason: filled(vm.state_reason),
            vcpus: vm.vcpus,
            memory_bytes: vm.memory_bytes,
            disk_bytes: vm.disk_bytes,
            image: filled(vm.image),
            addresses: vm.addresses,
            tags: vm.tags,
            generation: vm.generation,
            created_at: time_of(vm.created_at.as_ref()),
            owner: filled(vm.owner),
        }
    }
}

/// A host that was passed over, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RejectedHost {
    /// Its name.
    pub host: String,
    /// Why not.
    pub reason: String,
}

impl From<message::RejectedHost> for RejectedHost {
    fn from(rejected: message::RejectedHost) -> Self {
        Self {
            host: rejected.host,
            reason: rejected.reason,
        }
    }
}

/// Where a VM goes, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Placement {
    /// The name of the host.
    pub host: String,
    /// Its UUID.
    #[schema(format = Uuid)]
    pub host_id: String,
    /// Why this one, for people.
    pub reason: String,
    /// Why not the others.
    pub rejected: Vec<RejectedHost>,
}

impl From<message::Placement> for Placement {
    fn from(placement: message::Placement) -> Self {
        Self {
            host: placement.host,
            host_id: placement.host_id,
            reason: placement.reason,
            rejected: each(placement.rejected),
        }
    }
}

/// Where a command stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CommandStatus {
    /// In Core's queue: its host has not taken it.
    Queued,
    /// Its operation runs on the host.
    Accepted,
    /// Its operation succeeded.
    Succeeded,
    /// Its operation failed.
    Failed,
    /// It took no effect and never will.
    Refused,
    /// Its deadline passed before it was begun.
    Expired,
    /// Taken back before the host took it.
    Cancelled,
}

impl CommandStatus {
    /// The status in lower case.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Accepted => "accepted",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Refused => "refused",
            Self::Expired => "expired",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether it will not change any more.
    pub const fn is_finished(self) -> bool {
        !matches!(self, Self::Queued | Self::Accepted)
    }
}

impl std::fmt::Display for CommandStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

impl From<message::CommandStatus> for CommandStatus {
    /// A status that this version does not know counts as taken: nobody may take it for an end.
    fn from(status: message::CommandStatus) -> Self {
        match status {
            message::CommandStatus::Queued => Self::Queued,
            message::CommandStatus::Unspecified | message::CommandStatus::Accepted => {
                Self::Accepted
            }
            message::CommandStatus::Succeeded => Self::Succeeded,
            message::CommandStatus::Failed => Self::Failed,
            message::CommandStatus::Refused => Self::Refused,
            message::CommandStatus::Expired => Self::Expired,
            message::CommandStatus::Cancelled => Self::Cancelled,
        }
    }
}

/// A command for a host, which may be away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FleetCommand {
    /// UUID.
    #[schema(format = Uuid)]
    pub id: String,
    /// The name of the host.
    pub host: String,
    /// The host's UUID.
    #[schema(format = Uuid)]
    pub host_id: String,
    /// The host's tenant.
    pub tenant: String,
    /// What it does, such as `create_vm`.
    pub kind: String,
    /// The VM that it concerns, as it was asked for.
    pub subject: String,
    /// Where it stands.
    pub status: CommandStatus,
    /// Its place in the host's queue.
    pub generation: u64,
    /// The caller's idempotency key.
    pub request_id: Option<String>,
    /// Who asked.
    pub issued_by: String,
    /// When, RFC 3339.
    #[schema(format = DateTime)]
    pub issued_at: String,
    /// It is not begun after this, RFC 3339.
    #[schema(format = DateTime)]
    pub deadline: Option<String>,
    /// When it ended, RFC 3339; null while it has not.
    #[schema(format = DateTime)]
    pub finished_at: Option<String>,
    /// Its operation on the host.
    #[schema(format = Uuid)]
    pub operation_id: Option<String>,
    /// The stable code, where it was refused or failed.
    pub code: Option<String>,
    /// What the host said, for people: escape before showing.
    pub message: Option<String>,
}

impl From<message::QueuedCommand> for FleetCommand {
    fn from(command: message::QueuedCommand) -> Self {
        Self {
            status: command.status().into(),
            id: command.id,
            host: command.host,
            host_id: command.host_id,
            tenant: command.tenant,
            kind: command.kind,
            subject: command.subject,
            generation: command.generation,
            request_id: filled(command.request_id),
            issued_by: command.issued_by,
            issued_at: time_of(command.issued_at.as_ref()),
            deadline: optional_time(command.deadline.as_ref()),
            finished_at: optional_time(command.finished_at.as_ref()),
            operation_id: filled(command.operation_id),
            code: filled(command.code),
            message: filled(command.message),
        }
    }
}

/// A single-use token, for a host or a person. It is shown this once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FleetToken {
    /// The one string with everything in it.
    pub token: String,
    /// When it ends, RFC 3339.
    #[schema(format = DateTime)]
    pub expires_at: Option<String>,
    /// The tenant; null for a person of no tenant.
    pub tenant: Option<String>,
    /// The role that a person will have; null for a host.
    pub role: Option<String>,
    /// The command that uses it.
    pub hint: Option<String>,
}

impl From<message::FleetToken> for FleetToken {
    fn from(token: message::FleetToken) -> Self {
        Self {
            token: token.token,
            expires_at: optional_time(token.expires_at.as_ref()),
            tenant: filled(token.tenant),
            role: filled(token.role),
            hint: filled(token.hint),
        }
    }
}

/// The most that somebody may have; null: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FleetQuota {
    /// VMs.
    pub vms: Option<u32>,
    /// Virtual CPUs.
    pub cpus: Option<u32>,
    /// Memory.
    pub memory_bytes: Option<u64>,
    /// Disk: virtual size.
    pub disk_bytes: Option<u64>,
}

impl From<message::Quota> for FleetQuota {
    fn from(quota: message::Quota) -> Self {
        Self {
            vms: Some(quota.vms).filter(|most| *most > 0),
            cpus: Some(quota.cpus).filter(|most| *most > 0),
            memory_bytes: Some(quota.memory_bytes).filter(|most| *most > 0),
            disk_bytes: Some(quota.disk_bytes).filter(|most| *most > 0),
        }
    }
}

/// What somebody has, of what a quota bounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FleetUsage {
    /// VMs.
    pub vms: u32,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory.
    pub memory_bytes: u64,
    /// Disk: virtual size.
    pub disk_bytes: u64,
}

impl From<message::Quota> for FleetUsage {
    fn from(used: message::Quota) -> Self {
        Self {
            vms: used.vms,
            cpus: used.cpus,
            memory_bytes: used.memory_bytes,
            disk_bytes: used.disk_bytes,
        }
    }
}

/// Whom hosts and people belong to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Tenant {
    /// Its name, which is its identity.
    pub name: String,
    /// What it may have in all.
    pub quota: FleetQuota,
    /// What it has.
    pub used: FleetUsage,
    /// What each of its users may have who has no quota of its own.
    pub user_quota: FleetQuota,
    /// How many hosts it has.
    pub hosts: u32,
    /// When it was made, RFC 3339.
    #[schema(format = DateTime)]
    pub created_at: String,
}

impl From<message::Tenant> for Tenant {
    fn from(tenant: message::Tenant) -> Self {
        Self {
            name: tenant.name,
            quota: tenant.quota.unwrap_or_default().into(),
            used: tenant.used.unwrap_or_default().into(),
            user_quota: tenant.user_quota.unwrap_or_default().into(),
            hosts: tenant.hosts,
            created_at: time_of(tenant.created_at.as_ref()),
        }
    }
}

/// A person, or a program that acts like one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FleetUser {
    /// UUID.
    #[schema(format = Uuid)]
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its tenant; null: of no tenant.
    pub tenant: Option<String>,
    /// `viewer`, `operator` or `admin`.
    pub role: String,
    /// How it proves itself: `certificate` or `oidc`.
    pub source: String,
    /// Its own quota; null: its tenant's default for users.
    pub quota: Option<FleetQuota>,
    /// What it has.
    pub used: FleetUsage,
    /// When it was first seen, RFC 3339.
    #[schema(format = DateTime)]
    pub created_at: String,
    /// When its certificate ends, RFC 3339.
    #[schema(format = DateTime)]
    pub certificate_expires_at: Option<String>,
    /// When it was revoked, RFC 3339; null while it was not.
    #[schema(format = DateTime)]
    pub revoked_at: Option<String>,
}

impl From<message::User> for FleetUser {
    fn from(user: message::User) -> Self {
        Self {
            id: user.id,
            name: user.name,
            tenant: filled(user.tenant),
            role: user.role,
            source: user.source,
            quota: user.quota.map(FleetQuota::from),
            used: user.used.unwrap_or_default().into(),
            created_at: time_of(user.created_at.as_ref()),
            certificate_expires_at: optional_time(user.certificate_expires_at.as_ref()),
            revoked_at: optional_time(user.revoked_at.as_ref()),
        }
    }
}

/// A key for Core's gRPC and HTTP, without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FleetKey {
    /// UUID.
    #[schema(format = Uuid)]
    pub id: String,
    /// A name for people.
    pub name: String,
    /// The tenant that it is bound to; null: to none.
    pub tenant: Option<String>,
    /// `viewer`, `operator` or `admin`.
    pub role: String,
    /// The only hosts that it may touch; empty: all of the tenant.
    pub hosts: Vec<String>,
    /// When it was made, RFC 3339.
    #[schema(format = DateTime)]
    pub created_at: String,
    /// When it ends, RFC 3339.
    #[schema(format = DateTime)]
    pub expires_at: Option<String>,
    /// When it was revoked, RFC 3339; null while it was not.
    #[schema(format = DateTime)]
    pub revoked_at: Option<String>,
}

impl From<message::FleetKey> for FleetKey {
    fn from(key: message::FleetKey) -> Self {
        Self {
            id: key.id,
            name: key.name,
            tenant: filled(key.tenant),
            role: key.role,
            hosts: key.hosts,
            created_at: time_of(key.created_at.as_ref()),
            expires_at: optional_time(key.expires_at.as_ref()),
            revoked_at: optional_time(key.revoked_at.as_ref()),
        }
    }
}

/// A new key with its secret, which is shown this once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CreatedFleetKey {
    /// The key.
    pub key: FleetKey,
    /// What goes into `Authorization: Bearer`.
    pub secret: String,
}

impl From<message::CreatedFleetKey> for CreatedFleetKey {
    fn from(created: message::CreatedFleetKey) -> Self {
        Self {
            key: created.key.unwrap_or_default().into(),
            secret: created.secret,
        }
    }
}

/// Who did what in the fleet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FleetAuditEntry {
    /// The replica in whose log it stands: whom the caller asked.
    pub replica: String,
    /// Its number in that log; 0 where the line stands for a log that could not be read.
    pub sequence: u64,
    /// When, RFC 3339.
    #[schema(format = DateTime)]
    pub at: String,
    /// Who, `<tenant>/<name>`.
    pub principal: String,
    /// The caller's tenant; null: of no tenant.
    pub tenant: Option<String>,
    /// How it was proved: `socket`, `certificate`, `key` or `oidc`.
    pub source: String,
    /// The RPC, or the kind of command.
    pub action: String,
    /// The host concerned.
    pub host: Option<String>,
    /// The VM, user, key or tenant concerned.
    pub subject: Option<String>,
    /// `ok`, or the stable code.
    pub outcome: String,
    /// The request, as logs and traces have it.
    pub request_id: Option<String>,
    /// What was asked, without secrets.
    pub detail: Option<String>,
}

impl From<message::FleetAuditEntry> for FleetAuditEntry {
    fn from(entry: message::FleetAuditEntry) -> Self {
        Self {
            replica: entry.replica,
            sequence: entry.sequence,
            at: time_of(entry.at.as_ref()),
            principal: entry.principal,
            tenant: filled(entry.tenant),
            source: entry.source,
            action: entry.action,
            host: filled(entry.host),
            subject: filled(entry.subject),
            outcome: entry.outcome,
            request_id: filled(entry.request_id),
            detail: filled(entry.detail),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::agent::v1 as agent;

    fn json_of(view: &impl Serialize) -> Value {
        serde_json::to_value(view).unwrap()
    }

    #[test]
    fn an_empty_host_has_every_key() {
        let view = FleetHost::from(message::Host::default());
        let written = json_of(&view);
        assert_eq!(
            written,
            json!({
                "id": "", "name": "", "tenant": "", "state": "", "state_reason": null,
                "state_since": null, "last_heard_age_seconds": null, "last_heard_at": null,
                "labels": {}, "cordoned": false, "cordon_reason": null, "agent_version": null,
                "facts": null, "capacity": null, "health": null,
                "link": {"carrier": null, "replica": null, "round_trip_seconds": null,
                         "connects": 0, "last_loss": null, "way": null, "direct_address": null,
                         "direct_problem": null, "direct_addresses": []},
                "permissions": "", "vms": {}, "queued_commands": 0, "enrolled_at": "",
                "certificate_expires_at": null, "certificate_generation": 0,
            })
        );
        assert_eq!(serde_json::from_value::<FleetHost>(written).unwrap(), view);
    }

    #[test]
    fn what_is_free_is_computed_and_never_below_zero() {
        let share = |cpus, memory_bytes| {
            Some(agent::Resources {
                cpus,
                memory_bytes,
                disk_bytes: 5,
            })
        };
        let view = FleetCapacity::from(message::HostCapacity {
            total: share(8, 16),
            allocatable: share(4, 8),
            committed: share(1, 9),
            ..Default::default()
        });
        assert_eq!(view.free.cpus, 3);
        assert_eq!(view.free.memory_bytes, 0);
        assert_eq!(view.free.disk_bytes, 0);
    }

    #[test]
    fn a_quota_without_limits_is_null_and_usage_is_zero() {
        assert_eq!(
            json_of(&FleetQuota::from(message::Quota::default())),
            json!({"vms": null, "cpus": null, "memory_bytes": null, "disk_bytes": null})
        );
        assert_eq!(
            json_of(&FleetUsage::from(message::Quota::default())),
            json!({"vms": 0, "cpus": 0, "memory_bytes": 0, "disk_bytes": 0})
        );
    }

    #[test]
    fn every_status_of_a_command_has_the_name_of_the_contract() {
        for (status, name) in [
            (message::CommandStatus::Unspecified, "accepted"),
            (message::CommandStatus::Queued, "queued"),
            (message::CommandStatus::Accepted, "accepted"),
            (message::CommandStatus::Succeeded, "succeeded"),
            (message::CommandStatus::Failed, "failed"),
            (message::CommandStatus::Refused, "refused"),
            (message::CommandStatus::Expired, "expired"),
            (message::CommandStatus::Cancelled, "cancelled"),
        ] {
            let view = CommandStatus::from(status);
            assert_eq!(view.as_str(), name);
            assert_eq!(json_of(&view), json!(name));
        }
    }

    #[test]
    fn a_vm_stands_beside_its_host() {
        let view = FleetVm::from(message::FleetVm {
            host: "pc".into(),
            host_state: "offline".into(),
            age: Some(prost_types::Duration {
                seconds: 90,
                nanos: 0,
            }),
            vm: Some(message::VmSummary {
                name: "web".into(),
                state: agent::VmState::Running.into(),
                desired_state: agent::DesiredState::Stopped.into(),
                owner: "acme/alice".into(),
                ..Default::default()
            }),
            ..Default::default()
        });
        let written = json_of(&view);
        assert_eq!(written["age_seconds"], json!(90.0));
        assert_eq!(written["state"], json!("running"));
        assert_eq!(written["desired_state"], json!("stopped"));
        assert_eq!(written["owner"], json!("acme/alice"));
        assert_eq!(written["host_state"], json!("offline"));
        assert_eq!(written["image"], Value::Null);
    }
}
