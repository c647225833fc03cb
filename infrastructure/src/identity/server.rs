//! The agent's side of TLS: a leaf that renews itself, and the server configurations on it.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ghost_domain::{Error, Result, Timestamp};
use rand::Rng;
use rcgen::{KeyPair, SanType};
use rustls::crypto::aws_lc_rs;
use rustls::server::{
    ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier,
};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, ServerConfig};

use super::addresses;
use super::authority::{Authority, CLOCK_SKEW, LEAF_LIFETIME, Leaf, LeafTemplate, private_key};

/// How often the host's addresses are looked at, where the certificate names them.
const LOOK_AT_ADDRESSES: Duration = Duration::from_secs(60);

/// The names that clients may reach this agent by.
#[derive(Clone, Debug, Default)]
pub struct ServerNames {
    /// Names and addresses of the configuration.
    pub configured: Vec<String>,
    /// The host's own name.
    pub hostname: String,
    /// The addresses that are listened on. An unspecified one (`0.0.0.0`, `::`) stands for all
    /// addresses of the host, and they are followed as they change.
    pub listen: Vec<IpAddr>,
}

impl ServerNames {
    fn follows_addresses(&self) -> bool {
        self.listen.iter().any(IpAddr::is_unspecified)
    }

    /// Everything for the certificate's alternative names.
    fn addresses(&self) -> BTreeSet<IpAddr> {
        let mut all = BTreeSet::from([
            IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V6(Ipv6Addr::LOCALHOST),
        ]);
        all.extend(self.listen.iter().filter(|one| !one.is_unspecified()));
        all.extend(
            self.configured
                .iter()
                .filter_map(|one| one.parse::<IpAddr>().ok()),
        );
        if self.follows_addresses() {
            all.extend(addresses::of_host());
        }
        all
    }

    fn dns_names(&self) -> BTreeSet<String> {
        self.configured
            .iter()
            .map(String::as_str)
            .chain([self.hostname.as_str(), "localhost"])
            .map(|name| name.trim_end_matches('.').to_ascii_lowercase())
            .filter(|name| is_dns_name(name))
            .collect()
    }
}

/// A name that a certificate may hold (RFC 1123 labels); a host's own name may be anything.
fn is_dns_name(name: &str) -> bool {
    name.parse::<IpAddr>().is_err()
        && (1..=253).contains(&name.len())
        && name.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'-')
        })
}

/// The server's leaf certificate, signed anew by the CA when half its life is over. Renewal happens
/// in the handshake that finds it due (signing takes less than a millisecond): there is no task
/// that could die, and a host that slept for a week is right at its first connection.
#[derive(Debug)]
pub struct ServerTls {
    authority: Arc<Authority>,
    /// `None`: only what the template names.
    names: Option<ServerNames>,
    template: LeafTemplate,
    current: Mutex<Current>,
}

#[derive(Debug)]
struct Current {
    certified: Arc<CertifiedKey>,
    addresses: BTreeSet<IpAddr>,
    looked_at: Timestamp,
    made_at: Timestamp,
    renew_at: Timestamp,
    expires_at: Timestamp,
}

impl ServerTls {
    /// Signs the first leaf.
    ///
    /// # Errors
    /// `Internal` when it cannot be signed.
    pub fn new(authority: Arc<Authority>, names: ServerNames) -> Result<Arc<Self>> {
        let template = LeafTemplate {
            common_name: "ghost-agent".into(),
            server: true,
            ..LeafTemplate::default()
        };
        Self::of_template(authority, names, template)
    }

    /// A leaf with further names, which may be good for clients too.
    ///
    /// # Errors
    /// `Internal` when it cannot be signed.
    pub fn of_template(
        authority: Arc<Authority>,
        names: ServerNames,
        template: LeafTemplate,
    ) -> Result<Arc<Self>> {
        Self::make(authority, Some(names), template)
    }

    /// A leaf with the names of the template alone.
    pub(super) fn nameless(authority: Arc<Authority>, template: LeafTemplate) -> Result<Arc<Self>> {
        Self::make(authority, None, template)
    }

    fn make(
        authority: Arc<Authority>,
        names: Option<ServerNames>,
        template: LeafTemplate,
    ) -> Result<Arc<Self>> {
        let current = make(&authority, names.as_ref(), &template)?;
        Ok(Arc::new(Self {
            authority,
            names,
            template,
            current: Mutex::new(current),
        }))
    }

    /// For gRPC: HTTP/2 only; a client certificate is optional and must be ours where it is shown.
    ///
    /// # Errors
    /// `Internal` when rustls refuses the parts.
    pub fn grpc_config(self: &Arc<Self>) -> Result<Arc<ServerConfig>> {
        self.config_for(&[b"h2"])
    }

    /// For the protocols that are named (ALPN, the first that the client offers too wins); a client
    /// certificate is optional and must be ours where it is shown.
    ///
    /// # Errors
    /// `Internal` when rustls refuses the parts.
    pub fn config_for(self: &Arc<Self>, protocols: &[&[u8]]) -> Result<Arc<ServerConfig>> {
        let mut roots = RootCertStore::empty();
        roots
            .add(self.authority.certificate().clone())
            .map_err(unusable)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(
            Arc::new(roots),
            Arc::new(aws_lc_rs::default_provider()),
        )
        .allow_unauthenticated()
        .build()
        .map_err(unusable)?;
        let builder = builder()?.with_client_cert_verifier(verifier);
        Ok(Arc::new(finish(
            builder.with_cert_resolver(Arc::clone(self) as _),
            protocols,
        )))
    }

    /// For HTTP/1.1 beyond loopback: callers prove themselves by key, not by certificate.
    ///
    /// # Errors
    /// `Internal` when rustls refuses the parts.
    pub fn http_config(self: &Arc<Self>) -> Result<Arc<ServerConfig>> {
        let builder = builder()?.with_no_client_auth();
        Ok(Arc::new(finish(
            builder.with_cert_resolver(Arc::clone(self) as _),
            &[b"http/1.1"],
        )))
    }

    /// The leaf that a handshake now would show, renewed where that is due.
    pub fn certified_key(&self) -> Arc<CertifiedKey> {
        // The guarded data is only ever replaced whole, so a poisoned lock protects nothing broken.
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.authority.clock().now();
        // The clock may also have been set back before the leaf's beginning.
        let due = now >= current.renew_at || now.after(CLOCK_SKEW) < current.made_at;
        let followed = self.names.as_ref();
        let followed = followed.filter(|names| !due && names.follows_addresses());
        let moved = followed.is_some_and(|names| {
            let look = now.since(current.looked_at) >= LOOK_AT_ADDRESSES;
            if look {
                current.looked_at = now;
            }
            look && names.addresses() != current.addresses
        });
        if due || moved {
            match make(&self.authority, self.names.as_ref(), &self.template) {
                Ok(fresh) => *current = fresh,
                Err(error) => {
                    tracing::error!(%error, expires_at = current.expires_at.unix_millis(), "cannot renew the server certificate");
                }
            }
        }
        Arc::clone(&current.certified)
    }
}

impl ResolvesServerCert for ServerTls {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.certified_key())
    }
}

fn make(
    authority: &Authority,
    names: Option<&ServerNames>,
    template: &LeafTemplate,
) -> Result<Current> {
    let key =
        KeyPair::generate().map_err(|cause| Error::internal("cannot make a key").because(cause))?;
    let dns = names.map(ServerNames::dns_names).unwrap_or_default();
    let addresses = names.map(ServerNames::addresses).unwrap_or_default();
    let mut sans = Vec::with_capacity(dns.len() + addresses.len());
    for name in &dns {
        sans.push(SanType::DnsName(name.as_str().try_into().map_err(
            |cause| Error::internal("a host name is not ASCII").because(cause),
        )?));
    }
    sans.extend(addresses.iter().copied().map(SanType::IpAddress));
    let leaf = Leaf::Template {
        template: template.clone(),
        names: sans,
    };
    let (certificate, expires_at) = authority.sign(leaf, &key)?;
    let signer = aws_lc_rs::sign::any_supported_type(&private_key(&key)).map_err(unusable)?;
    let now = authority.clock().now();
    // Half of its life, give or take a tenth, so that agents started together do not renew together.
    let percent = rand::rng().random_range(45..=55);
    Ok(Current {
        certified: Arc::new(CertifiedKey::new(
            vec![certificate.der().clone(), authority.certificate().clone()],
            signer,
        )),
        addresses,
        looked_at: now,
        made_at: now,
        renew_at: now.after(LEAF_LIFETIME * percent / 100).min(expires_at),
        expires_at,
    })
}

fn builder() -> Result<rustls::ConfigBuilder<ServerConfig, rustls::WantsVerifier>> {
    ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)
}

fn finish(mut config: ServerConfig, protocols: &[&[u8]]) -> ServerConfig {
    config.alpn_protocols = protocols.iter().map(|one| one.to_vec()).collect();
    // A resumed session would carry a client certificate past its end.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config
}

fn unusable(cause: impl std::fmt::Display) -> Error {
    Error::internal("TLS cannot be set up").because(cause)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_certificate_may_hold_becomes_a_name() {
        let names = ServerNames {
            configured: vec![
                "Host.Example.".into(),
                "192.0.2.7".into(),
                "bad_name!".into(),
            ],
            hostname: "-odd".into(),
            listen: vec!["192.0.2.8".parse().unwrap()],
        };
        let dns: Vec<_> = names.dns_names().into_iter().collect();
        assert_eq!(dns, ["host.example", "localhost"]);
        let addresses: Vec<_> = names.addresses().iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["127.0.0.1", "192.0.2.7", "192.0.2.8", "::1"]);
    }
}
