//! `vm list`, `list` and `vm show`.

use ghost_proto::agent::v1::{GetVmRequest, ListVmsRequest};
use ghost_proto::view::Vm;

use super::{describe, each, pairs};
use crate::arguments::VmList;
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

pub(super) async fn show(names: Vec<String>, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let (vms, exit) = each(&names, session, |vm| async {
        agent
            .vms()
            .get(ask(GetVmRequest { vm }))
            .await
            .map(|answer| Vm::from(answer.into_inner()))
            .map_err(|status| agent.failure(&status))
    })
    .await;
    session
        .printer
        .several(&vms, names.len(), |vm| &vm.name, describe::vm)?;
    Ok(exit)
}
