//! What this replica asks of another one: a stream of bytes to a host whose link that has, and the
//! lines of its audit log. Over the same connections, of mutual TLS, as forwarded calls.

use std::task::{Context, Poll};

use axum::http::{Request, Response};
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use ghost_domain::{HostId, Result};
use ghost_proto::core::metadata;
use ghost_proto::core::v1::replica_service_client::ReplicaServiceClient;
use ghost_proto::core::v1::{CarriedBytes, FleetAuditEntry, GetLeaseRequest, ListOwnAuditRequest};
use hyper::client::conn::http2::SendRequest;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio_util::io::ReaderStream;
use tonic::Streaming;
use tonic::body::Body;
use tower::Service;

use super::headers::encoded;
use super::pool::Lease;
use crate::application::links::ByteStream;
use crate::presentation::status::error_of;

/// Bytes of one message of a carried stream, and of what waits on either side of it.
const CHUNK: usize = 32 * 1024;

/// A leased connection, as what a client of gRPC speaks over.
#[derive(Clone)]
struct Leased(SendRequest<Body>);

impl Service<Request<Body>> for Leased {
    type Response = Response<hyper::body::Incoming>;
    type Error = hyper::Error;
    type Future = BoxFuture<'static, std::result::Result<Self::Response, hyper::Error>>;

    fn poll_ready(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<std::result::Result<(), hyper::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        // HTTP/2 wants a whole URI; the authority is nobody's address.
        let mut parts = std::mem::take(request.uri_mut()).into_parts();
        parts.scheme = Some(axum::http::uri::Scheme::HTTP);
        parts.authority = Some(axum::http::uri::Authority::from_static("ghost-core"));
        if let Ok(uri) = axum::http::Uri::from_parts(parts) {
            *request.uri_mut() = uri;
        }
        self.0.send_request(request).boxed()
    }
}

/// A stream of bytes to a host, through the replica at the other end of a connection.
pub(super) async fn carry(lease: Lease, host: HostId) -> Result<Box<dyn ByteStream>> {
    let mut client = ReplicaServiceClient::new(Leased(lease.sender()));
    let (ours, theirs) = tokio::io::duplex(CHUNK);
    let (read, write) = tokio::io::split(theirs);
    let outgoing = ReaderStream::with_capacity(read, CHUNK)
        .scan((), |(), chunk| std::future::ready(chunk.ok()))
        .map(|data| CarriedBytes { data });
    let mut request = tonic::Request::new(outgoing);
    let id = encoded(&host.to_string())?;
    request.metadata_mut().as_mut().insert(metadata::HOST, id);
    let answer = client.carry(request).await;
    let incoming = answer.map_err(|status| error_of(&status))?.into_inner();
    tokio::spawn(async move {
        pour(incoming, write).await;
        drop(lease);
    });
    Ok(Box::new(ours))
}

/// Writes what comes until either side ends. The other one sees the end of its stream.
pub(in crate::presentation) async fn pour<W: AsyncWrite + Unpin>(
    mut incoming: Streaming<CarriedBytes>,
    mut into: W,
) {
    loop {
        match incoming.message().await {
            Ok(Some(message)) => {
                if into.write_all(&message.data).await.is_err() || into.flush().await.is_err() {
                    return;
                }
            }
            Ok(None) => break,
            Err(status) => {
                tracing::debug!(%status, "a stream between two replicas broke");
                break;
            }
        }
    }
    let _ = into.shutdown().await;
}

/// The lines of the audit log of the replica at the other end of a connection.
pub(super) async fn audit(
    lease: Lease,
    request: ListOwnAuditRequest,
) -> Result<Vec<FleetAuditEntry>> {
    let mut client = ReplicaServiceClient::new(Leased(lease.sender()));
    let answer = client.list_own_audit(request).await;
    let mut lines = answer.map_err(|status| error_of(&status))?.into_inner();
    let mut all = Vec::new();
    loop {
        match lines.message().await {
            Ok(Some(line)) => all.push(line),
            Ok(None) => return Ok(all),
            Err(status) => return Err(error_of(&status)),
        }
    }
}

/// Whether the replica at the other end of a connection may have hosts.
pub(super) async fn may_have_hosts(lease: Lease) -> Result<bool> {
    let mut client = ReplicaServiceClient::new(Leased(lease.sender()));
    let answer = client.get_lease(GetLeaseRequest {}).await;
    let answer = answer.map_err(|status| error_of(&status))?;
    Ok(answer.into_inner().may_have_hosts)
}
