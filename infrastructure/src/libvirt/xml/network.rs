//! Network XML. Source of the elements: <https://libvirt.org/formatnetwork.html>.

use std::net::{IpAddr, Ipv4Addr};

use ghost_domain::{Error, ErrorCode, Result};

use super::METADATA_NAMESPACE;
use super::tree::Element;

/// A NAT network to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NetworkPlan {
    /// Its name in libvirt.
    pub(crate) libvirt_name: String,
    /// The bridge device; at most 15 bytes, as the kernel has it.
    pub(crate) bridge: String,
    /// The network's address; always a /24.
    pub(crate) network: Ipv4Addr,
}

impl NetworkPlan {
    fn host(&self, last: u8) -> Ipv4Addr {
        let [a, b, c, _] = self.network.octets();
        Ipv4Addr::new(a, b, c, last)
    }
}

/// Renders the network.
pub(crate) fn network_xml(plan: &NetworkPlan) -> Element {
    Element::new("network")
        .child(Element::new("name").text(&plan.libvirt_name))
        .child(
            Element::new("metadata")
                .child(Element::in_namespace(METADATA_NAMESPACE, "network").with("managed", "yes")),
        )
        .child(Element::new("forward").with("mode", "nat"))
        .child(
            Element::new("bridge")
                .with("name", &plan.bridge)
                .with("stp", "on")
                .with("delay", "0"),
        )
        .child(
            Element::new("ip")
                .with("address", plan.host(1).to_string())
                .with("netmask", "255.255.255.0")
                .child(
                    Element::new("dhcp").child(
                        Element::new("range")
                            .with("start", plan.host(2).to_string())
                            .with("end", plan.host(254).to_string()),
                    ),
                ),
        )
}

/// What we make of a network's XML.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ParsedNetwork {
    /// libvirt's forward mode; `isolated` where there is none.
    pub(crate) mode: String,
    /// The bridge device.
    pub(crate) bridge: Option<String>,
    /// Every IPv4 network of it: address and prefix length.
    pub(crate) networks: Vec<(Ipv4Addr, u8)>,
    /// First and last address of the first DHCP range.
    pub(crate) dhcp_range: Option<(IpAddr, IpAddr)>,
    /// Made by us.
    pub(crate) ours: bool,
}

/// Reads a network's XML.
///
/// # Errors
/// `HypervisorFailed` when it is not a network at all.
pub(crate) fn parse_network(xml: &str) -> Result<ParsedNetwork> {
    let root = Element::parse(xml)?;
    if root.name != "network" {
        return Err(
            Error::new(ErrorCode::HypervisorFailed, "cannot read libvirt's XML")
                .because("its root is not a network"),
        );
    }
    let networks = root.all("ip").filter_map(address).collect();
    let dhcp_range = root
        .all("ip")
        .filter_map(|ip| ip.at(&["dhcp", "range"]))
        .find_map(|range| {
            Some((
                range.attribute("start")?.parse().ok()?,
                range.attribute("end")?.parse().ok()?,
            ))
        });
    Ok(ParsedNetwork {
        mode: root.find("forward").map_or_else(
            || "isolated".to_owned(),
            |forward| forward.attribute("mode").unwrap_or("nat").to_owned(),
        ),
        bridge: root
            .find("bridge")
            .and_then(|bridge| bridge.attribute("name"))
            .map(str::to_owned),
        networks,
        dhcp_range,
        ours: root.find("metadata").is_some_and(|metadata| {
            metadata
                .all_in(METADATA_NAMESPACE, "network")
                .next()
                .is_some()
        }),
    })
}

fn address(ip: &Element) -> Option<(Ipv4Addr, u8)> {
    let address: Ipv4Addr = ip.attribute("address")?.parse().ok()?;
    let prefix = match (ip.attribute("prefix"), ip.attribute("netmask")) {
        (Some(prefix), _) => prefix.parse().ok().filter(|prefix| *prefix <= 32)?,
        (None, Some(mask)) => {
            let mask = u32::from(mask.parse::<Ipv4Addr>().ok()?);
            u8::try_from(mask.leading_ones()).ok()?
        }
        // libvirt takes the address class; a /8 is the widest that it can mean.
        (None, None) => 8,
    };
    let bits = u32::from(address) & prefix_mask(prefix);
    Some((Ipv4Addr::from(bits), prefix))
}

/// The network mask of a prefix length.
pub(crate) fn prefix_mask(prefix: u8) -> u32 {
    u32::MAX
        .checked_shl(32 - u32::from(prefix.min(32)))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let plan = NetworkPlan {
            libvirt_name: "ghost-default".into(),
            bridge: "ghost0".into(),
            network: Ipv4Addr::new(10, 113, 0, 0),
        };
        let parsed = parse_network(&network_xml(&plan).to_xml().unwrap()).unwrap();
        assert_eq!(parsed.mode, "nat");
        assert_eq!(parsed.bridge.as_deref(), Some("ghost0"));
        assert_eq!(parsed.networks, [(Ipv4Addr::new(10, 113, 0, 0), 24)]);
        assert_eq!(
            parsed.dhcp_range,
            Some((
                IpAddr::from([10, 113, 0, 2]),
                IpAddr::from([10, 113, 0, 254])
            ))
        );
        assert!(parsed.ours);
    }

    #[test]
    fn foreign_networks_are_understood() {
        let parsed = parse_network(
            "<network><name>x</name><bridge name='br9'/><ip address='10.1.2.3' prefix='16'/>\
             <ip family='ipv6' address='fd00::1' prefix='64'/><ip address='bad'/></network>",
        )
        .unwrap();
        assert_eq!(parsed.mode, "isolated");
        assert_eq!(parsed.networks, [(Ipv4Addr::new(10, 1, 0, 0), 16)]);
        assert!(!parsed.ours && parsed.dhcp_range.is_none());
    }
}
