//! This host as part of a fleet: joining and leaving one, and the link to Core of a running agent.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use ghost_domain::ports::CoreLink;
use ghost_domain::{Error, ErrorCode, HostName, Result};
use ghost_infrastructure::core_link::direct::DirectOptions;
use ghost_infrastructure::core_link::piko::{PikoOptions, PikoService, PikoToken, forward};
use ghost_infrastructure::core_link::{self, CoreLinkOptions, CoreLinkService, EnrolOptions};
use ghost_infrastructure::process;
use ghost_infrastructure::tunnel::BackoffOptions;
use ghost_presentation::CoreDoor;
use tokio_util::sync::CancellationToken;

use crate::compose;
use crate::config::{Config, Loaded};
use crate::report;

/// How often it is looked whether this host joined or left a fleet.
const LOOK: Duration = Duration::from_secs(2);
/// A change that the link did not take up is told it again after so many looks.
const TELL_AGAIN: u32 = 5;

/// What `ghost-agent enroll` is told.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct EnrollArguments {
    /// The configuration; /etc/ghost/agent.yaml where that exists, else the defaults.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// The token, from `ghost-core token create`; - reads it from standard input, so that it stands
    /// on no command line.
    #[arg(long, value_name = "TOKEN")]
    token: String,
    /// What the host wants to be called in the fleet; agent.name, or the host's own name, where it
    /// is left out.
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Leave the fleet that this host is in, and join anew.
    #[arg(long)]
    replace: bool,
}

/// Joins a fleet. A running agent on the same data folder takes it up by itself.
///
/// # Errors
/// What kept it from joining; nothing was changed then, but for a used token.
pub(crate) fn enroll(loaded: &Loaded, arguments: &EnrollArguments) -> Result<ExitCode> {
    let config = &loaded.config;
    let name = match &arguments.name {
        Some(name) => HostName::new(name.clone())?,
        None => host_name(config)?,
    };
    let token = match arguments.token.as_str() {
        "-" => std::io::read_to_string(std::io::stdin())
            .map_err(|cause| {
                Error::new(ErrorCode::IoFailed, "cannot read the token").because(cause)
            })?
            .trim()
            .to_owned(),
        token => token.to_owned(),
    };
    let data_dir = config.agent.data_dir.path();
    compose::prepare_data_dir(data_dir)?;
    let options = EnrolOptions {
        data_dir: data_dir.to_owned(),
        name,
        agent_version: env!("CARGO_PKG_VERSION").into(),
        replace: arguments.replace,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|cause| Error::internal("the async runtime cannot be started").because(cause))?;
    let identity = runtime.block_on(core_link::enrol(&token, options))?;
    Ok(report::say(&format!(
        "this host is {} of {} (id {})\nCore is at {}; a running agent connects by itself, and what Core may do is core.permissions: {}",
        identity.name,
        identity.tenant,
        identity.host,
        identity.addresses.join(", "),
        config.core.permissions.0,
    )))
}

/// Leaves the fleet, as far as this host is concerned. A running agent ends its link.
///
/// # Errors
/// `NotEnrolled`; `IoFailed` where the identity cannot be removed.
pub(crate) fn unenroll(loaded: &Loaded) -> Result<ExitCode> {
    let left = core_link::unenrol(loaded.config.agent.data_dir.path())?;
    Ok(report::say(&match left {
        Some(identity) => format!(
            "this host is no longer {} of {}; Core still lists it until somebody says: ghostctl host remove {}",
            identity.name, identity.tenant, identity.name
        ),
        None => "this host's identity could not be read, and is removed".into(),
    }))
}

/// The configured name or the host's own, made one that a fleet takes.
fn host_name(config: &Config) -> Result<HostName> {
    let given = config
        .agent
        .name
        .as_ref()
        .map_or_else(process::hostname, |name| name.0.clone());
    HostName::new(label(&given)).map_err(|error| error.hint("give one: --name NAME"))
}

/// The first part of a name as a label of a-z, 0-9 and '-'.
fn label(name: &str) -> String {
    let first = name.split('.').next().unwrap_or(name);
    let label: String = first
        .chars()
        .map(|character| match character.to_ascii_lowercase() {
            legal @ ('a'..='z' | '0'..='9') => legal,
            _ => '-',
        })
        .take(63)
        .collect();
    label.trim_matches('-').to_owned()
}

/// Opens the link; nothing is dialled before [`run_link`]. Reads files.
///
/// An identity that cannot be used is told and costs the host its link, and nothing else.
pub(crate) fn open_link(
    config: &Config,
    port: Option<u16>,
    handler: Arc<dyn ghost_domain::ports::CoreLinkHandler>,
    clock: Arc<dyn ghost_domain::ports::Clock>,
) -> Option<Arc<CoreLinkService>> {
    let options = CoreLinkOptions {
        data_dir: config.agent.data_dir.path().to_owned(),
        agent_version: env!("CARGO_PKG_VERSION").into(),
        direct: DirectOptions {
            provider: config.network.provider.0.clone(),
            port,
        },
    };
    match CoreLinkService::open(options, handler, clock) {
        Ok(link) => Some(Arc::new(link)),
        Err(error) => {
            tracing::error!(
                %error,
                hint = error.hint_text(),
                "there is no link to Ghost Core; everything else works, and a repaired identity is read at the next start"
            );
            None
        }
    }
}

/// How Core comes in at this agent's own listener.
pub(crate) fn door(link: &Arc<CoreLinkService>) -> CoreDoor {
    let (to_shake, to_serve) = (Arc::clone(link), Arc::clone(link));
    CoreDoor {
        protocol: core_link::DIRECT_PROTOCOL,
        tls: Arc::new(move || to_shake.direct_tls()),
        serve: Arc::new(move |stream| {
            let link = Arc::clone(&to_serve);
            Box::pin(async move { link.serve_direct(stream).await })
        }),
    }
}

/// Keeps the link until `stop`, and tells it when this host joins or leaves a fleet.
pub(crate) async fn run_link(
    link: Arc<CoreLinkService>,
    data_dir: PathBuf,
    stop: CancellationToken,
) {
    let watched = watch_identity(Arc::clone(&link), data_dir);
    tokio::select! {
        () = link.run(stop.clone()) => {}
        () = watched => {}
    }
}

/// Joining and leaving are another program's doing: what it leaves on the disk is looked for.
async fn watch_identity(link: Arc<CoreLinkService>, data_dir: PathBuf) {
    let mut looks_apart = 0;
    loop {
        tokio::time::sleep(LOOK).await;
        let folder = data_dir.clone();
        let found = tokio::task::spawn_blocking(move || core_link::enrolled_host(&folder)).await;
        let known = link.identity().map(|identity| identity.host);
        if found.ok().flatten() == known {
            looks_apart = 0;
            continue;
        }
        if looks_apart % TELL_AGAIN == 0 {
            tracing::info!("this host joined or left a fleet");
            link.reconnect();
        }
        looks_apart += 1;
    }
}

/// Keeps the connection to Piko until `stop`, and carries what comes over it to `target`, this
/// agent's own listener with TLS.
///
/// # Errors
/// `InvalidArgument` for an address or an endpoint that is none.
pub(crate) fn piko(config: &Config) -> Result<Option<PikoService>> {
    let (Some(server), Some(endpoint)) = (&config.piko.server_url, &config.piko.endpoint) else {
        return Ok(None);
    };
    let path = |path: &Path| path.to_owned();
    let options = PikoOptions {
        server_url: server.0.clone(),
        endpoint: endpoint.0.clone(),
        token: config
            .piko
            .token_file
            .as_ref()
            .map_or(PikoToken::None, |file| PikoToken::File(path(file.path()))),
        tenant: config.piko.tenant.as_ref().map(|name| name.0.clone()),
        authority: config.piko.ca_file.as_ref().map(|file| path(file.path())),
        reconnect: BackoffOptions {
            initial: config.piko.reconnect.initial_delay,
            most: config.piko.reconnect.max_delay,
            multiplier: f64::from(config.piko.reconnect.multiplier.percent()) / 100.0,
        },
    };
    PikoService::new(options).map(Some)
}

/// See [`piko`].
pub(crate) async fn run_piko(
    service: Arc<PikoService>,
    target: std::net::SocketAddr,
    stop: CancellationToken,
) {
    let Some(incoming) = service.incoming() else {
        return;
    };
    tokio::join!(service.run(stop.clone()), forward(incoming, target, stop));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_s_own_name_becomes_one_of_a_fleet() {
        for (given, label) in [
            ("pc-at-home", "pc-at-home"),
            ("PC.example.org", "pc"),
            ("Anna's PC", "anna-s-pc"),
            ("_x_", "x"),
            ("büro", "b-ro"),
        ] {
            assert_eq!(super::label(given), label);
            assert!(HostName::new(label).is_ok(), "{label}");
        }
        assert!(HostName::new(super::label("---")).is_err());
        assert!(HostName::new(super::label(&"x".repeat(200))).is_ok());
    }
}
