//! What every engine must do when nothing goes wrong, and what it must refuse.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use ghost_domain::ErrorCode;
use ghost_domain::ports::Change;
use ghost_infrastructure::store::{Engine, ProbeResult, open, probe};

use super::samples::{
    Model, bulky_vm, credential_id, image, one_of_every_kind, operation_id, put_vm, vm_id,
};
use super::{contents_of, on_both_engines, options, reopen, run, scratch};

on_both_engines!(
    a_first_start_is_empty_and_not_damage,
    every_kind_of_record_is_there_after_reopening,
    the_last_of_two_writes_stands,
    records_are_replaced_and_deleted,
    deleting_what_is_not_there_is_no_error,
    an_oversized_record_is_refused_with_its_whole_batch,
    the_largest_allowed_vm_fits,
    everything_is_private,
    a_closed_store_refuses,
    health_counts_commits,
    exports_are_kept_by_threes,
    concurrent_commits_all_arrive,
    the_files_shrink_when_most_records_are_gone,
    the_disk_does_not_grow_with_updates,
    the_probe_tells_what_is_there,
);

fn a_first_start_is_empty_and_not_damage(engine: Engine) {
    let directory = scratch();
    for _ in 0..2 {
        assert_eq!(
            contents_of(directory.path(), engine),
            Model::default().contents()
        );
    }
}

fn every_kind_of_record_is_there_after_reopening(engine: Engine) {
    let directory = scratch();
    let changes = one_of_every_kind();
    let expected = Model::of(&changes).contents();
    let store = reopen(directory.path(), engine);
    run(async {
        store.commit(changes).await.unwrap();
        assert_eq!(store.load().await.unwrap(), expected);
    });
    // Without `close`: nothing that was acknowledged may depend on it.
    drop(store);
    assert_eq!(contents_of(directory.path(), engine), expected);
}

fn the_last_of_two_writes_stands(engine: Engine) {
    let directory = scratch();
    let store = reopen(directory.path(), engine);
    run(async {
        store
            .commit(vec![
                put_vm(1, 1),
                Change::DeleteVm(vm_id(1)),
                put_vm(1, 3),
                put_vm(2, 1),
                Change::DeleteVm(vm_id(2)),
            ])
            .await
            .unwrap();
    });
    drop(store);
    let contents = contents_of(directory.path(), engine);
    assert_eq!(contents, Model::of(&[put_vm(1, 3)]).contents());
}

fn records_are_replaced_and_deleted(engine: Engine) {
    let directory = scratch();
    let store = reopen(directory.path(), engine);
    run(async {
        store.commit(one_of_every_kind()).await.unwrap();
        store.commit(vec![put_vm(1, 2)]).await.unwrap();
        assert_eq!(store.load().await.unwrap().vms[0].generation, 2);
        let deletes = vec![
            Change::DeleteVm(vm_id(1)),
            Change::DeleteOperation(operation_id(1)),
            Change::DeleteImage(image(1).name),
            Change::DeleteCertificate(credential_id(1)),
            Change::DeleteApiKey(credential_id(1)),
            Change::DeleteJoinToken(credential_id(1)),
        ];
        store.commit(deletes).await.unwrap();
    });
    drop(store);
    let expected = Model::of(&[Change::PutBootId("7e0d1c7a".into())]).contents();
    assert_eq!(contents_of(directory.path(), engine), expected);
}

fn deleting_what_is_not_there_is_no_error(engine: Engine) {
    let directory = scratch();
    let store = reopen(directory.path(), engine);
    run(async {
        store.commit(Vec::new()).await.unwrap();
        store
            .commit(vec![Change::DeleteVm(vm_id(404))])
            .await
            .unwrap();
    });
}

fn an_oversized_record_is_refused_with_its_whole_batch(engine: Engine) {
    let directory = scratch();
    let store = reopen(directory.path(), engine);
    run(async {
        let error = store
            .commit(vec![put_vm(1, 1), bulky_vm(2, 64 * 1024), put_vm(3, 1)])
            .await
            .unwrap_err();
        assert_eq!(error.code(), ErrorCode::PayloadTooLarge);
        assert!(error.cause().unwrap().contains("65536"), "{error}");
        assert_eq!(store.load().await.unwrap().vms, []);
        store.commit(vec![put_vm(1, 1)]).await.unwrap();
    });
    drop(store);
    let expected = Model::of(&[put_vm(1, 1)]).contents();
    assert_eq!(contents_of(directory.path(), engine), expected);
}

/// The greatest user-data and network config that the domain allows leave room to spare.
fn the_largest_allowed_vm_fits(engine: Engine) {
    let directory = scratch();
    let store = reopen(directory.path(), engine);
    let change = bulky_vm(1, 60 * 1024);
    run(async { store.commit(vec![change.clone()]).await.unwrap() });
    drop(store);
    let expected = Model::of(&[change]).contents();
    assert_eq!(contents_of(directory.path(), engine), expected);
}

fn everything_is_private(engine: Engine) {
    fn check(path: &Path) {
        let mode = fs::metadata(path).unwrap().permissions().mode() & 0o777;
        if path.is_dir() {
            assert_eq!(mode, 0o700, "{}", path.display());
            for entry in fs::read_dir(path).unwrap() {
                check(&entry.unwrap().path());
            }
        } else {
            assert_eq!(mode, 0o600, "{}", path.display());
        }
    }
    let directory = scratch();
    let store = reopen(directory.path(), engine);
    run(async {
        for generation in 0..20 {
            store.commit(vec![put_vm(1, generation)]).await.unwrap();
        }
        store.export().await.unwrap();
        check(&directory.path().join("store"));
        store.close().await.unwrap();
    });
    check(&directory.path().join("store"));
    let _store = reopen(directory.path(), engine);
    check(&directory.path().join("store"));
}

fn a_closed_store_refuses(engine: Engine) {
    let directory = scratch();
    let store = reopen(directory.path(), engine);
    run(async {
        store.close().await.unwrap();
        let error = store.commit(vec![put_vm(1, 1)]).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::StoreUnavailable);
        assert!(store.load().await.is_err());
        assert!(store.export().await.is_err());
        let health = store.health().await;
        assert!(!health.writable);
        assert!(health.problem.is_some());
    });
    // The closed handle is still there, and holds nothing any more.
    let again = reopen(directory.path(), engine);
    run(async { again.commit(vec![put_vm(1, 1)]).await.unwrap() });
}

fn health_counts_commits(engine: Engine) {
    let directory = scratch();
    let store = reopen(directory.path(), engine);
    run(async {
        store.commit(vec![put_vm(1, 1)]).await.unwrap();
        store.commit(vec![put_vm(2, 1)]).await.unwrap();
        let health = store.health().await;
        assert_eq!(health.engine, engine.as_str());
        assert!(health.writable);
        assert_eq!(health.problem, None);
        assert_eq!(health.commits, 2);
        assert!(health.commit_seconds > 0.0);
        assert!(health.disk_bytes > 0);
    });
}

fn exports_are_kept_by_threes(engine: Engine) {
    let directory = scratch();
    let store = reopen(directory.path(), engine);
    let exports = || {
        let path = directory.path().join("store/exports");
        let mut names: Vec<_> = fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort_unstable();
        names
    };
    run(async {
        for generation in 0..5 {
            store.commit(vec![put_vm(1, generation)]).await.unwrap();
            store.export().await.unwrap();
            // Nothing changed: no further file.
            store.export().await.unwrap();
        }
        let kept = exports();
        assert_eq!(kept.len(), 3, "{kept:?}");
        store.commit(vec![put_vm(1, 9)]).await.unwrap();
        store.close().await.unwrap();
        let after = exports();
        assert_eq!(after.len(), 3, "{after:?}");
        assert_eq!(after[..2], kept[1..], "closing exports once more");
    });
}

fn concurrent_commits_all_arrive(engine: Engine) {
    let directory = scratch();
    let store = reopen(directory.path(), engine);
    run(async {
        let commits = (0..64).map(|number| {
            let store = &store;
            async move {
                for generation in 0..5 {
                    store
                        .commit(vec![
                            put_vm(number, generation),
                            put_vm(1000 + number, generation),
                        ])
                        .await
                        .unwrap();
                }
            }
        });
        futures::future::join_all(commits).await;
        assert_eq!(store.health().await.commits, 64 * 5);
    });
    drop(store);
    let contents = contents_of(directory.path(), engine);
    assert_eq!(contents.vms.len(), 128);
    assert!(contents.vms.iter().all(|vm| vm.generation == 4));
}

fn the_files_shrink_when_most_records_are_gone(engine: Engine) {
    let directory = scratch();
    let mut small = options(directory.path(), engine);
    small.limits.compact_floor = 1 << 20;
    let store = open(small.clone()).unwrap();
    let before = run(async {
        let bulk: Vec<_> = (0..300).map(|number| bulky_vm(number, 30_000)).collect();
        for chunk in bulk.chunks(20) {
            store.commit(chunk.to_vec()).await.unwrap();
        }
        let deletes = (1..300).map(|number| Change::DeleteVm(vm_id(number)));
        store.commit(deletes.collect()).await.unwrap();
        store.close().await.unwrap();
        disk_usage(directory.path())
    });
    let store = open(small).unwrap();
    let after = disk_usage(directory.path());
    assert!(after < before / 2, "{before} -> {after}");
    run(async {
        let expected = Model::of(&[bulky_vm(0, 30_000)]).contents();
        assert_eq!(store.load().await.unwrap(), expected);
        store.commit(vec![put_vm(5, 5)]).await.unwrap();
    });
    drop(store);
    assert_eq!(contents_of(directory.path(), engine).vms.len(), 2);
}

fn the_disk_does_not_grow_with_updates(engine: Engine) {
    const UPDATES: u64 = 20_000;
    const RECORDS: u64 = 200;
    let directory = scratch();
    let store = reopen(directory.path(), engine);
    let (early, late) = run(async {
        let mut early = 0;
        // By hundreds, as many callers at once make them: one by one would measure fsync.
        for round in 0..UPDATES / 100 {
            let commits = (0..100).map(|at| {
                let number = (round * 100 + at) % RECORDS;
                store.commit(vec![put_vm(number, round)])
            });
            for outcome in futures::future::join_all(commits).await {
                outcome.unwrap();
            }
            if round == 20 {
                early = disk_usage(directory.path());
            }
        }
        (early, disk_usage(directory.path()))
    });
    // The 200 records have about 100 KiB; nine tenths of the updates came after `early`.
    assert!(late < 24 << 20, "{late} bytes");
    assert!(late < early + (12 << 20), "{early} -> {late}");
    drop(store);
    assert_eq!(contents_of(directory.path(), engine).vms.len(), 200);
}

fn disk_usage(directory: &Path) -> u64 {
    fn sum(path: &Path) -> u64 {
        fs::read_dir(path)
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let metadata = entry.metadata().unwrap();
                if metadata.is_dir() {
                    sum(&entry.path())
                } else {
                    metadata.len()
                }
            })
            .sum()
    }
    sum(&directory.join("store/state"))
}

fn the_probe_tells_what_is_there(engine: Engine) {
    let directory = scratch();
    let state = directory.path().join("store/state");
    assert!(matches!(probe(&state), ProbeResult::Unusable(_)));
    let store = reopen(directory.path(), engine);
    run(async { store.commit(one_of_every_kind()).await.unwrap() });
    drop(store);
    assert!(matches!(
        probe(&state),
        ProbeResult::Sound { records: 7, .. }
    ));
}

/// Records as schema version 1 wrote them, one of every kind. They must be readable for ever: a new
/// version adds a file and a test beside these. Made by `GHOST_STORE_FIXTURE_WRITE=1` with this
/// test, when version 1 was frozen.
#[test]
fn records_of_schema_version_1_are_read() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/store/fixtures/v1.cbor");
    let changes = one_of_every_kind();
    if std::env::var_os("GHOST_STORE_FIXTURE_WRITE").is_some() {
        let directory = scratch();
        let store = reopen(directory.path(), Engine::Sled);
        run(async {
            store.commit(changes.clone()).await.unwrap();
            store.export().await.unwrap();
        });
        let exports = fs::read_dir(directory.path().join("store/exports")).unwrap();
        let export = exports.map(|entry| entry.unwrap().path()).next().unwrap();
        fs::copy(export, &fixture).unwrap();
    }
    for engine in Engine::ALL {
        let directory = scratch();
        let exports = directory.path().join("store/exports");
        fs::create_dir_all(&exports).unwrap();
        fs::copy(&fixture, exports.join("export-00000000000000000002.cbor")).unwrap();
        let mut contents = contents_of(directory.path(), engine);
        assert!(contents.damage.take().unwrap().contains("7 records"));
        assert_eq!(contents, Model::of(&changes).contents(), "{engine}");
    }
}

/// A store changes its engine without losing anything, and back.
#[test]
fn the_engine_can_be_changed_by_configuration() {
    let directory = scratch();
    let store = reopen(directory.path(), Engine::Sled);
    let changes = one_of_every_kind();
    let mut model = Model::of(&changes);
    run(async { store.commit(changes).await.unwrap() });
    drop(store);
    for (number, engine) in [(2, Engine::Redb), (3, Engine::Sled), (4, Engine::Redb)] {
        let store = reopen(directory.path(), engine);
        run(async {
            assert_eq!(store.load().await.unwrap(), model.contents(), "{engine}");
            assert_eq!(store.health().await.engine, engine.as_str());
            store.commit(vec![put_vm(number, 1)]).await.unwrap();
            model.apply(&[put_vm(number, 1)]);
        });
        drop(store);
    }
}

#[test]
fn a_directory_that_cannot_be_made_is_a_clear_error() {
    let directory = scratch();
    fs::write(directory.path().join("store"), "a file").unwrap();
    let Err(error) = open(options(directory.path(), Engine::Sled)) else {
        panic!("a store was opened in a file");
    };
    assert_eq!(error.code(), ErrorCode::StoreUnavailable);
    assert!(error.hint_text().is_some());
}
