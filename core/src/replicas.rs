//! Dialling other replicas of the same Core.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ghost_core::application::links::ByteStream;
use ghost_core::domain::Replica;
use ghost_core::infrastructure::authority::CoreAuthority;
use ghost_core::presentation::route::ReplicaLinks;
use ghost_domain::{Error, ErrorCode, Result};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// How long a connection may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Connections by mutual TLS: each side proves itself with a leaf of the CA that all replicas share.
#[derive(Debug)]
pub(crate) struct TlsReplicas {
    tls: Arc<ClientConfig>,
}

impl TlsReplicas {
    /// As the replica of this name.
    ///
    /// # Errors
    /// `InvalidArgument` for a name that is no replica's.
    pub(crate) fn new(authority: &CoreAuthority, replica: &str) -> Result<Self> {
        let leaf = authority.replica_tls(replica)?;
        let tls = leaf.config_for(&authority.core_uri(), &[b"h2"])?;
        Ok(Self { tls })
    }
}

#[async_trait]
impl ReplicaLinks for TlsReplicas {
    async fn open(&self, replica: &Replica) -> Result<Box<dyn ByteStream>> {
        let unreachable = |cause: &dyn std::fmt::Display| {
            Error::new(
                ErrorCode::CoreUnreachable,
                format!(
                    "the replica {} at {} cannot be reached",
                    replica.name, replica.address
                ),
            )
            .because(cause)
            .retry_after(Duration::from_secs(1))
        };
        let dial = async {
            let stream = TcpStream::connect(&replica.address).await?;
            stream.set_nodelay(true)?;
            // Whom we meet is told by the certificate's URI, not by a name.
            let name = ServerName::try_from("ghost-core").map_err(std::io::Error::other)?;
            TlsConnector::from(Arc::clone(&self.tls))
                .connect(name, stream)
                .await
        };
        match tokio::time::timeout(PATIENCE, dial).await {
            Ok(Ok(stream)) => Ok(Box::new(stream)),
            Ok(Err(error)) => Err(unreachable(&error)),
            Err(_) => Err(unreachable(&"it does not answer")),
        }
    }
}
