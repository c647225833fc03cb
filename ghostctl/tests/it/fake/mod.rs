//! An agent that does as its names say:
//!
//! - `web-1`, `db-1`, … exist and obey; `absent…` do not exist;
//! - `code.CODE` is answered with that error at once;
//! - `fail.CODE` is accepted, and its operation fails with that code;
//! - `slow…` is accepted, and its operation runs until it is cancelled;
//! - `shaky…` is accepted, and the first watch of its operation breaks off;
//! - for waits: `booting`, `stuck`, `broken`, `vanishing`.

mod access;
mod fleet;
pub(crate) mod guest;
mod host;
mod images;
mod operations;
mod vms;

use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use ghost_proto::agent::v1 as message;
use ghost_proto::agent::v1::{
    access_service_server::AccessServiceServer, event_service_server::EventServiceServer,
    guest_service_server::GuestServiceServer, host_service_server::HostServiceServer,
    image_service_server::ImageServiceServer, network_service_server::NetworkServiceServer,
    operation_service_server::OperationServiceServer, vm_service_server::VmServiceServer,
};
use ghost_proto::core::v1::fleet_service_server::FleetServiceServer;
use prost_types::Timestamp;
use tempfile::TempDir;
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Runtime;
use tokio::sync::{oneshot, watch};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::transport::server::Router;
use tonic::transport::{Server, ServerTlsConfig};
use tonic::{Code, Request, Status};
use tonic_types::{ErrorDetails, StatusExt};

pub(crate) use access::Authority;

/// What the fake remembers, for tests to look at, and what it is told.
pub(crate) struct State {
    /// Every request with its `traceparent`, as `Debug` shows it.
    pub(crate) requests: Mutex<Vec<(String, Option<String>)>>,
    /// VMs that `List` returns.
    pub(crate) vms: Mutex<Vec<message::Vm>>,
    /// Operations by id: what they are about, and how often they were watched.
    operations: Mutex<BTreeMap<String, operations::Known>>,
    cancelled: watch::Sender<Vec<String>>,
    /// The CA by which `Enroll` and `Renew` sign.
    pub(crate) authority: Authority,
    /// Begin and end of certificates to come, as seconds from now.
    pub(crate) lifetime: Mutex<(i64, i64)>,
    /// Bytes that `Import` received.
    pub(crate) imported: Mutex<Vec<u8>>,
    /// The inside of all VMs.
    pub(crate) guest: guest::Memory,
    /// Whether it stands for Ghost Core rather than for one host.
    pub(crate) is_core: std::sync::atomic::AtomicBool,
}

#[derive(Clone)]
pub(crate) struct Fake(pub(crate) Arc<State>);

/// A fake that listens; it ends with its value.
pub(crate) struct FakeAgent {
    pub(crate) state: Arc<State>,
    folder: TempDir,
    tcp: Option<std::net::SocketAddr>,
    runtime: Option<Runtime>,
    stop: Option<oneshot::Sender<()>>,
}

impl FakeAgent {
    /// On a Unix socket.
    pub(crate) fn start() -> Self {
        Self::serve(Authority::new("ghost test CA"), None)
    }

    /// On TCP with TLS; `leaf` says whose server certificate it shows.
    pub(crate) fn start_tls(authority: Authority) -> Self {
        let tls = authority.server_tls();
        Self::serve(authority, Some(tls))
    }

    fn serve(authority: Authority, tls: Option<ServerTlsConfig>) -> Self {
        let state = Arc::new(State {
            requests: Mutex::default(),
            vms: Mutex::new(vec![
                vms::vm("web-1"),
                vms::vm("db-1"),
                vms::unknown("old-1"),
            ]),
            operations: Mutex::default(),
            cancelled: watch::Sender::new(Vec::new()),
            authority,
            lifetime: Mutex::new((-60, 86_400)),
            imported: Mutex::default(),
            guest: guest::Memory::new(),
            is_core: std::sync::atomic::AtomicBool::new(false),
        });
        let mut agent = Self {
            state,
            folder: tempfile::tempdir().unwrap(),
            tcp: None,
            runtime: None,
            stop: None,
        };
        agent.listen(tls);
        agent
    }

    fn listen(&mut self, tls: Option<ServerTlsConfig>) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let stopped = async {
            let _ = stopped.await;
        };
        let router = router(&self.state, tls.clone());
        self.tcp = runtime.block_on(async {
            if tls.is_some() {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                let address = listener.local_addr().unwrap();
                let serving =
                    router.serve_with_incoming_shutdown(TcpListenerStream::new(listener), stopped);
                tokio::spawn(async move { drop(serving.await) });
                Some(address)
            } else {
                let listener = UnixListener::bind(self.socket()).unwrap();
                let serving =
                    router.serve_with_incoming_shutdown(UnixListenerStream::new(listener), stopped);
                tokio::spawn(async move { drop(serving.await) });
                None
            }
        });
        self.runtime = Some(runtime);
        self.stop = Some(stop);
    }

    fn cut_off(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_millis(200));
        }
    }

    /// Ends in the middle of everything, and comes back at the same socket with what it knew.
    pub(crate) fn restart(&mut self) {
        self.cut_off();
        let _ = std::fs::remove_file(self.socket());
        self.listen(None);
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("agent.sock")
    }

    pub(crate) fn endpoint(&self) -> String {
        match self.tcp {
            Some(address) => format!("https://localhost:{}", address.port()),
            None => format!("unix:{}", self.socket().display()),
        }
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The requests so far, without their traces.
    pub(crate) fn requests(&self) -> Vec<String> {
        let requests = self.state.requests.lock().unwrap();
        requests
            .iter()
            .map(|(request, _)| request.clone())
            .collect()
    }
}

impl Drop for FakeAgent {
    fn drop(&mut self) {
        self.cut_off();
    }
}

fn router(state: &Arc<State>, tls: Option<ServerTlsConfig>) -> Router {
    let fake = Fake(Arc::clone(state));
    let mut server = Server::builder();
    if let Some(tls) = tls {
        server = server.tls_config(tls).unwrap();
    }
    server
        .add_service(VmServiceServer::new(fake.clone()))
        .add_service(ImageServiceServer::new(fake.clone()))
        .add_service(OperationServiceServer::new(fake.clone()))
        .add_service(HostServiceServer::new(fake.clone()))
        .add_service(NetworkServiceServer::new(fake.clone()))
        .add_service(EventServiceServer::new(fake.clone()))
        .add_service(GuestServiceServer::new(fake.clone()))
        .add_service(FleetServiceServer::new(fake.clone()))
        .add_service(AccessServiceServer::new(fake))
}

impl Fake {
    /// Remembers a request and hands its message out.
    fn note<T: std::fmt::Debug>(&self, request: Request<T>) -> T {
        let parent = request
            .metadata()
            .get("traceparent")
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned);
        let message = request.into_inner();
        let mut requests = self.0.requests.lock().unwrap();
        requests.push((format!("{message:?}"), parent));
        message
    }
}

/// An error as the agent sends it.
pub(crate) fn error(reason: &str, text: &str, cause: &str, hint: &str) -> Status {
    let details = ErrorDetails::with_error_info(
        reason,
        "ghost",
        [
            ("cause".to_owned(), cause.to_owned()),
            ("hint".to_owned(), hint.to_owned()),
        ],
    );
    Status::with_error_details(Code::FailedPrecondition, text, details)
}

/// What a name says about a request at once.
pub(crate) fn refuse(name: &str) -> Result<(), Status> {
    if let Some(code) = name.strip_prefix("code.") {
        return Err(error(
            code,
            &format!("refused with {code}"),
            "the test said so",
            "",
        ));
    }
    if name.starts_with("absent") {
        return Err(error(
            "vm_not_found",
            &format!("there is no VM {name}"),
            "",
            "ghostctl vm list",
        ));
    }
    Ok(())
}

/// A stable id of a thing.
pub(crate) fn id_of(kind: &str, name: &str) -> String {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for byte in kind.bytes().chain(name.bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    format!("00000000-0000-4000-8000-{:012x}", hash & 0xffff_ffff_ffff)
}

/// So many seconds from now.
pub(crate) fn moment(seconds: i64) -> Option<Timestamp> {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap();
    Some(Timestamp {
        seconds: i64::try_from(now.as_secs()).unwrap() + seconds,
        nanos: 0,
    })
}

pub(crate) fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

/// A stream that a task fills.
pub(crate) type Stream<T> =
    std::pin::Pin<Box<dyn futures::Stream<Item = Result<T, Status>> + Send>>;

pub(crate) fn stream<T: Send + 'static, F>(
    fill: impl FnOnce(tokio::sync::mpsc::Sender<Result<T, Status>>) -> F,
) -> Stream<T>
where
    F: Future<Output = ()> + Send + 'static,
{
    let (sender, receiver) = tokio::sync::mpsc::channel(16);
    tokio::spawn(fill(sender));
    Box::pin(tokio_stream::wrappers::ReceiverStream::new(receiver))
}
