//! The connection under a session.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::session::Shared;

/// One frame: a header of 12 bytes and at most 16 KiB of body. yamux writes the two one after the
/// other, and each write to a TLS stream would be a record and a system call of its own.
const MOST_PENDING: usize = 16 * 1024 + 256;
/// A buffer larger than this is given back once it is empty.
const KEPT: usize = 512;

/// A connection whose writes are gathered until they are flushed.
pub(super) struct Transport<T> {
    io: T,
    pending: Vec<u8>,
    /// How much of `pending` is written.
    written: usize,
    shut: bool,
    shared: Arc<Shared>,
}

impl<T> Transport<T> {
    pub(super) fn new(io: T, shared: Arc<Shared>) -> Self {
        Self {
            io,
            pending: Vec::new(),
            written: 0,
            shut: false,
            shared,
        }
    }
}

impl<T: AsyncWrite + Unpin> Transport<T> {
    fn drain(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(rest) = self.pending.get(self.written..)
            && !rest.is_empty()
        {
            match Pin::new(&mut self.io).poll_write(context, rest) {
                Poll::Pending => {
                    self.shared.set_blocked(true);
                    return Poll::Pending;
                }
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(count)) => self.written += count,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            }
        }
        self.shared.set_blocked(false);
        self.written = 0;
        if self.pending.capacity() > KEPT {
            self.pending = Vec::new();
        } else {
            self.pending.clear();
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + Unpin> futures::io::AsyncRead for Transport<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let mut buffer = ReadBuf::new(buffer);
        ready!(Pin::new(&mut this.io).poll_read(context, &mut buffer))?;
        let count = buffer.filled().len();
        if count > 0 {
            this.shared.note_heard();
        }
        Poll::Ready(Ok(count))
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> futures::io::AsyncWrite for Transport<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.pending.len() + bytes.len() > MOST_PENDING {
            ready!(this.drain(context))?;
            if bytes.len() > MOST_PENDING {
                return Pin::new(&mut this.io).poll_write(context, bytes);
            }
        }
        this.pending.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.drain(context))?;
        Pin::new(&mut this.io).poll_flush(context)
    }

    fn poll_close(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.shut {
            ready!(this.drain(context))?;
            ready!(Pin::new(&mut this.io).poll_shutdown(context))?;
            this.shut = true;
        }
        // What is still under way to us is taken until the peer has closed too. A socket that is
        // closed with something unread resets the connection, and the peer would then see a broken
        // one instead of our farewell.
        loop {
            let mut scratch = [0; 1024];
            let mut buffer = ReadBuf::new(&mut scratch);
            let read = ready!(Pin::new(&mut this.io).poll_read(context, &mut buffer));
            if read.is_err() || buffer.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
        }
    }
}
