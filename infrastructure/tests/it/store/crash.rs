//! Processes that die, and processes that come second.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::process::Child;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use ghost_domain::ErrorCode;
use ghost_infrastructure::store::{Engine, open};
use rand::{Rng, SeedableRng};
use tempfile::tempdir;

use super::samples::{operation_id, vm_id};
use super::{children, contents_of, on_both_engines, options, reopen};

on_both_engines!(
    system_calls_come_in_the_order_that_a_power_cut_demands,
    what_was_acknowledged_survives_kill_9,
    a_second_process_is_refused_by_name,
    a_second_handle_in_one_process_is_refused,
);

/// Kills its process when the test ends, however it ends.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const ROUNDS: u64 = 20;
const ACKS: u64 = 50;

fn what_was_acknowledged_survives_kill_9(engine: Engine) {
    let directory = tempdir().unwrap();
    let mut random = rand::rngs::StdRng::seed_from_u64(9);
    let mut acknowledged: BTreeSet<u64> = BTreeSet::new();
    for round in 0..ROUNDS {
        let first = round * 100_000;
        let mut child = Killed(
            children::writer_command(directory.path(), engine, first)
                .spawn()
                .unwrap(),
        );
        let stdout = child.0.stdout.take().unwrap();
        let (sender, lines) = mpsc::channel();
        let reader = thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        // Killed after a random number of acknowledgements, in the midst of what follows.
        let enough = random.random_range(0..ACKS);
        let mut seen = 0;
        let mut ready = false;
        while !ready || seen < enough {
            let line = lines
                .recv_timeout(Duration::from_secs(60))
                .expect("the writer goes on");
            ready |= line == "ready";
            if let Some(number) = line.strip_prefix("acked ") {
                acknowledged.insert(number.parse().unwrap());
                seen += 1;
            }
        }
        thread::sleep(Duration::from_micros(random.random_range(0..3000)));
        drop(child);
        reader.join().unwrap();
        for line in lines.try_iter() {
            if let Some(number) = line.strip_prefix("acked ") {
                acknowledged.insert(number.parse().unwrap());
            }
        }
        let contents = contents_of(directory.path(), engine);
        assert_eq!(contents.damage, None, "round {round}");
        let vms: BTreeSet<_> = contents.vms.iter().map(|vm| vm.id).collect();
        let operations: BTreeSet<_> = contents.operations.iter().map(|row| row.id).collect();
        for number in &acknowledged {
            assert!(
                vms.contains(&vm_id(*number)) && operations.contains(&operation_id(*number)),
                "round {round}: {number} was acknowledged and is lost"
            );
        }
        let torn = vms
            .iter()
            .map(|id| id.uuid())
            .collect::<BTreeSet<_>>()
            .symmetric_difference(&operations.iter().map(|id| id.uuid()).collect())
            .count();
        assert_eq!(torn, 0, "round {round}: half of a batch is there");
    }
    assert!(acknowledged.len() > 200, "{}", acknowledged.len());
}

/// No acknowledgement leaves the process while a byte of the store has been written and not synced:
/// seen from outside, in the system calls that it really makes.
fn system_calls_come_in_the_order_that_a_power_cut_demands(engine: Engine) {
    let directory = tempdir().unwrap();
    let trace = directory.path().join("trace");
    let calls = "trace=write,pwrite64,pwritev,writev,fsync,fdatasync,sync_file_range";
    let arguments: Vec<&OsStr> = vec![
        "-f".as_ref(),
        "-y".as_ref(),
        "-s".as_ref(),
        "16".as_ref(),
        "-o".as_ref(),
        trace.as_os_str(),
        "-e".as_ref(),
        calls.as_ref(),
    ];
    let output = children::traced_writer("strace", &arguments, directory.path(), engine).output();
    let traced = std::fs::read_to_string(&trace).unwrap_or_default();
    match output {
        Ok(output) if output.status.success() => {}
        Ok(output) if traced.is_empty() => {
            let why = String::from_utf8_lossy(&output.stderr);
            println!("SKIPPED: strace may not trace here: {}", why.trim());
            return;
        }
        Ok(output) => panic!("the writer failed: {output:?}"),
        Err(error) => {
            println!("SKIPPED: strace cannot be run: {error}");
            return;
        }
    }
    let store = directory.path().join("store");
    let store = store.to_str().unwrap();
    let mut unsynced: BTreeSet<&str> = BTreeSet::new();
    let mut syncing: BTreeMap<&str, &str> = BTreeMap::new();
    let (mut acknowledged, mut synced) = (0, 0);
    for line in traced.lines() {
        let (thread, call) = line.split_once(' ').unwrap();
        let call = call.trim_start();
        // `write(1<pipe:[5]>, "acked 0\n", …`, `pwrite64(4</tmp/…/state/db>, …`, and for calls that
        // others interrupt: `fsync(5</tmp/…> <unfinished ...>`, `<... fsync resumed>) = 0`.
        let path = call
            .split_once('<')
            .and_then(|(_, rest)| Some(rest.split_once('>')?.0))
            .filter(|path| path.starts_with(store));
        if call.contains("\"acked ") {
            assert!(
                unsynced.is_empty(),
                "{unsynced:?} not synced before: {line}"
            );
            acknowledged += 1;
        } else if call.starts_with("fsync(") || call.starts_with("fdatasync(") {
            if let Some(path) = path {
                if call.ends_with("= 0") {
                    unsynced.remove(path);
                    synced += 1;
                } else {
                    syncing.insert(thread, path);
                }
            }
        } else if call.starts_with("<... fsync") || call.starts_with("<... fdatasync") {
            if let Some(path) = syncing.remove(thread) {
                assert!(call.ends_with("= 0"), "{line}");
                unsynced.remove(path);
                synced += 1;
            }
        } else if let Some(path) = path
            && !call.starts_with("sync_file_range")
            // The lock file holds the process's number, for people only.
            && !path.ends_with("/lock")
        {
            unsynced.insert(path);
        }
    }
    assert_eq!(acknowledged, children::COUNTED);
    // For each: the engine's file and the sidecar.
    assert!(synced >= 2 * children::COUNTED, "{synced} syncs");
}

fn a_second_process_is_refused_by_name(engine: Engine) {
    let directory = tempdir().unwrap();
    let mut child = Killed(
        children::command("holder", directory.path(), engine)
            .spawn()
            .unwrap(),
    );
    let mut lines = BufReader::new(child.0.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.is_ok_and(|line| line == "ready")));
    let Err(error) = open(options(directory.path(), engine)) else {
        panic!("two processes have one store open");
    };
    assert_eq!(error.code(), ErrorCode::StoreUnavailable);
    let cause = error.cause().unwrap();
    assert!(cause.contains(&child.0.id().to_string()), "{cause}");
    assert!(error.hint_text().is_some());
    drop(child);
    // The kernel took the lock from the dead.
    drop(reopen(directory.path(), engine));
}

fn a_second_handle_in_one_process_is_refused(engine: Engine) {
    let directory = tempdir().unwrap();
    let first = reopen(directory.path(), engine);
    assert!(open(options(directory.path(), engine)).is_err());
    drop(first);
    drop(reopen(directory.path(), engine));
}
