//! The addresses of this host, for the server certificate of a listener on all of them.
//!
//! Read from `/proc/net`, which needs no FFI: `fib_trie` (the kernel's table of local IPv4 routes)
//! and `if_inet6`. A file that cannot be read adds nothing.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// All unicast addresses of the host, loopback included.
pub(super) fn of_host() -> BTreeSet<IpAddr> {
    let mut found = BTreeSet::new();
    if let Ok(text) = std::fs::read_to_string("/proc/net/fib_trie") {
        found.extend(ipv4(&text).map(IpAddr::V4));
    }
    if let Ok(text) = std::fs::read_to_string("/proc/net/if_inet6") {
        found.extend(ipv6(&text).map(IpAddr::V6));
    }
    found
}

/// `|-- 192.0.2.5` followed by `/32 host LOCAL`.
fn ipv4(text: &str) -> impl Iterator<Item = Ipv4Addr> {
    let mut last = None;
    text.lines().filter_map(move |line| {
        let line = line.trim();
        if let Some(address) = line.strip_prefix("|-- ") {
            last = address.parse::<Ipv4Addr>().ok();
            return None;
        }
        if line == "/32 host LOCAL" { last } else { None }
    })
}

/// 32 hexadecimal digits, then index, prefix length, scope, flags and device. Link-local addresses
/// (scope 20) are left out: they mean nothing without a zone, which a certificate cannot hold.
fn ipv6(text: &str) -> impl Iterator<Item = Ipv6Addr> {
    text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let address = u128::from_str_radix(words.next()?, 16).ok()?;
        let scope = words.nth(2)?;
        (scope != "20").then(|| Ipv6Addr::from(address))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_tables() {
        let trie = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n     +-- 10.0.2.0/24 2 0 2\n        |-- 10.0.2.0\n           /24 link UNICAST\n        |-- 10.0.2.15\n           /32 host LOCAL\n        |-- 10.0.2.255\n           /32 link BROADCAST\n     |-- 127.0.0.1\n        /32 host LOCAL\n";
        let found: Vec<_> = ipv4(trie).collect();
        assert_eq!(
            found,
            [Ipv4Addr::new(10, 0, 2, 15), Ipv4Addr::new(127, 0, 0, 1)]
        );
        let inet6 = "00000000000000000000000000000001 01 80 10 80       lo\nfe80000000000000505400fffe123456 02 40 20 80     eth0\n20010db8000000000000000000000005 02 40 00 80     eth0\nnonsense\n";
        let found: Vec<_> = ipv6(inet6).collect();
        assert_eq!(
            found,
            [
                Ipv6Addr::LOCALHOST,
                "2001:db8::5".parse::<Ipv6Addr>().unwrap()
            ]
        );
    }

    #[test]
    fn this_host_has_loopback() {
        assert!(of_host().contains(&IpAddr::V4(Ipv4Addr::LOCALHOST)));
    }
}
