//! `ghost-agent run`: bind, compose, serve, drain.
//!
//! ```text
//! lock data folder ─> bind all listeners ─> open adapters ─> start application ─> serve, READY
//!      SIGTERM ─> refuse new work, finish short steps, checkpoint long ones (30 s) ─> end calls ─> exit 0
//!      a second signal ─> at once; the journal stands
//! ```
//!
//! Listeners are bound before anything is opened, so that a taken port is told before any work is
//! done; they are served only once the application runs.

use std::fs::File;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ghost_application::UseCases;
use ghost_domain::ports::CoreLink;
use ghost_domain::{Error, Result};
use ghost_infrastructure::core_link::CoreLinkService;
use ghost_infrastructure::host;
use ghost_infrastructure::identity::{ServerNames, ServerTls, parse_client_identity};
use ghost_infrastructure::notify::{self, Notifier};
use ghost_infrastructure::process::{self, Signals};
use ghost_infrastructure::telemetry::{self, OtlpOptions, TelemetryOptions};
use ghost_presentation::convert::AgentInfo;
use ghost_presentation::metrics::Recorder;
use ghost_presentation::{
    ConnectionLimits, CoreDoor, Listener, LocalSocket, PeerCertificate, SOCKET_GROUP, TraceParent,
    core_listeners, grpc, http, metrics,
};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::compose::{self, Adapters};
use crate::config::{Config, Loaded};
use crate::doctor;
use crate::fleet;

/// Few cores are ours, and what blocks has threads of its own.
const WORKERS: usize = 2;
/// How long operations may take to come to a point where they can be left.
const DRAIN: Duration = Duration::from_secs(20);

/// How long the guests' channels may take to be let go; they do so side by side.
const GUESTS: Duration = Duration::from_secs(1);

/// Everything that is bound before work begins.
struct Bound {
    local: Option<LocalSocket>,
    grpc: Option<TcpListener>,
    http: Option<TcpListener>,
    metrics: Option<TcpListener>,
}

/// Runs the agent until it is told to end.
///
/// # Errors
/// What kept it from starting, or a server that failed as a whole.
pub(crate) fn run(loaded: Loaded) -> Result<()> {
    let config = loaded.config;
    host::limit_arenas();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .thread_name("ghost")
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
    let outcome = doctor::before_start(&config)
        .and_then(|()| lock(&config))
        .and_then(|_lock| runtime.block_on(serve(config)));
    if let Err(error) = &outcome {
        tracing::error!(code = %error.code(), %error, hint = error.hint_text(), "ghost-agent ends");
    }
    telemetry.shutdown(Duration::from_secs(2));
    // What still blocks (a hung libvirt call) must not hold us.
    runtime.shutdown_timeout(Duration::from_secs(2));
    outcome
}

fn telemetry_options(config: &Config) -> TelemetryOptions {
    let name = agent_name(config);
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
                service: "ghost-agent".into(),
                version: env!("CARGO_PKG_VERSION").into(),
                instance: name,
            }),
    }
}

/// The configured name, or the host's.
fn agent_name(config: &Config) -> String {
    config
        .agent
        .name
        .as_ref()
        .map_or_else(process::hostname, |name| name.0.clone())
}

fn lock(config: &Config) -> Result<File> {
    let folder = config.agent.data_dir.path();
    compose::prepare_data_dir(folder)?;
    let file = folder.join(compose::LOCK_FILE);
    process::lock_folder(&file, "ghost-agent", "agent.data_dir")
}

async fn serve(config: Config) -> Result<()> {
    let config = Arc::new(config);
    let mut signals = Signals::new()?;
    let bound = bind(&config).await?;
    let opening = Arc::clone(&config);
    let adapters: Adapters = tokio::task::spawn_blocking(move || compose::adapters(&opening))
        .await
        .map_err(|cause| {
            Error::internal("opening the adapters ended abnormally").because(cause)
        })??;
    let composition = adapters.start(&config).await?;
    let use_cases = composition.application.use_cases();

    let names = ServerNames {
        configured: config.grpc.server_names.0.clone(),
        hostname: process::hostname(),
        listen: bound
            .grpc
            .iter()
            .filter_map(|listener| listener.local_addr().ok())
            .map(|address| address.ip())
            .collect(),
    };
    let tls = ServerTls::new(Arc::clone(&composition.authority), names)?;
    let recorder = Recorder::new();
    let stop = CancellationToken::new();
    let mut servers = JoinSet::new();
    let grpc_address = bound
        .grpc
        .as_ref()
        .filter(|_| config.grpc.tls)
        .and_then(|listener| listener.local_addr().ok());
    let link = open_link(&config, &composition, grpc_address).await;
    let piko = fleet::piko(&config)?.map(Arc::new);
    if let (Some(link), Some(piko)) = (&link, &piko) {
        link.show_piko(Arc::clone(piko));
    }
    let core = link.as_ref().and_then(|link| link.incoming());
    let door = link.as_ref().map(fleet::door);
    spawn_servers(
        &mut servers,
        &config,
        bound,
        core.map(core_listeners),
        door,
        &use_cases,
        &recorder,
        &tls,
        &stop,
    )?;
    if let Some(link) = link {
        let (data_dir, stop) = (config.agent.data_dir.path().to_owned(), stop.clone());
        servers.spawn(async move {
            fleet::run_link(link, data_dir, stop).await;
            Ok(())
        });
    }
    if let (Some(piko), Some(target)) = (piko, grpc_address) {
        let stop = stop.clone();
        servers.spawn(async move {
            fleet::run_piko(piko, of_this_host(target), stop).await;
            Ok(())
        });
    }
    let notifier = Notifier::from_environment();
    servers.spawn(watchdog(
        Notifier::from_environment(),
        Arc::clone(&use_cases),
        stop.clone(),
    ));
    notifier.ready();
    host::release_startup_memory();
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "ghost-agent runs");

    let failure = tokio::select! {
        name = signals.next() => {
            tracing::info!(signal = name, "shutting down; VMs go on");
            None
        }
        Some(ended) = servers.join_next() => Some(flatten(ended)),
    };
    notifier.stopping();
    let drained = tokio::select! {
        drained = composition.application.drain(DRAIN) => drained,
        name = signals.next() => {
            tracing::warn!(signal = name, "second signal: ending at once; the next start takes operations up");
            return Ok(());
        }
    };
    stop.cancel();
    let ending = async { while servers.join_next().await.is_some() {} };
    if tokio::time::timeout(Duration::from_secs(5), ending)
        .await
        .is_err()
    {
        tracing::warn!("connections did not end in time");
    }
    composition.guests.let_go(GUESTS).await;
    tracing::info!("ghost-agent has ended");
    match failure {
        Some(Err(error)) => Err(error),
        Some(Ok(())) | None => drained,
    }
}

/// Opens the link to Core and makes it known to those who ask about it.
async fn open_link(
    config: &Arc<Config>,
    composition: &compose::Composition,
    grpc_address: Option<SocketAddr>,
) -> Option<Arc<CoreLinkService>> {
    let handler = composition.application.fleet();
    let (config, clock) = (Arc::clone(config), Arc::clone(&composition.clock));
    // Others cannot reach what listens on loopback.
    let port = grpc_address
        .filter(|address| !address.ip().is_loopback())
        .map(|address| address.port());
    let within = Arc::clone(&handler);
    let opened =
        tokio::task::spawn_blocking(move || fleet::open_link(&config, port, within, clock)).await;
    let link = opened.ok().flatten()?;
    handler.attach(Arc::clone(&link) as Arc<dyn CoreLink>);
    Some(link)
}

/// The address of this host by which a listener of ours is reached from within.
fn of_this_host(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => (Ipv4Addr::LOCALHOST, v4.port()).into(),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => (Ipv6Addr::LOCALHOST, v6.port()).into(),
        other => other,
    }
}

fn flatten(ended: std::result::Result<Result<()>, tokio::task::JoinError>) -> Result<()> {
    match ended {
        Ok(Ok(())) => Err(Error::internal("a server ended by itself")),
        Ok(Err(error)) => Err(error),
        Err(cause) => Err(Error::internal("a server ended abnormally").because(cause)),
    }
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
        grpc: process::bind(config.grpc.listen, "gRPC", "grpc.listen").await?,
        http: process::bind(config.http.listen, "HTTP", "http.listen").await?,
        metrics: process::bind(config.metrics.listen, "metrics", "metrics.listen").await?,
    })
}

#[expect(
    clippy::too_many_arguments,
    reason = "everything that is served, once, at the start"
)]
fn spawn_servers(
    servers: &mut JoinSet<Result<()>>,
    config: &Config,
    bound: Bound,
    core: Option<(Listener, Listener)>,
    door: Option<CoreDoor>,
    use_cases: &Arc<UseCases>,
    recorder: &Arc<Recorder>,
    tls: &Arc<ServerTls>,
    stop: &CancellationToken,
) -> Result<()> {
    let agent = AgentInfo {
        name: agent_name(config),
        version: env!("CARGO_PKG_VERSION").into(),
    };
    let trace: TraceParent = Arc::new(|headers, span| {
        if let Some(parent) = headers
            .get("traceparent")
            .and_then(|value| value.to_str().ok())
        {
            telemetry::set_parent(span, parent);
        }
    });
    let mut listeners: Vec<Listener> = bound.local.into_iter().map(Listener::Local).collect();
    if let Some(listener) = bound.grpc {
        listeners.push(match (config.grpc.tls, door) {
            (true, Some(door)) => Listener::Door(listener, tls.grpc_config()?, door),
            (true, None) => Listener::Tls(listener, tls.grpc_config()?),
            (false, _) => Listener::Plain(listener),
        });
    }
    let (core_grpc, core_http) = core.unzip();
    listeners.extend(core_grpc);
    let options = grpc::Options {
        agent: agent.clone(),
        certificates: Some(Arc::new(|der| {
            let identity = parse_client_identity(der)?;
            Ok(PeerCertificate {
                credential: identity.credential,
                expires_at: identity.expires_at,
            })
        })),
        trace: Some(Arc::clone(&trace)),
        group_guest_access: config.guest.group_access,
        connections: ConnectionLimits {
            most: usize::try_from(config.grpc.max_connections).unwrap_or(usize::MAX),
            ..ConnectionLimits::default()
        },
        ..grpc::Options::default()
    };
    servers.spawn(grpc::serve(
        listeners,
        Arc::clone(use_cases),
        Arc::clone(recorder),
        options,
        stop.clone(),
    ));
    if bound.http.is_some() || core_http.is_some() {
        let options = http::Options {
            agent: agent.clone(),
            trace: Some(trace),
            batwa: config.compat.batwa,
            ..http::Options::default()
        };
        let router = http::router(
            Arc::clone(use_cases),
            Arc::clone(recorder),
            options,
            stop.clone(),
        );
        let listener = match bound.http {
            Some(listener) if config.http.tls => Some(Listener::Tls(listener, tls.http_config()?)),
            listener => listener.map(Listener::Plain),
        };
        for listener in listener.into_iter().chain(core_http) {
            servers.spawn(serve_http(listener, router.clone(), stop.clone()));
        }
    }
    if let Some(listener) = bound.metrics {
        let router = metrics::router(Arc::clone(use_cases), Arc::clone(recorder), agent);
        servers.spawn(serve_http(Listener::Plain(listener), router, stop.clone()));
    }
    let (counting, counter, until) = (Arc::clone(use_cases), Arc::clone(recorder), stop.clone());
    servers.spawn(async move {
        counter.follow(counting, until).await;
        Ok(())
    });
    Ok(())
}

async fn serve_http(
    listener: Listener,
    router: axum::Router,
    stop: CancellationToken,
) -> Result<()> {
    http::serve(listener, router, http::ServerOptions::default(), stop).await;
    Ok(())
}

/// Tells systemd that we are well, as long as the event loop turns and the store answers.
async fn watchdog(
    notifier: Notifier,
    use_cases: Arc<UseCases>,
    stop: CancellationToken,
) -> Result<()> {
    let Some(interval) = notify::watchdog_interval() else {
        stop.cancelled().await;
        return Ok(());
    };
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(interval) => {}
        }
        // libvirt being away is no reason to be restarted: that would help nobody.
        if tokio::time::timeout(interval, use_cases.check_health.execute())
            .await
            .is_ok_and(|health| health.live)
        {
            notifier.watchdog();
        }
    }
}
