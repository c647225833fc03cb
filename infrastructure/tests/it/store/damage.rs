//! Damaged, missing and older files: noticed, set aside, replaced, and told.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ghost_domain::ErrorCode;
use ghost_domain::ports::{Change, StoreContents};
use ghost_infrastructure::store::{Engine, Helper, open};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tempfile::TempDir;

use super::samples::{Model, one_of_every_kind, operation, put_vm};
use super::{
    children, contents_of, hush_engine_panics, on_both_engines, options, reopen, run, scratch,
};

on_both_engines!(
    no_damaged_file_goes_unnoticed,
    the_helper_finds_a_sound_store_sound,
    an_older_copy_is_noticed,
    an_older_copy_is_noticed_by_the_exports_alone,
    the_state_of_another_store_is_refused,
    a_missing_state_is_damage,
    damage_is_told_until_it_is_resolved,
    a_damaged_export_is_passed_over,
    a_damaged_sidecar_is_told_and_loses_nothing,
    a_helper_that_dies_or_hangs_means_damage,
    a_helper_that_cannot_run_is_done_without,
    records_of_a_newer_version_are_left_alone,
);

/// A store with an export, and with changes after it.
struct Pristine {
    directory: TempDir,
    exported: StoreContents,
    newest: StoreContents,
}

impl Pristine {
    fn new(engine: Engine) -> Self {
        hush_engine_panics();
        let directory = scratch();
        let store = reopen(directory.path(), engine);
        let mut model = Model::default();
        let (exported, newest) = run(async {
            let mut apply = async |changes: Vec<Change>| {
                model.apply(&changes);
                store.commit(changes).await.unwrap();
                model.contents()
            };
            apply(one_of_every_kind()).await;
            for number in 0..40 {
                let operation = Change::PutOperation(Box::new(operation(number)));
                apply(vec![put_vm(number, 1), operation]).await;
            }
            let exported = apply(vec![put_vm(100, 1)]).await;
            store.export().await.unwrap();
            for number in 20..60 {
                apply(vec![put_vm(number, 2)]).await;
            }
            (exported, apply(vec![put_vm(100, 2)]).await)
        });
        // Not closed: that would export the newest state, and hide what recovery loses.
        drop(store);
        Self {
            directory,
            exported,
            newest,
        }
    }

    fn copy(&self) -> TempDir {
        let copy = scratch();
        copy_directory(self.directory.path(), copy.path());
        copy
    }
}

fn copy_directory(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_directory(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn files_below(path: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(path)
        .unwrap()
        .flat_map(|entry| {
            let path = entry.unwrap().path();
            if path.is_dir() {
                files_below(&path)
            } else {
                vec![path]
            }
        })
        .collect();
    files.sort_unstable();
    files
}

/// Damages one file of the engine, in a way that `random` chooses; says what it did.
fn damage(state: &Path, random: &mut StdRng) -> String {
    let files: Vec<_> = files_below(state)
        .into_iter()
        .filter(|path| fs::metadata(path).unwrap().len() > 0)
        .collect();
    // The data file is hit most often; the small ones beside it now and then.
    let largest = files
        .iter()
        .max_by_key(|path| fs::metadata(path).unwrap().len())
        .unwrap();
    let path = if random.random_ratio(1, 5) {
        &files[random.random_range(0..files.len())]
    } else {
        largest
    };
    let mut bytes = fs::read(path).unwrap();
    // Most of a preallocated file is zeros, where damage means nothing: hit what was written.
    let used = bytes
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(1, |at| at + 1);
    let what = match random.random_range(0..10) {
        0..4 => {
            let flips = random.random_range(1..=8);
            for _ in 0..flips {
                let at = random.random_range(0..used);
                bytes[at] ^= 1 << random.random_range(0..8);
            }
            format!("{flips} bits flipped")
        }
        4..6 => {
            let length = random.random_range(0..used);
            bytes.truncate(length);
            format!("cut to {length}")
        }
        6..8 => {
            let page = random.random_range(0..used.div_ceil(4096)) * 4096;
            let end = (page + 4096).min(bytes.len());
            bytes[page..end].fill(0);
            format!("zeros at {page}")
        }
        8 => {
            let at = random.random_range(0..used);
            let end = (at + random.random_range(1..2000)).min(bytes.len());
            random.fill(&mut bytes[at..end]);
            format!("garbage at {at}..{end}")
        }
        _ => {
            // A page of the file at the place of another, as a disk that writes astray does.
            let pages = used.div_ceil(4096);
            let (from, to) = (random.random_range(0..pages), random.random_range(0..pages));
            let page: Vec<u8> = bytes[from * 4096..].iter().copied().take(4096).collect();
            for (at, byte) in page.into_iter().enumerate() {
                if let Some(target) = bytes.get_mut(to * 4096 + at) {
                    *target = byte;
                }
            }
            format!("page {from} also at {to}")
        }
    };
    fs::write(path, bytes).unwrap();
    format!("{what} in {}", path.file_name().unwrap().display())
}

fn without_damage(contents: &StoreContents) -> StoreContents {
    StoreContents {
        damage: None,
        ..contents.clone()
    }
}

const SEEDS: u64 = 220;

/// Whatever was damaged: either nothing is lost, or the loss is told and the export is there. With
/// the helper, as the agent does it: some damage makes sled loop for ever, which in a thread of
/// this process would also stop every other sled in it.
fn no_damaged_file_goes_unnoticed(engine: Engine) {
    let pristine = Pristine::new(engine);
    let (mut recovered, mut intact) = (0, 0);
    for seed in 0..SEEDS {
        let copy = pristine.copy();
        let mut random = StdRng::seed_from_u64(seed);
        let what = damage(&copy.path().join("store/state"), &mut random);
        let mut options = options(copy.path(), engine);
        options.helper = Some(children::helper());
        options.limits.open = Duration::from_secs(5);
        let store =
            open(options).unwrap_or_else(|error| panic!("seed {seed}, {what}: {error:?} {error}"));
        let contents = run(store.load()).unwrap();
        let records = without_damage(&contents);
        match &contents.damage {
            None => {
                assert!(
                    records == pristine.newest,
                    "seed {seed}, {what}: silent loss"
                );
                intact += 1;
            }
            Some(_) => {
                assert!(
                    records == pristine.exported || records == pristine.newest,
                    "seed {seed}, {what}: neither the newest nor the exported records"
                );
                recovered += 1;
            }
        }
        // What is there now takes writes and keeps them.
        if seed % 10 == 0 {
            run(store.commit(vec![put_vm(777, 7)])).unwrap();
            drop(store);
            let again = contents_of(copy.path(), engine);
            assert_eq!(again.damage, contents.damage, "seed {seed}, {what}");
            assert_eq!(
                again.vms.len(),
                contents.vms.len() + 1,
                "seed {seed}, {what}"
            );
        }
    }
    println!("{engine}: {recovered} damaged files recovered from, {intact} with nothing lost");
    assert!(recovered >= SEEDS / 3, "the damage hardly ever did any");
}

/// redb without the helper: it panics, and nothing of that escapes.
#[test]
fn without_a_helper_panics_are_caught() {
    let pristine = Pristine::new(Engine::Redb);
    let mut recovered = 0;
    for seed in 1000..1040 {
        let copy = pristine.copy();
        let mut random = StdRng::seed_from_u64(seed);
        let what = damage(&copy.path().join("store/state"), &mut random);
        let contents = contents_of(copy.path(), Engine::Redb);
        let records = without_damage(&contents);
        let expected = match &contents.damage {
            None => records == pristine.newest,
            Some(_) => records == pristine.exported || records == pristine.newest,
        };
        assert!(expected, "seed {seed}, {what}: {:?}", contents.damage);
        recovered += u32::from(contents.damage.is_some());
    }
    assert!(recovered > 5, "the damage hardly ever did any");
}

/// What is sound stays so, and nothing is told that is not.
fn the_helper_finds_a_sound_store_sound(engine: Engine) {
    let pristine = Pristine::new(engine);
    let mut options = options(pristine.directory.path(), engine);
    options.helper = Some(children::helper());
    let store = open(options).unwrap();
    assert_eq!(run(store.load()).unwrap(), pristine.newest);
}

fn an_older_copy_is_noticed(engine: Engine) {
    let pristine = Pristine::new(engine);
    let directory = pristine.copy();
    let state = directory.path().join("store/state");
    let store = reopen(directory.path(), engine);
    run(store.commit(vec![put_vm(5, 5)])).unwrap();
    drop(store);
    fs::remove_dir_all(&state).unwrap();
    copy_directory(&pristine.directory.path().join("store/state"), &state);
    let contents = contents_of(directory.path(), engine);
    let damage = contents.damage.clone().expect("the copy is noticed");
    assert!(damage.contains("older than"), "{damage}");
    assert!(damage.contains("state.corrupt-"), "{damage}");
    assert_eq!(without_damage(&contents), pristine.exported);
}

fn an_older_copy_is_noticed_by_the_exports_alone(engine: Engine) {
    let pristine = Pristine::new(engine);
    let directory = pristine.copy();
    let root = directory.path().join("store");
    let store = reopen(directory.path(), engine);
    let expected = run(async {
        store.commit(vec![put_vm(5, 5)]).await.unwrap();
        store.close().await.unwrap();
        let mut model = pristine.newest.clone();
        model.vms.retain(|vm| vm.name.as_str() != "vm-5");
        model
    });
    // Somebody restored the state and the sidecar together, as a backup of the files would.
    fs::remove_dir_all(root.join("state")).unwrap();
    let backup = pristine.directory.path().join("store");
    copy_directory(&backup.join("state"), &root.join("state"));
    fs::copy(backup.join("sequence"), root.join("sequence")).unwrap();
    let mut contents = contents_of(directory.path(), engine);
    let damage = contents.damage.take().expect("the copy is noticed");
    assert!(damage.contains("older than"), "{damage}");
    assert!(contents.vms.iter().any(|vm| vm.generation == 5));
    contents.vms.retain(|vm| vm.generation != 5);
    assert_eq!(contents, expected);
}

fn the_state_of_another_store_is_refused(engine: Engine) {
    let (one, other) = (Pristine::new(engine), Pristine::new(engine));
    let directory = one.copy();
    let state = directory.path().join("store/state");
    fs::remove_dir_all(&state).unwrap();
    copy_directory(&other.directory.path().join("store/state"), &state);
    let contents = contents_of(directory.path(), engine);
    let damage = contents.damage.clone().expect("it is noticed");
    assert!(damage.contains("another store"), "{damage}");
    assert_eq!(without_damage(&contents), one.exported);
}

fn a_missing_state_is_damage(engine: Engine) {
    let pristine = Pristine::new(engine);
    // What remains, and what can then be had.
    let cases: [(&[&str], &StoreContents); 4] = [
        (&["state"], &pristine.exported),
        (&["state", "sequence"], &pristine.exported),
        (&["state", "exports"], &Model::default().contents()),
        (
            &["state", "sequence", "lock", "ballast"],
            &pristine.exported,
        ),
    ];
    for (removed, expected) in cases {
        let copy = pristine.copy();
        for name in removed {
            let path = copy.path().join("store").join(name);
            if path.is_dir() {
                fs::remove_dir_all(path).unwrap();
            } else {
                fs::remove_file(path).unwrap();
            }
        }
        let contents = contents_of(copy.path(), engine);
        let damage = contents.damage.clone().expect("it is noticed");
        assert!(damage.contains("missing"), "{damage}");
        assert_eq!(&without_damage(&contents), expected, "without {removed:?}");
    }
    // Single files of the engine.
    let copy = pristine.copy();
    for path in files_below(&copy.path().join("store/state")) {
        let copy = pristine.copy();
        let path = copy
            .path()
            .join("store/state")
            .join(path.file_name().unwrap());
        if fs::remove_file(&path).is_err() {
            continue;
        }
        let contents = contents_of(copy.path(), engine);
        let records = without_damage(&contents);
        match &contents.damage {
            None => assert_eq!(records, pristine.newest, "{}", path.display()),
            Some(_) => assert_eq!(records, pristine.exported, "{}", path.display()),
        }
    }
}

fn damage_is_told_until_it_is_resolved(engine: Engine) {
    let pristine = Pristine::new(engine);
    let root = pristine.directory.path().join("store");
    fs::remove_dir_all(root.join("state")).unwrap();
    let first = contents_of(pristine.directory.path(), engine);
    assert!(first.damage.is_some());
    // A restart before anybody asked libvirt must not turn the loss into the truth.
    let second = contents_of(pristine.directory.path(), engine);
    assert_eq!(second, first);
    let store = reopen(pristine.directory.path(), engine);
    run(async {
        store.damage_resolved().await.unwrap();
        store.damage_resolved().await.unwrap();
        assert_eq!(store.load().await.unwrap().damage, None);
    });
    drop(store);
    assert_eq!(
        contents_of(pristine.directory.path(), engine),
        pristine.exported
    );
}

fn a_damaged_export_is_passed_over(engine: Engine) {
    let pristine = Pristine::new(engine);
    let root = pristine.directory.path().join("store");
    let store = reopen(pristine.directory.path(), engine);
    run(store.export()).unwrap();
    drop(store);
    let newest = files_below(&root.join("exports")).pop().unwrap();
    let whole = fs::read(&newest).unwrap();
    for seed in 0..20 {
        let copy = pristine.copy();
        let mut random = StdRng::seed_from_u64(seed);
        let mut bytes = whole.clone();
        if seed % 2 == 0 {
            bytes.truncate(random.random_range(0..whole.len()));
        } else {
            bytes[random.random_range(0..whole.len())] ^= 0x40;
        }
        let exports = copy.path().join("store/exports");
        fs::write(exports.join(newest.file_name().unwrap()), bytes).unwrap();
        fs::remove_dir_all(copy.path().join("store/state")).unwrap();
        let contents = contents_of(copy.path(), engine);
        let damage = contents.damage.clone().unwrap();
        assert!(damage.contains("passed over: 1"), "seed {seed}: {damage}");
        assert_eq!(without_damage(&contents), pristine.exported, "seed {seed}");
    }
}

fn a_damaged_sidecar_is_told_and_loses_nothing(engine: Engine) {
    let pristine = Pristine::new(engine);
    let whole = fs::read(pristine.directory.path().join("store/sequence")).unwrap();
    for seed in 0..40 {
        let copy = pristine.copy();
        let mut random = StdRng::seed_from_u64(seed);
        let mut bytes = whole.clone();
        match seed % 4 {
            0 => bytes.truncate(random.random_range(0..whole.len())),
            1 => bytes.clear(),
            // Within the slots, where it matters.
            _ => bytes[random.random_range(0..2) * 4096 + random.random_range(0..64)] ^= 1,
        }
        fs::write(copy.path().join("store/sequence"), bytes).unwrap();
        let contents = contents_of(copy.path(), engine);
        let damage = contents.damage.clone().expect("it is noticed");
        assert!(damage.contains("sidecar"), "seed {seed}: {damage}");
        assert_eq!(without_damage(&contents), pristine.newest, "seed {seed}");
    }
    let copy = pristine.copy();
    fs::remove_file(copy.path().join("store/sequence")).unwrap();
    let contents = contents_of(copy.path(), engine);
    assert!(contents.damage.as_ref().unwrap().contains("missing"));
    assert_eq!(without_damage(&contents), pristine.newest);
}

fn a_helper_that_dies_or_hangs_means_damage(engine: Engine) {
    let pristine = Pristine::new(engine);
    for script in ["exit 101", "kill -9 $$", "exec sleep 600"] {
        let copy = pristine.copy();
        let mut options = options(copy.path(), engine);
        options.limits.open = Duration::from_secs(1);
        options.helper = Some(Helper {
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into()],
        });
        let store = open(options).unwrap();
        let contents = run(store.load()).unwrap();
        let damage = contents.damage.clone().expect("it is told");
        assert!(damage.contains("on trial"), "{script}: {damage}");
        assert_eq!(without_damage(&contents), pristine.exported, "{script}");
    }
}

fn a_helper_that_cannot_run_is_done_without(engine: Engine) {
    let pristine = Pristine::new(engine);
    for program in ["/nonexistent/ghost-agent", "/bin/true"] {
        let mut options = options(pristine.directory.path(), engine);
        options.helper = Some(Helper::agent(program.into()));
        let store = open(options).unwrap();
        assert_eq!(run(store.load()).unwrap(), pristine.newest, "{program}");
    }
}

/// An export whose checksum is right and whose kind is unknown stands for all that a newer agent
/// may have written: the store is not opened, and nothing of it is touched.
fn records_of_a_newer_version_are_left_alone(engine: Engine) {
    let pristine = Pristine::new(engine);
    let root = pristine.directory.path().join("store");
    let export = files_below(&root.join("exports")).pop().unwrap();
    let mut bytes = fs::read(&export).unwrap();
    bytes[7] = b'2';
    let end = bytes.len() - 4;
    let crc = crc32c::crc32c(&bytes[..end]);
    bytes[end..].copy_from_slice(&crc.to_be_bytes());
    fs::write(&export, bytes).unwrap();
    fs::remove_dir_all(root.join("state")).unwrap();
    let before = files_below(&root);
    let Err(error) = open(options(pristine.directory.path(), engine)) else {
        panic!("a newer version's export was believed or thrown away");
    };
    assert_eq!(error.code(), ErrorCode::StoreUnavailable);
    assert!(error.hint_text().unwrap().contains("newer"), "{error}");
    assert_eq!(files_below(&root), before);
}
