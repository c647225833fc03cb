//! Processes that the tests start: this test program again, running one of these functions. They
//! are ignored in an ordinary run, because they do nothing by themselves.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use ghost_domain::ports::Change;
use ghost_infrastructure::store::{Engine, Helper, open, probe_main};

use super::samples::{operation, put_vm};
use super::{options, run};

const DIRECTORY: &str = "GHOST_TEST_STORE_DIRECTORY";
const ENGINE: &str = "GHOST_TEST_STORE_ENGINE";
/// How many commits the counted writer makes.
pub(super) const COUNTED: u64 = 30;

const FIRST: &str = "GHOST_TEST_STORE_FIRST";

/// This program, running the child `name`.
pub(super) fn command(name: &str, directory: &std::path::Path, engine: Engine) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(arguments(name))
        .env(DIRECTORY, directory)
        .env(ENGINE, engine.as_str())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command
}

/// As [`command`] for the counted writer, run by the program `tracer` with its arguments.
pub(super) fn traced_writer(
    tracer: &str,
    tracer_arguments: &[&std::ffi::OsStr],
    directory: &std::path::Path,
    engine: Engine,
) -> Command {
    let mut command = Command::new(tracer);
    command
        .args(tracer_arguments)
        .arg(std::env::current_exe().unwrap())
        .args(arguments("counted_writer"))
        .env(DIRECTORY, directory)
        .env(ENGINE, engine.as_str());
    command
}

/// As [`command`] for the writer, which numbers its records from `first`.
pub(super) fn writer_command(directory: &std::path::Path, engine: Engine, first: u64) -> Command {
    let mut command = command("writer", directory, engine);
    command.env(FIRST, first.to_string());
    command
}

/// This program as the store's helper.
pub(super) fn helper() -> Helper {
    Helper {
        program: std::env::current_exe().unwrap(),
        arguments: arguments("prober").map(Into::into).to_vec(),
    }
}

fn arguments(name: &str) -> [String; 5] {
    [
        "--ignored".into(),
        "--exact".into(),
        "--nocapture".into(),
        "--test-threads=1".into(),
        format!("store::children::{name}"),
    ]
}

fn directory() -> PathBuf {
    PathBuf::from(std::env::var_os(DIRECTORY).expect("started by a test"))
}

fn engine() -> Engine {
    std::env::var(ENGINE).unwrap().parse().unwrap()
}

/// Prints a line of its own: the test harness leaves one begun.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    write!(out, "\n{line}\n").unwrap();
    out.flush().unwrap();
}

/// Commits pairs of records as fast as it can, and says each number once it is acknowledged.
#[test]
#[ignore = "a process that the crash tests start and kill"]
fn writer() {
    let store = open(options(&directory(), engine())).unwrap();
    let first: u64 = std::env::var(FIRST).unwrap().parse().unwrap();
    say("ready");
    run(async {
        let mut number = first;
        loop {
            let commits = (number..number + 4).map(|number| {
                let store = &store;
                async move {
                    let operation = Change::PutOperation(Box::new(operation(number)));
                    store
                        .commit(vec![put_vm(number, 1), operation])
                        .await
                        .unwrap();
                    say(&format!("acked {number}"));
                }
            });
            futures::future::join_all(commits).await;
            number += 4;
        }
    });
}

/// One commit after the other, a fixed number of them, each said once it is acknowledged.
#[test]
#[ignore = "a process that the test of system calls starts"]
fn counted_writer() {
    let store = open(options(&directory(), engine())).unwrap();
    run(async {
        for number in 0..COUNTED {
            store.commit(vec![put_vm(number, 1)]).await.unwrap();
            say(&format!("acked {number}"));
        }
    });
}

/// Holds a store open until its standard input ends.
#[test]
#[ignore = "a process that the lock test starts"]
fn holder() {
    let _store = open(options(&directory(), engine())).unwrap();
    say("ready");
    let _ = std::io::stdin().read(&mut [0]);
}

/// The helper: examines the directory that its last argument names.
#[test]
#[ignore = "a process that the store starts"]
fn prober() {
    let directory = PathBuf::from(std::env::args_os().next_back().unwrap());
    assert!(directory.is_absolute(), "started by a store");
    say("");
    let code = probe_main(&directory);
    std::process::exit(i32::from(code != std::process::ExitCode::SUCCESS));
}
