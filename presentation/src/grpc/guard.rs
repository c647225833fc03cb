//! What stands before every RPC: who calls, whether that role may, how long it may take, and the
//! traces, numbers and error details that come out of it.

use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use axum::http::{HeaderMap, HeaderValue, Request, Response};
use bytes::Bytes;
use futures::FutureExt;
use ghost_application::UseCases;
use ghost_application::fleet::CoreReach;
use ghost_domain::fleet::FleetPrincipal;
use ghost_domain::{Error, ErrorCode, Principal, PrincipalSource, Result, Role, Timestamp};
use http_body::{Frame, SizeHint};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::body::Body;
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::{Instrument, Span};

use super::access::{self, Method};
use super::services::Leash;
use super::status::to_status;
use crate::TraceParent;
use crate::access::{Access, Shape};
use crate::connection::{Peer, PeerCertificate};
use crate::core_caller;
use crate::metrics::Recorder;
use crate::request::{CalledAs, REQUEST_ID, request_id};

/// Everything the guard needs.
pub(crate) struct Watch {
    pub(crate) use_cases: Arc<UseCases>,
    pub(crate) recorder: Arc<Recorder>,
    pub(crate) trace: Option<TraceParent>,
    pub(crate) timeout: Duration,
    /// Whether operators of the local socket may enter guests.
    pub(crate) group_guest_access: bool,
    pub(crate) unary_room: Arc<Semaphore>,
    /// How often the identity behind a stream is looked at again.
    pub(crate) recheck: Duration,
    pub(crate) shutdown: CancellationToken,
}

/// Ends with the answer that it watches over.
#[derive(Clone)]
struct Guardian(#[expect(dead_code, reason = "held for its drop")] Arc<AbortOnDropHandle<()>>);

/// Puts a [`Guard`] before the services.
#[derive(Clone)]
pub(crate) struct GuardLayer(pub(crate) Arc<Watch>);

impl<S> Layer<S> for GuardLayer {
    type Service = Guard<S>;

    fn layer(&self, inner: S) -> Guard<S> {
        Guard {
            inner,
            watch: Arc::clone(&self.0),
        }
    }
}

/// See the module.
#[derive(Clone)]
pub(crate) struct Guard<S> {
    inner: S,
    watch: Arc<Watch>,
}

impl<S> Service<Request<Body>> for Guard<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        // The service that was polled ready is the one to use (tower's contract).
        let fresh = self.inner.clone();
        let inner = std::mem::replace(&mut self.inner, fresh);
        let watch = Arc::clone(&self.watch);
        let id = request_id(request.headers());
        request.extensions_mut().insert(CalledAs(id.clone()));
        let method = access::method(request.uri().path());
        // Unknown paths share one name: what strangers send must not become label values.
        let name = method.map_or("unknown", |method| method.path);
        let span = tracing::info_span!(
            "rpc",
            otel.kind = "server",
            rpc.system = "grpc",
            rpc.method = name,
            request_id = %id,
            principal = tracing::field::Empty,
            role = tracing::field::Empty,
            rpc.code = tracing::field::Empty,
        );
        if let Some(trace) = &watch.trace {
            trace(request.headers(), &span);
        }
        let within = span.clone();
        Box::pin(
            async move {
                let begun = Instant::now();
                let answer = pass(&watch, method, inner, request).await;
                let mut response = answer.unwrap_or_else(|error| to_status(&error).into_http());
                let shape = method.map_or(Shape::Unary, |method| method.shape);
                if !name.starts_with("/grpc.") {
                    complete(&mut response);
                }
                if let Ok(value) = HeaderValue::from_str(&id) {
                    response.headers_mut().insert(REQUEST_ID, value);
                }
                let code = status_of(response.headers());
                let guardian = response.extensions_mut().remove::<Guardian>();
                let end = End {
                    recorder: Arc::clone(&watch.recorder),
                    span: within,
                    method: name,
                    shape,
                    begun,
                    told: false,
                };
                Ok(response.map(|body| {
                    Body::new(Watched {
                        body,
                        end,
                        code,
                        _guardian: guardian,
                    })
                }))
            }
            .instrument(span),
        )
    }
}

/// Authenticates, authorises, and carries out the call.
async fn pass<S>(
    watch: &Arc<Watch>,
    method: Option<&'static Method>,
    mut inner: S,
    mut request: Request<Body>,
) -> Result<Response<Body>>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Send,
    S::Future: Send,
{
    let peer = request
        .extensions()
        .get::<Peer>()
        .cloned()
        .unwrap_or(Peer::Nobody);
    let said = match peer {
        Peer::Core => Some(core_caller::read(request.headers())),
        _ => None,
    };
    // Whoever else says it lies.
    core_caller::strip(request.headers_mut());
    let principal = match said {
        Some(said) => said.and_then(|caller| through_core(watch, &caller, method)),
        None => authenticate(watch, &peer).await,
    };
    let Some(method) = method else {
        principal?;
        return Err(Error::new(ErrorCode::NotFound, "there is no such call")
            .because("this agent's version does not know it")
            .hint("compare the versions: ghostctl version"));
    };
    match method.access {
        Access::Anyone if matches!(peer, Peer::Core) && method.core == CoreReach::Never => {
            principal?;
        }
        Access::Anyone => {}
        Access::Role(_) | Access::Guests => {
            let principal = principal?;
            let span = Span::current();
            span.record("principal", principal.name.as_str());
            span.record("role", principal.role.as_str());
            method.access.check(&principal)?;
            request.extensions_mut().insert(principal);
        }
    }
    let _room = match method.shape {
        Shape::Stream => None,
        Shape::Unary | Shape::Long(_) => Some(watch.unary_room.try_acquire().map_err(|_| {
            Error::new(ErrorCode::TooManyRequests, "too many calls at once")
                .hint("try again in a moment")
                .retry_after(Duration::from_secs(1))
        })?),
    };
    let guardian = match method.shape {
        Shape::Unary | Shape::Long(_) => None,
        Shape::Stream => {
            let leash = Leash::new(&watch.shutdown);
            request.extensions_mut().insert(leash.clone());
            match peer {
                Peer::Certificate(Ok(certificate)) if method.access != Access::Anyone => {
                    let task = hold(Arc::clone(watch), certificate, method, leash);
                    Some(Guardian(Arc::new(AbortOnDropHandle::new(tokio::spawn(
                        task,
                    )))))
                }
                _ => None,
            }
        }
    };
    // A panic in a handler is our fault and one call's end, not the connection's.
    let call = AssertUnwindSafe(inner.call(request)).catch_unwind();
    let answered = match method.shape.deadline(watch.timeout) {
        None => call.await,
        Some(deadline) => tokio::time::timeout(deadline, call).await.map_err(|_| {
            Error::new(ErrorCode::DeadlineExceeded, "the call took too long")
                .because(format!("it was given up after {} s", deadline.as_secs()))
                .hint("what it began may still take effect: look, then try again")
        })?,
    };
    match answered {
        Ok(Ok(mut response)) => {
            if let Some(guardian) = guardian {
                response.extensions_mut().insert(guardian);
            }
            Ok(response)
        }
        Ok(Err(never)) => match never {},
        Err(_) => Err(Error::internal("the agent stumbled over this call")),
    }
}

/// The principal of a caller whom Core vouches for, as far as the host's owner lets it.
fn through_core(
    watch: &Watch,
    caller: &FleetPrincipal,
    method: Option<&'static Method>,
) -> Result<Principal> {
    let (reach, role) = method.map_or((CoreReach::Plain, Role::Viewer), |method| {
        (method.core, method.access.least_role())
    });
    watch.use_cases.admit_core.execute(caller, reach, role)
}

async fn authenticate(watch: &Watch, peer: &Peer) -> Result<Principal> {
    let refused = |message: &str| Error::new(ErrorCode::Unauthenticated, message);
    match peer {
        Peer::Local(peer) => match peer.role {
            Some(role) => Ok(Principal {
                name: peer.name.clone(),
                role,
                source: PrincipalSource::Socket { uid: peer.uid },
                guest_access: role >= Role::Admin || watch.group_guest_access,
            }),
            None => Err(refused("this user may not use the agent's socket").hint(
                "the host's owner can let you in: usermod --append --groups ghost USER",
            )),
        },
        Peer::Certificate(read) => certified(watch, read.as_ref().map_err(Clone::clone)?).await,
        // Each of its calls says who makes it; see `through_core`.
        Peer::Core => Err(refused("Ghost Core does not say who calls")),
        Peer::Nobody => Err(refused("no client certificate was shown").hint(
            "get one: ghostctl trust token --role ROLE on the host, then ghostctl context add NAME --endpoint … --token …",
        )),
    }
}

/// The principal of a certificate, as the records have it now.
async fn certified(watch: &Watch, certificate: &PeerCertificate) -> Result<Principal> {
    if certificate.expires_at <= Timestamp::from(SystemTime::now()) {
        return Err(Error::new(
            ErrorCode::Unauthenticated,
            "the client certificate of this connection has ended",
        )
        .hint("connect again with the renewed certificate"));
    }
    let authenticate = &watch.use_cases.authenticate_certificate;
    authenticate.execute(certificate.credential).await
}

/// Looks again and again whether the identity behind a stream is still good, and ends the stream
/// when it is not: revoking somebody must also end what they are watching.
async fn hold(
    watch: Arc<Watch>,
    certificate: PeerCertificate,
    method: &'static Method,
    leash: Leash,
) {
    loop {
        tokio::time::sleep(watch.recheck).await;
        // A stream that was allowed goes on past the certificate's end: it would be allowed again
        // with the renewed one. Revocation and a lost role end it.
        let authenticate = &watch.use_cases.authenticate_certificate;
        let checked = authenticate.execute(certificate.credential).await;
        if let Err(error) = checked.and_then(|principal| method.access.check(&principal)) {
            leash.pull(error);
            return;
        }
    }
}

/// Gives errors that tonic made by itself (a body that does not decode, a message that is too
/// large) the details that all of ours have. The standard services keep their own: their clients
/// know them.
fn complete(response: &mut Response<Body>) {
    if response.headers().contains_key(Status::GRPC_STATUS_DETAILS) {
        return;
    }
    let Some(status) = Status::from_header_map(response.headers()) else {
        return;
    };
    if status.code() == Code::Ok {
        return;
    }
    *response = to_status(&foreign(&status)).into_http();
}

/// An error of ours for a status that is not.
pub fn foreign(status: &Status) -> Error {
    let code = match status.code() {
        // tonic's words for a message that does not decode (`tonic::codec::decode`).
        Code::Internal if status.message().starts_with("failed to decode") => {
            ErrorCode::InvalidArgument
        }
        Code::OutOfRange | Code::ResourceExhausted => ErrorCode::PayloadTooLarge,
        Code::Unimplemented => ErrorCode::NotFound,
        Code::DeadlineExceeded => ErrorCode::DeadlineExceeded,
        Code::Cancelled => ErrorCode::Cancelled,
        Code::Unauthenticated => ErrorCode::Unauthenticated,
        Code::PermissionDenied => ErrorCode::PermissionDenied,
        Code::Ok
        | Code::Unknown
        | Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => ErrorCode::InvalidArgument,
    };
    Error::new(code, "the request cannot be read").because(status.message())
}

fn status_of(headers: &HeaderMap) -> Option<Code> {
    headers
        .get(Status::GRPC_STATUS)
        .map(|value| Code::from_bytes(value.as_bytes()))
}

/// Tells the end of a call, once.
struct End {
    recorder: Arc<Recorder>,
    span: Span,
    method: &'static str,
    shape: Shape,
    begun: Instant,
    told: bool,
}

impl End {
    fn tell(&mut self, status: Code) {
        if std::mem::replace(&mut self.told, true) {
            return;
        }
        let took = self.begun.elapsed();
        let code = code_name(status);
        self.span.record("rpc.code", code);
        self.recorder.rpc(self.method, code, self.shape, took);
        let _entered = self.span.enter();
        let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        // Who is turned away is worth a line by itself; all else can be asked for.
        if matches!(status, Code::Unauthenticated | Code::PermissionDenied) {
            tracing::info!(code, took_ms, "refused");
        } else {
            tracing::debug!(code, took_ms, "answered");
        }
    }
}

/// The answer's body, watched for the status at its end.
struct Watched {
    body: Body,
    end: End,
    /// The status, where it came with the headers.
    code: Option<Code>,
    _guardian: Option<Guardian>,
}

impl http_body::Body for Watched {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(trailers) = frame.trailers_ref() {
                    let code = status_of(trailers).unwrap_or(Code::Unknown);
                    self.end.tell(code);
                }
            }
            Poll::Ready(Some(Err(status))) => {
                let code = status.code();
                self.end.tell(code);
            }
            Poll::Ready(None) => {
                let code = self.code.unwrap_or(Code::Unknown);
                self.end.tell(code);
            }
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // An answer without a body is never polled; any other that ends here was hung up on.
        let code = self.code.unwrap_or(Code::Cancelled);
        self.end.tell(code);
    }
}

/// gRPC's own name of a code, for labels and logs.
pub const fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "ok",
        Code::Cancelled => "cancelled",
        Code::Unknown => "unknown",
        Code::InvalidArgument => "invalid_argument",
        Code::DeadlineExceeded => "deadline_exceeded",
        Code::NotFound => "not_found",
        Code::AlreadyExists => "already_exists",
        Code::PermissionDenied => "permission_denied",
        Code::ResourceExhausted => "resource_exhausted",
        Code::FailedPrecondition => "failed_precondition",
        Code::Aborted => "aborted",
        Code::OutOfRange => "out_of_range",
        Code::Unimplemented => "unimplemented",
        Code::Internal => "internal",
        Code::Unavailable => "unavailable",
        Code::DataLoss => "data_loss",
        Code::Unauthenticated => "unauthenticated",
    }
}
