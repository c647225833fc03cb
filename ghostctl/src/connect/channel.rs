//! Opens the connection and says clearly why it could not be.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, UnixStream};
use tonic::transport::{Channel, Endpoint as TonicEndpoint, Uri};
use tower::service_fn;

use super::endpoint::Endpoint;
use super::tls;
use crate::errors::{ErrorCode, Failure};

const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// Why a connection could not be made; carried through tonic's error chain.
#[derive(Debug)]
enum Fault {
    Unix(io::Error),
    Resolve(io::Error),
    Tcp(io::Error),
    Tls(io::Error),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(error) | Self::Resolve(error) | Self::Tcp(error) | Self::Tls(error) => {
                error.fmt(f)
            }
        }
    }
}

impl StdError for Fault {}

/// Connects to `endpoint`. Later calls on the channel connect again where the connection was lost.
pub(super) async fn open(
    endpoint: &Endpoint,
    setup: Option<tls::Setup>,
    faults: &tls::Faults,
    context: Option<&str>,
) -> Result<Channel, Failure> {
    // The authority of the requests; tonic wants a URI, the connectors below know the real place.
    let builder = TonicEndpoint::from_static("http://ghost-agent")
        .connect_timeout(CONNECT_DEADLINE)
        .tcp_nodelay(true)
        .max_frame_size(ghost_proto::agent::MOST_FRAME)
        // So that a wait notices a host that vanished without a word.
        .http2_keep_alive_interval(Duration::from_secs(15))
        .keep_alive_timeout(Duration::from_secs(15));
    let connected = match (endpoint, setup) {
        (Endpoint::Unix(path), _) => {
            let path = path.clone();
            builder
                .connect_with_connector(service_fn(move |_: Uri| unix(path.clone())))
                .await
        }
        (Endpoint::Tls { host, port }, Some(setup)) => {
            let (host, port, faults) = (host.clone(), *port, faults.clone());
            builder
                .connect_with_connector(service_fn(move |_: Uri| {
                    encrypted(host.clone(), port, setup.clone(), faults.clone())
                }))
                .await
        }
        (Endpoint::Tls { host, port } | Endpoint::Plain { host, port }, _) => {
            let (host, port) = (host.clone(), *port);
            builder
                .connect_with_connector(service_fn(move |_: Uri| plain(host.clone(), port)))
                .await
        }
    };
    connected.map_err(|error| failure(&error, endpoint, context))
}

async fn unix(path: PathBuf) -> Result<TokioIo<UnixStream>, Fault> {
    UnixStream::connect(path)
        .await
        .map(TokioIo::new)
        .map_err(Fault::Unix)
}

async fn tcp(host: &str, port: u16) -> Result<TcpStream, Fault> {
    let addresses: Vec<_> = tokio::net::lookup_host((host, port))
        .await
        .map_err(Fault::Resolve)?
        .collect();
    let stream = TcpStream::connect(addresses.as_slice())
        .await
        .map_err(Fault::Tcp)?;
    // A console sends single key strokes; Nagle's algorithm would hold them back.
    stream.set_nodelay(true).map_err(Fault::Tcp)?;
    Ok(stream)
}

async fn plain(host: String, port: u16) -> Result<TokioIo<TcpStream>, Fault> {
    tcp(&host, port).await.map(TokioIo::new)
}

async fn encrypted(
    host: String,
    port: u16,
    setup: tls::Setup,
    faults: tls::Faults,
) -> Result<TokioIo<tls::Watched>, Fault> {
    let stream = tcp(&host, port).await?;
    setup
        .handshake(&host, stream, faults)
        .await
        .map(TokioIo::new)
        .map_err(Fault::Tls)
}

/// The innermost error of a type in a chain.
fn find<'a, T: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

fn failure(error: &tonic::transport::Error, endpoint: &Endpoint, context: Option<&str>) -> Failure {
    let failure = match find::<Fault>(error) {
        Some(Fault::Unix(error)) => match endpoint {
            Endpoint::Unix(path) => unix_failure(path, error),
            Endpoint::Tls { .. } | Endpoint::Plain { .. } => unreachable_at(endpoint, error),
        },
        Some(Fault::Resolve(error)) => unreachable_at(endpoint, error)
            .hint("check the host's name, or use its address"),
        Some(Fault::Tcp(error)) => unreachable_at(endpoint, error).hint(format!(
            "on that host: systemctl status ghost-agent, and is its grpc.listen reachable at {endpoint}?"
        )),
        Some(Fault::Tls(error)) => match tls::alert_of(error) {
            Some(fault) => tls::failure(fault, endpoint, context),
            None => unreachable_at(endpoint, error)
                .hint("is that the agent's gRPC port, and not its HTTP port?"),
        },
        None => unreachable_at(endpoint, &crate::errors::root_cause(error)),
    };
    failure.transport()
}

fn unreachable_at(endpoint: &Endpoint, cause: &dyn fmt::Display) -> Failure {
    Failure::new(
        ErrorCode::AgentUnreachable,
        format!("the agent at {endpoint} cannot be reached"),
    )
    .because(cause)
}

fn unix_failure(path: &Path, error: &io::Error) -> Failure {
    let shown = path.display();
    let unreachable = |cause: &str| {
        Failure::new(
            ErrorCode::AgentUnreachable,
            format!("no agent listens at {shown}"),
        )
        .because(cause)
        .hint("systemctl start ghost-agent, or name another agent with --endpoint or --context")
    };
    match error.kind() {
        io::ErrorKind::NotFound => unreachable("the socket does not exist"),
        io::ErrorKind::ConnectionRefused => unreachable("the socket is there, but nobody listens"),
        io::ErrorKind::PermissionDenied => Failure::new(
            ErrorCode::PermissionDenied,
            format!("you may not use the agent's socket {shown}"),
        )
        .because("it is open to root and the group ghost")
        .hint("sudo usermod -aG ghost $USER, and log in again"),
        _ => unreachable(&error.to_string()),
    }
}
