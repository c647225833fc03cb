//! What other replicas of this Core ask.

use std::sync::Arc;

use ghost_proto::core::v1::replica_service_server::ReplicaService;
use ghost_proto::core::v1::{OwnsRequest, OwnsResponse};
use tonic::{Request, Response};

use super::{Answer, answer};
use crate::application::links::HostLinks;

pub(super) struct Replicas {
    pub(super) links: Arc<dyn HostLinks>,
}

#[tonic::async_trait]
impl ReplicaService for Replicas {
    async fn owns(&self, request: Request<OwnsRequest>) -> Answer<OwnsResponse> {
        match request.into_inner().host_id.parse() {
            Ok(host) => Ok(Response::new(OwnsResponse {
                owns: self.links.has(host),
            })),
            Err(error) => answer(Err(error)),
        }
    }
}
