//! `core …`: what the owner of a host sees of its link to Ghost Core, and says to it.

use std::time::Duration;

use ghost_proto::agent::v1::{AllowCoreDeletesRequest, GetCoreLinkRequest, ReconnectCoreRequest};
use ghost_proto::view::CoreLink;

use super::wire;
use crate::arguments::CoreCommand;
use crate::connect::{Session, ask};
use crate::errors::{Exit, Failure};
use crate::table::{Paint, Sheet};
use crate::text::{age_of, human_duration, time_until};

pub(super) async fn run(command: CoreCommand, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let failed = |status: tonic::Status| agent.failure(&status);
    let link: CoreLink = match command {
        CoreCommand::Status => {
            let answer = agent.host().get_core_link(ask(GetCoreLinkRequest {})).await;
            answer.map_err(failed)?.into_inner().into()
        }
        CoreCommand::Reconnect => {
            let request = ask(ReconnectCoreRequest {});
            let answer = agent.host().reconnect_core(request).await;
            let link: CoreLink = answer.map_err(failed)?.into_inner().into();
            session
                .printer
                .note("it connects now; see how that goes: ghostctl core status");
            link
        }
        CoreCommand::AllowDeletes { duration } => {
            let request = ask(AllowCoreDeletesRequest {
                duration: Some(wire(duration)),
            });
            agent
                .host()
                .allow_core_deletes(request)
                .await
                .map_err(failed)?;
            session.printer.note(&match duration {
                Duration::ZERO => {
                    "Core may delete a fifth of the VMs in ten minutes, no more".into()
                }
                duration => format!(
                    "Core may delete any number of VMs for {}",
                    human_duration(duration)
                ),
            });
            return Ok(Exit::Done);
        }
    };
    session.printer.several(
        std::slice::from_ref(&link),
        1,
        |link| link.host_name.as_deref().unwrap_or_default(),
        sheet,
    )?;
    if !link.enrolled {
        session
            .printer
            .note("this host is in no fleet; it joins with: ghost-agent enroll --token TOKEN");
    }
    Ok(Exit::Done)
}

/// The ways beside the link that are wanted or used.
fn also(link: &CoreLink) -> Option<String> {
    let ways: Vec<String> = link
        .carriers
        .iter()
        .filter(|way| way.name != "link" && (way.state != "off" || way.reason.is_some()))
        .map(|way| {
            let mut text = format!("{} {}", way.name, way.state);
            if let Some(peer) = &way.peer {
                text.push_str(&format!(", {peer}"));
            }
            if let Some(reason) = &way.reason {
                text.push_str(&format!(" ({reason})"));
            }
            text
        })
        .collect();
    (!ways.is_empty()).then(|| ways.join("; "))
}

fn sheet(link: &CoreLink, paint: Paint) -> String {
    let state = match &link.reason {
        Some(reason) => format!("{} ({reason})", link.state),
        None => link.state.clone(),
    };
    let mut sheet = Sheet::new();
    sheet
        .line("link", state)
        .some(
            "since",
            link.since
                .as_deref()
                .map(|at| format!("{} ago", age_of(at))),
        )
        .some("carrier", link.carrier.as_ref())
        .some("replica", link.replica.as_ref())
        .some(
            "round trip",
            link.round_trip_seconds
                .map(|seconds| format!("{:.1} ms", seconds * 1000.0)),
        )
        .some(
            "next attempt",
            link.retry_in_seconds
                .map(|seconds| format!("in {seconds:.0} s")),
        )
        .some("also", also(link))
        .some("last failure", link.last_failure.as_ref())
        .line("core may", link.permissions.replace('_', " "))
        .some(
            "deletes",
            link.deletes_allowed_until
                .as_deref()
                .map(|until| format!("any number, ends {}", time_until(Some(until)))),
        );
    if link.enrolled {
        sheet
            .some("host", link.host_name.as_ref())
            .some("id", link.host_id.as_ref())
            .some("tenant", link.tenant.as_ref())
            .line("core", link.addresses.join(", "))
            .line(
                "certificate",
                format!(
                    "number {}, ends {}",
                    link.certificate_generation,
                    time_until(link.certificate_expires_at.as_deref())
                ),
            );
    }
    sheet.render(paint)
}
