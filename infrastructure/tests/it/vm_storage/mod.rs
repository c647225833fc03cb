//! The VMs' folders from outside.

mod console;
mod disk;
pub(crate) mod inject;
mod log;
mod seed;

use ghost_infrastructure::guest_link::GuestProgram;
use ghost_infrastructure::vm_storage::{DirectoryVmStorage, VmStorageOptions};
use tempfile::TempDir;

/// A storage in a folder of its own.
struct Fixture {
    folder: TempDir,
    storage: DirectoryVmStorage,
}

impl Fixture {
    fn new() -> Self {
        Self::with_program(GuestProgram::none())
    }

    fn with_program(guest_program: GuestProgram) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let storage = DirectoryVmStorage::open(VmStorageOptions {
            guest_program,
            ..VmStorageOptions::new(folder.path())
        })
        .unwrap();
        Self { folder, storage }
    }
}
