//! `host …`: the hosts of a fleet.

use ghost_proto::core::v1::{
    CreateFleetTokenRequest, GetHostRequest, ListHostsRequest, RemoveHostRequest, UpdateHostRequest,
};
use ghost_proto::view::{FleetHost, FleetToken};

use super::{describe_fleet, each, pairs, wire};
use crate::arguments::{HostCommand, HostList, HostToken};
use crate::connect::{Agent, Session, ask};
use crate::errors::{Exit, Failure};
use crate::text::{printable, time_until};

pub(super) async fn run(command: HostCommand, session: &Session) -> Result<Exit, Failure> {
    let change = |host: String| UpdateHostRequest {
        host,
        ..UpdateHostRequest::default()
    };
    match command {
        HostCommand::List(args) => return list(args, session).await,
        HostCommand::Show(args) => return show(args.names, session).await,
        HostCommand::Token(args) => token(args, session).await?,
        HostCommand::Cordon(args) => {
            let request = UpdateHostRequest {
                cordoned: Some(true),
                cordon_reason: args.reason,
                ..change(args.host.name)
            };
            update(request, "Cordoned", session).await?;
        }
        HostCommand::Uncordon(args) => {
            let request = UpdateHostRequest {
                cordoned: Some(false),
                ..change(args.name)
            };
            update(request, "Uncordoned", session).await?;
        }
        HostCommand::Label(args) => {
            if args.set.is_empty() && args.remove.is_empty() {
                return Err(Failure::usage("no label is given")
                    .hint("ghostctl host label HOST KEY=VALUE, or --remove KEY"));
            }
            let request = UpdateHostRequest {
                set_labels: pairs(args.set),
                remove_labels: args.remove,
                ..change(args.host.name)
            };
            update(request, "Labelled", session).await?;
        }
        HostCommand::Rename(args) => {
            let request = UpdateHostRequest {
                name: args.new,
                ..change(args.host.name)
            };
            update(request, "Renamed to", session).await?;
        }
        HostCommand::Unlock(args) => {
            let request = UpdateHostRequest {
                unlock: true,
                ..change(args.name)
            };
            update(request, "Unlocked", session).await?;
        }
        HostCommand::Remove(args) => return remove(args.hosts.names, args.force, session).await,
    }
    Ok(Exit::Done)
}

async fn list(args: HostList, session: &Session) -> Result<Exit, Failure> {
    let filtered = !args.labels.is_empty() || args.state.is_some();
    let agent = session.agent().await?;
    let hosts: Vec<FleetHost> = agent
        .fleet()
        .list_hosts(ask(ListHostsRequest {
            tenant: args.tenant.unwrap_or_default(),
            labels: pairs(args.labels),
            state: args.state.unwrap_or_default(),
        }))
        .await
        .map_err(|status| agent.fleet_failure(&status))?
        .into_inner()
        .hosts
        .into_iter()
        .map(FleetHost::from)
        .collect();
    session
        .printer
        .list(&hosts, |host| &host.name, describe_fleet::host_table)?;
    if hosts.is_empty() {
        session.printer.note(if filtered {
            "no host is like that"
        } else {
            "no host has joined; print a token with: ghostctl host token"
        });
    }
    Ok(Exit::Done)
}

async fn show(names: Vec<String>, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let (hosts, exit) = each(&names, session, |host| async {
        agent
            .fleet()
            .get_host(ask(GetHostRequest { host }))
            .await
            .map(|answer| FleetHost::from(answer.into_inner()))
            .map_err(|status| agent.fleet_failure(&status))
    })
    .await;
    session
        .printer
        .several(&hosts, names.len(), |host| &host.name, describe_fleet::host)?;
    Ok(exit)
}

async fn token(args: HostToken, session: &Session) -> Result<(), Failure> {
    let agent = session.agent().await?;
    let token: FleetToken = agent
        .fleet()
        .create_token(ask(CreateFleetTokenRequest {
            tenant: args.tenant.unwrap_or_default(),
            role: args
                .role
                .map(|role| role.as_str().to_owned())
                .unwrap_or_default(),
            lifetime: Some(wire(args.ttl)),
            labels: pairs(args.labels),
        }))
        .await
        .map_err(|status| agent.fleet_failure(&status))?
        .into_inner()
        .into();
    session.printer.several(
        std::slice::from_ref(&token),
        1,
        |token| &token.token,
        |token, _| format!("{}\n", printable(&token.token)),
    )?;
    let use_it = token.hint.as_deref().map(printable).unwrap_or_default();
    session.printer.note(&format!(
        "it may be used once and ends {}: {use_it}",
        time_until(token.expires_at.as_deref())
    ));
    Ok(())
}

async fn update(request: UpdateHostRequest, done: &str, session: &Session) -> Result<(), Failure> {
    let agent = session.agent().await?;
    let host: FleetHost = agent
        .fleet()
        .update_host(ask(request))
        .await
        .map_err(|status| agent.fleet_failure(&status))?
        .into_inner()
        .into();
    session.printer.several(
        std::slice::from_ref(&host),
        1,
        |host| &host.name,
        |host, _| format!("{done} {}\n", printable(&host.name)),
    )
}

async fn remove(names: Vec<String>, force: bool, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let removed = |agent: Agent, host: String| async move {
        let request = RemoveHostRequest {
            host: host.clone(),
            force,
        };
        agent
            .fleet()
            .remove_host(ask(request))
            .await
            .map(|_| host)
            .map_err(|status| agent.fleet_failure(&status))
    };
    let (gone, exit) = each(&names, session, |host| removed(agent.clone(), host)).await;
    session.printer.several(
        &gone,
        names.len(),
        |host| host,
        |host, _| {
            format!(
                "Removed {}; its VMs go on where they are\n",
                printable(host)
            )
        },
    )?;
    Ok(exit)
}
