//! What other replicas of this Core ask.

use std::sync::Arc;
use std::time::Duration;

use futures::stream::BoxStream;
use futures::{StreamExt, stream};
use ghost_domain::{Error, ErrorCode, HostId, Result};
use ghost_presentation::grpc::status::to_status;
use ghost_proto::core::metadata;
use ghost_proto::core::v1::replica_service_server::ReplicaService;
use ghost_proto::core::v1::{
    CarriedBytes, FleetAuditEntry, GetLeaseRequest, GetLeaseResponse, ListOwnAuditRequest,
    OwnsRequest, OwnsResponse,
};
use tokio_util::io::ReaderStream;
use tonic::{Request, Response, Status, Streaming};

use super::{Answer, answer};
use crate::application::audit::{FleetAudit, FleetAuditQuery};
use crate::application::desk::Desk;
use crate::application::links::HostLinks;
use crate::presentation::convert;
use crate::presentation::route::replica::pour;

/// Bytes of one message of a carried stream.
const CHUNK: usize = 32 * 1024;
/// How long the store may take to answer before it counts as away.
const STORE_TIME: Duration = Duration::from_secs(2);

pub(super) struct Replicas {
    pub(super) links: Arc<dyn HostLinks>,
    pub(super) audit: Arc<dyn FleetAudit>,
    pub(super) desk: Arc<Desk>,
    /// This replica's name.
    pub(super) replica: String,
}

impl Replicas {
    async fn open(
        &self,
        host: Option<&str>,
    ) -> Result<Box<dyn crate::application::links::ByteStream>> {
        let host: HostId = host.unwrap_or_default().parse()?;
        // Passed on once at most: two replicas that each take the other for the owner would
        // otherwise send it to and fro.
        if !self.links.has(host) {
            return Err(
                Error::new(ErrorCode::HostOffline, "the host is between two replicas")
                    .because(format!("its link was just at {}", self.replica))
                    .retry_after(Duration::from_secs(1)),
            );
        }
        self.links.open(host).await
    }
}

#[tonic::async_trait]
impl ReplicaService for Replicas {
    type CarryStream = BoxStream<'static, Result<CarriedBytes, Status>>;
    type ListOwnAuditStream = BoxStream<'static, Result<FleetAuditEntry, Status>>;

    async fn owns(&self, request: Request<OwnsRequest>) -> Answer<OwnsResponse> {
        match request.into_inner().host_id.parse() {
            Ok(host) => Ok(Response::new(OwnsResponse {
                owns: self.links.has(host),
            })),
            Err(error) => answer(Err(error)),
        }
    }

    async fn get_lease(&self, _: Request<GetLeaseRequest>) -> Answer<GetLeaseResponse> {
        let asked = tokio::time::timeout(STORE_TIME, self.desk.may_have_hosts()).await;
        Ok(Response::new(GetLeaseResponse {
            may_have_hosts: asked.unwrap_or(false),
        }))
    }

    async fn carry(&self, request: Request<Streaming<CarriedBytes>>) -> Answer<Self::CarryStream> {
        let host = request.metadata().get(metadata::HOST);
        let opened = self.open(host.and_then(|id| id.to_str().ok())).await;
        let stream = opened.map_err(|error| to_status(&error))?;
        let (read, write) = tokio::io::split(stream);
        tokio::spawn(pour(request.into_inner(), write));
        let answer = ReaderStream::with_capacity(read, CHUNK).map(|chunk| match chunk {
            Ok(data) => Ok(CarriedBytes { data }),
            Err(cause) => Err(to_status(
                &Error::new(ErrorCode::HostOffline, "the host's link broke").because(cause),
            )),
        });
        Ok(Response::new(answer.boxed()))
    }

    async fn list_own_audit(
        &self,
        request: Request<ListOwnAuditRequest>,
    ) -> Answer<Self::ListOwnAuditStream> {
        let request = request.into_inner();
        let listed = async {
            let host = match request.host_id.as_str() {
                "" => None,
                id => Some(id.parse()?),
            };
            let since = request
                .since
                .as_ref()
                .map(ghost_presentation::convert::stamp)
                .transpose()?;
            self.audit
                .list(FleetAuditQuery {
                    tenant: convert::tenant(&request.tenant)?,
                    host,
                    user: Some(request.user).filter(|user| !user.is_empty()),
                    since,
                    limit: request.limit as usize,
                })
                .await
        };
        let entries = listed.await.map_err(|error| to_status(&error))?;
        let replica = self.replica.clone();
        let lines = entries
            .into_iter()
            .map(move |entry| Ok(convert::audit(entry, &replica)));
        Ok(Response::new(stream::iter(lines).boxed()))
    }
}
