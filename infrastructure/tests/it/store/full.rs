//! A full disk: a small file system of its own, filled to the last byte.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use ghost_domain::ErrorCode;
use ghost_domain::ports::{Change, StateStore};
use ghost_infrastructure::store::{Engine, StoreOptions, open};
use tempfile::{TempDir, tempdir};

use super::samples::{Model, bulky_vm, put_vm, vm_id};
use super::{on_both_engines, options, run};

on_both_engines!(
    deleting_works_on_a_full_disk,
    a_store_that_ran_out_of_room_heals_without_a_restart,
    an_engine_that_hit_the_end_of_the_disk_heals_without_a_restart,
    a_store_opens_on_a_full_disk,
);

/// A tmpfs of its own, unmounted when the test ends.
struct SmallDisk {
    directory: TempDir,
}

impl SmallDisk {
    /// `None`, with the reason printed, where this machine lets us mount nothing.
    fn mount() -> Option<Self> {
        let directory = tempdir().unwrap();
        let output = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=32m", "ghost-store-test"])
            .arg(directory.path())
            .output();
        match output {
            Ok(output) if output.status.success() => Some(Self { directory }),
            Ok(output) => {
                let why = String::from_utf8_lossy(&output.stderr);
                println!(
                    "SKIPPED: no small file system can be mounted: {}",
                    why.trim()
                );
                None
            }
            Err(error) => {
                println!("SKIPPED: mount cannot be run: {error}");
                None
            }
        }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn filler(&self) -> PathBuf {
        self.path().join("filler")
    }

    /// Takes every byte that is left.
    fn fill(&self) {
        let mut filler = File::options()
            .create(true)
            .append(true)
            .open(self.filler())
            .unwrap();
        for size in [1 << 16, 1 << 12, 1] {
            while filler.write_all(&vec![1; size]).is_ok() {}
        }
    }

    fn free_up(&self) {
        fs::remove_file(self.filler()).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .arg("-l")
            .arg(self.directory.path())
            .output();
    }
}

fn roomy_reserve(directory: &Path, engine: Engine) -> StoreOptions {
    let mut options = options(directory, engine);
    options.ballast_bytes = 6 << 20;
    options
}

fn deleting_works_on_a_full_disk(engine: Engine) {
    let Some(disk) = SmallDisk::mount() else {
        return;
    };
    let store = open(roomy_reserve(disk.path(), engine)).unwrap();
    run(async {
        for number in 0..40 {
            store.commit(vec![put_vm(number, 1)]).await.unwrap();
        }
        disk.fill();
        // Many more than fit into what the engine has already allocated.
        for number in 0..40 {
            for generation in 2..12 {
                store
                    .commit(vec![put_vm(number, generation)])
                    .await
                    .unwrap();
            }
            let delete = vec![Change::DeleteVm(vm_id(number))];
            store.commit(delete).await.unwrap();
        }
        assert!(store.health().await.writable);
    });
    drop(store);
    disk.free_up();
    assert_eq!(contents(&disk, engine), Model::default());
}

fn a_store_that_ran_out_of_room_heals_without_a_restart(engine: Engine) {
    run_out_of_room(engine, None);
}

/// Without our look at the free space the engine itself meets `ENOSPC`, in the midst of a commit.
fn an_engine_that_hit_the_end_of_the_disk_heals_without_a_restart(engine: Engine) {
    run_out_of_room(engine, Some(0));
}

fn run_out_of_room(engine: Engine, room: Option<u64>) {
    let Some(disk) = SmallDisk::mount() else {
        return;
    };
    let mut options = roomy_reserve(disk.path(), engine);
    if let Some(room) = room {
        options.limits.room = room;
    }
    let store = open(options).unwrap();
    let mut model = Model::default();
    run(async {
        let mut number = 0;
        for round in 0..3 {
            // More than the disk has: the reserve is used up too, and then commits fail.
            loop {
                disk.fill();
                number += 1;
                assert!(number < 10_000, "the disk never fills");
                let changes = vec![bulky_vm(number, 50_000), put_vm(number + 1_000_000, 1)];
                let refused = match store.commit(changes.clone()).await {
                    Ok(()) => {
                        model.apply(&changes);
                        continue;
                    }
                    Err(refused) => refused,
                };
                assert_eq!(refused.code(), ErrorCode::StoreUnavailable, "{refused}");
                assert!(refused.hint_text().is_some() && refused.retry_delay().is_some());
                // Nothing of what was refused is there, and reading goes on.
                assert_eq!(store.load().await.unwrap(), model.contents());
                // Closing and reopening may have freed a page, so that it can write again.
                let health = store.health().await;
                if !health.writable {
                    assert!(health.problem.is_some());
                    break;
                }
            }
            disk.free_up();
            if round == 0 {
                // Looking at its health is enough.
                let health = store.health().await;
                assert!(health.writable, "{health:?}");
            }
            let change = vec![put_vm(500 + round, round)];
            store.commit(change.clone()).await.unwrap();
            model.apply(&change);
            assert_eq!(store.load().await.unwrap(), model.contents());
            // Deletes make room for the next round.
            let deletes: Vec<_> = (1..=number)
                .map(|number| Change::DeleteVm(vm_id(number)))
                .collect();
            store.commit(deletes.clone()).await.unwrap();
            model.apply(&deletes);
        }
    });
    drop(store);
    assert_eq!(contents(&disk, engine), model);
}

fn a_store_opens_on_a_full_disk(engine: Engine) {
    let Some(disk) = SmallDisk::mount() else {
        return;
    };
    let store = open(roomy_reserve(disk.path(), engine)).unwrap();
    let changes: Vec<_> = (0..50).map(|number| put_vm(number, 1)).collect();
    run(store.commit(changes.clone())).unwrap();
    drop(store);
    disk.fill();
    let store = open(roomy_reserve(disk.path(), engine)).unwrap();
    run(async {
        let contents = store.load().await.unwrap();
        assert_eq!(contents, Model::of(&changes).contents());
        let delete = vec![Change::DeleteVm(vm_id(3))];
        store.commit(delete).await.unwrap();
    });
}

/// What a fresh opening finds, as a model.
fn contents(disk: &SmallDisk, engine: Engine) -> Model {
    let store = open(roomy_reserve(disk.path(), engine)).unwrap();
    let contents = run(store.load()).unwrap();
    assert_eq!(contents.damage, None);
    let changes: Vec<_> = contents
        .vms
        .into_iter()
        .map(|vm| Change::PutVm(Box::new(vm)))
        .collect();
    Model::of(&changes)
}

/// `Arc<dyn StateStore>` is what the agent holds; it must be usable from any thread.
#[test]
fn a_store_can_be_shared() {
    fn check<T: Send + Sync + ?Sized>() {}
    check::<dyn StateStore>();
}
