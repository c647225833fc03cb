//! A call for a host: which one, whether its caller and its owner allow it, where its link is, and
//! for VMs that are made or grow, whether there is room.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::http::{HeaderMap, HeaderValue, Request, Response};
use bytes::Bytes;
use ghost_domain::fleet::CorePermissions;
use ghost_domain::{ByteSize, Demand, Error, ErrorCode, Result, Role, TenantName, Timestamp};
use ghost_presentation::grpc::access::Method;
use ghost_presentation::{Access, CoreReach, Shape};
use ghost_proto::agent::v1 as agent;
use ghost_proto::core::metadata;
use prost::Message;
use tonic::body::Body;
use tonic::{Code, Status};

use super::notes::Note;
use crate::application::fleet::Fleet;
use crate::application::links::HostLinks;
use crate::application::quota_check::{Admission, Admitted, Reserved, Wanted};
use crate::domain::{Caller, HostLife, HostRecord, Labels};
use crate::presentation::route::whole::{collect, whole};
use crate::presentation::route::{Onward, Router, Target};

const CREATE: &str = "/ghost.agent.v1.VmService/Create";
const UPDATE: &str = "/ghost.agent.v1.VmService/Update";

/// Calls to hosts.
pub(in crate::presentation) struct Routed {
    pub(in crate::presentation) fleet: Arc<Fleet>,
    pub(in crate::presentation) links: Arc<dyn HostLinks>,
    pub(super) router: Arc<Router>,
    pub(in crate::presentation) admission: Arc<Admission>,
    /// This replica's name.
    pub(super) replica: String,
}

/// A value of a caller's metadata that may stand once at most.
fn one<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a str>> {
    let mut values = headers.get_all(name).iter();
    let wrong = |why: &str| {
        Error::new(
            ErrorCode::InvalidArgument,
            format!("the metadata {name} {why}"),
        )
    };
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => value
            .to_str()
            .map(|text| Some(text.trim()).filter(|text| !text.is_empty()))
            .map_err(|_| wrong("is not ASCII text")),
        (Some(_), Some(_)) => Err(wrong("stands twice")),
    }
}

/// `key=value,key=value`
pub(in crate::presentation) fn labels(text: &str) -> Result<Labels> {
    text.split(',')
        .map(|pair| {
            let (key, value) = pair.split_once('=').ok_or_else(|| {
                Error::new(
                    ErrorCode::InvalidArgument,
                    format!("the metadata {} cannot be read", metadata::LABELS),
                )
                .because("key=value,key=value is expected")
            })?;
            crate::domain::check_label(key.trim(), value.trim())?;
            Ok((key.trim().to_owned(), value.trim().to_owned()))
        })
        .collect()
}

impl Routed {
    pub(super) async fn call(
        &self,
        caller: &Caller,
        method: &Method,
        request: Request<Body>,
        request_id: &str,
        note: &Note,
        forwarded: bool,
    ) -> Result<Response<Body>> {
        let selector = one(request.headers(), metadata::HOST)?.map(str::to_owned);
        let Some(selector) = selector else {
            if method.path == CREATE {
                check_role(caller, method.access, method.core)?;
                return self.place(caller, method, request, request_id, note).await;
            }
            return Err(Error::new(
                ErrorCode::HostRequired,
                "this call goes to a host, and none was named",
            )
            .hint("name one: --host HOST, or the metadata ghost-host; see ghostctl host list"));
        };
        let host = self
            .fleet
            .read(|state| state.find_host(caller, &selector).cloned())?;
        note.host(host.id, &host.tenant);
        check_role(caller, method.access, method.core)?;
        check_host(&host, method.access, method.core)?;
        if forwarded {
            // Admitted by the replica that the caller spoke to.
            return self
                .forward(caller, &host, method, request, request_id, true)
                .await;
        }
        match method.path {
            CREATE => {
                let (parts, message) = read::<agent::CreateVmRequest>(request).await?;
                note.subject(&message.1.name);
                let reserved = if message.1.dry_run {
                    None
                } else {
                    let demand = demand_of(&message.1);
                    let reserved =
                        self.admission
                            .on_host(caller, host.id, &message.1.name, demand)?;
                    self.admission.hold(caller, Some(reserved)).await?
                };
                let request = Request::from_parts(parts, whole(message.0));
                let answer = self
                    .forward(caller, &host, method, request, request_id, false)
                    .await?;
                settle(answer, reserved).await.map(|(answer, _)| answer)
            }
            UPDATE => {
                let (parts, message) = read::<agent::UpdateVmRequest>(request).await?;
                note.subject(&message.1.vm);
                let more = self.growth(&host, &message.1);
                let reserved = self.admission.growth(caller, host.id, more)?;
                let reserved = self.admission.hold(caller, reserved).await?;
                let request = Request::from_parts(parts, whole(message.0));
                let answer = self
                    .forward(caller, &host, method, request, request_id, false)
                    .await?;
                match reserved {
                    None => Ok(answer),
                    Some(reserved) => settle(answer, Some(reserved))
                        .await
                        .map(|(answer, _)| answer),
                }
            }
            _ => {
                self.forward(caller, &host, method, request, request_id, false)
                    .await
            }
        }
    }

    /// A VM that Core finds a host for.
    async fn place(
        &self,
        caller: &Caller,
        method: &Method,
        request: Request<Body>,
        request_id: &str,
        note: &Note,
    ) -> Result<Response<Body>> {
        let tenant = match (&caller.tenant, one(request.headers(), metadata::TENANT)?) {
            (Some(own), None) => own.clone(),
            (Some(own), Some(named)) if own.as_str() == named => own.clone(),
            (_, Some(named)) => TenantName::new(named)?,
            (None, None) => TenantName::new(TenantName::DEFAULT)?,
        };
        let labels = one(request.headers(), metadata::LABELS)?
            .map(labels)
            .transpose()?
            .unwrap_or_default();
        let (parts, (bytes, create)) = read::<agent::CreateVmRequest>(request).await?;
        note.subject(&create.name);
        let wanted = Wanted {
            tenant,
            name: create.name.clone(),
            demand: demand_of(&create),
            labels,
            request_id: Some(create.request_id.clone()).filter(|id| !id.is_empty()),
        };
        let admitted = self.admission.anywhere(caller, &wanted)?;
        let Admitted {
            host,
            placed,
            reserved,
        } = self.admission.send(caller, &wanted, admitted).await?;
        let host = self.fleet.read(|state| state.require_host(host).cloned())?;
        note.host(host.id, &host.tenant);
        let reserved = match self.admission.hold(caller, reserved).await {
            Ok(reserved) => reserved,
            Err(error) => {
                if let Some(id) = &wanted.request_id {
                    self.admission.forget(caller, id).await;
                }
                return Err(error);
            }
        };
        note.detail(&format!("placed on {}: {}", host.name, placed.reason));
        let request = Request::from_parts(parts, whole(bytes));
        let sent = AtomicBool::new(false);
        let answer = self
            .carried(
                caller,
                &host,
                method,
                request,
                request_id,
                false,
                &sent,
                wanted.request_id.is_some(),
            )
            .await;
        let settled = match answer {
            Ok(answer) => settle(answer, reserved).await,
            Err(error) => Err(error),
        };
        // Where it certainly made nothing the next attempt may go elsewhere. Where that is not
        // certain it goes to the same host again, which knows the request if it took it.
        let nothing = match &settled {
            Ok((_, refused)) => refused.is_some_and(is_certain),
            Err(_) => !sent.load(Ordering::Relaxed),
        };
        if let (Some(id), true) = (&wanted.request_id, nothing) {
            self.admission.forget(caller, id).await;
        }
        let (mut answer, _) = settled?;
        let shown = match &caller.tenant {
            Some(_) => host.name.to_string(),
            None => format!("{}/{}", host.tenant, host.name),
        };
        for (name, value) in [
            (metadata::HOST, shown),
            (metadata::PLACEMENT, placed.reason),
        ] {
            let value: String = value
                .chars()
                .map(|one| {
                    if one.is_ascii_graphic() || one == ' ' {
                        one
                    } else {
                        '?'
                    }
                })
                .collect();
            if let Ok(value) = HeaderValue::from_str(&value) {
                answer.headers_mut().insert(name, value);
            }
        }
        Ok(answer)
    }

    async fn forward(
        &self,
        caller: &Caller,
        host: &HostRecord,
        method: &Method,
        request: Request<Body>,
        request_id: &str,
        forwarded: bool,
    ) -> Result<Response<Body>> {
        let sent = AtomicBool::new(false);
        self.carried(
            caller, host, method, request, request_id, forwarded, &sent, false,
        )
        .await
    }

    /// Notes in `sent` whether the host may have taken the call, however it ended.
    #[expect(clippy::too_many_arguments, reason = "the parts of one call")]
    async fn carried(
        &self,
        caller: &Caller,
        host: &HostRecord,
        method: &Method,
        request: Request<Body>,
        request_id: &str,
        forwarded: bool,
        sent: &AtomicBool,
        repeatable: bool,
    ) -> Result<Response<Body>> {
        let onward = Onward {
            target: self.target(host, forwarded)?,
            host: host.id,
            host_name: host.name.as_str(),
            caller,
            request_id,
            shape: method.shape,
            sent,
            repeatable: repeatable || is_a_look(method),
        };
        tracing::Span::current().record("host", host.name.as_str());
        self.router
            .forward(&onward, request)
            .await
            .map_err(|error| self.unreached(host, method.path, &onward.target, error))
    }

    /// Where the host's link is.
    pub(in crate::presentation) fn target(
        &self,
        host: &HostRecord,
        forwarded: bool,
    ) -> Result<Target> {
        if self.links.has(host.id) {
            return Ok(Target::Host(host.id));
        }
        let elsewhere = self.fleet.read(|state| {
            let owner = state.owner(host.id)?;
            let replica = state.replica(&owner.replica)?;
            (replica.name != self.replica).then(|| Target::Replica {
                name: replica.name.clone(),
                address: replica.address.clone(),
            })
        });
        match elsewhere {
            // It was sent here because the link was here a moment ago.
            Some(Target::Replica { name, .. }) if forwarded => Err(Error::new(
                ErrorCode::HostOffline,
                format!("the host {} is between two replicas", host.name),
            )
            .because(format!("its link just went over to {name}"))
            .retry_after(Duration::from_secs(1))),
            Some(target) => Ok(target),
            // Another carrier may still reach it.
            None => Ok(Target::Host(host.id)),
        }
    }

    /// The error of a call that did not get to its host, by the way that it went.
    pub(in crate::presentation) fn unreached(
        &self,
        host: &HostRecord,
        path: &str,
        target: &Target,
        error: Error,
    ) -> Error {
        match (error.code(), target) {
            (ErrorCode::HostOffline | ErrorCode::CoreUnreachable, Target::Replica { name, .. }) => {
                unheard(host, name, &error)
            }
            (ErrorCode::HostOffline | ErrorCode::CoreUnreachable, _) => {
                self.offline(host, path, error)
            }
            _ => error,
        }
    }

    /// What is said of a host that cannot be reached: since when, and what can be done.
    fn offline(&self, host: &HostRecord, path: &str, cause: Error) -> Error {
        let heard = self
            .fleet
            .host_view(host.id)
            .and_then(|view| view.last_heard_at);
        let now = self.fleet.clock().now();
        let since = match heard {
            Some(at) => format!("it was last heard {} ago", age(at, now)),
            None => "it enrolled and has not come yet".to_owned(),
        };
        let queueable = [
            "Create", "Start", "Stop", "Restart", "Pause", "Resume", "Delete", "Update",
        ]
        .iter()
        .any(|verb| path == format!("/ghost.agent.v1.VmService/{verb}"));
        let show = format!("ghostctl host show {}", host.name);
        let hint = if queueable {
            format!("say --queue to have it done when the host is back; see {show}")
        } else {
            format!("see when it comes back: {show}")
        };
        // That it has no link is what this says already.
        let known = cause
            .cause()
            .is_some_and(|why| why.starts_with("it was last heard") || why == "it has never come");
        let why = if known {
            since
        } else {
            format!("{since}; {cause}")
        };
        Error::new(
            ErrorCode::HostOffline,
            format!("the host {} cannot be reached", host.name),
        )
        .because(why)
        .hint(hint)
        .retry_after(cause.retry_delay().unwrap_or(Duration::from_secs(5)))
    }

    /// What an update asks for beyond what the VM has; nothing where the VM is not known here.
    fn growth(&self, host: &HostRecord, update: &agent::UpdateVmRequest) -> Demand {
        let Some(inventory) = self.fleet.inventory(host.id) else {
            return Demand::default();
        };
        let mut found = inventory.vms.values().filter(|vm| {
            vm.name == update.vm
                || (!update.vm.is_empty()
                    && vm
                        .id
                        .to_string()
                        .starts_with(&update.vm.to_ascii_lowercase()))
        });
        let Some(vm) = found.next() else {
            return Demand::default();
        };
        Demand {
            cpus: update
                .vcpus
                .unwrap_or_default()
                .saturating_sub(vm.demand.cpus),
            memory: ByteSize::from_bytes(update.memory_bytes.unwrap_or_default())
                .saturating_sub(vm.demand.memory),
            disk: ByteSize::default(),
        }
    }
}

/// What is said of a host whose link another replica has, which does not answer here: the host itself
/// may be well.
fn unheard(host: &HostRecord, replica: &str, cause: &Error) -> Error {
    Error::new(
        ErrorCode::HostOffline,
        format!("the host {} cannot be reached from here", host.name),
    )
    .because(format!("its link is at the replica {replica}: {cause}"))
    // Of a call that was under way its own hint is worth more.
    .hint(cause.hint_text().unwrap_or(
        "ask that replica itself, at its own address, or again in a moment; ghostctl status tells which run",
    ))
    .retry_after(cause.retry_delay().unwrap_or(Duration::from_secs(5)))
}

/// How long ago something was, for people.
fn age(at: Timestamp, now: Timestamp) -> String {
    let seconds = now.since(at).as_secs();
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// Whether the caller's role is enough, and the call one that is made through Core at all.
pub(super) fn check_role(caller: &Caller, access: Access, reach: CoreReach) -> Result<()> {
    // First: a role that would not help is not to be asked for.
    if reach == CoreReach::Never {
        return Err(Error::new(
            ErrorCode::CorePermissionDenied,
            "only the host's owner does this, on the host itself",
        )
        .because("credentials, lockdown, uploads and the audit log of a host are never Core's")
        .hint("the same on that host, without --host"));
    }
    match access {
        Access::Anyone => Ok(()),
        Access::Guests => caller.require(Role::Operator),
        Access::Role(role) => caller.require(role),
    }
}

/// Whether the host may be used, and its owner lets Core do this. The agent checks the same again.
pub(super) fn check_host(host: &HostRecord, access: Access, reach: CoreReach) -> Result<()> {
    match &host.life {
        HostLife::Active => {}
        HostLife::Locked { reason, .. } => {
            return Err(Error::new(
                ErrorCode::HostLocked,
                format!("the host {} is locked", host.name),
            )
            .because(reason)
            .hint(format!(
                "find out which machine is the right one, then: ghostctl host unlock {}",
                host.name
            )));
        }
        HostLife::Revoked { .. } => {
            return Err(Error::new(
                ErrorCode::HostLocked,
                format!("the host {} was revoked", host.name),
            ));
        }
    }
    let needed = match (reach, access) {
        (CoreReach::Enter, _) | (_, Access::Guests) => CorePermissions::OperateAndEnter,
        (_, Access::Anyone | Access::Role(Role::Viewer)) => CorePermissions::Read,
        (_, Access::Role(_)) => CorePermissions::Operate,
    };
    if host.permissions >= needed {
        return Ok(());
    }
    Err(Error::new(
        ErrorCode::CorePermissionDenied,
        format!("the owner of {} does not let Core do this", host.name),
    )
    .because(format!(
        "core.permissions of its agent is {}, and this needs {needed}",
        host.permissions
    )))
}

/// Whether a call only looks, and ends with its answer.
const fn is_a_look(method: &Method) -> bool {
    matches!(method.access, Access::Role(Role::Viewer)) && matches!(method.shape, Shape::Unary)
}

fn demand_of(create: &agent::CreateVmRequest) -> Demand {
    Demand {
        cpus: create.vcpus,
        memory: ByteSize::from_bytes(create.memory_bytes),
        disk: ByteSize::from_bytes(create.disk_bytes),
    }
}

/// The message of a gRPC frame.
fn message<M: Message + Default>(framed: &[u8]) -> Result<M> {
    let unreadable = |why: String| {
        Error::new(ErrorCode::InvalidArgument, "the message cannot be read").because(why)
    };
    let (head, body) = framed
        .split_first_chunk::<5>()
        .ok_or_else(|| unreadable("it is cut off".to_owned()))?;
    let [compressed, length @ ..] = *head;
    if compressed != 0 {
        return Err(unreadable(
            "it is compressed, and neither Core nor hosts take that".to_owned(),
        ));
    }
    if u32::from_be_bytes(length) as usize != body.len() {
        return Err(unreadable("it is not one message".to_owned()));
    }
    M::decode(body).map_err(|cause| unreadable(cause.to_string()))
}

type Read<M> = (axum::http::request::Parts, (Bytes, M));

async fn read<M: Message + Default>(request: Request<Body>) -> Result<Read<M>> {
    let (parts, body) = request.into_parts();
    let (bytes, _) = collect(body).await?;
    let decoded = message(&bytes)?;
    Ok((parts, (bytes, decoded)))
}

/// Waits for the end of a call that makes or changes a VM, so that room which was held for nothing
/// is given back. Says too how the host refused it, if it did.
async fn settle(
    answer: Response<Body>,
    reserved: Option<Reserved>,
) -> Result<(Response<Body>, Option<Code>)> {
    let (parts, body) = answer.into_parts();
    let (bytes, trailers) = collect(body).await?;
    let status = trailers
        .as_ref()
        .and_then(Status::from_header_map)
        .or_else(|| Status::from_header_map(&parts.headers));
    let code = status.map_or(Code::Unknown, |status| status.code());
    let refused = Some(code).filter(|code| *code != Code::Ok);
    if let (None, Some(reserved)) = (refused, reserved) {
        let operation: Option<agent::Operation> = message(&bytes).ok();
        reserved.keep(operation.map(|one| one.vm).filter(|vm| !vm.is_empty()));
    }
    let body = Body::new(Settled {
        bytes: Some(bytes).filter(|bytes| !bytes.is_empty()),
        trailers,
    });
    Ok((Response::from_parts(parts, body), refused))
}

/// Whether a host that refuses a create so has begun nothing: the others may also come of a call that
/// was cut off on its way, by Core or by another replica.
const fn is_certain(code: Code) -> bool {
    !matches!(
        code,
        Code::Ok
            | Code::Cancelled
            | Code::Unknown
            | Code::DeadlineExceeded
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss
            | Code::Aborted
    )
}

/// A body of which all is known.
struct Settled {
    bytes: Option<Bytes>,
    trailers: Option<HeaderMap>,
}

impl http_body::Body for Settled {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<http_body::Frame<Bytes>, Self::Error>>> {
        let next = match self.bytes.take() {
            Some(bytes) => Some(http_body::Frame::data(bytes)),
            None => self.trailers.take().map(http_body::Frame::trailers),
        };
        std::task::Poll::Ready(next.map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        self.bytes.is_none() && self.trailers.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_short() {
        let at = Timestamp::from_unix_millis(0);
        let later = |seconds: i64| age(at, Timestamp::from_unix_millis(seconds * 1000));
        assert_eq!(later(119), "119 s");
        assert_eq!(later(720), "12 min");
        assert_eq!(later(7200), "2 h");
        assert_eq!(later(900_000), "10 days");
    }

    #[test]
    fn only_one_whole_message_is_read() {
        let body = agent::GetVmRequest { vm: "web".into() }.encode_to_vec();
        let framed = |flag: u8, length: u32, body: &[u8]| {
            let mut bytes = vec![flag];
            bytes.extend(length.to_be_bytes());
            bytes.extend(body);
            bytes
        };
        let length = u32::try_from(body.len()).unwrap();
        let read = |bytes: &[u8]| message::<agent::GetVmRequest>(bytes);
        assert_eq!(read(&framed(0, length, &body)).unwrap().vm, "web");
        assert!(read(&framed(1, length, &body)).is_err());
        assert!(read(&framed(0, length + 1, &body)).is_err());
        assert!(read(&framed(0, length - 1, &body)).is_err());
        assert!(read(&[0, 0, 0]).is_err());
        assert!(read(b"").is_err());
    }

    #[test]
    fn labels_are_read_strictly() {
        assert_eq!(labels("a=b, c=d").unwrap().len(), 2);
        for bad in ["", "a", "a=b,,", "=b", "a b=c"] {
            assert!(labels(bad).is_err(), "{bad:?}");
        }
    }
}
