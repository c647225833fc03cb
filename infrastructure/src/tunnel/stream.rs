//! One stream of a session.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt};

use super::session::Shared;

/// A stream of bytes to the peer and from it. Dropping it resets it, unless it was shut down and
/// read to its end.
///
/// Reading gives an error, and not the end, where the peer reset the stream or the connection broke.
/// One thing it cannot tell: once this side was shut down, a reset looks like the end, and so does
/// a connection that breaks in the moment of reading. What is half closed needs lengths of its own.
pub struct TunnelStream(Box<Inner>);

struct Inner {
    stream: Compat<yamux::Stream>,
    incoming: bool,
    shut: bool,
    waker: Arc<AtomicWaker>,
    shared: Arc<Shared>,
}

impl TunnelStream {
    pub(super) fn new(stream: yamux::Stream, incoming: bool, shared: Arc<Shared>) -> Self {
        let waker = Arc::new(AtomicWaker::new());
        shared.count_in(stream.id().val(), incoming, Arc::clone(&waker));
        Self(Box::new(Inner {
            stream: stream.compat(),
            incoming,
            shut: false,
            waker,
            shared,
        }))
    }

    /// Writes nothing, which tells the peer that the stream exists, or that it was accepted.
    pub(super) fn announce(&mut self, context: &mut Context<'_>) {
        // A new stream has credit and room for a frame, so this cannot wait; and a connection that
        // is over is told by what comes next.
        let _ = Pin::new(&mut self.0.stream).poll_write(context, &[]);
    }

    /// Its number in the session.
    pub fn id(&self) -> u32 {
        self.0.stream.get_ref().id().val()
    }

    /// Whether the peer opened it.
    pub fn is_incoming(&self) -> bool {
        self.0.incoming
    }
}

impl Inner {
    /// What the end of the bytes means.
    fn ended(&self) -> io::Result<()> {
        let over = self.stream.get_ref().is_closed();
        match self.shared.ended() {
            Some(closed) if over && !closed.is_orderly() => Err(io::Error::new(
                io::ErrorKind::ConnectionReset,
                closed.to_string(),
            )),
            // With its sending side open, a stream is over only where it was reset or its session
            // ended under it: the peer's end alone leaves it half open.
            Some(closed) if over && !self.shut => Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                closed.to_string(),
            )),
            None if over && !self.shut => Err(io::Error::new(
                io::ErrorKind::ConnectionReset,
                "the other side reset the stream",
            )),
            _ => Ok(()),
        }
    }

    fn write_failed(&self, error: io::Error) -> io::Error {
        let cause = match self.shared.ended() {
            Some(closed) => closed.to_string(),
            None if error.kind() == io::ErrorKind::WriteZero => {
                "the other side reset the stream".to_owned()
            }
            None => return error,
        };
        io::Error::new(io::ErrorKind::BrokenPipe, cause)
    }
}

impl AsyncRead for TunnelStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let inner = &mut *self.get_mut().0;
        if buffer.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        match Pin::new(&mut inner.stream).poll_read(context, buffer) {
            Poll::Ready(Ok(())) if buffer.filled().len() == before => Poll::Ready(inner.ended()),
            Poll::Ready(Ok(())) => Poll::Ready(Ok(())),
            Poll::Ready(Err(error)) => Poll::Ready(Err(inner.write_failed(error))),
            Poll::Pending => {
                // A session that we close does not wake its streams.
                inner.waker.register(context.waker());
                match inner.shared.ended() {
                    None => Poll::Pending,
                    Some(closed) => Poll::Ready(Err(io::Error::new(
                        io::ErrorKind::ConnectionAborted,
                        closed.to_string(),
                    ))),
                }
            }
        }
    }
}

impl AsyncWrite for TunnelStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let inner = &mut *self.get_mut().0;
        let polled = ready!(Pin::new(&mut inner.stream).poll_write(context, bytes));
        Poll::Ready(polled.map_err(|error| inner.write_failed(error)))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let inner = &mut *self.get_mut().0;
        let polled = ready!(Pin::new(&mut inner.stream).poll_flush(context));
        Poll::Ready(polled.map_err(|error| inner.write_failed(error)))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let inner = &mut *self.get_mut().0;
        if inner.shut {
            return Poll::Ready(Ok(()));
        }
        let polled = ready!(Pin::new(&mut inner.stream).poll_shutdown(context));
        if polled.is_ok() {
            inner.shut = true;
        }
        Poll::Ready(polled.map_err(|error| inner.write_failed(error)))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let id = self.stream.get_ref().id().val();
        self.shared.count_out(id, self.incoming);
    }
}

impl fmt::Debug for TunnelStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TunnelStream")
            .field("id", &self.id())
            .field("incoming", &self.0.incoming)
            .finish_non_exhaustive()
    }
}
