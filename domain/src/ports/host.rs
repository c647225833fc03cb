//! The machine we run on.

use async_trait::async_trait;

use crate::{HostResources, Result};

/// What does not change while the host runs.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct HostFacts {
    /// Its host name.
    pub hostname: String,
    /// Operating system, as `/etc/os-release` names it.
    pub operating_system: String,
    /// Kernel release.
    pub kernel: String,
    /// Changes with every boot of the host (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: String,
    /// The CPU's model name.
    pub cpu_model: String,
}

/// How busy the host is.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct HostUsage {
    /// CPU time that the host spent not idle since boot, over all CPUs, in seconds.
    pub cpu_busy_seconds: f64,
    /// Memory that could be given out without swapping, in bytes.
    pub memory_available_bytes: u64,
    /// Load average over one minute.
    pub load_one_minute: f64,
    /// Seconds since boot.
    pub uptime_seconds: u64,
}

/// Reads the host; every value comes from the system at the time of the call.
#[cfg_attr(feature = "mocks", mockall::automock)]
#[async_trait]
pub trait HostProbe: Send + Sync {
    /// The facts.
    async fn facts(&self) -> Result<HostFacts>;
    /// What it has.
    async fn resources(&self) -> Result<HostResources>;
    /// How busy it is.
    async fn usage(&self) -> Result<HostUsage>;
}
