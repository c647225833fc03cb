//! The routes of Batwa over this host's own VMs: the use cases, behind the guard of all routes.

use std::sync::Arc;

use async_trait::async_trait;
use ghost_application::OperationView;
use ghost_application::guest::GuestTarget;
use ghost_application::vm::{DeleteVmCommand, PowerCommand};
use ghost_domain::ports::ExecSession;
use ghost_domain::{Error, ErrorCode, Principal, Result};
use ghost_proto::agent::v1 as message;

use super::super::Shell;
use super::super::guard::PresentedKey;
use super::super::guest::{called_off, shutting_down};
use super::super::routes::Route;
use super::{Asker, Backend, BatwaAgent, BatwaVm, Begun, Change, SETTLE, Wanted};
use crate::convert;
use crate::request::CalledAs;

/// This host.
pub(in crate::http) struct Local(pub(in crate::http) Arc<Shell>);

impl Local {
    fn name(&self) -> &str {
        &self.0.options.agent.name
    }

    /// Refuses what is meant for another host.
    fn is_here(&self, agent_id: Option<&str>) -> Result<()> {
        match agent_id {
            Some(other) if other != self.name() => Err(Error::new(
                ErrorCode::HostNotFound,
                format!("{other:?} is another host"),
            )
            .because(format!(
                "this is {}, which knows its own VMs only",
                self.name()
            ))
            .hint("ask Core, or that host")),
            _ => Ok(()),
        }
    }

    fn vm(&self, vm: message::Vm) -> BatwaVm {
        let state = vm.state();
        let addresses = vm.nics.into_iter().flat_map(|card| card.addresses);
        BatwaVm {
            state_reason: Some(vm.state_reason).filter(|reason| !reason.is_empty()),
            release: vm.image,
            cpus: vm.vcpus,
            memory_bytes: vm.memory_bytes,
            disk_bytes: vm.disks.iter().map(|disk| disk.size_bytes).sum(),
            hostname: self.name().to_owned(),
            agent_id: self.name().to_owned(),
            ..BatwaVm::new(vm.id, vm.name, state)
        }
        .addressed(addresses)
    }

    /// The operation once it has ended, or as it is after a while.
    async fn settled(&self, caller: &Principal, begun: OperationView) -> Result<Begun> {
        let id = begun.operation.id.to_string();
        let mut latest = begun;
        let mut watch = self
            .0
            .use_cases
            .watch_operation
            .execute(caller, &id)
            .await?;
        let following = async {
            while let Some(view) = watch.next().await {
                latest = view;
            }
        };
        drop(tokio::time::timeout(SETTLE, following).await);
        Ok(Begun {
            operation: convert::operation(&latest),
            agent_id: self.name().to_owned(),
            placement: None,
        })
    }
}

fn principal(asker: &Asker) -> Result<Principal> {
    asker
        .extensions
        .get()
        .cloned()
        .ok_or_else(|| Error::new(ErrorCode::Unauthenticated, "the request has no identity"))
}

#[async_trait]
impl Backend for Local {
    async fn admit(&self, asker: &mut Asker, route: &'static Route) -> Result<()> {
        // The guard of all routes has let it in by the same table.
        route.access.check(&principal(asker)?)
    }

    async fn agents(&self, asker: &Asker) -> Result<Vec<BatwaAgent>> {
        let caller = principal(asker)?;
        let view = self.0.use_cases.get_status.execute(&caller).await?;
        let status = convert::status(&view, &self.0.options.agent);
        Ok(vec![BatwaAgent {
            agent_id: status.name.clone(),
            hostname: status.name,
            host_id: None,
            status: "online".to_owned(),
            state: "online".to_owned(),
            state_reason: None,
            last_heartbeat: None,
            vm_count: view.vms.values().sum(),
            version: status.agent_version,
            api_url: None,
        }])
    }

    async fn agent(&self, asker: &Asker, agent_id: &str) -> Result<BatwaAgent> {
        self.is_here(Some(agent_id))?;
        let mut agents = self.agents(asker).await?;
        agents
            .pop()
            .ok_or_else(|| Error::internal("a host does not know itself"))
    }

    async fn unregister(&self, asker: &Asker, agent_id: &str, _: bool) -> Result<()> {
        principal(asker)?;
        self.is_here(Some(agent_id))?;
        Err(Error::new(
            ErrorCode::WrongState,
            "a host is not taken out of its fleet by a key of its own",
        )
        .because("this is an agent; the fleet's list is Core's")
        .hint("on this host: ghost-agent unenroll; at Core: ghostctl host remove NAME"))
    }

    async fn vms(&self, asker: &Asker, wanted: Wanted) -> Result<Vec<BatwaVm>> {
        let caller = principal(asker)?;
        self.is_here(wanted.agent_id.as_deref())?;
        let cases = &self.0.use_cases;
        let found = cases.list_vms.execute(&caller, &Default::default()).await?;
        Ok(found
            .iter()
            .filter(|one| {
                wanted
                    .name
                    .as_deref()
                    .is_none_or(|name| one.vm.name.as_str() == name)
            })
            .map(|one| self.vm(convert::vm(one)))
            .collect())
    }

    async fn create(
        &self,
        asker: &Asker,
        agent_id: Option<String>,
        request: message::CreateVmRequest,
    ) -> Result<Begun> {
        let caller = principal(asker)?;
        self.is_here(agent_id.as_deref())?;
        let command = convert::create_vm(request)?;
        let begun = self.0.use_cases.create_vm.execute(&caller, command).await?;
        self.settled(&caller, begun).await
    }

    async fn change(&self, asker: &Asker, agent_id: &str, change: Change) -> Result<Begun> {
        let caller = principal(asker)?;
        self.is_here(Some(agent_id))?;
        let cases = &self.0.use_cases;
        let begun = match change {
            Change::Start(request) => {
                let command = PowerCommand {
                    vm: request.vm,
                    request_id: convert::request_id(&request.request_id)?,
                };
                cases.start_vm.execute(&caller, command).await?
            }
            Change::Stop(request) => {
                let command = convert::stop(
                    request.vm,
                    request.force,
                    request.timeout.as_ref(),
                    &request.request_id,
                )?;
                cases.stop_vm.execute(&caller, command).await?
            }
            Change::Delete(request) => {
                let command = DeleteVmCommand {
                    vm: request.vm,
                    force: request.force,
                    expected_generation: None,
                    request_id: convert::request_id(&request.request_id)?,
                };
                cases.delete_vm.execute(&caller, command).await?
            }
        };
        self.settled(&caller, begun).await
    }

    async fn execute(
        &self,
        asker: &Asker,
        agent_id: &str,
        request: message::ExecStart,
    ) -> Result<ExecSession> {
        let caller = principal(asker)?;
        self.is_here(Some(agent_id))?;
        let request_id = asker.extensions.get::<CalledAs>();
        let target = GuestTarget {
            vm: request.vm.clone(),
            request_id: request_id.map(|id| id.0.clone()).unwrap_or_default(),
        };
        let request = convert::exec_request(request)?;
        let exec = &self.0.use_cases.exec_in_guest;
        exec.execute(&caller, &target, request).await
    }

    async fn called_off(&self, asker: Asker) -> Error {
        match asker.extensions.get::<PresentedKey>().cloned() {
            Some(key) => called_off(Arc::clone(&self.0), key).await,
            None => shutting_down(&self.0).await,
        }
    }
}
