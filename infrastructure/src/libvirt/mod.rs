//! libvirt as Ghost's hypervisor and network provider.
//!
//! ```text
//!   async caller ──> Core::call ──> keyed worker pool (pool.rs) ──> libvirt's library ──> libvirtd
//!        ^               │ fails at once while the link is down
//!        │               v
//!   HypervisorEvents <── Core <── Link (link.rs): opens, probes, reopens the one connection
//!                          ^
//!                          └── libvirt's event loop on its own thread (ffi.rs)
//! ```
//!
//! Start reading at [`LibvirtHypervisor`]. Invariants:
//! - no libvirt handle leaves the threads of this module or crosses an await;
//! - every call ends within its deadline, also when libvirtd hangs; calls of one VM take effect in
//!   the order in which they were made;
//! - a domain without our metadata element, or of another agent's data folder, is never returned
//!   nor touched;
//! - XML is written by the typed writer in `xml` and read as untrusted input.

mod core;
pub(crate) mod events;
mod ffi;
mod hypervisor;
mod kvm;
mod link;
mod networks;
pub(crate) mod pool;
mod session;
mod state;
mod wire;
pub(crate) mod xml;

use std::path::PathBuf;
use std::time::Duration;

pub use self::hypervisor::LibvirtHypervisor;
pub use self::kvm::prove_kvm;
pub use self::networks::LibvirtNetworks;
pub use self::xml::METADATA_NAMESPACE;

/// How guests are to be executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum AcceleratorChoice {
    /// KVM where it is proved to work, software emulation elsewhere.
    #[default]
    Auto,
    /// KVM, without asking.
    Kvm,
    /// QEMU's software emulation.
    Tcg,
}

/// How libvirt is used.
#[derive(Clone, Debug)]
pub struct LibvirtOptions {
    /// Address, such as `qemu:///system`; see <https://libvirt.org/uri.html>.
    pub uri: String,
    /// How guests are to be executed.
    pub accelerator: AcceleratorChoice,
    /// Longest time that a call may take.
    pub call_deadline: Duration,
    /// Threads that make calls; 1 at least.
    pub workers: usize,
    /// The libvirt network behind Ghost's network `default`.
    pub default_network: String,
    /// The agent's data folder: domains of Ghost with no file below it belong to another agent on
    /// the same libvirt and are never returned nor touched. `None` takes all.
    pub data_dir: Option<PathBuf>,
}

impl Default for LibvirtOptions {
    fn default() -> Self {
        Self {
            uri: "qemu:///system".into(),
            accelerator: AcceleratorChoice::Auto,
            call_deadline: Duration::from_secs(20),
            workers: 4,
            default_network: "ghost-default".into(),
            data_dir: None,
        }
    }
}
