//! Where an agent is: `unix:PATH`, `https://HOST:PORT`, or `http://` on loopback.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use crate::errors::Failure;

/// The socket of this host's agent.
pub(crate) const DEFAULT_SOCKET: &str = "/run/ghost/agent.sock";

/// The agent's gRPC port.
const DEFAULT_PORT: u16 = 9090;

/// Where an agent is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// A Unix socket.
    Unix(PathBuf),
    /// TLS over TCP.
    Tls {
        /// A DNS name or an address, without brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// TCP without TLS, on loopback only.
    Plain {
        /// `localhost` or a loopback address, without brackets.
        host: String,
        /// The port.
        port: u16,
    },
}

impl Endpoint {
    /// This host's agent.
    pub(crate) fn local() -> Self {
        Self::Unix(PathBuf::from(DEFAULT_SOCKET))
    }

    /// Reads what people write.
    pub(crate) fn parse(text: &str) -> Result<Self, Failure> {
        let bad = |cause: &str| {
            Failure::usage(format!("{text:?} is not an endpoint"))
                .because(cause)
                .hint("write unix:PATH or https://HOST:PORT")
        };
        if let Some(path) = text
            .strip_prefix("unix://")
            .or_else(|| text.strip_prefix("unix:"))
        {
            if path.is_empty() {
                return Err(bad("the path is missing"));
            }
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        if let Some(rest) = text.strip_prefix("https://") {
            let (host, port) = authority(rest).ok_or_else(|| bad("HOST:PORT is expected"))?;
            return Ok(Self::Tls { host, port });
        }
        if let Some(rest) = text.strip_prefix("http://") {
            let (host, port) = authority(rest).ok_or_else(|| bad("HOST:PORT is expected"))?;
            let loopback = host == "localhost"
                || host
                    .parse::<IpAddr>()
                    .is_ok_and(|address| address.is_loopback());
            if !loopback {
                return Err(bad(
                    "http:// is not encrypted and allowed to this host only",
                ));
            }
            return Ok(Self::Plain { host, port });
        }
        Err(bad("it starts with neither unix: nor https://"))
    }
}

/// `HOST`, `HOST:PORT`, `[v6]` or `[v6]:PORT`, with an optional slash at the end.
fn authority(text: &str) -> Option<(String, u16)> {
    let text = text.strip_suffix('/').unwrap_or(text);
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest.split_once(']')?;
        host.parse::<std::net::Ipv6Addr>().ok()?;
        match rest {
            "" => (host, None),
            rest => (host, Some(rest.strip_prefix(':')?)),
        }
    } else {
        match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        }
    };
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':');
    if host.is_empty() || !host.chars().all(legal) {
        return None;
    }
    let port = match port {
        Some(port) => port.parse().ok().filter(|port| *port != 0)?,
        None => DEFAULT_PORT,
    };
    Some((host.to_owned(), port))
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, host, port) = match self {
            Self::Unix(path) => return write!(f, "unix:{}", path.display()),
            Self::Tls { host, port } => ("https", host, port),
            Self::Plain { host, port } => ("http", host, port),
        };
        if host.contains(':') {
            write!(f, "{scheme}://[{host}]:{port}")
        } else {
            write!(f, "{scheme}://{host}:{port}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_read_and_written_back() {
        for (text, shown) in [
            ("unix:/run/x.sock", "unix:/run/x.sock"),
            ("unix:///run/x.sock", "unix:/run/x.sock"),
            ("https://pc.example:9090", "https://pc.example:9090"),
            ("https://pc.example/", "https://pc.example:9090"),
            ("https://[::1]:9443", "https://[::1]:9443"),
            ("http://127.0.0.1:9090", "http://127.0.0.1:9090"),
            ("http://localhost", "http://localhost:9090"),
        ] {
            assert_eq!(Endpoint::parse(text).unwrap().to_string(), shown);
        }
        for bad in [
            "",
            "unix:",
            "pc:9090",
            "https://",
            "https://a b",
            "https://pc:0",
            "https://pc:99999",
            "https://u@pc:1",
            "https://pc:1/path",
            "http://pc.example:9090",
            "http://10.0.0.1:1",
            "https://[x]:1",
            "ftp://pc",
        ] {
            assert_eq!(
                Endpoint::parse(bad).unwrap_err().exit(),
                crate::errors::Exit::Usage,
                "{bad}"
            );
        }
    }
}
