//! `version`: ours, and the agent's where it answers.

use ghost_proto::agent::v1::GetStatusRequest;
use serde::Serialize;

use crate::arguments::VersionArgs;
use crate::connect::{Session, ask};
use crate::errors::{Exit, Failure};
use crate::text::printable;

#[derive(Serialize)]
struct Versions {
    client: Version,
    agent: Option<Version>,
}

#[derive(Serialize)]
struct Version {
    version: String,
}

pub(super) async fn run(args: VersionArgs, session: &Session) -> Result<Exit, Failure> {
    let agent = if args.client {
        Ok(None)
    } else {
        agent_version(session).await.map(Some)
    };
    // What was asked for first is our own version; that the agent is away is a remark.
    let (agent, trouble) = match agent {
        Ok(agent) => (agent, None),
        Err(failure) => (None, Some(failure)),
    };
    let versions = Versions {
        client: Version {
            version: env!("CARGO_PKG_VERSION").to_owned(),
        },
        agent: agent.map(|version| Version { version }),
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

async fn agent_version(session: &Session) -> Result<String, Failure> {
    let agent = session.agent().await?;
    let status = agent
        .host()
        .get_status(ask(GetStatusRequest {}))
        .await
        .map_err(|status| agent.failure(&status))?;
    Ok(status.into_inner().agent_version)
}
