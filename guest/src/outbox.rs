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
/// Contents of a file that are longer go out from where they lie; what is shorter is worth its copy,
/// because every piece is a write of its own, and with it an exit to the hypervisor.
const WORTH_COPYING: usize = 4 * 1024;

/// The id of a call.
pub(crate) type CallId = [u8; 16];

#[derive(Default)]
struct Queue {
    id: CallId,
    messages: VecDeque<Payload>,
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
    /// The host knows bulk frames.
    bulk: bool,
}

impl Outbox {
    pub(crate) fn control(&mut self, id: Vec<u8>, payload: Payload) {
        self.control_bytes += weight(&payload);
        self.control.push_back((id, payload));
    }

    /// Whether this session's host knows bulk frames; not after [`Outbox::clear`].
    pub(crate) fn speak_bulk(&mut self, bulk: bool) {
        self.bulk = bulk;
    }

    /// Whether the host sends requests without reading answers.
    pub(crate) fn is_flooded(&self) -> bool {
        self.control_bytes > 1024 * 1024 || self.control.len() > 1024
    }

    pub(crate) fn push(&mut self, serial: u32, id: CallId, payload: Payload) {
        let queue = self.queues.entry(serial).or_insert_with(|| Queue {
            id,
            ..Queue::default()
        });
        if queue.messages.is_empty() {
            self.ring.push_back(serial);
        }
        queue.bytes += weight(&payload);
        queue.messages.push_back(payload);
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
            let (id, payload) = if let Some((id, payload)) = self.control.pop_front() {
                self.control_bytes = self.control_bytes.saturating_sub(weight(&payload));
                (id, payload)
            } else if let Some(serial) = self.ring.pop_front() {
                let Some(queue) = self.queues.get_mut(&serial) else {
                    continue;
                };
                let Some(payload) = queue.messages.pop_front() else {
                    continue;
                };
                queue.bytes = queue.bytes.saturating_sub(weight(&payload));
                let id = queue.id.to_vec();
                if !queue.messages.is_empty() {
                    self.ring.push_back(serial);
                } else if queue.ended {
                    self.queues.remove(&serial);
                }
                (id, payload)
            } else {
                break;
            };
            let bulk = matches!(payload, Payload::StreamData(_) | Payload::WindowUpdate(_));
            let message = AgentMessage {
                message_id: id,
                timestamp: (!bulk).then(now),
                session: session.to_vec(),
                payload: Some(payload),
            };
            if let Err(error) = self.encode(message) {
                // All that is made here is bounded well below a frame.
                say!("not sent: {error}");
            }
        }
        self.close_piece();
        self.wire.front().map_or(&[], |piece| piece)
    }

    fn encode(&mut self, message: AgentMessage) -> Result<(), frame::TooLong> {
        if !self.bulk {
            return frame::encode(&message, &mut self.scratch);
        }
        let Some(contents) = frame::encode_around(message, &mut self.scratch)? else {
            return Ok(());
        };
        if contents.data.len() <= WORTH_COPYING {
            self.scratch.extend_from_slice(&contents.data);
        } else {
            self.close_piece();
            self.wire_bytes += contents.data.len();
            self.wire.push_back(contents.data);
        }
        self.scratch.extend_from_slice(&contents.trailer);
        Ok(())
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
    use ghost_proto::guest::v1::{Done, StreamData};

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
