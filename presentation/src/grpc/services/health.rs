//! The standard health service (<https://grpc.io/docs/guides/health-checking/>): what HTTP's
//! `/ready` says, looked at when it is asked.

use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt, stream};
use ghost_application::UseCases;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use super::stream::Answer;

/// How often a watcher's answer is looked at again. Much that health depends on tells nobody.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// See the module's documentation.
#[derive(Clone)]
pub(in crate::grpc) struct Health {
    pub(in crate::grpc) use_cases: Arc<UseCases>,
    /// The services that are known by name; the empty one stands for the whole server.
    pub(in crate::grpc) known: &'static [&'static str],
    pub(in crate::grpc) shutdown: CancellationToken,
}

impl Health {
    /// The status of a service, one for all: a change needs libvirt, the store, and an agent that
    /// takes work, whichever service it comes through.
    async fn of(&self, service: &str) -> ServingStatus {
        if !self.known.contains(&service) {
            return ServingStatus::ServiceUnknown;
        }
        let ready =
            !self.shutdown.is_cancelled() && self.use_cases.check_health.execute().await.ready;
        if ready {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        }
    }

    /// The status, and again whenever it has changed; it ends with the server.
    fn changes(self, service: String) -> impl Stream<Item = ServingStatus> {
        stream::unfold(Some((self, None)), move |state| {
            let service = service.clone();
            async move {
                let (health, told) = state?;
                loop {
                    let last = health.shutdown.is_cancelled();
                    let status = health.of(&service).await;
                    if told != Some(status) {
                        let next = (!last).then_some((health, Some(status)));
                        return Some((status, next));
                    }
                    if last {
                        return None;
                    }
                    tokio::select! {
                        () = tokio::time::sleep(LOOK_AGAIN) => {}
                        () = health.shutdown.cancelled() => {}
                    }
                }
            }
        })
    }
}

fn response(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse {
        status: status as i32,
    }
}

#[tonic::async_trait]
impl health_server::Health for Health {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        match self.of(&request.get_ref().service).await {
            ServingStatus::ServiceUnknown => Err(Status::not_found("there is no such service")),
            status => Ok(Response::new(response(status))),
        }
    }

    type WatchStream = Answer<HealthCheckResponse>;

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let changes = self.clone().changes(request.into_inner().service);
        let answer = changes.map(|status| Ok(response(status)));
        Ok(Response::new(Box::pin(answer)))
    }
}
