//! VMs of all hosts, from memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use ghost_domain::fleet::VmSummary;
use ghost_domain::{HostId, Result, Role, TenantName};

use super::fleet::{Fleet, HostView};
use crate::domain::{Caller, Inventory};

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
    /// The host.
    pub host: HostView,
    inventory: Arc<Inventory>,
    wanted: Arc<ListVmsQuery>,
}

impl ListedHost {
    /// The VMs, by id.
    pub fn vms(&self) -> impl Iterator<Item = &VmSummary> {
        self.inventory.vms.values().filter(|vm| {
            self.wanted
                .name
                .as_ref()
                .is_none_or(|name| vm.name == *name)
                && self
                    .wanted
                    .tags
                    .iter()
                    .all(|(key, value)| vm.tags.get(key) == Some(value))
        })
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
        let wanted = Arc::new(query);
        let mut views = self.fleet.host_views(|host| {
            caller.sees_host(host.id, &host.tenant)
                && one.is_none_or(|one| one == host.id)
                && wanted
                    .tenant
                    .as_ref()
                    .is_none_or(|tenant| *tenant == host.tenant)
        });
        views.sort_by(|a, b| {
            (&a.record.tenant, a.record.name.as_str())
                .cmp(&(&b.record.tenant, b.record.name.as_str()))
        });
        Ok(views
            .into_iter()
            .filter_map(|host| {
                let inventory = host.inventory.clone()?;
                Some(ListedHost {
                    host,
                    inventory,
                    wanted: Arc::clone(&wanted),
                })
            })
            .collect())
    }
}
