//! Many streams of bytes over one connection, either way: what a host and Core talk through, and
//! what Piko's servers speak too.
//!
//! [`begin`] makes a [`Session`] of any connection (TLS over TCP, a WebSocket, a pipe in a test).
//! Its wire is [yamux](https://github.com/hashicorp/yamux/blob/master/spec.md). One task drives it;
//! streams are handed out as [`TunnelStream`]s, with flow control each, so a reader that is slow
//! stalls nobody else. [`messages`] is the control stream on top, [`Backoff`] says when to dial
//! again, and [`Tunnel`] is a way to dial: each carrier implements it.
//!
//! What holds here:
//! - the peer is hostile: streams and windows are bounded ([`Limits`]), and what breaks the
//!   protocol ends the session, never the process;
//! - a stream that the peer opened is acknowledged at once. yamux sends the acknowledgement with
//!   the first frame of the accepting side; a Go peer kills the *whole session* once a stream has
//!   waited 75 s for it, which a handler that is silent for long would bring about;
//! - a connection that breaks is never taken for the end of a stream: the reader gets an error, as
//!   half a file would otherwise look like a whole one;
//! - an idle session costs a few kilobytes: buffers exist only while there is something in them.

mod backoff;
mod digest;
pub mod messages;
mod session;
mod stream;
#[cfg(test)]
mod tests;
mod transport;

use std::fmt;
use std::net::SocketAddr;

use async_trait::async_trait;
use ghost_domain::Result;

pub use backoff::{Backoff, BackoffOptions};
pub use digest::{vm_digest, vms_digest};
pub use session::{Session, TunnelHandle, begin};
pub use stream::TunnelStream;

/// Which side of a session this is. Streams that a client opens have odd numbers, those of a server
/// even ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The one that dialled.
    Client,
    /// The one that accepted.
    Server,
}

/// What a session may cost. Buffers fill only with what the peer sent and nobody has read: at most
/// `256 KiB * (incoming + outgoing) + growth`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most open streams that the peer opened; one more is reset.
    pub incoming: usize,
    /// Most open streams that we opened; one more is an error of the one who asks.
    pub outgoing: usize,
    /// Bytes by which the windows of all streams together may grow beyond the 256 KiB that the
    /// protocol gives each. They grow with what is read, by the round trip.
    pub growth: usize,
}

impl Limits {
    /// For a host: Core opens streams, we open the control stream.
    pub const HOST: Self = Self {
        incoming: 256,
        outgoing: 16,
        growth: 64 * 1024 * 1024,
    };
    /// For Core, of each host: the host opens the control stream and nothing else.
    pub const CORE: Self = Self {
        incoming: 4,
        outgoing: 256,
        growth: 32 * 1024 * 1024,
    };
}

/// Why a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Closed {
    /// We closed it; why.
    Ours(String),
    /// The peer closed it in an orderly way.
    Peer,
    /// The connection broke, also where it ended without TLS's `close_notify`.
    Lost(String),
    /// The peer does not speak the protocol, or broke its rules.
    Protocol(String),
}

impl Closed {
    /// Whether both sides knew that it would end, so that what was read is all there was.
    pub const fn is_orderly(&self) -> bool {
        matches!(self, Self::Ours(_) | Self::Peer)
    }
}

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ours(reason) => write!(f, "closed by this side: {reason}"),
            Self::Peer => f.write_str("closed by the other side"),
            Self::Lost(cause) => write!(f, "the connection broke: {cause}"),
            Self::Protocol(cause) => write!(f, "the other side broke the protocol: {cause}"),
        }
    }
}

/// A session with the address that it goes out from.
#[derive(Debug)]
pub struct Dialled {
    /// The session.
    pub session: Session,
    /// Our end's address; where the host loses it, the connection is dead though nothing says so.
    pub local: Option<SocketAddr>,
}

/// A way out of this host.
#[async_trait]
pub trait Tunnel: Send + Sync {
    /// The carrier's name in status and metrics: `link`, `piko`.
    fn name(&self) -> &'static str;

    /// Dials once.
    ///
    /// # Errors
    /// `CoreUnreachable` where another try may help; `Unauthenticated` where the other side does
    /// not want this host, or is not the one that this host knows.
    async fn connect(&self) -> Result<Dialled>;
}
