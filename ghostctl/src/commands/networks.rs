//! `network list|show`.

use ghost_proto::agent::v1::{GetNetworkRequest, ListNetworksRequest};
use ghost_proto::view::Network;

use super::{describe, each};
use crate::connect::{Session, ask};
use crate::errors::{Exit, Failure};

pub(super) async fn list(session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let networks: Vec<Network> = agent
        .networks()
        .list(ask(ListNetworksRequest {}))
        .await
        .map_err(|status| agent.failure(&status))?
        .into_inner()
        .networks
        .into_iter()
        .map(Network::from)
        .collect();
    session
        .printer
        .list(&networks, |network| &network.name, describe::network_table)?;
    if networks.is_empty() {
        session
            .printer
            .note("there are no networks yet; the first VM makes the default one");
    }
    Ok(Exit::Done)
}

pub(super) async fn show(names: Vec<String>, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let (networks, exit) = each(&names, session, |name| async {
        agent
            .networks()
            .get(ask(GetNetworkRequest { name }))
            .await
            .map(|answer| Network::from(answer.into_inner()))
            .map_err(|status| agent.failure(&status))
    })
    .await;
    session.printer.several(
        &networks,
        names.len(),
        |network| &network.name,
        describe::network,
    )?;
    Ok(exit)
}
