//! Calls that come through Ghost Core, over streams as its link opens them; and the same words on
//! every other connection, where nobody believes them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use ghost_application::fleet::CoreReach;
use ghost_domain::fleet::{CarrierState, CorePermissions, FleetIdentity, LinkState};
use ghost_domain::ports::{CoreLink, CoreLinkHandler};
use ghost_domain::{ErrorCode, HostId, HostName, Role, TenantName, Timestamp};
use ghost_presentation::grpc::access::METHODS;
use ghost_presentation::http::routes::ROUTES;
use ghost_presentation::metrics::Recorder;
use ghost_presentation::{Access, Listener, LocalSocket, core_listeners, grpc, http};
use ghost_proto::agent::v1::access_service_client::AccessServiceClient;
use ghost_proto::agent::v1::event_service_client::EventServiceClient;
use ghost_proto::agent::v1::host_service_client::HostServiceClient;
use ghost_proto::agent::v1::vm_service_client::VmServiceClient;
use ghost_proto::agent::v1::{
    AllowCoreDeletesRequest, CreateVmRequest, GetCoreLinkRequest, GetVmRequest,
    ReconnectCoreRequest, WatchEventsRequest, WhoAmIRequest,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::Request;
use tonic::transport::{Channel, Endpoint};

use crate::grpc::reason;
use crate::grpc::roles::call_with;
use crate::world::World;

const PERMISSIONS: [CorePermissions; 4] = [
    CorePermissions::Off,
    CorePermissions::Read,
    CorePermissions::Operate,
    CorePermissions::OperateAndEnter,
];
const ROLES: [Role; 3] = [Role::Viewer, Role::Operator, Role::Admin];

/// An agent with a link, a local socket and an HTTP listener.
struct Linked {
    world: World,
    streams: mpsc::Sender<DuplexStream>,
    socket: std::path::PathBuf,
    http: std::net::SocketAddr,
    shutdown: CancellationToken,
    _folder: tempfile::TempDir,
}

impl Drop for Linked {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

impl Linked {
    async fn with(permissions: CorePermissions) -> Self {
        let world = World::letting(permissions).await;
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("agent.sock");
        let shutdown = CancellationToken::new();
        let (streams, receiver) = mpsc::channel(8);
        let (to_grpc, to_http) = core_listeners(receiver);
        let local = Listener::Local(LocalSocket::bind(&socket, "no-such-group").unwrap());
        let options = grpc::Options {
            recheck: Duration::from_millis(20),
            ..grpc::Options::default()
        };
        tokio::spawn(grpc::serve(
            vec![local, to_grpc],
            world.use_cases(),
            Recorder::new(),
            options,
            shutdown.clone(),
        ));
        let router = http::router(
            world.use_cases(),
            Recorder::new(),
            http::Options::default(),
            shutdown.clone(),
        );
        let plain = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let http = plain.local_addr().unwrap();
        for listener in [Listener::Plain(plain), to_http] {
            tokio::spawn(http::serve(
                listener,
                router.clone(),
                http::ServerOptions::default(),
                shutdown.clone(),
            ));
        }
        Self {
            world,
            streams,
            socket,
            http,
            shutdown,
            _folder: folder,
        }
    }

    /// A stream that Core opens.
    async fn stream(&self) -> DuplexStream {
        let (near, far) = tokio::io::duplex(64 * 1024);
        self.streams.send(far).await.unwrap();
        near
    }

    /// gRPC on streams of the link.
    async fn core(&self) -> Channel {
        let streams = self.streams.clone();
        Endpoint::from_static("http://core")
            .connect_with_connector(tower::service_fn(move |_| {
                let streams = streams.clone();
                async move {
                    let (near, far) = tokio::io::duplex(64 * 1024);
                    streams.send(far).await.map_err(std::io::Error::other)?;
                    Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(near))
                }
            }))
            .await
            .unwrap()
    }

    async fn local(&self) -> Channel {
        let path = self.socket.clone();
        Endpoint::from_static("http://local")
            .connect_with_connector(tower::service_fn(move |_| {
                let path = path.clone();
                async move {
                    let stream = UnixStream::connect(path).await?;
                    Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
                }
            }))
            .await
            .unwrap()
    }
}

/// Whether a call is let in, and with which code it is not.
fn expected(
    permissions: CorePermissions,
    said: Role,
    access: Access,
    reach: CoreReach,
) -> Option<ErrorCode> {
    if access == Access::Anyone && reach != CoreReach::Never {
        return None;
    }
    let needs = match access {
        Access::Anyone => Role::Viewer,
        Access::Role(role) => role,
        Access::Guests => Role::Operator,
    };
    let most = permissions.most_role();
    if most.is_none() || reach == CoreReach::Never {
        return Some(ErrorCode::CorePermissionDenied);
    }
    if said < needs {
        return Some(ErrorCode::PermissionDenied);
    }
    let enters = permissions == CorePermissions::OperateAndEnter;
    if most < Some(needs) || (reach == CoreReach::Enter && !enters) {
        return Some(ErrorCode::CorePermissionDenied);
    }
    None
}

fn is_refusal(code: &str) -> bool {
    matches!(
        code,
        "unauthenticated" | "permission_denied" | "core_permission_denied"
    )
}

#[tokio::test]
async fn every_rpc_against_a_principal_of_core_with_each_permission() {
    let mut refused = 0;
    for permissions in PERMISSIONS {
        let linked = Linked::with(permissions).await;
        let channel = linked.core().await;
        for said in ROLES {
            let metadata = [
                ("ghost-principal", "acme/alice"),
                ("ghost-role", said.as_str()),
                ("ghost-tenant", "acme"),
            ];
            for method in METHODS {
                let outcome = call_with(&channel, method.path, Bytes::new(), &metadata).await;
                let code = outcome.as_ref().err().map(reason);
                let what = format!("{said} of Core calls {} at {permissions}", method.path);
                match expected(permissions, said, method.access, method.core) {
                    Some(wanted) => {
                        assert_eq!(code.as_deref(), Some(wanted.as_str()), "{what}");
                        refused += 1;
                        if wanted == ErrorCode::CorePermissionDenied {
                            let status = format!("{:?}", outcome.unwrap_err());
                            assert!(status.contains("core.permissions"), "{what}: {status}");
                        }
                    }
                    None => assert!(
                        !code.as_deref().is_some_and(is_refusal),
                        "{what}: {outcome:?}"
                    ),
                }
            }
        }
    }
    assert!(refused > 300, "only {refused} refusals");
}

/// One HTTP/1.1 exchange, read to the end of the connection.
async fn exchange<S>(mut io: S, head: &str) -> (u16, String)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let request = format!("{head}\r\nHost: agent\r\nConnection: close\r\n\r\n");
    io.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let reading = async {
        let mut piece = [0; 4096];
        // Streams have no end: the head of their answer is enough.
        loop {
            let read = io.read(&mut piece).await.unwrap_or(0);
            answer.extend_from_slice(&piece[..read]);
            let text = String::from_utf8_lossy(&answer);
            let streams = text.contains("text/event-stream") || text.contains("chunked");
            if read == 0 || (streams && text.contains("\r\n\r\n")) {
                break;
            }
        }
    };
    let read = tokio::time::timeout(Duration::from_secs(20), reading).await;
    assert!(read.is_ok(), "no answer to {head}");
    let text = String::from_utf8_lossy(&answer).into_owned();
    let status = text
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .unwrap_or_else(|| panic!("no status: {text:?}"));
    (status, text)
}

fn said_by_core(method: &str, path: &str, role: &str) -> String {
    let path = path
        .replace("{vm}", "web")
        .replace("{name}", "tiny")
        .replace("{id}", "0");
    format!(
        "{method} {path} HTTP/1.1\r\nghost-principal: acme/alice\r\nghost-role: {role}\r\n\
         ghost-tenant: acme\r\nContent-Length: 0"
    )
}

/// Our own code, in a problem document or in the details of a Connect error.
fn code_of(answer: &str) -> &str {
    answer
        .split_once("\"reason\":\"")
        .or_else(|| answer.split_once("\"code\":\""))
        .and_then(|(_, rest)| rest.split('"').next())
        .unwrap_or_default()
}

#[tokio::test]
async fn every_route_against_a_principal_of_core_with_each_permission() {
    for permissions in PERMISSIONS {
        let linked = Linked::with(permissions).await;
        for said in ROLES {
            for route in ROUTES {
                let head = said_by_core(route.method, route.path, said.as_str());
                let (status, answer) = exchange(linked.stream().await, &head).await;
                let what = format!(
                    "{said} of Core: {} {} at {permissions}",
                    route.method, route.path
                );
                match expected(permissions, said, route.access, route.core) {
                    Some(code) => {
                        assert_eq!(status, 403, "{what}: {answer}");
                        assert_eq!(code_of(&answer), code.as_str(), "{what}: {answer}");
                    }
                    None => assert!(status != 401 && status != 403, "{what}: {answer}"),
                }
            }
        }
    }
}

#[tokio::test]
async fn what_core_says_is_believed_nowhere_else() {
    let linked = Linked::with(CorePermissions::OperateAndEnter).await;
    // On the local socket the caller stays who the kernel says.
    let mut request = Request::new(WhoAmIRequest {});
    for (name, value) in [
        ("ghost-principal", "acme/mallory"),
        ("ghost-role", "viewer"),
        ("ghost-tenant", "acme"),
    ] {
        request.metadata_mut().insert(name, value.parse().unwrap());
    }
    let local = linked.local().await;
    let me = AccessServiceClient::new(local).who_am_i(request).await;
    let me = me.unwrap().into_inner();
    assert!(!me.name.contains("mallory"), "{me:?}");
    assert_eq!(me.role, "admin");
    // On HTTP a key is needed, and the words change nothing about it.
    let head = said_by_core("GET", "/v1/vms", "admin");
    let stream = TcpStream::connect(linked.http).await.unwrap();
    let (status, answer) = exchange(stream, &head).await;
    assert_eq!((status, code_of(&answer)), (401, "unauthenticated"));
    let key = linked.world.key(Role::Viewer).await;
    let head = format!(
        "{}\r\nX-API-Key: {key}",
        said_by_core("DELETE", "/v1/vms/{vm}", "admin")
    );
    let stream = TcpStream::connect(linked.http).await.unwrap();
    let (status, answer) = exchange(stream, &head).await;
    assert_eq!((status, code_of(&answer)), (403, "permission_denied"));
}

#[tokio::test]
async fn core_must_say_who_calls_and_a_key_is_none_of_its_words() {
    let linked = Linked::with(CorePermissions::OperateAndEnter).await;
    let channel = linked.core().await;
    let path = "/ghost.agent.v1.VmService/List";
    for metadata in [
        &[][..],
        &[("ghost-principal", "acme/alice")],
        &[("ghost-role", "admin")],
        &[("ghost-principal", "acme/alice"), ("ghost-role", "king")],
        &[
            ("ghost-principal", "acme/alice"),
            ("ghost-role", "viewer"),
            ("ghost-tenant", "../acme"),
        ],
    ] {
        let status = call_with(&channel, path, Bytes::new(), metadata)
            .await
            .unwrap_err();
        assert_eq!(reason(&status), "unauthenticated", "{metadata:?}");
    }
    let unknown = "/ghost.agent.v1.VmService/Explode";
    let status = call_with(&channel, unknown, Bytes::new(), &[])
        .await
        .unwrap_err();
    assert_eq!(reason(&status), "unauthenticated");
    let key = linked.world.key(Role::Admin).await;
    let head = format!("GET /v1/vms HTTP/1.1\r\nX-API-Key: {key}");
    let (status, answer) = exchange(linked.stream().await, &head).await;
    assert_eq!((status, code_of(&answer)), (401, "unauthenticated"));
    // Health needs no caller on either.
    let (status, _) = exchange(linked.stream().await, "GET /live HTTP/1.1").await;
    assert_eq!(status, 200);
    let health = "/grpc.health.v1.Health/Check";
    call_with(&channel, health, Bytes::new(), &[])
        .await
        .unwrap();
}

fn as_alice<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request
        .metadata_mut()
        .insert("ghost-principal", "acme/alice".parse().unwrap());
    request
        .metadata_mut()
        .insert("ghost-role", "operator".parse().unwrap());
    request
}

#[tokio::test]
async fn calls_and_streams_run_over_one_stream_of_the_link() {
    let linked = Linked::with(CorePermissions::Operate).await;
    let channel = linked.core().await;
    let mut vms = VmServiceClient::new(channel.clone());
    let get = |vm: &str| as_alice(GetVmRequest { vm: vm.to_owned() });
    let mine = vms.get(get("web")).await.unwrap().into_inner();
    assert_eq!((mine.name.as_str(), mine.owner.as_str()), ("web", ""));
    let mut events = EventServiceClient::new(channel.clone())
        .watch(as_alice(WatchEventsRequest {
            follow: true,
            ..WatchEventsRequest::default()
        }))
        .await
        .unwrap()
        .into_inner();
    let create = CreateVmRequest {
        name: "theirs".into(),
        image: "tiny".into(),
        memory_bytes: 256 << 20,
        disk_bytes: 1 << 30,
        vcpus: 1,
        ..CreateVmRequest::default()
    };
    let operation = vms.create(as_alice(create)).await.unwrap().into_inner();
    assert_eq!(operation.requested_by, "acme/alice");
    let theirs = vms.get(get("theirs")).await.unwrap().into_inner();
    assert_eq!(theirs.owner, "acme/alice");
    let event = tokio::time::timeout(Duration::from_secs(10), events.message());
    let event = event.await.unwrap().unwrap().unwrap();
    assert_eq!(event.kind, "operation");
    // The end of the agent ends the streams of the link too.
    linked.shutdown.cancel();
    let ended = tokio::time::timeout(Duration::from_secs(10), async {
        while let Ok(Some(_)) = events.message().await {}
    });
    ended.await.unwrap();
}

#[tokio::test]
async fn streams_that_say_nothing_or_garbage_end_and_hold_up_nobody() {
    let linked = Linked::with(CorePermissions::Operate).await;
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(linked.stream().await);
    }
    let mut garbage = linked.stream().await;
    garbage
        .write_all(b"PRI * nonsense, no HTTP at all\r\n\r\n")
        .await
        .unwrap();
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(20), garbage.read_to_end(&mut rest));
    drop(ended.await.expect("garbage was not hung up on"));
    let channel = linked.core().await;
    let get = as_alice(GetVmRequest { vm: "web".into() });
    VmServiceClient::new(channel).get(get).await.unwrap();
}

/// A link that is up, and counts who hurries it.
struct FakeLink {
    state: Mutex<LinkState>,
    reconnects: AtomicUsize,
}

impl CoreLink for FakeLink {
    fn identity(&self) -> Option<FleetIdentity> {
        Some(FleetIdentity {
            host: HostId::from_uuid(uuid::Uuid::nil()),
            name: HostName::new("pc-at-home").unwrap(),
            tenant: TenantName::new("acme").unwrap(),
            trust_domain: "fleet.example".into(),
            addresses: vec!["core.example:7443".into()],
            authority_fingerprint: "ab".repeat(32),
            issued_at: Timestamp::from_unix_millis(0),
            expires_at: Timestamp::from_unix_millis(4_000_000_000_000),
            generation: 3,
        })
    }

    fn state(&self) -> LinkState {
        self.state.lock().unwrap().clone()
    }

    fn carriers(&self) -> Vec<CarrierState> {
        vec![CarrierState {
            name: "piko",
            state: "waiting",
            reason: "refused\u{1b}[2J".into(),
            peer: "pc at piko.example".into(),
        }]
    }

    fn reconnect(&self) {
        self.reconnects.fetch_add(1, Ordering::Relaxed);
    }
}

#[tokio::test]
async fn the_link_is_shown_hurried_and_measured() {
    let linked = Linked::with(CorePermissions::Read).await;
    let mut host = HostServiceClient::new(linked.local().await);
    let shown = host.get_core_link(GetCoreLinkRequest {}).await.unwrap();
    let shown = shown.into_inner();
    assert!(!shown.enrolled && shown.state == "off" && shown.permissions == "read");
    let early = host.reconnect_core(ReconnectCoreRequest {}).await;
    assert_eq!(reason(&early.unwrap_err()), "not_enrolled");

    let link = Arc::new(FakeLink {
        state: Mutex::new(LinkState::Up {
            carrier: "link".into(),
            replica: "core-1".into(),
            round_trip: Duration::from_millis(25),
        }),
        reconnects: AtomicUsize::new(0),
    });
    let fleet = linked.world.app.fleet();
    fleet.attach(link.clone());
    fleet.link_changed(link.state());
    fleet.heartbeat_ended(true);
    let shown = host.get_core_link(GetCoreLinkRequest {}).await.unwrap();
    let shown = shown.into_inner();
    assert_eq!(
        (shown.state.as_str(), shown.replica.as_str()),
        ("up", "core-1")
    );
    assert_eq!(
        (shown.host_name.as_str(), shown.tenant.as_str()),
        ("pc-at-home", "acme")
    );
    assert_eq!(shown.round_trip.unwrap().nanos, 25_000_000);
    assert!(shown.since.is_some() && shown.certificate_expires_at.is_some());
    let piko = &shown.carriers[0];
    assert_eq!(
        (piko.name.as_str(), piko.state.as_str(), piko.peer.as_str()),
        ("piko", "waiting", "pc at piko.example")
    );
    assert!(!piko.reason.contains('\u{1b}'), "{}", piko.reason);
    host.reconnect_core(ReconnectCoreRequest {}).await.unwrap();
    assert_eq!(link.reconnects.load(Ordering::Relaxed), 1);

    let scraped = ghost_presentation::metrics::router(
        linked.world.use_cases(),
        Recorder::new(),
        Default::default(),
    );
    let request = axum::http::Request::get("/metrics")
        .body(axum::body::Body::empty())
        .unwrap();
    let response = tower::ServiceExt::oneshot(scraped, request).await.unwrap();
    let body = axum::body::to_bytes(response.into_body(), 1 << 24)
        .await
        .unwrap();
    let text = String::from_utf8(body.to_vec()).unwrap();
    for line in [
        "ghost_core_link_up 1",
        "ghost_core_link_round_trip_seconds 0.025",
        "ghost_core_heartbeats_total{outcome=\"answered\"} 1",
        "ghost_core_heartbeats_total{outcome=\"lost\"} 0",
        "ghost_core_commands_total{status=\"accepted\"} 0",
    ] {
        assert!(text.lines().any(|one| one == line), "{line} is missing");
    }
    assert!(text.contains("\nghost_core_certificate_expiry_seconds "));

    // What is wrong is told with its remedy.
    *link.state.lock().unwrap() = LinkState::Waiting {
        reason: "no route to host".into(),
        retry_in: Duration::from_secs(8),
    };
    let status = host
        .get_status(ghost_proto::agent::v1::GetStatusRequest {})
        .await
        .unwrap()
        .into_inner();
    let core = status.core.unwrap();
    assert_eq!(
        (core.state.as_str(), core.reason.as_str()),
        ("waiting", "no route to host")
    );
    assert_eq!(core.retry_in.unwrap().seconds, 8);
    assert!(
        status
            .warnings
            .iter()
            .any(|one| one.contains("no route to host")),
        "{:?}",
        status.warnings
    );

    // Consent is the owner's, on the host.
    let ten_minutes = AllowCoreDeletesRequest {
        duration: Some(prost_types::Duration {
            seconds: 600,
            nanos: 0,
        }),
    };
    let given = host.allow_core_deletes(ten_minutes).await.unwrap();
    assert!(given.into_inner().until.is_some());
    let shown = host.get_core_link(GetCoreLinkRequest {}).await.unwrap();
    assert!(shown.into_inner().deletes_allowed_until.is_some());
    let through_core = HostServiceClient::new(linked.core().await)
        .allow_core_deletes(as_alice(ten_minutes))
        .await;
    assert_eq!(reason(&through_core.unwrap_err()), "core_permission_denied");
    let none = AllowCoreDeletesRequest::default();
    let taken_back = host.allow_core_deletes(none).await.unwrap();
    assert!(taken_back.into_inner().until.is_none());
}
