//! The console log, across virtlogd's rotations.
//!
//! virtlogd keeps `console.log` and renames it to `.0` when it is full, `.0` to `.1` and so on
//! (libvirt's `virrotatingfile.c`); a file that is being read lives on under its next name. The
//! reader keeps the open file, reads it to its end, and only then goes on to the next newer one.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use ghost_domain::Result;
use ghost_domain::ports::LogReader;

use crate::images::files::{blocking, io_error, open_plain};

/// More backups than any sensible `max_backups` of virtlogd.
const MAX_BACKUPS: usize = 100;
const CHUNK: usize = 64 * 1024;

#[derive(Clone, Debug)]
struct Current {
    file: Arc<File>,
    inode: u64,
    position: u64,
}

/// A place in a rotated log. Not there yet is an empty log.
#[derive(Clone, Debug)]
pub(super) struct RotatedLog {
    path: PathBuf,
    current: Option<Current>,
}

fn backup(path: &Path, index: usize) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{index}"));
    PathBuf::from(name)
}

fn open_at(path: &Path, position: u64) -> io::Result<Option<Current>> {
    let file = match open_plain(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ));
    }
    Ok(Some(Current {
        file: Arc::new(file),
        inode: metadata.ino(),
        position,
    }))
}

fn inode_of(path: &Path) -> io::Result<Option<u64>> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(metadata.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The newest file there is: just after a rotation, before the first write, that is `.0`.
fn newest(path: &Path) -> io::Result<Option<u64>> {
    match inode_of(path)? {
        None => inode_of(&backup(path, 0)),
        found => Ok(found),
    }
}

impl RotatedLog {
    /// Opens at the last `tail` bytes, or at the oldest byte that is left.
    pub(super) fn open(path: PathBuf, tail: Option<u64>) -> Result<Self> {
        let failed = |error: io::Error| io_error("read", &path, &error);
        let current = Self::start(&path, tail).map_err(failed)?;
        Ok(Self { path, current })
    }

    fn start(path: &Path, tail: Option<u64>) -> io::Result<Option<Current>> {
        // Open newest first, so that a rotation meanwhile can only make us see a file twice, and
        // the inode tells that.
        let mut newest_first: Vec<Current> = Vec::new();
        let mut bytes = 0u64;
        let names =
            std::iter::once(path.to_owned()).chain((0..MAX_BACKUPS).map(|i| backup(path, i)));
        for (index, name) in names.enumerate() {
            let Some(mut current) = open_at(&name, 0)? else {
                // Just after a rotation, before the first write, only `.0` is there.
                if index == 0 {
                    continue;
                }
                break;
            };
            if newest_first.iter().any(|seen| seen.inode == current.inode) {
                continue;
            }
            let length = current.file.metadata()?.len();
            bytes = bytes.saturating_add(length);
            let enough = tail.is_some_and(|tail| bytes >= tail);
            if let Some(tail) = tail.filter(|_| enough) {
                current.position = bytes - tail;
            }
            newest_first.push(current);
            if enough {
                break;
            }
        }
        Ok(newest_first.pop())
    }

    fn next_bytes(&mut self) -> io::Result<Vec<u8>> {
        // Ends: every turn either returns or goes one file newer.
        for _ in 0..=MAX_BACKUPS + 1 {
            let Some(current) = &mut self.current else {
                self.current = open_at(&self.path, 0)?;
                if self.current.is_none() {
                    return Ok(Vec::new());
                }
                continue;
            };
            // Asked before the read: what the writer put in before it rotated is then read.
            let rotated = newest(&self.path)?.is_some_and(|inode| inode != current.inode);
            let bytes = read_some(current)?;
            if !bytes.is_empty() || !rotated {
                return Ok(bytes);
            }
            let next = Self::next_newer(&self.path, current.inode)?;
            self.current = next;
        }
        Ok(Vec::new())
    }

    /// The file after the one with this inode; the oldest one if that is gone.
    fn next_newer(path: &Path, inode: u64) -> io::Result<Option<Current>> {
        let mut oldest = None;
        for index in 0..MAX_BACKUPS {
            let name = backup(path, index);
            match inode_of(&name)? {
                None => break,
                Some(found) if found == inode => {
                    return match index.checked_sub(1) {
                        None => open_at(path, 0),
                        Some(newer) => open_at(&backup(path, newer), 0),
                    };
                }
                Some(_) => oldest = Some(name),
            }
        }
        oldest.map_or_else(|| open_at(path, 0), |name| open_at(&name, 0))
    }
}

fn read_some(current: &mut Current) -> io::Result<Vec<u8>> {
    // Emptied in place (libvirt with append='off'): start over.
    if current.file.metadata()?.len() < current.position {
        current.position = 0;
    }
    let mut bytes = vec![0; CHUNK];
    let count = current.file.read_at(&mut bytes, current.position)?;
    bytes.truncate(count);
    current.position += count as u64;
    Ok(bytes)
}

#[async_trait]
impl LogReader for RotatedLog {
    async fn read(&mut self) -> Result<Vec<u8>> {
        // The place goes to the worker and comes back with the bytes: a dropped read loses none.
        let mut place = self.clone();
        let (bytes, place) = blocking(move |_| match place.next_bytes() {
            Ok(bytes) => Ok((bytes, place)),
            Err(error) => Err(io_error("read", &place.path, &error)),
        })
        .await?;
        *self = place;
        Ok(bytes)
    }
}
