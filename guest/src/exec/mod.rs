//! Running programs: pipes or a terminal, watched by the engine's loop without a thread.

mod kill;
mod spawn;

use std::collections::VecDeque;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use ghost_proto::guest::Flow;
use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::execute_response::{Event, Exited, Started};
use ghost_proto::guest::v1::{
    ExecuteRequest, ExecuteResponse, Stream, StreamData, Terminal, WindowUpdate,
};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::Signal;
use rustix::termios::Winsize;

use crate::Failure;
use crate::accounts::{Accounts, Identity};
use crate::calls::{Mail, Mailbox};
use crate::util::duration;

use spawn::{Child, Exit};
pub(crate) use spawn::{bury_dead_child, waiting_for_children};

/// Output of a call that waits for the channel; beyond it the program waits.
const MOST_WAITING: usize = 128 * 1024;
/// After a program has ended, its children may hold its pipes: they are listened to for so long.
const GRACE: Duration = Duration::from_millis(300);
/// A process that survives SIGKILL for so long hangs in the kernel.
const UNKILLABLE: Duration = Duration::from_secs(10);
/// That a program runs is said with the first that comes of it, or after so long. Most programs are
/// over by then, and their start, output and end go out in one piece: to wake up for each, and to
/// write to the channel each time, costs under emulation as much as the program.
const TOGETHER: Duration = Duration::from_millis(20);

/// What of an execution an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Started,
    Exited,
    Stdin,
    Stdout,
    Stderr,
    Terminal,
}

impl Source {
    pub(crate) const ALL: [Self; 6] = [
        Self::Started,
        Self::Exited,
        Self::Stdin,
        Self::Stdout,
        Self::Stderr,
        Self::Terminal,
    ];
}

struct Output {
    stream: Stream,
    fd: Option<Rc<OwnedFd>>,
    readable: bool,
    /// Nobody can write any more.
    hung_up: bool,
    terminal: bool,
    window: u64,
    /// What was in the pipe when the program ended: its own, to be delivered however long it takes.
    owed: u64,
}

struct Input {
    fd: Rc<OwnedFd>,
    queue: VecDeque<Bytes>,
    end: bool,
    writable: bool,
    terminal: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Killed {
    No,
    TimedOut,
    Cancelled,
}

/// A running execution.
pub(crate) struct Exec {
    serial: u32,
    child: Child,
    mark: String,
    /// Whether it has to be looked whether the program runs by now, and whether it has ended.
    look_started: bool,
    look_exited: bool,
    /// When to look whether it runs, where nothing that it does has shown it before.
    look_at: Option<Instant>,
    input: Option<Input>,
    /// What the host may still send of stdin, and what of it was consumed without a grant.
    credit: u64,
    ungranted: u64,
    outputs: Vec<Output>,
    terminal: Option<Rc<OwnedFd>>,
    cap: u64,
    delivered: u64,
    truncated: u64,
    deadline: Option<Instant>,
    killed: Killed,
    /// Whether a thread ends the tree; the process is not waited for as long.
    sweeping: bool,
    given_up_at: Option<Instant>,
    exit: Option<(Exit, Instant)>,
    mailbox: Mailbox,
}

/// What a turn has made.
#[derive(Default)]
pub(crate) struct Turn {
    pub(crate) messages: Vec<Payload>,
    pub(crate) last: Option<Payload>,
    /// More could be done at once.
    pub(crate) again: bool,
}

impl Exec {
    /// Starts a program. Watch [`Exec::sources`].
    pub(crate) fn start(
        serial: u32,
        mark: &[u8],
        mut request: ExecuteRequest,
        accounts: &Accounts,
        mailbox: Mailbox,
    ) -> Result<Self, Failure> {
        let identity = accounts.identity(&request.user, &request.group)?;
        let timeout = match &request.timeout {
            None => None,
            Some(wire) => Some(
                duration(wire)
                    .filter(|time| !time.is_zero())
                    .ok_or_else(|| Failure::invalid("a timeout is longer than nothing"))?,
            ),
        };
        let terminal_kind = request.terminal.as_ref().map(|one| one.kind.clone());
        let mark = hex::encode(mark);
        let environment = environment(&mut request, &identity, terminal_kind, &mark);
        let path = environment
            .iter()
            .find_map(|(name, value)| (name == "PATH").then(|| value.clone()))
            .unwrap_or_default();
        let (candidates, arguments) = command(&request, &identity, &path)?;
        let mut pairs = Vec::with_capacity(environment.len());
        for (name, value) in environment {
            if name.is_empty() || name.contains('=') {
                return Err(Failure::invalid(format!(
                    "{name:?} is no name of a variable"
                )));
            }
            pairs.push(c_string(format!("{name}={value}"))?);
        }
        let home = request.working_directory.is_empty();
        let directory = c_string(if home {
            identity.user.home.clone()
        } else {
            request.working_directory.clone()
        })?;

        let said = |error: io::Error| Failure::io("the program's streams", &error);
        let mut input = None;
        let mut outputs = Vec::with_capacity(2);
        let mut master = None;
        let stdio = if let Some(size) = &request.terminal {
            let (ours, theirs) = open_terminal(size, identity.user.uid).map_err(said)?;
            let ours = Rc::new(ours);
            input = Some(Input {
                fd: Rc::clone(&ours),
                queue: VecDeque::new(),
                end: false,
                writable: true,
                terminal: true,
            });
            outputs.push(Output::new(Stream::Stdout, Rc::clone(&ours), true));
            master = Some(ours);
            let other = theirs.try_clone().map_err(said)?;
            [theirs.try_clone().map_err(said)?, theirs, other]
        } else {
            let stdin = if request.stdin {
                let (read, write) = spawn::pipe(spawn::End::Write).map_err(said)?;
                input = Some(Input {
                    fd: Rc::new(write),
                    queue: VecDeque::new(),
                    end: false,
                    writable: true,
                    terminal: false,
                });
                read
            } else {
                spawn::null().map_err(said)?
            };
            let (out, stdout) = spawn::pipe(spawn::End::Read).map_err(said)?;
            let (err, stderr) = spawn::pipe(spawn::End::Read).map_err(said)?;
            outputs.push(Output::new(Stream::Stdout, Rc::new(out), false));
            outputs.push(Output::new(Stream::Stderr, Rc::new(err), false));
            [stdin, stdout, stderr]
        };
        let child = Child::spawn(spawn::Plan {
            candidates,
            arguments,
            environment: pairs,
            directory,
            directory_optional: home,
            stdio,
            terminal: master.is_some(),
            uid: identity.user.uid,
            gid: identity.gid,
            groups: identity.groups,
        })
        .map_err(|error| Failure::io("a new process", &error))?;
        Ok(Self {
            serial,
            child,
            mark,
            look_started: false,
            look_exited: false,
            // Whoever has something for it waits to hear that it runs.
            look_at: (!request.stdin && master.is_none()).then(|| Instant::now() + TOGETHER),
            input,
            credit: Flow::STREAM.window,
            ungranted: 0,
            outputs,
            terminal: master,
            cap: request.max_output_bytes,
            delivered: 0,
            truncated: 0,
            deadline: timeout.and_then(|time| Instant::now().checked_add(time)),
            killed: Killed::No,
            sweeping: false,
            given_up_at: None,
            exit: None,
            mailbox,
        })
    }

    /// What to watch, and whether for writing too.
    pub(crate) fn sources(&self) -> Vec<(Source, BorrowedFd<'_>)> {
        let mut list = Vec::with_capacity(5);
        if self.look_at.is_none()
            && let Some(fd) = self.child.starting()
        {
            list.push((Source::Started, fd));
        }
        if let Some(fd) = self.child.pidfd() {
            list.push((Source::Exited, fd));
        }
        if let Some(fd) = &self.terminal {
            list.push((Source::Terminal, fd.as_fd()));
            return list;
        }
        if let Some(input) = &self.input {
            list.push((Source::Stdin, input.fd.as_fd()));
        }
        for output in &self.outputs {
            if let Some(fd) = &output.fd {
                let source = if output.stream == Stream::Stdout {
                    Source::Stdout
                } else {
                    Source::Stderr
                };
                list.push((source, fd.as_fd()));
            }
        }
        list
    }

    pub(crate) fn pid(&self) -> rustix::process::Pid {
        self.child.pid()
    }

    /// Whether the end has to be looked for, as on kernels without descriptors for processes.
    pub(crate) fn needs_polling(&self) -> bool {
        self.child.pidfd().is_none()
    }

    /// Takes note of an event.
    pub(crate) fn ready(&mut self, source: Source, readable: bool, writable: bool, hung_up: bool) {
        let stream = match source {
            Source::Started => {
                self.look_started = true;
                return;
            }
            Source::Exited => {
                self.look_exited = true;
                return;
            }
            Source::Stdin => None,
            Source::Stdout | Source::Terminal => Some(Stream::Stdout),
            Source::Stderr => Some(Stream::Stderr),
        };
        if matches!(source, Source::Stdin | Source::Terminal)
            && (writable || hung_up)
            && let Some(input) = &mut self.input
        {
            input.writable = true;
        }
        for output in &mut self.outputs {
            if Some(output.stream) == stream && (readable || hung_up) {
                output.readable = true;
                output.hung_up |= hung_up;
            }
        }
    }

    /// When to look again even if nothing happens.
    pub(crate) fn wake_at(&self) -> Option<Instant> {
        // Once over, only the host's grants or the pipes themselves bring anything on.
        let drained = self
            .exit
            .map(|(_, at)| at + GRACE)
            .filter(|at| *at > Instant::now());
        let deadline = match self.killed {
            Killed::No if self.exit.is_none() => self.deadline,
            _ => None,
        };
        let look = self.look_at.filter(|_| self.child.starting().is_some());
        [drained, deadline, self.given_up_at, look]
            .into_iter()
            .flatten()
            .min()
    }

    /// Bytes of stdin.
    pub(crate) fn data(&mut self, data: StreamData) -> Result<(), Failure> {
        if data.stream() != Stream::Stdin {
            return Err(Failure::invalid("an execution takes stdin only"));
        }
        let size = data.data.len() as u64;
        if size > self.credit {
            return Err(Failure::invalid("more data than was granted"));
        }
        self.credit -= size;
        match &mut self.input {
            Some(input) if !input.end => {
                if size > 0 {
                    input.queue.push_back(data.data);
                }
                input.end = data.end;
            }
            // The program has closed its stdin, or never had one: as with a broken pipe, the rest
            // is consumed.
            _ => self.ungranted += size,
        }
        Ok(())
    }

    /// The host takes so much more.
    pub(crate) fn grant(&mut self, stream: Stream, bytes: u64) {
        for output in &mut self.outputs {
            if output.stream == stream {
                output.window = output
                    .window
                    .saturating_add(bytes)
                    .min(4 * Flow::STREAM.window);
            }
        }
    }

    /// A signal for the process group.
    pub(crate) fn signal(&mut self, number: u32) {
        // A terminal's foreground group is another than the shell's.
        if let Some(terminal) = &self.terminal
            && let Ok(group) = rustix::termios::tcgetpgrp(terminal)
            && let Some(signal) = signal(number)
            && rustix::process::kill_process_group(group, signal).is_ok()
        {
            return;
        }
        if let Some(signal) = signal(number) {
            let _ = self.child.signal_group(signal);
        }
    }

    pub(crate) fn resize(&mut self, rows: u32, columns: u32) {
        if let Some(terminal) = &self.terminal {
            let _ = rustix::termios::tcsetwinsize(terminal, winsize(rows, columns));
        }
    }

    pub(crate) fn cancel(&mut self) {
        self.kill(Killed::Cancelled);
    }

    fn kill(&mut self, why: Killed) {
        if self.killed != Killed::No || self.exit.is_some() {
            return;
        }
        self.killed = why;
        self.given_up_at = Instant::now().checked_add(UNKILLABLE);
        // At once what can be had at once, the others from a thread: looking through /proc takes
        // its time.
        let _ = self.child.signal_group(Signal::KILL);
        self.sweeping = sweep(self.serial, &self.child, &self.mark, &self.mailbox);
    }

    /// [`Mail::Swept`] has come.
    pub(crate) fn swept(&mut self) {
        self.sweeping = false;
    }

    /// Ends it without an answer: its session is over. What is left is to be waited for.
    pub(crate) fn abandon(mut self) -> Dying {
        self.kill(Killed::Cancelled);
        Dying {
            serial: self.serial,
            child: self.child,
            sweeping: self.sweeping,
        }
    }

    /// Moves bytes in both directions and looks whether it is over. `waiting` is what of this call
    /// still waits for the channel.
    pub(crate) fn turn(&mut self, scratch: &mut [u8], waiting: usize) -> Turn {
        let mut turn = Turn::default();
        let now = Instant::now();
        // Not asked in vain: under emulation every system call counts.
        let polling = self.needs_polling();
        let look = std::mem::take(&mut self.look_started)
            || self.look_exited
            || polling
            || self.look_at.is_some_and(|at| at <= now)
            // Nobody but the program writes into its pipes.
            || self.outputs.iter().any(|output| output.readable);
        let outcome = if look { self.child.outcome() } else { None };
        if outcome.is_none() {
            // A file system that hangs: looked at again, as seldom as before.
            self.look_at = self
                .look_at
                .map(|at| if at <= now { now + TOGETHER } else { at });
        }
        match outcome {
            None => {}
            Some(Ok(())) => {
                turn.messages.push(response(Event::Started(Started {
                    pid: u32::try_from(self.child.pid().as_raw_nonzero().get()).unwrap_or(0),
                })));
            }
            Some(Err((stage, error))) => {
                self.child.try_wait();
                turn.last = Some(Payload::Error(
                    Failure::io(format!("cannot start it ({})", stage.as_str()), &error).into(),
                ));
                return turn;
            }
        }
        if self.deadline.is_some_and(|at| at <= now) {
            self.kill(Killed::TimedOut);
        }
        self.feed(&mut turn);
        if self.exit.is_none()
            && !self.sweeping
            && (self.look_exited || polling)
            && self.child.starting().is_none()
            && let Some(exit) = self.child.try_wait()
        {
            self.exit = Some((exit, now));
            self.input = None;
            for output in &mut self.outputs {
                if let Some(fd) = &output.fd {
                    output.owed = rustix::io::ioctl_fionread(fd).unwrap_or(0);
                    output.readable = true;
                }
            }
        }
        self.drain(&mut turn, scratch, waiting);
        self.look_for_end(&mut turn, now);
        turn
    }

    fn look_for_end(&mut self, turn: &mut Turn, now: Instant) {
        let Some((exit, at)) = self.exit else {
            if self.given_up_at.is_some_and(|at| at <= now) {
                turn.last = Some(Payload::Error(
                    Failure::new(
                        "internal",
                        "killed, but the kernel does not end it (it waits for a device?)",
                    )
                    .into(),
                ));
            }
            return;
        };
        // Who cancelled reads no more: its grants would be waited for in vain.
        let over = self.killed == Killed::Cancelled
            || self.outputs.iter().all(|output| {
                output.fd.is_none() || (now >= at + GRACE && (output.owed == 0 || !output.readable))
            });
        if over {
            turn.last = Some(response(Event::Exited(Exited {
                code: exit.code,
                signal: exit.signal,
                timed_out: self.killed == Killed::TimedOut,
                cancelled: self.killed == Killed::Cancelled,
                truncated_bytes: self.truncated,
            })));
        }
    }

    /// stdin.
    fn feed(&mut self, turn: &mut Turn) {
        let mut closed = false;
        if let Some(input) = &mut self.input {
            while input.writable && !input.queue.is_empty() {
                let Some(first) = input.queue.front_mut() else {
                    break;
                };
                match rustix::io::write(&input.fd, first) {
                    Ok(written) => {
                        self.ungranted += written as u64;
                        first.advance(written);
                        if first.is_empty() {
                            input.queue.pop_front();
                        }
                    }
                    Err(Errno::AGAIN) => input.writable = false,
                    Err(Errno::INTR) => {}
                    Err(_) => {
                        closed = true;
                        break;
                    }
                }
            }
            if input.queue.is_empty() && input.end {
                if input.terminal {
                    // What a person types for it; the terminal itself stays.
                    if input.writable {
                        let _ = rustix::io::write(&input.fd, &[4]);
                        input.end = false;
                    }
                } else {
                    closed = true;
                }
            }
        }
        if closed && let Some(input) = self.input.take() {
            self.ungranted += input.queue.iter().map(|one| one.len() as u64).sum::<u64>();
        }
        if self.ungranted >= Flow::STREAM.grant {
            turn.messages.push(Payload::WindowUpdate(WindowUpdate {
                stream: Stream::Stdin.into(),
                bytes: self.ungranted,
            }));
            self.credit = self.credit.saturating_add(self.ungranted);
            self.ungranted = 0;
        }
    }

    /// stdout and stderr.
    fn drain(&mut self, turn: &mut Turn, scratch: &mut [u8], mut waiting: usize) {
        for output in &mut self.outputs {
            // Bounded, so that a call whose output is thrown away does not keep the loop.
            for _ in 0..16 {
                let Some(fd) = output.fd.as_ref().filter(|_| output.readable) else {
                    break;
                };
                let room = if self.cap == 0 {
                    u64::MAX
                } else {
                    self.cap - self.delivered.min(self.cap)
                };
                let most = if room == 0 {
                    scratch.len()
                } else if waiting >= MOST_WAITING {
                    break;
                } else {
                    usize::try_from(output.window)
                        .unwrap_or(usize::MAX)
                        .min(scratch.len())
                        .min(Flow::STREAM.most)
                };
                if most == 0 {
                    break;
                }
                let read = match rustix::io::read(fd, &mut scratch[..most]) {
                    Ok(0) => {
                        output.fd = None;
                        break;
                    }
                    Ok(read) => read,
                    Err(Errno::AGAIN) => {
                        output.readable = false;
                        output.owed = 0;
                        break;
                    }
                    Err(Errno::INTR) => continue,
                    // EIO: the last one that had the terminal open is gone.
                    Err(_) => {
                        output.fd = None;
                        break;
                    }
                };
                output.owed = output.owed.saturating_sub(read as u64);
                let kept = usize::try_from(room).unwrap_or(usize::MAX).min(read);
                self.truncated += (read - kept) as u64;
                if kept > 0 {
                    self.delivered += kept as u64;
                    output.window -= (kept as u64).min(output.window);
                    waiting += kept;
                    turn.messages.push(Payload::StreamData(StreamData {
                        stream: output.stream.into(),
                        data: Bytes::copy_from_slice(&scratch[..kept]),
                        end: false,
                    }));
                }
                // A pipe that gave less than asked for is empty; epoll(7) says as much. A terminal
                // gives a line at a time. Behind the last bytes of a program that has ended is the
                // end, which is part of the same answer.
                if read < most && !output.terminal && !output.hung_up && self.exit.is_none() {
                    output.readable = false;
                    output.owed = 0;
                    break;
                }
            }
            let capped = self.cap > 0 && self.delivered >= self.cap;
            turn.again |= output.fd.is_some()
                && output.readable
                && (capped || (output.window > 0 && waiting < MOST_WAITING));
        }
    }
}

impl Output {
    fn new(stream: Stream, fd: Rc<OwnedFd>, terminal: bool) -> Self {
        Self {
            stream,
            fd: Some(fd),
            readable: false,
            hung_up: false,
            terminal,
            window: Flow::STREAM.window,
            owed: 0,
        }
    }
}

/// A process whose call is over and that is still to be waited for.
pub(crate) struct Dying {
    pub(crate) serial: u32,
    child: Child,
    sweeping: bool,
}

impl Dying {
    pub(crate) fn pid(&self) -> rustix::process::Pid {
        self.child.pid()
    }

    pub(crate) fn swept(&mut self) {
        self.sweeping = false;
    }

    /// Whether it is gone by now.
    pub(crate) fn is_gone(&mut self) -> bool {
        if self.child.starting().is_some() {
            self.child.outcome();
        }
        !self.sweeping && self.child.starting().is_none() && self.child.try_wait().is_some()
    }
}

fn sweep(serial: u32, child: &Child, mark: &str, mailbox: &Mailbox) -> bool {
    let (pid, mark, mailbox) = (child.pid(), mark.to_owned(), mailbox.clone());
    std::thread::Builder::new()
        .name("sweep".into())
        .stack_size(256 * 1024)
        .spawn(move || {
            kill::kill_tree(pid, &mark);
            mailbox.put(Mail::Swept(serial));
        })
        .is_ok()
}

fn response(event: Event) -> Payload {
    Payload::ExecuteResponse(ExecuteResponse { event: Some(event) })
}

fn signal(number: u32) -> Option<Signal> {
    Signal::from_named_raw(i32::try_from(number).ok()?)
}

fn winsize(rows: u32, columns: u32) -> Winsize {
    let bound = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
    Winsize {
        ws_row: bound(rows),
        ws_col: bound(columns),
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

fn c_string(text: impl Into<Vec<u8>>) -> Result<CString, Failure> {
    CString::new(text).map_err(|_| Failure::invalid("a NUL byte, which no program can be given"))
}

/// What a login gives: nothing of this process's own environment.
fn environment(
    request: &mut ExecuteRequest,
    identity: &Identity,
    terminal: Option<String>,
    mark: &str,
) -> Vec<(String, String)> {
    let path = if identity.user.uid == 0 {
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    } else {
        "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"
    };
    let terminal = match terminal {
        None => "dumb".to_owned(),
        Some(kind) if kind.is_empty() => "vt100".to_owned(),
        Some(kind) => kind,
    };
    let user = &identity.user;
    let mut list = vec![
        ("PATH", path.to_owned()),
        ("HOME", user.home.clone()),
        ("USER", user.name.clone()),
        ("LOGNAME", user.name.clone()),
        ("SHELL", user.shell.clone()),
        ("LANG", "C.UTF-8".to_owned()),
        ("TERM", terminal),
        (kill::MARK, mark.to_owned()),
    ];
    list.retain(|(name, _)| !request.environment.contains_key(*name) || *name == kill::MARK);
    let mut all: Vec<(String, String)> = list
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
    let mut given: Vec<(String, String)> = std::mem::take(&mut request.environment)
        .into_iter()
        .filter(|(name, _)| name != kill::MARK)
        .collect();
    given.sort();
    all.extend(given);
    all
}

/// What to execute: the paths to try and the arguments.
fn command(
    request: &ExecuteRequest,
    identity: &Identity,
    path: &str,
) -> Result<(Vec<CString>, Vec<CString>), Failure> {
    if request.login_shell {
        let shell = &identity.user.shell;
        let name = shell.rsplit('/').next().unwrap_or("sh");
        // login(1): the dash makes it read the profile.
        return Ok((
            vec![c_string(shell.clone())?],
            vec![c_string(format!("-{name}"))?],
        ));
    }
    let program = &request.program;
    if program.is_empty() {
        return Err(Failure::invalid("no program"));
    }
    let mut candidates = Vec::new();
    if program.contains('/') {
        candidates.push(c_string(program.clone())?);
    } else {
        for directory in path.split(':').take(64) {
            let directory = if directory.is_empty() { "." } else { directory };
            candidates.push(c_string(format!("{directory}/{program}"))?);
        }
    }
    let mut arguments = Vec::with_capacity(request.arguments.len() + 1);
    arguments.push(c_string(program.clone())?);
    for argument in &request.arguments {
        arguments.push(c_string(argument.clone())?);
    }
    Ok((candidates, arguments))
}

/// A new terminal: our side, and the program's.
fn open_terminal(size: &Terminal, uid: u32) -> io::Result<(OwnedFd, OwnedFd)> {
    let ours = rustix::fs::open(
        c"/dev/ptmx",
        OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
    )?;
    rustix::pty::unlockpt(&ours)?;
    // By descriptor: a path under /dev/pts would be looked up in whatever is mounted there.
    let theirs = rustix::pty::ioctl_tiocgptpeer(
        &ours,
        rustix::pty::OpenptFlags::RDWR
            | rustix::pty::OpenptFlags::NOCTTY
            | rustix::pty::OpenptFlags::CLOEXEC,
    )?;
    if uid != 0 {
        rustix::fs::fchown(&theirs, Some(rustix::fs::Uid::from_raw(uid)), None)?;
    }
    let (rows, columns) = match (size.rows, size.columns) {
        (0, _) | (_, 0) => (24, 80),
        known => known,
    };
    rustix::termios::tcsetwinsize(&theirs, winsize(rows, columns))?;
    Ok((ours, theirs))
}
