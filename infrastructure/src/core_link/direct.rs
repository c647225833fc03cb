//! Addresses by which Core could dial this host's gRPC listener itself, without the link: those of a
//! Tailscale or WireGuard network that both are in, or of the LAN.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ghost_domain::{Error, ErrorCode};
use ghost_proto::core::v1::DirectAddress;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Where tailscaled answers local questions.
pub const TAILSCALE_SOCKET: &str = "/var/run/tailscale/tailscaled.sock";
/// More than the status of any tailnet.
const MOST_STATUS: u64 = 16 * 1024 * 1024;
const ANSWER_TIME: Duration = Duration::from_secs(3);
/// What is told of one host.
const MOST_ADDRESSES: usize = 8;

/// Where direct addresses come from: `network.provider`.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Provider {
    /// Nowhere: Core reaches this host by the link alone.
    #[default]
    None,
    /// tailscaled, or another that answers like it (Headscale's hosts run it too), at this socket.
    Tailscale(PathBuf),
    /// The WireGuard interface of this name, or all of them.
    WireGuard(Option<String>),
    /// The address by which this host goes to Core.
    Lan,
}

impl Provider {
    /// As the configuration writes it.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Tailscale(_) => "tailscale",
            Self::WireGuard(_) => "wireguard",
            Self::Lan => "lan",
        }
    }
}

impl std::str::FromStr for Provider {
    type Err = Error;

    /// Reads `none`, `tailscale`, `wireguard`, `wireguard:INTERFACE` or `lan`.
    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "none" => Ok(Self::None),
            "tailscale" => Ok(Self::Tailscale(TAILSCALE_SOCKET.into())),
            "wireguard" => Ok(Self::WireGuard(None)),
            "lan" => Ok(Self::Lan),
            _ => match text.strip_prefix("wireguard:") {
                Some(name) if is_interface(name) => Ok(Self::WireGuard(Some(name.to_owned()))),
                _ => Err(Error::new(
                    ErrorCode::InvalidArgument,
                    format!("{text:?} is not a provider of addresses"),
                )
                .because("none, tailscale, wireguard, wireguard:INTERFACE and lan are")),
            },
        }
    }
}

/// netdevice(7): 15 bytes, and never a path.
fn is_interface(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 15
        && name != "."
        && name != ".."
        && !name.contains(['/', ':'])
        && !name.chars().any(char::is_whitespace)
}

/// What is told to Core of direct ways.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct DirectOptions {
    /// Where addresses come from.
    pub provider: Provider,
    /// The port of the agent's gRPC listener with TLS; `None` where there is none that others can
    /// reach, and then nothing is told.
    pub port: Option<u16>,
}

impl DirectOptions {
    /// The addresses now. `core` is where Core is, `host:port`. A provider that does not answer is
    /// logged, and costs the link nothing.
    pub async fn addresses(&self, core: &str) -> Vec<DirectAddress> {
        self.look(core).await.unwrap_or_else(|error| {
            tracing::warn!(provider = self.provider.as_str(), %error, "no direct address is known");
            Vec::new()
        })
    }

    /// The addresses now, where their provider answers.
    ///
    /// # Errors
    /// Those of the provider.
    pub async fn look(&self, core: &str) -> io::Result<Vec<DirectAddress>> {
        let Some(port) = self.port else {
            return Ok(Vec::new());
        };
        let found = match &self.provider {
            Provider::None => return Ok(Vec::new()),
            Provider::Tailscale(socket) => {
                match tokio::time::timeout(ANSWER_TIME, tailscale(socket)).await {
                    Ok(found) => found,
                    Err(_) => Err(io::ErrorKind::TimedOut.into()),
                }
            }
            Provider::WireGuard(name) => wireguard(name.as_deref()),
            Provider::Lan => lan(core).await,
        };
        Ok(found?
            .into_iter()
            .filter(|address| !address.is_loopback() && !address.is_unspecified())
            .take(MOST_ADDRESSES)
            .map(|address| DirectAddress {
                provider: self.provider.as_str().into(),
                address: SocketAddr::new(address, port).to_string(),
            })
            .collect())
    }
}

/// The addresses of this host in its tailnet, from tailscaled's local API. HTTP/1.0, so that the
/// answer ends with the connection.
async fn tailscale(socket: &Path) -> io::Result<Vec<IpAddr>> {
    let mut stream = UnixStream::connect(socket).await?;
    stream
        .write_all(b"GET /localapi/v0/status HTTP/1.0\r\nHost: local-tailscaled.sock\r\n\r\n")
        .await?;
    let mut answer = Vec::new();
    stream.take(MOST_STATUS).read_to_end(&mut answer).await?;
    status_addresses(&answer)
        .ok_or_else(|| io::Error::other("tailscaled's answer is not a status of a running node"))
}

fn status_addresses(answer: &[u8]) -> Option<Vec<IpAddr>> {
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n")?;
    let (head, body) = answer.split_at(end + 4);
    let first = head.split(|byte| *byte == b'\r').next()?;
    if first.split(|byte| *byte == b' ').nth(1)? != b"200" {
        return None;
    }
    let status: serde_json::Value = serde_json::from_slice(body).ok()?;
    if status.get("BackendState")?.as_str()? != "Running" {
        return None;
    }
    let addresses = status.get("Self")?.get("TailscaleIPs")?.as_array()?;
    Some(
        addresses
            .iter()
            .filter_map(|one| one.as_str()?.parse().ok())
            .collect(),
    )
}

/// The address that the kernel would use to reach Core. Nothing is sent.
async fn lan(core: &str) -> io::Result<Vec<IpAddr>> {
    let target = tokio::net::lookup_host(core)
        .await?
        .next()
        .ok_or_else(|| io::Error::other("Core's address is not known"))?;
    let any: SocketAddr = match target {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(target)?;
    Ok(vec![socket.local_addr()?.ip()])
}

/// The addresses of WireGuard interfaces.
fn wireguard(name: Option<&str>) -> io::Result<Vec<IpAddr>> {
    let names: Vec<String> = match name {
        Some(name) => vec![name.to_owned()],
        None => std::fs::read_dir("/sys/class/net")?
            .flatten()
            .filter(|entry| {
                std::fs::read_to_string(entry.path().join("uevent"))
                    .is_ok_and(|text| text.lines().any(|line| line == "DEVTYPE=wireguard"))
            })
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect(),
    };
    let mut found = Vec::new();
    for name in names {
        let index =
            std::fs::read_to_string(Path::new("/sys/class/net").join(&name).join("ifindex"))?;
        let index: u32 = index.trim().parse().map_err(io::Error::other)?;
        found.extend(interface_addresses(index)?);
    }
    Ok(found)
}

// rtnetlink(7), netlink(7); numbers are of the host's byte order, messages and attributes are
// padded to four bytes.
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST_DUMP: u16 = 0x1 | 0x300;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const SCOPE_LINK: u8 = 253;
const HEADER: usize = 16;
const ADDRESS_HEADER: usize = 8;

/// The addresses of one interface, link-local ones left out: they mean nothing elsewhere.
fn interface_addresses(index: u32) -> io::Result<Vec<IpAddr>> {
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let mut request = Vec::with_capacity(HEADER + ADDRESS_HEADER);
    request.extend_from_slice(&24_u32.to_ne_bytes());
    request.extend_from_slice(&RTM_GETADDR.to_ne_bytes());
    request.extend_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
    request.resize(HEADER + ADDRESS_HEADER, 0);
    let kernel = SocketAddrNetlink::new(0, 0);
    sendto(&socket, &request, SendFlags::empty(), &kernel)?;
    let mut found = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let (count, _) = recv(&socket, &mut buffer[..], RecvFlags::empty())?;
        let mut rest = buffer.get(..count).unwrap_or_default();
        if rest.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        while let Some((kind, body, next)) = message(rest) {
            match kind {
                NLMSG_DONE => return Ok(found),
                NLMSG_ERROR => return Err(io::Error::other("the kernel does not tell addresses")),
                RTM_NEWADDR => found.extend(address_of(body, index)),
                _ => {}
            }
            rest = next;
        }
    }
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

fn padded(length: usize) -> usize {
    length.div_ceil(4) * 4
}

/// Kind and body of the first message, and what follows it.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = usize::try_from(u32::from_ne_bytes(number(bytes, 0)?)).ok()?;
    let kind = u16::from_ne_bytes(number(bytes, 4)?);
    let body = bytes.get(HEADER..length)?;
    Some((kind, body, bytes.get(padded(length)..).unwrap_or_default()))
}

fn address_of(body: &[u8], wanted: u32) -> Option<IpAddr> {
    let [_family, _prefix, _flags, scope] = number(body, 0)?;
    let index = u32::from_ne_bytes(number(body, 4)?);
    if index != wanted || scope == SCOPE_LINK {
        return None;
    }
    let mut rest = body.get(ADDRESS_HEADER..)?;
    let mut peer = None;
    while let Some(length) = number(rest, 0) {
        let length = usize::from(u16::from_ne_bytes(length));
        let kind = u16::from_ne_bytes(number(rest, 2)?);
        let value = rest.get(4..length)?;
        let address = match value.len() {
            4 => Some(IpAddr::from(number::<4>(value, 0)?)),
            16 => Some(IpAddr::from(number::<16>(value, 0)?)),
            _ => None,
        };
        match kind {
            // On a link from point to point IFA_ADDRESS is the other end.
            IFA_LOCAL => return address,
            IFA_ADDRESS => peer = address,
            _ => {}
        }
        rest = rest.get(padded(length)..).unwrap_or_default();
    }
    peer
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    async fn fake_tailscaled(answer: &'static str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tailscaled.sock");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = vec![0; 4096];
                let count = stream.read(&mut request).await.unwrap();
                assert!(request[..count].starts_with(b"GET /localapi/v0/status HTTP/1.0\r\n"));
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        (folder, path)
    }

    async fn told(answer: &'static str) -> Vec<String> {
        let (_folder, socket) = fake_tailscaled(answer).await;
        let options = DirectOptions {
            provider: Provider::Tailscale(socket),
            port: Some(9090),
        };
        let told = options.addresses("core:7443").await;
        assert!(told.iter().all(|one| one.provider == "tailscale"));
        told.into_iter().map(|one| one.address).collect()
    }

    #[tokio::test]
    async fn tailscales_addresses_are_told_while_it_runs() {
        let running = concat!(
            "HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n",
            r#"{"BackendState":"Running","Self":{"HostName":"pc","TailscaleIPs":["100.101.102.103","fd7a:115c:a1e0::1","nonsense"]},"Peer":{}}"#
        );
        assert_eq!(
            told(running).await,
            ["100.101.102.103:9090", "[fd7a:115c:a1e0::1]:9090"]
        );
        for stopped in [
            "HTTP/1.0 200 OK\r\n\r\n{\"BackendState\":\"Stopped\",\"Self\":{\"TailscaleIPs\":[\"100.1.1.1\"]}}",
            "HTTP/1.0 403 Forbidden\r\n\r\nno",
            "HTTP/1.0 200 OK\r\n\r\nnot json",
            "",
        ] {
            assert!(told(stopped).await.is_empty(), "{stopped}");
        }
    }

    #[tokio::test]
    async fn a_provider_that_is_away_tells_nothing() {
        let options = DirectOptions {
            provider: Provider::Tailscale("/nonexistent/tailscaled.sock".into()),
            port: Some(9090),
        };
        assert!(options.addresses("core:7443").await.is_empty());
        let options = DirectOptions {
            provider: Provider::Lan,
            port: None,
        };
        assert!(options.addresses("127.0.0.1:7443").await.is_empty());
    }

    #[tokio::test]
    async fn the_lan_address_is_the_way_to_core() {
        assert_eq!(lan("127.0.0.1:7443").await.unwrap(), [Ipv4Addr::LOCALHOST]);
        // Which no other host could dial.
        let options = DirectOptions {
            provider: Provider::Lan,
            port: Some(9090),
        };
        assert!(options.addresses("127.0.0.1:7443").await.is_empty());
    }

    #[test]
    fn the_kernel_tells_the_addresses_of_an_interface() {
        let index = std::fs::read_to_string("/sys/class/net/lo/ifindex").unwrap();
        let found = interface_addresses(index.trim().parse().unwrap()).unwrap();
        assert!(
            found.contains(&IpAddr::V4(Ipv4Addr::LOCALHOST)),
            "{found:?}"
        );
        assert!(interface_addresses(u32::MAX).unwrap().is_empty());
    }

    #[test]
    fn providers_are_read_as_they_are_written() {
        assert_eq!("lan".parse::<Provider>().unwrap(), Provider::Lan);
        assert_eq!(
            "wireguard:wg0".parse::<Provider>().unwrap(),
            Provider::WireGuard(Some("wg0".into()))
        );
        for bad in ["", "vpn", "wireguard:", "wireguard:../x", "wireguard:a b"] {
            assert!(bad.parse::<Provider>().is_err(), "{bad}");
        }
    }
}
