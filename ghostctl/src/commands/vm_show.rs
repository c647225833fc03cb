//! `vm list`, `list` and `vm show`.

use ghost_proto::agent::v1::{GetGuestStatusRequest, GetVmRequest, ListVmsRequest};
use ghost_proto::view::{GuestStatus, Vm, VmState};

use super::{describe, each, history, pairs};
use crate::arguments::{Format, VmList, VmShow};
use crate::connect::{Session, ask};
use crate::errors::{Exit, Failure};

pub(super) async fn list(args: VmList, session: &Session) -> Result<Exit, Failure> {
    let filtered = !args.tags.is_empty();
    let agent = session.agent().await?;
    let vms: Vec<Vm> = agent
        .vms()
        .list(ask(ListVmsRequest {
            tags: pairs(args.tags),
        }))
        .await
        .map_err(|status| agent.failure(&status))?
        .into_inner()
        .vms
        .into_iter()
        .map(Vm::from)
        .collect();
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
