//! `ghost-core token create`: asks the Core that runs on this machine, over its local socket.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use ghost_domain::{Error, ErrorCode, Result};
use ghost_infrastructure::config::Scalar;
use ghost_proto::core::v1::fleet_service_client::FleetServiceClient;
use ghost_proto::core::v1::{CreateFleetTokenRequest, CreateTenantRequest, FleetToken};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic_types::StatusExt;

use crate::report;

/// The socket that the packages set up.
const DEFAULT_SOCKET: &str = "/run/ghost/core.sock";
/// How long Core may take.
const PATIENCE: Duration = Duration::from_secs(15);

/// What to do with tokens.
#[derive(Clone, Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Make a token that lets one host, or with --role one person, join. It is shown this once.
    ///
    /// The token carries Core's address and the fingerprint of its CA. Whoever has it can use it
    /// once, until it ends; Core keeps only a hash of it.
    Create {
        /// The tenant, which is made where there is none yet; `*` with --role admin makes an
        /// administrator of all tenants.
        #[arg(long, default_value = "default")]
        tenant: String,
        /// How long it can be used, such as 10m; at most 1h.
        #[arg(long, default_value = "10m", value_parser = length)]
        ttl: Duration,
        /// Make one for a person: viewer, operator or admin.
        #[arg(long)]
        role: Option<String>,
        /// A label that the host begins with; may be given several times.
        #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
        labels: Vec<(String, String)>,
        /// Core's local socket.
        #[arg(long, default_value = DEFAULT_SOCKET)]
        socket: PathBuf,
        /// As what it is written.
        #[arg(short, long, value_enum, default_value = "text")]
        output: Output,
    },
}

/// How a token is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Output {
    /// The token alone.
    Text,
    /// An object with the token and when it ends.
    Json,
}

fn length(text: &str) -> std::result::Result<Duration, String> {
    Duration::from_text(text).map_err(|refusal| match refusal.hint {
        Some(hint) => format!("{}: {hint}", refusal.message),
        None => refusal.message,
    })
}

fn label(text: &str) -> std::result::Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write key=value".into()),
    }
}

/// Carries it out.
///
/// # Errors
/// What Core says, or that it cannot be reached.
pub(crate) fn execute(command: &Command) -> Result<ExitCode> {
    let Command::Create {
        tenant,
        ttl,
        role,
        labels,
        socket,
        output,
    } = command;
    let request = CreateFleetTokenRequest {
        tenant: tenant.clone(),
        role: role.clone().unwrap_or_default(),
        lifetime: Some(prost_types::Duration {
            seconds: i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX),
            nanos: i32::try_from(ttl.subsec_nanos()).unwrap_or(0),
        }),
        labels: labels.iter().cloned().collect::<BTreeMap<_, _>>(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|cause| Error::internal("the async runtime cannot be started").because(cause))?;
    let token = runtime.block_on(make(socket, request))?;
    Ok(report::say(&written(&token, *output)))
}

fn written(token: &FleetToken, output: Output) -> String {
    match output {
        Output::Text => token.token.clone(),
        Output::Json => {
            let expires_at = token
                .expires_at
                .as_ref()
                .and_then(ghost_proto::view::rfc3339);
            serde_json::json!({
                "token": token.token,
                "expires_at": expires_at,
                "tenant": token.tenant,
                "role": token.role,
                "hint": token.hint,
            })
            .to_string()
        }
    }
}

/// Whoever reaches the local socket may make tenants too: a first token of a tenant makes it, and says
/// so, because a misspelt name would otherwise make one unseen.
async fn make(socket: &Path, request: CreateFleetTokenRequest) -> Result<FleetToken> {
    let mut client = FleetServiceClient::new(connect(socket).await?);
    match ask(client.create_token(request.clone())).await {
        Err(error) if error.code() == ErrorCode::TenantNotFound => {}
        answered => return answered,
    }
    let tenant = CreateTenantRequest {
        name: request.tenant.clone(),
        ..CreateTenantRequest::default()
    };
    ask(client.create_tenant(tenant)).await?;
    report::note(&format!("made the tenant {}", request.tenant));
    ask(client.create_token(request)).await
}

async fn ask<T>(
    call: impl Future<Output = std::result::Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T> {
    let answer = tokio::time::timeout(PATIENCE, call).await.map_err(|_| {
        Error::new(ErrorCode::DeadlineExceeded, "Core did not answer in time")
            .hint("see its log: journalctl -u ghost-core")
    })?;
    answer.map(tonic::Response::into_inner).map_err(|status| {
        let details = status.get_error_details();
        let info = details.error_info();
        let code = info
            .and_then(|info| ErrorCode::parse(&info.reason))
            .unwrap_or(ErrorCode::Internal);
        let mut error = Error::new(code, status.message());
        if let Some(info) = info {
            if let Some(cause) = info.metadata.get("cause") {
                error = error.because(cause);
            }
            if let Some(hint) = info.metadata.get("hint") {
                error = error.hint(hint.clone());
            }
        }
        error
    })
}

async fn connect(socket: &Path) -> Result<Channel> {
    let unreachable = |cause: &dyn std::fmt::Display| {
        Error::new(
            ErrorCode::CoreUnreachable,
            format!("no Core answers at {}", socket.display()),
        )
        .because(cause)
        .hint("start it: systemctl start ghost-core; or name its socket with --socket; it needs root or the group ghost")
    };
    let path = socket.to_owned();
    // The connector below knows the real place; tonic wants a URI.
    let endpoint = Endpoint::from_static("http://ghost-core").connect_timeout(PATIENCE);
    let connecting = endpoint.connect_with_connector(tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    }));
    connecting.await.map_err(|error| {
        let mut cause: &dyn std::error::Error = &error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        unreachable(&cause)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_and_labels_are_checked_before_core_is_asked() {
        assert_eq!(length("10m").unwrap(), Duration::from_secs(600));
        assert!(length("10").unwrap_err().contains("for example 30s"));
        assert_eq!(label("gpu=").unwrap(), ("gpu".into(), String::new()));
        assert!(label("gpu").is_err() && label("=x").is_err());
    }

    #[test]
    fn a_token_as_json_says_when_it_ends() {
        let token = FleetToken {
            token: "ghost-host-v1.x".into(),
            expires_at: Some(prost_types::Timestamp {
                seconds: 0,
                nanos: 500_000_000,
            }),
            ..FleetToken::default()
        };
        assert_eq!(written(&token, Output::Text), "ghost-host-v1.x");
        let json: serde_json::Value = serde_json::from_str(&written(&token, Output::Json)).unwrap();
        assert_eq!(json["token"], "ghost-host-v1.x");
        assert_eq!(json["expires_at"], "1970-01-01T00:00:00.500Z");
    }

    #[test]
    fn a_core_that_does_not_run_is_told_with_the_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let error = execute(&Command::Create {
            tenant: "default".into(),
            ttl: Duration::from_secs(60),
            role: None,
            labels: Vec::new(),
            socket: folder.path().join("none.sock"),
            output: Output::Text,
        })
        .unwrap_err();
        assert_eq!(error.code(), ErrorCode::CoreUnreachable);
        assert!(
            error
                .hint_text()
                .unwrap()
                .contains("systemctl start ghost-core")
        );
    }
}
