//! A WebSocket as a plain stream of bytes: what Piko makes of it. The bounds of its messages mean
//! nothing; text is an error; a close is the end.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use futures::{Sink, Stream};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};

/// Bounds of what the other side may send at once; a yamux window is the most that makes sense.
pub(in crate::core_link) fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(16 * 1024)
        .write_buffer_size(0)
        .max_write_buffer_size(1024 * 1024)
        .max_message_size(Some(4 * 1024 * 1024))
        .max_frame_size(Some(4 * 1024 * 1024))
}

/// When the last frame came, of whatever kind.
#[derive(Clone, Debug)]
pub(in crate::core_link) struct Heard(Arc<Mutex<Instant>>);

impl Heard {
    pub(super) fn silence(&self) -> std::time::Duration {
        self.0.lock().elapsed()
    }
}

/// See the module's documentation.
pub(in crate::core_link) struct ByteSocket<S> {
    socket: WebSocketStream<S>,
    unread: Bytes,
    heard: Heard,
}

impl<S> ByteSocket<S> {
    pub(in crate::core_link) fn new(socket: WebSocketStream<S>) -> (Self, Heard) {
        let heard = Heard(Arc::new(Mutex::new(Instant::now())));
        let this = Self {
            socket,
            unread: Bytes::new(),
            heard: heard.clone(),
        };
        (this, heard)
    }
}

fn failed(error: WsError) -> io::Error {
    match error {
        WsError::Io(error) => error,
        WsError::ConnectionClosed | WsError::AlreadyClosed => io::ErrorKind::BrokenPipe.into(),
        error => io::Error::new(io::ErrorKind::InvalidData, error),
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for ByteSocket<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.unread.is_empty() {
            let message = match ready!(Pin::new(&mut this.socket).poll_next(context)) {
                Some(Ok(message)) => message,
                None | Some(Err(WsError::ConnectionClosed | WsError::AlreadyClosed)) => {
                    return Poll::Ready(Ok(()));
                }
                Some(Err(error)) => return Poll::Ready(Err(failed(error))),
            };
            *this.heard.0.lock() = Instant::now();
            match message {
                Message::Binary(bytes) => this.unread = bytes,
                Message::Close(_) => return Poll::Ready(Ok(())),
                // A ping is answered by the socket itself, with the next read.
                Message::Ping(_) | Message::Pong(_) => {}
                Message::Text(_) | Message::Frame(_) => {
                    return Poll::Ready(Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "a text message, where only binary ones may come",
                    )));
                }
            }
        }
        let count = this.unread.len().min(buffer.remaining());
        buffer.put_slice(&this.unread.split_to(count));
        if !this.unread.has_remaining() {
            this.unread = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for ByteSocket<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let socket = &mut self.get_mut().socket;
        ready!(Pin::new(&mut *socket).poll_ready(context)).map_err(failed)?;
        let message = Message::Binary(Bytes::copy_from_slice(bytes));
        Pin::new(socket).start_send(message).map_err(failed)?;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket)
            .poll_flush(context)
            .map_err(failed)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match ready!(Pin::new(&mut self.get_mut().socket).poll_close(context)) {
            Ok(()) | Err(WsError::ConnectionClosed | WsError::AlreadyClosed) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(failed(error))),
        }
    }
}
