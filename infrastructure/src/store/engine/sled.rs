//! sled 0.34.7.
//!
//! Its `flush` does not make data durable on Linux: it calls `sync_file_range`, which writes no
//! metadata and flushes no device cache (spacejam/sled issue 1452). So after each flush we fsync
//! its file through a descriptor of our own, which also reports write errors that happened since
//! it was opened.

use std::fs::{self, File};
use std::path::Path;

use super::{KeyValueEngine, Pair, step};
use crate::store::fault::Fault;
use crate::store::files;
use crate::store::steps::{Step, Steps};

/// sled's log, within its directory.
pub(super) const FILE: &str = "db";

/// State is a few MiB; sled's default of 1 GiB would let it grow without need.
const CACHE_BYTES: u64 = 16 * 1024 * 1024;

pub(super) struct Sled {
    database: sled::Db,
    file: File,
}

impl Sled {
    pub(super) fn open(directory: &Path, create: bool) -> Result<Self, Fault> {
        if create {
            files::make_directory(directory)?;
        } else if !directory.join(FILE).exists() {
            // sled would make an empty store without a word.
            return Err(Fault::Damaged(format!("{FILE} is missing")));
        }
        remove_unfinished_snapshots(directory)?;
        let database = sled::Config::new()
            .path(directory)
            .cache_capacity(CACHE_BYTES)
            .mode(sled::Mode::LowSpace)
            // We flush before every acknowledgement; a flusher thread would only race with it.
            .flush_every_ms(None)
            .open()
            .map_err(convert)?;
        let file = File::open(directory.join(FILE))?;
        files::secure_and_sync_tree(directory)?;
        Ok(Self { database, file })
    }
}

/// sled writes a snapshot of its page table when it opens, under a name that ends so until it is
/// whole. Where that was interrupted (`kill -9`, a full disk) the next opening takes the rest for
/// the newest snapshot and calls the whole store corrupt. The log alone is enough to recover from.
fn remove_unfinished_snapshots(directory: &Path) -> Result<(), Fault> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|end| end == "generating") {
            files::remove(&path)?;
        }
    }
    Ok(())
}

impl KeyValueEngine for Sled {
    fn scan(&self, visit: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), Fault> {
        for pair in self.database.iter() {
            let (key, value) = pair.map_err(convert)?;
            visit(&key, &value);
        }
        Ok(())
    }

    fn commit(&mut self, batch: &[Pair], steps: &dyn Steps) -> Result<(), Fault> {
        step(steps, Step::Apply)?;
        let mut pairs = sled::Batch::default();
        for (key, value) in batch {
            match value {
                Some(value) => pairs.insert(key.as_slice(), value.as_slice()),
                None => pairs.remove(key.as_slice()),
            }
        }
        self.database.apply_batch(pairs).map_err(convert)?;
        step(steps, Step::Flush)?;
        self.database.flush().map_err(convert)?;
        step(steps, Step::Sync)?;
        self.file.sync_all()?;
        steps.done(Step::Sync);
        Ok(())
    }

    fn abandon(self: Box<Self>) {
        // After a failed write sled's own closing waits for ever for a flush that nobody does any
        // more, and its lock stays taken either way (spacejam/sled issue 1289). A few MiB and a
        // descriptor, kept until the process ends, are the lesser evil; the files are replaced.
        std::mem::forget(self);
    }

    fn check(&mut self) -> Result<(), Fault> {
        // Nothing that a scan would not see: every page is read and checksummed by it.
        Ok(())
    }
}

fn convert(error: sled::Error) -> Fault {
    match error {
        sled::Error::Io(error) => {
            let text = error.to_string();
            if text.contains("could not acquire lock") {
                return Fault::Busy(text);
            }
            match Fault::from(error) {
                // sled copies latched errors, keeping the kind and the text.
                Fault::Io(text) if text.contains("No space left") => Fault::Full(text),
                // Errors that sled makes itself speak of the file's contents.
                Fault::Io(text) if !text.contains("os error") && !text.contains("code: ") => {
                    Fault::Damaged(text)
                }
                other => other,
            }
        }
        other => Fault::Damaged(other.to_string()),
    }
}
