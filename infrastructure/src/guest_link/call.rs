//! One call into a guest: what has come for it, what may be sent for it, and how it ended.
//!
//! What the guest sends for a call lies here until it is read; the window keeps that bounded, and
//! where all calls of a guest together hold more than [`MOST_UNREAD`], the one that holds most is
//! ended: its reader has stopped reading.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ghost_domain::{Error, ErrorCode, Result};
use ghost_proto::guest::Flow;
use ghost_proto::guest::frame::BULK_VERSION;
use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::{
    AgentMessage, Cancel, Stream, StreamData, execute_response, file_read_response,
    file_write_response,
};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::session::Session;
use super::{clean, wire};

pub(super) type CallId = [u8; 16];

/// Bytes that all calls of one guest together may hold unread.
pub(super) const MOST_UNREAD: usize = 6 << 20;
/// Small pieces of a stream are put together up to this.
const MOST_MERGED: usize = 64 * 1024;
/// Pieces that wait apart; beyond it a new one is put to the last of its stream.
const MOST_PIECES: usize = 512;

/// What a call is for, which decides what may come for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// One answer.
    Simple,
    /// Started, output, exited.
    Execute,
    /// Opened, data, finished.
    Read,
    /// Accepted, written; an update: nothing, done.
    Write,
}

/// What has come for a call.
#[derive(Debug)]
pub(super) enum Item {
    Answer(Box<Payload>),
    Data(Stream, Vec<u8>),
}

/// What a message of the guest was worth.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Worth {
    /// Part of the call.
    Good,
    /// Allowed, but it carries nothing.
    Idle,
    /// For a call that this side has ended: it was under way.
    Stale,
}

/// A rule of the protocol that was broken, for people.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Violation(pub(super) String);

impl Violation {
    pub(super) fn new(what: impl Into<String>) -> Self {
        Self(what.into())
    }
}

#[derive(Debug)]
pub(super) struct Call {
    pub(super) id: CallId,
    kind: Kind,
    /// How the bytes of its streams flow.
    flow: Flow,
    session: Arc<Session>,
    state: Mutex<State>,
    /// Something came, or the call has ended.
    inbox: Notify,
    /// The window opened, or the final answer came.
    window: Notify,
    /// The call has ended before its time.
    over: CancellationToken,
}

#[derive(Debug, Default)]
struct State {
    inbox: VecDeque<Item>,
    /// Bytes in the inbox.
    unread: usize,
    /// Bytes that came on stdout or the file, and on stderr, and were not granted again.
    outstanding: [u64; 2],
    /// Of those, the ones that were read.
    read: [u64; 2],
    send_window: u64,
    answered: bool,
    finished: bool,
    /// The guest needs not be told that nobody wants the answer.
    told: bool,
    ended: Option<Error>,
}

/// Which of the two windows a stream has.
fn slot(stream: Stream) -> usize {
    usize::from(stream == Stream::Stderr)
}

impl Call {
    pub(super) fn new(id: CallId, kind: Kind, session: Arc<Session>) -> Self {
        let flow = match kind {
            Kind::Read | Kind::Write => Flow::of(Stream::File, session.hello.protocol_version),
            Kind::Simple | Kind::Execute => Flow::STREAM,
        };
        Self {
            id,
            kind,
            flow,
            session,
            state: Mutex::new(State {
                send_window: flow.window,
                ..State::default()
            }),
            inbox: Notify::new(),
            window: Notify::new(),
            over: CancellationToken::new(),
        }
    }

    fn message(&self, payload: Payload) -> AgentMessage {
        AgentMessage {
            message_id: self.id.to_vec(),
            session: self.session.id.to_vec(),
            timestamp: None,
            payload: Some(payload),
        }
    }

    /// Sends a request or a part of one.
    ///
    /// # Errors
    /// `InvalidArgument` where it does not fit into a frame; how the call ended, where it did.
    pub(super) async fn send(&self, payload: Payload) -> Result<()> {
        let bytes = wire::encode(&self.message(payload)).map_err(|error| {
            Error::new(
                ErrorCode::InvalidArgument,
                "the request is too large for the guest's channel",
            )
            .because(error)
        })?;
        let room = tokio::select! {
            room = self.session.wire.reserve(bytes.len()) => room,
            error = self.ending() => return Err(error),
        };
        let room = room.map_err(|wire::Closed| self.session.lost())?;
        self.commit(bytes, false, room)
    }

    fn commit(
        &self,
        bytes: Bytes,
        bulk: bool,
        room: tokio::sync::SemaphorePermit<'_>,
    ) -> Result<()> {
        let sent = {
            // Under the lock: what ends the call forgets, right after, all that was sent before,
            // and nothing comes after it.
            let state = self.state.lock();
            if let Some(error) = &state.ended {
                return Err(error.clone());
            }
            self.session.wire.send(bytes, self.id, bulk, room)
        };
        sent.map_err(|wire::Closed| self.session.lost())
    }

    /// Sends bytes on a stream, waiting for the window. One caller at a time.
    pub(super) async fn send_data(&self, stream: Stream, data: Vec<u8>) -> Result<()> {
        let mut data = Bytes::from(data);
        while !data.is_empty() {
            let most = self.window_for(data.len()).await?;
            let room = tokio::select! {
                room = self.session.wire.reserve(most) => room,
                error = self.ending() => return Err(error),
            };
            let room = room.map_err(|wire::Closed| self.session.lost())?;
            let piece = data.split_to(most);
            self.state.lock().send_window -= most as u64;
            self.send_piece(stream, piece, false, room)?;
        }
        Ok(())
    }

    /// Tells that nothing follows on a stream.
    pub(super) async fn send_end(&self, stream: Stream) -> Result<()> {
        let room = self
            .session
            .wire
            .reserve(0)
            .await
            .map_err(|wire::Closed| self.session.lost())?;
        self.send_piece(stream, Bytes::new(), true, room)
    }

    fn send_piece(
        &self,
        stream: Stream,
        data: Bytes,
        end: bool,
        room: tokio::sync::SemaphorePermit<'_>,
    ) -> Result<()> {
        let message = self.message(Payload::StreamData(StreamData {
            stream: stream as i32,
            data,
            end,
        }));
        let encoded = if self.session.hello.protocol_version >= BULK_VERSION {
            wire::encode_bulk(message)
        } else {
            wire::encode(&message)
        };
        let bytes =
            encoded.map_err(|error| Error::internal(format!("a piece of a stream: {error}")))?;
        self.commit(bytes, true, room)
    }

    /// How much of `length` bytes may be sent now, at least one.
    async fn window_for(&self, length: usize) -> Result<usize> {
        loop {
            {
                let state = self.state.lock();
                if let Some(error) = &state.ended {
                    return Err(error.clone());
                }
                if state.finished {
                    return Err(over());
                }
                let window = usize::try_from(state.send_window).unwrap_or(usize::MAX);
                if window > 0 {
                    return Ok(length.min(window).min(self.flow.most));
                }
            }
            tokio::select! {
                () = self.window.notified() => {}
                () = self.over.cancelled() => {}
            }
        }
    }

    /// Waits until the call has ended before its time.
    async fn ending(&self) -> Error {
        self.over.cancelled().await;
        self.state.lock().ended.clone().unwrap_or_else(given_up)
    }

    /// The next thing that came. May be given up and called again without a loss.
    pub(super) async fn receive(&self) -> Result<Item> {
        loop {
            if let Some(item) = self.take()? {
                return Ok(item);
            }
            self.inbox.notified().await;
        }
    }

    fn take(&self) -> Result<Option<Item>> {
        let mut grant = None;
        let item = {
            let mut state = self.state.lock();
            match state.inbox.pop_front() {
                Some(item) => {
                    if let Item::Data(stream, data) = &item {
                        state.unread -= data.len();
                        self.session.forget_unread(data.len());
                        let slot = slot(*stream);
                        state.read[slot] += data.len() as u64;
                        if state.read[slot] >= self.flow.grant && !state.finished {
                            let bytes = std::mem::take(&mut state.read[slot]);
                            state.outstanding[slot] -= bytes;
                            grant = Some((*stream, bytes));
                        }
                    }
                    Some(item)
                }
                None => match &state.ended {
                    Some(error) => return Err(error.clone()),
                    None => None,
                },
            }
        };
        if let Some((stream, bytes)) = grant {
            self.session
                .wire
                .grant(self.session.id, self.id, stream, bytes);
        }
        Ok(item)
    }

    /// The first answer of the call, at most `patience` from now.
    ///
    /// # Errors
    /// `DeadlineExceeded`; the guest's own error, mapped; `GuestFailed` where it is no answer.
    pub(super) async fn answer(&self, patience: Duration) -> Result<Payload> {
        match tokio::time::timeout(patience, self.receive()).await {
            Ok(Ok(Item::Answer(payload))) => match *payload {
                Payload::Error(error) => Err(failure(&error)),
                payload => Ok(payload),
            },
            Ok(Ok(Item::Data(..))) => Err(nonsense()),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::new(
                ErrorCode::DeadlineExceeded,
                "the agent in the guest does not answer",
            )
            .because(format!("{} s have passed", patience.as_secs()))
            .hint("look at the guest: ghostctl guest status NAME, ghostctl vm logs NAME")),
        }
    }

    /// Takes a message of the guest for this call.
    pub(super) fn deliver(&self, payload: Payload) -> Result<Worth, Violation> {
        let mut state = self.state.lock();
        if state.ended.is_some() {
            return Ok(Worth::Stale);
        }
        if state.finished {
            return Err(Violation::new("a message after a call's final answer"));
        }
        let worth = match payload {
            Payload::StreamData(data) => self.deliver_data(&mut state, &data)?,
            Payload::WindowUpdate(update) => {
                let stream = Stream::try_from(update.stream).unwrap_or(Stream::Unspecified);
                let fits = match self.kind {
                    Kind::Execute => stream == Stream::Stdin,
                    Kind::Write => stream == Stream::File,
                    Kind::Simple | Kind::Read => false,
                };
                if !fits {
                    return Err(Violation::new("a window for a stream that is not sent"));
                }
                if state.send_window >= self.flow.window {
                    // Nothing was sent that it could have consumed.
                    return Ok(Worth::Idle);
                }
                // No more than all of it: a guest that grants without end is believed no further.
                state.send_window = state
                    .send_window
                    .saturating_add(update.bytes)
                    .min(self.flow.window);
                self.window.notify_one();
                return Ok(Worth::Good);
            }
            payload => {
                let is_final = self.judge(&payload, state.answered)?;
                state.answered = true;
                state.finished = is_final;
                state.inbox.push_back(Item::Answer(Box::new(payload)));
                if is_final {
                    self.window.notify_one();
                }
                Worth::Good
            }
        };
        drop(state);
        self.inbox.notify_one();
        Ok(worth)
    }

    fn deliver_data(&self, state: &mut State, piece: &StreamData) -> Result<Worth, Violation> {
        let stream = piece.stream();
        let fits = match self.kind {
            Kind::Execute => matches!(stream, Stream::Stdout | Stream::Stderr),
            Kind::Read => stream == Stream::File,
            Kind::Simple | Kind::Write => false,
        };
        if !fits || !state.answered {
            return Err(Violation::new("data that nobody asked for"));
        }
        if piece.data.len() > self.flow.most {
            return Err(Violation::new("a piece of a stream that is too long"));
        }
        if piece.data.is_empty() {
            // The end of a stream is told by the final answer too.
            return Ok(if piece.end { Worth::Good } else { Worth::Idle });
        }
        let slot = slot(stream);
        let outstanding = state.outstanding[slot] + piece.data.len() as u64;
        if outstanding > self.flow.window {
            return Err(Violation::new("more data than the window allows"));
        }
        state.outstanding[slot] = outstanding;
        state.unread += piece.data.len();
        self.session.count_unread(piece.data.len());
        state.put(stream, &piece.data);
        Ok(Worth::Good)
    }

    /// Whether an answer fits the call, and whether it is the final one.
    fn judge(&self, payload: &Payload, answered: bool) -> Result<bool, Violation> {
        use execute_response::Event as Exec;
        use file_read_response::Event as Read;
        use file_write_response::Event as Write;
        let last = match (self.kind, payload) {
            (_, Payload::Error(_)) => Some(true),
            (Kind::Execute, Payload::ExecuteResponse(response)) => match response.event {
                Some(Exec::Started(_)) if !answered => Some(false),
                Some(Exec::Exited(_)) if answered => Some(true),
                _ => None,
            },
            (Kind::Read, Payload::FileReadResponse(response)) => match response.event {
                Some(Read::Opened(_)) if !answered => Some(false),
                Some(Read::Finished(_)) if answered => Some(true),
                _ => None,
            },
            (Kind::Write, Payload::FileWriteResponse(response)) => match response.event {
                Some(Write::Accepted(_)) if !answered => Some(false),
                Some(Write::Written(_)) if answered => Some(true),
                _ => None,
            },
            (Kind::Write, Payload::Done(_)) => Some(true),
            (
                Kind::Simple,
                Payload::Done(_)
                | Payload::Pong(_)
                | Payload::FileListResponse(_)
                | Payload::FileStatResponse(_)
                | Payload::FreezeResponse(_),
            ) if !answered => Some(true),
            _ => None,
        };
        last.ok_or_else(|| Violation::new("an answer that does not belong to its call"))
    }

    /// The link is gone: what has come is still read, then `error`.
    pub(super) fn lose(&self, error: &Error) {
        {
            let mut state = self.state.lock();
            state.told = true;
            if state.ended.is_none() && !state.finished {
                state.ended = Some(error.clone());
            }
        }
        self.over.cancel();
        self.inbox.notify_one();
    }

    /// Ends the call at once: nothing more of it is sent or read, and the guest is told.
    pub(super) fn cut(&self, error: &Error) {
        let tell = {
            let mut state = self.state.lock();
            self.session.forget_unread(state.unread);
            state.unread = 0;
            state.inbox.clear();
            state.ended = Some(error.clone());
            !state.finished && !std::mem::replace(&mut state.told, true)
        };
        self.over.cancel();
        self.inbox.notify_one();
        let unheard = self.session.wire.forget(self.id);
        if tell && !unheard {
            self.session
                .wire
                .send_short(&self.message(Payload::Cancel(Cancel {})));
        }
    }

    pub(super) fn unread(&self) -> usize {
        self.state.lock().unread
    }
}

impl State {
    fn put(&mut self, stream: Stream, data: &[u8]) {
        let crowded = self.inbox.len() >= MOST_PIECES;
        // Two pieces from the end there is one of each stream, or an answer.
        let from = self.inbox.len().saturating_sub(if crowded { 2 } else { 1 });
        for item in self.inbox.iter_mut().skip(from).rev() {
            if let Item::Data(known, piece) = item
                && *known == stream
                && (crowded || piece.len() + data.len() <= MOST_MERGED)
            {
                piece.extend_from_slice(data);
                return;
            }
        }
        self.inbox.push_back(Item::Data(stream, data.to_vec()));
    }
}

/// A guest's error as ours.
pub(super) fn failure(error: &ghost_proto::guest::v1::Error) -> Error {
    let words = clean::words(&error.message);
    let code = clean::words(&error.code);
    match error.code.as_str() {
        "not_found" => {
            Error::new(ErrorCode::GuestFileNotFound, "the guest has no such file").because(words)
        }
        "outside_roots" => Error::new(
            ErrorCode::GuestPathDenied,
            "the path leads out of what the guest's owner opened",
        )
        .because(words)
        .hint("the guest's owner sets the folders in /etc/ghost/guest.yaml"),
        "frozen" => Error::new(
            ErrorCode::GuestFrozen,
            "the guest's file systems are frozen",
        )
        .because(words)
        .hint("they are thawed at their deadline, or now: ghostctl guest thaw NAME"),
        "unsupported" => Error::new(
            ErrorCode::GuestUnsupported,
            "the agent in the guest cannot do this",
        )
        .because(words),
        "checksum_mismatch" => Error::new(
            ErrorCode::ChecksumMismatch,
            "the guest received other bytes than were sent",
        )
        .because(words)
        .hint("try again"),
        _ => Error::new(ErrorCode::GuestFailed, "the guest refused or failed").because(
            if words.is_empty() {
                code
            } else {
                format!("{words} ({code})")
            },
        ),
    }
}

/// What somebody is told who sends to a call whose final answer has come.
fn over() -> Error {
    Error::new(
        ErrorCode::GuestFailed,
        "the call has ended in the guest and takes no more",
    )
}

fn given_up() -> Error {
    Error::new(ErrorCode::Cancelled, "the call was given up")
}

/// What the guest said makes no sense for what was asked.
pub(super) fn nonsense() -> Error {
    Error::new(
        ErrorCode::GuestFailed,
        "the agent in the guest gave an answer that makes no sense",
    )
}

/// The caller's end of a call; the call is given up when it goes.
#[derive(Debug)]
pub(super) struct CallHandle(pub(super) Arc<Call>);

impl std::ops::Deref for CallHandle {
    type Target = Arc<Call>;
    fn deref(&self) -> &Arc<Call> {
        &self.0
    }
}

impl Drop for CallHandle {
    fn drop(&mut self) {
        self.0.session.remove(self.0.id);
        self.0.cut(&given_up());
    }
}
