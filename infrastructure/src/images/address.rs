//! Which addresses a download may go to (threat T15): https anywhere, http only to this machine,
//! and no redirect from outside into a private network.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ghost_domain::{Error, ErrorCode, Result};
use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

/// By which rules a hop of a download is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// This machine, never by a proxy.
    Loopback,
    /// Wherever the person who asked pointed to.
    Chosen,
    /// Wherever a server pointed to: public addresses only.
    Guarded,
}

fn refuse(what: impl Into<String>) -> Error {
    Error::new(ErrorCode::InvalidArgument, what).field("url", "an https address is expected")
}

/// Whether the host of an address is this machine, by its literal form.
fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(name)) => name.eq_ignore_ascii_case("localhost"),
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        None => false,
    }
}

/// Reads the address to start from.
///
/// # Errors
/// `InvalidArgument` for anything but https, or http to a loopback address.
pub(super) fn start(text: &str) -> Result<(Url, Route)> {
    let url = Url::parse(text)
        .map_err(|error| refuse("that is not an address of the web").because(error))?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(refuse("an address with a password in it is not taken")
            .because("addresses are logged and shown"));
    }
    let route = match url.scheme() {
        "http" | "https" if is_loopback(&url) => Route::Loopback,
        "https" => Route::Chosen,
        "http" => {
            return Err(refuse("images are downloaded by https only")
                .hint("use the https address; http is taken for 127.0.0.1 and ::1 only"));
        }
        other => return Err(refuse(format!("{other} addresses are not supported"))),
    };
    Ok((url, route))
}

/// Where a redirect may lead.
///
/// # Errors
/// `DownloadFailed` when it leads from https to http, or from outside to a private address.
pub(super) fn redirect(first: &Url, first_route: Route, next: &Url) -> Result<Route> {
    let forbidden = |why: &str| {
        let host = next.host_str().unwrap_or("nowhere");
        Err(Error::new(
            ErrorCode::DownloadFailed,
            format!(
                "the server redirects to a forbidden address ({}://{host})",
                next.scheme()
            ),
        )
        .because(why))
    };
    let loopback = is_loopback(next);
    match (first_route, next.scheme()) {
        (Route::Loopback, "http" | "https") if loopback => Ok(Route::Loopback),
        (Route::Loopback, "https") => Ok(Route::Chosen),
        (_, "https") if next.host() == first.host() => Ok(Route::Chosen),
        (_, "https") => {
            let literal = match next.host() {
                Some(url::Host::Ipv4(ip)) => Some(IpAddr::V4(ip)),
                Some(url::Host::Ipv6(ip)) => Some(IpAddr::V6(ip)),
                _ => None,
            };
            if loopback || literal.is_some_and(|ip| !is_public(ip)) {
                return forbidden("a server outside must not lead us into a private network");
            }
            // A name is judged by what it resolves to, in `PublicOnly`.
            Ok(Route::Guarded)
        }
        _ => forbidden("redirects are followed by https only"),
    }
}

/// Whether an address is one of the public internet (IANA special-purpose registries, RFC 6890).
pub(super) fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => is_public_v4(ip),
        IpAddr::V6(ip) => is_public_v6(ip),
    }
}

fn is_public_v4(ip: Ipv4Addr) -> bool {
    let [a, b, c, _] = ip.octets();
    !(ip.is_private()
        || ip.is_loopback()
        || ip.is_link_local()
        || ip.is_multicast()
        || ip.is_broadcast()
        || ip.is_documentation()
        || a == 0
        || a >= 240
        || (a == 100 && (64..128).contains(&b))
        || (a == 192 && b == 0 && c == 0)
        || (a == 198 && (b == 18 || b == 19)))
}

fn is_public_v6(ip: Ipv6Addr) -> bool {
    let segments = ip.segments();
    let embedded = |high: u16, low: u16| {
        let [a, b] = high.to_be_bytes();
        let [c, d] = low.to_be_bytes();
        is_public_v4(Ipv4Addr::new(a, b, c, d))
    };
    if let Some(v4) = ip.to_ipv4_mapped() {
        return is_public_v4(v4);
    }
    match segments {
        // NAT64 (RFC 6052) and 6to4 (RFC 3056) carry an IPv4 address that is what is reached.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => embedded(high, low),
        [0x2002, high, low, ..] => embedded(high, low),
        // Only 2000::/3 is given out as global unicast; documentation and Teredo are inside it.
        [first, second, ..] => {
            (0x2000..0x4000).contains(&first)
                && !(first == 0x2001 && (second == 0xdb8 || second == 0))
        }
    }
}

/// A name resolved to private addresses only, on a hop that must not go there.
#[derive(Debug, thiserror::Error)]
#[error("{0} is an address of a private network")]
pub(super) struct PrivateAddress(String);

/// Resolves names and drops private addresses, so that the connection goes where we looked.
#[derive(Debug)]
pub(super) struct PublicOnly;

impl Resolve for PublicOnly {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let host = name.as_str().to_owned();
            let found = tokio::net::lookup_host((host.as_str(), 0)).await?;
            let public: Vec<SocketAddr> = found.filter(|a| is_public(a.ip())).collect();
            if public.is_empty() {
                return Err(PrivateAddress(host).into());
            }
            let addresses: Addrs = Box::new(public.into_iter());
            Ok(addresses)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http_is_for_this_machine_only() {
        for good in [
            "https://cloud.debian.org/x",
            "http://127.0.0.1:80/x",
            "http://[::1]/x",
            "http://localhost:8080/x",
            "https://10.0.0.1/x",
        ] {
            assert!(start(good).is_ok(), "{good}");
        }
        for bad in [
            "http://cloud.debian.org/x",
            "http://127.0.0.1.example.com/x",
            "http://10.0.0.1/x",
            "file:///etc/passwd",
            "ftp://127.0.0.1/x",
            "https://user:secret@example.com/x",
            "not an address",
            "",
        ] {
            assert_eq!(
                start(bad).unwrap_err().code(),
                ErrorCode::InvalidArgument,
                "{bad}"
            );
        }
    }

    #[test]
    fn redirects_do_not_lead_inside() {
        let (public, route) = start("https://cloud.debian.org/x").unwrap();
        let go = |next: &str| redirect(&public, route, &Url::parse(next).unwrap());
        assert_eq!(go("https://cloud.debian.org/y").unwrap(), Route::Chosen);
        assert_eq!(go("https://mirror.example.org/y").unwrap(), Route::Guarded);
        for bad in [
            "http://cloud.debian.org/y",
            "https://127.0.0.1/y",
            "https://localhost/y",
            "https://169.254.169.254/latest",
            "https://10.1.2.3/",
            "https://[::1]/",
            "https://[fd00::1]/",
            "https://[::ffff:192.168.1.1]/",
            "https://[64:ff9b::a00:1]/",
            "https://[2002:7f00:1::]/",
            "https://0x7f000001/",
            "https://2130706433/",
            "file:///etc/passwd",
        ] {
            assert_eq!(
                go(bad).unwrap_err().code(),
                ErrorCode::DownloadFailed,
                "{bad}"
            );
        }
        let (local, route) = start("http://127.0.0.1:1/x").unwrap();
        let go = |next: &str| redirect(&local, route, &Url::parse(next).unwrap());
        assert_eq!(go("http://127.0.0.1:2/y").unwrap(), Route::Loopback);
        assert_eq!(go("https://10.0.0.1/y").unwrap(), Route::Chosen);
        assert!(go("http://10.0.0.1/y").is_err());
    }

    #[tokio::test]
    async fn a_name_of_this_machine_does_not_pass_the_guard() {
        let name: Name = "localhost".parse().unwrap();
        let Err(error) = PublicOnly.resolve(name).await else {
            panic!("localhost passed");
        };
        assert!(error.downcast_ref::<PrivateAddress>().is_some(), "{error}");
    }

    #[test]
    fn public_addresses_are_told() {
        for public in [
            "1.1.1.1",
            "193.99.144.85",
            "2a00:1450::1",
            "64:ff9b::101:101",
        ] {
            assert!(is_public(public.parse().unwrap()), "{public}");
        }
        for private in [
            "0.0.0.0",
            "100.64.0.1",
            "198.18.0.1",
            "255.255.255.255",
            "::",
            "fe80::1",
            "ff02::1",
            "2001:db8::1",
        ] {
            assert!(!is_public(private.parse().unwrap()), "{private}");
        }
    }
}
