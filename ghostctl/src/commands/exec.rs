//! `exec` and `shell`: a program in a guest, with this process as its stdin, stdout and stderr.
//!
//! What it writes is passed on as it is, bytes and all: it was asked for. The first Ctrl-C is the
//! program's; whoever presses it again wants out, and the agent kills the program's process group
//! once our stream is gone.

use std::future::poll_fn;
use std::io::{IsTerminal, Read};
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use base64::Engine as _;
use ghost_proto::agent::v1::exec_input::{Input, StdinEnd};
use ghost_proto::agent::v1::exec_output::Output;
use ghost_proto::agent::v1::{ExecExited, ExecInput, ExecOutput, ExecStart, GuestTerminal};
use serde::Serialize;
use tokio::io::AsyncWriteExt as _;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::wire;
use crate::arguments::{ExecArgs, Format, ShellArgs, Surroundings};
use crate::connect::{Agent, Session};
use crate::errors::{ErrorCode, Exit, Failure, timed_out};
use crate::terminal::{self, RawTerminal};
use crate::text::{human_size, printable};

/// What a document may hold of a program's output, where nobody said otherwise.
const CAPTURED: u64 = 16 << 20;

/// timeout(1) ends so.
const TIMED_OUT: u8 = 124;

/// Linux numbers, whatever they are here: they are for the guest.
const SIGINT: u8 = 2;
const SIGHUP: u8 = 1;
const SIGTERM: u8 = 15;

/// The outcome, as `-o json` shows it.
#[derive(Serialize)]
struct Captured {
    vm: String,
    /// Null where a signal ended it.
    exit_code: Option<u32>,
    signal: Option<u32>,
    timed_out: bool,
    cancelled: bool,
    truncated_bytes: u64,
    /// As text; what is no UTF-8 in it is replaced, and the bytes stand in `stdout_base64`.
    stdout: String,
    stderr: String,
    stdout_base64: Option<String>,
    stderr_base64: Option<String>,
}

pub(super) async fn exec(args: ExecArgs, session: &Session) -> Result<Exit, Failure> {
    let capture = matches!(session.printer.format(), Format::Json | Format::Yaml);
    if capture && args.tty {
        return Err(Failure::usage("--tty and a document do not go together")
            .because("a terminal is for a person")
            .hint("leave out --tty, or -o"));
    }
    let at_hand = !std::io::stdin().is_terminal() && !stdin_is_null();
    let mut command = args.command.into_iter();
    let start = ExecStart {
        program: command.next().unwrap_or_default(),
        arguments: command.collect(),
        stdin: !args.no_stdin && (args.tty || args.stdin || at_hand),
        terminal: args.tty.then(terminal_here),
        timeout: args.timeout.map(wire),
        max_output_bytes: args
            .max_output
            .unwrap_or(if capture { CAPTURED } else { 0 }),
        ..surroundings(args.name, args.surroundings)?
    };
    run(start, args.timeout, capture, session).await
}

/// Whether stdin is the null device, as under cron: the command finds its own at the end then, and no
/// message has to say so.
fn stdin_is_null() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let device = |path| std::fs::metadata(path).map(|meta| (meta.mode(), meta.rdev()));
    matches!((device("/dev/stdin"), device("/dev/null")), (Ok(ours), Ok(null)) if ours == null)
}

pub(super) async fn shell(args: ShellArgs, session: &Session) -> Result<Exit, Failure> {
    if session.printer.format() != Format::Table {
        return Err(Failure::usage("a shell has no document").hint("ghostctl exec NAME -- CMD"));
    }
    let start = ExecStart {
        login_shell: true,
        stdin: true,
        terminal: std::io::stdin().is_terminal().then(terminal_here),
        ..surroundings(args.name, args.surroundings)?
    };
    run(start, None, false, session).await
}

fn surroundings(vm: String, here: Surroundings) -> Result<ExecStart, Failure> {
    let mut start = ExecStart {
        vm,
        working_directory: here.workdir.unwrap_or_default(),
        ..ExecStart::default()
    };
    (start.user, start.group) = here.user.unwrap_or_default();
    for (key, value) in here.environment {
        let value = match value {
            Some(value) => value,
            None => match std::env::var(&key) {
                Ok(value) => value,
                // What is not set here is not set there.
                Err(std::env::VarError::NotPresent) => continue,
                Err(std::env::VarError::NotUnicode(_)) => {
                    return Err(Failure::usage(format!("the variable {key} is not text"))
                        .because("it is not valid UTF-8"));
                }
            },
        };
        start.environment.insert(key, value);
    }
    Ok(start)
}

fn terminal_here() -> GuestTerminal {
    // Where there is no terminal (a script that wants one for its program): the old default.
    let (rows, columns) = terminal::size().unwrap_or((24, 80));
    GuestTerminal {
        rows,
        columns,
        kind: std::env::var("TERM")
            .ok()
            .filter(|kind| !kind.is_empty())
            .unwrap_or_else(|| "xterm-256color".to_owned()),
    }
}

/// Why a session ended.
enum End {
    Exited(ExecExited),
    /// Nobody reads our stdout any more.
    OutputClosed,
    /// Enter ~ .
    Left,
    /// A signal of this number told us to go.
    Signal(u8),
}

async fn run(
    start: ExecStart,
    limit: Option<Duration>,
    capture: bool,
    session: &Session,
) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let vm = start.vm.clone();
    let (has_stdin, in_terminal) = (start.stdin, start.terminal.is_some());
    let interactive = in_terminal && std::io::stdin().is_terminal();
    let mut signals = Signals::listen()?;
    let mut resized = listen(SignalKind::window_change())?;
    let (input, receiver) = mpsc::channel(16);
    // There is room: the channel is empty.
    drop(input.try_send(message(Input::Start(start))));
    let asked = async {
        let mut stream = agent
            .guest()
            .exec(ReceiverStream::new(receiver))
            .await
            .map_err(|status| agent.failure(&status))?
            .into_inner();
        // A refusal comes before the program does: until then the terminal is left alone.
        let first = next(&mut stream, &agent).await?;
        Ok::<_, Failure>((stream, first))
    };
    let (mut stream, first) = tokio::select! {
        biased;
        begun = asked => begun?,
        number = signals.next() => return Err(interrupted(&vm, number)),
    };
    let mut sink = if capture {
        Sink::Captured(Vec::new(), Vec::new())
    } else {
        Sink::Passed(tokio::io::stdout(), tokio::io::stderr())
    };
    let raw = interactive.then(RawTerminal::enter).transpose()?;
    let (leave, mut left) = mpsc::channel(1);
    if has_stdin {
        forward_stdin(input.clone(), interactive.then_some(leave));
    }
    let end = {
        let mut output = pin!(pass(first, &mut stream, &agent, &mut sink));
        let mut told = false;
        loop {
            tokio::select! {
                biased;
                end = &mut output => break end,
                Some(()) = left.recv() => break Ok(End::Left),
                _ = resized.recv(), if in_terminal => {
                    if let Some((rows, columns)) = terminal::size() {
                        // A full channel is an input that nobody takes; the next resize tells.
                        drop(input.try_send(message(Input::Resize(GuestTerminal {
                            rows, columns, kind: String::new(),
                        }))));
                    }
                }
                number = signals.next() => {
                    let away = number == SIGHUP || (interactive && number == SIGTERM);
                    if told || away {
                        break Ok(End::Signal(number));
                    }
                    told = true;
                    let signal = message(Input::Signal(number.into()));
                    if input.try_send(signal).is_err() {
                        break Ok(End::Signal(number));
                    }
                }
            }
        }
    };
    // Before anything else is written, or the lines would run down the screen like stairs.
    drop(raw);
    match end? {
        End::Exited(exited) => finish(vm, exited, sink, limit, session),
        End::OutputClosed => Ok(Exit::Done),
        End::Left => {
            session.printer.note(&format!(
                "\nleft {}; what ran there is killed",
                printable(&vm)
            ));
            Ok(Exit::Done)
        }
        End::Signal(number) if interactive => Ok(Exit::Command(128 + number)),
        End::Signal(number) => Err(interrupted(&vm, number)),
    }
}

fn interrupted(vm: &str, number: u8) -> Failure {
    Failure::new(
        ErrorCode::Interrupted,
        format!("left {vm} before its command had ended; the command is killed"),
    )
    .because(match number {
        SIGINT => "Ctrl-C".to_owned(),
        number => format!("signal {number}"),
    })
}

fn message(input: Input) -> ExecInput {
    ExecInput { input: Some(input) }
}

async fn next(
    stream: &mut Streaming<ExecOutput>,
    agent: &Agent,
) -> Result<Option<Output>, Failure> {
    match stream.message().await {
        Ok(Some(output)) => Ok(output.output),
        Ok(None) => Err(Failure::new(
            ErrorCode::GuestUnreachable,
            "the command was lost before it had ended",
        )
        .because("the agent ended the session without an outcome")
        .hint("whether it runs on is not known; ghostctl guest status NAME")),
        Err(status) => Err(agent.failure(&status)),
    }
}

/// Where output goes.
enum Sink {
    Passed(tokio::io::Stdout, tokio::io::Stderr),
    Captured(Vec<u8>, Vec<u8>),
}

impl Sink {
    async fn stdout(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            // Flushed each time: a prompt has no line end.
            Self::Passed(stdout, _) => {
                stdout.write_all(bytes).await?;
                stdout.flush().await
            }
            Self::Captured(stdout, _) => {
                stdout.extend_from_slice(bytes);
                Ok(())
            }
        }
    }

    async fn stderr(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Self::Passed(_, stderr) => {
                stderr.write_all(bytes).await?;
                stderr.flush().await
            }
            Self::Captured(_, stderr) => {
                stderr.extend_from_slice(bytes);
                Ok(())
            }
        }
    }
}

/// Passes output on until the program has ended. A reader of ours that is slow holds up the
/// program, and not our signals.
async fn pass(
    first: Option<Output>,
    stream: &mut Streaming<ExecOutput>,
    agent: &Agent,
    sink: &mut Sink,
) -> Result<End, Failure> {
    let mut output = first;
    loop {
        let written = match output {
            Some(Output::Stdout(bytes)) => sink.stdout(&bytes).await,
            Some(Output::Stderr(bytes)) => sink.stderr(&bytes).await,
            Some(Output::Exited(exited)) => return Ok(End::Exited(exited)),
            // What a newer agent adds is not for us.
            Some(Output::Started(_)) | None => Ok(()),
        };
        match written {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {
                return Ok(End::OutputClosed);
            }
            Err(error) => return Err(Failure::io("output cannot be written", &error)),
        }
        output = next(stream, agent).await?;
    }
}

fn finish(
    vm: String,
    exited: ExecExited,
    sink: Sink,
    limit: Option<Duration>,
    session: &Session,
) -> Result<Exit, Failure> {
    let exit = if exited.timed_out {
        Exit::Command(TIMED_OUT)
    } else if exited.signal > 0 {
        Exit::Command(u8::try_from(128 + exited.signal.min(127)).unwrap_or(u8::MAX))
    } else {
        Exit::Command(u8::try_from(exited.code).unwrap_or(u8::MAX))
    };
    if let Sink::Captured(stdout, stderr) = sink {
        let captured = Captured {
            vm,
            exit_code: (exited.signal == 0).then_some(exited.code),
            signal: Some(exited.signal).filter(|signal| *signal > 0),
            timed_out: exited.timed_out,
            cancelled: exited.cancelled,
            truncated_bytes: exited.truncated_bytes,
            stdout_base64: unless_text(&stdout),
            stderr_base64: unless_text(&stderr),
            stdout: String::from_utf8_lossy(&stdout).into_owned(),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
        };
        session.printer.several(
            std::slice::from_ref(&captured),
            1,
            |captured| &captured.vm,
            |_, _| String::new(),
        )?;
        return Ok(exit);
    }
    if exited.truncated_bytes > 0 {
        session.printer.warning(&format!(
            "the output was cut: {} more were thrown away",
            human_size(exited.truncated_bytes)
        ));
    }
    if exited.timed_out {
        // The code says the same; a person reads words.
        session.failed(&timed_out(
            "the command was not done in its time and was killed",
            limit.unwrap_or_default(),
        ));
    } else if exited.cancelled {
        return Err(
            Failure::new(ErrorCode::Cancelled, "the command was cut off")
                .because("somebody switched guest access off, or locked the host down")
                .hint("ghostctl lockdown status, ghostctl audit list"),
        );
    }
    Ok(exit)
}

fn unless_text(bytes: &[u8]) -> Option<String> {
    std::str::from_utf8(bytes)
        .is_err()
        .then(|| base64::engine::general_purpose::STANDARD.encode(bytes))
}

/// The signals that want an end.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
}

fn listen(kind: SignalKind) -> Result<Signal, Failure> {
    signal(kind).map_err(|error| Failure::io("signals cannot be watched for", &error))
}

impl Signals {
    fn listen() -> Result<Self, Failure> {
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hang_up: listen(SignalKind::hangup())?,
        })
    }

    /// The number of the next one.
    async fn next(&mut self) -> u8 {
        poll_fn(|context| {
            for (signal, number) in [
                (&mut self.interrupt, SIGINT),
                (&mut self.terminate, SIGTERM),
                (&mut self.hang_up, SIGHUP),
            ] {
                if signal.poll_recv(context).is_ready() {
                    return Poll::Ready(number);
                }
            }
            Poll::Pending
        })
        .await
    }
}

/// Reads stdin in a thread of its own: a blocking read cannot be called off, and must not hold up
/// the end of the program.
fn forward_stdin(input: mpsc::Sender<ExecInput>, leave: Option<mpsc::Sender<()>>) {
    std::thread::spawn(move || {
        let mut escape = Escape::default();
        let mut buffer = [0; 32 << 10];
        let mut stdin = std::io::stdin().lock();
        loop {
            let read = match stdin.read(&mut buffer) {
                Ok(0) | Err(_) => break,
                Ok(read) => &buffer[..read],
            };
            let (bytes, left) = match &leave {
                Some(_) => escape.pass(read),
                None => (read.to_vec(), false),
            };
            if !bytes.is_empty()
                && input
                    .blocking_send(message(Input::Stdin(bytes.into())))
                    .is_err()
            {
                return;
            }
            if let (true, Some(leave)) = (left, &leave) {
                // The main loop is there, or has already left.
                let _ = leave.blocking_send(());
                return;
            }
        }
        // A terminal that is gone sends SIGHUP, and that decides.
        let _ = input.blocking_send(message(Input::StdinEnd(StdinEnd {})));
    });
}

/// Finds `~.` at the beginning of a line, ssh's way out of a session that hangs; `~~` is one `~`.
struct Escape {
    state: EscapeState,
}

#[derive(Clone, Copy, PartialEq)]
enum EscapeState {
    LineStart,
    Tilde,
    InLine,
}

impl Default for Escape {
    fn default() -> Self {
        Self {
            state: EscapeState::LineStart,
        }
    }
}

impl Escape {
    /// What goes on to the guest, and whether the person wants to leave.
    fn pass(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut out = Vec::with_capacity(typed.len());
        for &byte in typed {
            match (self.state, byte) {
                (EscapeState::Tilde, b'.') => return (out, true),
                (EscapeState::Tilde, b'~') => {
                    out.push(byte);
                    self.state = EscapeState::InLine;
                    continue;
                }
                (EscapeState::LineStart, b'~') => {
                    self.state = EscapeState::Tilde;
                    continue;
                }
                (EscapeState::Tilde, _) => out.push(b'~'),
                (EscapeState::LineStart | EscapeState::InLine, _) => {}
            }
            out.push(byte);
            self.state = match byte {
                b'\r' | b'\n' => EscapeState::LineStart,
                _ => EscapeState::InLine,
            };
        }
        (out, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a guest gets of what is typed, in one piece and byte by byte.
    fn typed(keys: &str) -> (String, bool) {
        let whole = Escape::default().pass(keys.as_bytes());
        let mut escape = Escape::default();
        let mut bytes = Vec::new();
        let mut left = false;
        for key in keys.bytes() {
            let (more, leave) = escape.pass(&[key]);
            bytes.extend(more);
            left |= leave;
            if leave {
                break;
            }
        }
        assert_eq!(whole, (bytes.clone(), left), "{keys:?}");
        (String::from_utf8(bytes).unwrap(), left)
    }

    #[test]
    fn only_a_tilde_and_a_dot_at_a_lines_beginning_leave() {
        for (keys, guest, left) in [
            ("ls ~.\r", "ls ~.\r", false),
            ("ls\r~.", "ls\r", true),
            ("~.", "", true),
            ("~~.", "~.", false),
            ("~/x\r", "~/x\r", false),
            ("~\r~.", "~\r", true),
            ("\x03", "\x03", false),
        ] {
            assert_eq!(typed(keys), (guest.to_owned(), left), "{keys:?}");
        }
    }
}
