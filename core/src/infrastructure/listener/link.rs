//! A host's link, from its TLS connection to the desk.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ghost_domain::{Error, ErrorCode, Result, Timestamp};
use ghost_infrastructure::tunnel::messages::{MessageReader, MessageWriter};
use ghost_infrastructure::tunnel::{Limits, Side, TunnelHandle, begin};
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio_rustls::server::TlsStream;

use super::Shown;
use super::wire::{WireReader, WireWriter};
use crate::application::desk::{Desk, HostPeer, LinkTransport};
use crate::application::links::ByteStream;
use crate::domain::PeerIdentity;

/// How long a host may take to open its control stream.
const CONTROL_TIME: Duration = Duration::from_secs(10);

/// Serves a link until it ends.
pub(super) async fn serve(
    desk: &Arc<Desk>,
    stream: TlsStream<TcpStream>,
    shown: Option<Shown>,
    address: SocketAddr,
    place: OwnedSemaphorePermit,
) {
    let expires_at = shown
        .as_ref()
        .map_or_else(Timestamp::default, |shown| shown.expires_at);
    let peer = match shown.map(|shown| shown.identity) {
        Some(Ok(PeerIdentity::Host {
            tenant,
            host,
            generation,
            key_hash,
        })) => HostPeer {
            tenant,
            host,
            generation,
            key_hash,
            expires_at,
        },
        other => {
            // No host has such a certificate, so nobody is there who could read a goodbye.
            tracing::info!(%address, ?other, "a link of one who is no host was refused");
            return;
        }
    };
    let mut session = begin(stream, Side::Server, Limits::CORE);
    let transport = Arc::new(Carried(session.handle));
    let opened = tokio::time::timeout(CONTROL_TIME, session.incoming.recv()).await;
    let Ok(Some(control)) = opened else {
        tracing::info!(host = %peer.host, %address, "a host opened no control stream");
        transport.close("no control stream was opened");
        return;
    };
    // Further streams of the host are reset: Core offers nothing on them.
    drop(session.incoming);
    let (read, write) = tokio::io::split(control);
    let reader = WireReader(MessageReader::new(read));
    let writer = WireWriter(MessageWriter::new(write));
    // On the heap, so that the handshake's task does not grow by it.
    Box::pin(desk.serve(peer, transport, reader, writer)).await;
    drop(place);
}

/// A yamux session as what carries a link.
struct Carried(TunnelHandle);

#[async_trait]
impl LinkTransport for Carried {
    async fn open(&self) -> Result<Box<dyn ByteStream>> {
        match self.0.open().await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(error) if error.kind() == io::ErrorKind::QuotaExceeded => Err(Error::new(
                ErrorCode::TooManyRequests,
                "too many calls to this host are under way",
            )
            .because(error)
            .retry_after(Duration::from_secs(1))),
            Err(error) => Err(Error::new(
                ErrorCode::HostOffline,
                "the host's link broke a moment ago",
            )
            .because(error)
            .retry_after(Duration::from_secs(1))),
        }
    }

    fn streams(&self) -> usize {
        self.0.streams().1
    }

    fn close(&self, reason: &str) {
        self.0.close(reason);
    }
}
