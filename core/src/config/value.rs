//! Kinds of value that only Core's keys have.

use std::net::IpAddr;

use ghost_core::domain::AddressRange;
use ghost_infrastructure::config::{Refusal, Scalar, refuse};
use ghost_infrastructure::config_choice;

/// Where records are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Engine {
    /// Embedded.
    Sled,
    /// Embedded, the second engine.
    Redb,
    /// Shared between replicas.
    Etcd,
}

config_choice!(Engine {
    "sled" => Engine::Sled,
    "redb" => Engine::Redb,
    "etcd" => Engine::Etcd,
});

/// A host with a port, as one dials it: `core.example.org:7443`, `[2001:db8::7]:7443`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostPort(pub(crate) String);

impl Scalar for HostPort {
    const EXAMPLE: &'static str = "core.example.org:7443";
    const PLAIN: bool = true;

    fn from_text(text: &str) -> Result<Self, Refusal> {
        let legal = text.rsplit_once(':').is_some_and(|(host, port)| {
            let host_is_legal = match host.strip_prefix('[') {
                Some(rest) => rest
                    .strip_suffix(']')
                    .is_some_and(|ip| matches!(ip.parse(), Ok(IpAddr::V6(_)))),
                None => {
                    (1..=253).contains(&host.len())
                        && host
                            .bytes()
                            .all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b))
                }
            };
            // A sign or leading zeroes would be taken by `parse`, and by no resolver.
            let digits = port.bytes().all(|b| b.is_ascii_digit());
            host_is_legal && digits && port.parse::<u16>().is_ok_and(|port| port > 0)
        });
        if legal {
            Ok(Self(text.to_owned()))
        } else {
            refuse(
                format!("{text:?} is not a host with a port"),
                format!("write for example {} or [2001:db8::7]:7443", Self::EXAMPLE),
            )
        }
    }

    fn to_text(&self) -> String {
        self.0.clone()
    }
}

/// A range of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Network(pub(crate) AddressRange);

impl Scalar for Network {
    const EXAMPLE: &'static str = "100.64.0.0/10";
    const PLAIN: bool = true;

    fn from_text(text: &str) -> Result<Self, Refusal> {
        match text.parse() {
            Ok(range) => Ok(Self(range)),
            Err(error) => {
                let why = error.cause().unwrap_or_default();
                refuse(
                    format!("{text:?} is not a range of addresses: {why}"),
                    format!("write for example {} or fd00::/8", Self::EXAMPLE),
                )
            }
        }
    }

    fn to_text(&self) -> String {
        self.0.to_string()
    }
}

/// A port of TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Port(pub(crate) u16);

impl Scalar for Port {
    const EXAMPLE: &'static str = "9090";
    const PLAIN: bool = true;

    fn from_text(text: &str) -> Result<Self, Refusal> {
        match text.parse::<u16>() {
            Ok(port) if port > 0 && text.bytes().all(|byte| byte.is_ascii_digit()) => {
                Ok(Self(port))
            }
            _ => refuse(format!("{text:?} is not a port"), "write 1 to 65535"),
        }
    }

    fn to_text(&self) -> String {
        self.0.to_string()
    }
}

/// A trust domain (SPIFFE-ID specification, section 2.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TrustDomain(pub(crate) String);

impl TrustDomain {
    pub(super) fn new(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl Scalar for TrustDomain {
    const EXAMPLE: &'static str = "ghost.example.org";
    const PLAIN: bool = false;

    fn from_text(text: &str) -> Result<Self, Refusal> {
        let legal = (1..=253).contains(&text.len())
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b));
        if legal {
            Ok(Self::new(text))
        } else {
            refuse(
                format!("{text:?} is not a trust domain"),
                format!(
                    "write a-z, 0-9, '-', '.' and '_', for example {}",
                    Self::EXAMPLE
                ),
            )
        }
    }

    fn to_text(&self) -> String {
        self.0.clone()
    }
}

/// An address of HTTP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Url(pub(crate) String);

impl Scalar for Url {
    const EXAMPLE: &'static str = "https://etcd-1.example.org:2379";
    const PLAIN: bool = true;

    fn from_text(text: &str) -> Result<Self, Refusal> {
        let rest = text
            .strip_prefix("https://")
            .or_else(|| text.strip_prefix("http://"));
        let legal = rest.is_some_and(|rest| {
            !rest.is_empty()
                && !rest.starts_with(['/', ':'])
                && rest.bytes().all(|b| b.is_ascii_graphic())
                && !rest.contains(['@', '"', '\\', '<', '>', '#', '?'])
        });
        if legal && text.len() <= 1024 {
            Ok(Self(text.to_owned()))
        } else {
            refuse(
                format!("{text:?} is not an address of HTTP"),
                format!("write for example {}", Self::EXAMPLE),
            )
        }
    }

    fn to_text(&self) -> String {
        self.0.clone()
    }
}

/// A word of another system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Word(pub(crate) String);

impl Word {
    pub(super) fn new(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl Scalar for Word {
    const EXAMPLE: &'static str = "ghost";
    const PLAIN: bool = false;

    fn from_text(text: &str) -> Result<Self, Refusal> {
        if (1..=256).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic()) {
            Ok(Self::new(text))
        } else {
            refuse(
                format!("{text:?} is no single word"),
                "write 1 to 256 characters of ASCII without blanks",
            )
        }
    }

    fn to_text(&self) -> String {
        self.0.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_have_a_port() {
        for good in [
            "core:7443",
            "core.example.org:1",
            "192.0.2.7:7443",
            "[::1]:65535",
        ] {
            assert_eq!(HostPort::from_text(good).unwrap().to_text(), good);
        }
        for bad in [
            "",
            "core",
            "core:",
            ":7443",
            "core:0",
            "core:+1",
            "core:65536",
            "::1:7443",
            "[::1]",
            "[core]:7443",
            "a b:1",
            "a/b:1",
        ] {
            assert!(HostPort::from_text(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_of_http_have_no_secrets() {
        for good in [
            "http://127.0.0.1:2379",
            "https://login.example.org/realms/ghost",
        ] {
            assert_eq!(Url::from_text(good).unwrap().to_text(), good);
        }
        for bad in [
            "",
            "127.0.0.1:2379",
            "https://",
            "https:///x",
            "https://a:b@c",
            "ftp://x",
        ] {
            assert!(Url::from_text(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn trust_domains_are_lower_case() {
        assert!(TrustDomain::from_text("ghost.local").is_ok());
        for bad in ["", "Ghost", "a/b", "a b", "ä"] {
            assert!(TrustDomain::from_text(bad).is_err(), "{bad}");
        }
    }
}
