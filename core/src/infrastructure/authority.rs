//! Core's certificate authority: one CA for hosts, people and replicas.
//!
//! It lies in `<data_dir>/identity/` (0700; its key 0600), made at the first start. Replicas of one
//! Core share it: their folders hold copies.
//!
//! | leaf | alternative names | good for |
//! |---|---|---|
//! | host | `spiffe://<td>/tenant/<t>/host/<id>` | clients, and servers that only Core dials |
//! | person | `spiffe://<td>/user/<id>` | clients |
//! | replica, dialling | `spiffe://<td>/replica/<name>` | clients |
//! | Core's listener | `spiffe://<td>/core`, names and addresses | servers |
//!
//! A host's leaf names no address, so that nobody who checks names could take a host for Core; a
//! replica that dials checks the URI alone.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use ghost_domain::fleet::spiffe_host;
use ghost_domain::ports::{CertificateAuthority, Clock, IssuedCertificate};
use ghost_domain::{CredentialId, Error, ErrorCode, HostId, Result, TenantName, Timestamp};
use ghost_infrastructure::identity::{Authority, ClientTls, LeafTemplate, ServerNames, ServerTls};
use rustls::SignatureScheme;
use rustls::crypto::aws_lc_rs;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer};
use sha2::{Digest, Sha256};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::domain::PeerIdentity;
use crate::domain::ports::FleetAuthority;

/// What a proof of recovery signs before the request.
const RECOVERY: &[u8] = b"ghost-recover-v1";
/// More than any certificate of ours has.
const MOST_PEM_BYTES: usize = 16 * 1024;
/// RFC 5280, upper bound of a common name.
const MOST_NAME_CHARACTERS: usize = 64;

/// Core's CA.
pub struct CoreAuthority {
    authority: Arc<Authority>,
    trust_domain: String,
}

impl fmt::Debug for CoreAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CoreAuthority")
            .field("trust_domain", &self.trust_domain)
            .field("fingerprint", &self.authority.fingerprint())
            .finish()
    }
}

impl CoreAuthority {
    /// Opens the CA in `<data_dir>/identity/`, or makes it where there is none. Reads and writes
    /// files: call it where blocking is allowed.
    ///
    /// # Errors
    /// `IoFailed` where the files cannot be used; `InvalidArgument` for a trust domain that is none
    /// (SPIFFE-ID, section 2.1: 1 to 255 of `a-z 0-9 . - _`).
    pub fn open(data_dir: &Path, trust_domain: &str, clock: Arc<dyn Clock>) -> Result<Arc<Self>> {
        check_trust_domain(trust_domain)?;
        let authority = Authority::open_named(data_dir, "Ghost Core CA", clock)?;
        Ok(Arc::new(Self {
            authority: Arc::new(authority),
            trust_domain: trust_domain.to_owned(),
        }))
    }

    /// The CA's certificate, PEM.
    pub fn certificate_pem(&self) -> &str {
        self.authority.certificate_pem()
    }

    /// The SPIFFE id of Core's listener, the same for all replicas.
    pub fn core_uri(&self) -> String {
        format!("spiffe://{}/core", self.trust_domain)
    }

    /// TLS for the listener; [`ServerTls::config_for`] makes the configuration for the protocols
    /// (`ghost-tunnel/1` and `h2`). A client's certificate is optional and must be ours.
    ///
    /// # Errors
    /// `Internal`.
    pub fn server_tls(&self, names: ServerNames) -> Result<Arc<ServerTls>> {
        let template = LeafTemplate {
            common_name: "ghost-core".into(),
            uris: vec![self.core_uri()],
            server: true,
            ..LeafTemplate::default()
        };
        ServerTls::of_template(Arc::clone(&self.authority), names, template)
    }

    /// TLS for dialling as a replica: other replicas (`config_for` with [`Self::core_uri`]) and
    /// hosts (with their SPIFFE id).
    ///
    /// # Errors
    /// `InvalidArgument` for a name that is not 1 to 63 of `a-z A-Z 0-9 . - _`.
    pub fn replica_tls(&self, replica: &str) -> Result<Arc<ClientTls>> {
        if !is_segment(replica) || replica.len() > 63 {
            return Err(Error::new(
                ErrorCode::InvalidArgument,
                format!("{replica:?} is not a name for a replica"),
            )
            .because("1 to 63 of a-z, A-Z, 0-9, '.', '-' and '_' are expected"));
        }
        let template = LeafTemplate {
            common_name: format!("ghost-core {replica}"),
            uris: vec![format!("spiffe://{}/replica/{replica}", self.trust_domain)],
            client: true,
            ..LeafTemplate::default()
        };
        ClientTls::new(Arc::clone(&self.authority), template)
    }

    fn parse(&self, certificate: &X509Certificate<'_>) -> Result<PeerIdentity> {
        let names = certificate
            .subject_alternative_name()
            .map_err(|_| refused("its alternative names cannot be read"))?
            .ok_or_else(|| refused("it has no alternative name"))?;
        let [GeneralName::URI(uri)] = names.value.general_names.as_slice() else {
            return Err(refused("it names something else than one identity"));
        };
        let path = uri
            .strip_prefix("spiffe://")
            .and_then(|rest| rest.strip_prefix(self.trust_domain.as_str()))
            .and_then(|rest| rest.strip_prefix('/'))
            .ok_or_else(|| refused("it is of another trust domain"))?;
        let parts: Vec<&str> = path.split('/').collect();
        match parts.as_slice() {
            ["tenant", tenant, "host", host] => {
                let serial = certificate.raw_serial();
                let generation = serial
                    .last_chunk::<8>()
                    .filter(|_| serial.len() == 16)
                    .map(|tail| u64::from_be_bytes(*tail))
                    .ok_or_else(|| refused("its serial number is not one of ours"))?;
                Ok(PeerIdentity::Host {
                    tenant: TenantName::new(*tenant)
                        .map_err(|_| refused("its tenant's name is not legal"))?,
                    host: spelled(host)?,
                    generation,
                    key_hash: Sha256::digest(certificate.public_key().raw).into(),
                })
            }
            ["user", user] => Ok(PeerIdentity::User(spelled(user)?)),
            ["replica", replica] if is_segment(replica) => {
                Ok(PeerIdentity::Replica((*replica).to_owned()))
            }
            _ => Err(refused("its name is of no kind that is known")),
        }
    }
}

/// An id in the one spelling that we write.
fn spelled<T: std::str::FromStr + fmt::Display>(text: &str) -> Result<T> {
    text.parse::<T>()
        .ok()
        .filter(|id| id.to_string() == text)
        .ok_or_else(|| refused("its id is not in our spelling"))
}

fn is_segment(text: &str) -> bool {
    !text.is_empty()
        && text != "."
        && text != ".."
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

fn check_trust_domain(text: &str) -> Result<()> {
    let legal = (1..=255).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b));
    if legal {
        return Ok(());
    }
    let rule = "1 to 255 of a-z, 0-9, '.', '-' and '_'";
    Err(Error::new(
        ErrorCode::InvalidArgument,
        format!("{text:?} is not a trust domain"),
    )
    .because(rule)
    .field("core.trust_domain", rule))
}

fn refused(why: &str) -> Error {
    Error::new(
        ErrorCode::Unauthenticated,
        "the certificate is not one of this Core",
    )
    .because(why)
}

#[async_trait]
impl FleetAuthority for CoreAuthority {
    async fn sign_host(
        &self,
        request_pem: &str,
        tenant: &TenantName,
        host: HostId,
        generation: u64,
    ) -> Result<(IssuedCertificate, [u8; 32])> {
        let signed = self.authority.sign_template(
            request_pem,
            LeafTemplate {
                common_name: host.to_string(),
                uris: vec![spiffe_host(&self.trust_domain, tenant, host)],
                client: true,
                server: true,
                serial_tail: Some(generation),
            },
        )?;
        Ok((signed.issued, signed.key_hash))
    }

    async fn sign_user(
        &self,
        request_pem: &str,
        user: CredentialId,
        name: &str,
    ) -> Result<IssuedCertificate> {
        let common_name: String = name
            .chars()
            .filter(|c| !c.is_control())
            .take(MOST_NAME_CHARACTERS)
            .collect();
        let signed = self.authority.sign_template(
            request_pem,
            LeafTemplate {
                common_name,
                uris: vec![format!("spiffe://{}/user/{user}", self.trust_domain)],
                client: true,
                ..LeafTemplate::default()
            },
        )?;
        Ok(signed.issued)
    }

    fn peer(&self, certificate_der: &[u8]) -> Result<PeerIdentity> {
        let (rest, certificate) = X509Certificate::from_der(certificate_der)
            .map_err(|_| refused("it is not an X.509 certificate"))?;
        if !rest.is_empty() {
            return Err(refused("something follows it"));
        }
        self.parse(&certificate)
    }

    fn former_peer(
        &self,
        certificate_pem: &str,
        request_pem: &str,
        proof: &[u8],
    ) -> Result<(PeerIdentity, Timestamp)> {
        if certificate_pem.len().max(request_pem.len()) > MOST_PEM_BYTES {
            return Err(refused("it is longer than 16 KiB"));
        }
        let der = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
            .map_err(|_| refused("it is not a PEM block 'CERTIFICATE'"))?;
        let request = CertificateSigningRequestDer::from_pem_slice(request_pem.as_bytes())
            .map_err(|_| refused("the request is not a PEM block 'CERTIFICATE REQUEST'"))?;
        let (rest, certificate) = X509Certificate::from_der(&der)
            .map_err(|_| refused("it is not an X.509 certificate"))?;
        let (_, ca) = X509Certificate::from_der(self.authority.certificate())
            .map_err(|_| Error::internal("the CA's certificate cannot be read"))?;
        let ours = rest.is_empty()
            && certificate.issuer() == ca.subject()
            && certificate.verify_signature(Some(ca.public_key())).is_ok();
        if !ours {
            return Err(refused("its signature is not ours"));
        }
        let key = certificate.public_key().subject_public_key.data.as_ref();
        let mut message = RECOVERY.to_vec();
        message.extend_from_slice(&request);
        if !is_signed(key, &message, proof) {
            return Err(refused("the proof is not signed with its key"));
        }
        let end = certificate.validity().not_after.timestamp();
        let end = Timestamp::from_unix_millis(end.saturating_mul(1000));
        Ok((self.parse(&certificate)?, end))
    }

    fn fingerprint(&self) -> String {
        self.authority.fingerprint()
    }

    fn trust_domain(&self) -> &str {
        &self.trust_domain
    }
}

/// Whether `signature` over `message` is by the key, of whichever of the kinds that we sign for.
fn is_signed(key: &[u8], message: &[u8], signature: &[u8]) -> bool {
    let kinds = [
        SignatureScheme::ECDSA_NISTP256_SHA256,
        SignatureScheme::ECDSA_NISTP384_SHA384,
        SignatureScheme::ED25519,
    ];
    aws_lc_rs::default_provider()
        .signature_verification_algorithms
        .mapping
        .iter()
        .filter(|(scheme, _)| kinds.contains(scheme))
        .flat_map(|(_, algorithms)| algorithms.iter())
        .any(|algorithm| algorithm.verify_signature(key, message, signature).is_ok())
}

#[cfg(test)]
mod tests;
