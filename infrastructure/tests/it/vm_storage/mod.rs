//! The VMs' folders from outside.

mod console;
mod disk;
mod log;
mod seed;

use ghost_infrastructure::vm_storage::{DirectoryVmStorage, VmStorageOptions};
use tempfile::TempDir;

/// A storage in a folder of its own.
struct Fixture {
    folder: TempDir,
    storage: DirectoryVmStorage,
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let storage = DirectoryVmStorage::open(VmStorageOptions::new(folder.path())).unwrap();
        Self { folder, storage }
    }
}
