//! Networks for VMs.

use async_trait::async_trait;

use crate::{Lease, Network, NetworkName, Result};

/// Makes and reads networks. Networks that are not ours are used, never changed.
#[cfg_attr(feature = "mocks", mockall::automock)]
#[async_trait]
pub trait NetworkProvider: Send + Sync {
    /// Makes sure that the network is there and up, making the NAT network `default` with DHCP
    /// where it is absent, in a range that overlaps none of the host's routes.
    ///
    /// # Errors
    /// `NetworkNotFound` for another name that libvirt does not know; `NetworkFailed`,
    /// `HypervisorUnavailable`.
    async fn ensure(&self, name: &NetworkName) -> Result<Network>;

    /// All networks that VMs can be attached to.
    async fn list(&self) -> Result<Vec<Network>>;

    /// The leases that the network's DHCP server gave.
    async fn leases(&self, name: &NetworkName) -> Result<Vec<Lease>>;
}
