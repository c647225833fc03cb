//! A VM's own folder: disk, seed, console.

use std::path::{Path, PathBuf};

use async_trait::async_trait;

use crate::guest::GuestInject;
use crate::vm::CloudInit;
use crate::{ByteSize, ImageFormat, Result, VmId, VmName};

/// What the NoCloud seed is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seed {
    /// Instance id: the VM's id, so that cloud-init runs once in a VM's life.
    pub vm: VmId,
    /// Host name.
    pub hostname: VmName,
    /// What the caller gave.
    pub cloud_init: CloudInit,
    /// How the guest agent is brought in.
    pub inject: GuestInject,
}

/// What a VM's files take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct VmStorageUsage {
    /// Virtual size of the disk.
    pub disk_virtual: ByteSize,
    /// Space that the disk occupies.
    pub disk_allocated: ByteSize,
}

/// Bytes from a serial console.
#[async_trait]
pub trait ConsoleReader: Send {
    /// The next bytes; empty at the end (the VM went down or somebody else took over).
    async fn read(&mut self) -> Result<Vec<u8>>;
}

/// Bytes to a serial console.
#[async_trait]
pub trait ConsoleWriter: Send {
    /// Sends all bytes.
    async fn write(&mut self, data: &[u8]) -> Result<()>;
}

/// An attached serial console; dropping both halves detaches it.
pub struct ConsoleSession {
    /// From the guest.
    pub reader: Box<dyn ConsoleReader>,
    /// To the guest.
    pub writer: Box<dyn ConsoleWriter>,
}

impl std::fmt::Debug for ConsoleSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ConsoleSession")
    }
}

/// Reads a console log from a point on, across rotations.
#[async_trait]
pub trait LogReader: Send {
    /// The next bytes that are there. Empty: nothing more yet (following) or at all.
    async fn read(&mut self) -> Result<Vec<u8>>;
}

/// Keeps the VMs' folders, `<data_dir>/vms/<id>/`.
#[cfg_attr(feature = "mocks", mockall::automock)]
#[async_trait]
pub trait VmStorage: Send + Sync {
    /// Where the VM's disk is or will be.
    fn disk_path(&self, vm: VmId) -> PathBuf;
    /// Where its seed is or will be.
    fn seed_path(&self, vm: VmId) -> PathBuf;
    /// Where QEMU listens for its serial console.
    fn console_socket_path(&self, vm: VmId) -> PathBuf;
    /// Where QEMU listens for its guest agent's channel.
    fn guest_socket_path(&self, vm: VmId) -> PathBuf;
    /// Where its console log is.
    fn console_log_path(&self, vm: VmId) -> PathBuf;

    /// Makes the folder, traversable by QEMU's user. Succeeds where it is there.
    async fn create_folder(&self, vm: VmId) -> Result<()>;

    /// Makes the disk as a qcow2 overlay over `base`, or keeps the one that is there if it has
    /// the same base and size.
    ///
    /// # Errors
    /// `DiskFull`, `DiskTooSmall` when `size` is below the base's virtual size, `IoFailed`.
    async fn create_disk(
        &self,
        vm: VmId,
        base: &Path,
        base_format: ImageFormat,
        size: ByteSize,
    ) -> Result<()>;

    /// Checks what the caller gave for cloud-init before anything is made.
    ///
    /// # Errors
    /// `InvalidUserData` with the line and column of the fault.
    fn validate_seed(&self, cloud_init: &CloudInit) -> Result<()>;

    /// Writes the seed (mode 0600 but readable by QEMU through libvirt's labelling), replacing an
    /// older one.
    async fn write_seed(&self, seed: &Seed) -> Result<()>;

    /// Removes the folder and all in it. Succeeds where there is none, and on a full disk.
    async fn remove(&self, vm: VmId) -> Result<()>;

    /// The VMs that have a folder.
    async fn list(&self) -> Result<Vec<VmId>>;

    /// What the files take; `None` where there is no disk. Reads file metadata only, no tool.
    async fn usage(&self, vm: VmId) -> Result<Option<VmStorageUsage>>;

    /// Attaches to the serial console of a running VM. One at a time: QEMU's socket takes one peer.
    ///
    /// # Errors
    /// `VmNotRunning` when nobody listens; `VmBusy` when somebody is attached through this agent.
    async fn open_console(&self, vm: VmId) -> Result<ConsoleSession>;

    /// Reads the console log: the last `tail_bytes` (all of it with `None`), then what comes.
    async fn open_log(&self, vm: VmId, tail_bytes: Option<u64>) -> Result<Box<dyn LogReader>>;
}
