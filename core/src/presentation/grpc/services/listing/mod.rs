//! `FleetService.ListVms`: the one answer that is large by its nature, for twenty thousand VMs some
//! megabytes. Made as one message it would be a quarter of a million small allocations first and bytes
//! afterwards. Here it is put together of what is written already: each host's VMs are written down
//! once, when they are first listed after a change ([`form`]), and the answer is copied together of
//! them piece by piece as its reader takes it ([`body`]). On the wire it is the same, and HTTP's JSON
//! is made the same way.

mod body;
mod form;
#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::http;
use futures::future::BoxFuture;
use ghost_domain::Result;
use ghost_domain::Timestamp;
use ghost_proto::core::v1 as message;
use tonic::Request;
use tonic::body::Body;
use tonic::server::{Grpc, NamedService, UnaryService};
use tonic_prost::ProstCodec;
use tower::Service;

use super::Answer;
use super::fleet::Fleets;
use crate::application::vms::ListedHost;
use crate::domain::Form;
pub(super) use body::Listed;

const PATH: &str = "/ghost.core.v1.FleetService/ListVms";

/// Bytes before a message.
pub(super) const FRAME: usize = 5;

/// Put into a request's extensions, which nobody can from outside: the answer is the list as JSON,
/// with no frame around it, and the call's status behind it.
#[derive(Clone, Copy, Debug)]
pub(in crate::presentation) struct AsJson;

/// More hosts than this are gone through on a thread of its own: for ten thousand it takes some
/// milliseconds, in which a worker would serve nobody else.
const MANY_HOSTS: usize = 1000;

/// The service, with this one call answered from here.
#[derive(Clone)]
pub(super) struct Listing<S> {
    pub(super) rest: S,
    pub(super) fleets: Arc<Fleets>,
}

impl<S: NamedService> NamedService for Listing<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Listing<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.rest.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if request.uri().path() != PATH {
            return Box::pin(self.rest.call(request));
        }
        let list = List(Arc::clone(&self.fleets));
        Box::pin(async move {
            let codec = ProstCodec::default();
            let mut response = Grpc::new(codec).unary(list, request).await;
            // A refusal has none.
            if let Some(Ready(listed)) = response.extensions_mut().remove() {
                *response.body_mut() = Body::new(body::Pieces::new(listed));
            }
            Ok(response)
        })
    }
}

/// A list that goes out instead of the empty message beside it.
#[derive(Clone)]
struct Ready(Arc<Listed>);

struct List(Arc<Fleets>);

impl UnaryService<message::ListFleetVmsRequest> for List {
    type Response = message::ListFleetVmsResponse;
    type Future = BoxFuture<'static, Answer<Self::Response>>;

    fn call(&mut self, request: Request<message::ListFleetVmsRequest>) -> Self::Future {
        let fleets = Arc::clone(&self.0);
        Box::pin(async move {
            let form = match request.extensions().get() {
                Some(AsJson) => Form::Json,
                None => Form::Message,
            };
            let listed = if fleets.host_count() > MANY_HOSTS {
                let listed = move || fleets.listed_vms(request, form);
                let joined = tokio::task::spawn_blocking(listed).await;
                joined.unwrap_or_else(|cause| {
                    let error = ghost_domain::Error::internal("a list was given up");
                    super::answer(Err(error.because(cause)))
                })?
            } else {
                fleets.listed_vms(request, form)?
            };
            let mut answer = tonic::Response::new(message::ListFleetVmsResponse::default());
            let ready = Ready(Arc::new(listed.into_inner()));
            answer.extensions_mut().insert(ready);
            Ok(answer)
        })
    }
}

/// The answer over these hosts.
///
/// # Errors
/// `PayloadTooLarge` beyond 4 GiB, which no message can be; `Internal` where a VM cannot be written.
pub(super) fn list(hosts: Vec<ListedHost>, form: Form, now: Timestamp) -> Result<Listed> {
    match form {
        Form::Message => Listed::message(hosts, now),
        Form::Json => Listed::json(hosts, now),
    }
}
