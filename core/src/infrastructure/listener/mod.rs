//! Core's one TLS listener: links of hosts and gRPC on one port, told apart by ALPN.
//!
//! ```text
//! accept ─> wait for the first byte ─> in line for a handshake ─> TLS ─┬─ ghost-tunnel/1 ─> link
//!           (no place taken)           (so many at once, in order)     └─ h2 ────────────> gRPC
//! ```
//! When Core comes back after a restart all hosts come at once. Nobody is turned away for that:
//! handshakes wait in line, in the order in which they came. Whoever says nothing holds no place in
//! it, and whoever stops in the middle loses it.

mod link;
mod wire;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use ghost_domain::{Error, ErrorCode, Result, Timestamp};
use ghost_proto::core::LINK_PROTOCOL;
use rustls::ServerConfig;
use tokio::io::Interest;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::application::desk::Desk;
use crate::domain::PeerIdentity;
use crate::domain::ports::FleetAuthority;

pub use wire::{digest, from_host};

/// How long a connection may take to be ready, from its first byte on.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// How long one may say nothing at all.
const FIRST_BYTE_TIME: Duration = Duration::from_secs(10);
/// How long a handshake keeps its place in line. One that takes longer waits for its peer, and the
/// next may compute meanwhile.
const PLACE_TIME: Duration = Duration::from_secs(1);
/// Connections that are not ready yet.
const MOST_UNREADY: usize = 16_384;

/// Bounds of the listener.
#[derive(Clone, Copy, Debug)]
pub struct ListenerLimits {
    /// Handshakes at once.
    pub handshakes: usize,
    /// Links at once.
    pub links: usize,
    /// Connections for gRPC at once.
    pub connections: usize,
}

impl Default for ListenerLimits {
    fn default() -> Self {
        Self {
            handshakes: 64,
            links: 20_000,
            connections: 1024,
        }
    }
}

/// What a certificate says that came with a handshake.
#[derive(Clone, Debug)]
pub struct Shown {
    /// Whom it names, or that it is none that this CA would have issued.
    pub identity: Result<PeerIdentity>,
    /// When it ends: a connection may outlast it, its calls may not.
    pub expires_at: Timestamp,
}

/// A connection for gRPC. It holds its place among the connections until it is dropped.
#[derive(Debug)]
pub struct GrpcConnection {
    /// The stream.
    pub stream: TlsStream<TcpStream>,
    /// The certificate, where one was shown.
    pub shown: Option<Shown>,
    /// The other end.
    pub address: SocketAddr,
    place: OwnedSemaphorePermit,
}

impl GrpcConnection {
    /// The stream, and the place that it holds: drop that with the connection.
    pub fn into_parts(self) -> (TlsStream<TcpStream>, OwnedSemaphorePermit) {
        (self.stream, self.place)
    }
}

/// Serves a connection for gRPC until it ends.
pub type ServeGrpc = Arc<dyn Fn(GrpcConnection) -> BoxFuture<'static, ()> + Send + Sync>;

/// What the listener has counted.
#[derive(Debug, Default)]
pub struct ListenerCounters {
    unready: AtomicUsize,
    turned_away: AtomicU64,
    failed: AtomicU64,
}

impl ListenerCounters {
    /// Connections that are not ready yet.
    pub fn unready(&self) -> usize {
        self.unready.load(Ordering::Relaxed)
    }

    /// Connections that found no room.
    pub fn turned_away(&self) -> u64 {
        self.turned_away.load(Ordering::Relaxed)
    }

    /// Handshakes that failed.
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }
}

/// The listener.
pub struct Listener {
    config: Arc<ServerConfig>,
    authority: Arc<dyn FleetAuthority>,
    desk: Arc<Desk>,
    grpc: ServeGrpc,
    handshakes: Arc<Semaphore>,
    links: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    counters: Arc<ListenerCounters>,
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener")
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

impl Listener {
    /// The protocols that its TLS has to offer.
    pub const PROTOCOLS: [&'static [u8]; 2] = [LINK_PROTOCOL, b"h2"];

    /// Over a TLS configuration with [`Self::PROTOCOLS`] that takes client certificates of our CA.
    pub fn new(
        config: Arc<ServerConfig>,
        authority: Arc<dyn FleetAuthority>,
        desk: Arc<Desk>,
        grpc: ServeGrpc,
        limits: ListenerLimits,
    ) -> Arc<Self> {
        let semaphore = |most: usize| Arc::new(Semaphore::new(most.min(Semaphore::MAX_PERMITS)));
        Arc::new(Self {
            config,
            authority,
            desk,
            grpc,
            handshakes: semaphore(limits.handshakes),
            links: semaphore(limits.links),
            connections: semaphore(limits.connections),
            counters: Arc::default(),
        })
    }

    /// What was counted.
    pub const fn counters(&self) -> &Arc<ListenerCounters> {
        &self.counters
    }

    /// Accepts until `stop`. Connections that are ready go on by themselves.
    pub async fn run(self: &Arc<Self>, tcp: TcpListener, stop: CancellationToken) {
        loop {
            let accepted = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                accepted = tcp.accept() => accepted,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, most likely: trying again at once would burn the CPU.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Some(unready) = Unready::enter(&self.counters) else {
                self.counters.turned_away.fetch_add(1, Ordering::Relaxed);
                continue;
            };
            let (listener, stop) = (Arc::clone(self), stop.clone());
            tokio::spawn(async move {
                let ready = tokio::select! {
                    () = stop.cancelled() => return,
                    ready = listener.ready(stream) => ready,
                };
                drop(unready);
                match ready {
                    Ok(stream) => listener.hand_over(stream, address).await,
                    Err(error) => {
                        listener.counters.failed.fetch_add(1, Ordering::Relaxed);
                        tracing::debug!(%address, %error, "a connection was refused in its handshake");
                    }
                }
            });
        }
    }

    /// The handshake.
    async fn ready(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let late = |what: &'static str| io::Error::new(io::ErrorKind::TimedOut, what);
        stream.set_nodelay(true)?;
        // Readiness alone may be told of a socket that has nothing to read.
        let first = tokio::time::timeout(FIRST_BYTE_TIME, stream.peek(&mut [0; 1])).await;
        if first.map_err(|_| late("it said nothing"))?? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let place = Arc::clone(&self.handshakes)
            .acquire_owned()
            .await
            .map_err(io::Error::other)?;
        // Whoever gave up while it waited in line wants no handshake any more. Under load that would
        // be work for nobody, and the next would give up for it.
        let readable = stream.ready(Interest::READABLE).await?;
        if readable.is_read_closed() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let accepting = TlsAcceptor::from(Arc::clone(&self.config)).accept(stream);
        let shaken = async {
            tokio::pin!(accepting);
            match tokio::time::timeout(PLACE_TIME, accepting.as_mut()).await {
                Ok(accepted) => accepted,
                Err(_) => {
                    drop(place);
                    accepting.await
                }
            }
        };
        // On the heap: what a handshake needs is much more than what a link needs afterwards.
        tokio::time::timeout(HANDSHAKE_TIME, Box::pin(shaken))
            .await
            .map_err(|_| late("it did not finish its handshake in time"))?
    }

    async fn hand_over(self: &Arc<Self>, stream: TlsStream<TcpStream>, address: SocketAddr) {
        let shown = self.shown(&stream);
        let is_link = match stream.get_ref().1.alpn_protocol() {
            Some(protocol) if protocol == LINK_PROTOCOL => true,
            Some(b"h2") => false,
            other => {
                tracing::debug!(%address, ?other, "a connection speaks no protocol of ours");
                return;
            }
        };
        let room = if is_link {
            &self.links
        } else {
            &self.connections
        };
        let Ok(place) = Arc::clone(room).try_acquire_owned() else {
            self.counters.turned_away.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(%address, is_link, "too many connections: one was turned away");
            return;
        };
        if is_link {
            link::serve(&self.desk, stream, shown, address, place).await;
        } else {
            let connection = GrpcConnection {
                stream,
                shown,
                address,
                place,
            };
            (self.grpc)(connection).await;
        }
    }

    fn shown(&self, stream: &TlsStream<TcpStream>) -> Option<Shown> {
        let der = stream
            .get_ref()
            .1
            .peer_certificates()
            .and_then(<[_]>::first)?;
        let Ok((_, certificate)) = X509Certificate::from_der(der) else {
            return Some(Shown {
                identity: Err(Error::new(
                    ErrorCode::Unauthenticated,
                    "the client certificate cannot be read",
                )),
                expires_at: Timestamp::default(),
            });
        };
        let end = certificate.validity().not_after.timestamp();
        Some(Shown {
            identity: self.authority.peer(der),
            expires_at: Timestamp::from_unix_millis(end.saturating_mul(1000)),
        })
    }
}

/// A place among those that are not ready.
struct Unready(Arc<ListenerCounters>);

impl Unready {
    fn enter(counters: &Arc<ListenerCounters>) -> Option<Self> {
        let before = counters.unready.fetch_add(1, Ordering::Relaxed);
        let entered = Self(Arc::clone(counters));
        (before < MOST_UNREADY).then_some(entered)
    }
}

impl Drop for Unready {
    fn drop(&mut self) {
        self.0.unready.fetch_sub(1, Ordering::Relaxed);
    }
}
