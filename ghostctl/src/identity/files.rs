//! Files that hold secrets: private from their first byte, replaced by rename, durable.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use uuid::Uuid;

/// A name beside `path` that no other process uses, and that no context can have.
fn beside(path: &Path, what: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{what}-{}", Uuid::new_v4().simple()))
}

fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

fn make_private_folder(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
}

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// Puts a file in place of another: a reader sees the old one or the new one, whole.
pub(crate) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        make_private_folder(parent)?;
    }
    let new = beside(path, "new");
    let done = write_private(&new, content)
        .and_then(|()| fs::rename(&new, path))
        .and_then(|()| sync_parent(path));
    if done.is_err() {
        // Best effort: the error that matters is the one that led here.
        let _ = fs::remove_file(&new);
    }
    done
}

/// Puts a folder with these files in place of another.
pub(crate) fn replace_folder(path: &Path, contents: &[(&str, &[u8])]) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        make_private_folder(parent)?;
    }
    let new = beside(path, "new");
    let old = beside(path, "old");
    let done = make_private_folder(&new)
        .and_then(|()| {
            contents
                .iter()
                .try_for_each(|(name, content)| write_private(&new.join(name), content))
        })
        .and_then(|()| match fs::rename(path, &old) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        })
        .and_then(|()| fs::rename(&new, path))
        .and_then(|()| sync_parent(path));
    // What is left of either is of no use; the error that matters is the one above.
    let _ = fs::remove_dir_all(&new);
    let _ = fs::remove_dir_all(&old);
    done
}
