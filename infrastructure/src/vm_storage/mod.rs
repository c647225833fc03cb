//! The VMs' folders, `<data_dir>/vms/<id>/`: disk, seed, console socket and log.
//!
//! Invariants:
//! - a path is made from the data folder and a VM's id alone; no name that a person chose, and
//!   nothing that a guest wrote, becomes part of one;
//! - every file appears whole (temporary name, fsync, rename) or not at all;
//! - links are never followed, and a disk that is there is never replaced.

mod console;
mod inject;
mod log;
mod seed;
mod user_data;

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use ghost_domain::ports::{ConsoleSession, LogReader, Seed, VmStorage, VmStorageUsage};
use ghost_domain::vm::CloudInit;
use ghost_domain::{ByteSize, Error, ErrorCode, ImageFormat, Result, VmId};

use inject::Injected;

use crate::guest_link::GuestProgram;
use crate::images::files::{
    RemoveOnDrop, TemporaryFile, blocking, blocking_long, io_error, make_passable_folder,
    open_plain, publish, remove_if_there, sync_folder,
};
use crate::images::header::{HEAD_LENGTH, Qcow2Header};
use crate::images::qemu_img::QemuImg;

/// Where and by what the VMs' files are made.
#[derive(Clone, Debug)]
pub struct VmStorageOptions {
    /// The agent's data folder; the VMs' folders lie in `vms` below it.
    pub data_dir: PathBuf,
    /// QEMU's image tool.
    pub qemu_img: PathBuf,
    /// The guest agent's program, for the seeds.
    pub guest_program: GuestProgram,
}

impl VmStorageOptions {
    /// With Debian's `qemu-img`, and the guest agent's program where packages put it.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            qemu_img: PathBuf::from("/usr/bin/qemu-img"),
            guest_program: GuestProgram::standard(),
        }
    }
}

/// [`VmStorage`] in a folder of the host.
#[derive(Debug)]
pub struct DirectoryVmStorage {
    vms: PathBuf,
    qemu_img: QemuImg,
    guest_program: GuestProgram,
    attached: Arc<console::Attached>,
}

impl DirectoryVmStorage {
    /// Opens it, making the folder (mode 0711) where it is missing.
    ///
    /// # Errors
    /// `IoFailed` or `DiskFull` when the folder cannot be made.
    pub fn open(options: VmStorageOptions) -> Result<Self> {
        let data_dir = std::path::absolute(&options.data_dir)
            .map_err(|error| io_error("use", &options.data_dir, &error))?;
        let vms = data_dir.join("vms");
        make_passable_folder(&vms).map_err(|error| io_error("make", &vms, &error))?;
        Ok(Self {
            vms,
            qemu_img: QemuImg::new(options.qemu_img),
            guest_program: options.guest_program,
            attached: Arc::default(),
        })
    }

    fn folder(&self, vm: VmId) -> PathBuf {
        self.vms.join(vm.to_string())
    }
}

/// The header of a disk of ours; `None` where there is no file.
fn read_disk(path: &Path) -> Result<Option<(Qcow2Header, fs::Metadata)>> {
    let file = match open_plain(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("open", path, &error)),
    };
    let read = |file: &fs::File| -> io::Result<(Vec<u8>, fs::Metadata)> {
        use std::io::Read;
        let mut head = Vec::new();
        file.take(HEAD_LENGTH as u64).read_to_end(&mut head)?;
        Ok((head, file.metadata()?))
    };
    let (head, metadata) = read(&file).map_err(|error| io_error("read", path, &error))?;
    let header = Qcow2Header::parse(&head).map_err(|error| {
        Error::new(
            ErrorCode::IoFailed,
            format!("the disk {} is damaged", path.display()),
        )
        .because(error)
    })?;
    Ok(Some((header, metadata)))
}

/// The size of the disk that a guest sees in a base image of the cache.
fn base_size(base: &Path, format: ImageFormat) -> Result<ByteSize> {
    let missing = |error: &io::Error| io_error("open the base image", base, error);
    match format {
        ImageFormat::Raw => fs::metadata(base)
            .map(|metadata| ByteSize::from_bytes(metadata.len()))
            .map_err(|error| missing(&error)),
        ImageFormat::Qcow2 => match read_disk(base)? {
            Some((header, _)) => Ok(ByteSize::from_bytes(header.virtual_size)),
            None => Err(missing(&io::ErrorKind::NotFound.into())),
        },
    }
}

/// qcow2 counts in sectors; QEMU rounds a size up.
fn whole_sectors(size: ByteSize) -> u64 {
    size.bytes()
        .checked_next_multiple_of(512)
        .unwrap_or(size.bytes())
}

/// Whether the disk that is there is the one wanted.
fn keep_existing(
    disk: &Path,
    base: &Path,
    base_format: ImageFormat,
    size: ByteSize,
) -> Result<bool> {
    let Some((header, _)) = read_disk(disk)? else {
        return Ok(false);
    };
    let same = header.backing_file.as_deref().map(Path::new) == Some(base)
        && header.backing_format.as_deref() == Some(base_format.as_str())
        && header.virtual_size == whole_sectors(size);
    if same {
        return Ok(true);
    }
    // It may hold a guest's data: never replaced for a wish to have another.
    Err(Error::new(
        ErrorCode::WrongState,
        format!("the VM already has another disk, {}", disk.display()),
    )
    .because(format!(
        "it has {} on the base {}",
        ByteSize::from_bytes(header.virtual_size),
        header.backing_file.as_deref().unwrap_or("none"),
    )))
}

#[async_trait]
impl VmStorage for DirectoryVmStorage {
    fn disk_path(&self, vm: VmId) -> PathBuf {
        self.folder(vm).join("disk.qcow2")
    }

    fn seed_path(&self, vm: VmId) -> PathBuf {
        self.folder(vm).join("seed.img")
    }

    fn console_socket_path(&self, vm: VmId) -> PathBuf {
        self.folder(vm).join("console.sock")
    }

    fn guest_socket_path(&self, vm: VmId) -> PathBuf {
        self.folder(vm).join("guest.sock")
    }

    fn console_log_path(&self, vm: VmId) -> PathBuf {
        self.folder(vm).join("console.log")
    }

    async fn create_folder(&self, vm: VmId) -> Result<()> {
        let folder = self.folder(vm);
        blocking(move |_| {
            make_passable_folder(&folder).map_err(|error| io_error("make", &folder, &error))
        })
        .await
    }

    async fn create_disk(
        &self,
        vm: VmId,
        base: &Path,
        base_format: ImageFormat,
        size: ByteSize,
    ) -> Result<()> {
        let folder = self.folder(vm);
        let disk = self.disk_path(vm);
        let base = std::path::absolute(base).map_err(|error| io_error("use", base, &error))?;
        let temporary = folder.join("disk.qcow2.new");
        let exists = {
            let (disk, base, temporary) = (disk.clone(), base.clone(), temporary.clone());
            blocking(move |_| {
                let least = base_size(&base, base_format)?;
                if size < least {
                    return Err(Error::new(
                        ErrorCode::DiskTooSmall,
                        format!("a disk of {size} is too small: the image needs {least}"),
                    )
                    .hint(format!("ask for at least: --disk {}", exact(least)))
                    .field("disk_bytes", format!("at least {} bytes", least.bytes())));
                }
                if keep_existing(&disk, &base, base_format, size)? {
                    return Ok(true);
                }
                remove_if_there(&temporary)
                    .map_err(|error| io_error("replace", &temporary, &error))?;
                Ok(false)
            })
            .await?
        };
        if exists {
            return Ok(());
        }
        let cleanup = RemoveOnDrop(temporary.clone());
        self.qemu_img
            .create_overlay(
                &temporary,
                &base,
                base_format,
                ByteSize::from_bytes(whole_sectors(size)),
            )
            .await?;
        blocking(move |_| {
            let cleanup = cleanup;
            let failed = |error: io::Error| io_error("write", &disk, &error);
            let file = open_plain(&cleanup.0).map_err(failed)?;
            publish(&file, &cleanup.0, &disk, 0o600).map_err(failed)
        })
        .await
    }

    fn validate_seed(&self, cloud_init: &CloudInit) -> Result<()> {
        if let Some(text) = &cloud_init.user_data {
            user_data::validate_user_data(text)?;
        }
        if let Some(text) = &cloud_init.network_config {
            user_data::validate_network_config(text)?;
        }
        Ok(())
    }

    async fn write_seed(&self, seed: &Seed) -> Result<()> {
        let path = self.seed_path(seed.vm);
        let seed = seed.clone();
        let program = self.guest_program.clone();
        blocking(move |_| {
            let mut injected = Injected::find(seed.inject, &program)?;
            let failed = |error: io::Error| io_error("write", &path, &error);
            let mut name = path.as_os_str().to_owned();
            name.push(".new");
            let temporary = TemporaryFile::at(PathBuf::from(name)).map_err(failed)?;
            seed::write(&seed, injected.as_mut(), &temporary.file)?.map_err(failed)?;
            temporary.publish(&path, 0o600).map_err(failed)
        })
        .await
    }

    async fn remove(&self, vm: VmId) -> Result<()> {
        let folder = self.folder(vm);
        let vms = self.vms.clone();
        blocking_long(move |_| {
            // Unlinks a link instead of following it, at the top and anywhere below; takes no
            // new space, so it works on a full disk.
            let gone = match fs::symlink_metadata(&folder) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) => Err(error),
                Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(&folder),
                Ok(_) => fs::remove_file(&folder),
            };
            match gone {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(io_error("remove", &folder, &error))
                }
                _ => sync_folder(&vms).map_err(|error| io_error("remove", &folder, &error)),
            }
        })
        .await
    }

    async fn list(&self) -> Result<Vec<VmId>> {
        let vms = self.vms.clone();
        blocking(move |_| {
            let failed = |error: io::Error| io_error("list", &vms, &error);
            let mut found = Vec::new();
            for entry in fs::read_dir(&vms).map_err(failed)? {
                let entry = entry.map_err(failed)?;
                let id = entry.file_name().to_str().and_then(|name| {
                    let id: VmId = name.parse().ok()?;
                    // One spelling only: the one that `folder` makes.
                    (id.to_string() == name).then_some(id)
                });
                if let Some(id) = id
                    && entry.file_type().map_err(failed)?.is_dir()
                {
                    found.push(id);
                }
            }
            found.sort();
            Ok(found)
        })
        .await
    }

    async fn usage(&self, vm: VmId) -> Result<Option<VmStorageUsage>> {
        let disk = self.disk_path(vm);
        blocking(move |_| {
            Ok(read_disk(&disk)?.map(|(header, metadata)| VmStorageUsage {
                disk_virtual: ByteSize::from_bytes(header.virtual_size),
                // st_blocks counts units of 512 bytes on Linux, whatever the file system.
                disk_allocated: ByteSize::from_bytes(metadata.blocks().saturating_mul(512)),
            }))
        })
        .await
    }

    async fn open_console(&self, vm: VmId) -> Result<ConsoleSession> {
        console::open(&self.attached, vm, self.console_socket_path(vm)).await
    }

    async fn open_log(&self, vm: VmId, tail_bytes: Option<u64>) -> Result<Box<dyn LogReader>> {
        let path = self.console_log_path(vm);
        let reader = blocking(move |_| log::RotatedLog::open(path, tail_bytes)).await?;
        Ok(Box::new(reader))
    }
}

/// A size that reads back as at least itself: whole GiB or MiB, or bytes.
fn exact(size: ByteSize) -> String {
    let mib = size.bytes().div_ceil(1 << 20);
    if mib.is_multiple_of(1024) {
        format!("{}GiB", mib / 1024)
    } else {
        format!("{mib}MiB")
    }
}
