//! The gRPC shell: the local socket and mTLS, one set of services behind both.
//!
//! The path of a call: [`crate::connection`] accepts, shakes hands and learns who is there; the
//! guard authenticates, authorises by the table of [`access`], measures; a service decodes, calls
//! its use case and encodes. Errors become statuses in [`status`] and nowhere else.

pub mod access;
pub(crate) mod guard;
mod services;
pub mod status;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use ghost_application::UseCases;
use ghost_domain::{Error, Result};
use ghost_proto::agent::v1::{
    access_service_server::AccessServiceServer, event_service_server::EventServiceServer,
    guest_service_server::GuestServiceServer, host_service_server::HostServiceServer,
    image_service_server::ImageServiceServer, network_service_server::NetworkServiceServer,
    operation_service_server::OperationServiceServer, vm_service_server::VmServiceServer,
};
use prost::Message;
use prost_types::FileDescriptorSet;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic_health::pb::health_server::HealthServer;

use crate::TraceParent;
use crate::connection::{self, CertificateReader, Connection, ConnectionLimits, Listener};
use crate::convert::AgentInfo;
use crate::metrics::Recorder;
use guard::{GuardLayer, Watch};
pub use guard::{code_name, foreign};

/// Most bytes of one message that is taken. An upload comes in pieces of 1 MiB.
pub const MOST_MESSAGE: usize = 4 * 1024 * 1024;
/// Most streams (calls) at once on one connection.
const MOST_STREAMS: u32 = 128;
/// Most bytes of one call that a connection takes ahead of the service that reads them.
const STREAM_WINDOW: u32 = 256 * 1024;
/// So many calls may stand still with a full window before the others on their connection do: with
/// hyper's default, where both windows have one size, one is enough.
const CONNECTION_WINDOWS: u32 = 64;
/// Most bytes of a call's headers.
const MOST_HEADERS: u32 = 16 * 1024;

/// What the composition root decides.
#[derive(Clone)]
pub struct Options {
    /// Shown in the host's status.
    pub agent: AgentInfo,
    /// Reads client certificates; without it nobody is anybody over TLS.
    pub certificates: Option<CertificateReader>,
    /// Ties a call's span to the caller's trace.
    pub trace: Option<TraceParent>,
    /// Bounds of connections, for each listener.
    pub connections: ConnectionLimits,
    /// How long a unary call may take.
    pub timeout: Duration,
    /// Whether members of the socket's group, who are operators, may enter guests. Root and the
    /// agent's own user always may.
    pub group_guest_access: bool,
    /// Most unary calls at once over all connections.
    pub most_calls: usize,
    /// How often the identity behind a stream is looked at again: how late a revocation counts.
    pub recheck: Duration,
    /// How long connections may take to end after a shutdown before they are cut.
    pub grace: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            agent: AgentInfo::default(),
            certificates: None,
            trace: None,
            connections: ConnectionLimits::default(),
            timeout: Duration::from_secs(30),
            group_guest_access: true,
            most_calls: 1024,
            recheck: Duration::from_secs(15),
            grace: Duration::from_secs(3),
        }
    }
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("agent", &self.agent)
            .field("connections", &self.connections)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

/// Serves until `shutdown` is cancelled, then ends calls and streams: those that do not end within
/// the grace are cut. Refusing new changes while the agent drains is the application's part; this
/// is called off after that.
///
/// # Errors
/// `Internal` when the server cannot be put together or fails as a whole.
pub async fn serve(
    listeners: Vec<Listener>,
    use_cases: Arc<UseCases>,
    recorder: Arc<Recorder>,
    options: Options,
    shutdown: CancellationToken,
) -> Result<()> {
    let watch = Arc::new(Watch {
        use_cases: Arc::clone(&use_cases),
        recorder,
        trace: options.trace,
        timeout: options.timeout,
        group_guest_access: options.group_guest_access,
        unary_room: Arc::new(Semaphore::new(options.most_calls)),
        recheck: options.recheck,
        shutdown: shutdown.clone(),
    });

    let cut = CancellationToken::new();
    let (sender, receiver) = mpsc::channel::<Connection>(16);
    for listener in listeners {
        let (sender, cut) = (sender.clone(), cut.clone());
        let patience = options.connections.handshake;
        let serve = move |mut connection: Connection| {
            let (sender, cut) = (sender.clone(), cut.clone());
            async move {
                connection.cut_by(cut);
                if let Err(error) = connection.expect_http2(patience).await {
                    tracing::info!(address = ?connection.address(), %error, "a connection was refused");
                    return;
                }
                // Fails only when the server is gone: then so is the connection.
                drop(sender.send(connection).await);
            }
        };
        tokio::spawn(connection::accept(
            listener,
            options.connections.clone(),
            options.certificates.clone(),
            shutdown.clone(),
            serve,
        ));
    }

    let health = services::Health {
        use_cases: Arc::clone(&use_cases),
        known: SERVICES,
        shutdown: shutdown.clone(),
    };
    let routes = routes(&use_cases, &options.agent, health)?;
    let mut serving = Box::pin(
        Server::builder()
            .max_concurrent_streams(MOST_STREAMS)
            .http2_max_header_list_size(MOST_HEADERS)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(STREAM_WINDOW * CONNECTION_WINDOWS)
            .max_frame_size(ghost_proto::agent::MOST_FRAME)
            // A peer that is gone without a word is noticed within half a minute.
            .http2_keepalive_interval(Some(Duration::from_secs(20)))
            .http2_keepalive_timeout(Some(Duration::from_secs(10)))
            // Against streams that are opened and reset at once (CVE-2023-44487).
            .http2_max_pending_accept_reset_streams(Some(32))
            .http2_max_local_error_reset_streams(Some(256))
            .layer(GuardLayer(watch))
            .serve_with_incoming_shutdown(
                routes,
                ReceiverStream::new(receiver).map(Ok::<_, Infallible>),
                shutdown.clone().cancelled_owned(),
            ),
    );
    let failed = |cause| Error::internal("the gRPC server failed").because(cause);
    tokio::select! {
        ended = &mut serving => return ended.map_err(failed),
        () = shutdown.cancelled() => {}
    }
    if let Ok(ended) = tokio::time::timeout(options.grace, &mut serving).await {
        return ended.map_err(failed);
    }
    cut.cancel();
    match tokio::time::timeout(Duration::from_secs(1), serving).await {
        Ok(ended) => ended.map_err(failed),
        Err(_) => Ok(()),
    }
}

/// The names that health is told for; the empty one stands for the whole server.
const SERVICES: &[&str] = &[
    "",
    "ghost.agent.v1.VmService",
    "ghost.agent.v1.ImageService",
    "ghost.agent.v1.OperationService",
    "ghost.agent.v1.HostService",
    "ghost.agent.v1.NetworkService",
    "ghost.agent.v1.EventService",
    "ghost.agent.v1.AccessService",
    "ghost.agent.v1.GuestService",
];

fn routes(
    use_cases: &Arc<UseCases>,
    agent: &AgentInfo,
    health: services::Health,
) -> Result<Routes> {
    let shared = || Arc::clone(use_cases);
    let unusable =
        |cause| Error::internal("reflection cannot describe the services").because(cause);
    // Core's services stand in the same set, and are not served here.
    let mut own = FileDescriptorSet::decode(ghost_proto::DESCRIPTORS).map_err(|cause| {
        Error::internal("the descriptors of the services cannot be read").because(cause)
    })?;
    own.file.retain(|file| file.package() != "ghost.core.v1");
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_file_descriptor_set(own.clone())
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    Ok(Routes::new(
        VmServiceServer::new(services::Vms(shared())).max_decoding_message_size(MOST_MESSAGE),
    )
    .add_service(
        ImageServiceServer::new(services::Images(shared())).max_decoding_message_size(MOST_MESSAGE),
    )
    .add_service(OperationServiceServer::new(services::Operations(shared())))
    .add_service(HostServiceServer::new(services::Host(
        shared(),
        agent.clone(),
    )))
    .add_service(NetworkServiceServer::new(services::Networks(shared())))
    .add_service(EventServiceServer::new(services::Events(shared())))
    .add_service(AccessServiceServer::new(services::Access(shared())))
    .add_service(
        GuestServiceServer::new(services::Guests(shared())).max_decoding_message_size(MOST_MESSAGE),
    )
    .add_service(HealthServer::new(health))
    .add_service(reflection().build_v1().map_err(unusable)?)
    .add_service(reflection().build_v1alpha().map_err(unusable)?))
}
