//! The control stream: messages with their length before them.
//!
//! Both halves keep what is under way in themselves, so a future of theirs may be dropped (in a
//! `select!`) at any point: the next call goes on where it stopped.

use std::io;

use bytes::{Buf, BufMut, BytesMut};
use ghost_proto::core::MOST_LINK_MESSAGE;
use ghost_proto::core::v1::{LinkMessage, link_message::Kind};
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const LENGTH_BYTES: usize = 4;
/// A buffer that grew beyond this is given back once it is empty: most messages are pings.
const KEPT: usize = 1024;
/// Most bytes that wait to be sent. A peer that reads nothing would otherwise fill the memory.
const MOST_WAITING: usize = 4 * MOST_LINK_MESSAGE;

/// Reads messages.
#[derive(Debug)]
pub struct MessageReader<R> {
    io: R,
    buffer: BytesMut,
}

impl<R: AsyncRead + Unpin> MessageReader<R> {
    /// Reads from `io`.
    pub fn new(io: R) -> Self {
        Self {
            io,
            buffer: BytesMut::new(),
        }
    }

    /// The next message; `None` where the peer ended the stream after a whole one. May be dropped.
    ///
    /// # Errors
    /// `InvalidData` for a message that is too long, malformed or of no kind that we know;
    /// `UnexpectedEof` for half a one; else what the stream says.
    pub async fn next(&mut self) -> io::Result<Option<Kind>> {
        loop {
            if let Some(message) = self.parse()? {
                return Ok(Some(message));
            }
            // The buffer grows with what came, not with what was announced.
            self.buffer.reserve(KEPT);
            if self.io.read_buf(&mut self.buffer).await? == 0 {
                return if self.buffer.is_empty() {
                    Ok(None)
                } else {
                    Err(io::ErrorKind::UnexpectedEof.into())
                };
            }
        }
    }

    fn parse(&mut self) -> io::Result<Option<Kind>> {
        let Some(prefix) = self.buffer.first_chunk::<LENGTH_BYTES>() else {
            return Ok(None);
        };
        let length = usize::try_from(u32::from_be_bytes(*prefix)).unwrap_or(usize::MAX);
        if length > MOST_LINK_MESSAGE {
            return Err(invalid(format!(
                "a message of {length} bytes, and {MOST_LINK_MESSAGE} is the most"
            )));
        }
        let Some(body) = self.buffer.get(LENGTH_BYTES..LENGTH_BYTES + length) else {
            return Ok(None);
        };
        let message = LinkMessage::decode(body).map_err(|error| invalid(error.to_string()))?;
        self.buffer.advance(LENGTH_BYTES + length);
        if self.buffer.is_empty() {
            // What is shared with nobody; a large one is not kept for the pings that follow.
            self.buffer = if length > KEPT {
                BytesMut::new()
            } else {
                std::mem::take(&mut self.buffer)
            };
        }
        message
            .kind
            .map(Some)
            .ok_or_else(|| invalid("a message of no kind that is known here".to_owned()))
    }
}

/// Writes messages.
#[derive(Debug)]
pub struct MessageWriter<W> {
    io: W,
    buffer: BytesMut,
}

impl<W: AsyncWrite + Unpin> MessageWriter<W> {
    /// Writes to `io`.
    pub fn new(io: W) -> Self {
        Self {
            io,
            buffer: BytesMut::new(),
        }
    }

    /// Adds a message to what [`Self::flush`] sends.
    ///
    /// # Errors
    /// `InvalidInput` for one that is too long; `WouldBlock` where the peer has left 4 MiB unread.
    pub fn queue(&mut self, kind: Kind) -> io::Result<()> {
        let message = LinkMessage { kind: Some(kind) };
        let length = message.encoded_len();
        if length > MOST_LINK_MESSAGE {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("a message of {length} bytes, and {MOST_LINK_MESSAGE} is the most"),
            ));
        }
        if self.buffer.len() + length > MOST_WAITING {
            return Err(io::Error::new(
                io::ErrorKind::WouldBlock,
                "the other side reads nothing",
            ));
        }
        self.buffer.reserve(LENGTH_BYTES + length);
        self.buffer
            .put_u32(u32::try_from(length).unwrap_or(u32::MAX));
        message
            .encode(&mut self.buffer)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
    }

    /// Whether there is something to send.
    pub fn is_waiting(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// Sends what is queued. May be dropped; the next call sends the rest.
    ///
    /// # Errors
    /// What the stream says.
    pub async fn flush(&mut self) -> io::Result<()> {
        while !self.buffer.is_empty() {
            if self.io.write_buf(&mut self.buffer).await? == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
        }
        if self.buffer.capacity() > KEPT {
            self.buffer = BytesMut::new();
        }
        self.io.flush().await
    }

    /// Queues one message and sends all.
    ///
    /// # Errors
    /// As [`Self::queue`] and [`Self::flush`].
    pub async fn send(&mut self, kind: Kind) -> io::Result<()> {
        self.queue(kind)?;
        self.flush().await
    }

    /// The stream below.
    pub fn get_mut(&mut self) -> &mut W {
        &mut self.io
    }
}

fn invalid(cause: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, cause)
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use ghost_proto::core::v1::{Goodbye, Ping};
    use proptest::prelude::*;

    use super::*;

    fn ping(number: u64) -> Kind {
        Kind::Ping(Ping { number })
    }

    fn long(bytes: usize) -> Kind {
        Kind::Goodbye(Goodbye {
            message: "x".repeat(bytes),
            ..Goodbye::default()
        })
    }

    #[tokio::test]
    async fn messages_come_whole_and_in_order_through_a_narrow_pipe() {
        let (near, far) = tokio::io::duplex(3);
        let mut writer = MessageWriter::new(near);
        let mut reader = MessageReader::new(far);
        for number in 0..50 {
            writer.queue(ping(number)).unwrap();
        }
        writer.queue(long(100_000)).unwrap();
        let send = async {
            // Dropped again and again in the middle.
            while writer.is_waiting() {
                let _ = writer.flush().now_or_never();
                tokio::task::yield_now().await;
            }
            drop(writer);
        };
        let receive = async {
            let mut kinds = Vec::new();
            loop {
                match reader.next().now_or_never() {
                    Some(Ok(Some(kind))) => kinds.push(kind),
                    Some(Ok(None)) => return kinds,
                    Some(Err(error)) => panic!("{error}"),
                    None => tokio::task::yield_now().await,
                }
            }
        };
        let ((), kinds) = tokio::join!(send, receive);
        assert_eq!(kinds.len(), 51);
        assert_eq!(kinds[49], ping(49));
        assert_eq!(kinds[50], long(100_000));
    }

    #[tokio::test]
    async fn too_long_and_half_messages_are_errors() {
        let mut writer = MessageWriter::new(tokio::io::sink());
        let error = writer.queue(long(MOST_LINK_MESSAGE)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(!writer.is_waiting());

        let announced = u32::try_from(MOST_LINK_MESSAGE + 1).unwrap().to_be_bytes();
        let mut reader = MessageReader::new(announced.as_slice());
        let error = reader.next().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);

        let mut reader = MessageReader::new([0, 0, 0, 9, 1].as_slice());
        let error = reader.next().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn a_peer_that_reads_nothing_fills_no_memory() {
        let (near, _far) = tokio::io::duplex(16);
        let mut writer = MessageWriter::new(near);
        let error = loop {
            if let Err(error) = writer.queue(long(500_000)) {
                break error;
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert!(writer.buffer.len() <= MOST_WAITING);
    }

    #[tokio::test]
    async fn an_idle_stream_keeps_no_buffer() {
        let (near, far) = tokio::io::duplex(1024 * 1024);
        let mut writer = MessageWriter::new(near);
        let mut reader = MessageReader::new(far);
        writer.send(long(300_000)).await.unwrap();
        assert!(reader.next().await.unwrap().is_some());
        assert!(writer.buffer.capacity() <= KEPT);
        assert!(
            reader.buffer.capacity() <= KEPT,
            "{}",
            reader.buffer.capacity()
        );
    }

    proptest! {
        #[test]
        fn garbage_is_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            let mut reader = MessageReader::new(bytes.as_slice());
            while let Some(Ok(Some(_))) = reader.next().now_or_never() {}
        }
    }
}
