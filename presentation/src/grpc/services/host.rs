//! `HostService`, `NetworkService` and `EventService`.

use std::sync::Arc;

use futures::stream;
use ghost_application::UseCases;
use ghost_application::event::WatchEventsCommand;
use ghost_proto::agent::v1 as message;
use ghost_proto::agent::v1::event_service_server::EventService;
use ghost_proto::agent::v1::host_service_server::HostService;
use ghost_proto::agent::v1::network_service_server::NetworkService;
use tonic::{Request, Response, Status};

use super::stream::{Answer, until};
use super::{OrStatus, principal};
use crate::convert::{self, AgentInfo};

type Answered<T> = Result<Response<T>, Status>;

/// Serves the host's status.
pub(crate) struct Host(pub(crate) Arc<UseCases>, pub(crate) AgentInfo);

#[tonic::async_trait]
impl HostService for Host {
    async fn get_status(
        &self,
        request: Request<message::GetStatusRequest>,
    ) -> Answered<message::HostStatus> {
        let caller = principal(request.extensions())?;
        let view = self.0.get_status.execute(&caller).await.or_status()?;
        Ok(Response::new(convert::status(&view, &self.1)))
    }

    async fn get_core_link(
        &self,
        request: Request<message::GetCoreLinkRequest>,
    ) -> Answered<message::CoreLink> {
        let caller = principal(request.extensions())?;
        let view = self.0.get_core_link.execute(&caller).await.or_status()?;
        Ok(Response::new(convert::core_link(&view)))
    }

    async fn reconnect_core(
        &self,
        request: Request<message::ReconnectCoreRequest>,
    ) -> Answered<message::CoreLink> {
        let caller = principal(request.extensions())?;
        self.0.reconnect_core.execute(&caller).await.or_status()?;
        let view = self.0.get_core_link.execute(&caller).await.or_status()?;
        Ok(Response::new(convert::core_link(&view)))
    }

    async fn allow_core_deletes(
        &self,
        request: Request<message::AllowCoreDeletesRequest>,
    ) -> Answered<message::AllowCoreDeletesResponse> {
        let caller = principal(request.extensions())?;
        let given = request.get_ref().duration.as_ref();
        let duration = given
            .map(|given| convert::length_of(given, "duration"))
            .transpose()
            .or_status()?
            .unwrap_or_default();
        let until = self.0.allow_core_deletes.execute(&caller, duration).await;
        let until = until.or_status()?;
        Ok(Response::new(message::AllowCoreDeletesResponse {
            until: (!duration.is_zero()).then(|| convert::timestamp(until)),
        }))
    }
}

/// Serves networks.
pub(crate) struct Networks(pub(crate) Arc<UseCases>);

#[tonic::async_trait]
impl NetworkService for Networks {
    async fn get(
        &self,
        request: Request<message::GetNetworkRequest>,
    ) -> Answered<message::Network> {
        let caller = principal(request.extensions())?;
        let view = self
            .0
            .get_network
            .execute(&caller, &request.get_ref().name)
            .await;
        Ok(Response::new(convert::network(&view.or_status()?)))
    }

    async fn list(
        &self,
        request: Request<message::ListNetworksRequest>,
    ) -> Answered<message::ListNetworksResponse> {
        let caller = principal(request.extensions())?;
        let views = self.0.list_networks.execute(&caller).await.or_status()?;
        let networks = views.iter().map(convert::network).collect();
        Ok(Response::new(message::ListNetworksResponse { networks }))
    }
}

/// Serves events.
pub(crate) struct Events(pub(crate) Arc<UseCases>);

#[tonic::async_trait]
impl EventService for Events {
    type WatchStream = Answer<message::Event>;

    async fn watch(
        &self,
        request: Request<message::WatchEventsRequest>,
    ) -> Answered<Self::WatchStream> {
        let caller = principal(request.extensions())?;
        let given = request.get_ref();
        let (follow, after) = (given.follow, given.after);
        let command = WatchEventsCommand {
            vm: Some(given.vm.clone()).filter(|vm| !vm.is_empty()),
            replay: given.replay,
        };
        let (events, vm) = self
            .0
            .watch_events
            .execute(&caller, &command)
            .await
            .or_status()?;
        let source = stream::unfold(events, move |mut events| async move {
            loop {
                let event = if follow {
                    events.next().await?
                } else {
                    events.replayed()?
                };
                if event.sequence > after && (vm.is_none() || event.vm == vm) {
                    return Some((Ok(convert::event(&event)), events));
                }
            }
        });
        Ok(Response::new(until(request.extensions(), source)))
    }
}
