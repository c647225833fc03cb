//! `vm list`, `list` and `vm show`.

use ghost_proto::agent::v1::{GetGuestStatusRequest, GetVmRequest, ListVmsRequest};
use ghost_proto::core::v1::ListFleetVmsRequest;
use ghost_proto::view::{FleetVm, GuestStatus, Vm, VmState};

use super::{describe, describe_fleet, each, history, pairs};
use crate::arguments::{Format, VmList, VmShow};
use crate::connect::{Agent, Session, ask};
use crate::errors::{Exit, Failure};

pub(super) async fn list(args: VmList, session: &Session) -> Result<Exit, Failure> {
    let filtered = !args.tags.is_empty();
    let agent = session.agent().await?;
    if args.all_hosts {
        return list_fleet(args, &agent, session).await;
    }
    let listed = agent
        .vms()
        .list(ask(ListVmsRequest {
            tags: pairs(args.tags.clone()),
        }))
        .await
        .map_err(|status| agent.failure(&status));
    let vms: Vec<Vm> = match listed {
        Err(failure) if Agent::is_core(&failure) => {
            return list_fleet(args, &agent, session).await;
        }
        listed => listed?.into_inner().vms.into_iter().map(Vm::from).collect(),
    };
    session
        .printer
        .list(&vms, |vm| &vm.name, describe::vm_table)?;
    if vms.is_empty() {
        session.printer.note(if filtered {
            "no VM has these tags"
        } else {
            "there are no VMs; make one with: ghostctl launch IMAGE (see: ghostctl image catalogue)"
        });
    }
    Ok(Exit::Done)
}

/// The VMs of all hosts of a fleet.
async fn list_fleet(args: VmList, agent: &Agent, session: &Session) -> Result<Exit, Failure> {
    let filtered = !args.tags.is_empty();
    let request = ListFleetVmsRequest {
        host: agent.route().host().unwrap_or_default(),
        tags: pairs(args.tags),
        ..ListFleetVmsRequest::default()
    };
    let vms: Vec<FleetVm> = agent
        .fleet()
        .list_vms(ask(request))
        .await
        .map_err(|status| agent.fleet_failure(&status))?
        .into_inner()
        .vms
        .into_iter()
        .map(FleetVm::from)
        .collect();
    session
        .printer
        .list(&vms, |vm| &vm.name, describe_fleet::vm_table)?;
    if vms.is_empty() {
        session.printer.note(if filtered {
            "no VM has these tags"
        } else {
            "no host has a VM; make one with: ghostctl launch IMAGE"
        });
    }
    Ok(Exit::Done)
}

pub(super) async fn show(args: VmShow, session: &Session) -> Result<Exit, Failure> {
    let names = args.vms.names;
    if let Some(span) = args.history {
        return history::show(names, span, session).await;
    }
    let agent = session.agent().await?;
    // The document is the VM's; what else a person wants to know comes from its guest.
    let for_people = session.printer.format() == Format::Table;
    let (found, exit) = each(&names, session, |vm| async {
        let vm = agent
            .vms()
            .get(ask(GetVmRequest { vm }))
            .await
            .map(|answer| Vm::from(answer.into_inner()))
            .map_err(|status| agent.failure(&status))?;
        let guest = if for_people && vm.state == VmState::Running && vm.guest.is_some() {
            let request = GetGuestStatusRequest { vm: vm.id.clone() };
            // Without it there is less to show, and `guest status` says why.
            let status = agent.guest().get_status(ask(request)).await.ok();
            status.map(|answer| GuestStatus::from(answer.into_inner()))
        } else {
            None
        };
        Ok((vm, guest))
    })
    .await;
    let (vms, guests): (Vec<Vm>, Vec<Option<GuestStatus>>) = found.into_iter().unzip();
    let guest_of = |vm: &Vm| {
        let known = vms.iter().position(|known| known.id == vm.id)?;
        guests.get(known)?.as_ref()
    };
    session.printer.several(
        &vms,
        names.len(),
        |vm| &vm.name,
        |vm, paint| describe::vm(vm, guest_of(vm), paint),
    )?;
    Ok(exit)
}
