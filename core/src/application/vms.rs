//! VMs of all hosts, from memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use ghost_domain::fleet::VmSummary;
use ghost_domain::{HostId, Result, Role, TenantName, Timestamp, VmId};

use super::fleet::{Fleet, ToldHost};
use crate::domain::{Caller, Form, HostRecord, HostState, ToldVms, Written};

/// Which VMs to list.
#[derive(Clone, Debug, Default)]
pub struct ListVmsQuery {
    /// Only of this tenant's hosts.
    pub tenant: Option<TenantName>,
    /// Only of this host.
    pub host: Option<String>,
    /// Only with all of these tags.
    pub tags: BTreeMap<String, String>,
    /// Only of this name.
    pub name: Option<String>,
}

/// The VMs of one host that were asked for. Nothing is copied: twenty thousand VMs are listed in
/// the time that it takes to write them down.
#[derive(Clone, Debug)]
pub struct ListedHost {
    /// The host's record.
    pub record: Arc<HostRecord>,
    /// Its state.
    pub state: HostState,
    /// When it was last heard.
    pub last_heard_at: Option<Timestamp>,
    vms: ToldVms,
    wanted: Arc<ListVmsQuery>,
}

impl ListVmsQuery {
    fn wants(&self, vm: &VmSummary) -> bool {
        self.name.as_ref().is_none_or(|name| vm.name == *name)
            && self
                .tags
                .iter()
                .all(|(key, value)| vm.tags.get(key) == Some(value))
    }

    /// Whether every VM of a host that is listed at all is.
    fn wants_all(&self) -> bool {
        self.name.is_none() && self.tags.is_empty()
    }
}

impl ListedHost {
    /// What `write` wrote of each VM, or would, by id: `each` parts for each VM. What is written
    /// stays with the VMs until they change.
    pub fn written(
        &self,
        form: Form,
        each: usize,
        write: impl FnOnce(&BTreeMap<VmId, VmSummary>) -> Written,
    ) -> impl Iterator<Item = &[u8]> {
        let parts = self.vms.written(form, write).parts();
        // Nothing of the VMs themselves is looked at where all are wanted.
        let (all, some) = if self.wanted.wants_all() {
            (Some(parts), None)
        } else {
            let wanted = self.vms.values().flat_map(move |vm| {
                let wanted = self.wanted.wants(vm);
                std::iter::repeat_n(wanted, each)
            });
            (None, Some(parts.zip(wanted)))
        };
        let some = some.into_iter().flatten();
        all.into_iter()
            .flatten()
            .chain(some.filter_map(|(part, wanted)| wanted.then_some(part)))
    }
}

impl From<(ToldHost, &Arc<ListVmsQuery>)> for ListedHost {
    fn from((host, wanted): (ToldHost, &Arc<ListVmsQuery>)) -> Self {
        Self {
            record: host.record,
            state: host.state,
            last_heard_at: host.last_heard_at,
            vms: host.inventory.vms.clone(),
            wanted: Arc::clone(wanted),
        }
    }
}

/// Lists VMs.
#[derive(Debug)]
pub struct ListVms {
    /// The records.
    pub fleet: Arc<Fleet>,
}

impl ListVms {
    /// By tenant and name of their hosts.
    ///
    /// # Errors
    /// `HostNotFound`, `PermissionDenied`.
    pub fn execute(&self, caller: &Caller, query: ListVmsQuery) -> Result<Vec<ListedHost>> {
        caller.require(Role::Viewer)?;
        let one: Option<HostId> = match &query.host {
            Some(selector) => Some(
                self.fleet
                    .read(|state| state.find_host(caller, selector).map(|host| host.id))?,
            ),
            None => None,
        };
        let query = Arc::new(query);
        let wanted = |host: &HostRecord| {
            caller.sees_host(host.id, &host.tenant)
                && query
                    .tenant
                    .as_ref()
                    .is_none_or(|tenant| *tenant == host.tenant)
        };
        let told = match one {
            Some(one) => {
                let mut told = Vec::from_iter(self.fleet.told_host(one));
                told.retain(|host| wanted(&host.record));
                told
            }
            None => self.fleet.told_hosts(wanted),
        };
        Ok(told.into_iter().map(|host| (host, &query).into()).collect())
    }
}
