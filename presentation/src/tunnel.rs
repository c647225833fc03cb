//! Streams that Ghost Core opens over this host's link: HTTP/2 with the gRPC services on some,
//! HTTP/1.1 with the HTTP API on others. The first bytes tell which, and each goes to the shell
//! that speaks it.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::sync::{Semaphore, mpsc};

use crate::connection::{Listener, PREFACE};

/// How long a stream may take to say what it speaks.
const PATIENCE: Duration = Duration::from_secs(10);
/// Streams at once that have not said it yet.
const MOST_SILENT: usize = 128;
/// Streams that wait for their shell.
const WAITING: usize = 16;

/// What a stream of Core's is.
pub(crate) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A stream of Core's, and the bytes of it that were read to look at them.
pub struct CoreStream {
    pub(crate) io: Box<dyn Duplex>,
    pub(crate) begun: Vec<u8>,
}

impl std::fmt::Debug for CoreStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CoreStream")
            .field("begun", &self.begun.len())
            .finish_non_exhaustive()
    }
}

/// Parts the streams of the link: the first listener is for [`crate::grpc::serve`], the second for
/// [`crate::http::serve`]. Both end with `streams`, and so does the task that parts them.
pub fn listeners<S>(mut streams: mpsc::Receiver<S>) -> (Listener, Listener)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (to_grpc, grpc) = mpsc::channel(WAITING);
    let (to_http, http) = mpsc::channel(WAITING);
    tokio::spawn(async move {
        let room = Arc::new(Semaphore::new(MOST_SILENT));
        while let Some(stream) = streams.recv().await {
            let Ok(permit) = Arc::clone(&room).try_acquire_owned() else {
                tracing::warn!(
                    most = MOST_SILENT,
                    "too many streams of Core's that say nothing: one was turned away"
                );
                continue;
            };
            let (to_grpc, to_http) = (to_grpc.clone(), to_http.clone());
            tokio::spawn(async move {
                let stream = match tokio::time::timeout(PATIENCE, tell(stream)).await {
                    Ok(Ok(stream)) => stream,
                    Ok(Err(error)) => {
                        tracing::debug!(%error, "a stream of Core's ended before it said anything");
                        return;
                    }
                    Err(_) => {
                        tracing::info!("a stream of Core's said nothing");
                        return;
                    }
                };
                drop(permit);
                let shell = if stream.begun.starts_with(b"PRI") {
                    to_grpc
                } else {
                    to_http
                };
                // Fails only when the shell is gone: then so is the stream.
                drop(shell.send(stream).await);
            });
        }
    });
    (Listener::Tunnel(grpc), Listener::Tunnel(http))
}

/// Reads until it is clear what a stream speaks. No method of HTTP/1.1 begins as the preface of
/// HTTP/2 does: RFC 9113, 3.4, chose it so.
async fn tell<S>(mut stream: S) -> std::io::Result<CoreStream>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let mut begun = Vec::with_capacity(3);
    while begun.len() < 3 && PREFACE.starts_with(&begun) {
        begun.push(stream.read_u8().await?);
    }
    Ok(CoreStream {
        io: Box::new(stream),
        begun,
    })
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    async fn told(bytes: &[u8]) -> Vec<u8> {
        let (mut near, far) = tokio::io::duplex(64);
        near.write_all(bytes).await.unwrap();
        tell(far).await.unwrap().begun
    }

    #[tokio::test]
    async fn http_1_and_http_2_are_told_apart_by_as_few_bytes_as_it_takes() {
        assert_eq!(told(PREFACE).await, b"PRI");
        assert_eq!(told(b"GET / HTTP/1.1\r\n").await, b"G");
        assert_eq!(told(b"POST / HTTP/1.1\r\n").await, b"PO");
        assert_eq!(told(b"PROPFIND / HTTP/1.1\r\n").await, b"PRO");
        assert_eq!(told(b"\0").await, b"\0");
    }

    #[tokio::test]
    async fn a_stream_that_ends_at_once_is_no_stream() {
        let (near, far) = tokio::io::duplex(64);
        drop(near);
        assert!(tell(far).await.is_err());
    }
}
