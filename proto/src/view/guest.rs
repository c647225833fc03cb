//! What happens inside a VM.
//!
//! Numbers and texts of a guest are its own claims. Numbers that JSON cannot write (NaN, infinity)
//! are 0, or `null` where a value may be absent.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{each, filled, optional_seconds, optional_time, time_of};
use crate::agent::v1 as message;

fn finite(number: f64) -> f64 {
    if number.is_finite() { number } else { 0.0 }
}

/// One layer between the caller and the guest's agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestLayer {
    /// `domain`, `access`, `channel`, `agent`, `version` or `telemetry`.
    pub name: String,
    /// Whether it is as it must be.
    pub ok: bool,
    /// What is there, or what is wrong.
    pub detail: String,
    /// What to do where it is not ok.
    pub hint: Option<String>,
}

impl From<message::GuestLayer> for GuestLayer {
    fn from(layer: message::GuestLayer) -> Self {
        Self {
            name: layer.name,
            ok: layer.ok,
            detail: layer.detail,
            hint: filled(layer.hint),
        }
    }
}

/// How the way into a VM stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GuestStatus {
    /// The VM's UUID.
    #[schema(format = Uuid)]
    pub vm_id: String,
    /// The VM's name.
    pub vm_name: String,
    /// All that a call needs is there.
    pub ready: bool,
    /// From the outside in.
    pub layers: Vec<GuestLayer>,
    /// The release of the guest's agent; null before its first hello.
    pub agent_version: Option<String>,
    /// The version of the protocol that is spoken; null before its first hello.
    pub protocol_version: Option<u32>,
    /// What the guest can and may.
    pub capabilities: Vec<String>,
    /// As the guest reports it.
    pub operating_system: Option<String>,
    /// As the guest reports it.
    pub kernel: Option<String>,
    /// As the guest reports it.
    pub hostname: Option<String>,
    /// Since when its agent is connected, RFC 3339.
    #[schema(format = DateTime)]
    pub connected_at: Option<String>,
    /// How long ago it was last heard.
    pub last_seen_age_seconds: Option<f64>,
    /// A newer program is at hand than the guest runs.
    pub outdated: bool,
}

impl From<message::GuestStatus> for GuestStatus {
    fn from(status: message::GuestStatus) -> Self {
        Self {
            vm_id: status.vm_id,
            vm_name: status.vm_name,
            ready: status.ready,
            layers: each(status.layers),
            agent_version: filled(status.agent_version),
            protocol_version: Some(status.protocol_version).filter(|version| *version > 0),
            capabilities: status.capabilities,
            operating_system: filled(status.operating_system),
            kernel: filled(status.kernel),
            hostname: filled(status.hostname),
            connected_at: optional_time(status.connected_at.as_ref()),
            last_seen_age_seconds: optional_seconds(status.last_seen_age.as_ref()),
            outdated: status.outdated,
        }
    }
}

/// The answer to a ping.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GuestPing {
    /// How long a frame took to the guest and back; rounded to microseconds.
    pub round_trip_seconds: f64,
    /// The release of the guest's agent.
    pub agent_version: Option<String>,
}

impl From<message::PingGuestResponse> for GuestPing {
    #[expect(
        clippy::cast_precision_loss,
        reason = "a double holds every number of seconds below 285 million years exactly"
    )]
    fn from(answer: message::PingGuestResponse) -> Self {
        Self {
            round_trip_seconds: answer.round_trip.map_or(0.0, |took| {
                took.seconds as f64 + f64::from(took.nanos / 1000) / 1_000_000.0
            }),
            agent_version: filled(answer.agent_version),
        }
    }
}

/// What became of an update of the guest's agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestUpdate {
    /// The agent's release before.
    pub from_version: String,
    /// The agent's release now.
    pub to_version: String,
    /// Whether it was replaced: not where it was the host's program already.
    pub replaced: bool,
}

impl From<message::UpdateGuestResponse> for GuestUpdate {
    fn from(answer: message::UpdateGuestResponse) -> Self {
        Self {
            from_version: answer.from_version,
            to_version: answer.to_version,
            replaced: answer.replaced,
        }
    }
}

/// How the guest access of a VM stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestAccess {
    /// UUID.
    #[schema(format = Uuid)]
    pub vm_id: String,
    /// Whether its guest may be entered.
    pub access: bool,
    /// Sessions that were cut.
    pub sessions_cut: u32,
}

impl From<message::GuestAccess> for GuestAccess {
    fn from(answer: message::GuestAccess) -> Self {
        Self {
            vm_id: answer.vm_id,
            access: answer.access,
            sessions_cut: answer.sessions_cut,
        }
    }
}

/// A file, directory or link in a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestFile {
    /// Its name within its directory; null in the answer to a stat.
    pub name: Option<String>,
    /// `file`, `directory`, `symlink` or `other`.
    pub kind: String,
    /// Its size.
    pub size_bytes: u64,
    /// Permission bits, as a number.
    pub mode: u32,
    /// The number of its owner.
    pub uid: u32,
    /// The number of its group.
    pub gid: u32,
    /// When its content was changed, RFC 3339.
    #[schema(format = DateTime)]
    pub modified_at: Option<String>,
    /// Where a link leads.
    pub symlink_target: Option<String>,
}

impl From<message::GuestFile> for GuestFile {
    fn from(file: message::GuestFile) -> Self {
        Self {
            kind: match file.kind() {
                message::GuestFileKind::File => "file",
                message::GuestFileKind::Directory => "directory",
                message::GuestFileKind::Symlink => "symlink",
                message::GuestFileKind::Unspecified | message::GuestFileKind::Other => "other",
            }
            .to_owned(),
            name: filled(file.name),
            size_bytes: file.size_bytes,
            mode: file.mode,
            uid: file.uid,
            gid: file.gid,
            modified_at: optional_time(file.modified_at.as_ref()),
            symlink_target: filled(file.symlink_target),
        }
    }
}

/// One point of a VM's history.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GuestSample {
    /// When, RFC 3339.
    #[schema(format = DateTime)]
    pub at: String,
    /// `guest` or, while the guest is silent, `host`.
    pub source: String,
    /// 0 to 100 of all CPUs together.
    pub cpu_percent: Option<f64>,
    /// Memory in use.
    pub memory_used_bytes: Option<u64>,
    /// Memory in all.
    pub memory_total_bytes: Option<u64>,
    /// Read from disks.
    pub disk_read_bytes_per_second: f64,
    /// Written to disks.
    pub disk_write_bytes_per_second: f64,
    /// Received from networks.
    pub network_receive_bytes_per_second: f64,
    /// Sent to networks.
    pub network_transmit_bytes_per_second: f64,
}

impl From<message::GuestSample> for GuestSample {
    fn from(sample: message::GuestSample) -> Self {
        Self {
            at: time_of(sample.at.as_ref()),
            source: sample.source,
            cpu_percent: sample.cpu_percent.filter(|percent| percent.is_finite()),
            memory_used_bytes: sample.memory_used_bytes,
            memory_total_bytes: sample.memory_total_bytes,
            disk_read_bytes_per_second: finite(sample.disk_read_bytes_per_second),
            disk_write_bytes_per_second: finite(sample.disk_write_bytes_per_second),
            network_receive_bytes_per_second: finite(sample.network_receive_bytes_per_second),
            network_transmit_bytes_per_second: finite(sample.network_transmit_bytes_per_second),
        }
    }
}

/// What a VM did in the past.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GuestHistory {
    /// The VM's UUID.
    #[schema(format = Uuid)]
    pub vm_id: String,
    /// The VM's name.
    pub vm_name: String,
    /// Oldest first.
    pub samples: Vec<GuestSample>,
}

impl From<message::GuestHistory> for GuestHistory {
    fn from(history: message::GuestHistory) -> Self {
        Self {
            vm_id: history.vm_id,
            vm_name: history.vm_name,
            samples: each(history.samples),
        }
    }
}

/// A file system of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestFilesystem {
    /// Where it is mounted.
    pub mount_point: String,
    /// Such as `ext4`.
    pub kind: String,
    /// Its size.
    pub total_bytes: u64,
    /// What is free for ordinary users.
    pub available_bytes: u64,
}

impl From<message::GuestFilesystem> for GuestFilesystem {
    fn from(filesystem: message::GuestFilesystem) -> Self {
        Self {
            mount_point: filesystem.mount_point,
            kind: filesystem.kind,
            total_bytes: filesystem.total_bytes,
            available_bytes: filesystem.available_bytes,
        }
    }
}

/// A network interface as the guest sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestInterface {
    /// Such as `eth0`.
    pub name: String,
    /// The MAC address.
    pub mac: String,
    /// IP addresses.
    pub addresses: Vec<String>,
    /// Received since the guest started.
    pub receive_bytes: u64,
    /// Sent since the guest started.
    pub transmit_bytes: u64,
}

impl From<message::GuestInterface> for GuestInterface {
    fn from(interface: message::GuestInterface) -> Self {
        Self {
            name: interface.name,
            mac: interface.mac,
            addresses: interface.addresses,
            receive_bytes: interface.receive_bytes,
            transmit_bytes: interface.transmit_bytes,
        }
    }
}

/// How far cloud-init is in a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestCloudInit {
    /// `absent`, `waiting`, `running`, `done`, `error` or `disabled`.
    pub status: String,
    /// `init-local`, `init`, `modules-config` or `modules-final`.
    pub stage: Option<String>,
    /// What went wrong.
    pub errors: Vec<String>,
}

impl From<message::GuestCloudInit> for GuestCloudInit {
    fn from(cloud_init: message::GuestCloudInit) -> Self {
        Self {
            status: cloud_init.status,
            stage: filled(cloud_init.stage),
            errors: cloud_init.errors,
        }
    }
}

/// The newest that is known of a running VM. From `cpus` on it is what the guest reports, zero,
/// empty or null while it is silent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GuestTelemetry {
    /// The VM's UUID.
    #[schema(format = Uuid)]
    pub vm_id: String,
    /// The VM's name.
    pub vm_name: String,
    /// The figures, and whose they are.
    pub sample: Option<GuestSample>,
    /// How old they are.
    pub age_seconds: Option<f64>,
    /// CPUs.
    pub cpus: u32,
    /// Swap in all.
    pub swap_total_bytes: u64,
    /// Swap in use.
    pub swap_used_bytes: u64,
    /// Load average of a minute.
    pub load_1: f64,
    /// Load average of five minutes.
    pub load_5: f64,
    /// Load average of fifteen minutes.
    pub load_15: f64,
    /// File systems.
    pub filesystems: Vec<GuestFilesystem>,
    /// Network interfaces.
    pub interfaces: Vec<GuestInterface>,
    /// How many processes run.
    pub processes: u32,
    /// Who is logged on.
    pub users: Vec<String>,
    /// How far cloud-init is.
    pub cloud_init: Option<GuestCloudInit>,
    /// The operating system.
    pub operating_system: Option<String>,
    /// The kernel.
    pub kernel: Option<String>,
    /// Since the guest's kernel started.
    pub uptime_seconds: f64,
    /// Memory of the guest's agent.
    pub agent_resident_bytes: u64,
}

impl From<message::GuestTelemetry> for GuestTelemetry {
    fn from(telemetry: message::GuestTelemetry) -> Self {
        Self {
            vm_id: telemetry.vm_id,
            vm_name: telemetry.vm_name,
            sample: telemetry.sample.map(Into::into),
            age_seconds: optional_seconds(telemetry.age.as_ref()),
            cpus: telemetry.cpus,
            swap_total_bytes: telemetry.swap_total_bytes,
            swap_used_bytes: telemetry.swap_used_bytes,
            load_1: finite(telemetry.load_1),
            load_5: finite(telemetry.load_5),
            load_15: finite(telemetry.load_15),
            filesystems: each(telemetry.filesystems),
            interfaces: each(telemetry.interfaces),
            processes: telemetry.processes,
            users: telemetry.users,
            cloud_init: telemetry.cloud_init.map(Into::into),
            operating_system: filled(telemetry.operating_system),
            kernel: filled(telemetry.kernel),
            uptime_seconds: finite(telemetry.uptime_seconds),
            agent_resident_bytes: telemetry.agent_resident_bytes,
        }
    }
}

/// What freezing or thawing did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestFreeze {
    /// How many file systems were frozen or thawed.
    pub count: u32,
    /// Hooks that failed.
    pub warnings: Vec<String>,
}

impl From<message::FreezeGuestResponse> for GuestFreeze {
    fn from(answer: message::FreezeGuestResponse) -> Self {
        Self {
            count: answer.count,
            warnings: answer.warnings,
        }
    }
}

/// Whether the ways into all guests are shut.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Lockdown {
    /// Whether they are.
    pub active: bool,
    /// Why.
    pub reason: Option<String>,
    /// By whom.
    pub set_by: Option<String>,
    /// Since when, RFC 3339.
    #[schema(format = DateTime)]
    pub since: Option<String>,
    /// Sessions that this call has cut.
    pub sessions_cut: u32,
}

impl From<message::Lockdown> for Lockdown {
    fn from(lockdown: message::Lockdown) -> Self {
        Self {
            active: lockdown.active,
            reason: filled(lockdown.reason),
            set_by: filled(lockdown.set_by),
            since: optional_time(lockdown.since.as_ref()),
            sessions_cut: lockdown.sessions_cut,
        }
    }
}

/// A line of the audit log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AuditEntry {
    /// Its number.
    pub sequence: u64,
    /// When, RFC 3339.
    #[schema(format = DateTime)]
    pub at: String,
    /// Who.
    pub principal: String,
    /// The VM's UUID; null for what concerns no VM.
    #[schema(format = Uuid)]
    pub vm_id: Option<String>,
    /// The VM's name.
    pub vm_name: Option<String>,
    /// Such as `exec`, `shell`, `file_read`.
    pub action: String,
    /// What was asked, without secrets.
    pub detail: Option<String>,
    /// Such as `begun`, `ok`, `denied`, `failed`.
    pub outcome: String,
    /// Bytes into the guest.
    pub bytes_in: u64,
    /// Bytes out of the guest.
    pub bytes_out: u64,
    /// How long it took.
    pub duration_seconds: Option<f64>,
    /// The id of the request, as logs and traces have it.
    pub request_id: Option<String>,
    /// SHA-256 of this entry and all before it, hexadecimal.
    pub hash: String,
}

impl From<message::AuditEntry> for AuditEntry {
    fn from(entry: message::AuditEntry) -> Self {
        Self {
            sequence: entry.sequence,
            at: time_of(entry.at.as_ref()),
            principal: entry.principal,
            vm_id: filled(entry.vm_id),
            vm_name: filled(entry.vm_name),
            action: entry.action,
            detail: filled(entry.detail),
            outcome: entry.outcome,
            bytes_in: entry.bytes_in,
            bytes_out: entry.bytes_out,
            duration_seconds: optional_seconds(entry.duration.as_ref()),
            request_id: filled(entry.request_id),
            hash: entry.hash,
        }
    }
}

/// Whether the audit log is whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditVerdict {
    /// Whether every entry fits the one before.
    pub intact: bool,
    /// How many entries there are.
    pub entries: u64,
    /// The first entry that does not fit; null where the chain is whole.
    pub broken_at: Option<u64>,
    /// What does not fit.
    pub detail: Option<String>,
    /// The hash of the newest entry: kept elsewhere, it shows a log that was replaced as a whole.
    pub head: Option<String>,
}

impl From<message::VerifyAuditResponse> for AuditVerdict {
    fn from(verdict: message::VerifyAuditResponse) -> Self {
        Self {
            broken_at: (!verdict.intact).then_some(verdict.broken_at),
            intact: verdict.intact,
            entries: verdict.entries,
            detail: filled(verdict.detail),
            head: filled(verdict.head),
        }
    }
}
