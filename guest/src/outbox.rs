//! What waits to be sent: fair between calls, so that one with endless output delays another by one
//! frame of its own and no more.

use std::collections::{BTreeMap, VecDeque};

use bytes::{Buf, Bytes, BytesMut};
use ghost_proto::guest::frame;
use ghost_proto::guest::v1::{AgentMessage, agent_message::Payload};

use crate::log::say;
use crate::util::now;

/// So much is encoded ahead of the channel; more would only delay what is urgent.
const AHEAD: usize = 96 * 1024;
/// A frame with contents of a file that is longer goes out from where it lies; what is shorter is
/// worth its copy, because every piece is a write of its own, and with it an exit to the hypervisor.
const WORTH_COPYING: usize = 4 * 1024;

/// The id of a call.
pub(crate) type CallId = [u8; 16];

/// What a call sends.
#[expect(
    clippy::large_enum_variant,
    reason = "most are messages, which a box would cost an allocation each"
)]
pub(crate) enum Parcel {
    Message(Payload),
    /// A frame that is ready, with contents of a file.
    Frame(Bytes),
}

impl From<Payload> for Parcel {
    fn from(payload: Payload) -> Self {
        Self::Message(payload)
    }
}

#[derive(Default)]
struct Queue {
    id: CallId,
    parcels: VecDeque<Parcel>,
    bytes: usize,
    ended: bool,
}

#[derive(Default)]
pub(crate) struct Outbox {
    /// What belongs to no call, or is small and urgent.
    control: VecDeque<(Vec<u8>, Payload)>,
    control_bytes: usize,
    queues: BTreeMap<u32, Queue>,
    /// Calls with something to send, in turn.
    ring: VecDeque<u32>,
    /// What is encoded, in order; never with an empty piece.
    wire: VecDeque<Bytes>,
    wire_bytes: usize,
    /// Where frames are encoded.
    scratch: BytesMut,
}

impl Outbox {
    pub(crate) fn control(&mut self, id: Vec<u8>, payload: Payload) {
        self.control_bytes += weight(&payload);
        self.control.push_back((id, payload));
    }

    /// Whether the host sends requests without reading answers.
    pub(crate) fn is_flooded(&self) -> bool {
        self.control_bytes > 1024 * 1024 || self.control.len() > 1024
    }

    pub(crate) fn push(&mut self, serial: u32, id: CallId, parcel: impl Into<Parcel>) {
        let parcel = parcel.into();
        let queue = self.queues.entry(serial).or_insert_with(|| Queue {
            id,
            ..Queue::default()
        });
        if queue.parcels.is_empty() {
            self.ring.push_back(serial);
        }
        queue.bytes += parcel.weight();
        queue.parcels.push_back(parcel);
    }

    /// The last message of a call.
    pub(crate) fn push_final(&mut self, serial: u32, id: CallId, payload: Payload) {
        self.push(serial, id, payload);
        if let Some(queue) = self.queues.get_mut(&serial) {
            queue.ended = true;
        }
    }

    /// Bytes of a call that wait.
    pub(crate) fn waiting(&self, serial: u32) -> usize {
        self.queues.get(&serial).map_or(0, |queue| queue.bytes)
    }

    /// Calls that have ended but whose answers have not been taken yet.
    pub(crate) fn ended(&self) -> usize {
        self.queues.values().filter(|queue| queue.ended).count()
    }

    /// Forgets all: the session is over, and with it whoever would have read this.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Bytes for the channel; empty where there is nothing to send.
    pub(crate) fn wire(&mut self, session: &[u8]) -> &[u8] {
        while self.wire_bytes + self.scratch.len() < AHEAD {
            let (id, parcel) = if let Some((id, payload)) = self.control.pop_front() {
                self.control_bytes = self.control_bytes.saturating_sub(weight(&payload));
                (id, Parcel::Message(payload))
            } else if let Some(serial) = self.ring.pop_front() {
                let Some(queue) = self.queues.get_mut(&serial) else {
                    continue;
                };
                let Some(parcel) = queue.parcels.pop_front() else {
                    continue;
                };
                queue.bytes = queue.bytes.saturating_sub(parcel.weight());
                let id = queue.id.to_vec();
                if !queue.parcels.is_empty() {
                    self.ring.push_back(serial);
                } else if queue.ended {
                    self.queues.remove(&serial);
                }
                (id, parcel)
            } else {
                break;
            };
            match parcel {
                Parcel::Message(payload) => self.encode(id, session, payload),
                Parcel::Frame(frame) => self.enclose(frame),
            }
        }
        self.close_piece();
        self.wire.front().map_or(&[], |piece| piece)
    }

    fn encode(&mut self, id: Vec<u8>, session: &[u8], payload: Payload) {
        let bulk = matches!(payload, Payload::StreamData(_) | Payload::WindowUpdate(_));
        let message = AgentMessage {
            message_id: id,
            timestamp: (!bulk).then(now),
            session: session.to_vec(),
            payload: Some(payload),
        };
        if let Err(error) = frame::encode(&message, &mut self.scratch) {
            // All that is made here is bounded well below a frame.
            say!("not sent: {error}");
        }
    }

    fn enclose(&mut self, frame: Bytes) {
        if frame.len() <= WORTH_COPYING {
            self.scratch.extend_from_slice(&frame);
        } else {
            self.close_piece();
            self.wire_bytes += frame.len();
            self.wire.push_back(frame);
        }
    }

    /// What was encoded so far becomes a piece of its own.
    fn close_piece(&mut self) {
        if !self.scratch.is_empty() {
            self.wire_bytes += self.scratch.len();
            self.wire.push_back(self.scratch.split().freeze());
        }
    }

    /// So much of it went out.
    pub(crate) fn sent(&mut self, bytes: usize) {
        if let Some(piece) = self.wire.front_mut() {
            let bytes = bytes.min(piece.len());
            piece.advance(bytes);
            self.wire_bytes -= bytes;
            if piece.is_empty() {
                self.wire.pop_front();
            }
        }
        if self.wire.is_empty() && self.scratch.capacity() > 4 * AHEAD {
            self.scratch = BytesMut::new();
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.wire.is_empty()
            && self.scratch.is_empty()
            && self.control.is_empty()
            && self.ring.is_empty()
    }
}

impl Parcel {
    fn weight(&self) -> usize {
        match self {
            Self::Message(payload) => weight(payload),
            Self::Frame(frame) => 64 + frame.len(),
        }
    }
}

fn weight(payload: &Payload) -> usize {
    64 + match payload {
        Payload::StreamData(data) => data.data.len(),
        Payload::Pong(pong) => pong.payload.len(),
        Payload::FileListResponse(list) => list.entries.len() * 128,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use ghost_proto::guest::v1::{Done, FileReadResponse, StreamData};

    use super::*;

    fn data(size: usize) -> Payload {
        Payload::StreamData(StreamData {
            stream: 2,
            data: vec![0; size].into(),
            end: false,
        })
    }

    /// What goes out, as the first byte of each call's id.
    fn drain(outbox: &mut Outbox) -> Vec<(u8, bool)> {
        let mut decoder = frame::Decoder::new();
        let mut seen = Vec::new();
        loop {
            let bytes = outbox.wire(&[9; 16]).to_vec();
            if bytes.is_empty() {
                return seen;
            }
            outbox.sent(bytes.len());
            decoder.push(&bytes);
            while let Some(found) = decoder.next() {
                let frame::Found::Message(message) = found else {
                    panic!("{found:?}");
                };
                assert_eq!(message.session, [9; 16]);
                seen.push((
                    message.message_id.first().copied().unwrap_or(0),
                    matches!(message.payload, Some(Payload::Done(_))),
                ));
            }
        }
    }

    #[test]
    fn a_small_answer_passes_a_long_output() {
        let mut outbox = Outbox::default();
        for _ in 0..20 {
            outbox.push(1, [1; 16], data(60_000));
        }
        outbox.push(2, [2; 16], data(1));
        outbox.push_final(2, [2; 16], Payload::Done(Done {}));
        outbox.control(vec![3; 16], Payload::Done(Done {}));
        assert_eq!(outbox.ended(), 1);
        let order = drain(&mut outbox);
        assert_eq!(order.len(), 23);
        assert_eq!(order[0], (3, true));
        let done = order.iter().position(|one| *one == (2, true)).unwrap();
        assert!(done <= 5, "{order:?}");
        assert!(outbox.is_empty());
        assert_eq!((outbox.ended(), outbox.waiting(1)), (0, 0));
    }

    #[test]
    fn contents_of_a_file_go_out_in_one_piece_and_short_ones_with_what_is_beside_them() {
        let frame = |size: usize| {
            let mut envelope = frame::Envelope::new(&[1; 16], &[9; 16], size).unwrap();
            envelope.contents().extend(vec![7; size]);
            Parcel::Frame(envelope.seal().unwrap())
        };
        let mut outbox = Outbox::default();
        let begun = FileReadResponse::default();
        outbox.push(1, [1; 16], Payload::FileReadResponse(begun));
        for _ in 0..3 {
            outbox.push(1, [1; 16], frame(128 * 1024));
        }
        outbox.push(1, [1; 16], frame(100));
        outbox.push_final(1, [1; 16], Payload::Done(Done {}));
        assert!(outbox.waiting(1) > 384 * 1024);
        let mut pieces = Vec::new();
        loop {
            let piece = outbox.wire(&[9; 16]).len();
            if piece == 0 {
                break;
            }
            outbox.sent(piece);
            pieces.push(piece);
        }
        assert_eq!(pieces.len(), 5, "{pieces:?}");
        assert!(pieces[1..4].iter().all(|piece| *piece > 128 * 1024));
        assert!(pieces[4] > 100, "the end goes with the last contents");
        assert_eq!((outbox.ended(), outbox.waiting(1)), (0, 0));
    }

    #[test]
    fn answers_of_one_call_keep_their_order() {
        let mut outbox = Outbox::default();
        outbox.push(1, [1; 16], data(10));
        outbox.push_final(1, [1; 16], Payload::Done(Done {}));
        assert_eq!(drain(&mut outbox), [(1, false), (1, true)]);
    }

    #[test]
    fn unread_answers_are_noticed() {
        let mut outbox = Outbox::default();
        for _ in 0..=1024 {
            assert!(!outbox.is_flooded());
            outbox.control(Vec::new(), Payload::Done(Done {}));
        }
        assert!(outbox.is_flooded());
    }
}
