//! See networks.

use std::sync::Arc;

use ghost_domain::{
    Error, ErrorCode, Lease, Network, NetworkName, Principal, Result, Role, VmName,
};

use crate::application::Ports;
use crate::registry::Registry;

/// A network, its leases, and whose they are.
#[derive(Clone, Debug)]
pub struct NetworkView {
    /// The network.
    pub network: Network,
    /// Leases, each with the VM whose card it is.
    pub leases: Vec<(Lease, Option<VmName>)>,
}

/// Lists networks.
pub struct ListNetworks {
    pub(crate) registry: Arc<Registry>,
    pub(crate) ports: Ports,
}

impl ListNetworks {
    /// All networks, with leases of the active ones.
    ///
    /// # Errors
    /// `HypervisorUnavailable`.
    pub async fn execute(&self, principal: &Principal) -> Result<Vec<NetworkView>> {
        principal.require(Role::Viewer)?;
        let mut views = Vec::new();
        for network in self.ports.networks.list().await? {
            let leases = if network.active {
                self.ports.networks.leases(&network.name).await?
            } else {
                Vec::new()
            };
            let leases = self.registry.read(|model| {
                leases
                    .into_iter()
                    .map(|lease| {
                        let owner = model
                            .vms
                            .values()
                            .find(|entry| {
                                entry
                                    .vm
                                    .spec
                                    .interfaces
                                    .iter()
                                    .any(|card| card.mac == lease.mac)
                            })
                            .map(|entry| entry.vm.name.clone());
                        (lease, owner)
                    })
                    .collect()
            });
            views.push(NetworkView { network, leases });
        }
        Ok(views)
    }
}

/// Shows one network.
pub struct GetNetwork {
    pub(crate) list: ListNetworks,
}

impl GetNetwork {
    /// The network.
    ///
    /// # Errors
    /// `InvalidName`, `NetworkNotFound`, `HypervisorUnavailable`.
    pub async fn execute(&self, principal: &Principal, name: &str) -> Result<NetworkView> {
        let name = NetworkName::new(name)?;
        let views = self.list.execute(principal).await?;
        views.into_iter().find(|view| view.network.name == name).ok_or_else(|| {
            Error::new(ErrorCode::NetworkNotFound, format!("there is no network {name}"))
                .hint("see which there are: ghostctl network list; `default` is made when the first VM needs it")
        })
    }
}
