//! Files that hold keys: private, whole or absent, and durable.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rustix::fs::OFlags;

/// More than any certificate or key of ours; a larger file is not one.
const MOST_BYTES: u64 = 64 * 1024;

/// Makes the folder with mode 0700 (its parents as they come), and takes away what others may do
/// with it where it is there already.
pub(crate) fn private_folder(folder: &Path) -> io::Result<()> {
    if let Some(parent) = folder.parent() {
        fs::create_dir_all(parent)?;
    }
    match DirBuilder::new().mode(0o700).create(folder) {
        Ok(()) => {
            if let Some(parent) = folder.parent() {
                File::open(parent)?.sync_all()?;
            }
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    let metadata = fs::symlink_metadata(folder)?;
    if !metadata.is_dir() {
        return Err(io::Error::new(
            io::ErrorKind::NotADirectory,
            "it is not a folder",
        ));
    }
    if metadata.mode() & 0o077 != 0 {
        fs::set_permissions(folder, Permissions::from_mode(0o700))?;
    }
    Ok(())
}

/// Reads a small file, never through a symbolic link; `None` where there is none.
pub(crate) fn read(path: &Path) -> io::Result<Option<String>> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(path);
    let file = match file {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut text = String::new();
    file.take(MOST_BYTES).read_to_string(&mut text)?;
    Ok(Some(text))
}

/// Takes a key away from everybody but its owner; says whether it was open to others.
pub(crate) fn tighten(path: &Path) -> io::Result<bool> {
    let open = fs::metadata(path)?.mode() & 0o077 != 0;
    if open {
        fs::set_permissions(path, Permissions::from_mode(0o600))?;
    }
    Ok(open)
}

/// Writes a file whole: beside it, synced, renamed over it, and its folder synced. After a crash
/// at any point the old content stands or the new one does.
pub(crate) fn write(folder: &Path, name: &str, mode: u32, content: &str) -> io::Result<()> {
    let beside = folder.join(format!(".{name}.new"));
    // What a crash left behind; it was never read.
    match fs::remove_file(&beside) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&beside)
        .and_then(|mut file| {
            file.write_all(content.as_bytes())?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&beside, folder.join(name)))
        .and_then(|()| File::open(folder)?.sync_all());
    if written.is_err() {
        // The error that matters is the one above; what stays is removed at the next start.
        drop(fs::remove_file(&beside));
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_private_and_replaces_what_a_crash_left() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("a/identity");
        private_folder(&folder).unwrap();
        fs::write(folder.join(".key.new"), "half").unwrap();
        write(&folder, "key", 0o600, "whole").unwrap();
        assert_eq!(read(&folder.join("key")).unwrap().as_deref(), Some("whole"));
        assert!(!folder.join(".key.new").exists());
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!(mode(&folder), 0o700);
        assert_eq!(mode(&folder.join("key")), 0o600);
    }

    #[test]
    fn an_open_folder_or_key_is_closed() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("identity");
        fs::create_dir(&folder).unwrap();
        fs::set_permissions(&folder, Permissions::from_mode(0o755)).unwrap();
        private_folder(&folder).unwrap();
        assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o777, 0o700);

        write(&folder, "key", 0o644, "x").unwrap();
        assert!(tighten(&folder.join("key")).unwrap());
        assert!(!tighten(&folder.join("key")).unwrap());
    }

    #[test]
    fn a_link_is_not_followed() {
        let root = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc/hostname", root.path().join("key")).unwrap();
        assert!(read(&root.path().join("key")).is_err());
        assert_eq!(read(&root.path().join("absent")).unwrap(), None);
    }
}
