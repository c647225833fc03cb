//! What an agent may do and where it looks.

use std::path::PathBuf;
use std::sync::Arc;

use crate::freeze::Freezer;
use crate::power::{HostSystem, System};

/// What a guest can be asked for; a host learns of it in `AgentReady.capabilities`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Capability {
    /// Programs.
    Exec,
    /// Programs in a terminal.
    Pty,
    /// Files, both ways.
    Files,
    /// Making symbolic links, where files may be written.
    Links,
    /// Shutdown and reboot.
    Power,
    /// Passwords.
    Password,
    /// `authorized_keys`.
    SshKeys,
    /// Setting the clock.
    Clock,
    /// Freezing and thawing file systems.
    Freeze,
    /// Reports.
    Telemetry,
    /// A new program for the agent.
    Update,
}

impl Capability {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Exec,
        Self::Pty,
        Self::Files,
        Self::Links,
        Self::Power,
        Self::Password,
        Self::SshKeys,
        Self::Clock,
        Self::Freeze,
        Self::Telemetry,
        Self::Update,
    ];

    /// Its name in the protocol and in the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Exec => "exec",
            Self::Pty => "pty",
            Self::Files => "files",
            Self::Links => "links",
            Self::Power => "power",
            Self::Password => "password",
            Self::SshKeys => "ssh_keys",
            Self::Clock => "clock",
            Self::Freeze => "freeze",
            Self::Telemetry => "telemetry",
            Self::Update => "update",
        }
    }

    /// The one of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.as_str() == name)
    }
}

/// How an agent runs.
#[derive(Clone)]
pub struct Options {
    /// What it offers.
    pub capabilities: Vec<Capability>,
    /// Directories that files are read and written under; absolute.
    pub roots: Vec<PathBuf>,
    /// Holds `pre-freeze.d` and `post-thaw.d`.
    pub hooks: PathBuf,
    /// Before every path of the guest that the agent itself looks at (`etc/passwd`, homes): `/`
    /// outside tests.
    pub sysroot: PathBuf,
    /// Power and clock of the guest.
    pub system: Arc<dyn System>,
    /// Adopt and bury what executed programs leave behind. True only where the agent is the
    /// program: it takes the exit statuses of all children of the process.
    pub adopt_orphans: bool,
    /// SHA-256 of the program that runs; empty where it is not known.
    pub program_sha256: Vec<u8>,
    /// The program that an update replaces; `None`: updates are not offered.
    pub program: Option<PathBuf>,
    /// What freezes, where it is to outlive a channel: a file system that was frozen over one is
    /// frozen still when the next is opened.
    pub freezer: Option<Arc<Freezer>>,
    /// Told when a host has greeted for the first time.
    pub on_greeted: Option<Arc<dyn Fn() + Send + Sync>>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            capabilities: Capability::ALL.to_vec(),
            roots: vec![PathBuf::from("/")],
            hooks: PathBuf::from("/etc/ghost"),
            sysroot: PathBuf::from("/"),
            system: Arc::new(HostSystem),
            adopt_orphans: false,
            program_sha256: Vec::new(),
            program: None,
            freezer: None,
            on_greeted: None,
        }
    }
}
