//! `vm console`: this terminal becomes the VM's serial console, until Ctrl-].
//!
//! What the guest writes goes to the terminal as it is: an editor or an installer would be of no
//! use otherwise. Whoever attaches to a console trusts the guest that far; `vm logs` does not.

use std::io::{IsTerminal, Read};

use ghost_proto::agent::v1::ConsoleInput;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::connect::Session;
use crate::errors::{Exit, Failure};
use crate::terminal::RawTerminal;
use crate::text::printable;

/// Ctrl-], as in telnet and virsh.
const DETACH: u8 = 0x1d;

/// Why the console ended.
enum End {
    /// The person pressed Ctrl-].
    Detached,
    /// The agent closed it: the VM went down, or somebody else took it over.
    Closed,
    /// A signal told us to go.
    Signal,
}

pub(super) async fn run(name: &str, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let shown = printable(name);
    let (input, receiver) = mpsc::channel(64);
    let first = ConsoleInput {
        vm: name.to_owned(),
        data: Vec::new(),
    };
    // There is room: the channel is empty.
    drop(input.try_send(first));
    let mut output = agent
        .vms()
        .console(ReceiverStream::new(receiver))
        .await
        .map_err(|status| agent.failure(&status))?
        .into_inner();
    let failed_signal = |error| Failure::io("signals cannot be watched for", &error);
    let mut terminate = signal(SignalKind::terminate()).map_err(failed_signal)?;
    let mut hang_up = signal(SignalKind::hangup()).map_err(failed_signal)?;
    let interactive = std::io::stdin().is_terminal();
    session.printer.note(&format!(
        "attached to the console of {shown}{}",
        if interactive { "; Ctrl-] detaches" } else { "" }
    ));
    let raw = interactive.then(RawTerminal::enter).transpose()?;
    let (detach, mut detached) = mpsc::channel(1);
    forward_stdin(input, interactive.then_some(detach));
    let end = loop {
        tokio::select! {
            message = output.message() => match message {
                Ok(Some(message)) => {
                    if let Err(failure) = session.printer.bytes(&message.data) {
                        break Err(failure);
                    }
                }
                Ok(None) => break Ok(End::Closed),
                Err(status) => break Err(agent.failure(&status)),
            },
            Some(()) = detached.recv() => break Ok(End::Detached),
            _ = terminate.recv() => break Ok(End::Signal),
            _ = hang_up.recv() => break Ok(End::Signal),
        }
    };
    // Before anything else is written, or the lines would run down the screen like stairs.
    drop(raw);
    if interactive {
        session.printer.note("");
    }
    match end? {
        End::Detached => session
            .printer
            .note(&format!("detached from {shown}; it goes on")),
        End::Closed => session
            .printer
            .note(&format!("the console of {shown} was closed by the agent")),
        End::Signal => return Ok(Exit::Failed),
    }
    Ok(Exit::Done)
}

/// Reads stdin in a thread of its own: a blocking read cannot be called off, and must not hold up
/// the end of the program.
fn forward_stdin(input: mpsc::Sender<ConsoleInput>, detach: Option<mpsc::Sender<()>>) {
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        let mut stdin = std::io::stdin().lock();
        // At the end of stdin the sender is dropped, which ends our half of the stream only.
        while let Ok(read @ 1..) = stdin.read(&mut buffer) {
            let typed = &buffer[..read];
            let (typed, leave) = match (&detach, typed.iter().position(|b| *b == DETACH)) {
                (Some(_), Some(end)) => (&typed[..end], true),
                _ => (typed, false),
            };
            let message = ConsoleInput {
                vm: String::new(),
                data: typed.to_vec(),
            };
            if !typed.is_empty() && input.blocking_send(message).is_err() {
                return;
            }
            if leave {
                if let Some(detach) = &detach {
                    // The main loop is there, or has already left.
                    let _ = detach.blocking_send(());
                }
                return;
            }
        }
        // On a terminal that is gone there is nobody left to serve.
    });
}
