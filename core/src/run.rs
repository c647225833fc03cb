//! `ghost-core run`: bind, compose, serve, drain.
//!
//! ```text
//! lock data folder ─> bind all listeners ─> store, CA, records ─> desk ─> serve, READY
//!      SIGTERM ─> take nothing new, goodbye to all hosts (spread over time) ─> calls end ─> exit 0
//!      a second signal ─> at once; all that was acknowledged is durable
//! ```
//!
//! Listeners are bound before anything is opened, so that a taken port is told before any work is
//! done; they are served only once the records are in memory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ghost_core::application::desk::{Desk, DeskOptions};
use ghost_core::application::fleet::Fleet;
use ghost_core::domain::Replica;
use ghost_core::domain::ports::FleetAuthority;
use ghost_core::infrastructure::authority::CoreAuthority;
use ghost_core::infrastructure::listener::{self, GrpcConnection, Listener, ListenerLimits};
use ghost_core::presentation::grpc::Front;
use ghost_core::presentation::metrics::{self, MetricsParts};
use ghost_core::presentation::route::Router;
use ghost_core::presentation::{Peer, PeerKind, http as api};
use ghost_domain::ports::Clock;
use ghost_domain::{Error, ErrorCode, Result};
use ghost_infrastructure::clock::SystemClock;
use ghost_infrastructure::host;
use ghost_infrastructure::notify::{self, Notifier};
use ghost_infrastructure::process::{self, Signals};
use ghost_infrastructure::telemetry::{self, OtlpOptions, TelemetryOptions};
use ghost_presentation::http;
use ghost_presentation::metrics::Recorder;
use ghost_presentation::{LocalSocket, SOCKET_GROUP, TraceParent};
use ghost_proto::core::{NEWEST_LINK_VERSION, OLDEST_LINK_VERSION};
use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::compose;
use crate::config::{Config, Loaded};

/// Most connections of processes of this machine at once.
const MOST_LOCAL: usize = 256;
/// How long calls may take to end once Core is told to.
const GRACE: Duration = Duration::from_secs(5);
/// Files that Core has open besides connections: its store, its log, its listeners, and some to spare.
const OTHER_FILES: u64 = 512;
/// With room for fewer links than this Core does not start.
const LEAST_LINKS: u64 = 64;
/// Hosts that may come back in one second after a shutdown.
const COMING_BACK: u32 = 500;

/// Everything that is bound before work begins.
struct Bound {
    local: Option<LocalSocket>,
    grpc: Option<TcpListener>,
    http: Option<TcpListener>,
    metrics: Option<TcpListener>,
}

/// Runs Core until it is told to end.
///
/// # Errors
/// What kept it from starting, or a server that failed as a whole.
pub(crate) fn run(loaded: Loaded) -> Result<()> {
    let config = loaded.config;
    host::limit_arenas();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .thread_name("ghost-core")
        .enable_all()
        .build()
        .map_err(|cause| Error::internal("the async runtime cannot be started").because(cause))?;
    // The exporter of traces needs the runtime to be there.
    let telemetry = {
        let _entered = runtime.enter();
        telemetry::install(&telemetry_options(&config))?
    };
    match &loaded.file {
        Some(file) => tracing::info!(file = %file.display(), "configuration read"),
        None => tracing::info!("no configuration file: all defaults"),
    }
    let folder = config.core.data_dir.path();
    let hint = "make it for the user that this runs as, or set core.data_dir";
    let outcome = process::data_folder(folder, 0o700, hint)
        .and_then(|()| process::lock_folder(&folder.join("lock"), "ghost-core", "core.data_dir"))
        .and_then(|_lock| {
            let links = room_for_links(&config, process::raise_open_files(files(&config)))?;
            runtime.block_on(serve(&config, links))
        });
    if let Err(error) = &outcome {
        tracing::error!(code = %error.code(), %error, hint = error.hint_text(), "ghost-core ends");
    }
    telemetry.shutdown(Duration::from_secs(2));
    runtime.shutdown_timeout(Duration::from_secs(2));
    outcome
}

fn telemetry_options(config: &Config) -> TelemetryOptions {
    TelemetryOptions {
        filter: config.logging.level.0.clone(),
        format: config.logging.format,
        otlp: config
            .telemetry
            .otlp_endpoint
            .as_ref()
            .map(|endpoint| OtlpOptions {
                endpoint: endpoint.0.clone(),
                timeout: config.telemetry.timeout,
                sampling: config.telemetry.sampling.0,
                service: "ghost-core".into(),
                version: env!("CARGO_PKG_VERSION").into(),
                instance: compose::replica_name(config),
            }),
    }
}

/// How many files Core has open at most, by its configuration.
fn files(config: &Config) -> u64 {
    u64::from(config.grpc.max_links) + other_files(config)
}

/// The same without the links.
fn other_files(config: &Config) -> u64 {
    let local = u64::try_from(MOST_LOCAL).unwrap_or(u64::MAX);
    u64::from(config.grpc.max_connections) + local + OTHER_FILES
}

/// How many links there is room for where so many files may be open.
///
/// # Errors
/// `IoFailed` where there is room for hardly any.
fn room_for_links(config: &Config, files: u64) -> Result<u32> {
    let most = config.grpc.max_links;
    let room = files.saturating_sub(other_files(config));
    if room >= u64::from(most) {
        return Ok(most);
    }
    let needed = self::files(config);
    let hint = format!(
        "raise the limit to {needed} (LimitNOFILE= in the unit, ulimit -Hn in a shell), or lower grpc.max_links"
    );
    if room < LEAST_LINKS.min(u64::from(most)) {
        return Err(Error::new(
            ErrorCode::IoFailed,
            "Core may not open enough files to serve any hosts",
        )
        .because(format!(
            "{files} may be open at once, and {needed} are needed for grpc.max_links = {most}"
        ))
        .hint(hint));
    }
    tracing::warn!(
        links = room,
        wanted = most,
        files,
        hint,
        "fewer links than configured fit into the files that Core may open"
    );
    Ok(u32::try_from(room).unwrap_or(most))
}

async fn serve(config: &Config, most_links: u32) -> Result<()> {
    let started = Instant::now();
    let mut signals = Signals::new()?;
    let bound = bind(config).await?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let store = compose::store(config).await?;
    let authority = compose::authority(config, &clock).await?;
    let fleet = Fleet::start(Arc::clone(&store), Arc::clone(&clock)).await?;
    fleet.hold_authority(&authority.fingerprint()).await?;

    let addresses = compose::addresses(config, bound.grpc.as_ref());
    let replica = compose::replica_name(config);
    let desk = Desk::start(
        Arc::clone(&fleet),
        DeskOptions {
            replica: Replica {
                name: replica.clone(),
                address: compose::replica_address(config, &addresses),
                since: clock.now(),
            },
            version: env!("CARGO_PKG_VERSION").into(),
            protocol: (OLDEST_LINK_VERSION, NEWEST_LINK_VERSION),
            heartbeat_interval: config.link.heartbeat_interval,
            ping_interval: config.link.ping_interval,
            digest: listener::digest,
        },
    )
    .await?;

    compose::directs(config, &fleet, &desk, &authority)?;
    // Calls end with `calls`; nothing new is taken once `stop` is told.
    let (stop, calls) = (CancellationToken::new(), CancellationToken::new());
    let recorder = Recorder::new();
    let front = compose::front(
        config,
        &fleet,
        &desk,
        &authority,
        &recorder,
        addresses.clone(),
        trace_parent(),
        calls.clone(),
    )
    .await?;
    let serving = Serving {
        config,
        most_links,
        fleet: &fleet,
        desk: &desk,
        authority: &authority,
        front: &front,
        recorder: &recorder,
        addresses: &addresses,
        started,
        stop: &stop,
    };
    let connections = TaskTracker::new();
    let mut servers = serving.spawn(bound, &connections)?;
    servers.spawn(watchdog(Arc::clone(&fleet), stop.clone()));
    servers.spawn(hold_lease(
        Arc::clone(&desk),
        Arc::clone(front.router()),
        stop.clone(),
    ));
    let notifier = Notifier::from_environment();
    notifier.ready();
    host::release_startup_memory();
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        replica,
        authority = authority.fingerprint(),
        "ghost-core runs"
    );

    let failure = tokio::select! {
        name = signals.next() => {
            tracing::info!(signal = name, "shutting down; hosts and their VMs go on");
            None
        }
        Some(ended) = servers.join_next() => Some(flatten(ended)),
    };
    notifier.stopping();
    stop.cancel();
    let drained = tokio::select! {
        () = drain(&desk, &mut servers, &connections, &calls) => true,
        name = signals.next() => {
            tracing::warn!(signal = name, "second signal: ending at once");
            false
        }
    };
    fleet.stop();
    if drained && let Err(error) = store.close().await {
        tracing::warn!(%error, "the store did not close well");
    }
    tracing::info!("ghost-core has ended");
    failure.unwrap_or(Ok(()))
}

async fn drain(
    desk: &Arc<Desk>,
    servers: &mut JoinSet<Result<()>>,
    connections: &TaskTracker,
    calls: &CancellationToken,
) {
    // Calls end before the links that they go through.
    calls.cancel();
    connections.close();
    let ending = async {
        connections.wait().await;
        while servers.join_next().await.is_some() {}
    };
    if tokio::time::timeout(GRACE, ending).await.is_err() {
        tracing::warn!("connections did not end in time");
    }
    let links = u32::try_from(desk.link_count()).unwrap_or(u32::MAX);
    let spread = Duration::from_secs(1) + Duration::from_secs(1) * (links / COMING_BACK);
    desk.drain(
        "shutting_down",
        "this Core is shutting down",
        spread.min(Duration::from_secs(60)),
    )
    .await;
}

fn flatten(ended: std::result::Result<Result<()>, tokio::task::JoinError>) -> Result<()> {
    match ended {
        Ok(Ok(())) => Err(Error::internal("a server ended by itself")),
        Ok(Err(error)) => Err(error),
        Err(cause) => Err(Error::internal("a server ended abnormally").because(cause)),
    }
}

fn trace_parent() -> TraceParent {
    Arc::new(|headers, span| {
        if let Some(parent) = headers
            .get("traceparent")
            .and_then(|value| value.to_str().ok())
        {
            telemetry::set_parent(span, parent);
        }
    })
}

async fn bind(config: &Config) -> Result<Bound> {
    let local = match &config.grpc.socket.0 {
        None => None,
        Some(path) => {
            let socket = LocalSocket::bind(path, SOCKET_GROUP)?;
            tracing::info!(socket = %path.display(), "gRPC listens");
            Some(socket)
        }
    };
    Ok(Bound {
        local,
        grpc: process::bind(config.grpc.listen, "gRPC and links", "grpc.listen").await?,
        http: process::bind(config.http.listen, "HTTP", "http.listen").await?,
        metrics: process::bind(config.metrics.listen, "metrics", "metrics.listen").await?,
    })
}

/// What the listeners are served with.
struct Serving<'a> {
    config: &'a Config,
    most_links: u32,
    fleet: &'a Arc<Fleet>,
    desk: &'a Arc<Desk>,
    authority: &'a Arc<CoreAuthority>,
    front: &'a Arc<Front>,
    recorder: &'a Arc<Recorder>,
    addresses: &'a [String],
    started: Instant,
    stop: &'a CancellationToken,
}

impl Serving<'_> {
    fn spawn(&self, bound: Bound, connections: &TaskTracker) -> Result<JoinSet<Result<()>>> {
        let mut servers = JoinSet::new();
        if let Some(socket) = bound.local {
            servers.spawn(serve_socket(
                socket,
                Arc::clone(self.front),
                connections.clone(),
                self.stop.clone(),
            ));
        }
        let tls = match &bound.grpc {
            None => None,
            Some(tcp) => {
                let names = compose::server_names(self.config, self.addresses, tcp);
                Some(self.authority.server_tls(names)?)
            }
        };
        let mut counters = None;
        if let (Some(tcp), Some(tls)) = (bound.grpc, &tls) {
            let listener = self.listener(tls.config_for(&Listener::PROTOCOLS)?, connections);
            counters = Some(Arc::clone(listener.counters()));
            let stop = self.stop.clone();
            servers.spawn(async move {
                listener.run(tcp, stop).await;
                Ok(())
            });
        }
        if let Some(tcp) = bound.http {
            let listener = match (self.config.http.tls, &tls) {
                (false, _) => ghost_presentation::Listener::Plain(tcp),
                (true, Some(tls)) => ghost_presentation::Listener::Tls(tcp, tls.http_config()?),
                (true, None) => {
                    let names = compose::server_names(self.config, self.addresses, &tcp);
                    let tls = self.authority.server_tls(names)?;
                    ghost_presentation::Listener::Tls(tcp, tls.http_config()?)
                }
            };
            let router = api::router(Arc::clone(self.front));
            servers.spawn(serve_http(listener, router, self.stop.clone()));
        }
        if let Some(tcp) = bound.metrics {
            let router = metrics::router(MetricsParts {
                fleet: Arc::clone(self.fleet),
                desk: Arc::clone(self.desk),
                recorder: Arc::clone(self.recorder),
                version: env!("CARGO_PKG_VERSION").into(),
                replica: compose::replica_name(self.config),
                listener: Arc::new(move || {
                    counters.as_ref().map_or((0, 0, 0), |counters| {
                        (
                            counters.unready(),
                            counters.turned_away(),
                            counters.failed(),
                        )
                    })
                }),
                started: self.started,
            });
            let listener = ghost_presentation::Listener::Plain(tcp);
            servers.spawn(serve_http(listener, router, self.stop.clone()));
        }
        Ok(servers)
    }

    fn listener(&self, config: Arc<ServerConfig>, connections: &TaskTracker) -> Arc<Listener> {
        let (front, connections) = (Arc::clone(self.front), connections.clone());
        let count = |configured: u32| usize::try_from(configured).unwrap_or(usize::MAX);
        Listener::new(
            config,
            Arc::clone(self.authority) as _,
            Arc::clone(self.desk),
            Arc::new(move |connection: GrpcConnection| {
                let (front, tracked) = (Arc::clone(&front), connections.token());
                Box::pin(async move {
                    let peer = Peer {
                        address: Some(connection.address.ip()),
                        kind: match &connection.shown {
                            None => PeerKind::Nobody,
                            Some(shown) => PeerKind::Certified {
                                identity: shown.identity.clone(),
                                expires_at: shown.expires_at,
                            },
                        },
                    };
                    let (stream, _place) = connection.into_parts();
                    front.serve(stream, peer).await;
                    drop(tracked);
                })
            }),
            ListenerLimits {
                handshakes: count(self.config.link.handshakes),
                links: count(self.most_links),
                connections: count(self.config.grpc.max_connections),
            },
        )
    }
}

/// The local socket: root, and the group `ghost`.
async fn serve_socket(
    socket: LocalSocket,
    front: Arc<Front>,
    connections: TaskTracker,
    stop: CancellationToken,
) -> Result<()> {
    let room = Arc::new(Semaphore::new(MOST_LOCAL));
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            accepted = socket.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection of this machine");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&room).try_acquire_owned() else {
            tracing::warn!(uid = peer.uid, "too many connections of this machine");
            continue;
        };
        let peer = Peer {
            address: None,
            kind: PeerKind::Local {
                uid: peer.uid,
                name: peer.name,
                admitted: peer.role.is_some(),
            },
        };
        let front = Arc::clone(&front);
        connections.spawn(async move {
            front.serve(stream, peer).await;
            drop(place);
        });
    }
}

async fn serve_http(
    listener: ghost_presentation::Listener,
    router: axum::Router,
    stop: CancellationToken,
) -> Result<()> {
    http::serve(listener, router, http::ServerOptions::default(), stop).await;
    Ok(())
}

/// A lease that is lost ends no process: what is in memory is still told, and hosts come back.
async fn hold_lease(desk: Arc<Desk>, others: Arc<Router>, stop: CancellationToken) -> Result<()> {
    tokio::select! {
        () = stop.cancelled() => {}
        () = desk.hold_lease(others) => {}
    }
    Ok(())
}

/// Tells systemd that we are well, as long as the event loop turns.
async fn watchdog(fleet: Arc<Fleet>, stop: CancellationToken) -> Result<()> {
    let Some(interval) = notify::watchdog_interval() else {
        stop.cancelled().await;
        return Ok(());
    };
    let notifier = Notifier::from_environment();
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(interval) => {}
        }
        // A store that is away is no reason to be restarted: that would help nobody.
        if fleet.read(|state| !state.core_id().is_empty()) {
            notifier.watchdog();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_bounded_by_the_files_that_may_be_open() {
        let config = Config::default();
        let needed = files(&config);
        assert_eq!(
            room_for_links(&config, needed).unwrap(),
            config.grpc.max_links
        );
        assert_eq!(
            room_for_links(&config, u64::MAX).unwrap(),
            config.grpc.max_links
        );
        let fewer = room_for_links(&config, needed - 1000).unwrap();
        assert_eq!(fewer, config.grpc.max_links - 1000);
        let error = room_for_links(&config, 1024).unwrap_err();
        assert_eq!(error.code(), ErrorCode::IoFailed);
        assert!(
            error.hint_text().unwrap().contains("LimitNOFILE"),
            "{error}"
        );
    }

    /// A small fleet does not need room for a large one.
    #[test]
    fn a_small_fleet_runs_with_few_files() {
        let mut config = Config::default();
        config.grpc.max_links = 20;
        config.grpc.max_connections = 20;
        assert_eq!(room_for_links(&config, 1024).unwrap(), 20);
    }
}
