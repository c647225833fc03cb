//! The sending side of one connection.
//!
//! Whoever has something to say writes it to the socket at once, on its own thread: a request does
//! not wait for another task to wake up. Only where QEMU takes no more does the link's task finish
//! the rest. What is short (requests, answers of the flow control) goes before bulk data, between
//! two frames of it; what is queued is bounded by [`ROOM`], and grants of one stream are added up.

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice};

use bytes::{Buf, Bytes, BytesMut};
use ghost_proto::guest::frame;
use ghost_proto::guest::v1::{AgentMessage, Stream, WindowUpdate, agent_message::Payload};
use parking_lot::Mutex;
use tokio::net::UnixStream;
use tokio::sync::{Notify, Semaphore};

use super::call::CallId;

/// Bytes that may wait to be sent.
pub(super) const ROOM: usize = 512 * 1024;
/// What the smallest frame counts for, so that many small ones are bounded too.
const LEAST_ROOM: usize = 1024;
/// Frames that go to the kernel in one call.
const MOST_SLICES: usize = 32;

/// A way to a guest.
#[derive(Debug)]
pub(super) struct Wire {
    pub(super) stream: UnixStream,
    out: Mutex<Outgoing>,
    /// Room for what waits; closed with the connection.
    pub(super) room: Semaphore,
    /// Tells the link's task that the socket is full and writing is its duty now.
    pub(super) blocked: Notify,
}

#[derive(Debug, Default)]
struct Outgoing {
    /// Written in part.
    current: Option<Frame>,
    urgent: VecDeque<Frame>,
    bulk: VecDeque<Frame>,
    grants: HashMap<(CallId, i32), Grant>,
    /// The socket is full.
    blocked: bool,
    /// The socket takes nothing any more.
    broken: bool,
    /// The link has ended the connection.
    closed: bool,
}

#[derive(Debug)]
struct Frame {
    bytes: Bytes,
    call: Option<CallId>,
    permits: usize,
}

#[derive(Debug)]
struct Grant {
    session: [u8; 16],
    bytes: u64,
}

/// The connection is closed.
#[derive(Debug)]
pub(super) struct Closed;

/// What it takes of [`ROOM`] to send a frame of `length` bytes.
fn permits_for(length: usize) -> usize {
    length.clamp(LEAST_ROOM, ROOM)
}

/// A message as a frame.
pub(super) fn encode(message: &AgentMessage) -> Result<Bytes, frame::TooLong> {
    let mut out = BytesMut::new();
    frame::encode(message, &mut out)?;
    Ok(out.freeze())
}

/// As [`encode`], with contents of a file outside of the checksum.
pub(super) fn encode_bulk(message: AgentMessage) -> Result<Bytes, frame::TooLong> {
    let mut out = BytesMut::new();
    frame::encode_bulk(message, &mut out)?;
    Ok(out.freeze())
}

impl Wire {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            out: Mutex::default(),
            room: Semaphore::new(ROOM),
            blocked: Notify::new(),
        }
    }

    /// Waits for room for a frame of `length` bytes; taken for good by [`Wire::send`].
    pub(super) async fn reserve(
        &self,
        length: usize,
    ) -> Result<tokio::sync::SemaphorePermit<'_>, Closed> {
        let permits = u32::try_from(permits_for(length)).unwrap_or(u32::MAX);
        // Without the fair queue where there is room anyway.
        if let Ok(permit) = self.room.try_acquire_many(permits) {
            return Ok(permit);
        }
        self.room.acquire_many(permits).await.map_err(|_| Closed)
    }

    /// Sends a frame of a call for which room was reserved.
    pub(super) fn send(
        &self,
        bytes: Bytes,
        call: CallId,
        bulk: bool,
        room: tokio::sync::SemaphorePermit<'_>,
    ) -> Result<(), Closed> {
        let mut out = self.out.lock();
        if out.closed {
            return Err(Closed);
        }
        let permits = room.num_permits();
        room.forget();
        let frame = Frame {
            bytes,
            call: Some(call),
            permits,
        };
        if bulk {
            out.bulk.push_back(frame);
        } else {
            out.urgent.push_back(frame);
        }
        self.flush(&mut out);
        Ok(())
    }

    /// Sends something short that may not wait for room: greetings, pings, cancellations. Their
    /// number is bounded by those who send them.
    pub(super) fn send_short(&self, message: &AgentMessage) {
        let Ok(bytes) = encode(message) else {
            return;
        };
        let mut out = self.out.lock();
        if out.closed {
            return;
        }
        out.urgent.push_back(Frame {
            bytes,
            call: None,
            permits: 0,
        });
        self.flush(&mut out);
    }

    /// Lets the guest send so many bytes more.
    pub(super) fn grant(&self, session: [u8; 16], call: CallId, stream: Stream, bytes: u64) {
        let mut out = self.out.lock();
        if out.closed {
            return;
        }
        let grant = out
            .grants
            .entry((call, stream as i32))
            .or_insert(Grant { session, bytes: 0 });
        grant.bytes = grant.bytes.saturating_add(bytes);
        self.flush(&mut out);
    }

    /// Forgets what waits to be sent for a call. Returns whether its first frame was among it: the
    /// guest has then never heard of the call.
    pub(super) fn forget(&self, call: CallId) -> bool {
        let mut out = self.out.lock();
        let mut permits = 0;
        let mut keep = |frame: &Frame| {
            let keep = frame.call != Some(call);
            if !keep {
                permits += frame.permits;
            }
            keep
        };
        out.bulk.retain(&mut keep);
        let before = out.urgent.len();
        out.urgent.retain(&mut keep);
        let unheard = out.urgent.len() < before;
        out.grants.retain(|(other, _), _| *other != call);
        self.room.add_permits(permits);
        unheard
    }

    /// Whether something waits because the guest does not read.
    pub(super) fn is_blocked(&self) -> bool {
        self.out.lock().blocked
    }

    /// Whether the other side went away.
    pub(super) fn is_broken(&self) -> bool {
        self.out.lock().broken
    }

    /// Goes on writing, after the socket was said to take more.
    pub(super) fn resume(&self) {
        self.flush(&mut self.out.lock());
    }

    /// Nothing is sent any more; to the guest the channel stays open.
    pub(super) fn end(&self) {
        *self.out.lock() = Outgoing {
            closed: true,
            ..Outgoing::default()
        };
        self.room.close();
    }

    /// Nothing is sent any more, and the channel is let go.
    pub(super) fn close(&self) {
        self.end();
        // Calls that somebody still holds keep the socket open: QEMU, and by it the guest, learn
        // now that nobody is there. It fails where the other side is gone already.
        let _ = rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Both);
    }

    fn flush(&self, out: &mut Outgoing) {
        let was_blocked = out.blocked;
        out.blocked = false;
        loop {
            out.encode_grants();
            let mut slices = [IoSlice::new(&[]); MOST_SLICES];
            let mut count = 0;
            for frame in out.waiting().take(MOST_SLICES) {
                slices[count] = IoSlice::new(&frame.bytes);
                count += 1;
            }
            if count == 0 {
                return;
            }
            match self.stream.try_write_vectored(&slices[..count]) {
                Ok(written) => {
                    let freed = out.written(written);
                    if freed > 0 {
                        self.room.add_permits(freed);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    out.blocked = error.kind() == io::ErrorKind::WouldBlock;
                    out.broken = !out.blocked;
                    if !was_blocked || out.broken {
                        self.blocked.notify_one();
                    }
                    return;
                }
            }
        }
    }
}

impl Outgoing {
    fn waiting(&self) -> impl Iterator<Item = &Frame> {
        self.current
            .iter()
            .chain(self.urgent.iter())
            .chain(self.bulk.iter())
    }

    /// Grants stay numbers until there is a way for them: a guest that sends and does not read
    /// makes no queue grow.
    fn encode_grants(&mut self) {
        if self.grants.is_empty() || self.urgent.len() > MOST_SLICES {
            return;
        }
        for ((call, stream), grant) in std::mem::take(&mut self.grants) {
            let message = AgentMessage {
                message_id: call.to_vec(),
                session: grant.session.to_vec(),
                timestamp: None,
                payload: Some(Payload::WindowUpdate(WindowUpdate {
                    stream,
                    bytes: grant.bytes,
                })),
            };
            if let Ok(bytes) = encode(&message) {
                self.urgent.push_back(Frame {
                    bytes,
                    call: None,
                    permits: 0,
                });
            }
        }
    }

    /// Takes `count` written bytes off the queues, in the order of [`Outgoing::waiting`]. Returns
    /// the room that this makes.
    fn written(&mut self, mut count: usize) -> usize {
        let mut freed = 0;
        while count > 0 {
            let next = self
                .current
                .take()
                .or_else(|| self.urgent.pop_front())
                .or_else(|| self.bulk.pop_front());
            let Some(mut frame) = next else {
                break;
            };
            if frame.bytes.len() > count {
                frame.bytes.advance(count);
                self.current = Some(frame);
                break;
            }
            count -= frame.bytes.len();
            freed += frame.permits;
        }
        freed
    }
}
