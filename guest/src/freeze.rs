//! Freezing file systems for a consistent copy of the disks, and thawing them whatever happens.
//!
//! Between freeze and thaw nothing here may write to a disk, log, or wait for somebody who does: the
//! thread that froze waits for the thaw or its deadline with the descriptors it needs already open.
//! What was frozen is noted in `/run`, which is memory, so that an agent that starts after a crash
//! thaws what its predecessor left.

use std::collections::HashSet;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::{FreezeRequest, FreezeResponse};
use rustix::fs::{Mode, OFlags};
use rustix::process::Signal;

use crate::calls::lock;
use crate::log::{say, set_silent};
use crate::util::{clip, duration, read_bounded};
use crate::{Failure, Options};

/// When nothing is said.
const USUAL: Duration = Duration::from_secs(10);
/// At most; a guest that cannot write for longer is one that has failed.
const MOST: Duration = Duration::from_secs(60);
/// For each hook.
const HOOK: Duration = Duration::from_secs(30);
/// For all hooks before a freeze together, and again for all after it. Twice this and the longest
/// freeze is what a host waits for before it takes the call for lost.
const HOOKS: Duration = Duration::from_secs(120);
/// What is kept of that for each hook still to come, so that every one of them runs: a database that
/// was told to hold still has to be told that it is over.
const LEAST: Duration = Duration::from_secs(1);
/// So many hooks are run.
const MOST_HOOKS: usize = 64;

/// `_IOWR('X', 119, int)`
const FIFREEZE: libc::c_ulong = 0xc004_5877;
/// `_IOWR('X', 120, int)`
const FITHAW: libc::c_ulong = 0xc004_5878;

/// What is frozen.
pub struct Freezer {
    hooks: PathBuf,
    note: PathBuf,
    mounts: PathBuf,
    state: Mutex<State>,
    wake: Condvar,
    /// The deadline thawed what was still being frozen.
    expired: AtomicBool,
}

enum State {
    Thawed,
    /// Hooks run, or file systems are being frozen.
    Working,
    Frozen {
        mounts: Vec<Frozen>,
        /// Counted from before the first one, so that none waits for longer than was allowed, however
        /// long the next takes.
        until: Instant,
        /// None is still to be frozen.
        whole: bool,
    },
}

/// A frozen file system; thawed also where this process is told to end.
struct Frozen {
    fd: OwnedFd,
}

impl Frozen {
    fn new(fd: OwnedFd) -> Self {
        for held in &HELD {
            let taken =
                held.compare_exchange(-1, fd.as_raw_fd(), Ordering::SeqCst, Ordering::SeqCst);
            if taken.is_ok() {
                break;
            }
        }
        Self { fd }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = freeze_call(&self.fd, FITHAW);
        for held in &HELD {
            let _ =
                held.compare_exchange(self.fd.as_raw_fd(), -1, Ordering::SeqCst, Ordering::SeqCst);
        }
    }
}

/// The descriptors of what is frozen, for the handler of signals; -1: none. Beyond so many it is the
/// next start that thaws.
static HELD: [AtomicI32; 64] = [const { AtomicI32::new(-1) }; 64];

/// Has SIGTERM, SIGINT and SIGHUP thaw before they end this process. A service that is stopped in a
/// freeze, as by the shutdown of its guest, would otherwise leave everybody waiting who writes, and
/// the shutdown with them, and nobody to thaw.
pub fn thaw_when_told_to_end() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        // SAFETY: the record is zeroed and then filled in; the handler makes two system calls that
        // signal-safety(7) allows and touches atomics alone. With SA_RESETHAND the signal is back at
        // its default when the handler runs.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = told_to_end as *const () as libc::sighandler_t;
            action.sa_flags = libc::SA_RESETHAND;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        }
    }
}

extern "C" fn told_to_end(signal: libc::c_int) {
    for held in &HELD {
        let fd = held.load(Ordering::SeqCst);
        if fd >= 0 {
            // SAFETY: an open descriptor, or one that was closed just now: then nothing happens.
            unsafe { libc::ioctl(fd, FITHAW, 0) };
        }
    }
    // SAFETY: a number; it is delivered, with its default, when this handler returns.
    unsafe { libc::raise(signal) };
}

impl Freezer {
    /// Nothing is frozen.
    pub fn new(options: &Options) -> Arc<Self> {
        Arc::new(Self {
            hooks: options.hooks.clone(),
            note: options.sysroot.join("run/ghost-guest.frozen"),
            // Of this thread: what is frozen is what it sees.
            mounts: PathBuf::from("/proc/thread-self/mountinfo"),
            state: Mutex::new(State::Thawed),
            wake: Condvar::new(),
            expired: AtomicBool::new(false),
        })
    }

    /// Whether file systems are frozen, or about to be.
    pub fn is_frozen(&self) -> bool {
        !matches!(*lock(&self.state), State::Thawed)
    }

    /// Thaws what an agent before this one has left frozen.
    pub fn thaw_leftovers(&self) {
        let Ok(text) = read_bounded(&self.note, 1024 * 1024) else {
            return;
        };
        for mount in text.lines() {
            if let Ok(fd) = open(Path::new(mount)) {
                let _ = freeze_call(&fd, FITHAW);
            }
        }
        let _ = fs::remove_file(&self.note);
        say!("thawed what an earlier agent left frozen");
    }

    /// Runs the hooks and freezes.
    ///
    /// # Errors
    /// `busy` where it is frozen already, `not_found` for a mount point that is none, and what the
    /// kernel answers; nothing stays frozen then.
    pub(crate) fn freeze(self: &Arc<Self>, request: &FreezeRequest) -> Result<Payload, Failure> {
        let timeout = match &request.timeout {
            None => USUAL,
            Some(wire) => duration(wire)
                .filter(|time| !time.is_zero() && *time <= MOST)
                .ok_or_else(|| Failure::invalid("frozen for at most a minute"))?,
        };
        {
            let mut state = lock(&self.state);
            if !matches!(*state, State::Thawed) {
                return Err(Failure::new("busy", "file systems are frozen already"));
            }
            *state = State::Working;
            self.expired.store(false, Ordering::SeqCst);
        }
        let outcome = self.freeze_now(request, timeout);
        if outcome.is_err() {
            let mut state = lock(&self.state);
            // Where the deadline came first, the thread that watches it does the rest.
            let ours = matches!(*state, State::Working | State::Frozen { whole: false, .. })
                && !self.expired.swap(false, Ordering::SeqCst);
            if ours {
                let left = std::mem::replace(&mut *state, State::Working);
                drop(state);
                self.end(left);
            }
        }
        outcome
    }

    /// Thaws, and runs the hooks.
    fn end(&self, state: State) -> (u32, Vec<String>) {
        let mut count = 0;
        if let State::Frozen { mut mounts, .. } = state {
            count = u32::try_from(mounts.len()).unwrap_or(u32::MAX);
            thaw_all(&mut mounts);
        }
        set_silent(false);
        let _ = fs::remove_file(&self.note);
        let warnings = self.run_hooks("post-thaw.d");
        *lock(&self.state) = State::Thawed;
        self.wake.notify_all();
        (count, warnings)
    }

    fn freeze_now(
        self: &Arc<Self>,
        request: &FreezeRequest,
        timeout: Duration,
    ) -> Result<Payload, Failure> {
        let warnings = self.run_hooks("pre-freeze.d");
        let table = read_bounded(&self.mounts, 8 * 1024 * 1024)
            .map_err(|error| Failure::io("mountinfo", &error))?;
        let mounts = choose(&table, &request.mount_points)?;
        let note: String = mounts
            .iter()
            .map(|path| format!("{}\n", path.display()))
            .collect();
        fs::write(&self.note, note).map_err(|error| {
            // A `/run` that is part of a file system to be frozen would hold the thaw up.
            Failure::io(self.note.display(), &error)
        })?;
        let mut open_mounts = Vec::new();
        for path in &mounts {
            let fd = open(path).map_err(|error| Failure::errno(path.display(), error))?;
            open_mounts.push((path, fd));
        }
        // The thread that thaws must exist before there is a need for it.
        let watcher = Arc::clone(self);
        let spawned = std::thread::Builder::new()
            .name("thaw".into())
            .spawn(move || watcher.watch());
        if let Err(error) = spawned {
            return Err(Failure::io("a thread for the thaw", &error));
        }
        set_silent(true);
        *lock(&self.state) = State::Frozen {
            mounts: Vec::new(),
            until: Instant::now() + timeout,
            whole: false,
        };
        self.wake.notify_all();
        for (path, fd) in open_mounts {
            // It waits for all that is being written, for as long as the device takes.
            match freeze_call(&fd, FIFREEZE) {
                Ok(()) => {
                    let frozen = Frozen::new(fd);
                    match &mut *lock(&self.state) {
                        State::Frozen { mounts, .. } => mounts.push(frozen),
                        // Those before it are thawed already, and dropping it thaws this one.
                        _ => {
                            return Err(Failure::new(
                                "timed_out",
                                format!(
                                    "{} was not frozen before the deadline; all is thawed again",
                                    path.display()
                                ),
                            ));
                        }
                    }
                }
                // Not every file system can be, and one that somebody else froze is theirs.
                Err(libc::EOPNOTSUPP | libc::ENOTTY | libc::EBUSY | libc::EINVAL)
                    if request.mount_points.is_empty() => {}
                Err(errno) => {
                    let error = std::io::Error::from_raw_os_error(errno);
                    return Err(Failure::io(format!("freeze {}", path.display()), &error));
                }
            }
        }
        match &mut *lock(&self.state) {
            State::Frozen { mounts, whole, .. } => {
                *whole = true;
                let count = u32::try_from(mounts.len()).unwrap_or(u32::MAX);
                Ok(response(count, warnings))
            }
            _ => Err(Failure::new("timed_out", "not frozen before the deadline")),
        }
    }

    /// Waits for the deadline of what is frozen, and thaws.
    fn watch(&self) {
        let mut state = lock(&self.state);
        loop {
            match &*state {
                State::Thawed => return,
                State::Working => {
                    state = self
                        .wake
                        .wait_timeout(state, Duration::from_secs(1))
                        .unwrap_or_else(PoisonError::into_inner)
                        .0;
                }
                State::Frozen { until, .. } => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        self.expired.store(true, Ordering::SeqCst);
                        let left = std::mem::replace(&mut *state, State::Working);
                        drop(state);
                        self.end(left);
                        say!("thawed: the deadline passed without a request");
                        return;
                    }
                    state = self
                        .wake
                        .wait_timeout(state, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0;
                }
            }
        }
    }

    /// Thaws and runs the hooks.
    ///
    /// # Errors
    /// `invalid_argument` where nothing is frozen, as after the deadline: the copy that was taken
    /// meanwhile may not be consistent.
    pub(crate) fn thaw(&self) -> Result<Payload, Failure> {
        let frozen = {
            let mut state = lock(&self.state);
            match &*state {
                State::Frozen { whole: true, .. } => std::mem::replace(&mut *state, State::Working),
                State::Frozen { .. } | State::Working => {
                    return Err(Failure::new("busy", "being frozen or thawed right now"));
                }
                State::Thawed => {
                    return Err(Failure::invalid(
                        "nothing is frozen: not asked for, or thawed at the deadline",
                    ));
                }
            }
        };
        let (count, warnings) = self.end(frozen);
        Ok(response(count, warnings))
    }

    /// Runs all programs of a directory, in the order of their names.
    fn run_hooks(&self, directory: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.hooks.join(directory)) else {
            return Vec::new();
        };
        let mut hooks: Vec<PathBuf> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| {
                fs::metadata(path)
                    .is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
            })
            .collect();
        hooks.sort();
        let beyond = hooks.len().saturating_sub(MOST_HOOKS);
        hooks.truncate(MOST_HOOKS);
        let mut warnings = run_all(&hooks, HOOK, HOOKS, LEAST);
        if beyond > 0 {
            warnings.push(format!(
                "{directory}: {beyond} more were not run: at most {MOST_HOOKS} are"
            ));
        }
        warnings
    }
}

/// Runs hooks one after another, within `sum` together; says which failed.
fn run_all(hooks: &[PathBuf], each: Duration, sum: Duration, least: Duration) -> Vec<String> {
    let until = Instant::now() + sum;
    hooks
        .iter()
        .enumerate()
        .filter_map(|(at, hook)| {
            let left = until.saturating_duration_since(Instant::now());
            let time = share(left, hooks.len() - at - 1, each, least);
            run_hook(hook, time).err()
        })
        .collect()
}

/// How long the next hook may run with so much time left and so many to come after it.
fn share(left: Duration, to_come: usize, each: Duration, least: Duration) -> Duration {
    let kept = least.saturating_mul(u32::try_from(to_come).unwrap_or(u32::MAX));
    left.saturating_sub(kept).clamp(least.min(each), each)
}

fn response(count: u32, warnings: Vec<String>) -> Payload {
    Payload::FreezeResponse(FreezeResponse { count, warnings })
}

fn run_hook(hook: &Path, most: Duration) -> Result<(), String> {
    let said = |what: String| format!("{}: {what}", hook.display());
    let (output, write) = std::io::pipe().map_err(|error| said(error.to_string()))?;
    let second = write.try_clone().map_err(|error| said(error.to_string()))?;
    let mut command = Command::new(hook);
    command
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .env("HOME", "/root")
        .env("LANG", "C.UTF-8")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(write)
        .stderr(second)
        .process_group(0);
    let _waiting = crate::exec::waiting_for_children();
    let mut child = command.spawn().map_err(|error| said(error.to_string()))?;
    // The writing ends that this process holds go with it; otherwise the output never ends.
    drop(command);
    rustix::io::ioctl_fionbio(&output, true).map_err(|error| said(error.to_string()))?;
    let mut kept = Vec::new();
    let mut buffer = [0; 4096];
    let until = Instant::now() + most;
    let status = loop {
        // Its output is read along, so that it does not wait for us, and the end of it kept.
        while let Ok(read @ 1..) = rustix::io::read(&output, &mut buffer) {
            kept.extend_from_slice(&buffer[..read]);
            let surplus = kept.len().saturating_sub(1000);
            kept.drain(..surplus);
        }
        match child.try_wait() {
            Ok(Some(status)) => break Ok(status),
            Err(error) => break Err(error.to_string()),
            Ok(None) if Instant::now() >= until => {
                if let Some(group) = i32::try_from(child.id())
                    .ok()
                    .and_then(rustix::process::Pid::from_raw)
                {
                    let _ = rustix::process::kill_process_group(group, Signal::KILL);
                }
                // Not waited for here: one that hangs in the kernel would hold up the thaw.
                let _ = std::thread::Builder::new()
                    .name("hook".into())
                    .spawn(move || child.wait());
                break Err(format!("killed after {:.1} s", most.as_secs_f64()));
            }
            Ok(None) => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    while let Ok(read @ 1..) = rustix::io::read(&output, &mut buffer) {
        kept.extend_from_slice(&buffer[..read]);
        if kept.len() > 64 * 1024 {
            break;
        }
    }
    let tail = String::from_utf8_lossy(&kept);
    let tail = clip(tail.trim(), 1000);
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(said(format!("{status}: {tail}"))),
        Err(why) => Err(said(format!("{why}: {tail}"))),
    }
}

fn open(path: &Path) -> Result<OwnedFd, rustix::io::Errno> {
    rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

fn freeze_call(fd: &OwnedFd, call: libc::c_ulong) -> Result<(), i32> {
    // SAFETY: an open descriptor; the argument of both calls is not looked at.
    if unsafe { libc::ioctl(fd.as_raw_fd(), call, 0) } == 0 {
        return Ok(());
    }
    Err(std::io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(libc::EIO))
}

/// In the opposite order.
fn thaw_all(mounts: &mut Vec<Frozen>) {
    while mounts.pop().is_some() {}
}

/// The mount points to freeze, the innermost first, each file system once.
fn choose(table: &str, wanted: &[String]) -> Result<Vec<PathBuf>, Failure> {
    let mut seen = HashSet::new();
    let mut chosen = Vec::new();
    let mut known = HashSet::new();
    for line in table.lines() {
        let Some((device, path, source)) = mount(line) else {
            continue;
        };
        known.insert(path.clone());
        let on_disk = source.starts_with("/dev/");
        if !on_disk || (!wanted.is_empty() && !wanted.contains(&path)) || !seen.insert(device) {
            continue;
        }
        chosen.push(PathBuf::from(path));
    }
    if let Some(none) = wanted.iter().find(|one| {
        !chosen
            .iter()
            .any(|path| path.as_path() == Path::new(one.as_str()))
    }) {
        return Err(if known.contains(none) {
            Failure::new("unsupported", format!("{none} is on no disk of its own"))
        } else {
            Failure::new("not_found", format!("nothing is mounted at {none}"))
        });
    }
    // The table is in the order of mounting: what is mounted on something comes after it.
    chosen.reverse();
    Ok(chosen)
}

/// `proc_pid_mountinfo(5)`: device number, mount point and source.
fn mount(line: &str) -> Option<(String, String, String)> {
    let (before, after) = line.split_once(" - ")?;
    let fields: Vec<&str> = before.split(' ').collect();
    let source = after.split(' ').nth(1)?;
    Some((
        (*fields.get(2)?).to_owned(),
        unescape(fields.get(4)?),
        unescape(source),
    ))
}

/// The table writes blanks and backslashes in octal.
pub(crate) fn unescape(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = (bytes[at] == b'\\')
            .then(|| text.get(at + 1..at + 4))
            .flatten()
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        if let Some(byte) = octal {
            out.push(byte);
            at += 4;
        } else {
            out.push(bytes[at]);
            at += 1;
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
22 1 254:1 / / rw - ext4 /dev/vda1 rw
23 22 0:5 / /dev rw - devtmpfs udev rw
24 22 254:2 / /srv/a\\040b rw - xfs /dev/vdb rw
25 22 254:1 /x /bind rw - ext4 /dev/vda1 rw
26 22 0:30 / /nfs rw - nfs4 server:/x rw
";

    #[test]
    fn each_disk_is_frozen_once_the_innermost_first() {
        let all = choose(TABLE, &[]).unwrap();
        assert_eq!(all, [PathBuf::from("/srv/a b"), PathBuf::from("/")]);
        let one = choose(TABLE, &["/srv/a b".into()]).unwrap();
        assert_eq!(one, [PathBuf::from("/srv/a b")]);
        assert_eq!(choose(TABLE, &["/x".into()]).unwrap_err().code, "not_found");
        assert_eq!(
            choose(TABLE, &["/nfs".into()]).unwrap_err().code,
            "unsupported"
        );
    }

    #[test]
    fn a_hook_that_fails_or_hangs_is_told_of() {
        let directory = tempfile::tempdir().unwrap();
        let hook = |name: &str, text: &str| {
            let path = directory.path().join(name);
            fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            path
        };
        assert_eq!(run_hook(&hook("good", "exit 0"), HOOK), Ok(()));
        let bad = run_hook(&hook("bad", "echo no database >&2; exit 3"), HOOK).unwrap_err();
        assert!(bad.contains("no database") && bad.contains('3'), "{bad}");
        let slow = run_hook(
            &hook("slow", "sleep 100 & sleep 100"),
            Duration::from_millis(50),
        )
        .unwrap_err();
        assert!(slow.contains("killed"), "{slow}");
        assert!(run_hook(&directory.path().join("none"), HOOK).is_err());
    }

    #[test]
    fn all_hooks_run_and_together_within_their_bound() {
        for count in [1, 2, 4, 5, MOST_HOOKS] {
            // Each takes all that it may.
            let mut left = HOOKS;
            for at in 0..count {
                let time = share(left, count - at - 1, HOOK, LEAST);
                assert!(time >= LEAST && time <= HOOK, "{count} {at} {time:?}");
                left = left.checked_sub(time).expect("beyond the bound");
            }
        }
        // One that hangs uses up all there is, and the last one runs all the same.
        let directory = tempfile::tempdir().unwrap();
        let last = directory.path().join("last");
        let hooks = [
            ("1", "exec sleep 1000".to_owned()),
            ("2", format!("echo >{}", last.display())),
        ]
        .map(|(name, text)| {
            let path = directory.path().join(name);
            fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            path
        });
        let warnings = run_all(&hooks, HOOK, Duration::ZERO, Duration::from_secs(3));
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(warnings[0].contains("killed after 3.0 s"), "{warnings:?}");
        assert!(last.exists());
    }
}
