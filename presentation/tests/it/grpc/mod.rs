//! gRPC through real sockets.

mod calls;
mod guest;
mod hostile;
pub(crate) mod roles;
mod tls;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ghost_presentation::grpc::{Options, serve};
use ghost_presentation::metrics::Recorder;
use ghost_presentation::{Listener, LocalSocket};
use tokio::net::{TcpListener, UnixStream};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic_types::StatusExt;

use crate::world::World;
use tls::TestCa;

/// A served agent.
struct Served {
    world: World,
    ca: TestCa,
    address: SocketAddr,
    socket: PathBuf,
    shutdown: CancellationToken,
    server: Option<JoinHandle<ghost_domain::Result<()>>>,
    _folder: tempfile::TempDir,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

impl Served {
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut Options)) -> Self {
        Self::of(World::new().await, change).await
    }

    /// With a running VM.
    async fn running() -> Self {
        Self::of(World::running().await, |_| {}).await
    }

    async fn of(world: World, change: impl FnOnce(&mut Options)) -> Self {
        let ca = TestCa::new();
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("agent.sock");
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = tcp.local_addr().unwrap();
        let listeners = vec![
            Listener::Local(LocalSocket::bind(&socket, "no-such-group").unwrap()),
            Listener::Tls(tcp, ca.server()),
        ];
        let mut options = Options {
            certificates: Some(ca.reader()),
            recheck: Duration::from_millis(20),
            grace: Duration::from_millis(500),
            ..Options::default()
        };
        options.connections.handshake = Duration::from_millis(500);
        options.agent.name = "test-agent".into();
        change(&mut options);
        let shutdown = CancellationToken::new();
        let serving = serve(
            listeners,
            world.use_cases(),
            Recorder::new(),
            options,
            shutdown.clone(),
        );
        Self {
            world,
            ca,
            address,
            socket,
            shutdown,
            server: Some(tokio::spawn(serving)),
            _folder: folder,
        }
    }

    /// Over mTLS.
    async fn remote(&self, identity: Option<Identity>) -> Channel {
        let mut tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&self.ca.pem))
            .domain_name("localhost");
        if let Some(identity) = identity {
            tls = tls.identity(identity);
        }
        Endpoint::from_shared(format!("https://{}", self.address))
            .unwrap()
            .tls_config(tls)
            .unwrap()
            .connect()
            .await
            .unwrap()
    }

    /// Over the local socket.
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

/// The stable code of a status.
pub(crate) fn reason(status: &tonic::Status) -> String {
    status
        .get_details_error_info()
        .map_or_else(|| format!("no details: {status:?}"), |info| info.reason)
}

/// Waits for a condition.
async fn until(what: &str, condition: impl Fn() -> bool) {
    let waited = tokio::time::timeout(Duration::from_secs(20), async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(waited.await.is_ok(), "{what}");
}
