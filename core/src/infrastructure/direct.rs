//! Dialling a host's own listener: TLS as this replica, where nobody but that host is accepted, and a
//! yamux session on it, as on a link but with Core as the client.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use ghost_domain::fleet::spiffe_host;
use ghost_domain::{Error, ErrorCode, HostId, Result, TenantName};
use ghost_infrastructure::identity::ClientTls;
use ghost_infrastructure::tunnel::messages::{MessageReader, MessageWriter};
use ghost_infrastructure::tunnel::{
    Dialled, Limits, Side, Tunnel, TunnelHandle, TunnelStream, begin,
};
use ghost_proto::core::DIRECT_PROTOCOL;
use ghost_proto::core::v1 as proto;
use ghost_proto::core::v1::link_message::Kind;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::{ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio_rustls::TlsConnector;

use super::authority::CoreAuthority;
use crate::application::direct::{DirectDialer, DirectWay};
use crate::application::links::ByteStream;

/// How long a connection and its handshake may take.
const DIAL_TIME: Duration = Duration::from_secs(8);

/// Dials hosts as a replica of Core.
#[derive(Debug)]
pub struct TlsDialer {
    tls: Arc<ClientTls>,
    trust_domain: String,
}

impl TlsDialer {
    /// As the replica of this name.
    ///
    /// # Errors
    /// `InvalidArgument` for a name that is no replica's.
    pub fn new(authority: &CoreAuthority, replica: &str) -> Result<Self> {
        use crate::domain::ports::FleetAuthority;
        Ok(Self {
            tls: authority.replica_tls(replica)?,
            trust_domain: authority.trust_domain().to_owned(),
        })
    }

    /// The carrier to a host at an address.
    ///
    /// # Errors
    /// `Internal`.
    pub fn carrier(
        &self,
        tenant: &TenantName,
        host: HostId,
        address: SocketAddr,
    ) -> Result<impl Tunnel + use<>> {
        let uri = spiffe_host(&self.trust_domain, tenant, host);
        Ok(DirectTunnel {
            tls: self.tls.config_for(&uri, &[DIRECT_PROTOCOL])?,
            address,
        })
    }
}

/// The carrier `direct`.
struct DirectTunnel {
    tls: Arc<ClientConfig>,
    address: SocketAddr,
}

impl DirectTunnel {
    async fn dial(&self) -> io::Result<Dialled> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let local = stream.local_addr().ok();
        // Whom we meet is told by the certificate's URI, not by a name.
        let name = ServerName::try_from("ghost-agent").map_err(io::Error::other)?;
        // The server's certificate is judged before ours is shown (RFC 8446, section 4.4).
        let stream = TlsConnector::from(Arc::clone(&self.tls))
            .connect(name, stream)
            .await?;
        if stream.get_ref().1.alpn_protocol() != Some(DIRECT_PROTOCOL) {
            return Err(io::Error::other("it takes no direct connections of Core"));
        }
        Ok(Dialled {
            session: begin(stream, Side::Client, Limits::CORE),
            local,
        })
    }
}

#[async_trait]
impl Tunnel for DirectTunnel {
    fn name(&self) -> &'static str {
        "direct"
    }

    async fn connect(&self) -> Result<Dialled> {
        let failed = |cause: &dyn std::fmt::Display| {
            Error::new(
                ErrorCode::HostOffline,
                format!("no host answers directly at {}", self.address),
            )
            .because(cause)
        };
        match tokio::time::timeout(DIAL_TIME, self.dial()).await {
            Ok(Ok(dialled)) => Ok(dialled),
            Ok(Err(error)) => Err(failed(&error)),
            Err(_) => Err(failed(&"it does not answer in time")),
        }
    }
}

#[async_trait]
impl DirectDialer for TlsDialer {
    async fn dial(
        &self,
        tenant: &TenantName,
        host: HostId,
        address: SocketAddr,
    ) -> Result<Arc<dyn DirectWay>> {
        let dialled = self.carrier(tenant, host, address)?.connect().await?;
        Ok(Arc::new(Carried::new(dialled.session.handle).await?))
    }
}

/// A session with a host that was dialled.
struct Carried {
    handle: TunnelHandle,
    trials: Mutex<Trials>,
    begun: AtomicU64,
}

/// The stream that carries nothing but pings.
struct Trials {
    reader: MessageReader<ReadHalf<TunnelStream>>,
    writer: MessageWriter<WriteHalf<TunnelStream>>,
    /// The newest trial that was begun when an answer came.
    answered: u64,
    number: u64,
}

fn over(error: io::Error) -> Error {
    let code = match error.kind() {
        io::ErrorKind::QuotaExceeded => ErrorCode::TooManyRequests,
        _ => ErrorCode::HostOffline,
    };
    Error::new(code, "the direct way to the host cannot be used").because(error)
}

impl Carried {
    async fn new(handle: TunnelHandle) -> Result<Self> {
        let stream = handle.open().await.map_err(over)?;
        let (read, write) = tokio::io::split(stream);
        Ok(Self {
            handle,
            trials: Mutex::new(Trials {
                reader: MessageReader::new(read),
                writer: MessageWriter::new(write),
                answered: 0,
                number: 0,
            }),
            begun: AtomicU64::new(0),
        })
    }
}

#[async_trait]
impl DirectWay for Carried {
    async fn open(&self) -> Result<Box<dyn ByteStream>> {
        Ok(Box::new(self.handle.open().await.map_err(over)?))
    }

    async fn try_out(&self) -> Result<()> {
        // Many calls may want to know at once; an answer to a ping that was sent after one of them
        // asked is an answer to that one too.
        let asked = self.begun.fetch_add(1, Ordering::AcqRel) + 1;
        let mut trials = self.trials.lock().await;
        if trials.answered >= asked {
            return Ok(());
        }
        let newest = self.begun.load(Ordering::Acquire);
        trials.number += 1;
        let number = trials.number;
        trials
            .writer
            .queue(Kind::Ping(proto::Ping { number }))
            .map_err(over)?;
        trials.writer.flush().await.map_err(over)?;
        loop {
            match trials.reader.next().await.map_err(over)? {
                // One of a trial that was given up may still come.
                Some(Kind::Pong(pong)) if pong.number == number => break,
                Some(Kind::Pong(_)) => {}
                Some(_) | None => {
                    self.handle.close("the host ended it");
                    return Err(over(io::ErrorKind::UnexpectedEof.into()));
                }
            }
        }
        trials.answered = newest;
        Ok(())
    }

    fn silence(&self) -> Duration {
        self.handle.silence()
    }

    fn is_over(&self) -> bool {
        self.handle.ended().is_some()
    }

    fn streams(&self) -> usize {
        self.handle.streams().1.saturating_sub(1)
    }

    fn close(&self, reason: &str) {
        self.handle.close(reason);
    }
}
