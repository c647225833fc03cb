//! Accepting connections: limits, TLS, and who is at the other end.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use ghost_domain::{Error, Result, Timestamp};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;

use crate::socket::{LocalPeer, LocalSocket};
use crate::tunnel::{CoreStream, Duplex};

/// A bound listener.
#[derive(Debug)]
pub enum Listener {
    /// The local socket.
    Local(LocalSocket),
    /// TCP with TLS.
    Tls(TcpListener, Arc<ServerConfig>),
    /// TCP without TLS: for loopback, or where the owner insists.
    Plain(TcpListener),
    /// Streams that Ghost Core opens over this host's link; see [`crate::core_listeners`].
    Tunnel(mpsc::Receiver<CoreStream>),
}

/// Reads a client certificate (DER) that TLS has verified. The composition root gives it.
pub type CertificateReader = Arc<dyn Fn(&[u8]) -> Result<PeerCertificate> + Send + Sync>;

/// What a client certificate says that matters for each call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerCertificate {
    /// Whose it is.
    pub credential: ghost_domain::CredentialId,
    /// When it ends: a connection may outlast it, its calls may not.
    pub expires_at: Timestamp,
}

/// Who is at the other end of a connection.
#[derive(Clone, Debug)]
pub(crate) enum Peer {
    /// A process of this host.
    Local(LocalPeer),
    /// Somebody with a client certificate, or one that is none of ours.
    Certificate(Result<PeerCertificate, Error>),
    /// Ghost Core itself, over this host's link: it says for each call who makes it.
    Core,
    /// Somebody without.
    Nobody,
}

/// Bounds of connections.
#[derive(Clone, Debug)]
pub struct ConnectionLimits {
    /// Most at once on one listener. Each listener has its own budget, so that strangers on the
    /// network cannot lock the host's owner out of the local socket.
    pub most: usize,
    /// How long the TLS handshake and the first bytes of the protocol may take.
    pub handshake: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            most: 512,
            handshake: Duration::from_secs(10),
        }
    }
}

/// Accepts until `stop`, and hands each connection, TLS done, to `serve` in a task of its own.
pub(crate) async fn accept<F, R>(
    mut listener: Listener,
    limits: ConnectionLimits,
    certificates: Option<CertificateReader>,
    stop: CancellationToken,
    serve: F,
) where
    F: Fn(Connection) -> R + Clone + Send + Sync + 'static,
    R: Future<Output = ()> + Send,
{
    let room = Arc::new(Semaphore::new(limits.most));
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            accepted = next(&mut listener) => accepted,
        };
        let (raw, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, most likely: trying again at once would burn the CPU.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&room).try_acquire_owned() else {
            tracing::warn!(
                ?address,
                most = limits.most,
                "too many connections: one was turned away"
            );
            continue;
        };
        let tls = match &listener {
            Listener::Tls(_, config) => Some(TlsAcceptor::from(Arc::clone(config))),
            Listener::Local(_) | Listener::Plain(_) | Listener::Tunnel(_) => None,
        };
        let (stop, serve, patience) = (stop.clone(), serve.clone(), limits.handshake);
        let certificates = certificates.clone();
        tokio::spawn(async move {
            let ready = tokio::select! {
                () = stop.cancelled() => return,
                ready = tokio::time::timeout(patience, establish(raw, tls, certificates)) => ready,
            };
            let (io, peer, begun) = match ready {
                Ok(Ok(ready)) => ready,
                Ok(Err(error)) => {
                    tracing::info!(?address, %error, "a connection was refused in its handshake");
                    return;
                }
                Err(_) => {
                    tracing::info!(
                        ?address,
                        "a connection did not finish its handshake in time"
                    );
                    return;
                }
            };
            serve(Connection {
                io,
                peer,
                address,
                begun,
                cut: None,
                _permit: permit,
            })
            .await;
        });
    }
}

enum Raw {
    Local(UnixStream, LocalPeer),
    Tcp(TcpStream),
    Core(CoreStream),
}

async fn next(listener: &mut Listener) -> io::Result<(Raw, Option<SocketAddr>)> {
    match listener {
        Listener::Local(socket) => {
            let (stream, peer) = socket.accept().await?;
            Ok((Raw::Local(stream, peer), None))
        }
        Listener::Tls(listener, _) | Listener::Plain(listener) => {
            let (stream, address) = listener.accept().await?;
            stream.set_nodelay(true)?;
            Ok((Raw::Tcp(stream), Some(address)))
        }
        Listener::Tunnel(streams) => match streams.recv().await {
            Some(stream) => Ok((Raw::Core(stream), None)),
            // There is no link any more, and never will be.
            None => std::future::pending().await,
        },
    }
}

async fn establish(
    raw: Raw,
    tls: Option<TlsAcceptor>,
    certificates: Option<CertificateReader>,
) -> io::Result<(Io, Peer, Vec<u8>)> {
    match (raw, tls) {
        (Raw::Local(stream, peer), _) => Ok((Io::Local(stream), Peer::Local(peer), Vec::new())),
        (Raw::Core(stream), _) => {
            let begun = stream.begun.into_iter().rev().collect();
            Ok((Io::Core(stream.io), Peer::Core, begun))
        }
        (Raw::Tcp(stream), None) => Ok((Io::Tcp(stream), Peer::Nobody, Vec::new())),
        (Raw::Tcp(stream), Some(acceptor)) => {
            let stream = acceptor.accept(stream).await?;
            let shown = stream
                .get_ref()
                .1
                .peer_certificates()
                .and_then(<[_]>::first);
            let peer = match (shown, certificates) {
                (Some(der), Some(read)) => Peer::Certificate(read(der)),
                _ => Peer::Nobody,
            };
            Ok((Io::Tls(Box::new(stream)), peer, Vec::new()))
        }
    }
}

enum Io {
    Local(UnixStream),
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    Core(Box<dyn Duplex>),
}

/// One connection, as bytes; it holds its place among the connections until it is dropped.
pub(crate) struct Connection {
    io: Io,
    peer: Peer,
    address: Option<SocketAddr>,
    /// Bytes that were read to look at them, still to be given out (reversed: the next is last).
    begun: Vec<u8>,
    cut: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
    _permit: OwnedSemaphorePermit,
}

/// The first bytes of every HTTP/2 connection (RFC 9113, 3.4).
pub(crate) const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

impl Connection {
    pub(crate) fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// Who is at the other end.
    pub(crate) fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Ends the connection when `token` is cancelled, whatever it is doing.
    pub(crate) fn cut_by(&mut self, token: CancellationToken) {
        self.cut = Some(Box::pin(token.cancelled_owned()));
    }

    /// Reads the HTTP/2 preface. Garbage ends here, and so does a peer that connects and says
    /// nothing: hyper by itself would wait for it forever.
    pub(crate) async fn expect_http2(&mut self, patience: Duration) -> io::Result<()> {
        let mut seen = [0u8; PREFACE.len()];
        let read = self.read_exact(&mut seen);
        tokio::time::timeout(patience, read)
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "it said nothing"))??;
        if seen != *PREFACE {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "it does not speak HTTP/2",
            ));
        }
        self.begun = PREFACE.iter().rev().copied().collect();
        Ok(())
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(cut) = &mut self.cut
            && cut.as_mut().poll(context).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        if !self.begun.is_empty() {
            while buffer.remaining() > 0
                && let Some(byte) = self.begun.pop()
            {
                buffer.put_slice(&[byte]);
            }
            return Poll::Ready(Ok(()));
        }
        match &mut self.io {
            Io::Local(stream) => Pin::new(stream).poll_read(context, buffer),
            Io::Tcp(stream) => Pin::new(stream).poll_read(context, buffer),
            Io::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
            Io::Core(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Local(stream) => Pin::new(stream).poll_write(context, data),
            Io::Tcp(stream) => Pin::new(stream).poll_write(context, data),
            Io::Tls(stream) => Pin::new(stream).poll_write(context, data),
            Io::Core(stream) => Pin::new(stream).poll_write(context, data),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Local(stream) => Pin::new(stream).poll_flush(context),
            Io::Tcp(stream) => Pin::new(stream).poll_flush(context),
            Io::Tls(stream) => Pin::new(stream).poll_flush(context),
            Io::Core(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Local(stream) => Pin::new(stream).poll_shutdown(context),
            Io::Tcp(stream) => Pin::new(stream).poll_shutdown(context),
            Io::Tls(stream) => Pin::new(stream).poll_shutdown(context),
            Io::Core(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}
