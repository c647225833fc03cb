//! The ways to hosts.

use std::time::Duration;

use async_trait::async_trait;
use ghost_domain::{HostId, Result};
use tokio::io::{AsyncRead, AsyncWrite};

/// A stream of bytes to a host.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for T {}

/// The links that this replica has.
#[async_trait]
pub trait HostLinks: Send + Sync {
    /// A new stream to the host, by the link that the host keeps open, or by another carrier. What
    /// is spoken on it decides the caller: HTTP/2 for gRPC, HTTP/1.1 for the HTTP API.
    ///
    /// # Errors
    /// `HostOffline` where there is no way; it names since when.
    async fn open(&self, host: HostId) -> Result<Box<dyn ByteStream>>;

    /// The number of the way that [`Self::open`] would take now; another one than before means that
    /// what was opened over the old way should get no new calls. A way that was silent for a moment
    /// is tried first, so this may take a round trip.
    async fn way(&self, host: HostId) -> u64 {
        let _ = host;
        0
    }

    /// Whether this replica has a link of the host.
    fn has(&self, host: HostId) -> bool;

    /// Round trip of the host's last ping, where it has a link.
    fn round_trip(&self, host: HostId) -> Option<Duration>;

    /// Ends the host's link with a goodbye of this code.
    fn cut(&self, host: HostId, code: &'static str, message: &str);
}
