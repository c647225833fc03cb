//! Commands that are left with Core: `--queue`, and `command …`.

use std::time::Duration;

use ghost_proto::core::v1::queue_command_request::Action;
use ghost_proto::core::v1::{
    CancelCommandRequest, GetCommandRequest, ListCommandsRequest, QueueCommandRequest,
};
use ghost_proto::view::FleetCommand;
use uuid::Uuid;

use super::{describe_fleet, each as for_each, wire};
use crate::arguments::{Change, QueueCommand, QueueList};
use crate::connect::{Session, ask};
use crate::errors::{Exit, Failure};
use crate::text::{printable, time_until};

/// Leaves one command a name with Core.
pub(super) async fn each(
    names: &[String],
    lifetime: Duration,
    change: &Change,
    session: &Session,
    action: impl Fn(String) -> Action,
) -> Result<Exit, Failure> {
    if names.len() > 1 && change.request_id.is_some() {
        return Err(Failure::usage("--request-id needs exactly one NAME")
            .because("one key stands for one command"));
    }
    let agent = session.agent().await?;
    let Some(host) = agent.route().host() else {
        return Err(Failure::usage("--queue needs --host HOST")
            .because("a command is queued for one host of a fleet"));
    };
    let (queued, exit) = for_each(names, session, |vm| {
        let request = QueueCommandRequest {
            host: host.clone(),
            request_id: change
                .request_id
                .clone()
                .unwrap_or_else(|| Uuid::new_v4().to_string()),
            lifetime: Some(wire(lifetime)),
            action: Some(action(vm)),
        };
        let agent = agent.clone();
        async move {
            agent
                .fleet()
                .queue_command(ask(request))
                .await
                .map(|answer| FleetCommand::from(answer.into_inner()))
                .map_err(|status| agent.fleet_failure(&status))
        }
    })
    .await;
    session.printer.several(
        &queued,
        names.len(),
        |command| &command.id,
        |command, _| {
            format!(
                "Queued {} of {} for {}, ends {}\n",
                printable(&command.kind),
                printable(&command.subject),
                printable(&command.host),
                time_until(command.deadline.as_deref())
            )
        },
    )?;
    if let [command] = queued.as_slice() {
        session.printer.note(&format!(
            "see what becomes of it: ghostctl command show {}",
            printable(&command.id)
        ));
    }
    Ok(exit)
}

pub(super) async fn run(command: QueueCommand, session: &Session) -> Result<Exit, Failure> {
    match command {
        QueueCommand::List(args) => list(args, session).await,
        QueueCommand::Show(args) => {
            let agent = session.agent().await?;
            let (found, exit) = for_each(&args.ids, session, |id| async {
                agent
                    .fleet()
                    .get_command(ask(GetCommandRequest { id }))
                    .await
                    .map(|answer| FleetCommand::from(answer.into_inner()))
                    .map_err(|status| agent.fleet_failure(&status))
            })
            .await;
            session.printer.several(
                &found,
                args.ids.len(),
                |command| &command.id,
                describe_fleet::command,
            )?;
            Ok(exit)
        }
        QueueCommand::Cancel(args) => {
            let agent = session.agent().await?;
            let (gone, exit) = for_each(&args.ids, session, |id| async {
                agent
                    .fleet()
                    .cancel_command(ask(CancelCommandRequest { id }))
                    .await
                    .map(|answer| FleetCommand::from(answer.into_inner()))
                    .map_err(|status| agent.fleet_failure(&status))
            })
            .await;
            session.printer.several(
                &gone,
                args.ids.len(),
                |command| &command.id,
                |command, _| format!("Cancelled {}\n", printable(&command.id)),
            )?;
            Ok(exit)
        }
    }
}

async fn list(args: QueueList, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let host = args.of.or_else(|| agent.route().host()).unwrap_or_default();
    let commands: Vec<FleetCommand> = agent
        .fleet()
        .list_commands(ask(ListCommandsRequest {
            host,
            all: args.all,
        }))
        .await
        .map_err(|status| agent.fleet_failure(&status))?
        .into_inner()
        .commands
        .into_iter()
        .map(FleetCommand::from)
        .collect();
    session.printer.list(
        &commands,
        |command| &command.id,
        describe_fleet::command_table,
    )?;
    if commands.is_empty() {
        session
            .printer
            .note("no command waits; those that ended: ghostctl command list --all");
    }
    Ok(Exit::Done)
}
