//! The simulated networks: a NAT network `default`, and leases for the cards of running guests.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ghost_domain::ports::NetworkProvider;
use ghost_domain::{Error, ErrorCode, Lease, Network, NetworkName, Result, Timestamp};

use super::command::Call;
use super::hypervisor::Inner;
use super::world::{DEFAULT_NETWORK, World, now};

/// Third octet of the simulated network, 10.113.0.0/24.
const THIRD_OCTET: u8 = 0;
/// How long a lease holds.
const LEASE: Duration = Duration::from_secs(3600);

/// Networks of the simulation.
#[derive(Clone)]
pub struct SimulatedNetworks {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for SimulatedNetworks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("SimulatedNetworks")
            .field(&self.inner.options.directory)
            .finish()
    }
}

impl SimulatedNetworks {
    pub(super) const fn new(inner: Arc<Inner>) -> Self {
        Self { inner }
    }
}

fn address(third: u8, last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 113, third, last)
}

fn network(name: NetworkName, third: u8) -> Network {
    Network {
        name,
        libvirt_name: DEFAULT_NETWORK.into(),
        mode: "nat".into(),
        bridge: Some("ghost0".into()),
        subnet: Some(format!("{}/24", address(third, 0))),
        dhcp_range: Some((
            IpAddr::V4(address(third, 2)),
            IpAddr::V4(address(third, 254)),
        )),
        active: true,
    }
}

fn unknown(name: &NetworkName) -> Error {
    Error::new(
        ErrorCode::NetworkNotFound,
        format!("there is no network {name}"),
    )
    .hint("see what there is: ghostctl network list")
}

fn third_octet(world: &World, name: &NetworkName) -> Result<u8> {
    world
        .settings
        .networks
        .get(name.as_str())
        .copied()
        .ok_or_else(|| unknown(name))
}

#[async_trait]
impl NetworkProvider for SimulatedNetworks {
    async fn ensure(&self, name: &NetworkName) -> Result<Network> {
        let name = name.clone();
        self.inner
            .call(Call::EnsureNetwork, None, move |world| {
                if name.as_str() == "default" && !world.settings.networks.contains_key("default") {
                    world.set(|settings| {
                        settings.networks.insert("default".into(), THIRD_OCTET);
                    })?;
                }
                let third = third_octet(world, &name)?;
                Ok(network(name, third))
            })
            .await
    }

    async fn list(&self) -> Result<Vec<Network>> {
        self.inner
            .call(Call::ListNetworks, None, |world| {
                world
                    .settings
                    .networks
                    .iter()
                    .map(|(name, third)| Ok(network(NetworkName::new(name.as_str())?, *third)))
                    .collect()
            })
            .await
    }

    async fn leases(&self, name: &NetworkName) -> Result<Vec<Lease>> {
        let name = name.clone();
        self.inner
            .call(Call::Leases, None, move |world| {
                let third = third_octet(world, &name)?;
                let expires = Timestamp::from_unix_millis(now()).after(LEASE);
                world
                    .settings
                    .leases
                    .iter()
                    .map(|(mac, last)| {
                        Ok(Lease {
                            mac: mac.parse()?,
                            address: IpAddr::V4(address(third, *last)),
                            hostname: None,
                            expires_at: Some(expires),
                        })
                    })
                    .collect()
            })
            .await
    }
}
