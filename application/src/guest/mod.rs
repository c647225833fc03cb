//! Use cases on what is inside VMs, through their guests' agents.
//!
//! Whoever enters a guest passes one [`door`]: role, policy, lockdown, the VM's power, the link,
//! and the line in the audit log, in that order. What is only looked at (status, telemetry,
//! history) comes from memory and needs a viewer.

mod access;
mod address;
mod audit;
mod detail;
mod door;
mod exec;
mod files;
mod lockdown;
mod requests;
mod status;
mod telemetry;
mod update;

use std::time::Duration;

use ghost_domain::guest::GuestInject;

pub(crate) use access::SWITCHED_OFF;
pub use access::{GuestAccessView, SetGuestAccess};
pub use address::RegisterGuestAddress;
pub use audit::{ListAudit, ListAuditCommand, VerifyAudit};
pub(crate) use detail::escape;
pub(crate) use door::{Door, locked};
pub use exec::ExecInGuest;
pub use files::{
    ListGuestFiles, ListGuestFilesCommand, MakeGuestDirectory, MakeGuestLink, ReadGuestFile,
    ReadGuestFileCommand, StatGuestFile, WriteGuestFile,
};
pub use lockdown::{GetLockdown, LockdownView, SetLockdown, SetLockdownCommand};
pub use requests::{
    FreezeGuest, FreezeGuestCommand, SetGuestPassword, SetGuestPasswordCommand, ShutdownGuest,
    SyncGuestClock, ThawGuest, UpdateGuestSshKeys, UpdateGuestSshKeysCommand,
};
pub use status::{GetGuestStatus, GuestLayer, GuestPing, GuestStatusView, PingGuest};
pub use telemetry::{
    GetGuestHistory, GuestHistoryView, TelemetryView, TelemetryWatch, WatchTelemetry,
};
pub use update::{GuestUpdateView, UpdateGuest};

/// Which guest, and the request that the call belongs to.
#[derive(Clone, Debug, Default)]
pub struct GuestTarget {
    /// Name, full id or unique prefix of the VM.
    pub vm: String,
    /// The id of the request as the log and traces have it, for the audit log.
    pub request_id: String,
}

/// What the owner of the host decided about guests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestOptions {
    /// How the agent comes into VMs whose creator does not say.
    pub inject: GuestInject,
    /// Whether guests may be entered at all.
    pub access: bool,
    /// Replace guests' agents that differ from the host's program.
    pub update: bool,
    /// How often guests report. One from whom three reports in a row are missing is silent.
    pub telemetry_interval: Duration,
    /// How often the host's counters of VMs are read while a guest is silent; half as often
    /// where all speak for themselves, and not at all while no VM runs.
    pub counters_interval: Duration,
}

impl Default for GuestOptions {
    fn default() -> Self {
        Self {
            inject: GuestInject::Auto,
            access: true,
            update: true,
            telemetry_interval: Duration::from_secs(5),
            counters_interval: Duration::from_secs(5),
        }
    }
}
