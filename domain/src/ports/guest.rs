//! The way into guests: the channel to each VM's agent, and the log of what was done there.

use std::path::Path;
use std::pin::Pin;

use async_trait::async_trait;

use crate::guest::{
    AuditEntry, AuditRecord, AuditVerdict, DirectoryMake, ExecExit, ExecRequest, FileSum,
    FileWrite, FreezeOutcome, GuestDirectory, GuestFile, GuestHello, GuestLinkStatus, GuestRequest,
    GuestTelemetry, LinkMake,
};
use crate::{Result, Timestamp, VmId};
use std::time::Duration;

/// What a running program sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecEvent {
    /// It runs under this process id.
    Started(u32),
    /// Output.
    Stdout(Vec<u8>),
    /// Errors.
    Stderr(Vec<u8>),
    /// It has ended; nothing follows.
    Exited(ExecExit),
}

/// Output of a program in a guest. Dropping it cancels the program: its process group is killed.
#[async_trait]
pub trait ExecOutput: Send {
    /// The next event. Reading is what lets more come: a caller who does not read holds up this
    /// program and nothing else. May be given up and called again without a loss.
    ///
    /// # Errors
    /// `GuestUnreachable` when the channel, the agent or the guest went away; whether the program
    /// runs on is not known then.
    async fn next(&mut self) -> Result<ExecEvent>;
}

/// Input of a program in a guest. Dropping it leaves stdin open; end it with [`ExecInput::end`].
#[async_trait]
pub trait ExecInput: Send + Sync {
    /// Sends bytes to stdin; waits while the program does not take them.
    async fn write(&self, data: Vec<u8>) -> Result<()>;
    /// Closes stdin.
    async fn end(&self) -> Result<()>;
    /// The terminal has another size.
    async fn resize(&self, rows: u16, columns: u16) -> Result<()>;
    /// Sends a signal to the process group.
    async fn signal(&self, number: u8) -> Result<()>;
}

/// A program that runs in a guest.
pub struct ExecSession {
    /// What it writes.
    pub output: Box<dyn ExecOutput>,
    /// What it reads.
    pub input: Box<dyn ExecInput>,
}

impl std::fmt::Debug for ExecSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ExecSession")
    }
}

/// A file that is read from a guest. Dropping it ends the transfer.
#[async_trait]
pub trait GuestFileReader: Send {
    /// The next bytes; empty at the end.
    ///
    /// # Errors
    /// `GuestUnreachable`, `ChecksumMismatch` where what came is not what the guest read,
    /// `GuestFailed`.
    async fn read(&mut self) -> Result<Vec<u8>>;
    /// What was carried, once [`GuestFileReader::read`] came to the end.
    fn sum(&self) -> Option<FileSum>;
}

/// A file that is written in a guest. Dropped before [`GuestFileWriter::finish`] the target stays as
/// it was, and what was sent is kept for a while for a resumed try.
#[async_trait]
pub trait GuestFileWriter: Send {
    /// The bytes that are there already: what is sent begins behind them.
    fn offset(&self) -> u64;
    /// Sends bytes; waits while the guest does not take them.
    async fn write(&mut self, data: Vec<u8>) -> Result<()>;
    /// Completes the file: synced, checked, renamed over the target.
    ///
    /// # Errors
    /// `ChecksumMismatch` where the guest holds other bytes than were sent; the target is as before.
    async fn finish(self: Box<Self>) -> Result<FileSum>;
}

/// What the links to guests tell by themselves.
#[derive(Clone, Debug, PartialEq)]
pub enum GuestEvent {
    /// The agent greeted.
    Connected {
        /// Which VM.
        vm: VmId,
        /// How.
        hello: GuestHello,
        /// It is a new start of the guest's kernel, as far as it says.
        rebooted: bool,
    },
    /// The agent is no longer heard.
    Disconnected {
        /// Which VM.
        vm: VmId,
        /// Why.
        reason: String,
    },
    /// A report.
    Telemetry {
        /// Which VM.
        vm: VmId,
        /// What it says, clamped.
        report: Box<GuestTelemetry>,
    },
    /// It broke the rules of the protocol so often that it is held off for a while.
    Misbehaved {
        /// Which VM.
        vm: VmId,
        /// What it did.
        detail: String,
    },
}

/// Receives [`GuestEvent`]s.
#[async_trait]
pub trait GuestEvents: Send {
    /// The next one; `None` once the adapter is gone. A subscriber that is too slow loses the
    /// oldest telemetry first.
    async fn next(&mut self) -> Option<GuestEvent>;
}

/// The links to the agents in VMs.
///
/// Errors of every call into a guest: `GuestUnreachable` when there is no link, the agent has not
/// greeted or goes away in the middle; `GuestUnsupported` when its agent cannot or may not do it;
/// `DeadlineExceeded` when it does not answer; `GuestFailed` with the guest's own words, or the
/// telling code where there is one (`GuestFileNotFound`, `PermissionDenied` of the guest comes as
/// `GuestFailed`); `TooManyRequests` beyond the bound of calls in one guest.
#[cfg_attr(feature = "mocks", mockall::automock)]
#[async_trait]
pub trait GuestLinks: Send + Sync {
    /// Keeps a link to the agent of a VM that runs, over the Unix socket at which QEMU listens,
    /// until [`GuestLinks::detach`]. Succeeds where there is one.
    fn attach(&self, vm: VmId, socket: &Path);

    /// Ends the link; calls that are under way end with `GuestUnreachable`.
    fn detach(&self, vm: VmId, reason: &str);

    /// How the link stands; the default where there is none.
    fn status(&self, vm: VmId) -> GuestLinkStatus;

    /// Subscribes to what links tell.
    fn subscribe(&self) -> Box<dyn GuestEvents>;

    /// Ends all calls at once and refuses new ones (telemetry stays) while `closed`. Returns how
    /// many were ended. Takes effect before it returns.
    fn lock_down(&self, closed: bool) -> u32;

    /// Ends the calls of one VM; how many.
    fn cut(&self, vm: VmId, reason: &str) -> u32;

    /// The round trip of a frame.
    async fn ping(&self, vm: VmId) -> Result<Duration>;

    /// Runs a program.
    async fn execute(&self, vm: VmId, request: ExecRequest) -> Result<ExecSession>;

    /// Looks at a file.
    async fn stat(&self, vm: VmId, path: &str, follow: bool) -> Result<GuestFile>;

    /// Lists a directory, names after `after`.
    async fn list(&self, vm: VmId, path: &str, after: &str, limit: u32) -> Result<GuestDirectory>;

    /// Makes a directory; succeeds where it is there.
    async fn make_directory(&self, vm: VmId, directory: DirectoryMake) -> Result<()>;

    /// Makes a symbolic link, in the place of a file or link that is there.
    async fn make_link(&self, vm: VmId, link: LinkMake) -> Result<()>;

    /// Opens a file to read `length` bytes (all with `None`) from `offset` on.
    async fn read_file(
        &self,
        vm: VmId,
        path: &str,
        offset: u64,
        length: Option<u64>,
    ) -> Result<(GuestFile, Box<dyn GuestFileReader>)>;

    /// Begins to write a file.
    async fn write_file(&self, vm: VmId, file: FileWrite) -> Result<Box<dyn GuestFileWriter>>;

    /// Asks for something short.
    async fn request(&self, vm: VmId, request: GuestRequest) -> Result<()>;

    /// Freezes file systems, all with an empty list, for at most `timeout`.
    async fn freeze(
        &self,
        vm: VmId,
        timeout: Duration,
        mount_points: Vec<String>,
    ) -> Result<FreezeOutcome>;

    /// Thaws them.
    async fn thaw(&self, vm: VmId) -> Result<FreezeOutcome>;

    /// Puts the program that this host has in the place of the guest's.
    async fn update(&self, vm: VmId) -> Result<()>;

    /// SHA-256 and size of the guest program that this host has for injecting and updating; `None`
    /// where it has none.
    fn program(&self) -> Option<GuestProgramFile>;
}

/// The guest agent's program on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestProgramFile {
    /// Where it lies.
    pub path: std::path::PathBuf,
    /// Its SHA-256.
    pub sha256: [u8; 32],
    /// Its size in bytes.
    pub size: u64,
}

/// Resolves once an entry of the audit log would survive a power cut.
pub type AuditReceipt = Pin<Box<dyn Future<Output = Result<AuditEntry>> + Send>>;

/// The append-only log of what was done in guests, each entry chained to the one before.
#[cfg_attr(feature = "mocks", mockall::automock)]
#[async_trait]
pub trait AuditLog: Send + Sync {
    /// Appends and syncs; returns once the entry would survive a power cut.
    ///
    /// # Errors
    /// `IoFailed`, `DiskFull`. Callers refuse what they cannot log.
    async fn append(&self, record: AuditRecord) -> Result<AuditEntry>;

    /// Appends, and returns once the entry is in the log, where nothing but a power cut of this host
    /// takes it away; the receipt tells when a power cut does not either. In between, what is logged
    /// may be begun, but nothing that came of it may be told: guests lose power with their host.
    ///
    /// # Errors
    /// As [`AuditLog::append`], also from the receipt.
    async fn begin(&self, record: AuditRecord) -> Result<AuditReceipt>;

    /// The newest `limit` entries that concern `vm` (an id; all with `None`) since `since`, oldest
    /// first.
    async fn list(
        &self,
        vm: Option<VmId>,
        since: Option<Timestamp>,
        limit: usize,
    ) -> Result<Vec<AuditEntry>>;

    /// Reads all of it and checks the chain.
    async fn verify(&self) -> Result<AuditVerdict>;
}
