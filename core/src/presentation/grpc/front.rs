//! The guard before every call: who calls, how much, who may; what is written down.

use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, HeaderValue, Request, Response};
use futures::FutureExt;
use ghost_domain::{Error, ErrorCode, Result, Role, Secret, TenantName};
use ghost_presentation::grpc::access;
use ghost_presentation::grpc::status::to_status;
use ghost_presentation::metrics::Recorder;
use ghost_presentation::request::{REQUEST_ID, request_id, shown_key};
use ghost_presentation::{Access, CoreReach, Shape, TraceParent};
use ghost_proto::core::metadata;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::body::Body;
use tonic::service::Routes;
use tower::Service;
use tracing::{Instrument, Span};

use super::limit::{Limiter, Limits};
use super::methods::{CoreAccess, CoreMethod, EVENTS, core_method, is_always_ours};
use super::notes::{Note, Peek};
use super::routed::{Routed, check_host, check_role};
use super::services;
use super::watched::{End, Leash, Watched, outcome};
use crate::application::audit::{FleetAudit, FleetAuditRecord};
use crate::application::callers::{Admitted, Callers, KEY_PREFIX, Proof};
use crate::application::desk::Desk;
use crate::application::events::Chronicle;
use crate::application::fleet::Fleet;
use crate::application::links::HostLinks;
use crate::application::quota_check::Admission;
use crate::domain::ports::FleetAuthority;
use crate::domain::{Caller, CallerSource, HostRecord, PeerIdentity};
use crate::presentation::peer::{Peer, PeerKind};
use crate::presentation::route::Router;

/// Most streams (calls) at once on one connection.
const MOST_STREAMS: u32 = 256;
/// Most bytes of one call that a connection takes ahead of who reads them.
const STREAM_WINDOW: u32 = 256 * 1024;
/// So many calls may stand still with a full window before the others on their connection do.
const CONNECTION_WINDOWS: u32 = 64;
/// Most bytes of a call's headers.
const MOST_HEADERS: u32 = 16 * 1024;

/// What the composition root decides.
#[derive(Clone)]
pub struct FrontOptions {
    /// Core's version.
    pub version: String,
    /// The name of this replica.
    pub replica: String,
    /// Where hosts and people reach this Core, `host:port`, for tokens.
    pub addresses: Vec<String>,
    /// Ties a call's span to the caller's trace.
    pub trace: Option<TraceParent>,
    /// What one identity may ask.
    pub limits: Limits,
    /// How long a unary call to Core itself may take.
    pub timeout: Duration,
    /// Most unary calls to Core itself at once.
    pub most_calls: usize,
    /// How often the identity behind a stream is looked at again: how late a revocation counts.
    pub recheck: Duration,
    /// Whether HTTP serves the routes of Batwa too.
    pub batwa: bool,
}

impl Default for FrontOptions {
    fn default() -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            replica: "core".to_owned(),
            addresses: Vec::new(),
            trace: None,
            limits: Limits::default(),
            timeout: Duration::from_secs(30),
            most_calls: 1024,
            recheck: Duration::from_secs(15),
            batwa: false,
        }
    }
}

impl std::fmt::Debug for FrontOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrontOptions")
            .field("replica", &self.replica)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// What calls are answered with.
pub struct Parts {
    /// The records.
    pub fleet: Arc<Fleet>,
    /// The links that this replica has.
    pub links: Arc<dyn HostLinks>,
    /// The way through to hosts.
    pub router: Arc<Router>,
    /// Who calls.
    pub callers: Arc<Callers>,
    /// Quotas and placement.
    pub admission: Arc<Admission>,
    /// Who did what.
    pub audit: Arc<dyn FleetAudit>,
    /// What happens, counted.
    pub recorder: Arc<Recorder>,
    /// The links of hosts and their queues of commands.
    pub desk: Arc<Desk>,
    /// Core's CA.
    pub authority: Arc<dyn FleetAuthority>,
    /// What happens.
    pub events: Arc<Chronicle>,
}

/// Core's gRPC, whichever way a connection came.
pub struct Front {
    pub(in crate::presentation) parts: Parts,
    pub(in crate::presentation) options: FrontOptions,
    pub(in crate::presentation) routed: Routed,
    limiter: Arc<Limiter>,
    room: Semaphore,
    routes: Routes,
    /// The last line did not get into the audit log.
    audit_failing: Arc<AtomicBool>,
    pub(in crate::presentation) shutdown: CancellationToken,
}

impl std::fmt::Debug for Front {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Front")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

/// A call that is written down.
pub(in crate::presentation) struct Audit {
    log: Arc<dyn FleetAudit>,
    failing: Arc<AtomicBool>,
    who: FleetAuditRecord,
    note: Note,
}

impl Audit {
    fn record(&self, outcome: &str) -> FleetAuditRecord {
        let (host, subject, detail) = self.note.read();
        let (host, host_tenant) = host.unzip();
        FleetAuditRecord {
            host,
            host_tenant,
            subject,
            detail,
            outcome: outcome.to_owned(),
            ..self.who.clone()
        }
    }

    /// Before something is begun of which the end may be long in coming, or where the log was
    /// failing: without a line nothing is done.
    async fn begin(&self) -> Result<()> {
        let written = self.log.append(self.record("begun")).await;
        self.failing.store(written.is_err(), Ordering::Relaxed);
        written.map_err(|error| {
            Error::new(
                ErrorCode::StoreUnavailable,
                "what cannot be written down is not done",
            )
            .because(error)
            .hint("look at the disk of Core's data_dir")
        })
    }

    /// At the end. What was done is done: a line that cannot be written stops the next change.
    pub(in crate::presentation) async fn end(self, outcome: &str) {
        let written = self.log.append(self.record(outcome)).await;
        self.failing.store(written.is_err(), Ordering::Relaxed);
        if let Err(error) = written {
            tracing::error!(%error, action = self.who.action, outcome, "a change could not be written to the audit log");
        }
    }
}

/// How a caller proved itself, in one word.
pub(super) const fn source_name(source: &CallerSource) -> &'static str {
    match source {
        CallerSource::Socket { .. } => "socket",
        CallerSource::Certificate => "certificate",
        CallerSource::Key { .. } => "key",
        CallerSource::OpenIdConnect => "oidc",
    }
}

impl Front {
    /// Calls end when `shutdown` is cancelled. Call it within a Tokio runtime.
    ///
    /// # Errors
    /// `Internal` where reflection cannot describe the services.
    pub fn new(
        parts: Parts,
        options: FrontOptions,
        shutdown: CancellationToken,
    ) -> Result<Arc<Self>> {
        let routes = services::routes(&parts, &options, &shutdown)?;
        let routed = Routed {
            fleet: Arc::clone(&parts.fleet),
            links: Arc::clone(&parts.links),
            router: Arc::clone(&parts.router),
            admission: Arc::clone(&parts.admission),
            replica: options.replica.clone(),
        };
        Ok(Arc::new(Self {
            routed,
            limiter: Limiter::start(options.limits),
            room: Semaphore::new(options.most_calls),
            routes: routes.prepare(),
            audit_failing: Arc::default(),
            parts,
            options,
            shutdown,
        }))
    }

    /// The way through to hosts and to other replicas.
    pub fn router(&self) -> &Arc<Router> {
        &self.parts.router
    }

    /// Serves one HTTP/2 connection until its peer leaves or, once `shutdown` was cancelled, its
    /// calls have ended. Drop it to cut the connection.
    pub async fn serve<I>(self: &Arc<Self>, io: I, peer: Peer)
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let front = Arc::clone(self);
        let address = peer.address;
        let peer = Arc::new(peer);
        let service = hyper::service::service_fn(move |request: Request<Incoming>| {
            let (front, peer) = (Arc::clone(&front), Arc::clone(&peer));
            async move { Ok::<_, Infallible>(front.call(&peer, request.map(Body::new)).await) }
        });
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .max_concurrent_streams(MOST_STREAMS)
            .max_header_list_size(MOST_HEADERS)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(STREAM_WINDOW * CONNECTION_WINDOWS)
            // A peer that is gone without a word is noticed within half a minute.
            .keep_alive_interval(Some(Duration::from_secs(20)))
            .keep_alive_timeout(Duration::from_secs(10))
            // Against streams that are opened and reset at once (CVE-2023-44487).
            .max_pending_accept_reset_streams(Some(32))
            .max_local_error_reset_streams(Some(256));
        let mut serving = std::pin::pin!(builder.serve_connection(TokioIo::new(io), service));
        let ended = tokio::select! {
            ended = serving.as_mut() => ended,
            () = self.shutdown.cancelled() => {
                serving.as_mut().graceful_shutdown();
                serving.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(?address, %error, "a connection ended with a fault");
        }
    }

    /// Answers one call.
    pub async fn call(self: &Arc<Self>, peer: &Peer, mut request: Request<Body>) -> Response<Body> {
        let begun = Instant::now();
        let id = request_id(request.headers());
        let path = request.uri().path();
        let elsewhere = request.headers().contains_key(metadata::HOST);
        let ours = core_method(path).filter(|method| !(elsewhere && method.path == EVENTS));
        let theirs = access::method(path).filter(|_| ours.is_none());
        // Unknown paths share one name: what strangers send must not become label values.
        let (name, shape) = match (ours, theirs) {
            (Some(method), _) => (method.path, method.shape),
            (None, Some(method)) => (method.path, method.shape),
            (None, None) => ("unknown", Shape::Unary),
        };
        let span = tracing::info_span!(
            "rpc",
            otel.kind = "server",
            rpc.system = "grpc",
            rpc.method = name,
            request_id = %id,
            principal = tracing::field::Empty,
            role = tracing::field::Empty,
            host = tracing::field::Empty,
            rpc.code = tracing::field::Empty,
        );
        if let Some(trace) = &self.options.trace {
            trace(request.headers(), &span);
        }
        let note = Note::default();
        request.extensions_mut().insert(note.clone());
        let mut context = Context {
            admitted: None,
            audit: None,
            note,
            id: id.clone(),
            action: name.trim_start_matches('/').to_owned(),
        };
        let passed = AssertUnwindSafe(self.pass(peer, ours, theirs, request, &mut context))
            .catch_unwind()
            .instrument(span.clone())
            .await;
        let mut response = match passed {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => to_status(&error).into_http(),
            // A panic in a handler is our fault and one call's end, not the connection's.
            Err(_) => to_status(&Error::internal("Core stumbled over this call")).into_http(),
        };
        // A host has done that for its own, and standard services keep their own.
        if ours.is_some() && !name.starts_with("/grpc.") {
            complete(&mut response);
        }
        if let Ok(value) = HeaderValue::from_str(&id) {
            response.headers_mut().insert(REQUEST_ID, value);
        }
        let end = End {
            recorder: Arc::clone(&self.parts.recorder),
            span,
            method: name,
            shape,
            begun,
            told: false,
            audit: context.audit,
        };
        let leash = shape.is_stream().then(|| {
            let mut ticks = tokio::time::interval(self.options.recheck);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks.reset();
            Leash {
                ticks,
                callers: Arc::clone(&self.parts.callers),
                admitted: context.admitted,
                shutdown: Box::pin(self.shutdown.clone().cancelled_owned()),
            }
        });
        let head = outcome(response.headers());
        response.map(|body| Body::new(Watched::new(body, end, head, leash)))
    }

    async fn pass(
        self: &Arc<Self>,
        peer: &Peer,
        ours: Option<&'static CoreMethod>,
        theirs: Option<&'static access::Method>,
        request: Request<Body>,
        context: &mut Context,
    ) -> Result<Response<Body>> {
        let elsewhere = request.headers().contains_key(metadata::HOST);
        match (ours, theirs) {
            (Some(method), _) if elsewhere && is_of_hosts(method.path) => {
                self.admit(peer, request.headers(), context).await?;
                Err(Error::new(
                    ErrorCode::CorePermissionDenied,
                    "nobody manages the credentials of a host through Core",
                )
                .hint("do it on the host itself, or leave --host out for Core's own"))
            }
            (Some(method), _) => self.own(peer, method, request, context).await,
            (None, Some(method)) => self.onward(peer, method, request, context).await,
            (None, None) => {
                self.admit(peer, request.headers(), context).await?;
                Err(Error::new(ErrorCode::NotFound, "there is no such call")
                    .because("this Core's version does not know it")
                    .hint("compare the versions: ghostctl version"))
            }
        }
    }

    /// Who calls, within its limit.
    async fn admit(
        &self,
        peer: &Peer,
        headers: &HeaderMap,
        context: &mut Context,
    ) -> Result<Admitted> {
        let admitted = match proof(peer, headers) {
            Ok(proof) => self.parts.callers.admit(proof).await,
            Err(error) => Err(error),
        };
        let admitted = match admitted {
            Ok(admitted) => admitted,
            Err(error) => {
                // Whoever tries keys is slowed down where it comes from.
                self.limiter.take(&peer.origin())?;
                return Err(error);
            }
        };
        let caller = &admitted.caller;
        let span = Span::current();
        span.record("principal", caller.full_name());
        span.record("role", caller.role.as_str());
        self.limiter.take(&format!(
            "{} {}",
            source_name(&caller.source),
            caller.full_name()
        ))?;
        context.admitted = Some(admitted.clone());
        Ok(admitted)
    }

    fn audit(&self, caller: Option<&Caller>, context: &Context) -> Audit {
        Audit {
            log: Arc::clone(&self.parts.audit),
            failing: Arc::clone(&self.audit_failing),
            who: FleetAuditRecord {
                principal: caller.map(Caller::full_name).unwrap_or_default(),
                tenant: caller.and_then(|caller| caller.tenant.clone()),
                source: caller
                    .map_or("nobody", |caller| source_name(&caller.source))
                    .to_owned(),
                action: context.action.clone(),
                request_id: context.id.clone(),
                ..FleetAuditRecord::default()
            },
            note: context.note.clone(),
        }
    }

    /// Makes sure that the call will be written down.
    async fn written(
        &self,
        caller: Option<&Caller>,
        shape: Shape,
        context: &mut Context,
    ) -> Result<()> {
        let audit = self.audit(caller, context);
        if shape.is_stream() || self.audit_failing.load(Ordering::Relaxed) {
            audit.begin().await?;
        }
        context.audit = Some(audit);
        Ok(())
    }

    /// A call that Core answers itself.
    async fn own(
        self: &Arc<Self>,
        peer: &Peer,
        method: &'static CoreMethod,
        mut request: Request<Body>,
        context: &mut Context,
    ) -> Result<Response<Body>> {
        match method.access {
            CoreAccess::Anyone => {
                self.limiter.take(&peer.origin())?;
                if method.audited {
                    self.written(None, method.shape, context).await?;
                }
            }
            CoreAccess::Host => {
                let host = match &peer.kind {
                    PeerKind::Certified {
                        identity,
                        expires_at,
                    } => {
                        let now = self.parts.fleet.clock().now();
                        match identity.clone()? {
                            identity @ PeerIdentity::Host { .. } if *expires_at > now => identity,
                            PeerIdentity::Host { .. } => {
                                return Err(Error::new(
                                    ErrorCode::Unauthenticated,
                                    "the host's certificate has ended",
                                ));
                            }
                            _ => return Err(only("hosts")),
                        }
                    }
                    _ => return Err(only("hosts")),
                };
                request.extensions_mut().insert(host);
            }
            CoreAccess::Replica => {
                let PeerKind::Certified {
                    identity: Ok(PeerIdentity::Replica(_)),
                    ..
                } = &peer.kind
                else {
                    return Err(only("the replicas of this Core"));
                };
            }
            CoreAccess::Role(_) | CoreAccess::FleetAdmin => {
                let admitted = self.admit(peer, request.headers(), context).await?;
                if method.audited {
                    // A refusal is worth a line as well.
                    self.written(Some(&admitted.caller), method.shape, context)
                        .await?;
                }
                match method.access {
                    CoreAccess::Role(role) => admitted.caller.require(role)?,
                    _ => admitted.caller.require_fleet_admin()?,
                }
                if admitted.caller.hosts.is_some() && method.audited && !is_for_one_host(method) {
                    return Err(Error::new(
                        ErrorCode::PermissionDenied,
                        "this key is bound to some hosts, and this is about more than those",
                    ));
                }
                request.extensions_mut().insert(admitted.caller);
            }
        }
        let room = match method.shape {
            Shape::Stream => None,
            Shape::Unary | Shape::Long(_) => Some(self.room.try_acquire().map_err(|_| {
                Error::new(ErrorCode::TooManyRequests, "too many calls at once")
                    .hint("try again in a moment")
                    .retry_after(Duration::from_secs(1))
            })?),
        };
        let mut routes = self.routes.clone();
        let call = routes.call(request);
        let answered = match method.shape.deadline(self.options.timeout) {
            None => call.await,
            Some(most) => tokio::time::timeout(most, call).await.map_err(|_| {
                Error::new(ErrorCode::DeadlineExceeded, "the call took too long")
                    .because(format!("it was given up after {} s", most.as_secs()))
                    .hint("what it began may still take effect: look, then try again")
            })?,
        };
        drop(room);
        match answered {
            Ok(response) => Ok(response.map(Body::new)),
            Err(never) => match never {},
        }
    }

    /// A call that goes to a host.
    async fn onward(
        self: &Arc<Self>,
        peer: &Peer,
        method: &'static access::Method,
        request: Request<Body>,
        context: &mut Context,
    ) -> Result<Response<Body>> {
        let admitted = self.admit(peer, request.headers(), context).await?;
        let caller = &admitted.caller;
        // Whatever is more than a look is written down.
        let looks = matches!(method.access, Access::Role(Role::Viewer) | Access::Anyone);
        let forwarded = request.headers().contains_key(metadata::FORWARDED)
            && matches!(
                &peer.kind,
                PeerKind::Certified {
                    identity: Ok(PeerIdentity::Replica(_)),
                    ..
                }
            );
        let request = if looks || forwarded {
            request
        } else {
            self.written(Some(caller), method.shape, context).await?;
            let note = context.note.clone();
            request.map(|body| Body::new(Peek::new(body, note)))
        };
        self.routed
            .call(
                caller,
                method,
                request,
                &context.id,
                &context.note,
                forwarded,
            )
            .await
    }
}

/// Somebody at a host, by HTTP.
pub(in crate::presentation) struct Entered {
    pub(in crate::presentation) admitted: Admitted,
    pub(in crate::presentation) host: Arc<HostRecord>,
    pub(in crate::presentation) audit: Option<Audit>,
}

/// What HTTP asks of the guard.
pub(in crate::presentation) struct Door<'a> {
    pub(in crate::presentation) headers: &'a HeaderMap,
    pub(in crate::presentation) request_id: &'a str,
    /// For the audit log.
    pub(in crate::presentation) action: String,
    pub(in crate::presentation) access: Access,
    pub(in crate::presentation) reach: CoreReach,
    pub(in crate::presentation) shape: Shape,
}

impl Front {
    /// The guard before a request that goes to a host by HTTP: `pick` says which, once it is known
    /// who asks.
    pub(in crate::presentation) async fn enter(
        &self,
        door: Door<'_>,
        pick: impl FnOnce(&Caller, &Note) -> Result<Arc<HostRecord>>,
    ) -> Result<Entered> {
        let mut context = Context {
            admitted: None,
            audit: None,
            note: Note::default(),
            id: door.request_id.to_owned(),
            action: door.action,
        };
        let nobody = Peer {
            address: None,
            kind: PeerKind::Nobody,
        };
        let admitted = self.admit(&nobody, door.headers, &mut context).await?;
        let looks = matches!(door.access, Access::Anyone | Access::Role(Role::Viewer));
        if !looks {
            self.written(Some(&admitted.caller), door.shape, &mut context)
                .await?;
        }
        let allowed = || {
            let host = pick(&admitted.caller, &context.note)?;
            context.note.host(host.id, &host.tenant);
            check_role(&admitted.caller, door.access, door.reach)?;
            check_host(&host, door.access, door.reach)?;
            Ok(host)
        };
        match allowed() {
            Ok(host) => Ok(Entered {
                admitted,
                host,
                audit: context.audit,
            }),
            Err(error) => {
                let error: Error = error;
                if let Some(audit) = context.audit {
                    audit.end(error.code().as_str()).await;
                }
                Err(error)
            }
        }
    }
}

impl Front {
    /// The guard before a request that is answered by calls of its own: who asks, and whether that
    /// role may. The calls are checked, limited and written down each by itself; what is refused
    /// here already is written down here.
    pub(in crate::presentation) async fn look(&self, door: Door<'_>) -> Result<Caller> {
        let mut context = Context {
            admitted: None,
            audit: None,
            note: Note::default(),
            id: door.request_id.to_owned(),
            action: door.action,
        };
        let nobody = Peer {
            address: None,
            kind: PeerKind::Nobody,
        };
        let admitted = self.admit(&nobody, door.headers, &mut context).await?;
        let Err(error) = check_role(&admitted.caller, door.access, door.reach) else {
            return Ok(admitted.caller);
        };
        if !matches!(door.access, Access::Anyone | Access::Role(Role::Viewer)) {
            self.written(Some(&admitted.caller), Shape::Unary, &mut context)
                .await?;
            if let Some(audit) = context.audit {
                audit.end(error.code().as_str()).await;
            }
        }
        Err(error)
    }
}

/// What the guard learns of a call.
struct Context {
    admitted: Option<Admitted>,
    audit: Option<Audit>,
    note: Note,
    id: String,
    action: String,
}

fn only(whom: &str) -> Error {
    Error::new(
        ErrorCode::Unauthenticated,
        format!("this call is for {whom} only"),
    )
    .because("no certificate of one was shown")
}

/// Methods whose meaning depends on whether a host is named.
fn is_of_hosts(path: &str) -> bool {
    path.starts_with("/ghost.agent.v1.AccessService/") && !is_always_ours(path)
}

/// Changes that a key which is bound to some hosts may make, because they name one.
fn is_for_one_host(method: &CoreMethod) -> bool {
    matches!(
        method.path,
        "/ghost.core.v1.FleetService/UpdateHost"
            | "/ghost.core.v1.FleetService/RemoveHost"
            | "/ghost.core.v1.FleetService/QueueCommand"
            | "/ghost.core.v1.FleetService/CancelCommand"
    )
}

/// What a caller shows: a key before the connection's own identity, because it was chosen for the
/// call.
fn proof(peer: &Peer, headers: &HeaderMap) -> Result<Proof> {
    if let Some(key) = shown_key(headers) {
        return Ok(Proof::Bearer(Secret::new(key)));
    }
    let refused = |message: &str| Error::new(ErrorCode::Unauthenticated, message);
    match &peer.kind {
        PeerKind::Local {
            uid,
            name,
            admitted: true,
        } => Ok(Proof::Local {
            uid: *uid,
            name: name.clone(),
        }),
        PeerKind::Local { .. } => Err(refused("this user may not use Core's socket").hint(
            "an administrator of this machine can let you in: usermod --append --groups ghost USER",
        )),
        PeerKind::Certified {
            identity,
            expires_at,
        } => match identity.clone()? {
            PeerIdentity::User(user) => Ok(Proof::Certificate {
                user,
                expires_at: *expires_at,
            }),
            PeerIdentity::Replica(_) => vouched(headers).map(|caller| Proof::Vouched(Box::new(caller))),
            PeerIdentity::Host { .. } => Err(refused("a host is not an operator")
                .because("the certificate of this connection is a host's")),
        },
        PeerKind::Nobody => Err(refused("no client certificate and no key was shown").hint(format!(
            "get one: ghost-core token create --role ROLE on Core's machine, then ghostctl context add NAME --endpoint … --token …; or send a key, {KEY_PREFIX}…"
        ))),
    }
}

/// The caller that another replica let in.
fn vouched(headers: &HeaderMap) -> Result<Caller> {
    let text = |name: &str| {
        headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .map(decoded)
    };
    let missing = || {
        Error::new(
            ErrorCode::Unauthenticated,
            "a replica has to say for whom it calls",
        )
    };
    if !headers.contains_key(metadata::FORWARDED) {
        return Err(missing());
    }
    let full = text(metadata::PRINCIPAL).ok_or_else(missing)?;
    let role: Role = text(metadata::ROLE).ok_or_else(missing)?.parse()?;
    let tenant = text(metadata::TENANT).map(TenantName::new).transpose()?;
    let name = match &tenant {
        Some(tenant) => full
            .strip_prefix(&format!("{tenant}/"))
            .unwrap_or(&full)
            .to_owned(),
        None => full,
    };
    Ok(Caller {
        name,
        user: None,
        tenant,
        role,
        hosts: None,
        source: CallerSource::Certificate,
    })
}

/// Undoes percent-encoding; what is none stays as it is.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let pair = (*first == b'%')
            .then(|| after.get(..2))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match pair {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Gives errors that tonic made by itself the details that all of ours have.
fn complete(response: &mut Response<Body>) {
    if response.headers().contains_key(Status::GRPC_STATUS_DETAILS) {
        return;
    }
    let Some(status) = Status::from_header_map(response.headers()) else {
        return;
    };
    if status.code() == tonic::Code::Ok {
        return;
    }
    *response = to_status(&ghost_presentation::grpc::foreign(&status)).into_http();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_the_way_to_another_replica() {
        for (written, read) in [
            ("a/b c", "a/b c"),
            ("j%C3%B6rg%25", "jörg%"),
            ("%zz%4", "%zz%4"),
        ] {
            assert_eq!(decoded(written), read);
        }
    }

    #[test]
    fn a_key_is_found_in_either_header_and_comes_first() {
        let peer = Peer {
            address: None,
            kind: PeerKind::Local {
                uid: 0,
                name: "root".into(),
                admitted: true,
            },
        };
        let mut headers = HeaderMap::new();
        assert!(matches!(proof(&peer, &headers), Ok(Proof::Local { .. })));
        headers.insert("x-api-key", HeaderValue::from_static("ghost_a_b"));
        assert!(
            matches!(proof(&peer, &headers), Ok(Proof::Bearer(secret)) if secret.expose() == "ghost_a_b")
        );
        headers.insert(
            "authorization",
            HeaderValue::from_static("bearer  ghost_c_d "),
        );
        assert!(
            matches!(proof(&peer, &headers), Ok(Proof::Bearer(secret)) if secret.expose() == "ghost_c_d")
        );
    }
}
