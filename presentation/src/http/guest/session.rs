//! A program of a guest behind a WebSocket (RFC 6455).
//!
//! Both directions go on side by side, each at the pace of its slower end: output is asked of the
//! guest once the frame before is on its way, and a client's frame is read once the guest took the
//! one before. Nothing is piled up. Whatever ends the session drops the program, which cancels it.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::ws::{CloseFrame, Message, WebSocket, close_code};
use axum::http::{HeaderMap, header};
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use ghost_domain::guest::ExecExit;
use ghost_domain::ports::{ExecEvent, ExecInput, ExecOutput, ExecSession};
use ghost_domain::{Error, ErrorCode, Result};
use serde::Serialize;
use utoipa::ToSchema;

use super::super::problem::Problem;
use super::bodies::Control;
use crate::convert::{self, MOST_PIECE};

/// The subprotocol that a browser names beside its key.
pub(super) const PROTOCOL: &str = "ghost.v1";
/// Most bytes of a frame or message from a client.
pub(super) const MOST_FRAME: usize = 1024 * 1024;
/// How often a client is asked whether it is still there.
const PING_EVERY: Duration = Duration::from_secs(20);
/// So many times it may leave that unanswered.
const MOST_SILENCE: u32 = 3;
/// How long a client may take to take a frame.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long the goodbye may take.
const GOODBYE: Duration = Duration::from_secs(5);

/// What stands before the bytes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::http) enum Framing {
    /// Nothing: a terminal has one stream of output.
    Raw,
    /// The number of the stream: 1 for stdout, 2 for stderr.
    Numbered,
    /// Nothing, and nobody's exit ends it: a serial console.
    Console,
    /// Nothing, and frames are text both ways: what is typed and what is shown, and nothing else is
    /// said. For clients that know terminals of that kind only.
    Text,
}

/// What the server says in text frames.
#[derive(Debug, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(in crate::http) enum Told {
    /// The program runs.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// The program has ended; the last frame.
    Exited(Exit),
    /// The console has ended: the VM went down, or somebody else took it over; the last frame.
    Ended,
    /// The session has ended otherwise; the last frame.
    Error {
        /// Why.
        error: Box<Problem>,
    },
}

/// How a program ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(in crate::http) struct Exit {
    /// Its exit code; null where a signal ended it.
    pub(super) exit_code: Option<u8>,
    /// The signal that ended it.
    pub(super) signal: Option<u8>,
    /// Its time ran out.
    pub(super) timed_out: bool,
    /// It was cancelled.
    pub(super) cancelled: bool,
    /// Bytes of output that the guest threw away.
    pub(super) truncated_bytes: u64,
}

impl From<&ExecExit> for Exit {
    fn from(exit: &ExecExit) -> Self {
        Self {
            exit_code: exit.signal.is_none().then_some(exit.code),
            signal: exit.signal,
            timed_out: exit.timed_out,
            cancelled: exit.cancelled,
            truncated_bytes: exit.truncated_bytes,
        }
    }
}

/// How a session ended.
enum Ended {
    /// The program did, and that was told. With what the closing frame says.
    Exited(String),
    /// The client went away.
    HungUp,
    Failed(Error),
}

/// Refuses a WebSocket that a page of somebody else asks for: browsers let any page open one, and
/// only tell whose page it is (RFC 6455, 10.2).
///
/// # Errors
/// `PermissionDenied`.
pub(in crate::http) fn check_origin(headers: &HeaderMap) -> Result<()> {
    let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or(""));
    let Some(origin) = text(header::ORIGIN) else {
        return Ok(());
    };
    let page = origin
        .strip_prefix("http://")
        .or_else(|| origin.strip_prefix("https://"));
    if page
        .is_some_and(|page| text(header::HOST).is_some_and(|host| host.eq_ignore_ascii_case(page)))
    {
        return Ok(());
    }
    Err(Error::new(
        ErrorCode::PermissionDenied,
        "a page of another origin asks for a session",
    )
    .because("Origin and Host differ")
    .hint("open it from a page of this host, or from a program that sends no Origin"))
}

/// Carries a session until the program ends, the client goes, or `called_off` says why not.
pub(in crate::http) async fn carry(
    socket: WebSocket,
    session: ExecSession,
    framing: Framing,
    called_off: impl Future<Output = Error>,
) {
    let (mut sink, mut source) = socket.split();
    let client = Client::default();
    let ended = {
        let ExecSession { output, input } = session;
        let mut speaking = pin!(speak(&mut sink, output, framing, &client));
        let mut listening = pin!(listen(&mut source, input.as_ref(), framing, &client));
        let mut called_off = pin!(called_off);
        tokio::select! {
            ended = &mut speaking => ended,
            ended = &mut listening => ended,
            error = &mut called_off => Ended::Failed(error),
        }
        // Here the program is dropped, before anybody is told.
    };
    let goodbye = farewell(&mut sink, &mut source, framing, ended);
    drop(tokio::time::timeout(GOODBYE, goodbye).await);
}

/// Tells of a session that could not begin.
pub(super) async fn refuse(socket: WebSocket, error: Error) {
    let (mut sink, mut source) = socket.split();
    let goodbye = farewell(&mut sink, &mut source, Framing::Raw, Ended::Failed(error));
    drop(tokio::time::timeout(GOODBYE, goodbye).await);
}

async fn farewell(
    sink: &mut SplitSink<WebSocket, Message>,
    source: &mut SplitStream<WebSocket>,
    framing: Framing,
    ended: Ended,
) {
    let mut reason = String::new();
    let code = match ended {
        Ended::HungUp => return,
        Ended::Exited(how) => {
            reason = how;
            close_code::NORMAL
        }
        Ended::Failed(error) => {
            tracing::debug!(%error, "a session ended");
            let code = match error.code() {
                ErrorCode::ShuttingDown => close_code::RESTART,
                ErrorCode::InvalidArgument => close_code::INVALID,
                ErrorCode::PayloadTooLarge => close_code::SIZE,
                ErrorCode::Unauthenticated
                | ErrorCode::PermissionDenied
                | ErrorCode::GuestAccessOff
                | ErrorCode::Lockdown => close_code::POLICY,
                _ => close_code::ERROR,
            };
            let told = if framing == Framing::Text {
                reason = error.code().as_str().to_owned();
                Message::text(format!("\r\n{}\r\n", error.message()))
            } else {
                text(&Told::Error {
                    error: Box::new(Problem::from(&error)),
                })
            };
            if sink.send(told).await.is_err() {
                return;
            }
            code
        }
    };
    let frame = CloseFrame {
        code,
        reason: reason.into(),
    };
    if sink.send(Message::Close(Some(frame))).await.is_ok() {
        // Until the client's own close frame: cutting at once could lose it what was said last.
        while let Some(Ok(_)) = source.next().await {}
    }
}

fn text(told: &Told) -> Message {
    // Text and numbers only: there is nothing that JSON could refuse.
    Message::text(serde_json::to_string(told).unwrap_or_default())
}

/// What one direction knows of the client for the other.
#[derive(Default)]
struct Client {
    heard: AtomicBool,
    /// A frame of it is on its way into the guest: until then nothing can be heard.
    busy: AtomicBool,
}

async fn speak(
    sink: &mut SplitSink<WebSocket, Message>,
    mut output: Box<dyn ExecOutput>,
    framing: Framing,
    client: &Client,
) -> Ended {
    let mut pings = tokio::time::interval(PING_EVERY);
    pings.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    pings.reset();
    let mut silence = 0;
    let mut shown = Characters::default();
    loop {
        let frames = tokio::select! {
            event = output.next() => match event {
                Ok(ExecEvent::Started(_)) if framing == Framing::Text => continue,
                Ok(ExecEvent::Stdout(data) | ExecEvent::Stderr(data))
                    if framing == Framing::Text =>
                {
                    data.chunks(MOST_PIECE)
                        .map(|piece| shown.push(piece))
                        .filter(|text| !text.is_empty())
                        .map(Message::text)
                        .collect()
                }
                Ok(ExecEvent::Exited(exit)) if framing == Framing::Text => {
                    return Ended::Exited(told_shortly(&exit));
                }
                Ok(ExecEvent::Started(pid)) => vec![text(&Told::Started { pid })],
                Ok(ExecEvent::Stdout(data)) => framed(framing, 1, &data),
                Ok(ExecEvent::Stderr(data)) => framed(framing, 2, &data),
                Ok(ExecEvent::Exited(exit)) => {
                    let told = match framing {
                        Framing::Console => Told::Ended,
                        _ => Told::Exited(Exit::from(&exit)),
                    };
                    return match send(sink, text(&told)).await {
                        Ok(()) => Ended::Exited(String::new()),
                        Err(ended) => ended,
                    };
                }
                Err(error) => return Ended::Failed(error),
            },
            _ = pings.tick() => {
                let heard = client.heard.swap(false, Ordering::Relaxed);
                if heard || client.busy.load(Ordering::Relaxed) {
                    silence = 0;
                } else {
                    silence += 1;
                }
                if silence > MOST_SILENCE {
                    return Ended::HungUp;
                }
                vec![Message::Ping(Bytes::new())]
            }
        };
        for frame in frames {
            if let Err(ended) = send(sink, frame).await {
                return ended;
            }
        }
    }
}

async fn send(
    sink: &mut SplitSink<WebSocket, Message>,
    frame: Message,
) -> std::result::Result<(), Ended> {
    match tokio::time::timeout(PATIENCE, sink.send(frame)).await {
        Ok(Ok(())) => Ok(()),
        // Nobody is told: a client that takes nothing takes no reason either.
        Ok(Err(_)) | Err(_) => Err(Ended::HungUp),
    }
}

fn framed(framing: Framing, stream: u8, data: &[u8]) -> Vec<Message> {
    data.chunks(MOST_PIECE)
        .map(|piece| {
            let mut frame = Vec::with_capacity(piece.len() + 1);
            if framing == Framing::Numbered {
                frame.push(stream);
            }
            frame.extend_from_slice(piece);
            Message::binary(frame)
        })
        .collect()
}

async fn listen(
    source: &mut SplitStream<WebSocket>,
    input: &dyn ExecInput,
    framing: Framing,
    client: &Client,
) -> Ended {
    loop {
        let frame = match source.next().await {
            Some(Ok(frame)) => frame,
            // Too large, not UTF-8, broken off: the protocol has no way on from here.
            Some(Err(_)) | None => return Ended::HungUp,
        };
        client.heard.store(true, Ordering::Relaxed);
        client.busy.store(true, Ordering::Relaxed);
        let passed = match frame {
            Message::Binary(data) => input.write(data.into()).await,
            Message::Text(text) if framing == Framing::Text => match Resize::read(text.as_str()) {
                Some(Resize { rows, cols }) => {
                    let columns = cols;
                    pass(input, Control::Resize { rows, columns }).await
                }
                None => input.write(text.as_bytes().to_vec()).await,
            },
            Message::Text(text) => match serde_json::from_str(text.as_str()) {
                Ok(control) => pass(input, control).await,
                Err(cause) => {
                    return Ended::Failed(
                        Error::new(ErrorCode::InvalidArgument, "a text frame cannot be read")
                            .because(cause)
                            .hint("bytes for the program go in binary frames"),
                    );
                }
            },
            Message::Close(_) => return Ended::HungUp,
            Message::Ping(_) | Message::Pong(_) => Ok(()),
        };
        client.busy.store(false, Ordering::Relaxed);
        // A program that closed its stdin still takes signals, and its output tells how it ends.
        if let Err(error) = passed {
            tracing::debug!(%error, "input of a program was not taken");
        }
    }
}

async fn pass(input: &dyn ExecInput, control: Control) -> Result<()> {
    match control {
        Control::Resize { rows, columns } => {
            let (rows, columns) = convert::terminal_size(rows, columns)?;
            input.resize(rows, columns).await
        }
        Control::Signal { number } => input.signal(convert::signal(number)?).await,
        Control::StdinEnd => input.end().await,
    }
}

/// What a terminal of text frames says of its size, among what is typed.
#[derive(Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(tag = "type", rename = "resize")]
struct Resize {
    rows: u32,
    cols: u32,
}

impl Resize {
    /// `{"type":"resize","cols":80,"rows":24}`; all else was typed.
    fn read(text: &str) -> Option<Self> {
        if !text.starts_with('{') {
            return None;
        }
        serde_json::from_str(text).ok()
    }
}

/// Bytes as text, where a character may be cut by the end of a piece; what is no text becomes
/// U+FFFD.
#[derive(Debug, Default)]
struct Characters {
    begun: Vec<u8>,
}

impl Characters {
    fn push(&mut self, piece: &[u8]) -> String {
        self.begun.extend_from_slice(piece);
        let mut text = String::new();
        let mut whole = 0;
        for chunk in self.begun.utf8_chunks() {
            text.push_str(chunk.valid());
            whole += chunk.valid().len();
            let invalid = chunk.invalid();
            if invalid.is_empty() {
                continue;
            }
            let last = whole + invalid.len() == self.begun.len();
            let cut = last
                && std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
            if cut {
                break;
            }
            text.push('\u{fffd}');
            whole += invalid.len();
        }
        self.begun.drain(..whole);
        text
    }
}

/// How a program ended, in the few words that a closing frame holds.
fn told_shortly(exit: &ExecExit) -> String {
    match exit.signal {
        Some(signal) => format!("signal {signal}"),
        None => format!("exit code {}", exit.code),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_cut_between_characters_only() {
        let mut shown = Characters::default();
        let euro = "€".as_bytes();
        assert_eq!(shown.push(&[b'a', euro[0]]), "a");
        assert_eq!(shown.push(&euro[1..2]), "");
        assert_eq!(shown.push(&[euro[2], b'b']), "€b");
        assert_eq!(shown.push(&[0xff, b'c', euro[0]]), "\u{fffd}c");
        // A beginning that does not go on is replaced once it is known.
        assert_eq!(shown.push(b"d"), "\u{fffd}d");
    }

    #[test]
    fn a_size_is_told_from_what_is_typed() {
        let size = r#"{"type":"resize","cols":80,"rows":24}"#;
        assert_eq!(Resize::read(size), Some(Resize { rows: 24, cols: 80 }));
        for typed in [
            "ls",
            "{",
            "{\"type\":\"input\"}",
            r#"{"type":"resize","cols":80}"#,
            r#" {"type":"resize","cols":80,"rows":24}"#,
        ] {
            assert_eq!(Resize::read(typed), None, "{typed}");
        }
    }

    #[test]
    fn only_pages_of_this_host_may_open_sessions() {
        let check = |origin: Option<&str>, host: &str| {
            let mut headers = HeaderMap::new();
            if let Some(origin) = origin {
                headers.insert(header::ORIGIN, origin.parse().unwrap());
            }
            headers.insert(header::HOST, host.parse().unwrap());
            check_origin(&headers).is_ok()
        };
        assert!(check(None, "ghost.example:9092"));
        assert!(check(
            Some("https://ghost.example:9092"),
            "Ghost.example:9092"
        ));
        for bad in [
            "https://evil.example",
            "https://ghost.example",
            "https://ghost.example:9092.evil.example",
            "null",
            "",
            "file://",
        ] {
            assert!(!check(Some(bad), "ghost.example:9092"), "{bad}");
        }
    }
}
