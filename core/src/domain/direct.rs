//! Which addresses of a host Core may dial itself.
//!
//! A host names them, and a host may be hostile: without rules Core would knock wherever somebody
//! wants it to (server-side request forgery). So an address is dialled only where the owner of Core
//! allows its network and port, and never where it leads to Core's own machine, to a link's own
//! segment (metadata services of clouds answer at 169.254.169.254), to many at once, or to an IPv4
//! address in IPv6's clothes.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use ghost_domain::{Error, ErrorCode, Result};

/// A range of addresses, as RFC 4632 and RFC 4291 write it: `10.0.0.0/8`, `fd00::/8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AddressRange {
    first: IpAddr,
    prefix: u8,
}

impl AddressRange {
    /// The range of the addresses that begin with the first `prefix` bits of `address`. A prefix that
    /// is longer than the address stands for the whole of it.
    pub const fn new(address: IpAddr, prefix: u8) -> Self {
        match address {
            IpAddr::V4(v4) => {
                let prefix = if prefix > 32 { 32 } else { prefix };
                let bits = v4.to_bits() & mask_v4(prefix);
                Self {
                    first: IpAddr::V4(Ipv4Addr::from_bits(bits)),
                    prefix,
                }
            }
            IpAddr::V6(v6) => {
                let prefix = if prefix > 128 { 128 } else { prefix };
                let bits = v6.to_bits() & mask_v6(prefix);
                Self {
                    first: IpAddr::V6(Ipv6Addr::from_bits(bits)),
                    prefix,
                }
            }
        }
    }

    /// Whether the address is in it. One of the other family never is.
    pub const fn contains(&self, address: IpAddr) -> bool {
        match (self.first, address) {
            (IpAddr::V4(first), IpAddr::V4(v4)) => {
                v4.to_bits() & mask_v4(self.prefix) == first.to_bits()
            }
            (IpAddr::V6(first), IpAddr::V6(v6)) => {
                v6.to_bits() & mask_v6(self.prefix) == first.to_bits()
            }
            _ => false,
        }
    }
}

const fn mask_v4(prefix: u8) -> u32 {
    match prefix {
        0 => 0,
        bits => u32::MAX << (32 - bits as u32),
    }
}

const fn mask_v6(prefix: u8) -> u128 {
    match prefix {
        0 => 0,
        bits => u128::MAX << (128 - bits as u32),
    }
}

impl fmt::Display for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.first, self.prefix)
    }
}

impl FromStr for AddressRange {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |why: &str| {
            Error::new(
                ErrorCode::InvalidArgument,
                format!("{text:?} is not a range of addresses"),
            )
            .because(why)
        };
        let (address, prefix) = text
            .split_once('/')
            .ok_or_else(|| wrong("an address, a slash and a number of bits are expected"))?;
        let address: IpAddr = address
            .parse()
            .map_err(|_| wrong("what is before the slash is no address"))?;
        let digits = !prefix.is_empty() && prefix.bytes().all(|byte| byte.is_ascii_digit());
        let most = if address.is_ipv4() { 32 } else { 128 };
        let prefix: u8 = prefix
            .parse()
            .ok()
            .filter(|bits| digits && *bits <= most)
            .ok_or_else(|| wrong("what follows the slash is no number of bits"))?;
        let range = Self::new(address, prefix);
        if range.first == address {
            Ok(range)
        } else {
            Err(wrong("the address has bits beyond the prefix"))
        }
    }
}

/// What may be dialled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectPolicy {
    /// Only these networks.
    pub networks: Vec<AddressRange>,
    /// Only these ports.
    pub ports: Vec<u16>,
}

const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> AddressRange {
    AddressRange::new(IpAddr::V4(Ipv4Addr::new(a, b, c, d)), prefix)
}

const fn v6(first: u16, second: u16, third: u16, prefix: u8) -> AddressRange {
    let address = Ipv6Addr::new(first, second, third, 0, 0, 0, 0, 0);
    AddressRange::new(IpAddr::V6(address), prefix)
}

impl DirectPolicy {
    /// Private networks (RFC 1918, RFC 4193) and those of carriers, which Tailscale uses (RFC 6598).
    pub const PRIVATE: [AddressRange; 5] = [
        v4(10, 0, 0, 0, 8),
        v4(172, 16, 0, 0, 12),
        v4(192, 168, 0, 0, 16),
        v4(100, 64, 0, 0, 10),
        v6(0xfc00, 0, 0, 7),
    ];
    /// The port of an agent's listener.
    pub const PORT: u16 = 9090;

    /// Never, whatever is allowed: RFC 6890's this-network, loopback, link-local, multicast and
    /// reserved ranges, and IPv6 ranges that stand for IPv4 addresses (mapped and compatible RFC
    /// 4291, NAT64 RFC 6052 and 8215, 6to4 RFC 3056, Teredo RFC 4380).
    const NEVER: [AddressRange; 14] = [
        v4(0, 0, 0, 0, 8),
        v4(127, 0, 0, 0, 8),
        v4(169, 254, 0, 0, 16),
        v4(192, 0, 0, 0, 24),
        v4(224, 0, 0, 0, 4),
        v4(240, 0, 0, 0, 4),
        // All of ::/64, with the unspecified address, loopback and what is mapped.
        v6(0, 0, 0, 64),
        v6(0xfe80, 0, 0, 10),
        v6(0xfec0, 0, 0, 10),
        v6(0xff00, 0, 0, 8),
        v6(0x64, 0xff9b, 0, 96),
        v6(0x64, 0xff9b, 1, 48),
        v6(0x2002, 0, 0, 16),
        v6(0x2001, 0, 0, 32),
    ];

    /// The address to dial for what a host named.
    ///
    /// # Errors
    /// Why it is not dialled, for people.
    pub fn check(&self, named: &str) -> std::result::Result<SocketAddr, &'static str> {
        let address: SocketAddr = named
            .parse()
            .map_err(|_| "it is not an address and a port")?;
        if let SocketAddr::V6(v6) = address
            && (v6.scope_id() != 0 || v6.flowinfo() != 0)
        {
            return Err("it is of one link only");
        }
        let ip = address.ip();
        if Self::NEVER.iter().any(|range| range.contains(ip)) {
            return Err("it is of a kind that Core never dials");
        }
        if !self.networks.iter().any(|range| range.contains(ip)) {
            return Err("it is in none of the networks of direct.networks");
        }
        if !self.ports.contains(&address.port()) {
            return Err("its port is none of direct.ports");
        }
        Ok(address)
    }
}

impl Default for DirectPolicy {
    fn default() -> Self {
        Self {
            networks: Self::PRIVATE.to_vec(),
            ports: vec![Self::PORT],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_private_addresses_are_dialled_unless_more_is_allowed() {
        let policy = DirectPolicy::default();
        for good in [
            "10.1.2.3:9090",
            "172.31.255.255:9090",
            "192.168.50.2:9090",
            "100.64.0.2:9090",
            "100.127.255.255:9090",
            "[fd7a:115c:a1e0::1]:9090",
        ] {
            assert_eq!(policy.check(good).unwrap().to_string(), good);
        }
        for bad in [
            // Public, and just beside what is private.
            "198.51.100.7:9090",
            "9.255.255.255:9090",
            "172.32.0.1:9090",
            "100.128.0.1:9090",
            "[2001:db8::1]:9090",
            // Another service of a private machine.
            "10.1.2.3:22",
            "10.1.2.3:0",
            // No addresses.
            "",
            "10.1.2.3",
            "core.example:9090",
            "10.1.2.3:9090 ",
            "010.1.2.3:9090",
        ] {
            assert!(policy.check(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn whatever_is_allowed_core_dials_neither_itself_nor_metadata_nor_many() {
        let all = DirectPolicy {
            networks: vec![
                "0.0.0.0/0".parse().unwrap(),
                "::/0".parse().unwrap(),
                "169.254.0.0/16".parse().unwrap(),
                "127.0.0.0/8".parse().unwrap(),
            ],
            ports: vec![9090],
        };
        assert!(all.check("198.51.100.7:9090").is_ok());
        assert!(all.check("[2001:db8::1]:9090").is_ok());
        for never in [
            "127.0.0.1:9090",
            "127.8.8.8:9090",
            "0.0.0.0:9090",
            "0.1.2.3:9090",
            "169.254.169.254:9090",
            "169.254.0.1:9090",
            "192.0.0.192:9090",
            "224.0.0.1:9090",
            "239.255.255.255:9090",
            "255.255.255.255:9090",
            "250.0.0.1:9090",
            "[::]:9090",
            "[::1]:9090",
            "[::ffff:127.0.0.1]:9090",
            "[::ffff:10.0.0.1]:9090",
            "[::ffff:169.254.169.254]:9090",
            "[::10.0.0.1]:9090",
            "[64:ff9b::7f00:1]:9090",
            "[64:ff9b:1::a00:1]:9090",
            "[2002:7f00:1::1]:9090",
            "[2001:0:1::1]:9090",
            "[fe80::1]:9090",
            "[fe80::1%3]:9090",
            "[fec0::1]:9090",
            "[ff02::1]:9090",
        ] {
            assert!(all.check(never).is_err(), "{never}");
        }
    }

    #[test]
    fn ranges_are_read_as_they_are_written() {
        for good in [
            "10.0.0.0/8",
            "0.0.0.0/0",
            "192.0.2.7/32",
            "fd00::/8",
            "::/0",
        ] {
            assert_eq!(good.parse::<AddressRange>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            "10.0.0.0",
            "10.0.0.0/",
            "10.0.0.0/33",
            "10.0.0.0/+8",
            "10.0.0.1/8",
            "fd00::1/8",
            "::/129",
            "example/8",
        ] {
            assert!(bad.parse::<AddressRange>().is_err(), "{bad}");
        }
    }
}
