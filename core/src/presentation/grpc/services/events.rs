//! Events of the fleet: the agents' `EventService`, where no host is named.

use std::sync::Arc;

use futures::StreamExt;
use futures::stream::{self, BoxStream};
use ghost_proto::agent::v1::event_service_server::EventService;
use ghost_proto::agent::v1::{Event, WatchEventsRequest};
use tonic::{Request, Response, Status};

use super::{Answer, caller};
use crate::application::events::Chronicle;
use crate::domain::FleetEvent;
use crate::presentation::convert;

pub(super) struct Events {
    pub(super) chronicle: Arc<Chronicle>,
}

/// Whether an event is about the VM of a name or id; an empty one is any.
fn concerns(event: &FleetEvent, vm: &str) -> bool {
    vm.is_empty()
        || event.kind.vm_name() == Some(vm)
        || event.kind.vm().is_some_and(|id| id.to_string() == vm)
}

#[tonic::async_trait]
impl EventService for Events {
    type WatchStream = BoxStream<'static, Result<Event, Status>>;

    async fn watch(&self, request: Request<WatchEventsRequest>) -> Answer<Self::WatchStream> {
        let caller = caller(&request)?;
        let WatchEventsRequest {
            vm,
            replay,
            follow,
            after,
        } = request.into_inner();
        let from = replay.then_some(after);
        let watch = self.chronicle.watch(caller.tenant.clone(), from);
        let state = (watch, caller, vm, 0);
        let events = stream::unfold(
            state,
            move |(mut watch, caller, vm, mut missed)| async move {
                loop {
                    let seen = if follow {
                        watch.next().await?
                    } else {
                        watch.replayed()?
                    };
                    missed += seen.missed;
                    let event = &seen.event;
                    if caller.sees_host(event.host, &event.tenant) && concerns(event, &vm) {
                        let told = convert::event(&seen, missed);
                        return Some((Ok(told), (watch, caller, vm, 0)));
                    }
                }
            },
        );
        Ok(Response::new(events.boxed()))
    }
}
