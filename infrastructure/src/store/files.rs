//! File system work whose order and durability matter: a file exists after a power cut only when
//! it *and* the directory that names it were synced.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Mode of our directories: the store holds hashes of credentials and users' data.
pub(super) const DIRECTORY_MODE: u32 = 0o700;
/// Mode of our files.
pub(super) const FILE_MODE: u32 = 0o600;

/// Where everything of one store lies.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    pub(super) root: PathBuf,
}

impl Layout {
    pub(super) const fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// The engine's directory.
    pub(super) fn state(&self) -> PathBuf {
        self.root.join("state")
    }

    /// A new engine directory while it is filled.
    pub(super) fn state_new(&self) -> PathBuf {
        self.root.join("state.new")
    }

    /// The replaced engine directory for the moment between two renames.
    pub(super) fn state_old(&self) -> PathBuf {
        self.root.join("state.old")
    }

    pub(super) fn sidecar(&self) -> PathBuf {
        self.root.join("sequence")
    }

    pub(super) fn lock(&self) -> PathBuf {
        self.root.join("lock")
    }

    pub(super) fn ballast(&self) -> PathBuf {
        self.root.join("ballast")
    }

    pub(super) fn exports(&self) -> PathBuf {
        self.root.join("exports")
    }

    /// What was found damaged, until somebody says that it has been dealt with.
    pub(super) fn damage(&self) -> PathBuf {
        self.root.join("damage")
    }
}

/// Makes `path` a directory of ours, durable with its name; one that exists gets our mode.
pub(super) fn make_directory(path: &Path) -> io::Result<()> {
    if let Some(parent) = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
    {
        // Only the store's own directory is private: others beside it must stay reachable, such as
        // the VMs' disks for the QEMU user.
        fs::create_dir_all(parent)?;
    }
    match DirBuilder::new().mode(DIRECTORY_MODE).create(path) {
        Ok(()) => {
            sync_directory(path)?;
            sync_parent(path)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {
            fs::set_permissions(path, fs::Permissions::from_mode(DIRECTORY_MODE))
        }
        Err(error) => Err(error),
    }
}

/// Makes the entries of a directory durable.
pub(super) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Makes the name of `path` durable.
pub(super) fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_directory(parent),
        _ => sync_directory(Path::new(".")),
    }
}

/// Gives every file below `path` our mode, and makes all of it durable. The engines make their
/// files with the process's umask and sync none of their directories.
pub(super) fn secure_and_sync_tree(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            fs::set_permissions(entry.path(), fs::Permissions::from_mode(DIRECTORY_MODE))?;
            secure_and_sync_tree(&entry.path())?;
        } else if kind.is_file() {
            let file = File::open(entry.path())?;
            file.set_permissions(fs::Permissions::from_mode(FILE_MODE))?;
            file.sync_all()?;
        }
    }
    sync_directory(path)
}

/// Options for a private file, to be completed by the caller.
pub(super) fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.mode(FILE_MODE);
    options
}

/// Writes `path` so that after a power cut it is there either wholly or not at all.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let written = (|| {
        let mut file = private()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        sync_parent(path)
    })();
    if written.is_err() {
        // Half a file on a full disk would only take the room that others need.
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// Removes a file or a whole directory; one that is not there is no error.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Bytes that the files below `path` occupy.
pub(super) fn disk_usage(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;

    let Ok(entries) = fs::read_dir(path) else {
        return 0;
    };
    entries
        .flatten()
        .filter_map(|entry| {
            let metadata = entry.metadata().ok()?;
            Some(if metadata.is_dir() {
                disk_usage(&entry.path())
            } else {
                metadata.blocks() * 512
            })
        })
        .sum()
}

/// Bytes that are free for us on the file system of `path`: for root also those that the file
/// system keeps from others, so that guests, who run as somebody else, hit the end before we do.
pub(super) fn free_bytes(path: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    let blocks = if rustix::process::geteuid().is_root() {
        stat.f_bfree
    } else {
        stat.f_bavail
    };
    Ok(blocks.saturating_mul(stat.f_frsize))
}

/// Whether an error says that there is no room.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}
