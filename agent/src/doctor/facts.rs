//! What the doctor sees. Plain data, so that tests can be any host.

use std::path::PathBuf;

use ghost_domain::ports::HypervisorInfo;
use ghost_domain::{Error, HostResources, Network, Reserved};
use ghost_infrastructure::libvirt::AcceleratorChoice;

use super::firewall::Firewall;

/// All that was seen.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub(super) local: Local,
    pub(super) libvirt: Libvirt,
    pub(super) network: NetworkFacts,
    pub(super) ports: Vec<Port>,
    /// Whether an agent runs on this data folder: then ports that are taken are its own.
    pub(super) agent_runs: bool,
    /// Whether the kernel says that the wall clock follows a reference; `None`: it cannot be asked.
    pub(super) clock_synchronised: Option<bool>,
    pub(super) group_exists: bool,
}

/// What needs nobody else to be seen.
#[derive(Clone, Debug)]
pub(super) struct Local {
    pub(super) simulated: bool,
    pub(super) accelerator: AcceleratorChoice,
    /// vmx or svm in `/proc/cpuinfo`.
    pub(super) cpu_flag: bool,
    pub(super) kvm_device: bool,
    /// Whether a vCPU ran, and why (not).
    pub(super) kvm: (bool, String),
    pub(super) qemu: Option<PathBuf>,
    pub(super) qemu_img: Option<PathBuf>,
    pub(super) data_dir: PathBuf,
    /// Whether this process can write there (or can make it).
    pub(super) writable: bool,
    /// The user that QEMU runs as, where it is known.
    pub(super) qemu_user: Option<User>,
    /// The folders from `/` down to the data folder, as far as they exist.
    pub(super) path: Vec<Node>,
    /// Image files of the cache.
    pub(super) images: Vec<Node>,
    pub(super) resources: Result<HostResources, Error>,
    pub(super) reserved: Reserved,
    /// The agent for guests: where it lies, that there is none, or why it cannot be used.
    pub(super) guest_program: Result<Option<PathBuf>, String>,
}

/// A user and the groups it is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct User {
    pub(super) name: String,
    pub(super) uid: u32,
    pub(super) gids: Vec<u32>,
}

/// A file or folder and who may use it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) path: PathBuf,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mode: u32,
}

impl Node {
    /// Whether a user has a right: 1 to pass through a folder, 4 to read a file. Access lists are
    /// not looked at.
    pub(super) fn allows(&self, user: &User, right: u32) -> bool {
        let shift = if user.uid == 0 {
            return true;
        } else if user.uid == self.uid {
            6
        } else if user.gids.contains(&self.gid) {
            3
        } else {
            0
        };
        (self.mode >> shift) & right == right
    }
}

/// libvirt, as far as it answered.
#[derive(Clone, Debug)]
pub(super) struct Libvirt {
    pub(super) uri: String,
    /// What it is, or why it cannot be asked.
    pub(super) info: Result<HypervisorInfo, Error>,
    /// Whether virtlogd takes connections.
    pub(super) virtlogd: bool,
}

/// Networks and what stands between them and the world.
#[derive(Clone, Debug)]
pub(super) struct NetworkFacts {
    /// The libvirt network behind Ghost's `default`.
    pub(super) wanted: String,
    /// All networks, where libvirt could be asked.
    pub(super) networks: Option<Vec<Network>>,
    pub(super) dnsmasq: Option<PathBuf>,
    pub(super) ip_forward: bool,
    pub(super) firewall: Firewall,
}

/// A listener of the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Port {
    /// The key that sets it.
    pub(super) key: &'static str,
    /// Where.
    pub(super) address: String,
    /// Why it cannot be bound; `None`: it can.
    pub(super) problem: Option<String>,
}
