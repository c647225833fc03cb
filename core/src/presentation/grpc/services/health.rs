//! The standard health service (<https://grpc.io/docs/guides/health-checking/>): whether this
//! replica can do its work, looked at when it is asked.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::{self, BoxStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use super::Answer;
use crate::application::fleet::Fleet;
use crate::application::health::problems;

/// How often a watcher's answer is looked at again: much that health depends on tells nobody.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Clone)]
pub(super) struct Health {
    pub(super) fleet: Arc<Fleet>,
    /// The services that are known by name; the empty one stands for the whole server.
    pub(super) known: &'static [&'static str],
    pub(super) shutdown: CancellationToken,
}

impl Health {
    async fn of(&self, service: &str) -> ServingStatus {
        if !self.known.contains(&service) {
            return ServingStatus::ServiceUnknown;
        }
        if !self.shutdown.is_cancelled() && problems(&self.fleet).await.is_empty() {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        }
    }
}

fn told(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse {
        status: status.into(),
    }
}

#[tonic::async_trait]
impl health_server::Health for Health {
    type WatchStream = BoxStream<'static, Result<HealthCheckResponse, Status>>;

    async fn check(&self, request: Request<HealthCheckRequest>) -> Answer<HealthCheckResponse> {
        match self.of(&request.into_inner().service).await {
            ServingStatus::ServiceUnknown => Err(Status::not_found("there is no such service")),
            status => Ok(Response::new(told(status))),
        }
    }

    async fn watch(&self, request: Request<HealthCheckRequest>) -> Answer<Self::WatchStream> {
        let service = request.into_inner().service;
        let health = self.clone();
        let changes = stream::unfold((health, None), move |(health, last)| {
            let service = service.clone();
            async move {
                loop {
                    let status = health.of(&service).await;
                    if last != Some(status) {
                        return Some((Ok(told(status)), (health, Some(status))));
                    }
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
            }
        });
        Ok(Response::new(changes.boxed()))
    }
}
