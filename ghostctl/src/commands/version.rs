//! `version`: ours, and the agent's or Core's where it answers.

use ghost_proto::agent::v1::GetStatusRequest;
use ghost_proto::core::v1::GetCoreStatusRequest;
use serde::Serialize;

use crate::arguments::VersionArgs;
use crate::connect::{Agent, Session, ask};
use crate::errors::{Exit, Failure};
use crate::text::printable;

#[derive(Serialize)]
struct Versions {
    client: Version,
    /// The host's agent.
    agent: Option<Version>,
    /// Ghost Core, where it is spoken to and no host is named.
    core: Option<Version>,
}

#[derive(Serialize)]
struct Version {
    version: String,
}

pub(super) async fn run(args: VersionArgs, session: &Session) -> Result<Exit, Failure> {
    let mut versions = Versions {
        client: Version {
            version: env!("CARGO_PKG_VERSION").to_owned(),
        },
        agent: None,
        core: None,
    };
    // What was asked for first is our own version; that the agent is away is a remark.
    let trouble = if args.client {
        None
    } else {
        ask_theirs(&mut versions, session).await.err()
    };
    session.printer.several(
        std::slice::from_ref(&versions),
        1,
        |versions| &versions.client.version,
        |versions, _| {
            let mut text = format!("ghostctl     {}\n", versions.client.version);
            if let Some(agent) = &versions.agent {
                text = format!("{text}ghost-agent  {}\n", printable(&agent.version));
            }
            if let Some(core) = &versions.core {
                text = format!("{text}ghost-core   {}\n", printable(&core.version));
            }
            text
        },
    )?;
    if let Some(failure) = trouble {
        session.printer.note(&format!(
            "the agent's version is not known: {}",
            printable(&failure.body().error.message)
        ));
    }
    Ok(Exit::Done)
}

async fn ask_theirs(versions: &mut Versions, session: &Session) -> Result<(), Failure> {
    let agent = session.agent().await?;
    let answer = agent
        .host()
        .get_status(ask(GetStatusRequest {}))
        .await
        .map_err(|status| agent.failure(&status));
    match answer {
        Err(failure) if Agent::is_core(&failure) => {
            let status = agent
                .fleet()
                .get_status(ask(GetCoreStatusRequest {}))
                .await
                .map_err(|status| agent.fleet_failure(&status))?;
            let version = status.into_inner().version;
            versions.core = Some(Version { version });
        }
        answer => {
            let version = answer?.into_inner().agent_version;
            versions.agent = Some(Version { version });
        }
    }
    Ok(())
}
