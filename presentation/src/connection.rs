//! Accepting connections: limits, TLS, and who is at the other end.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use ghost_domain::{Error, Result, Timestamp};
use rustls::ServerConfig;
use rustls::server::Acceptor;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::server::TlsStream;
use tokio_rustls::{LazyConfigAcceptor, TlsAcceptor};
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
    /// The same, with a door for Ghost Core's own connections to this host.
    Door(TcpListener, Arc<ServerConfig>, CoreDoor),
    /// TCP without TLS: for loopback, or where the owner insists.
    Plain(TcpListener),
    /// Streams that Ghost Core opens over this host's link; see [`crate::core_listeners`].
    Tunnel(mpsc::Receiver<CoreStream>),
}

/// How Ghost Core comes in at a listener that others use too: by a protocol of its own (ALPN), with a
/// TLS configuration of its own, which accepts nobody but Core. The composition root gives it.
#[derive(Clone)]
pub struct CoreDoor {
    /// The protocol.
    pub protocol: &'static [u8],
    /// Its TLS; `None` where Core may not come in now: then there is no such protocol.
    pub tls: Arc<dyn Fn() -> Option<Arc<ServerConfig>> + Send + Sync>,
    /// Serves a connection of Core until it ends.
    pub serve: Arc<dyn Fn(TlsStream<TcpStream>) -> BoxFuture<'static, ()> + Send + Sync>,
}

impl std::fmt::Debug for CoreDoor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CoreDoor").finish_non_exhaustive()
    }
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
            Listener::Tls(_, config) => Some((Arc::clone(config), None)),
            Listener::Door(_, config, door) => Some((Arc::clone(config), Some(door.clone()))),
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
                Ok(Ok(Established::Caller(io, peer, begun))) => (io, peer, begun),
                Ok(Ok(Established::Core(serving))) => {
                    tokio::select! {
                        () = stop.cancelled() => {}
                        () = serving => {}
                    }
                    drop(permit);
                    return;
                }
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
        Listener::Tls(listener, _) | Listener::Door(listener, ..) | Listener::Plain(listener) => {
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

/// What became of a connection that was accepted.
enum Established {
    /// Somebody who calls.
    Caller(Io, Peer, Vec<u8>),
    /// Core, by its own door.
    Core(BoxFuture<'static, ()>),
}

async fn establish(
    raw: Raw,
    tls: Option<(Arc<ServerConfig>, Option<CoreDoor>)>,
    certificates: Option<CertificateReader>,
) -> io::Result<Established> {
    let caller = Established::Caller;
    match (raw, tls) {
        (Raw::Local(stream, peer), _) => {
            Ok(caller(Io::Local(stream), Peer::Local(peer), Vec::new()))
        }
        (Raw::Core(stream), _) => {
            let begun = stream.begun.into_iter().rev().collect();
            Ok(caller(Io::Core(stream.io), Peer::Core, begun))
        }
        (Raw::Tcp(stream), None) => Ok(caller(Io::Tcp(stream), Peer::Nobody, Vec::new())),
        (Raw::Tcp(stream), Some((config, door))) => {
            let stream = match door {
                None => TlsAcceptor::from(config).accept(stream).await?,
                Some(door) => match shake(stream, config, &door).await? {
                    (stream, true) => return Ok(Established::Core((door.serve)(stream))),
                    (stream, false) => stream,
                },
            };
            let shown = stream
                .get_ref()
                .1
                .peer_certificates()
                .and_then(<[_]>::first);
            let peer = match (shown, certificates) {
                (Some(der), Some(read)) => Peer::Certificate(read(der)),
                _ => Peer::Nobody,
            };
            Ok(caller(Io::Tls(Box::new(stream)), peer, Vec::new()))
        }
    }
}

/// A handshake by the configuration for Core where Core's protocol is asked for, else by that for
/// everybody; says which.
async fn shake(
    stream: TcpStream,
    config: Arc<ServerConfig>,
    door: &CoreDoor,
) -> io::Result<(TlsStream<TcpStream>, bool)> {
    let start = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
    let asked = start
        .client_hello()
        .alpn()
        .is_some_and(|mut offered| offered.any(|one| one == door.protocol));
    let for_core = if asked { (door.tls)() } else { None };
    let (config, is_core) = match for_core {
        Some(config) => (config, true),
        None => (config, false),
    };
    Ok((start.into_stream(config).await?, is_core))
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
