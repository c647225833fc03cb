//! What only a look inside shows: the order of a commit's parts, and what becomes of a commit when
//! one of them fails. On both engines.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use ghost_domain::{CredentialId, JoinToken, Role, Timestamp};
use tempfile::TempDir;

use super::*;
use steps::Step;

fn options(directory: &Path, engine: Engine) -> StoreOptions {
    let mut options = StoreOptions::new(directory.join("store"));
    options.engine = engine;
    options.ballast_bytes = 1 << 20;
    options.limits.heal_interval = Duration::ZERO;
    options
}

/// A directory in memory where there is one: the steps are watched, not the disk.
fn scratch() -> TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

fn run<F: Future>(work: F) -> F::Output {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(work)
}

/// Two records that only make sense together.
fn put(number: u128) -> Vec<Change> {
    let token = |half: u128| JoinToken {
        id: CredentialId::from_uuid(uuid::Uuid::from_u128(number * 2 + half)),
        secret_hash: [u8::try_from(number).unwrap(); 32],
        role: Role::Viewer,
        guest_access: true,
        created_at: Timestamp::default(),
        expires_at: Timestamp::default(),
    };
    vec![
        Change::PutJoinToken(token(0)),
        Change::PutJoinToken(token(1)),
    ]
}

fn delete(number: u128) -> Vec<Change> {
    (0..2)
        .map(|half| {
            let id = uuid::Uuid::from_u128(number * 2 + half);
            Change::DeleteJoinToken(CredentialId::from_uuid(id))
        })
        .collect()
}

/// The numbers whose two records are there; half a pair fails the test.
fn numbers(contents: &StoreContents) -> BTreeSet<u128> {
    let ids: BTreeSet<u128> = contents
        .join_tokens
        .iter()
        .map(|token| token.id.uuid().as_u128())
        .collect();
    for id in &ids {
        assert!(ids.contains(&(id ^ 1)), "half of a batch is visible");
    }
    ids.into_iter().map(|id| id / 2).collect()
}

fn reopened(directory: &Path, engine: Engine) -> BTreeSet<u128> {
    let store = open(options(directory, engine)).unwrap();
    let contents = run(store.load()).unwrap();
    assert_eq!(contents.damage, None);
    numbers(&contents)
}

/// Writes down all steps.
#[derive(Default)]
struct Recorder(Mutex<Vec<(&'static str, Step)>>);

impl Steps for Recorder {
    fn begin(&self, step: Step) -> io::Result<()> {
        self.0.lock().unwrap().push(("begin", step));
        Ok(())
    }

    fn done(&self, step: Step) {
        self.0.lock().unwrap().push(("done", step));
    }
}

#[test]
fn an_acknowledgement_comes_after_both_syncs() {
    for engine in Engine::ALL {
        let directory = scratch();
        let recorder = Arc::new(Recorder::default());
        let store = Store::open(options(directory.path(), engine), recorder.clone()).unwrap();
        for number in 0..3 {
            recorder.0.lock().unwrap().clear();
            run(store.commit(put(number))).unwrap();
            let steps = recorder.0.lock().unwrap().clone();
            let mut expected = vec![
                ("begin", Step::Apply),
                ("begin", Step::Flush),
                ("begin", Step::Sync),
                ("done", Step::Sync),
                ("begin", Step::Mark),
                ("begin", Step::MarkSync),
                ("done", Step::MarkSync),
                ("done", Step::Acknowledge),
            ];
            if engine == Engine::Redb {
                expected.remove(1);
            }
            assert_eq!(steps, expected, "{engine}");
        }
    }
}

/// Stops the writer at a step until it is let go.
struct Gate {
    at: Step,
    state: Mutex<(bool, bool)>,
    changed: Condvar,
}

impl Gate {
    fn new(at: Step) -> Arc<Self> {
        Arc::new(Self {
            at,
            state: Mutex::new((false, true)),
            changed: Condvar::new(),
        })
    }

    fn wait_until_reached(&self) {
        let mut state = self.state.lock().unwrap();
        while !state.0 {
            state = self.changed.wait(state).unwrap();
        }
    }

    fn let_go(&self) {
        self.state.lock().unwrap().1 = false;
        self.changed.notify_all();
    }
}

impl Steps for Gate {
    fn begin(&self, step: Step) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        if step == self.at && state.1 {
            state.0 = true;
            self.changed.notify_all();
            while state.1 {
                state = self.changed.wait(state).unwrap();
            }
        }
        Ok(())
    }

    fn done(&self, _: Step) {}
}

#[test]
fn nobody_is_told_while_a_step_is_pending() {
    for engine in Engine::ALL {
        for step in [Step::Apply, Step::Sync, Step::Mark, Step::MarkSync] {
            let directory = scratch();
            let gate = Gate::new(step);
            let store = Store::open(options(directory.path(), engine), gate.clone()).unwrap();
            run(async {
                let commit = store.commit(put(1));
                tokio::pin!(commit);
                // Polled once, so that it is sent; then the writer stands at the gate.
                assert!(futures::poll!(&mut commit).is_pending());
                gate.wait_until_reached();
                assert!(
                    futures::poll!(&mut commit).is_pending(),
                    "{engine} {step:?}"
                );
                gate.let_go();
                commit.await.unwrap();
            });
        }
    }
}

#[test]
fn a_commit_that_hangs_makes_the_store_not_writable_and_later_ones_are_withdrawn() {
    for engine in Engine::ALL {
        let directory = scratch();
        let gate = Gate::new(Step::Sync);
        let mut options = options(directory.path(), engine);
        options.limits.commit = Duration::from_millis(50);
        let store = Store::open(options, gate.clone()).unwrap();
        run(async {
            let hanging = store.commit(put(1));
            tokio::pin!(hanging);
            assert!(futures::poll!(&mut hanging).is_pending());
            gate.wait_until_reached();
            // It waits behind the hanging one, gives up, and must not take place later.
            let error = store.commit(put(2)).await.unwrap_err();
            assert_eq!(error.code(), ErrorCode::StoreUnavailable);
            let health = store.health().await;
            assert!(!health.writable);
            assert!(health.problem.unwrap().contains("under way"));
            gate.let_go();
            hanging.await.unwrap();
            store.commit(put(3)).await.unwrap();
            assert!(store.health().await.writable);
            let contents = store.load().await.unwrap();
            assert_eq!(numbers(&contents), BTreeSet::from([1, 3]));
        });
        drop(store);
        assert_eq!(reopened(directory.path(), engine), BTreeSet::from([1, 3]));
    }
}

/// Makes the `countdown`-th step fail, and all after it where `forever`.
struct Failing {
    countdown: AtomicI64,
    forever: bool,
    error: i32,
    failed: AtomicU64,
}

impl Failing {
    fn new(countdown: i64, forever: bool, error: i32) -> Arc<Self> {
        Arc::new(Self {
            countdown: AtomicI64::new(countdown),
            forever,
            error,
            failed: AtomicU64::new(0),
        })
    }
}

impl Steps for Failing {
    fn begin(&self, _: Step) -> io::Result<()> {
        let left = self.countdown.fetch_sub(1, Ordering::SeqCst);
        if left == 0 || (left < 0 && self.forever) {
            self.failed.fetch_add(1, Ordering::SeqCst);
            return Err(io::Error::from_raw_os_error(self.error));
        }
        Ok(())
    }

    fn done(&self, _: Step) {}
}

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// Commits a script of puts, replacements and deletes through `steps`; returns what must be there.
fn play(store: &Store) -> BTreeSet<u128> {
    let mut expected = BTreeSet::new();
    run(async {
        for number in 0..4 {
            if store.commit(put(number)).await.is_ok() {
                expected.insert(number);
            }
            let contents = store.load().await.unwrap();
            assert_eq!(numbers(&contents), expected, "at once");
        }
        if store.commit(delete(0)).await.is_ok() {
            expected.remove(&0);
        }
        assert_eq!(numbers(&store.load().await.unwrap()), expected);
    });
    expected
}

/// Every step of the script fails once, then works again: the failed commit has no effect, and the
/// store heals by itself.
#[test]
fn a_step_that_fails_once_costs_at_most_its_commit() {
    for engine in Engine::ALL {
        let mut injected = 0;
        for error in [EIO, ENOSPC] {
            for countdown in 0.. {
                let directory = scratch();
                let failing = Failing::new(countdown, false, error);
                let store =
                    Store::open(options(directory.path(), engine), failing.clone()).unwrap();
                let expected = play(&store);
                let failed = failing.failed.load(Ordering::SeqCst);
                if failed == 0 {
                    break;
                }
                injected += 1;
                // After an error for want of room the reserve is freed and the commit done anew.
                let lost = 4 - expected.len();
                assert!(lost <= 2, "{engine} {countdown}: {expected:?}");
                if error == ENOSPC {
                    assert_eq!(expected, BTreeSet::from([1, 2, 3]), "{engine} {countdown}");
                }
                let health = run(store.health());
                assert!(health.writable, "{health:?}");
                drop(store);
                assert_eq!(
                    reopened(directory.path(), engine),
                    expected,
                    "{engine}, error {error} at step {countdown}"
                );
            }
        }
        // Five commits with at least four steps each, two kinds of error.
        assert!(injected >= 40, "only {injected} steps failed");
    }
}

/// From some step on nothing works any more, and then the process ends: neither the failed commits
/// nor half of one may be there at the next start.
#[test]
fn what_failed_stays_without_effect_after_a_restart() {
    for engine in Engine::ALL {
        let mut injected = 0;
        for countdown in 0.. {
            let directory = scratch();
            let failing = Failing::new(countdown, true, EIO);
            let store = Store::open(options(directory.path(), engine), failing.clone()).unwrap();
            let expected = play(&store);
            if failing.failed.load(Ordering::SeqCst) == 0 {
                break;
            }
            injected += 1;
            let health = run(store.health());
            assert!(!health.writable && health.problem.is_some(), "{health:?}");
            drop(store);
            assert_eq!(
                reopened(directory.path(), engine),
                expected,
                "{engine} from step {countdown}"
            );
        }
        assert!(injected >= 20, "only {injected} steps failed");
    }
}

/// A disk that keeps nothing but what was synced: it holds each file as it was at its last sync.
struct OnlySynced {
    live: PathBuf,
    disk: PathBuf,
    /// Also the disk as it was between the two syncs of the newest batch.
    between: PathBuf,
}

impl Steps for OnlySynced {
    fn begin(&self, step: Step) -> io::Result<()> {
        if step == Step::Mark {
            replace(&self.disk, &self.between);
        }
        Ok(())
    }

    fn done(&self, step: Step) {
        match step {
            Step::Sync => replace(&self.live.join("state"), &self.disk.join("state")),
            Step::MarkSync => {
                fs::copy(self.live.join("sequence"), self.disk.join("sequence")).unwrap();
            }
            _ => {}
        }
    }
}

fn replace(from: &Path, to: &Path) {
    fn copy(from: &Path, to: &Path) {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            let target = to.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                copy(&entry.path(), &target);
            } else {
                fs::copy(entry.path(), target).unwrap();
            }
        }
    }
    let _ = fs::remove_dir_all(to);
    copy(from, to);
}

#[test]
fn a_power_cut_keeps_what_was_acknowledged_and_nothing_else() {
    for engine in Engine::ALL {
        let directory = scratch();
        let options = options(directory.path(), engine);
        drop(open(options.clone()).unwrap());
        let disk = directory.path().join("disk");
        let between = directory.path().join("between");
        replace(&options.directory, &disk);
        let steps = Arc::new(OnlySynced {
            live: options.directory.clone(),
            disk: disk.clone(),
            between: between.clone(),
        });
        let store = Store::open(options, steps).unwrap();
        let mut acknowledged = BTreeSet::new();
        for number in 0..25 {
            let before = acknowledged.clone();
            run(store.commit(put(number))).unwrap();
            acknowledged.insert(number);
            for (image, expected) in [(&disk, &acknowledged), (&between, &before)] {
                let cut = scratch();
                replace(image, &cut.path().join("store"));
                assert_eq!(
                    &reopened(cut.path(), engine),
                    expected,
                    "{engine}, after commit {number}, {}",
                    image.display()
                );
            }
        }
    }
}

/// The engine loses what it had while it is open, as after a bad sector: nothing is lost, because
/// all that was acknowledged is in memory, and nothing is pretended.
#[test]
fn a_state_that_breaks_under_us_is_written_anew() {
    for engine in Engine::ALL {
        let directory = scratch();
        // The first commit passes, then one sync fails, so that the engine is reopened.
        let failing = Failing::new(if engine == Engine::Sled { 7 } else { 5 }, false, EIO);
        let store = Store::open(options(directory.path(), engine), failing).unwrap();
        run(async {
            store.commit(put(1)).await.unwrap();
            let state = directory.path().join("store/state");
            for entry in fs::read_dir(&state).unwrap() {
                let path = entry.unwrap().path();
                if path.is_file() {
                    fs::write(&path, vec![0xa5; 20_000]).unwrap();
                }
            }
            // Whichever of these meets the damage first is refused; then it is healed.
            for number in 2..5 {
                let _ = store.commit(put(number)).await;
            }
            store.commit(put(9)).await.unwrap();
            let contents = store.load().await.unwrap();
            let there = numbers(&contents);
            assert!(there.contains(&1) && there.contains(&9), "{there:?}");
        });
        let there = numbers(&run(store.load()).unwrap());
        drop(store);
        assert_eq!(reopened(directory.path(), engine), there);
    }
}

/// What the engine shows is whole in every part, and yet not what was committed: only the manifest
/// tells.
#[test]
fn lost_reverted_and_foreign_records_are_noticed() {
    for engine in Engine::ALL {
        let key = |number: u128| {
            key::Key::join_token(CredentialId::from_uuid(uuid::Uuid::from_u128(number)))
        };
        let old = key(2);
        type Tamper = fn(&[u8]) -> Option<Vec<u8>>;
        let cases: [(&str, u128, Tamper); 3] = [
            ("lost", 4, |_| None),
            ("reverted", 2, |old| Some(old.to_vec())),
            ("foreign", 999, |old| {
                let (sequence, row) = envelope::open(
                    &key::Key::join_token(CredentialId::from_uuid(uuid::Uuid::from_u128(2))),
                    old,
                )
                .unwrap();
                let key = key::Key::join_token(CredentialId::from_uuid(uuid::Uuid::from_u128(999)));
                Some(envelope::seal(&key, sequence, row))
            }),
        ];
        for (what, number, tamper) in cases {
            let directory = scratch();
            let state = directory.path().join("store/state");
            let store = open(options(directory.path(), engine)).unwrap();
            run(async {
                store.commit(put(1)).await.unwrap();
                store.commit(put(2)).await.unwrap();
            });
            drop(store);
            let mut before = Vec::new();
            {
                let engine =
                    engine::open_patiently(engine, &state, Duration::from_secs(5)).unwrap();
                engine
                    .scan(&mut |found, value| {
                        if found == old.as_bytes() {
                            before = value.to_vec();
                        }
                    })
                    .unwrap();
            }
            // The record is replaced once, so that the first version is an older one.
            let store = open(options(directory.path(), engine)).unwrap();
            run(store.commit(put(1))).unwrap();
            drop(store);
            {
                let mut engine =
                    engine::open_patiently(engine, &state, Duration::from_secs(5)).unwrap();
                let pair = (key(number).as_bytes().to_vec(), tamper(&before));
                engine.commit(&[pair], &Unwatched).unwrap();
            }
            let store = open(options(directory.path(), engine)).unwrap();
            let contents = run(store.load()).unwrap();
            assert!(contents.damage.is_some(), "{engine}: {what}");
        }
    }
}

/// sled was interrupted while it opened, and left a snapshot half written.
#[test]
fn an_unfinished_snapshot_of_sled_is_no_damage() {
    let directory = scratch();
    let store = open(options(directory.path(), Engine::Sled)).unwrap();
    run(store.commit(put(1))).unwrap();
    drop(store);
    let unfinished = "store/state/snap.FFFFFFFFFFFFFFF0.generating";
    fs::write(directory.path().join(unfinished), "half").unwrap();
    assert_eq!(
        reopened(directory.path(), Engine::Sled),
        BTreeSet::from([1])
    );
}
