//! The HTTP API of a host, through its link: each request is a stream of its own to the agent's
//! HTTP server, with what Core vouches for in its headers.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Extension, Path, Request, State};
use axum::http::uri::PathAndQuery;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use ghost_domain::{ByteSize, Demand, Error, ErrorCode, Result, TenantName};
use ghost_presentation::Shape;
use ghost_presentation::http::extract::Query;
use ghost_presentation::http::problem::{Failure, Problem};
use ghost_presentation::http::routes::{ROUTES, Route};
use ghost_proto::core::metadata;
use ghost_proto::view;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;

use super::bodies::PlacedQuery;
use super::{Answer, CalledAs, Shell};
use crate::application::callers::Admitted;
use crate::application::quota_check::{Reserved, Wanted};
use crate::domain::{Caller, HostRecord};
use crate::presentation::grpc::front::{Door, Entered};
use crate::presentation::grpc::routed::labels;
use crate::presentation::route::Target;
use crate::presentation::route::headers::{stays_here, strip, vouch};

/// Most bytes of a body that Core reads itself: those of VMs that are made or changed.
const MOST_BODY: usize = 1024 * 1024;
/// How long a request that is no stream may take until its answer begins.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often whoever has a session is looked at again: how late a revocation counts.
const RECHECK: Duration = Duration::from_secs(15);

/// The agent's route of a request.
fn route_of(method: &Method, path: &str) -> Option<&'static Route> {
    let method = if *method == Method::HEAD {
        "GET"
    } else {
        method.as_str()
    };
    let fits = |pattern: &str| {
        let (mut wanted, mut given) = (pattern.split('/'), path.split('/'));
        loop {
            match (wanted.next(), given.next()) {
                (None, None) => return true,
                (Some(wanted), Some(given)) => {
                    let free = wanted.starts_with('{') && !given.is_empty();
                    if wanted != given && !free {
                        return false;
                    }
                }
                _ => return false,
            }
        }
    };
    ROUTES
        .iter()
        .filter(|route| route.path.starts_with("/v1/"))
        .find(|route| route.method == method && fits(route.path))
}

/// The key of a WebSocket that a page opened: pages can give it no headers. It is Core's and goes
/// no further.
fn take_subprotocol(headers: &mut HeaderMap) -> Option<HeaderValue> {
    let offered: Vec<String> = headers
        .get_all(header::SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|one| one.trim().to_owned())
        .collect();
    let (keys, others): (Vec<_>, Vec<_>) =
        offered.iter().partition(|one| one.starts_with("bearer."));
    let key = keys.first()?.strip_prefix("bearer.")?.to_owned();
    headers.remove(header::SEC_WEBSOCKET_PROTOCOL);
    let others: Vec<&str> = others.into_iter().map(String::as_str).collect();
    if !others.is_empty()
        && let Ok(value) = HeaderValue::from_str(&others.join(", "))
    {
        headers.insert(header::SEC_WEBSOCKET_PROTOCOL, value);
    }
    HeaderValue::from_str(&format!("Bearer {key}")).ok()
}

fn is_upgrade(headers: &HeaderMap) -> bool {
    headers
        .get(header::UPGRADE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.eq_ignore_ascii_case("websocket"))
}

/// `/v1/hosts/{host}/…`
pub(super) async fn onward(
    State(shell): State<Arc<Shell>>,
    Extension(CalledAs(id)): Extension<CalledAs>,
    Path((host, rest)): Path<(String, String)>,
    mut request: Request,
) -> Answer {
    // As it was sent: an encoded slash is none.
    let sent = request.uri().path();
    let rest = sent
        .strip_prefix("/v1/hosts/")
        .and_then(|rest| rest.split_once('/'))
        .map_or(rest, |(_, rest)| rest.to_owned());
    let path = format!("/v1/{rest}");
    let route = route_of(request.method(), &path).ok_or_else(|| {
        Failure(
            Error::new(ErrorCode::NotFound, "agents have no such route").hint(format!(
                "see /v1/hosts/{host}/openapi.json for those they have"
            )),
        )
    })?;
    let upgrades = is_upgrade(request.headers());
    if upgrades && let Some(key) = take_subprotocol(request.headers_mut()) {
        request.headers_mut().insert(header::AUTHORIZATION, key);
    }
    let fleet = Arc::clone(&shell.front.parts.fleet);
    let entered = shell
        .front
        .enter(
            Door {
                headers: request.headers(),
                request_id: &id,
                action: format!("{} {}", route.method, route.path),
                access: route.access,
                reach: route.core,
                shape: route.shape,
            },
            |caller, note| {
                note.subject(subject(route, &path));
                fleet.read(|state| state.find_host(caller, &host).cloned())
            },
        )
        .await?;
    let onward = Onward {
        route,
        path,
        id,
        upgrades,
    };
    let caller = entered.admitted.caller.clone();
    let admits = shell.admits(&caller, &entered.host, &onward, &mut request);
    let reserved = match admits.await {
        Ok(reserved) => reserved,
        Err(error) => return Err(shell.refuse(entered, error).await),
    };
    let mut response = shell.carry(entered, &onward, request).await?;
    if let Some(reserved) = reserved
        && response.status().is_success()
    {
        reserved.keep(None);
    }
    relocate(&mut response, &host);
    Ok(response)
}

/// The VM or image that a request is about, for the audit log.
fn subject<'a>(route: &Route, path: &'a str) -> &'a str {
    let mut pairs = route.path.split('/').zip(path.split('/'));
    pairs
        .find(|(pattern, _)| pattern.starts_with('{'))
        .map_or("", |(_, given)| given)
}

/// Where to follow an operation is a path of Core's.
fn relocate(response: &mut Response, host: &str) {
    let there = response
        .headers()
        .get(header::LOCATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|path| path.strip_prefix("/v1/"))
        .map(|rest| format!("/v1/hosts/{host}/{rest}"));
    if let Some(value) = there.and_then(|path| HeaderValue::from_str(&path).ok()) {
        response.headers_mut().insert(header::LOCATION, value);
    }
}

/// Make a VM
///
/// Core finds the host, with the body that the agent's own `/v1/vms` takes, and answers as that
/// does; the headers `ghost-host` and `ghost-placement` say where it went, and why.
#[utoipa::path(post, path = "/v1/vms", tag = "vms", params(PlacedQuery,
        ("Idempotency-Key" = Option<String>, Header, description = "The same key returns the same operation, on the same host")),
    request_body(content = Object, description = "What POST /v1/vms of an agent takes"),
    security(("bearer" = []), ("key" = [])),
    responses((status = 202, body = view::Operation), (status = "default", body = Problem)))]
pub(super) async fn create_vm(
    State(shell): State<Arc<Shell>>,
    Extension(CalledAs(id)): Extension<CalledAs>,
    Query(query): Query<PlacedQuery>,
    mut request: Request,
) -> Answer {
    let path = "/v1/vms".to_owned();
    let route = route_of(&Method::POST, &path)
        .ok_or_else(|| Failure(Error::internal("agents make no VMs")))?;
    let (bytes, body) = read_json(&mut request).await?;
    let labels = match query.labels.as_deref() {
        None | Some("") => Default::default(),
        Some(text) => labels(text)?,
    };
    let key = request
        .headers()
        .get("idempotency-key")
        .and_then(|value| value.to_str().ok())
        .map(|text| text.trim_matches('"').to_owned())
        .filter(|text| !text.is_empty());
    let mut admitted = None;
    let front = &shell.front;
    let mut entered = front
        .enter(
            Door {
                headers: request.headers(),
                request_id: &id,
                action: format!("{} {}", route.method, route.path),
                access: route.access,
                reach: route.core,
                shape: route.shape,
            },
            |caller, note| {
                caller.require(ghost_domain::Role::Operator)?;
                let tenant = match (&query.tenant, &caller.tenant) {
                    (Some(named), _) => TenantName::new(named.as_str())?,
                    (None, Some(own)) => own.clone(),
                    (None, None) => TenantName::new(TenantName::DEFAULT)?,
                };
                note.subject(body.name());
                let asked = Wanted {
                    tenant,
                    name: body.name().to_owned(),
                    demand: body.demand(),
                    labels,
                    request_id: key.clone(),
                };
                let placed = front.parts.admission.anywhere(caller, &asked)?;
                note.detail(&format!(
                    "placed on {}: {}",
                    placed.placed.name, placed.placed.reason
                ));
                let host = front
                    .parts
                    .fleet
                    .read(|state| state.require_host(placed.host).cloned());
                admitted = Some((placed, asked));
                host
            },
        )
        .await?;
    let Some((placed, asked)) = admitted else {
        return Err(Failure(Error::internal("the VM was placed nowhere")));
    };
    let caller = entered.admitted.caller.clone();
    let admission = &shell.front.parts.admission;
    let placed = match admission.send(&caller, &asked, placed).await {
        Ok(placed) => placed,
        Err(error) => return Err(shell.refuse(entered, error).await),
    };
    if placed.host != entered.host.id {
        // Another replica was asked first.
        let fleet = &shell.front.parts.fleet;
        match fleet.read(|state| state.require_host(placed.host).cloned()) {
            Ok(host) => entered.host = host,
            Err(error) => return Err(shell.refuse(entered, error).await),
        }
    }
    let reserved = match admission.hold(&caller, placed.reserved).await {
        Ok(reserved) => reserved,
        Err(error) => {
            if let Some(key) = &key {
                admission.forget(&caller, key).await;
            }
            return Err(shell.refuse(entered, error).await);
        }
    };
    let shown = match &caller.tenant {
        Some(_) => entered.host.name.to_string(),
        None => format!("{}/{}", entered.host.tenant, entered.host.name),
    };
    let host_id = entered.host.id;
    let onward = Onward {
        route,
        path,
        id,
        upgrades: false,
    };
    *request.body_mut() = Body::from(bytes);
    let carried = shell.carry(entered, &onward, request).await;
    let refused = match &carried {
        // What else there is may come of a request that was cut off on its way.
        Ok(response) => {
            response.status().is_client_error() && response.status() != StatusCode::REQUEST_TIMEOUT
        }
        Err(Failure(error)) => error.code() == ErrorCode::HostOffline,
    };
    match (refused, reserved) {
        (true, _) => {
            if let Some(key) = &key {
                shell.front.parts.admission.forget(&caller, key).await;
            }
        }
        (false, Some(reserved)) if carried.is_ok() => reserved.keep(None),
        (false, _) => {}
    }
    let mut response = carried?;
    relocate(&mut response, &host_id.to_string());
    for (name, value) in [
        (metadata::HOST, shown),
        (metadata::PLACEMENT, placed.placed.reason),
    ] {
        if let Ok(value) = HeaderValue::from_str(&value) {
            response.headers_mut().insert(name, value);
        }
    }
    Ok(response)
}

/// A request on its way.
struct Onward {
    route: &'static Route,
    path: String,
    id: String,
    upgrades: bool,
}

/// What Core has to know of a body that makes or changes a VM; all else is the agent's to judge.
#[derive(Debug, Default)]
struct VmBody(serde_json::Value);

impl VmBody {
    fn name(&self) -> &str {
        self.0
            .get("name")
            .and_then(serde_json::Value::as_str)
            .unwrap_or_default()
    }

    fn number(&self, key: &str) -> u64 {
        self.0
            .get(key)
            .and_then(serde_json::Value::as_u64)
            .unwrap_or_default()
    }

    fn demand(&self) -> Demand {
        Demand {
            cpus: u32::try_from(self.number("vcpus")).unwrap_or(u32::MAX),
            memory: ByteSize::from_bytes(self.number("memory_bytes")),
            disk: ByteSize::from_bytes(self.number("disk_bytes")),
        }
    }
}

async fn read_json(request: &mut Request) -> Result<(Bytes, VmBody)> {
    let body = std::mem::take(request.body_mut());
    let bytes = axum::body::to_bytes(body, MOST_BODY).await.map_err(|_| {
        Error::new(
            ErrorCode::PayloadTooLarge,
            "the body is too large or ended early",
        )
        .because(format!("{MOST_BODY} bytes are the most"))
    })?;
    let value = serde_json::from_slice(&bytes).map_err(|cause| {
        Error::new(ErrorCode::InvalidArgument, "the body is not JSON").because(cause)
    })?;
    Ok((bytes, VmBody(value)))
}

impl Shell {
    /// Whether there is room for what the request makes.
    async fn admits(
        &self,
        caller: &Caller,
        host: &HostRecord,
        onward: &Onward,
        request: &mut Request,
    ) -> Result<Option<Reserved>> {
        let admission = &self.front.parts.admission;
        match (onward.route.method, onward.route.path) {
            ("POST", "/v1/vms") => {
                let (bytes, body) = read_json(request).await?;
                *request.body_mut() = Body::from(bytes);
                if body.0.get("dry_run") == Some(&serde_json::Value::Bool(true)) {
                    return Ok(None);
                }
                let reserved = admission.on_host(caller, host.id, body.name(), body.demand())?;
                admission.hold(caller, Some(reserved)).await
            }
            ("PATCH", "/v1/vms/{vm}") => {
                let (bytes, body) = read_json(request).await?;
                *request.body_mut() = Body::from(bytes);
                let vm = subject(onward.route, &onward.path);
                let wanted = body.demand();
                let told = self.front.parts.fleet.inventory(host.id);
                let known = told.as_ref().and_then(|told| {
                    told.vms
                        .values()
                        .find(|one| one.name == vm || one.id.to_string().starts_with(vm))
                });
                let more = known.map_or_else(Demand::default, |known| Demand {
                    cpus: wanted.cpus.saturating_sub(known.demand.cpus),
                    memory: wanted.memory.saturating_sub(known.demand.memory),
                    disk: ByteSize::default(),
                });
                let reserved = admission.growth(caller, host.id, more)?;
                admission.hold(caller, reserved).await
            }
            _ => Ok(None),
        }
    }

    /// Ends a request that was let in and cannot be carried.
    async fn refuse(&self, entered: Entered, error: Error) -> Failure {
        if let Some(audit) = entered.audit {
            audit.end(error.code().as_str()).await;
        }
        Failure(error)
    }

    /// Carries a request to its host and gives back the answer.
    async fn carry(
        &self,
        entered: Entered,
        onward: &Onward,
        request: Request,
    ) -> Result<Response, Failure> {
        let routed = &self.front.routed;
        let sent = match routed.target(&entered.host, false) {
            Err(error) => Err(error),
            Ok(target) => {
                let sent = self.send(&entered, onward, &target, request).await;
                sent.map_err(|error| routed.unreached(&entered.host, &onward.path, &target, error))
            }
        };
        match sent {
            Err(error) => Err(self.refuse(entered, error).await),
            Ok(response) => {
                let status = response.status();
                if let Some(audit) = entered.audit {
                    let ok = status.is_success() || status == StatusCode::SWITCHING_PROTOCOLS;
                    let outcome = if ok {
                        "ok".to_owned()
                    } else {
                        format!("http {}", status.as_u16())
                    };
                    audit.end(&outcome).await;
                }
                Ok(response)
            }
        }
    }

    async fn send(
        &self,
        entered: &Entered,
        onward: &Onward,
        target: &Target,
        mut request: Request,
    ) -> Result<Response> {
        let host = &entered.host;
        let ours = onward.upgrades.then(|| hyper::upgrade::on(&mut request));
        let router = &self.front.parts.router;
        let stream = router.stream(target, host.id, host.name.as_str()).await?;
        let broken = |cause: hyper::Error| {
            Error::new(
                ErrorCode::AgentUnreachable,
                format!("the host {} broke the request off", host.name),
            )
            .because(cause)
            .hint("what it began may still take effect: look, then try again")
        };
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(broken)?;
        tokio::spawn(async move {
            // Its end is the end of the request, which is told there.
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "a request to a host ended");
            }
        });

        let (mut parts, body) = request.into_parts();
        let upgrade = parts.headers.get(header::UPGRADE).cloned();
        strip(&mut parts.headers, stays_here);
        vouch(&mut parts.headers, &entered.admitted.caller, &onward.id)?;
        parts
            .headers
            .insert(header::HOST, HeaderValue::from_static("ghost-agent"));
        if let (true, Some(upgrade)) = (onward.upgrades, upgrade) {
            parts.headers.insert(header::UPGRADE, upgrade);
            parts
                .headers
                .insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        }
        let target = match parts.uri.query() {
            Some(query) if onward.route.path != "/v1/vms" || parts.method != Method::POST => {
                format!("{}?{query}", onward.path)
            }
            _ => onward.path.clone(),
        };
        parts.uri = target
            .parse::<PathAndQuery>()
            .map(Uri::from)
            .map_err(|cause| {
                Error::new(ErrorCode::InvalidArgument, "the path cannot be read").because(cause)
            })?;
        parts.extensions = Default::default();
        let sending = sender.send_request(Request::from_parts(parts, body));
        let answered = match onward.route.shape.deadline(PATIENCE) {
            None => sending.await,
            Some(most) => tokio::time::timeout(most, sending).await.map_err(|_| {
                Error::new(
                    ErrorCode::DeadlineExceeded,
                    format!("the host {} did not answer in time", host.name),
                )
                .hint("what the request began may still take effect: look, then try again")
            })?,
        };
        let mut response = answered.map_err(broken)?;
        let watch = self.watch(&entered.admitted);
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            let theirs = hyper::upgrade::on(&mut response);
            if let Some(ours) = ours {
                tokio::spawn(join(ours, theirs, watch));
            }
            let (mut parts, _) = response.into_parts();
            strip_answer(&mut parts.headers, true);
            return Ok(Response::from_parts(parts, Body::empty()));
        }
        let streams = matches!(onward.route.shape, Shape::Stream);
        let (mut parts, body) = response.into_parts();
        strip_answer(&mut parts.headers, false);
        let body = Body::new(Held {
            body,
            // Keeps the connection until the body has come.
            _sender: sender,
            watch: streams.then(|| Box::pin(watch)),
        });
        Ok(Response::from_parts(parts, body).into_response())
    }

    /// Resolves when whoever has a session should not have it any more, or this server ends.
    fn watch(&self, admitted: &Admitted) -> impl Future<Output = ()> + Send + 'static {
        let callers = Arc::clone(&self.front.parts.callers);
        let (admitted, shutdown) = (admitted.clone(), self.front.shutdown.clone());
        let every = self.front.options.recheck.min(RECHECK);
        async move {
            loop {
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = tokio::time::sleep(every) => {}
                }
                if let Err(error) = callers.recheck(&admitted) {
                    tracing::info!(%error, principal = admitted.caller.full_name(), "a session was ended");
                    return;
                }
            }
        }
    }
}

/// What of a host's answer stays between it and Core.
fn strip_answer(headers: &mut HeaderMap, upgraded: bool) {
    strip(headers, |name| {
        let text = name.as_str();
        let connection = *name == header::CONNECTION || *name == header::UPGRADE;
        (connection && !upgraded)
            || text.starts_with("ghost-")
            || *name == header::TRANSFER_ENCODING
            || *name == header::SET_COOKIE
            || text == "keep-alive"
            || text == "x-request-id"
    });
}

/// Carries the bytes of a session both ways until either side ends it, or it is ended from here.
async fn join(
    ours: hyper::upgrade::OnUpgrade,
    theirs: hyper::upgrade::OnUpgrade,
    watch: impl Future<Output = ()> + Send,
) {
    let (Ok(ours), Ok(theirs)) = tokio::join!(ours, theirs) else {
        return;
    };
    let (mut ours, mut theirs) = (TokioIo::new(ours), TokioIo::new(theirs));
    tokio::select! {
        // Either side's end is told to the other by the copy itself.
        _ = tokio::io::copy_bidirectional(&mut ours, &mut theirs) => {}
        () = watch => {}
    }
}

/// An answer's body, with what has to live as long, and what ends it.
struct Held<W> {
    body: hyper::body::Incoming,
    _sender: http1::SendRequest<Body>,
    watch: Option<Pin<Box<W>>>,
}

impl<W: Future<Output = ()>> HttpBody for Held<W> {
    type Data = Bytes;
    type Error = axum::BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<Frame<Bytes>, axum::BoxError>>> {
        if let Some(watch) = &mut self.watch
            && watch.as_mut().poll(context).is_ready()
        {
            self.watch = None;
            return Poll::Ready(Some(Err("the session was ended".into())));
        }
        Pin::new(&mut self.body)
            .poll_frame(context)
            .map_err(Into::into)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_routes_are_found_by_their_patterns() {
        let found = |method: Method, path: &str| route_of(&method, path).map(|route| route.path);
        assert_eq!(found(Method::GET, "/v1/vms"), Some("/v1/vms"));
        assert_eq!(found(Method::GET, "/v1/vms/web"), Some("/v1/vms/{vm}"));
        assert_eq!(
            found(Method::HEAD, "/v1/vms/web/shell"),
            Some("/v1/vms/{vm}/shell")
        );
        for path in [
            "/v1/vms/",
            "/v1/vms//shell",
            "/v1/nothing",
            "/v1/",
            "/health",
            "/v1/vms/a/b/c",
        ] {
            assert_eq!(found(Method::GET, path), None, "{path}");
        }
        assert_eq!(found(Method::POST, "/v1/vms/web"), None);
    }

    #[test]
    fn a_pages_key_stays_at_core() {
        let mut headers = HeaderMap::new();
        headers.insert(
            header::SEC_WEBSOCKET_PROTOCOL,
            HeaderValue::from_static("ghost.v1, bearer.ghost_a_b"),
        );
        let key = take_subprotocol(&mut headers).unwrap();
        assert_eq!(key, "Bearer ghost_a_b");
        assert_eq!(headers[header::SEC_WEBSOCKET_PROTOCOL], "ghost.v1");
        assert!(take_subprotocol(&mut headers).is_none());
    }
}
