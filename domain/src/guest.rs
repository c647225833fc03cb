//! What is inside a VM, as its agent tells it, and what may be asked of it.
//!
//! Everything here that a guest reports is a claim of a stranger: adapters bound and clamp it
//! before it becomes one of these values, nothing of it decides about power, placement or rights,
//! and whoever prints a string of it escapes it.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

use crate::{Error, ErrorCode, Monotonic, Secret, Timestamp};

/// How the agent comes into a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum GuestInject {
    /// The seed carries it; a guest that has it already keeps its own unless that is older.
    #[default]
    Auto,
    /// The seed carries it, and the guest installs it over what it has.
    Always,
    /// The seed does not carry it.
    Never,
}

impl GuestInject {
    /// `auto`, `always` or `never`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Always => "always",
            Self::Never => "never",
        }
    }
}

impl fmt::Display for GuestInject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for GuestInject {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "auto" => Ok(Self::Auto),
            "always" => Ok(Self::Always),
            "never" => Ok(Self::Never),
            _ => Err(Error::new(
                ErrorCode::InvalidArgument,
                format!("{text:?} is no way to bring the guest agent in"),
            )
            .because("auto, always and never are the ways")
            .field("guest.inject", "auto, always or never")),
        }
    }
}

/// What the agent in a VM is for; part of the VM's record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GuestPolicy {
    /// How it gets there, at the first boot.
    pub inject: GuestInject,
    /// Whether exec, shell, files, accounts and power of the guest may be reached through it.
    /// Telemetry is shown either way.
    pub access: bool,
}

impl Default for GuestPolicy {
    fn default() -> Self {
        Self {
            inject: GuestInject::Auto,
            access: true,
        }
    }
}

/// How the guest's agent presented itself.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct GuestHello {
    /// Its release.
    pub agent_version: String,
    /// The protocol version that is spoken; 0 where there is no common one.
    pub protocol_version: u32,
    /// What it can and may: `exec`, `pty`, `files`, `power`, `password`, `ssh_keys`, `clock`,
    /// `freeze`, `telemetry`, `update`.
    pub capabilities: Vec<String>,
    /// The guest's boot id.
    pub boot_id: String,
    /// Its operating system, as `/etc/os-release` names it.
    pub operating_system: String,
    /// Its kernel.
    pub kernel: String,
    /// Its host name.
    pub hostname: String,
    /// SHA-256 of the agent's program; empty where it does not say.
    pub program_sha256: Vec<u8>,
}

/// How the way to a guest's agent stands.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct GuestLinkStatus {
    /// The channel's socket takes connections: QEMU runs.
    pub channel: bool,
    /// Why it does not, where it does not.
    pub channel_error: Option<String>,
    /// The agent greeted in this session.
    pub hello: Option<GuestHello>,
    /// When it did.
    pub connected_at: Option<Timestamp>,
    /// When it was last heard.
    pub last_seen: Option<Monotonic>,
    /// Since when it has not answered, where it is connected but silent: a guest that is paused,
    /// hangs, or whose agent is stuck.
    pub silent_since: Option<Monotonic>,
    /// Connections one after the other on which the guest said nothing at all, so that each was given
    /// up for the next.
    pub mute_connections: u32,
    /// Calls that are under way.
    pub running_calls: u32,
    /// Rules of the protocol that it broke in this session.
    pub violations: u32,
    /// Held off because it broke too many of them, until this time.
    pub held_off_until: Option<Monotonic>,
}

/// Where a number of a VM comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SampleSource {
    /// Its agent's report.
    Guest,
    /// The hypervisor's counters.
    Host,
}

impl SampleSource {
    /// `guest` or `host`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Guest => "guest",
            Self::Host => "host",
        }
    }
}

/// A file system of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct GuestFilesystem {
    /// Where it is mounted.
    pub mount_point: String,
    /// Its type.
    pub kind: String,
    /// Its size.
    pub total_bytes: u64,
    /// What is free to ordinary users.
    pub available_bytes: u64,
}

/// A network interface of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct GuestInterface {
    /// Its name in the guest.
    pub name: String,
    /// Its hardware address, as the guest says.
    pub mac: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Bytes received.
    pub receive_bytes: u64,
    /// Bytes sent.
    pub transmit_bytes: u64,
}

/// How far cloud-init is.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct GuestCloudInit {
    /// `absent`, `waiting`, `running`, `done`, `error` or `disabled`.
    pub status: String,
    /// The stage that runs or ran last.
    pub stage: String,
    /// What failed, at most ten.
    pub errors: Vec<String>,
}

impl GuestCloudInit {
    /// Whether it has come to its end, well or not.
    pub fn is_finished(&self) -> bool {
        matches!(
            self.status.as_str(),
            "absent" | "done" | "error" | "disabled"
        )
    }
}

/// CPU time of the guest since its boot, in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct GuestCpuTimes {
    /// In programs.
    pub user: f64,
    /// In programs of low priority.
    pub nice: f64,
    /// In the kernel.
    pub system: f64,
    /// With nothing to do.
    pub idle: f64,
    /// With nothing to do but wait for disks.
    pub iowait: f64,
    /// In interrupts.
    pub irq: f64,
    /// In soft interrupts.
    pub softirq: f64,
    /// Taken by the host.
    pub steal: f64,
}

/// One report of a guest's agent. All numbers are finite and all lists bounded.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct GuestTelemetry {
    /// CPU time by kind.
    pub cpu: GuestCpuTimes,
    /// 0 to 100 of all CPUs together, since the report before.
    pub cpu_percent: f64,
    /// CPUs that the guest sees.
    pub cpus: u32,
    /// Memory that the guest sees.
    pub memory_total_bytes: u64,
    /// What of it programs could still have.
    pub memory_available_bytes: u64,
    /// Swap space.
    pub swap_total_bytes: u64,
    /// What of it is free.
    pub swap_free_bytes: u64,
    /// Load averages of 1, 5 and 15 minutes.
    pub load: [f64; 3],
    /// File systems, at most 32.
    pub filesystems: Vec<GuestFilesystem>,
    /// Network interfaces, at most 16 with at most 8 addresses each.
    pub interfaces: Vec<GuestInterface>,
    /// Processes.
    pub processes: u32,
    /// Who is logged on, at most 16.
    pub users: Vec<String>,
    /// cloud-init, where the guest has it.
    pub cloud_init: GuestCloudInit,
    /// How long the guest is up, seconds.
    pub uptime_seconds: f64,
    /// Resident memory of the agent.
    pub agent_resident_bytes: u64,
    /// Whether file systems are frozen.
    pub frozen: bool,
}

/// The size of a terminal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terminal {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
    /// The value of `TERM`.
    pub kind: String,
}

/// What to run in a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestProgram {
    /// A program with its arguments; a name without a slash is looked up in `PATH`.
    Command {
        /// The program.
        program: String,
        /// Its arguments, without the program itself.
        arguments: Vec<String>,
    },
    /// The user's login shell.
    LoginShell,
}

/// A program to run in a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecRequest {
    /// What.
    pub program: GuestProgram,
    /// Variables besides the agent's own few.
    pub environment: BTreeMap<String, String>,
    /// `None`: the user's home.
    pub working_directory: Option<String>,
    /// `None`: root.
    pub user: Option<String>,
    /// `None`: the user's own, with the supplementary ones.
    pub group: Option<String>,
    /// Whether stdin is given.
    pub stdin: bool,
    /// In a terminal: one stream of output.
    pub terminal: Option<Terminal>,
    /// After this its whole process group is killed.
    pub timeout: Option<Duration>,
    /// Output beyond it is thrown away and counted.
    pub max_output_bytes: Option<u64>,
}

impl ExecRequest {
    /// Most arguments.
    pub const MAX_ARGUMENTS: usize = 4096;
    /// Most bytes of arguments and environment together: it must fit into one frame.
    pub const MAX_BYTES: usize = 512 * 1024;

    /// A program with arguments and nothing else set.
    pub fn command<A: Into<String>>(
        program: impl Into<String>,
        arguments: impl IntoIterator<Item = A>,
    ) -> Self {
        Self {
            program: GuestProgram::Command {
                program: program.into(),
                arguments: arguments.into_iter().map(Into::into).collect(),
            },
            environment: BTreeMap::new(),
            working_directory: None,
            user: None,
            group: None,
            stdin: false,
            terminal: None,
            timeout: None,
            max_output_bytes: None,
        }
    }

    /// Checks the bounds, and that nothing holds a NUL byte, which no program can be given.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidArgument`] with the fields.
    pub fn validate(&self) -> Result<(), Error> {
        let mut bytes = 0;
        let mut nul = Vec::new();
        let mut look = |field: &'static str, text: &str| {
            bytes += text.len() + 1;
            if text.contains('\0') {
                nul.push(field);
            }
        };
        let mut empty = false;
        let mut count = 0;
        if let GuestProgram::Command { program, arguments } = &self.program {
            empty = program.is_empty();
            count = arguments.len();
            look("program", program);
            for argument in arguments {
                look("arguments", argument);
            }
        }
        let mut bad_name = false;
        for (name, value) in &self.environment {
            bad_name |= name.is_empty() || name.contains('=');
            look("environment", name);
            look("environment", value);
        }
        for (field, text) in [
            ("working_directory", &self.working_directory),
            ("user", &self.user),
            ("group", &self.group),
        ] {
            if let Some(text) = text {
                look(field, text);
            }
        }
        let mut error = Error::new(ErrorCode::InvalidArgument, "this cannot be run");
        let mut wrong = false;
        let mut add = |field: &str, rule: String| {
            error = error.clone().field(field, rule);
            wrong = true;
        };
        if empty {
            add("program", "a program is needed".into());
        }
        if count > Self::MAX_ARGUMENTS {
            add("arguments", format!("at most {}", Self::MAX_ARGUMENTS));
        }
        if bytes > Self::MAX_BYTES {
            add(
                "arguments",
                format!("at most {} bytes with the environment", Self::MAX_BYTES),
            );
        }
        if bad_name {
            add(
                "environment",
                "a name is not empty and has no `=` in it".into(),
            );
        }
        for field in nul {
            add(field, "no NUL byte".into());
        }
        if self.timeout == Some(Duration::ZERO) {
            add("timeout", "longer than nothing".into());
        }
        if wrong { Err(error) } else { Ok(()) }
    }
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExecExit {
    /// Its exit code; meaningless where a signal ended it.
    pub code: u8,
    /// The signal that ended it.
    pub signal: Option<u8>,
    /// Its time ran out.
    pub timed_out: bool,
    /// It was cancelled.
    pub cancelled: bool,
    /// Bytes of output that were thrown away for the cap.
    pub truncated_bytes: u64,
}

/// What an entry of a directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GuestFileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A device, socket or pipe.
    Other,
}

/// A file in a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestFile {
    /// What it is.
    pub kind: GuestFileKind,
    /// Its size in bytes.
    pub size: u64,
    /// Its permission bits, `07777`.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// When it was last changed.
    pub modified_at: Option<Timestamp>,
    /// Where a symbolic link points.
    pub symlink_target: Option<String>,
}

/// A page of a directory in a guest, sorted by name.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct GuestDirectory {
    /// Names and what they are.
    pub entries: Vec<(String, GuestFile)>,
    /// There are more behind the last one.
    pub more: bool,
}

/// What a transfer carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSum {
    /// Bytes.
    pub size: u64,
    /// XXH64 (seed 0) of them, big endian. It tells of damage on the way, not of malice: both ends of
    /// the channel could lie anyway.
    pub checksum: [u8; 8],
}

/// A file to write in a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileWrite {
    /// Absolute path.
    pub path: String,
    /// Its size in bytes.
    pub size: u64,
    /// Its permission bits, `07777`.
    pub mode: u32,
    /// Its owner and group; `None`: the agent's own, root.
    pub owner: Option<(u32, u32)>,
    /// When it was last changed; `None`: now.
    pub modified_at: Option<Timestamp>,
    /// XXH64 of the whole, where it is known beforehand.
    pub checksum: Option<[u8; 8]>,
    /// Go on with what an earlier try left; needs the checksum.
    pub resume: bool,
    /// Make the directories above.
    pub make_parents: bool,
    /// Refuse to replace what is there.
    pub no_replace: bool,
}

/// A directory to make in a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryMake {
    /// Absolute path.
    pub path: String,
    /// Its permission bits.
    pub mode: u32,
    /// Its owner and group; `None`: root.
    pub owner: Option<(u32, u32)>,
    /// Make the directories above too.
    pub make_parents: bool,
}

/// A symbolic link to make in a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkMake {
    /// Absolute path.
    pub path: String,
    /// What it says; nobody looks at what it leads to.
    pub target: String,
    /// Its owner and group; `None`: root.
    pub owner: Option<(u32, u32)>,
    /// When it was last changed; `None`: now.
    pub modified_at: Option<Timestamp>,
}

/// Checks what a symbolic link says: 1 to 4,095 bytes, no NUL (`symlink(2)`).
///
/// # Errors
/// [`ErrorCode::InvalidArgument`].
pub fn check_link_target(target: &str) -> Result<(), Error> {
    if (1..4096).contains(&target.len()) && !target.contains('\0') {
        return Ok(());
    }
    Err(
        Error::new(ErrorCode::InvalidArgument, "no link can say this")
            .field("target", "1 to 4095 bytes without NUL bytes"),
    )
}

/// Checks a path in a guest: absolute, bounded, no NUL. What it leads to is the guest's matter.
///
/// # Errors
/// [`ErrorCode::InvalidArgument`].
pub fn check_guest_path(path: &str) -> Result<(), Error> {
    if path.starts_with('/') && path.len() <= 4096 && !path.contains('\0') {
        return Ok(());
    }
    Err(
        Error::new(ErrorCode::InvalidArgument, "not a path in a guest")
            .because("it must be absolute, of at most 4096 bytes and without NUL bytes")
            .field("path", "absolute, at most 4096 bytes"),
    )
}

/// What the guest's file systems were asked to do did.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct FreezeOutcome {
    /// How many file systems were frozen or thawed.
    pub count: u32,
    /// Hooks that failed, and how.
    pub warnings: Vec<String>,
}

/// Short requests to a guest's agent, answered by yes or no.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestRequest {
    /// Power off or restart from within.
    Shutdown {
        /// Restart instead.
        reboot: bool,
        /// After this.
        delay: Duration,
    },
    /// Set a user's password.
    SetPassword {
        /// Whose.
        user: String,
        /// Which.
        password: Secret,
        /// It is what `crypt(3)` writes.
        hashed: bool,
    },
    /// Change a user's authorized SSH keys.
    SshKeys {
        /// Whose.
        user: String,
        /// Lines to add.
        add: Vec<String>,
        /// Lines to remove, compared without their comments.
        remove: Vec<String>,
    },
    /// Set the clock to the host's.
    SetClock {
        /// What time it is.
        now: Timestamp,
    },
}

/// One line of the audit log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditEntry {
    /// Its number, from 1, without gaps.
    pub sequence: u64,
    /// When it was written.
    pub at: Timestamp,
    /// What it says.
    pub record: AuditRecord,
    /// SHA-256 over the hash of the entry before and this one's content.
    pub hash: [u8; 32],
}

/// What an audit line says.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct AuditRecord {
    /// Who.
    pub principal: String,
    /// Which VM, as its id; empty where none is concerned.
    pub vm_id: String,
    /// Its name at that time.
    pub vm_name: String,
    /// `exec`, `shell`, `file_read`, `file_write`, `password`, …
    pub action: String,
    /// What was asked, without secrets.
    pub detail: String,
    /// `begun`, `ok`, `denied`, `failed: CODE`, …
    pub outcome: String,
    /// Bytes towards the guest.
    pub bytes_in: u64,
    /// Bytes from the guest.
    pub bytes_out: u64,
    /// How long it took; `None` where it has just begun.
    pub duration: Option<Duration>,
    /// The request that it belongs to, as the log and traces have it.
    pub request_id: String,
    /// In the log of a fleet: what a host's own log has no need of.
    pub fleet: Option<FleetAuditPart>,
}

/// What the log of a fleet says beside what each host's says.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct FleetAuditPart {
    /// The tenant of who did it; empty: of none.
    pub tenant: String,
    /// How they proved who they are.
    pub source: String,
    /// The host that it was done to, as its id; empty where none is concerned.
    pub host: String,
    /// The tenant of that host.
    pub host_tenant: String,
}

/// What a check of the audit log found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditVerdict {
    /// How many entries there are.
    pub entries: u64,
    /// The first one that does not fit, and why.
    pub broken: Option<(u64, String)>,
    /// The hash of the last entry.
    pub head: [u8; 32],
}

/// All ways into guests are closed by the owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lockdown {
    /// Why.
    pub reason: String,
    /// By whom.
    pub set_by: String,
    /// Since when.
    pub since: Timestamp,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_that_cannot_be_run_name_their_fields() {
        let good = ExecRequest::command("/bin/true", ["a"]);
        assert!(good.validate().is_ok());
        let mut bad = ExecRequest::command("", ["a\0b"]);
        bad.environment.insert("A=B".into(), String::new());
        bad.timeout = Some(Duration::ZERO);
        let error = bad.validate().unwrap_err();
        let fields: Vec<&str> = error
            .violations()
            .iter()
            .map(|violation| violation.field.as_str())
            .collect();
        assert_eq!(fields, ["program", "environment", "arguments", "timeout"]);
        let long = ExecRequest::command("x", ["y".repeat(ExecRequest::MAX_BYTES)]);
        assert_eq!(
            long.validate().unwrap_err().code(),
            ErrorCode::InvalidArgument
        );
    }

    #[test]
    fn paths_are_absolute() {
        assert!(check_guest_path("/etc/hosts").is_ok());
        for bad in ["", "etc", "/a\0", &format!("/{}", "a".repeat(4096))] {
            assert!(check_guest_path(bad).is_err(), "{bad:.10}");
        }
    }
}
