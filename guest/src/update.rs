//! A new program for the agent itself.
//!
//! ```text
//!  running ──(all bytes, SHA-256 right)──► ghost-guest.new ──rename──► in place, old as ghost-guest.old
//!     ▲                                                                    │ watcher starts, agent
//!     │                                                                    ▼ executes the new program
//!     │        greeted by a host within the deadline: mark and .old removed ◄── pending (mark in /run)
//!     └── rolled back: .old renamed into place, started again ◄── no greeting, or the process died
//! ```
//!
//! The mark is in `/run`: a restart of the guest in between ends the trial, with the new program in
//! place and the old one beside it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ghost_proto::guest::v1::UpdateRequest;
use ghost_proto::guest::v1::agent_message::Payload;
use rustix::process::{Pid, Signal};
use sha2::{Digest, Sha256};

use crate::Failure;
use crate::calls::{Port, done};
use crate::engine::End;
use crate::log::say;
use crate::util::read_bounded;

/// A program of this kind has a few; whatever is larger is not one.
const MOST: u64 = 64 * 1024 * 1024;
/// How long the new program may take to be greeted. Without a host nobody greets, so that the host
/// is waited for, too: an update comes over the channel, the host was there a moment ago.
pub const DEADLINE: Duration = Duration::from_secs(60);
/// Says in the new program's environment that it is on trial.
pub const TRIAL: &str = "GHOST_GUEST_TRIAL";

/// SHA-256 of a file.
///
/// # Errors
/// Those of reading it.
pub fn sha256(path: &Path) -> io::Result<[u8; 32]> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(hash.finalize().into());
        }
        hash.update(&buffer[..read]);
    }
}

fn beside(program: &Path, suffix: &str) -> PathBuf {
    let mut name = program.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Receives a program and puts it in the place of `program`, the old one kept beside it.
pub(crate) fn receive(
    program: &Path,
    request: &UpdateRequest,
    port: &mut Port,
) -> Result<Payload, Failure> {
    if request.sha256.len() != 32 || request.size_bytes == 0 || request.size_bytes > MOST {
        return Err(Failure::invalid(
            "a program comes with its size and SHA-256",
        ));
    }
    let new = beside(program, ".new");
    let said = |error: io::Error| Failure::io(new.display(), &error);
    let _ = fs::remove_file(&new);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o700)
        .open(&new)
        .map_err(said)?;
    let outcome = fill(&mut file, request, port).and_then(|()| {
        file.set_permissions(fs::Permissions::from_mode(0o755))
            .and_then(|()| file.sync_all())
            .map_err(said)
    });
    drop(file);
    if let Err(failure) = outcome.and_then(|()| try_out(&new, &request.version)) {
        let _ = fs::remove_file(&new);
        return Err(failure);
    }
    let old = beside(program, ".old");
    let _ = fs::remove_file(&old);
    // A second name for the old one first: at no moment is there no program at its place.
    fs::hard_link(program, &old)
        .or_else(|_| fs::copy(program, &old).map(|_| ()))
        .map_err(|error| Failure::io(old.display(), &error))?;
    fs::rename(&new, program).map_err(said)?;
    if let Ok(directory) = File::open(program.parent().unwrap_or(Path::new("/"))) {
        let _ = directory.sync_all();
    }
    port.leave(End::Updated);
    Ok(done())
}

fn fill(file: &mut File, request: &UpdateRequest, port: &mut Port) -> Result<(), Failure> {
    let mut hash = Sha256::new();
    let mut size = 0u64;
    while let Some(data) = port.receive()? {
        size += data.len() as u64;
        if size > request.size_bytes {
            return Err(Failure::invalid("more data than was announced"));
        }
        hash.update(&data);
        file.write_all(&data)
            .map_err(|error| Failure::io("write", &error))?;
        port.consumed(data.len() as u64);
    }
    if size != request.size_bytes || hash.finalize()[..] != request.sha256[..] {
        return Err(Failure::new(
            "checksum_mismatch",
            "what has come is not the announced program; nothing was changed",
        ));
    }
    Ok(())
}

/// How long another program may keep the new one from being executed.
const BUSY: Duration = Duration::from_secs(5);

/// Whether it runs here at all, before anything is risked.
fn try_out(new: &Path, version: &str) -> Result<(), Failure> {
    let _waiting = crate::exec::waiting_for_children();
    let mut program = Command::new(new);
    program.arg("version").env_clear().stdin(Stdio::null());
    let until = Instant::now() + BUSY;
    let output = loop {
        match program.output() {
            // A program that was started while this file was written has its descriptor until it
            // executes, and so long nobody executes the file (ETXTBSY).
            Err(error)
                if error.kind() == io::ErrorKind::ExecutableFileBusy && Instant::now() < until =>
            {
                std::thread::sleep(Duration::from_millis(10));
            }
            other => break other,
        }
    }
    .map_err(|error| Failure::io("the new program does not start", &error))?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() || !text.starts_with("ghost-guest ") {
        return Err(Failure::invalid("the new program is no ghost-guest"));
    }
    if !version.is_empty() && text.split_ascii_whitespace().nth(1) != Some(version) {
        return Err(Failure::invalid(format!(
            "the new program says that it is {:?}, not {version:?}",
            text.trim()
        )));
    }
    Ok(())
}

/// Where a trial is noted.
fn mark(run: &Path) -> PathBuf {
    run.join("ghost-guest.trial")
}

/// Starts the watcher and becomes the new program. Comes back only where that failed; the old
/// program is back in place then.
///
/// # Errors
/// Why it could not be executed.
pub fn become_new(
    program: &Path,
    arguments: &[std::ffi::OsString],
    run: &Path,
    supervised: bool,
) -> io::Error {
    let attempt = || -> io::Result<io::Error> {
        let mark = mark(run);
        fs::write(&mark, std::process::id().to_string())?;
        let mut watcher = Command::new(beside(program, ".old"));
        watcher
            .arg("watch-update")
            .arg(program)
            .arg(run)
            .arg(std::process::id().to_string())
            .arg(if supervised { "supervised" } else { "alone" })
            .args(arguments)
            .stdin(Stdio::null())
            .process_group(0);
        // Nobody waits for it: it becomes an orphan of this process, which buries orphans.
        drop(watcher.spawn()?);
        Ok(Command::new(program)
            .args(arguments)
            .env(TRIAL, mark)
            .exec())
    };
    let error = attempt().unwrap_or_else(|error| error);
    let _ = roll_back(program, run);
    error
}

/// The trial is passed: a host has greeted.
pub fn passed(program: &Path, mark: &Path) {
    let _ = fs::remove_file(mark);
    let _ = fs::remove_file(beside(program, ".old"));
    say!("the update is accepted");
}

fn roll_back(program: &Path, run: &Path) -> io::Result<()> {
    let _ = fs::remove_file(mark(run));
    fs::rename(beside(program, ".old"), program)
}

/// The watcher: the old program, waiting for the new one's greeting. Ends when the trial has;
/// becomes the agent again where nobody else would start it.
///
/// # Errors
/// Where the old program cannot be put back.
pub fn watch(
    program: &Path,
    run: &Path,
    process: i32,
    supervised: bool,
    arguments: &[std::ffi::OsString],
    deadline: Duration,
) -> io::Result<()> {
    let until = Instant::now() + deadline;
    let pid = Pid::from_raw(process).ok_or_else(|| io::Error::other("no such process"))?;
    loop {
        if !mark(run).exists() {
            return Ok(());
        }
        if !is_alive(pid) || Instant::now() >= until {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    // The greeting may have come while this decided.
    if !mark(run).exists() {
        return Ok(());
    }
    say!("the new agent was not greeted: the old one comes back");
    roll_back(program, run)?;
    let _ = rustix::process::kill_process(pid, Signal::KILL);
    if supervised {
        return Ok(());
    }
    // The port can be opened once the other has gone.
    Err(Command::new(program).args(arguments).exec())
}

/// One that nobody has waited for yet is dead all the same.
fn is_alive(pid: Pid) -> bool {
    let stat = read_bounded(format!("/proc/{}/stat", pid.as_raw_nonzero()), 4096);
    stat.is_ok_and(|line| {
        line.rsplit_once(')')
            .is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_program_that_is_held_open_for_a_moment_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let new = directory.path().join("ghost-guest.new");
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o755)
            .open(&new)
            .unwrap();
        file.write_all(b"#!/bin/sh\necho ghost-guest 1.2.3\n")
            .unwrap();
        let busy = Command::new(&new).output().unwrap_err();
        assert_eq!(busy.kind(), io::ErrorKind::ExecutableFileBusy);
        let holds = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(file);
        });
        try_out(&new, "1.2.3").unwrap();
        holds.join().unwrap();
        assert!(try_out(&new, "1.2.4").is_err());
    }

    #[test]
    fn a_trial_that_is_not_passed_ends_with_the_old_program() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("ghost-guest");
        fs::write(&program, "new").unwrap();
        fs::write(beside(&program, ".old"), "old").unwrap();
        fs::write(mark(directory.path()), "1").unwrap();
        // A process that is gone, under a service manager.
        let mut gone = Command::new("true").spawn().unwrap();
        let pid = i32::try_from(gone.id()).unwrap();
        gone.wait().unwrap();
        watch(&program, directory.path(), pid, true, &[], DEADLINE).unwrap();
        assert_eq!(fs::read_to_string(&program).unwrap(), "old");
        assert!(!mark(directory.path()).exists());
        assert!(!beside(&program, ".old").exists());
    }

    #[test]
    fn one_that_hangs_is_killed_at_the_deadline() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("ghost-guest");
        fs::write(&program, "new").unwrap();
        fs::write(beside(&program, ".old"), "old").unwrap();
        fs::write(mark(directory.path()), "1").unwrap();
        let mut hangs = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = i32::try_from(hangs.id()).unwrap();
        let soon = Duration::from_millis(50);
        watch(&program, directory.path(), pid, true, &[], soon).unwrap();
        assert!(!hangs.wait().unwrap().success());
        assert_eq!(fs::read_to_string(&program).unwrap(), "old");
    }

    #[test]
    fn a_trial_that_is_passed_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("ghost-guest");
        fs::write(&program, "new").unwrap();
        fs::write(beside(&program, ".old"), "old").unwrap();
        fs::write(mark(directory.path()), "1").unwrap();
        passed(&program, &mark(directory.path()));
        let own = i32::try_from(std::process::id()).unwrap();
        watch(&program, directory.path(), own, true, &[], DEADLINE).unwrap();
        assert_eq!(fs::read_to_string(&program).unwrap(), "new");
        assert!(!beside(&program, ".old").exists());
    }
}
