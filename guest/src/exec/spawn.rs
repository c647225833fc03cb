//! Starts a program without copying this process.
//!
//! `fork` copies page tables, which is what an execution mostly costs under software emulation, and
//! the standard library falls back to it wherever a user is changed. Here the child shares this
//! process's memory until it executes (`CLONE_VM`, as `posix_spawn` does), on a stack of its own and
//! with nothing but bare system calls. Unlike with `vfork` the parent does not wait: a program on a
//! file system that hangs stalls its own call only. A pipe that closes at `execve` tells that it runs.

use std::ffi::{CString, c_int, c_void};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard, TryLockError};

use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};

/// The child calls a handful of small functions.
const STACK: usize = 32 * 1024;

/// What to start; everything that allocates is done before.
pub(crate) struct Plan {
    /// Tried in turn, as `execvp(3)` does with PATH.
    pub(crate) candidates: Vec<CString>,
    pub(crate) arguments: Vec<CString>,
    pub(crate) environment: Vec<CString>,
    pub(crate) directory: CString,
    /// Go to `/` where the directory cannot be entered: a home that is not there.
    pub(crate) directory_optional: bool,
    pub(crate) stdio: [OwnedFd; 3],
    /// stdin is a terminal and becomes the controlling one.
    pub(crate) terminal: bool,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
}

/// What failed in the child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    Session = 1,
    Terminal,
    Stdio,
    Groups,
    User,
    Directory,
    Execute,
}

impl Stage {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Session => "a session of its own",
            Self::Terminal => "the controlling terminal",
            Self::Stdio => "its standard streams",
            Self::Groups => "its groups",
            Self::User => "its user",
            Self::Directory => "the working directory",
            Self::Execute => "execute",
        }
    }
}

/// All that the child reads and writes. It must stay where it is until the child has executed or
/// ended.
struct Area {
    plan: Plan,
    candidates: Vec<*const u8>,
    arguments: Vec<*const u8>,
    environment: Vec<*const u8>,
    stack: Vec<u128>,
    /// Those that this process ignores or handles.
    signals: &'static [i32],
    stage: AtomicI32,
    errno: AtomicI32,
}

/// A process that was started.
pub(crate) struct Child {
    pid: Pid,
    /// `None` on kernels before 5.2.
    pidfd: Option<OwnedFd>,
    /// Closed by the kernel once the program runs or the child has ended.
    started: Option<OwnedFd>,
    area: Option<Box<Area>>,
    status: Option<Exit>,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    pub(crate) code: u32,
    pub(crate) signal: u32,
}

impl Child {
    pub(crate) fn spawn(plan: Plan) -> io::Result<Self> {
        let (started, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let pointers = |list: &[CString]| -> Vec<*const u8> {
            list.iter()
                .map(|one| one.as_ptr().cast())
                .chain([std::ptr::null()])
                .collect()
        };
        let mut area = Box::new(Area {
            candidates: pointers(&plan.candidates),
            arguments: pointers(&plan.arguments),
            environment: pointers(&plan.environment),
            stack: vec![0; STACK / 16],
            signals: changed_signals(),
            stage: AtomicI32::new(0),
            errno: AtomicI32::new(0),
            plan,
        });
        let mut pidfd: c_int = -1;
        let old = block_signals();
        // SAFETY: the stack is 16-aligned and ours alone, and the end of it is where it grows down
        // from. The area outlives the child's use of it: `Child` keeps it until `started` is closed,
        // and its drop waits for that or leaks it. The child only reads it, but for two atomics.
        let pid = unsafe {
            let top = area.stack.as_mut_ptr().add(area.stack.len());
            libc::clone(
                child,
                top.cast(),
                libc::CLONE_VM | libc::CLONE_PIDFD | libc::SIGCHLD,
                std::ptr::from_ref::<Area>(&area)
                    .cast_mut()
                    .cast::<c_void>(),
                &raw mut pidfd,
            )
        };
        let error = io::Error::last_os_error();
        restore_signals(&old);
        drop(write);
        if pid < 0 {
            return Err(error);
        }
        let Some(pid) = Pid::from_raw(pid) else {
            return Err(io::Error::other("clone gave no process"));
        };
        // SAFETY: the kernel has just made this descriptor for us.
        let pidfd = (pidfd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(pidfd) });
        Ok(Self {
            pid,
            pidfd,
            started: Some(started),
            area: Some(area),
            status: None,
        })
    }

    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    pub(crate) fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        self.pidfd.as_ref().map(AsFd::as_fd)
    }

    /// Readable once it is known whether the program runs.
    pub(crate) fn starting(&self) -> Option<BorrowedFd<'_>> {
        self.started.as_ref().map(AsFd::as_fd)
    }

    /// Whether the program runs by now: `None` where that is not decided yet, then once the outcome.
    pub(crate) fn outcome(&mut self) -> Option<Result<(), (Stage, io::Error)>> {
        let started = self.started.as_ref()?;
        let mut byte = [0; 1];
        if let Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) =
            rustix::io::read(started, &mut byte)
        {
            return None;
        }
        self.started = None;
        let area = self.area.take()?;
        let stage = match area.stage.load(Ordering::SeqCst) {
            0 => return Some(Ok(())),
            1 => Stage::Session,
            2 => Stage::Terminal,
            3 => Stage::Stdio,
            4 => Stage::Groups,
            5 => Stage::User,
            6 => Stage::Directory,
            _ => Stage::Execute,
        };
        let error = io::Error::from_raw_os_error(area.errno.load(Ordering::SeqCst));
        Some(Err((stage, error)))
    }

    /// Buries it where it has ended.
    pub(crate) fn try_wait(&mut self) -> Option<Exit> {
        if self.status.is_none() {
            self.status = match rustix::process::waitid(
                WaitId::Pid(self.pid),
                WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
            ) {
                Ok(Some(status)) => Some(Exit {
                    code: status
                        .exit_status()
                        .and_then(|code| u32::try_from(code).ok())
                        .unwrap_or(0),
                    signal: status
                        .terminating_signal()
                        .and_then(|signal| u32::try_from(signal).ok())
                        .unwrap_or(0),
                }),
                Ok(None) | Err(rustix::io::Errno::INTR) => None,
                // Somebody else has taken its status; that it has ended is all there is to know.
                Err(_) => Some(Exit { code: 0, signal: 0 }),
            };
        }
        self.status
    }

    /// Its whole process group.
    pub(crate) fn signal_group(&self, signal: Signal) -> rustix::io::Result<()> {
        if self.status.is_some() {
            return Err(rustix::io::Errno::SRCH);
        }
        rustix::process::kill_process_group(self.pid, signal)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if let Some(area) = self.area.take() {
            let decided = self.started.as_ref().is_none_or(|started| {
                let mut one = [rustix::event::PollFd::new(
                    started,
                    rustix::event::PollFlags::IN,
                )];
                let second = rustix::event::Timespec {
                    tv_sec: 1,
                    tv_nsec: 0,
                };
                rustix::event::poll(&mut one, Some(&second)).is_ok_and(|ready| ready > 0)
            });
            if !decided {
                // It still runs on this memory: a program on a file system that hangs.
                std::mem::forget(area);
            }
        }
    }
}

/// The signals whose disposition is not the default, looked up once: to reset all 64 for every program
/// would be most of its system calls.
fn changed_signals() -> &'static [i32] {
    static CHANGED: OnceLock<Vec<i32>> = OnceLock::new();
    CHANGED.get_or_init(|| {
        // Asked of the kernel itself: the library hides the two signals it keeps for its threads.
        (1..=64)
            .filter(|signal| {
                let mut action = [0usize; 4];
                // SAFETY: asks only; the record is as large as the kernel's struct sigaction, whose
                // first field is the handler.
                let answer = unsafe {
                    libc::syscall(
                        libc::SYS_rt_sigaction,
                        libc::c_long::from(*signal),
                        std::ptr::null::<usize>(),
                        action.as_mut_ptr(),
                        8usize,
                    )
                };
                answer == 0 && action[0] != libc::SIG_DFL
            })
            .collect()
    })
}

fn block_signals() -> libc::sigset_t {
    // SAFETY: both sets are plain data that the calls fill in; the thread's mask is restored by
    // `restore_signals`. A handler of this process must not run in the child, on shared memory.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut old: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut old);
        old
    }
}

fn restore_signals(old: &libc::sigset_t) {
    // SAFETY: a mask that `pthread_sigmask` gave.
    unsafe {
        libc::pthread_sigmask(libc::SIG_SETMASK, old, std::ptr::null_mut());
    }
}

/// A system call that touches no `errno`: the child shares the parent's thread-local memory, and the
/// parent runs on.
///
/// # Safety
/// As the call itself.
#[inline(always)]
unsafe fn call(number: i64, arguments: [usize; 5]) -> Result<usize, i32> {
    let result: isize;
    // SAFETY: x86-64's convention; rcx and r11 are lost, memory may be read or written.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") arguments[0],
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            in("r10") arguments[3],
            in("r8") arguments[4],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    if result < 0 {
        Err((-result) as i32)
    } else {
        Ok(result as usize)
    }
}

extern "C" fn child(area: *mut c_void) -> c_int {
    // SAFETY: the parent keeps the area alive and unchanged until this process executes or ends.
    let area = unsafe { &*area.cast::<Area>() };
    let (stage, errno) = become_program(area);
    area.errno.store(errno, Ordering::SeqCst);
    area.stage.store(stage as i32, Ordering::SeqCst);
    loop {
        // SAFETY: ends this process, without any of the handlers that `exit` would run.
        let _ = unsafe { call(libc::SYS_exit_group, [127, 0, 0, 0, 0]) };
    }
}

/// Returns only where something failed. No allocation, no lock, no panic: the memory is the
/// parent's, whose other threads run.
#[inline(always)]
fn become_program(area: &Area) -> (Stage, i32) {
    let plan = &area.plan;
    // SAFETY: every pointer is to the area or to this stack, every length is that of what is
    // pointed at; the calls change this process only, not the parent (no CLONE_FILES, CLONE_FS or
    // CLONE_SIGHAND was given, and credentials are per task).
    unsafe {
        if let Err(errno) = call(libc::SYS_setsid, [0; 5]) {
            return (Stage::Session, errno);
        }
        let stdio = [
            plan.stdio[0].as_raw_fd(),
            plan.stdio[1].as_raw_fd(),
            plan.stdio[2].as_raw_fd(),
        ];
        for (target, source) in stdio.into_iter().enumerate() {
            // The standard library keeps 0 to 2 occupied, so none of the sources is among them.
            if let Err(errno) = call(libc::SYS_dup2, [source as usize, target, 0, 0, 0]) {
                return (Stage::Stdio, errno);
            }
        }
        if plan.terminal
            && let Err(errno) = call(libc::SYS_ioctl, [0, libc::TIOCSCTTY as usize, 0, 0, 0])
        {
            return (Stage::Terminal, errno);
        }
        let _ = call(libc::SYS_umask, [0o022, 0, 0, 0, 0]);
        if let Err(errno) = call(
            libc::SYS_setgroups,
            [plan.groups.len(), plan.groups.as_ptr() as usize, 0, 0, 0],
        ) {
            return (Stage::Groups, errno);
        }
        let gid = plan.gid as usize;
        if let Err(errno) = call(libc::SYS_setresgid, [gid, gid, gid, 0, 0]) {
            return (Stage::Groups, errno);
        }
        let uid = plan.uid as usize;
        if let Err(errno) = call(libc::SYS_setresuid, [uid, uid, uid, 0, 0]) {
            return (Stage::User, errno);
        }
        // An agent that dies takes its session's programs with it. After the user was changed, which
        // would take it back.
        let _ = call(
            libc::SYS_prctl,
            [
                libc::PR_SET_PDEATHSIG as usize,
                libc::SIGKILL as usize,
                0,
                0,
                0,
            ],
        );
        // After the user was changed, so that its rights decide.
        if let Err(errno) = call(
            libc::SYS_chdir,
            [plan.directory.as_ptr() as usize, 0, 0, 0, 0],
        ) {
            if !plan.directory_optional {
                return (Stage::Directory, errno);
            }
            let _ = call(libc::SYS_chdir, [c"/".as_ptr() as usize, 0, 0, 0, 0]);
        }
        // The kernel's struct sigaction, all zero: SIG_DFL. What is ignored here (SIGPIPE) would
        // stay ignored in the program.
        let default = [0u64; 4];
        for signal in area.signals {
            let _ = call(
                libc::SYS_rt_sigaction,
                [*signal as usize, default.as_ptr() as usize, 0, 8, 0],
            );
        }
        let _ = call(
            libc::SYS_rt_sigprocmask,
            [
                libc::SIG_SETMASK as usize,
                default.as_ptr() as usize,
                0,
                8,
                0,
            ],
        );
        // Whatever else is open here is none of the program's business. Old kernels lack the call;
        // all that this program opens is close-on-exec anyway.
        let _ = call(
            libc::SYS_close_range,
            [
                3,
                u32::MAX as usize,
                libc::CLOSE_RANGE_CLOEXEC as usize,
                0,
                0,
            ],
        );
        let mut found = libc::ENOENT;
        for candidate in &area.candidates {
            if candidate.is_null() {
                break;
            }
            let Err(errno) = call(
                libc::SYS_execve,
                [
                    *candidate as usize,
                    area.arguments.as_ptr() as usize,
                    area.environment.as_ptr() as usize,
                    0,
                    0,
                ],
            ) else {
                break;
            };
            match errno {
                libc::ENOENT | libc::ENOTDIR => {}
                // As execvp(3): denied in one directory, perhaps found in another.
                libc::EACCES => found = errno,
                other => return (Stage::Execute, other),
            }
        }
        (Stage::Execute, found)
    }
}

/// Held by whoever waits for a child of his own other than by its call: read to wait, write to bury.
static WAITED_FOR: RwLock<()> = RwLock::new(());

/// Keeps [`bury_dead_child`] from taking exit statuses that somebody else waits for: hooks, a program that
/// is tried out, a command of the init system. To be held from before the child starts.
pub(crate) fn waiting_for_children() -> RwLockReadGuard<'static, ()> {
    WAITED_FOR.read().unwrap_or_else(PoisonError::into_inner)
}

/// Takes the exit status of a child of this process that has ended, unless it is one of `ours` or
/// somebody waits for a child right now. Whether there may be more.
pub(crate) fn bury_dead_child(ours: impl Fn(Pid) -> bool) -> bool {
    let alone = WAITED_FOR.try_write();
    if matches!(alone, Err(TryLockError::WouldBlock)) {
        return false;
    }
    // Looked at first, and left where it is one of ours that its call waits for.
    let Some(pid) = peek_dead_child() else {
        return false;
    };
    if ours(pid) {
        return false;
    }
    let _ = rustix::process::waitid(
        WaitId::Pid(pid),
        WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
    );
    true
}

/// A child of this process that has ended and was not waited for, if there is one.
fn peek_dead_child() -> Option<Pid> {
    // SAFETY: `waitid` fills the zeroed record in; without a child to report it leaves the pid 0.
    let pid = unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        if libc::waitid(libc::P_ALL, 0, &raw mut info, options) != 0 {
            return None;
        }
        info.si_pid()
    };
    Pid::from_raw(pid)
}

/// `/dev/null`.
pub(crate) fn null() -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(
        c"/dev/null",
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?)
}

/// A pipe whose end on our side does not block: `(read, write)`.
pub(crate) fn pipe(ours: End) -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let own: RawFd = match ours {
        End::Read => read.as_raw_fd(),
        End::Write => write.as_raw_fd(),
    };
    // SAFETY: one of the two that are open right here.
    let own = unsafe { BorrowedFd::borrow_raw(own) };
    rustix::fs::fcntl_setfl(own, rustix::fs::OFlags::NONBLOCK)?;
    Ok((read, write))
}

/// Which end of a pipe is ours.
#[derive(Clone, Copy)]
pub(crate) enum End {
    Read,
    Write,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_somebody_waits_for_is_left_to_them() {
        let _waiting = waiting_for_children();
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        let ended = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        rustix::process::waitid(WaitId::Pid(pid), ended).unwrap();
        assert!(!bury_dead_child(|_| false));
        assert!(child.wait().unwrap().success());
    }
}
