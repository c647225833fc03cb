//! [`NetworkProvider`] on libvirt's networks.
//!
//! Ghost's network `default` is a libvirt network of our own (`ghost-default`), made at first use:
//! NAT and DHCP in a /24 that overlaps nothing that the host routes or that another libvirt network
//! uses. Every other libvirt network with a legal name can be used as it is and is never changed;
//! libvirt's own network called `default` cannot be reached by that name.

use std::net::Ipv4Addr;
use std::sync::Arc;

use async_trait::async_trait;
use ghost_domain::ports::NetworkProvider;
use ghost_domain::{Error, ErrorCode, Lease, Network, NetworkName, Result, Timestamp, VmId};
use uuid::Uuid;
use virt::error::{Error as VirtError, ErrorNumber};
use virt::network::Network as Handle;

use super::core::Core;
use super::ffi::{self, Guarded};
use super::link::unavailable;
use super::session::{Session, is};
use super::xml::{NetworkPlan, ParsedNetwork, network_xml, parse_network, prefix_mask};

/// Ghost's name of its own network.
const DEFAULT: &str = "default";
/// libvirt puts a number in place of `%d`, the first that no bridge has.
const BRIDGE_TEMPLATE: &str = "ghost%d";
/// How many ranges are tried where the kernel knows of an overlap that we did not see.
const ATTEMPTS: usize = 4;
/// The order of all changes to networks: they are made one after the other.
const ORDER: VmId = VmId::from_uuid(Uuid::nil());

/// The networks behind libvirt.
#[derive(Clone)]
pub struct LibvirtNetworks {
    core: Arc<Core>,
}

impl std::fmt::Debug for LibvirtNetworks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LibvirtNetworks")
            .field("uri", &self.core.link.uri())
            .finish_non_exhaustive()
    }
}

impl LibvirtNetworks {
    pub(super) const fn new(core: Arc<Core>) -> Self {
        Self { core }
    }
}

fn not_found(name: &str) -> Error {
    Error::new(
        ErrorCode::NetworkNotFound,
        format!("there is no network {name}"),
    )
    .hint("see what there is: ghostctl network list")
}

impl Session<'_> {
    fn network_error(&self, doing: &str, error: &VirtError) -> Error {
        if self.connection.is_dead() {
            return self.error(doing, error);
        }
        Error::new(ErrorCode::NetworkFailed, format!("cannot {doing}"))
            .because(error.message())
            .hint("look at the host's network and firewall: ghost-agent doctor")
    }

    fn libvirt_name<'a>(&'a self, name: &'a NetworkName) -> &'a str {
        if name.as_str() == DEFAULT {
            &self.core.options.default_network
        } else {
            name.as_str()
        }
    }

    /// Ghost's name of a libvirt network, if it has one.
    fn ghost_name(&self, libvirt_name: &str) -> Option<NetworkName> {
        if libvirt_name == self.core.options.default_network {
            return NetworkName::new(DEFAULT).ok();
        }
        NetworkName::new(libvirt_name)
            .ok()
            .filter(|name| name.as_str() != DEFAULT)
    }

    fn find_network(&self, libvirt_name: &str) -> Result<Option<Guarded<Handle>>> {
        match self.libvirt().lookup_network_by_name(libvirt_name) {
            Ok(network) => Ok(Some(Guarded::new(network))),
            Err(error) if is(&error, ErrorNumber::NoNetwork) && !self.connection.is_dead() => {
                Ok(None)
            }
            Err(error) => Err(self.network_error("look for a network", &error)),
        }
    }

    fn read_network(&self, network: &Handle) -> Result<ParsedNetwork> {
        let xml = network
            .xml_desc(0)
            .map_err(|error| self.network_error("read a network", &error))?;
        parse_network(&xml)
    }

    fn describe(&self, name: NetworkName, libvirt_name: &str, network: &Handle) -> Result<Network> {
        let parsed = self.read_network(network)?;
        let active = network
            .is_active()
            .map_err(|error| self.network_error("ask whether a network is up", &error))?;
        Ok(Network {
            name,
            libvirt_name: libvirt_name.to_owned(),
            mode: parsed.mode,
            bridge: parsed.bridge,
            subnet: parsed
                .networks
                .first()
                .map(|(address, prefix)| format!("{address}/{prefix}")),
            dhcp_range: parsed.dhcp_range,
            active,
        })
    }

    fn ensure_network(&self, name: &NetworkName) -> Result<Network> {
        let libvirt_name = self.libvirt_name(name);
        let network = match self.find_network(libvirt_name)? {
            Some(network) => {
                self.bring_up(libvirt_name, &network)?;
                network
            }
            None if name.as_str() == DEFAULT => self.make_network(libvirt_name)?,
            None => return Err(not_found(name.as_str())),
        };
        self.describe(name.clone(), libvirt_name, &network)
    }

    fn bring_up(&self, libvirt_name: &str, network: &Handle) -> Result<()> {
        let active = network
            .is_active()
            .map_err(|error| self.network_error("ask whether a network is up", &error))?;
        if active {
            return Ok(());
        }
        if !self.read_network(network)?.ours {
            return Err(Error::new(
                ErrorCode::NetworkFailed,
                format!("the network {libvirt_name} is down"),
            )
            .because("Ghost does not start networks that it did not make")
            .hint(format!("start it: virsh net-start {libvirt_name}")));
        }
        self.start_network(libvirt_name, network)
    }

    fn start_network(&self, libvirt_name: &str, network: &Handle) -> Result<()> {
        match network.create() {
            Ok(()) => Ok(()),
            Err(_) if matches!(network.is_active(), Ok(true)) => Ok(()),
            Err(error) => {
                Err(self.network_error(&format!("start the network {libvirt_name}"), &error))
            }
        }
    }

    fn make_network(&self, libvirt_name: &str) -> Result<Guarded<Handle>> {
        let mut used = self.networks_in_use()?;
        let mut failure = None;
        for _ in 0..ATTEMPTS {
            let Some(range) = choose(&used) else {
                return Err(
                    Error::new(ErrorCode::NetworkFailed, "no range is left for a network")
                        .because("the host routes or uses every private /24 that Ghost may take")
                        .hint(
                            "make a network by hand (virsh net-define) and name it with --network",
                        ),
                );
            };
            let plan = NetworkPlan {
                libvirt_name: libvirt_name.to_owned(),
                bridge: BRIDGE_TEMPLATE.to_owned(),
                network: range,
            };
            let network = self
                .libvirt()
                .define_network_xml(&network_xml(&plan).to_xml()?)
                .map(Guarded::new)
                .map_err(|error| self.network_error("make a network", &error))?;
            match self.start_network(libvirt_name, &network) {
                Ok(()) => {
                    network.set_autostart(true).map_err(|error| {
                        self.network_error("make a network start with the host", &error)
                    })?;
                    tracing::info!(libvirt_name, %range, "made the NAT network");
                    return Ok(network);
                }
                Err(error) => {
                    // Half a network must not stay; with the next range it may work.
                    if let Err(error) = network.undefine() {
                        tracing::warn!(%error, libvirt_name, "a failed network is left behind");
                    }
                    if error.code() != ErrorCode::NetworkFailed {
                        return Err(error);
                    }
                    used.push((range, 24));
                    failure = Some(error);
                }
            }
        }
        Err(failure.unwrap_or_else(|| unavailable("no network could be made")))
    }

    /// Every IPv4 network that the host routes, names servers in, or has in libvirt.
    fn networks_in_use(&self) -> Result<Vec<(Ipv4Addr, u8)>> {
        let mut used = routes(&std::fs::read_to_string("/proc/net/route").unwrap_or_default());
        used.extend(name_servers(
            &std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
        ));
        let networks = self
            .libvirt()
            .list_all_networks(0)
            .map_err(|error| self.network_error("list the networks", &error))?;
        for network in networks.into_iter().map(Guarded::new) {
            used.extend(self.read_network(&network)?.networks);
        }
        Ok(used)
    }

    fn list_networks(&self) -> Result<Vec<Network>> {
        let networks = self
            .libvirt()
            .list_all_networks(0)
            .map_err(|error| self.network_error("list the networks", &error))?;
        let mut found = Vec::new();
        for network in networks.into_iter().map(Guarded::new) {
            let Ok(libvirt_name) = network.name() else {
                continue;
            };
            let Some(name) = self.ghost_name(&libvirt_name) else {
                continue;
            };
            match self.describe(name, &libvirt_name, &network) {
                Ok(described) => found.push(described),
                Err(error) if error.code() == ErrorCode::HypervisorUnavailable => {
                    return Err(error);
                }
                // It went away while we looked, or is odd; the others are shown all the same.
                Err(error) => tracing::warn!(libvirt_name, %error, "a network cannot be read"),
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    fn leases_of(&self, name: &NetworkName) -> Result<Vec<Lease>> {
        let network = self
            .find_network(self.libvirt_name(name))?
            .ok_or_else(|| not_found(name.as_str()))?;
        let raw = match ffi::dhcp_leases(&network) {
            Ok(raw) => raw,
            // A network without DHCP of libvirt's, or one that is down, gave none.
            Err(error)
                if is(&error, ErrorNumber::OperationInvalid)
                    || is(&error, ErrorNumber::NoSupport)
                    || is(&error, ErrorNumber::OperationUnsupported) =>
            {
                Vec::new()
            }
            Err(error) => return Err(self.network_error("read a network's leases", &error)),
        };
        Ok(raw
            .into_iter()
            .filter_map(|lease| {
                Some(Lease {
                    mac: lease.mac.parse().ok()?,
                    address: lease.address.parse().ok()?,
                    hostname: lease.hostname,
                    expires_at: (lease.expires > 0)
                        .then(|| Timestamp::from_unix_millis(lease.expires.saturating_mul(1000))),
                })
            })
            .collect())
    }
}

/// Reads `/proc/net/route`: hexadecimal, in the host's byte order. The default route covers
/// everything and says nothing.
fn routes(table: &str) -> Vec<(Ipv4Addr, u8)> {
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let destination = u32::from_str_radix(fields.nth(1)?, 16).ok()?;
            let mask = u32::from_str_radix(fields.nth(5)?, 16).ok()?;
            let address = Ipv4Addr::from(destination.to_ne_bytes());
            let prefix = u32::from(Ipv4Addr::from(mask.to_ne_bytes())).leading_ones();
            Some((address, u8::try_from(prefix).ok()?))
        })
        .filter(|(_, prefix)| *prefix > 0)
        .collect()
}

/// A name server may lie behind the default route in a private range; its range stays free.
fn name_servers(resolv_conf: &str) -> Vec<(Ipv4Addr, u8)> {
    resolv_conf
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some("nameserver")).then_some(())?;
            Some((words.next()?.parse().ok()?, 32))
        })
        .collect()
}

fn overlap(a: (Ipv4Addr, u8), b: (Ipv4Addr, u8)) -> bool {
    let mask = prefix_mask(a.1.min(b.1));
    u32::from(a.0) & mask == u32::from(b.0) & mask
}

/// The first private /24 that overlaps nothing in use. Those that people use least come first.
fn choose(used: &[(Ipv4Addr, u8)]) -> Option<Ipv4Addr> {
    let tens = (113..=255)
        .chain(0..=112)
        .flat_map(|second| (0..=255).map(move |third| Ipv4Addr::new(10, second, third, 0)));
    let twelves = (16..=31)
        .rev()
        .flat_map(|second| (0..=255).map(move |third| Ipv4Addr::new(172, second, third, 0)));
    let sixteens = (0..=255)
        .rev()
        .map(|third| Ipv4Addr::new(192, 168, third, 0));
    tens.chain(twelves)
        .chain(sixteens)
        .find(|range| !used.iter().any(|other| overlap((*range, 24), *other)))
}

#[async_trait]
impl NetworkProvider for LibvirtNetworks {
    async fn ensure(&self, name: &NetworkName) -> Result<Network> {
        let name = name.clone();
        self.core
            .call("ensure network", Some(ORDER), move |session| {
                session.ensure_network(&name)
            })
            .await
    }

    async fn list(&self) -> Result<Vec<Network>> {
        self.core
            .call("list networks", None, |session| session.list_networks())
            .await
    }

    async fn leases(&self, name: &NetworkName) -> Result<Vec<Lease>> {
        let name = name.clone();
        self.core
            .call("leases", None, move |session| session.leases_of(&name))
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
        eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
        eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
        tun0\t0000000A\t00000000\t0001\t0\t0\t0\t000000FF\t0\t0\t0\n\
        broken\n";

    #[test]
    fn routes_are_read_without_the_default_one() {
        assert_eq!(
            routes(TABLE),
            [
                (Ipv4Addr::new(192, 0, 2, 0), 24),
                (Ipv4Addr::new(10, 0, 0, 0), 8)
            ]
        );
        assert_eq!(
            name_servers("search x\nnameserver 10.113.0.53\nnameserver fe80::1\n"),
            [(Ipv4Addr::new(10, 113, 0, 53), 32)]
        );
    }

    #[test]
    fn the_range_overlaps_nothing() {
        assert_eq!(choose(&[]), Some(Ipv4Addr::new(10, 113, 0, 0)));
        let used = [
            (Ipv4Addr::new(10, 113, 0, 53), 32),
            (Ipv4Addr::new(10, 113, 1, 128), 25),
        ];
        assert_eq!(choose(&used), Some(Ipv4Addr::new(10, 113, 2, 0)));
        // A company that routes all of 10/8 over a tunnel, and 172.16/12 too.
        let mut wide = routes(TABLE);
        assert_eq!(choose(&wide), Some(Ipv4Addr::new(172, 31, 0, 0)));
        wide.push((Ipv4Addr::new(172, 16, 0, 0), 12));
        assert_eq!(choose(&wide), Some(Ipv4Addr::new(192, 168, 255, 0)));
        wide.push((Ipv4Addr::new(192, 168, 0, 0), 16));
        assert_eq!(choose(&wide), None);
    }
}
