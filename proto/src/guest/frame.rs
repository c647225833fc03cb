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
//!
//! # Bulk frames
//! From version 2 of the protocol on, contents of files travel in frames whose CRC leaves them out:
//!
//! ```text
//! +-------+--------------+--------+-------------+----------+----------------+-----------+
//! | magic | length of    | CRC-32C| length of   | protobuf | contents, not  | the CRC   |
//! | (2)   | the protobuf |        | the contents|          | in the CRC     | once more |
//! +-------+--------------+--------+-------------+----------+----------------+-----------+
//! ```
//!
//! The CRC covers both lengths and the protobuf, a [`StreamData`] of `STREAM_FILE` without its data.
//! Contents have a checksum of their own from end to end (XXH64, of an update SHA-256); a second
//! one on the way found nothing more, and was half of what a copy costs an emulated guest. Nobody
//! waits for contents whose announcement is wrong, and where they are cut short, because the sender
//! died, the CRC does not follow them: then they are looked through like any garbage.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;

use super::v1::{AgentMessage, Stream, StreamData, agent_message::Payload};

/// What a frame begins with.
pub const MAGIC: [u8; 4] = [0xf7, b'G', b'H', 0x01];
/// What a bulk frame begins with.
pub const BULK_MAGIC: [u8; 4] = [0xf7, b'G', b'H', 0x02];
/// Bytes before the protobuf.
pub const HEADER: usize = 12;
/// Bytes before the protobuf of a bulk frame.
const BULK_HEADER: usize = 16;
/// The CRC that follows the contents.
const BULK_TRAILER: usize = 4;
/// Most bytes of the protobuf of a bulk frame: two ids and a few numbers.
const MOST_BULK_HEAD: usize = 256;
/// The first version of the protocol with bulk frames.
pub const BULK_VERSION: u32 = 2;
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

/// Appends a message to `out`, its data outside of the CRC where it is contents of a file.
///
/// # Errors
/// As [`encode`].
pub fn encode_bulk(mut message: AgentMessage, out: &mut BytesMut) -> Result<(), TooLong> {
    let data = match &mut message.payload {
        Some(Payload::StreamData(data))
            if data.stream == Stream::File as i32 && !data.data.is_empty() =>
        {
            std::mem::take(&mut data.data)
        }
        _ => return encode(&message, out),
    };
    let length = message.encoded_len();
    let whole = bulk_length(length, data.len())?;
    out.reserve(whole);
    let start = out.len();
    begin_bulk(&message, out)?;
    out.extend_from_slice(&data);
    let end = end_bulk(&mut out[start..], length);
    out.extend_from_slice(&end);
    Ok(())
}

/// A bulk frame that is made around contents where they lie, such as by reading a file into it: it
/// goes out as it is, without a copy and in the fewest writes.
#[derive(Debug)]
pub struct Envelope {
    frame: Vec<u8>,
    /// Bytes of the protobuf.
    length: usize,
    most: usize,
}

impl Envelope {
    /// One with room for `most` bytes of the contents of a call's file.
    ///
    /// # Errors
    /// [`TooLong`], where such a frame is not allowed.
    pub fn new(message_id: &[u8], session: &[u8], most: usize) -> Result<Self, TooLong> {
        let message = AgentMessage {
            message_id: message_id.to_vec(),
            session: session.to_vec(),
            timestamp: None,
            payload: Some(Payload::StreamData(StreamData {
                stream: Stream::File as i32,
                data: Bytes::new(),
                end: false,
            })),
        };
        let length = message.encoded_len();
        let mut frame = Vec::with_capacity(bulk_length(length, most)?);
        begin_bulk(&message, &mut frame)?;
        Ok(Self {
            frame,
            length,
            most,
        })
    }

    /// Where the contents are appended, at most [`Envelope::room`] bytes of them.
    pub fn contents(&mut self) -> &mut Vec<u8> {
        &mut self.frame
    }

    /// How many bytes may still be appended.
    pub fn room(&self) -> usize {
        self.most.saturating_sub(self.written().len())
    }

    /// What was appended.
    pub fn written(&self) -> &[u8] {
        &self.frame[BULK_HEADER + self.length..]
    }

    /// The frame.
    ///
    /// # Errors
    /// [`TooLong`], where more was appended than there was room for, or nothing.
    pub fn seal(mut self) -> Result<Bytes, TooLong> {
        let contents = self.written().len();
        if contents == 0 || contents > self.most {
            return Err(TooLong { length: contents });
        }
        let end = end_bulk(&mut self.frame, self.length);
        self.frame.extend_from_slice(&end);
        Ok(self.frame.into())
    }
}

/// The whole length of a bulk frame.
fn bulk_length(length: usize, contents: usize) -> Result<usize, TooLong> {
    let whole = BULK_HEADER + length + contents + BULK_TRAILER;
    if length > MOST_BULK_HEAD || whole > HEADER + MOST_PAYLOAD {
        return Err(TooLong {
            length: length + contents,
        });
    }
    Ok(whole)
}

/// Appends a bulk frame up to its contents; the numbers that depend on these are left open.
fn begin_bulk(message: &AgentMessage, out: &mut impl BufMut) -> Result<(), TooLong> {
    let length = message.encoded_len();
    out.put_slice(&BULK_MAGIC);
    // Below a megabyte, see `bulk_length`.
    out.put_u32(length as u32);
    out.put_bytes(0, BULK_HEADER - 8);
    // Encoding fails for want of room alone, and what is appended to here grows.
    message.encode(out).map_err(|_| TooLong { length })
}

/// Fills in what a frame that ends with its contents had left open. Returns what follows them.
fn end_bulk(frame: &mut [u8], length: usize) -> [u8; BULK_TRAILER] {
    let head = BULK_HEADER + length;
    // Below a megabyte, see `bulk_length`.
    let contents = (frame.len() - head) as u32;
    frame[HEADER..BULK_HEADER].copy_from_slice(&contents.to_be_bytes());
    let sum = bulk_checksum(&frame[..head]).to_be_bytes();
    frame[8..HEADER].copy_from_slice(&sum);
    sum
}

/// Of a bulk frame up to its contents.
fn bulk_checksum(head: &[u8]) -> u32 {
    let sum = crc32c::crc32c(&head[4..8]);
    crc32c::crc32c_append(sum, &head[HEADER..])
}

/// Whether a frame of either kind begins here.
pub fn begins(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC) || bytes.starts_with(&BULK_MAGIC)
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
    /// The length of the frame at the front, where that is known to be one; 0 otherwise.
    wanted: usize,
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
        if self.buffer.len() < self.wanted {
            return None;
        }
        self.wanted = 0;
        let garbage = find_magic(&self.buffer);
        if garbage > 0 {
            self.buffer.advance(garbage);
            return Some(Found::Garbage(garbage));
        }
        if self.buffer.len() < HEADER {
            return None;
        }
        let length = be32(&self.buffer[4..8]) as usize;
        if self.buffer.starts_with(&BULK_MAGIC) {
            return self.bulk(length);
        }
        if length > MOST_PAYLOAD {
            return Some(self.skip_magic());
        }
        if self.buffer.len() < HEADER + length {
            // The rest comes in one piece where it can.
            self.buffer.reserve(HEADER + length - self.buffer.len());
            self.wanted = HEADER + length;
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

    /// A bulk frame at the front, whose protobuf has `length` bytes.
    fn bulk(&mut self, length: usize) -> Option<Found> {
        if length > MOST_BULK_HEAD {
            return Some(self.skip_magic());
        }
        let head = BULK_HEADER + length;
        if self.buffer.len() < head {
            return None;
        }
        let contents = be32(&self.buffer[HEADER..BULK_HEADER]) as usize;
        if contents > MOST_PAYLOAD
            || head + contents + BULK_TRAILER > HEADER + MOST_PAYLOAD
            || bulk_checksum(&self.buffer[..head]) != be32(&self.buffer[8..HEADER])
        {
            return Some(self.skip_magic());
        }
        let whole = head + contents + BULK_TRAILER;
        if self.buffer.len() < whole {
            self.buffer.reserve(whole - self.buffer.len());
            self.wanted = whole;
            return None;
        }
        if self.buffer[whole - BULK_TRAILER..whole] != self.buffer[8..HEADER] {
            return Some(self.skip_magic());
        }
        let frame = self.buffer.split_to(whole).freeze();
        Some(match AgentMessage::decode(frame.slice(BULK_HEADER..head)) {
            Ok(mut message) => match &mut message.payload {
                Some(Payload::StreamData(StreamData { stream, data, .. }))
                    if *stream == Stream::File as i32 && data.is_empty() =>
                {
                    *data = frame.slice(head..head + contents);
                    Found::Message(Box::new(message))
                }
                _ => Found::Malformed,
            },
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
        let begun = &bytes[at..seen];
        if *begun == MAGIC[..begun.len()] || *begun == BULK_MAGIC[..begun.len()] {
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

    fn contents(size: usize) -> AgentMessage {
        AgentMessage {
            message_id: vec![7; 16],
            session: vec![9; 16],
            timestamp: None,
            payload: Some(Payload::StreamData(StreamData {
                stream: Stream::File as i32,
                data: (0..size).map(|at| (at % 249) as u8).collect(),
                end: false,
            })),
        }
    }

    fn bulk(message: &AgentMessage) -> BytesMut {
        let mut out = BytesMut::new();
        encode_bulk(message.clone(), &mut out).unwrap();
        out
    }

    #[test]
    fn contents_of_files_travel_beside_the_checksum() {
        let bytes = bulk(&contents(70_000));
        assert!(bytes.starts_with(&BULK_MAGIC) && begins(&bytes));
        let pieces: Vec<&[u8]> = bytes.chunks(4096).collect();
        assert_eq!(read(&pieces), (vec![contents(70_000)], 0, 0));
        let bytewise: Vec<&[u8]> = bytes[..600].chunks(1).chain([&bytes[600..]]).collect();
        assert_eq!(read(&bytewise), (vec![contents(70_000)], 0, 0));
        // All else is as it was.
        for other in [contents(0), message(100)] {
            assert_eq!(bulk(&other), frame(&other));
        }
        let mut output = contents(10);
        if let Some(Payload::StreamData(data)) = &mut output.payload {
            data.stream = Stream::Stdout as i32;
        }
        assert_eq!(bulk(&output), frame(&output));
        assert!(encode_bulk(contents(MOST_PAYLOAD), &mut BytesMut::new()).is_err());
    }

    #[test]
    fn an_envelope_is_the_same_frame() {
        let Some(Payload::StreamData(StreamData { data, .. })) = contents(5_000).payload else {
            unreachable!()
        };
        for most in [5_000, 6_000] {
            let mut envelope = Envelope::new(&[7; 16], &[9; 16], most).unwrap();
            assert_eq!(envelope.room(), most);
            envelope.contents().extend_from_slice(&data);
            assert_eq!(
                (envelope.room(), envelope.written()),
                (most - 5_000, &data[..])
            );
            assert_eq!(envelope.seal().unwrap(), bulk(&contents(5_000)).freeze());
        }
    }

    #[test]
    fn an_envelope_without_contents_or_with_too_much_is_none() {
        let new = |most| Envelope::new(&[7; 16], &[9; 16], most);
        assert!(new(MOST_PAYLOAD).is_err());
        assert!(Envelope::new(&[7; 300], &[9; 16], 4_096).is_err());
        assert!(new(4_096).unwrap().seal().is_err());
        let mut over = new(100).unwrap();
        over.contents().extend_from_slice(&[0; 101]);
        assert_eq!(over.room(), 0);
        assert!(over.seal().is_err());
    }

    #[test]
    fn contents_that_were_cut_short_swallow_nothing() {
        let whole = bulk(&contents(5_000));
        let next = frame(&message(100));
        // The sender died, and what came after it says enough to fill the hole.
        let mut bytes = whole[..3_000].to_vec();
        for _ in 0..50 {
            bytes.extend_from_slice(&next);
        }
        let (messages, malformed, garbage) = read(&[&bytes]);
        assert_eq!((messages.len(), malformed, garbage), (50, 0, 3_000));
    }

    #[test]
    fn a_flipped_bit_of_a_bulk_frame_costs_that_frame_or_is_in_its_contents() {
        let good = bulk(&contents(64));
        let next = frame(&message(1));
        for at in 0..good.len() {
            let mut bad = good.to_vec();
            bad[at] ^= 0x10;
            bad.extend_from_slice(&next);
            bad.extend_from_slice(&vec![0; MOST_PAYLOAD]);
            let (messages, malformed, _) = read(&[&bad]);
            let inside = at >= good.len() - 68 && at < good.len() - 4;
            assert_eq!(
                (messages.len(), malformed),
                (1 + usize::from(inside), 0),
                "byte {at}"
            );
        }
    }

    #[test]
    fn only_contents_of_files_travel_so() {
        // A head that is whole, and announces contents for something else.
        let mut head = BytesMut::new();
        message(3).encode(&mut head).unwrap();
        let mut bytes = BytesMut::new();
        bytes.extend_from_slice(&BULK_MAGIC);
        bytes.extend_from_slice(&u32::try_from(head.len()).unwrap().to_be_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&2u32.to_be_bytes());
        bytes.extend_from_slice(&head);
        let sum = bulk_checksum(&bytes).to_be_bytes();
        bytes[8..12].copy_from_slice(&sum);
        bytes.extend_from_slice(b"ab");
        bytes.extend_from_slice(&sum);
        assert_eq!(read(&[&bytes]), (vec![], 1, 0));
    }

    #[test]
    fn a_message_that_is_too_long_is_refused() {
        let mut out = BytesMut::new();
        assert!(encode(&message(MOST_PAYLOAD), &mut out).is_err());
        assert!(out.is_empty());
        assert!(encode(&message(MOST_PAYLOAD - 100), &mut out).is_ok());
    }
}
