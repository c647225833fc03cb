//! A file that only takes up room. When the disk is full it is removed, so that the state, above
//! all the deletion of VMs, can still be written.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};

use super::fault::Fault;
use super::files;

/// The ballast of one store.
#[derive(Debug)]
pub(super) struct Ballast {
    path: PathBuf,
    bytes: u64,
}

impl Ballast {
    pub(super) const fn new(path: PathBuf, bytes: u64) -> Self {
        Self { path, bytes }
    }

    /// Frees its room; whether there was some to free.
    pub(super) fn release(&mut self) -> bool {
        let there = self.stands();
        if there && let Err(error) = files::remove(&self.path) {
            tracing::error!(%error, "cannot remove the state store's reserve");
            return false;
        }
        there
    }

    /// Makes sure that `room` bytes are free, giving the ballast up for them where that is needed.
    ///
    /// # Errors
    /// [`Fault::Full`] where even that does not suffice. What the file system does not tell is no
    /// reason to refuse.
    pub(super) fn make_room(&mut self, room: u64) -> Result<(), Fault> {
        let directory = self.path.parent().unwrap_or(Path::new("/")).to_owned();
        let free = || files::free_bytes(&directory).unwrap_or(u64::MAX);
        if free() >= room {
            return Ok(());
        }
        if self.release() {
            tracing::warn!("the disk is full; the state store uses its reserve");
        }
        let left = free();
        if left >= room {
            return Ok(());
        }
        Err(Fault::Full(format!(
            "{left} bytes are free on the file system of {}, and at least {room} are needed",
            directory.display()
        )))
    }

    /// Whether it is in place.
    pub(super) fn stands(&self) -> bool {
        self.path.exists()
    }

    /// Takes up its room again, where that leaves as much free once more: else the state itself
    /// would be at the brink at once.
    pub(super) fn restore(&mut self) {
        if self.bytes == 0 || self.stands() {
            return;
        }
        let directory = self.path.parent().unwrap_or(Path::new("/"));
        let roomy =
            files::free_bytes(directory).is_ok_and(|free| free >= self.bytes.saturating_mul(2));
        if roomy && let Err(error) = self.create() {
            tracing::warn!(%error, "cannot set up the state store's reserve");
            let _ = files::remove(&self.path);
        }
    }

    fn create(&self) -> io::Result<()> {
        let file = files::private()
            .write(true)
            .create_new(true)
            .open(&self.path)?;
        // Allocated, not sparse: a hole would free nothing.
        match fallocate(&file, FallocateFlags::empty(), 0, self.bytes) {
            Ok(()) => {}
            // Not every file system can; written zeros take up room everywhere.
            Err(rustix::io::Errno::OPNOTSUPP) => {
                io::copy(&mut io::repeat(0).take(self.bytes), &mut &file)?;
            }
            Err(error) => return Err(error.into()),
        }
        file.sync_all()?;
        files::sync_parent(&self.path)
    }
}
