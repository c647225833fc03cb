//! Networks and the leases their DHCP server gave.

use std::net::IpAddr;

use crate::{MacAddress, NetworkName, Timestamp};

/// A network that VMs can be attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// Its name in Ghost; `default` is the NAT network that Ghost makes.
    pub name: NetworkName,
    /// The libvirt network behind it.
    pub libvirt_name: String,
    /// `nat`, `bridge`, …: libvirt's forward mode.
    pub mode: String,
    /// The bridge device on the host, if there is one.
    pub bridge: Option<String>,
    /// The network in CIDR form, such as `10.113.0.0/24`.
    pub subnet: Option<String>,
    /// First and last address that DHCP gives.
    pub dhcp_range: Option<(IpAddr, IpAddr)>,
    /// Whether it is up.
    pub active: bool,
}

/// An address that DHCP gave to a MAC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Who has it.
    pub mac: MacAddress,
    /// The address.
    pub address: IpAddr,
    /// The name that the guest sent, as it sent it: hostile input, escape before showing.
    pub hostname: Option<String>,
    /// When it ends; `None` for a lease without end.
    pub expires_at: Option<Timestamp>,
}
