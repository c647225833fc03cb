//! The composition root: turns the configuration into adapters, and adapters into Core.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;

use ghost_core::application::callers::{BearerVerifier, Callers};
use ghost_core::application::desk::Desk;
use ghost_core::application::direct::Directs;
use ghost_core::application::events::Chronicle;
use ghost_core::application::fleet::Fleet;
use ghost_core::application::quota_check::Admission;
use ghost_core::domain::DirectPolicy;
use ghost_core::domain::ports::FleetStore;
use ghost_core::infrastructure::audit::FileFleetAudit;
use ghost_core::infrastructure::authority::CoreAuthority;
use ghost_core::infrastructure::direct::TlsDialer;
use ghost_core::infrastructure::oidc::{OidcOptions, OidcVerifier};
use ghost_core::infrastructure::store::{EmbeddedStore, EtcdOptions, EtcdStore, EtcdTls};
use ghost_core::presentation::grpc::{Front, FrontOptions, Limits, Parts};
use ghost_core::presentation::route::{PoolOptions, Router};
use ghost_domain::ports::Clock;
use ghost_domain::{Error, ErrorCode, Result};
use ghost_infrastructure::config::FullPath;
use ghost_infrastructure::identity::ServerNames;
use ghost_infrastructure::process;
use ghost_infrastructure::store::{Engine, Helper, StoreOptions};
use ghost_presentation::TraceParent;
use ghost_presentation::metrics::Recorder;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::replicas::TlsReplicas;

use crate::config::{self, Config, Listen};

/// What this replica is called: by the configuration, or by the machine's name as far as it is legal
/// in a certificate.
pub(crate) fn replica_name(config: &Config) -> String {
    let configured = config.replica.name.as_ref().or(config.core.name.as_ref());
    configured.map_or_else(
        || {
            let legal: String = process::hostname()
                .chars()
                .filter(|c| c.is_ascii_alphanumeric() || "-._".contains(*c))
                .take(63)
                .collect();
            match legal.trim_matches('.') {
                "" => "core".to_owned(),
                legal => legal.to_owned(),
            }
        },
        |name| name.0.clone(),
    )
}

/// Where hosts and people reach this Core: as configured, or at the machine's name.
pub(crate) fn addresses(config: &Config, listener: Option<&TcpListener>) -> Vec<String> {
    let configured = &config.core.addresses.0;
    if !configured.is_empty() {
        return configured.iter().map(|one| one.0.clone()).collect();
    }
    let bound = listener.and_then(|listener| listener.local_addr().ok());
    match (config.grpc.listen, bound) {
        (Listen::Off, _) | (_, None) => Vec::new(),
        (_, Some(at)) if at.ip().is_unspecified() => {
            vec![format!("{}:{}", process::hostname(), at.port())]
        }
        (_, Some(at)) => vec![at.to_string()],
    }
}

/// Where other replicas reach this one.
pub(crate) fn replica_address(config: &Config, addresses: &[String]) -> String {
    match &config.replica.address {
        Some(address) => address.0.clone(),
        None => addresses.first().cloned().unwrap_or_default(),
    }
}

/// The names and addresses for the listener's certificate.
pub(crate) fn server_names(
    config: &Config,
    addresses: &[String],
    listener: &TcpListener,
) -> ServerNames {
    let replica = config.replica.address.iter().map(|address| &address.0);
    let reached = addresses.iter().chain(replica).filter_map(|address| {
        let (host, _port) = address.rsplit_once(':')?;
        Some(host.trim_matches(['[', ']']).to_owned())
    });
    ServerNames {
        configured: config
            .grpc
            .server_names
            .0
            .iter()
            .cloned()
            .chain(reached)
            .collect(),
        hostname: process::hostname(),
        listen: listener
            .local_addr()
            .map(|at| at.ip())
            .into_iter()
            .collect::<Vec<IpAddr>>(),
    }
}

/// Opens the records.
///
/// # Errors
/// `StoreUnavailable`.
pub(crate) async fn store(config: &Config) -> Result<Arc<dyn FleetStore>> {
    let engine = match config.store.engine {
        config::Engine::Sled => Engine::Sled,
        config::Engine::Redb => Engine::Redb,
        config::Engine::Etcd => return etcd(&config.store.etcd).await,
    };
    // The helper is this program itself: it opens the files first, so that a panic, a hang or an
    // absurd allocation of the engine ends a process that nobody needs.
    let helper = std::env::current_exe().ok().map(Helper::agent);
    let options = StoreOptions {
        engine,
        helper,
        ballast_bytes: config.store.reserve.bytes(),
        ..StoreOptions::new(config.core.data_dir.path().join("state"))
    };
    Ok(EmbeddedStore::open_with(options).await?)
}

/// Reaches the records in etcd.
async fn etcd(config: &config::Etcd) -> Result<Arc<dyn FleetStore>> {
    let endpoints = config.endpoints.0.iter().map(|one| one.0.clone()).collect();
    let mut options = EtcdOptions::new(endpoints, config.prefix.0.clone());
    options.lease = config.lease;
    let read = async |path: &FullPath| {
        let path = path.path();
        tokio::fs::read(path).await.map_err(|cause| {
            Error::new(
                ErrorCode::IoFailed,
                format!("cannot read {}", path.display()),
            )
            .because(cause)
            .hint("see store.etcd in the configuration")
        })
    };
    if let Some(authority) = &config.ca {
        let identity = match (&config.certificate, &config.key) {
            (Some(certificate), Some(key)) => Some((read(certificate).await?, read(key).await?)),
            _ => None,
        };
        options.tls = Some(EtcdTls {
            authority: read(authority).await?,
            identity,
        });
    }
    Ok(EtcdStore::open(options).await?)
}

/// Who verifies tokens of the configured issuer.
fn bearers(config: &config::Oidc, fleet: &Arc<Fleet>) -> Result<Option<Arc<dyn BearerVerifier>>> {
    let (Some(issuer), Some(audience)) = (&config.issuer, &config.audience) else {
        return Ok(None);
    };
    let options = OidcOptions {
        issuer: issuer.0.clone(),
        audience: audience.0.clone(),
        roles_claim: config.roles_claim.0.clone(),
        tenant_claim: config.tenant_claim.0.clone(),
    };
    let verifier = OidcVerifier::new(options, Arc::clone(fleet))?;
    Ok(Some(Arc::new(verifier)))
}

/// Opens the CA, or makes it at the first start.
///
/// # Errors
/// `IoFailed`.
pub(crate) async fn authority(
    config: &Config,
    clock: &Arc<dyn Clock>,
) -> Result<Arc<CoreAuthority>> {
    let folder = config.core.data_dir.path().to_owned();
    let trust_domain = config.core.trust_domain.0.clone();
    let clock = Arc::clone(clock);
    tokio::task::spawn_blocking(move || CoreAuthority::open(&folder, &trust_domain, clock))
        .await
        .map_err(|cause| Error::internal("opening the CA ended abnormally").because(cause))?
}

/// Lets calls go to hosts directly, where that is wanted.
///
/// # Errors
/// `InvalidArgument` for a name that is no replica's.
pub(crate) fn directs(
    config: &Config,
    fleet: &Arc<Fleet>,
    desk: &Desk,
    authority: &CoreAuthority,
) -> Result<()> {
    if !config.direct.enabled {
        return Ok(());
    }
    let policy = DirectPolicy {
        networks: config.direct.networks.0.iter().map(|one| one.0).collect(),
        ports: config.direct.ports.0.iter().map(|one| one.0).collect(),
    };
    let dialer = TlsDialer::new(authority, &replica_name(config))?;
    desk.use_directs(Directs::new(
        Arc::clone(fleet),
        Arc::new(dialer),
        policy,
        config.link.ping_interval,
    ));
    Ok(())
}

/// Core's gRPC over its parts.
///
/// # Errors
/// `IoFailed` where the audit log cannot be used.
#[expect(
    clippy::too_many_arguments,
    reason = "the composition root hands every part over once"
)]
pub(crate) async fn front(
    config: &Config,
    fleet: &Arc<Fleet>,
    desk: &Arc<Desk>,
    authority: &Arc<CoreAuthority>,
    recorder: &Arc<Recorder>,
    addresses: Vec<String>,
    trace: TraceParent,
    shutdown: CancellationToken,
) -> Result<Arc<Front>> {
    let (folder, clock) = (
        config.core.data_dir.path().to_owned(),
        Arc::clone(fleet.clock()),
    );
    let audit = tokio::task::spawn_blocking(move || FileFleetAudit::open(&folder, clock))
        .await
        .map_err(|cause| {
            Error::internal("opening the audit log ended abnormally").because(cause)
        })??;
    let replica = replica_name(config);
    let replicas = TlsReplicas::new(authority, &replica)?;
    let links: Arc<Desk> = Arc::clone(desk);
    let router = Router::new(
        Arc::clone(&links) as _,
        Some(Arc::new(replicas)),
        PoolOptions::default(),
    );
    let parts = Parts {
        fleet: Arc::clone(fleet),
        links,
        router: Arc::new(router),
        callers: Arc::new(Callers::new(
            Arc::clone(fleet),
            bearers(&config.oidc, fleet)?,
        )),
        admission: Arc::new(Admission::new(Arc::clone(fleet))),
        audit: Arc::new(audit),
        recorder: Arc::clone(recorder),
        desk: Arc::clone(desk),
        authority: Arc::clone(authority) as _,
        events: Chronicle::start(fleet),
    };
    let options = FrontOptions {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        replica,
        addresses,
        trace: Some(trace),
        batwa: config.compat.batwa,
        limits: Limits {
            // The configuration has no zeroes here: it is checked.
            per_second: NonZeroU32::new(config.limits.requests_per_second)
                .unwrap_or(NonZeroU32::MIN),
            burst: NonZeroU32::new(config.limits.burst).unwrap_or(NonZeroU32::MIN),
        },
        ..FrontOptions::default()
    };
    Front::new(parts, options, shutdown)
}
