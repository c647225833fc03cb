//! Framing of [`AgentMessage`]s on the virtio-serial channel.
//!
//! ```text
//! +----------------+----------------+----------------+---------------------+
//! | magic, 4 bytes | length, u32 BE | CRC-32C, u32 BE| protobuf, `length`  |
//! +----------------+----------------+----------------+---------------------+
//! ```
//!
//! The CRC covers the length and the protobuf. The channel has no beginning that both sides could
//! agree on: whoever attaches late, or after the other side died in mid-frame, finds itself in the
//! middle of something. A reader therefore looks for the magic, and where length or CRC do not hold
//! it goes on one byte behind that magic: a length that lies swallows nothing but time. The first
//! byte of the magic is no ASCII and no UTF-8, so that text on the channel is passed over quickly.

use bytes::{Buf, Bytes, BytesMut};
use prost::Message;

use super::v1::AgentMessage;

/// What a frame begins with.
pub const MAGIC: [u8; 4] = [0xf7, b'G', b'H', 0x01];
/// Bytes before the protobuf.
pub const HEADER: usize = 12;
/// Most bytes of a protobuf.
pub const MOST_PAYLOAD: usize = 1024 * 1024 - HEADER;

/// Appends a message to `out` as one frame.
///
/// # Errors
/// [`TooLong`], with nothing appended, where the message exceeds [`MOST_PAYLOAD`].
pub fn encode(message: &AgentMessage, out: &mut BytesMut) -> Result<(), TooLong> {
    let length = message.encoded_len();
    let Some(prefix) = u32::try_from(length)
        .ok()
        .filter(|_| length <= MOST_PAYLOAD)
    else {
        return Err(TooLong { length });
    };
    out.reserve(HEADER + length);
    let start = out.len();
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&prefix.to_be_bytes());
    out.extend_from_slice(&[0; 4]);
    if message.encode(out).is_err() {
        // Encoding fails for want of room alone, and there is room.
        out.truncate(start);
        return Err(TooLong { length });
    }
    let sum = checksum(&out[start + 4..start + 8], &out[start + HEADER..]);
    out[start + 8..start + HEADER].copy_from_slice(&sum.to_be_bytes());
    Ok(())
}

/// A message that no frame may carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLong {
    /// Bytes of its protobuf.
    pub length: usize,
}

impl std::fmt::Display for TooLong {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "a message of {} bytes does not fit into a frame of {MOST_PAYLOAD}",
            self.length
        )
    }
}

impl std::error::Error for TooLong {}

fn checksum(length: &[u8], payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(length), payload)
}

/// What a reader finds.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    /// A message.
    Message(Box<AgentMessage>),
    /// A whole frame whose content is no [`AgentMessage`]: the other side is broken or hostile.
    Malformed,
    /// So many bytes that belong to no frame were passed over.
    Garbage(usize),
}

/// Finds frames in a stream of bytes that comes in any pieces. Holds at most one frame and one
/// piece.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: BytesMut,
}

impl Decoder {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes as they were read. Call [`Decoder::next`] until it has no more before the next
    /// piece is taken.
    pub fn push(&mut self, piece: &[u8]) {
        self.buffer.extend_from_slice(piece);
    }

    /// Room to read into directly; [`Decoder::push`] without the copy.
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// Whether part of a frame waits for its rest.
    pub fn is_waiting(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// What comes next, or `None` until more bytes are there.
    #[expect(
        clippy::should_implement_trait,
        reason = "more may come after None, which iterators do not promise"
    )]
    pub fn next(&mut self) -> Option<Found> {
        let garbage = find_magic(&self.buffer);
        if garbage > 0 {
            self.buffer.advance(garbage);
            return Some(Found::Garbage(garbage));
        }
        if self.buffer.len() < HEADER {
            return None;
        }
        let length = be32(&self.buffer[4..8]) as usize;
        if length > MOST_PAYLOAD {
            return Some(self.skip_magic());
        }
        if self.buffer.len() < HEADER + length {
            // The rest comes in one piece where it can.
            self.buffer.reserve(HEADER + length - self.buffer.len());
            return None;
        }
        let sum = checksum(&self.buffer[4..8], &self.buffer[HEADER..HEADER + length]);
        if sum != be32(&self.buffer[8..HEADER]) {
            return Some(self.skip_magic());
        }
        let frame: Bytes = self.buffer.split_to(HEADER + length).freeze();
        Some(match AgentMessage::decode(frame.slice(HEADER..)) {
            Ok(message) => Found::Message(Box::new(message)),
            Err(_) => Found::Malformed,
        })
    }

    /// Goes on behind the first byte of a magic that was none.
    fn skip_magic(&mut self) -> Found {
        self.buffer.advance(1);
        let more = find_magic(&self.buffer);
        self.buffer.advance(more);
        Found::Garbage(1 + more)
    }
}

fn be32(bytes: &[u8]) -> u32 {
    bytes
        .iter()
        .fold(0, |value, byte| (value << 8) | u32::from(*byte))
}

/// Where the first magic begins, or what may become one; the length where there is neither.
fn find_magic(bytes: &[u8]) -> usize {
    let mut from = 0;
    while let Some(at) = bytes[from..].iter().position(|byte| *byte == MAGIC[0]) {
        let at = from + at;
        let seen = bytes.len().min(at + MAGIC.len());
        if bytes[at..seen] == MAGIC[..seen - at] {
            return at;
        }
        from = at + 1;
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use super::super::v1::{Ping, agent_message::Payload};
    use super::*;

    fn message(size: usize) -> AgentMessage {
        AgentMessage {
            message_id: vec![7; 16],
            payload: Some(Payload::Ping(Ping {
                payload: (0..size).map(|at| (at % 251) as u8).collect(),
            })),
            ..AgentMessage::default()
        }
    }

    fn frame(message: &AgentMessage) -> BytesMut {
        let mut out = BytesMut::new();
        encode(message, &mut out).unwrap();
        out
    }

    fn read(pieces: &[&[u8]]) -> (Vec<AgentMessage>, usize, usize) {
        let mut decoder = Decoder::new();
        let (mut messages, mut malformed, mut garbage) = (Vec::new(), 0, 0);
        for piece in pieces {
            decoder.push(piece);
            while let Some(found) = decoder.next() {
                match found {
                    Found::Message(message) => messages.push(*message),
                    Found::Malformed => malformed += 1,
                    Found::Garbage(bytes) => garbage += bytes,
                }
            }
        }
        (messages, malformed, garbage)
    }

    #[test]
    fn messages_come_back_however_they_are_cut() {
        let messages = [message(0), message(1), message(70_000)];
        let bytes: Vec<u8> = messages.iter().flat_map(frame).collect();
        for size in [1, 3, 11, 4096, bytes.len()] {
            let pieces: Vec<&[u8]> = bytes.chunks(size).collect();
            assert_eq!(read(&pieces), (messages.to_vec(), 0, 0), "pieces of {size}");
        }
    }

    #[test]
    fn garbage_before_between_and_magics_within_are_passed_over() {
        let one = frame(&message(30));
        let mut bytes = b"login: \xf7G\xf7\xf7GH\x00".to_vec();
        let before = bytes.len();
        bytes.extend_from_slice(&one);
        // Half a frame, as after a death in mid-write.
        bytes.extend_from_slice(&one[..20]);
        bytes.extend_from_slice(&one);
        assert_eq!(
            read(&[&bytes]),
            (vec![message(30), message(30)], 0, before + 20)
        );
    }

    #[test]
    fn a_length_that_lies_swallows_nothing() {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&u32::MAX.to_be_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&frame(&message(5)));
        assert_eq!(read(&[&bytes]), (vec![message(5)], 0, 12));
    }

    #[test]
    fn a_flipped_bit_costs_its_own_frame_only() {
        let good = frame(&message(100));
        for at in 0..good.len() {
            let mut bad = good.to_vec();
            bad[at] ^= 0x10;
            bad.extend_from_slice(&good);
            // A length that grew may wait for more than there is: the next frame completes it.
            bad.extend_from_slice(&vec![0; MOST_PAYLOAD]);
            let (messages, malformed, _) = read(&[&bad]);
            assert_eq!((messages.len(), malformed), (1, 0), "bit of byte {at}");
        }
    }

    #[test]
    fn what_is_no_message_is_said_to_be_malformed() {
        let payload = [0xff; 8];
        let mut bytes = MAGIC.to_vec();
        let length = 8u32.to_be_bytes();
        bytes.extend_from_slice(&length);
        bytes.extend_from_slice(&checksum(&length, &payload).to_be_bytes());
        bytes.extend_from_slice(&payload);
        bytes.extend_from_slice(&frame(&message(1)));
        assert_eq!(read(&[&bytes]), (vec![message(1)], 1, 0));
    }

    #[test]
    fn a_message_that_is_too_long_is_refused() {
        let mut out = BytesMut::new();
        assert!(encode(&message(MOST_PAYLOAD), &mut out).is_err());
        assert!(out.is_empty());
        assert!(encode(&message(MOST_PAYLOAD - 100), &mut out).is_ok());
    }
}
